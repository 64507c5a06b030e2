import hashlib
import inspect
import io
import json
import random
import sys
import textwrap

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import data.tokenizer as tokenizer_module
from data.prepare import named_tiktoken
from data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    load_tokenizer,
    read_sentencepiece,
    tokenizer_sha256,
    train_sentencepiece,
)
from data.tokenizer_json import LARGEST_FILE, SPACE
from hf_tokenizer import tokenizer_files
from sample import prompt_ids

TRICKY = [
    "", " ", "  two  spaces  ", "\t tab\t\t", "a\r\nb\rc\n\n\nd", "\0nul\0", "\ufeffbom",
    "na\u00efve caf\u00e9 e\u0301", "\u2581", "a\u2581b \u2581\u2581 \u2581", "\u2585\u2047",
    "\U0001f600 \U0001f468\u200d\U0001f469 \u4f60\u597d \u0627\u0644",
    "<s></s><unk><pad>", "<0x0A> <0xE2>", "<|endoftext|>", "\ue000\U0010ffff\ufffe", "\u00a0\u2028\u3000\x85\x0b\x0c",
    "def f(x):\n    if x:\n\n        return None\n", "\u212b\ufb01\u00bd", "9" * 50 + "=" * 99 + " " * 99, "x",
]
POOL = "ab \n\t\r\0_(:\u2581\u00e9\u4f60\U0001f600\u2585\ue000<>s0"


def random_texts(count: int) -> list[str]:
    generator = random.Random(1)
    anything = [chr(i) for i in range(0x11000) if not 0xD800 <= i < 0xE000]
    return ["".join(generator.choices(POOL if i % 2 else anything, k=generator.randrange(60))) for i in range(count)]


def foreign_model() -> bytes:
    """A model as Llama's is: with a dummy prefix, byte fallback and no normalisation."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, this is a text of words and spaces"] * 50), model_writer=model,
        model_type="bpe", vocab_size=300, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False)
    return model.getvalue()


def small_tiktoken() -> TiktokenTokenizer:
    ranks = {bytes([i]): i for i in range(256)} | {b"he": 256, b"ll": 257, b"  ": 258, b"llo": 260}  # 259 is unused
    pattern = r"'s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return TiktokenTokenizer(tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks,
                                               special_tokens={"<|endoftext|>": 261}))


SPECIAL = ["<unk>", "<s>", "</s>"]


def trained_by_library(made: tokenizers.Tokenizer, alphabet=()) -> dict:
    made.train_from_iterator([inspect.getsource(textwrap)], trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=list(alphabet), show_progress=False))
    return json.loads(made.to_str())


def byte_level_json() -> dict:
    """A tokenizer.json as Llama 3's: byte-level, bos and eos, a token that was added and is not special."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trained = trained_by_library(made, pre_tokenizers.ByteLevel.alphabet())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    trained["post_processor"] = {"type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
                                 "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
                                 "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    trained["added_tokens"].append(trained["added_tokens"][0] | {"id": 600, "content": "<th\u00e9>", "special": False})
    return trained


def llama_json(*, metaspace: bool = False) -> dict:
    """A tokenizer.json as Llama 2's: a space before every text, U+2581 for spaces, bytes for unknown characters.
    transformers 5 writes the same with Metaspace, but that leaves a text alone that has a space in front."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    trained = trained_by_library(made)
    count = len(trained["model"]["vocab"])
    trained["model"]["vocab"] |= {f"<0x{byte:02X}>": count + byte for byte in range(256)}
    return trained


def save_hugging_face(folder, tokenizer: dict, **files) -> None:
    for name, content in {"tokenizer": tokenizer, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


@pytest.fixture(scope="module")
def made() -> dict:
    trained = train_sentencepiece([inspect.getsource(textwrap), inspect.getsource(json.decoder)], 800)
    return {"byte": ByteTokenizer(), "char": CharTokenizer("hello wrd"), "sentencepiece": trained,
            "tiktoken": small_tiktoken(), "huggingface": HuggingFaceTokenizer(byte_level_json(), {}, 1, [2])}


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "tiktoken", "huggingface"])
def test_decode_of_encode_is_the_text(made, kind):
    tokenizer = made[kind]
    assert tokenizer.exact
    for text in TRICKY + random_texts(400):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "tiktoken", "huggingface"])
def test_decoding_token_by_token_gives_the_same_bytes(made, kind):
    tokenizer = made[kind]
    for text in TRICKY:
        assert b"".join(tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)) == text.encode()


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "tiktoken", "huggingface"])
def test_text_never_gives_a_special_token_and_bos_gives_no_text(made, kind):
    tokenizer = made[kind]
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.bos_id]) == "hello"
    for text in TRICKY:
        assert tokenizer.bos_id not in tokenizer.encode(text)
        assert all(tokenizer.decode_bytes([i]) for i in tokenizer.encode(text))


def test_bytes_that_are_not_utf8_become_replacement_characters(made):
    assert made["byte"].decode([0xE2, 0x96, 65]) == "\ufffdA"


def test_char_ids_are_the_places_in_the_sorted_characters(made):
    assert made["char"].encode(" dehlorw") == list(range(8))
    assert made["char"].bos_id is None
    assert made["char"].decode([3, 2, 4]) == "hel"


def test_a_text_ends_where_the_next_begins_and_at_the_tokenizers_own_eos(made):
    ends = {kind: tokenizer.end_ids for kind, tokenizer in made.items()}
    assert ends == {"byte": {256}, "char": set(), "sentencepiece": {1, 2}, "tiktoken": {261}, "huggingface": {1, 2}}


def test_characters_outside_a_char_vocabulary_are_listed(made):
    with pytest.raises(ValueError, match="characters 'XZ' are not among the 8"):
        made["char"].encode("hello ZXZ")


@pytest.mark.parametrize("kind", ["byte", "char", "sentencepiece", "tiktoken", "huggingface"])
def test_a_saved_tokenizer_loads_as_the_same(made, kind, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    made[kind].save(first)
    loaded = load_tokenizer(first)
    loaded.save(second)
    assert (loaded.kind, loaded.vocab_size, loaded.bos_id) == (kind, made[kind].vocab_size, made[kind].bos_id)
    assert loaded.encode("hello world") == made[kind].encode("hello world")
    assert loaded.end_ids == made[kind].end_ids
    name = "tokenizer.model" if kind == "sentencepiece" else "tokenizer.json"
    assert [path.name for path in first.iterdir()] == [name]
    content = (first / name).read_bytes()
    assert content == (second / name).read_bytes() == loaded.content() == made[kind].content()
    assert tokenizer_sha256(first) == loaded.sha256 == hashlib.sha256(content).hexdigest()


def test_training_twice_gives_the_same_file(tmp_path):
    models = [train_sentencepiece([inspect.getsource(textwrap)], 500).first.serialized_model_proto() for _ in range(2)]
    assert models[0] == models[1]


def test_no_piece_goes_past_the_end_of_a_line(made):
    """So a prompt that ends with its line is cut as in training; indentation and newlines are still single tokens."""
    pieces = [piece.decode("utf-8", "ignore") for piece in made["sentencepiece"].pieces]
    assert all("\n" not in piece.rstrip("\n") for piece in pieces)
    assert "        " in pieces and "\n\n" in pieces and any(piece.endswith(":\n") for piece in pieces)


def test_a_text_without_spaces_still_gives_an_exact_tokenizer():
    tokenizer = train_sentencepiece(["abcab" * 20], 300)
    assert tokenizer.exact and tokenizer.decode(tokenizer.encode(" a \u2581 \n")) == " a \u2581 \n"


def test_a_small_text_gives_fewer_pieces_and_a_small_vocabulary_is_refused():
    assert train_sentencepiece(["hello world"], 4096).vocab_size < 300
    with pytest.raises(ValueError, match="vocab_size=100 .* needs at least 2"):
        train_sentencepiece(["hello world"], 100)


def test_a_foreign_model_gives_the_ids_of_sentencepiece():
    model = foreign_model()
    reference, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model), SentencePieceTokenizer(model)
    assert tokenizer.dummy_prefix and not tokenizer.exact and tokenizer.content() == model
    assert (tokenizer.bos_id, tokenizer.end_ids) == (reference.bos_id(), {reference.bos_id(), reference.eos_id()})
    for text in TRICKY:
        if "\u2581" not in text:
            assert tokenizer.encode(text) == reference.encode(text)


def test_only_the_dummy_space_of_a_foreign_model_is_taken_away():
    tokenizer = SentencePieceTokenizer(foreign_model())
    for text in ["hello", " hello", "  hello ", "a\u2581b", "\u2581a", "\n x"]:
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == b" " + text.encode()
        assert tokenizer.decode(tokenizer.encode(text)) == text
    parts = tokenizer.encode("hello wo") + tokenizer.encode("rld", start=False)
    assert tokenizer.decode(parts) == "hello world" and tokenizer.decode_bytes(parts) == b" hello world"


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"garbage\n" * 99, "cut", "flipped"])
def test_a_garbage_model_file_is_one_error_line(content, tmp_path):
    model = foreign_model()
    content = {"cut": model[:1000], "flipped": b"\n\xff" + model[2:]}.get(content, content)
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ValueError, match="x.model: not a SentencePiece model") as raised:
        read_sentencepiece(tmp_path / "x.model")
    assert "\n" not in str(raised.value)


def test_a_model_that_crashes_sentencepiece_does_not_crash_us(tmp_path, monkeypatch):
    (tmp_path / "x.model").write_bytes(foreign_model())
    assert read_sentencepiece(tmp_path / "x.model").vocab_size > 256
    monkeypatch.setattr(tokenizer_module, "PROBE", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        read_sentencepiece(tmp_path / "x.model")


def test_a_missing_model_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.model"):
        read_sentencepiece(tmp_path / "x.model")


@pytest.mark.parametrize("text", [
    "", "{", "[]", "3", '{"kind": "lzw"}', "{}", '{"kind": []}', '{"kind": "char"}', '{"kind": "char", "chars": 3}',
    '{"kind": "tiktoken"}', '{"kind": "tiktoken", "name": "x", "pattern": "a", "ranks": {"!": 1}, "special": {}}',
    '{"kind": "tiktoken", "name": "x", "pattern": "a", "ranks": {"YQ==": 1}, "special": {}}', "\udcff", "[" * 100_000])
def test_a_damaged_tokenizer_file_is_one_error_line(text, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="damaged tokenizer file") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", [
    {"tokenizer": []}, {"tokenizer": {}}, {"config": 3}, {"config": None}, {"bos_id": "1"}, {"bos_id": []},
    {"bos_id": -1}, {"end_ids": 3}, {"end_ids": [9999]}, {"end_ids": [[]]}, {"end_ids": None}, {"more": 1}])
def test_a_damaged_huggingface_file_of_ours_is_one_error_line(change, tmp_path):
    fields = json.loads(HuggingFaceTokenizer(byte_level_json(), {}, 1, [2]).content())
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match="damaged tokenizer file") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", [
    {"pattern": "(("}, {"pattern": 5}, {"pattern": ""}, {"pattern": "x*"}, {"pattern": r"\w+"},
    {"pattern": r"(?:(a+)\1?)+$|[^a]"}, {"special": {"a": -1}}, {"special": {"a": 7}}, {"special": {"a": 2**40}},
    {"special": 3}])
def test_a_damaged_tiktoken_file_is_one_error_line(change, tmp_path, capfd):
    fields = {"kind": "tiktoken", **small_tiktoken().fields(), **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="damaged tokenizer file"):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""  # where Rust would write of a panic


def test_a_pattern_that_fails_on_a_later_text_is_an_error_and_no_panic():
    fields = small_tiktoken().fields() | {"pattern": r"(?:(b+)\1?)+$|[\s\S]"}
    tokenizer = TiktokenTokenizer.from_fields(fields)
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    with pytest.raises(ValueError, match="its pattern cannot split this text"):
        tokenizer.encode("b" * 99 + "!")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_file_far_too_large_is_not_read(name, tmp_path):
    with open(tmp_path / name, "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    for read in (load_tokenizer, tokenizer_sha256):
        with pytest.raises(ValueError, match=f"{name}: has more than"):
            read(tmp_path)


def test_a_folder_must_have_exactly_one_tokenizer(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.model or tokenizer.json"):
        load_tokenizer(tmp_path)
    made["byte"].save(tmp_path)
    made["sentencepiece"].save(tmp_path)
    with pytest.raises(ValueError, match="both"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("model", ["ours", "foreign"])
@pytest.mark.parametrize("start", [True, False])
def test_a_text_cut_at_line_ends_has_the_ids_of_the_whole(made, monkeypatch, model, start):
    """The longer a text, the slower SentencePiece; it is given a few lines at once."""
    tokenizer = made["sentencepiece"] if model == "ours" else SentencePieceTokenizer(foreign_model())
    whole = tokenizer.first if start else tokenizer.rest
    texts = [text for text in TRICKY + random_texts(100) if SPACE not in text]
    texts += ["\n".join(texts), "\n\n".join(texts) + "\n", "x\n\n\n y\n", "\n\n", "a\n", inspect.getsource(json)]
    assert tokenizer.splits
    for part in (0, 1, 40):
        monkeypatch.setattr(tokenizer_module, "PART", part)
        for text in texts:
            assert tokenizer.encode(text, start) == whole.encode(text), text


def test_a_text_is_not_cut_where_a_piece_goes_on_after_a_line_end():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a\nb" * 20] * 50), model_writer=model, model_type="bpe", vocab_size=270,
        hard_vocab_limit=False, byte_fallback=True, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, required_chars="\n", split_by_unicode_script=False)
    tokenizer = SentencePieceTokenizer(model.getvalue())
    assert any(b"\nb" in piece for piece in tokenizer.pieces) and not tokenizer.splits
    assert tokenizer.encode("a\nb" * 2000) == tokenizer.first.encode("a\nb" * 2000)


def test_tiktoken_survives_very_long_runs_of_spaces(made):
    for text in [" " * 1_000_000, "x" + "\n" * 600_000 + "y"]:
        assert made["tiktoken"].decode(made["tiktoken"].encode(text)) == text


def test_an_unknown_tiktoken_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="tiktoken:gpt5000 is unknown; choose from .*gpt2"):
        named_tiktoken("gpt5000")


def test_a_failed_download_is_one_error_line(monkeypatch):
    def fail(name):
        raise ConnectionError("no route\nto host")
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(OSError, match=r"tiktoken:gpt2 could not be fetched \(no route\)"):
        named_tiktoken("gpt2")


@pytest.mark.parametrize("tokenizer", [byte_level_json(), llama_json(), llama_json(metaspace=True)],
                         ids=["byte level", "llama", "metaspace"])
def test_a_tokenizer_json_gives_the_ids_and_texts_of_the_library(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    ours, theirs = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TRICKY + random_texts(300):
        if not any(name in text for name in SPECIAL):
            ids = ours.encode(text)
            assert ids == theirs.encode(text, add_special_tokens=False).ids
            assert ours.decode(ids) == theirs.decode(ids)


def test_a_special_token_spelled_out_is_text_and_an_added_one_is_itself(made):
    tokenizer, llama = made["huggingface"], HuggingFaceTokenizer(llama_json(), {}, 1, [2])
    for text in ["</s>", "a<s>b", "<unk>"]:
        assert tokenizer.decode(tokenizer.encode(text)) == llama.decode(llama.encode(text)) == text
        assert not {0, 1, 2} & {*tokenizer.encode(text), *llama.encode(text)}
    assert tokenizer.encode("<th\u00e9>") == [600] and tokenizer.decode_bytes([600]) == "<th\u00e9>".encode()
    not_called_special = byte_level_json()
    for token in not_called_special["added_tokens"]:
        token["special"] = False
    assert 2 not in HuggingFaceTokenizer(not_called_special, {}, 1, [2]).encode("</s>")


@pytest.mark.parametrize("tokenizer", [llama_json(), llama_json(metaspace=True)], ids=["llama", "metaspace"])
def test_a_later_chunk_of_a_tokenizer_json_gets_no_space(tokenizer):
    made = HuggingFaceTokenizer(tokenizer, {}, None, [])
    assert made.dummy_prefix and not made.exact and made.bos_id is None and made.end_ids == frozenset()
    parts = made.encode("hello wo") + made.encode("rld", start=False)
    assert made.decode_bytes(parts) == b" hello world" and made.decode(parts) == "hello world"


def test_truncation_and_padding_of_a_tokenizer_json_are_off():
    tokenizer = byte_level_json()
    tokenizer["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "<unk>"}
    made = HuggingFaceTokenizer(tokenizer, {}, 1, [])
    assert made.decode(made.encode("a longer text")) == "a longer text" and made.encode("") == []


def test_the_bytes_of_a_partial_character_are_kept():
    made = HuggingFaceTokenizer(byte_level_json(), {}, 1, [])
    ids = made.encode("\u4f60")
    assert len(ids) == 3 and b"".join(made.decode_bytes([i]) for i in ids) == "\u4f60".encode()


@pytest.mark.parametrize("files, bos, ends", [
    ({}, None, set()),
    ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, 1, {1, 2}),
    ({"tokenizer_config": {"bos_token": None, "eos_token": "</s>"}}, None, {2}),
    ({"config": {"eos_token_id": 0}, "tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}}, 1, {0, 1}),
    ({"generation_config": {"bos_token_id": 2, "eos_token_id": [0, 600]}, "config": {"eos_token_id": 1}}, 2,
     {0, 2, 600}),
    ({"generation_config": {"eos_token_id": None}, "config": {"bos_token_id": 1, "eos_token_id": 2}}, 1, {1, 2})])
def test_bos_and_eos_come_from_the_file_that_is_trusted_most(files, bos, ends, tmp_path):
    save_hugging_face(tmp_path, byte_level_json(), **files)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.end_ids) == (bos, ends)
    assert tokenizer.decode([*ends, *tokenizer.encode("text")]) == "text"
    assert tokenizer.config == files.get("tokenizer_config", {})
    assert tokenizer_sha256(tmp_path) == tokenizer.sha256


def hugging_face_of(model: SentencePieceTokenizer, *more: str) -> dict:
    vocab = {model.first.id_to_piece(i): i for i in range(model.vocab_size)}
    added = [{"id": model.vocab_size + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, name in enumerate(more)]
    return llama_json() | {"added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": [],
                                                            "byte_fallback": True}}


def test_of_both_files_the_one_is_taken_that_knows_all_ids(made, tmp_path):
    made["sentencepiece"].save(tmp_path)
    save_hugging_face(tmp_path, hugging_face_of(made["sentencepiece"]))
    assert load_tokenizer(tmp_path).kind == "sentencepiece"
    assert tokenizer_sha256(tmp_path) == made["sentencepiece"].sha256
    save_hugging_face(tmp_path, hugging_face_of(made["sentencepiece"], "<|im_end|>"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("huggingface", made["sentencepiece"].vocab_size + 1)
    assert tokenizer_sha256(tmp_path) == tokenizer.sha256 != made["sentencepiece"].sha256  # so a stray file is found


def test_a_tokenizer_model_of_tiktoken_is_left_for_the_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    for read in (load_tokenizer, tokenizer_sha256):
        with pytest.raises(ValueError, match="is tiktoken's .*; put the tokenizer.json of the same model beside it"):
            read(tmp_path)
    save_hugging_face(tmp_path, byte_level_json())
    assert load_tokenizer(tmp_path).kind == "huggingface"


def test_without_the_library_a_tokenizer_json_is_one_error_line(tmp_path, monkeypatch):
    save_hugging_face(tmp_path, byte_level_json())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(OSError, match=r"needs the library tokenizers: pip install -e '\.\[hf\]'"):
        load_tokenizer(tmp_path)


def changed(**parts) -> dict:
    return byte_level_json() | parts


@pytest.mark.parametrize("tokenizer, match", [
    ({"model": 3}, "damaged"), ({"model": {"vocab": []}, "added_tokens": []}, "must have ids"),
    (changed(model={"type": "BPE", "vocab": {"a": 2**40}, "merges": []}), "all of them below"),
    (changed(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}), "all of them below"),
    (changed(decoder=None), "decoder null is not one"),
    (changed(model=byte_level_json()["model"] | {"continuing_subword_prefix": "##"}), "has continuing_subword"),
    (changed(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "decoder WordPiece is not one"),
    (changed(decoder={"type": "Replace", "pattern": {"String": "e"}, "content": "X"}), "another text of its ids"),
    (changed(decoder={"type": "Sequence"}), "damaged"), (changed(normalizer={"type": "New"}), "not of Hugging Face's"),
    (changed(normalizer={"type": "Sequence", "normalizers": 40 * [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}]}), "makes texts too long"),
    (changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}),
     "not of Hugging Face's kind"),
    (changed(added_tokens=[{"id": 2**31}]), "damaged"), (changed(added_tokens=7), "damaged")])
def test_a_damaged_tokenizer_json_is_one_error_line(tokenizer, match, tmp_path, capfd):
    save_hugging_face(tmp_path, tokenizer)
    with pytest.raises(ValueError, match=match) as raised:
        load_tokenizer(tmp_path)
    assert str(raised.value).count("tokenizer.json: damaged tokenizer file") == 1 and "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("files, match", [
    ({"config": []}, "config.json: damaged .*not an object"),
    ({"generation_config": {"eos_token_id": 9999}}, "json: bos or eos, 9999, is not an id"),
    ({"config": {"bos_token_id": "1"}}, "bos or eos, '1', is not an id"),
    ({"config": {"eos_token_id": [True]}}, "bos or eos, True, is not an id"),
    ({"config": {"eos_token_id": [[]]}}, "damaged"),
    ({"tokenizer_config": {"eos_token": "<end>"}}, "does not have tokenizer_config.json's eos_token '<end>'"),
    ({"tokenizer_config": {"eos_token": 7}}, "does not have"),
    ({"tokenizer_config": {"eos_token": {}}}, "no 'content'")])
def test_wrong_files_beside_a_tokenizer_json_are_named(files, match, tmp_path):
    save_hugging_face(tmp_path, byte_level_json(), **files)
    with pytest.raises(ValueError, match=match) as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_special_token_that_cannot_be_kept_out_of_texts_is_refused(tmp_path):
    save_hugging_face(tmp_path, byte_level_json(), config={"eos_token_id": byte_level_json()["model"]["vocab"]["e"]})
    with pytest.raises(ValueError, match="eos, id 71, is 'e' here, which a text can have: .* config.json ") as raised:
        load_tokenizer(tmp_path)
    assert "damaged" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_prompt_starts_with_bos_where_its_tokenizer_says_so(tmp_path):
    for bos, name in ((True, "with"), (False, "without")):
        (tmp_path / name).mkdir()
        for file, content in tokenizer_files(ByteTokenizer()).items():
            content = content if bos or file != "tokenizer.json" else json.dumps(
                json.loads(content) | {"post_processor": None}).encode()
            (tmp_path / name / file).write_bytes(content)
        tokenizer = load_tokenizer(tmp_path / name)
        assert tokenizer.bos_before_prompts == bos
        assert prompt_ids(tokenizer, "a") == ([256, 97] if bos else [97]) and prompt_ids(tokenizer, "") == [256]


def test_the_chat_template_that_transformers_saves_apart_goes_along(tmp_path):
    for file, content in tokenizer_files(ByteTokenizer()).items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    made = tokenizer_files(load_tokenizer(tmp_path))
    assert json.loads(made["tokenizer_config.json"])["chat_template"] == "{{ messages }}"
