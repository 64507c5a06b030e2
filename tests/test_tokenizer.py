import base64
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
from transformers import AutoTokenizer

import text.tokenizer as tokenizer_module
from data.prepare import named_tiktoken
from sample import prompt_ids
from text.tokenizer import (
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
from text.tokenizer_export import tokenizer_files
from text.tokenizer_json import LARGEST_FILE, SPACE

TRICKY = ["", " ", "x", "  two  spaces  ", "\t tab\t\t", "a\r\nb\rc\n\n\nd", "\0nul\0", "\ufeffbom"]
TRICKY += ["na\u00efve caf\u00e9 e\u0301", "\u2581", "a\u2581b \u2581\u2581 \u2581", "\u2585\u2047"]
TRICKY += ["\U0001f600 \U0001f468\u200d\U0001f469 \u4f60\u597d \u0627\u0644", "\u212b\ufb01\u00bd"]
TRICKY += ["<s></s><unk><pad>", "<0x0A> <0xE2>", "<|endoftext|>", "\ue000\U0010ffff\ufffe"]
TRICKY += ["\u00a0\u2028\u3000\x85\x0b\x0c", "def f(x):\n    if x:\n\n        return None\n"]
TRICKY += ["9" * 50 + "=" * 99 + " " * 99]
POOL = "ab \n\t\r\0_(:\u2581\u00e9\u4f60\U0001f600\u2585\ue000<>s0"
SPECIAL = ["<unk>", "<s>", "</s>"]
KINDS = ["byte", "char", "sentencepiece", "tiktoken", "huggingface"]
FOR_ALL_TEXTS = [kind for kind in KINDS if kind != "char"]


def random_texts(count: int) -> list[str]:
    generator = random.Random(1)
    anything = [chr(i) for i in range(0x11000) if not 0xD800 <= i < 0xE000]
    return [
        "".join(generator.choices(POOL if i % 2 else anything, k=generator.randrange(60)))
        for i in range(count)
    ]


def trained_model(text: str, **options) -> bytes:
    """A SentencePiece model with byte fallback and no normalisation, trained by the library."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 50),
        model_writer=model,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        **options,
    )
    return model.getvalue()


def foreign_model() -> bytes:
    """A model as Llama's, which puts a space before every text."""
    return trained_model("hello world, this is a text of words and spaces", vocab_size=300)


def small_tiktoken() -> TiktokenTokenizer:
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"he": 256, b"ll": 257, b"  ": 258, b"llo": 260}  # 259 is unused
    pattern = r"'s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    special = {"<|endoftext|>": 261}
    return TiktokenTokenizer(
        tiktoken.Encoding("s", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    )


def trained_by_library(made: tokenizers.Tokenizer, alphabet=()) -> dict:
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    made.train_from_iterator([inspect.getsource(textwrap)], trainer)
    return json.loads(made.to_str())


def byte_level_json() -> dict:
    """A tokenizer.json as Llama 3's: bytes, bos and eos, and an added token that is not special."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trained = trained_by_library(made, pre_tokenizers.ByteLevel.alphabet())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    trained["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    added = {"id": 600, "content": "<th\u00e9>", "special": False}
    trained["added_tokens"].append(trained["added_tokens"][0] | added)
    return trained


def llama_json(*, metaspace: bool = False) -> dict:
    """A tokenizer.json as Llama 2's: a space before every text, U+2581 for spaces, bytes for
    unknown characters. transformers 5 writes it with Metaspace, which adds no space where one is.
    """
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        made.normalizer = normalizers.Sequence(steps)
    spaces, strip = decoders.Replace(SPACE, " "), decoders.Strip(" ", 1, 0)
    steps = [spaces, decoders.ByteFallback(), decoders.Fuse(), strip]
    made.decoder = decoders.Sequence(steps)
    trained = trained_by_library(made)
    vocab = trained["model"]["vocab"]
    count = len(vocab)
    vocab |= {f"<0x{byte:02X}>": count + byte for byte in range(256)}
    return trained


BYTE_LEVEL, LLAMA, METASPACE = byte_level_json(), llama_json(), llama_json(metaspace=True)


def save_hugging_face(folder, tokenizer: dict, **files) -> None:
    for name, content in {"tokenizer": tokenizer, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def refused(folder, match, kind=ValueError, read=load_tokenizer):
    """The folder's tokenizer must not load; the error is one line, which this returns."""
    with pytest.raises(kind, match=match) as raised:
        read(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture(scope="module")
def made() -> dict:
    texts = [inspect.getsource(textwrap), inspect.getsource(json.decoder)]
    return {
        "byte": ByteTokenizer(),
        "char": CharTokenizer("hello wrd"),
        "sentencepiece": train_sentencepiece(texts, 800),
        "tiktoken": small_tiktoken(),
        "huggingface": HuggingFaceTokenizer(BYTE_LEVEL, {}, 1, [2]),
    }


# All kinds


@pytest.mark.parametrize("kind", FOR_ALL_TEXTS)
def test_decode_of_encode_is_the_text(made, kind):
    tokenizer = made[kind]
    assert tokenizer.exact
    for text in TRICKY + random_texts(400):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()


@pytest.mark.parametrize("kind", FOR_ALL_TEXTS)
def test_text_never_gives_a_special_token_and_bos_gives_no_text(made, kind):
    tokenizer, bos = made[kind], made[kind].bos_id
    assert tokenizer.decode([bos, *tokenizer.encode("hello"), bos]) == "hello"
    for text in TRICKY:
        ids = tokenizer.encode(text)
        assert bos not in ids and all(tokenizer.decode_bytes([i]) for i in ids)


def test_bytes_that_are_not_utf8_become_replacement_characters(made):
    assert made["byte"].decode([0xE2, 0x96, 65]) == "\ufffdA"


def test_char_ids_are_the_places_in_the_sorted_characters(made):
    assert made["char"].encode(" dehlorw") == list(range(8))
    assert made["char"].bos_id is None
    assert made["char"].decode([3, 2, 4]) == "hel"
    with pytest.raises(ValueError, match="characters 'XZ' are not among the 8"):
        made["char"].encode("hello ZXZ")


def test_a_text_ends_where_the_next_begins_and_at_the_tokenizers_own_eos(made):
    ends = [{256}, set(), {1, 2}, {261}, {1, 2}]
    assert {kind: made[kind].end_ids for kind in KINDS} == dict(zip(KINDS, ends, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_as_the_same(made, kind, tmp_path):
    saved, name = made[kind], "tokenizer.model" if kind == "sentencepiece" else "tokenizer.json"
    saved.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    content = (tmp_path / name).read_bytes()
    loaded = load_tokenizer(tmp_path)
    for tokenizer in (saved, loaded):
        assert (tokenizer.kind, tokenizer.content()) == (kind, content)
    assert (loaded.vocab_size, loaded.bos_id) == (saved.vocab_size, saved.bos_id)
    assert loaded.end_ids == saved.end_ids
    assert loaded.encode("hello world") == saved.encode("hello world")
    assert tokenizer_sha256(tmp_path) == loaded.sha256 == hashlib.sha256(content).hexdigest()


# SentencePiece


def test_training_twice_gives_the_same_file():
    a, b = (train_sentencepiece([inspect.getsource(textwrap)], 500).content() for _ in range(2))
    assert a == b


def test_no_piece_goes_past_the_end_of_a_line(made):
    """Then a prompt that ends with its line is cut as in training. Indentation and newlines are
    still single tokens.
    """
    pieces = [piece.decode("utf-8", "ignore") for piece in made["sentencepiece"].pieces]
    assert all("\n" not in piece.rstrip("\n") for piece in pieces)
    assert "        " in pieces and "\n\n" in pieces
    assert any(piece.endswith(":\n") for piece in pieces)


def test_a_text_without_spaces_still_gives_an_exact_tokenizer():
    tokenizer = train_sentencepiece(["abcab" * 20], 300)
    assert tokenizer.exact and tokenizer.decode(tokenizer.encode(" a \u2581 \n")) == " a \u2581 \n"


def test_a_small_text_gives_fewer_pieces_and_a_small_vocabulary_is_refused():
    assert train_sentencepiece(["hello world"], 4096).vocab_size < 300
    for size in (0, 100, 260):
        with pytest.raises(ValueError, match=f"vocab_size={size} is too small .* at least 261 ids"):
            train_sentencepiece(["hello world"], size)


def test_rare_characters_are_spelled_by_bytes_where_there_is_no_room_for_all():
    often, seldom = "\u4f60\u597d", "".join(map(chr, range(0x4E00, 0x4F00)))
    text = f"{often * 50}{seldom}\n{often * 50}"
    for size in (261, 300, 400):
        tokenizer = train_sentencepiece([text], size)
        assert tokenizer.vocab_size <= size and tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.sha256 == train_sentencepiece([text], size).sha256
    pieces = [piece.decode(errors="ignore") for piece in tokenizer.pieces]
    assert {"\u4f60", often} <= set(pieces) and len(set(pieces) & set(seldom)) == 69 - 2


def test_a_foreign_model_gives_the_ids_of_sentencepiece():
    model = foreign_model()
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.dummy_prefix and not tokenizer.exact and tokenizer.content() == model
    assert tokenizer.bos_id == reference.bos_id()
    assert tokenizer.end_ids == {reference.bos_id(), reference.eos_id()}
    for text in TRICKY:
        if "\u2581" not in text:
            assert tokenizer.encode(text) == reference.encode(text)


def test_only_the_dummy_space_of_a_foreign_model_is_taken_away():
    tokenizer = SentencePieceTokenizer(foreign_model())
    for text in ["hello", " hello", "  hello ", "a\u2581b", "\u2581a", "\n x"]:
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == b" " + text.encode()
        assert tokenizer.decode(tokenizer.encode(text)) == text
    parts = tokenizer.encode("hello wo") + tokenizer.encode("rld", start=False)
    assert tokenizer.decode(parts) == "hello world"
    assert tokenizer.decode_bytes(parts) == b" hello world"


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"garbage\n" * 99, "cut", "flipped"])
def test_a_garbage_model_file_is_one_error_line(content, tmp_path):
    model = foreign_model()
    content = {"cut": model[:1000], "flipped": b"\n\xff" + model[2:]}.get(content, content)
    (tmp_path / "x.model").write_bytes(content)
    match = "x.model: not a SentencePiece model"
    refused(tmp_path / "x.model", match, read=read_sentencepiece)


def test_a_model_that_crashes_sentencepiece_does_not_crash_us(tmp_path, monkeypatch):
    (tmp_path / "x.model").write_bytes(foreign_model())
    assert read_sentencepiece(tmp_path / "x.model").vocab_size > 256
    # Which models crash SentencePiece differs from version to version.
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(tokenizer_module, "PROBE", crash)
    refused(tmp_path / "x.model", "not a SentencePiece model", read=read_sentencepiece)


def test_a_missing_model_file_is_named(tmp_path):
    refused(tmp_path / "x.model", "x.model", FileNotFoundError, read_sentencepiece)


@pytest.mark.parametrize("model", ["ours", "foreign"])
@pytest.mark.parametrize("start", [True, False])
def test_a_text_cut_at_line_ends_has_the_ids_of_the_whole(made, model, start):
    """SentencePiece is slower for longer texts, so it is given some lines at a time."""
    ours, foreign = made["sentencepiece"], SentencePieceTokenizer(foreign_model())
    tokenizer = ours if model == "ours" else foreign
    whole = tokenizer.first if start else tokenizer.rest
    texts = [text for text in TRICKY + random_texts(300) if SPACE not in text]
    texts = ["\n".join(texts), "\n\n".join(texts) + "\n", inspect.getsource(json)]
    texts += [20 * (2 * "x\n\n\n y\n\n" + "a\n" + 99 * "b ")]
    assert tokenizer.splits and min(map(len, texts)) > 2000
    for text in texts:
        for shift in range(0, 200, 11):  # cuts at other places each time
            moved = shift * "x" + text
            assert tokenizer.encode(moved, start) == whole.encode(moved), moved


def test_a_text_is_not_cut_where_a_piece_goes_on_after_a_line_end():
    options = {"add_dummy_prefix": False, "required_chars": "\n", "split_by_unicode_script": False}
    tokenizer = SentencePieceTokenizer(trained_model("a\nb" * 20, vocab_size=270, **options))
    assert any(b"\nb" in piece for piece in tokenizer.pieces) and not tokenizer.splits
    assert tokenizer.encode("a\nb" * 2000) == tokenizer.first.encode("a\nb" * 2000)


# tiktoken


def test_a_pattern_that_fails_on_a_later_text_is_an_error_and_no_panic():
    fields = small_tiktoken().fields() | {"pattern": r"(?:(b+)\1?)+$|[\s\S]"}
    tokenizer = TiktokenTokenizer.from_fields(fields)
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    with pytest.raises(ValueError, match="its pattern cannot split this text"):
        tokenizer.encode("b" * 99 + "!")


def test_tiktoken_survives_very_long_runs_of_spaces(made):
    for text in [" " * 1_000_000, "x" + "\n" * 600_000 + "y"]:
        assert made["tiktoken"].decode(made["tiktoken"].encode(text)) == text


def test_an_unknown_tiktoken_name_is_refused_with_the_known_ones():
    refused("gpt5000", "tiktoken:gpt5000 is unknown; choose from .*gpt2", read=named_tiktoken)


def test_a_failed_download_is_one_error_line(monkeypatch):
    def fail(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)  # it would use the network
    refused("gpt2", r"tiktoken:gpt2 could not be fetched \(no route\)", OSError, named_tiktoken)


# Damaged files


BAD_TIKTOKEN = '{"kind": "tiktoken", "name": "x", "pattern": "a", "ranks": %s, "special": {}}'
DAMAGED = ["", "{", "[]", "3", '{"kind": "lzw"}', "{}", '{"kind": []}', '{"kind": "char"}']
DAMAGED += ['{"kind": "char", "chars": 3}', '{"kind": "tiktoken"}', "\udcff", "[" * 100_000]
DAMAGED += [BAD_TIKTOKEN % '{"!": 1}', BAD_TIKTOKEN % '{"YQ==": 1}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_tokenizer_file_is_one_error_line(text, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(tmp_path, "damaged tokenizer file")


BAD_PATTERNS = ["((", 5, "", "x*", r"\w+", r"(?:(a+)\1?)+$|[^a]"]
BAD_SPECIAL = [{"a": -1}, {"a": 7}, {"a": 2**40}, 3]
TIKTOKEN_CHANGES = [{"pattern": pattern} for pattern in BAD_PATTERNS]
TIKTOKEN_CHANGES += [{"special": special} for special in BAD_SPECIAL]


@pytest.mark.parametrize("change", TIKTOKEN_CHANGES)
def test_a_damaged_tiktoken_file_is_one_error_line(change, tmp_path, capfd):
    fields = {"kind": "tiktoken", **small_tiktoken().fields(), **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    refused(tmp_path, "damaged tokenizer file")
    assert capfd.readouterr().err == ""  # where Rust would write of a panic


OUR_CHANGES = [{"tokenizer": []}, {"tokenizer": {}}, {"config": 3}, {"config": None}, {"more": 1}]
OUR_CHANGES += [{"bos_id": bos} for bos in ("1", [], -1)]
OUR_CHANGES += [{"end_ids": ends} for ends in (3, [9999], [[]], None)]


@pytest.mark.parametrize("change", OUR_CHANGES)
def test_a_damaged_huggingface_file_of_ours_is_one_error_line(change, tmp_path):
    fields = json.loads(HuggingFaceTokenizer(BYTE_LEVEL, {}, 1, [2]).content())
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields | change))
    refused(tmp_path, "damaged tokenizer file")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("read", [load_tokenizer, tokenizer_sha256])
def test_a_tokenizer_file_far_too_large_is_not_read(name, read, tmp_path):
    with open(tmp_path / name, "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    refused(tmp_path, f"{name}: has more than", read=read)


def test_a_folder_must_have_exactly_one_tokenizer(made, tmp_path):
    refused(tmp_path, "no tokenizer.model or tokenizer.json", FileNotFoundError)
    made["byte"].save(tmp_path)
    made["sentencepiece"].save(tmp_path)
    refused(tmp_path, "both")


# Hugging Face


@pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, LLAMA, METASPACE], ids=["byte level", "llama", "metaspace"]
)
def test_a_tokenizer_json_gives_the_ids_and_texts_of_the_library(tokenizer, tmp_path):
    save_hugging_face(tmp_path, tokenizer)
    ours = load_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TRICKY + random_texts(300):
        if not any(name in text for name in SPECIAL):
            ids = ours.encode(text)
            assert ids == theirs.encode(text, add_special_tokens=False).ids
            assert ours.decode(ids) == theirs.decode(ids)


def test_a_special_token_spelled_out_is_text_and_an_added_one_is_itself(made):
    tokenizer, llama = made["huggingface"], HuggingFaceTokenizer(LLAMA, {}, 1, [2])
    for text in ["</s>", "a<s>b", "<unk>"]:
        assert tokenizer.decode(tokenizer.encode(text)) == llama.decode(llama.encode(text)) == text
        assert not {0, 1, 2} & {*tokenizer.encode(text), *llama.encode(text)}
    assert tokenizer.encode("<th\u00e9>") == [600]
    assert tokenizer.decode_bytes([600]) == "<th\u00e9>".encode()
    added = [token | {"special": False} for token in BYTE_LEVEL["added_tokens"]]
    not_called_special = BYTE_LEVEL | {"added_tokens": added}
    assert 2 not in HuggingFaceTokenizer(not_called_special, {}, 1, [2]).encode("</s>")


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE], ids=["llama", "metaspace"])
def test_a_later_chunk_of_a_tokenizer_json_gets_no_space(tokenizer):
    made = HuggingFaceTokenizer(tokenizer, {}, None, [])
    assert made.dummy_prefix and not made.exact
    assert made.bos_id is None and made.end_ids == frozenset()
    parts = made.encode("hello wo") + made.encode("rld", start=False)
    assert made.decode_bytes(parts) == b" hello world" and made.decode(parts) == "hello world"


def test_truncation_and_padding_of_a_tokenizer_json_are_off():
    library = tokenizers.Tokenizer.from_str(json.dumps(BYTE_LEVEL))
    library.enable_truncation(3)
    library.enable_padding(length=99)
    made = HuggingFaceTokenizer(json.loads(library.to_str()), {}, 1, [])
    assert made.decode(made.encode("a longer text")) == "a longer text" and made.encode("") == []


def test_the_bytes_of_a_partial_character_are_kept():
    made = HuggingFaceTokenizer(BYTE_LEVEL, {}, 1, [])
    ids = made.encode("\u4f60")
    assert len(ids) == 3 and b"".join(made.decode_bytes([i]) for i in ids) == "\u4f60".encode()


def bos_and_eos(bos, eos):
    """Under the names that config.json and generation_config.json have for them."""
    return {"bos_token_id": bos, "eos_token_id": eos}


LETTER = BYTE_LEVEL["model"]["vocab"]["e"]  # as in the config.json of another tokenizer
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}  # of tokenizer_config.json


@pytest.mark.parametrize(
    "files, bos, ends",
    [
        ({}, None, set()),
        ({"tokenizer_config": NAMES | {"eos_token": {"content": "</s>"}}}, 1, {1, 2}),
        ({"tokenizer_config": NAMES | {"bos_token": None}}, None, {2}),
        ({"config": {"eos_token_id": 0}, "tokenizer_config": NAMES}, 1, {0, 1, 2}),
        ({"generation_config": bos_and_eos(2, [600]), "tokenizer_config": NAMES}, 1, {1, 2, 600}),
        ({"generation_config": bos_and_eos(2, [600]), "config": bos_and_eos(1, 0)}, 2, {0, 2, 600}),
        ({"generation_config": bos_and_eos(1, 2), "config": bos_and_eos(1, LETTER)}, 1, {1, 2}),
        ({"generation_config": bos_and_eos(None, None), "config": bos_and_eos(1, 2)}, 1, {1, 2}),
    ],
)
def test_a_text_ends_at_what_any_file_calls_eos_and_begins_as_the_tokenizer_says(
    files, bos, ends, tmp_path
):
    save_hugging_face(tmp_path, BYTE_LEVEL, **files)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.end_ids) == (bos, ends)
    assert tokenizer.decode([*ends, *tokenizer.encode("text")]) == "text"
    assert tokenizer.config == files.get("tokenizer_config", {})
    assert tokenizer_sha256(tmp_path) == tokenizer.sha256


def save_both(folder, model: SentencePieceTokenizer, other: SentencePieceTokenizer, **said) -> dict:
    """A Hugging Face folder with model's tokenizer.model, and the other files of `other`.

    said: what tokenizer_config.json says beside. Returns the content of tokenizer.json.
    """
    for name, content in (tokenizer_files(other) | {"tokenizer.model": model.content()}).items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | said
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return json.loads((folder / "tokenizer.json").read_text())


def test_a_tokenizer_model_counts_only_if_it_gives_the_ids_of_the_tokenizer_json(made, tmp_path):
    model = made["sentencepiece"]
    save_both(tmp_path, model, model)
    assert load_tokenizer(tmp_path).kind == "sentencepiece"
    assert tokenizer_sha256(tmp_path) == model.sha256
    # Of the same size, but trained on another text
    stale = train_sentencepiece([inspect.getsource(inspect)], 800)
    assert stale.vocab_size == model.vocab_size
    fields = save_both(tmp_path, stale, model)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.kind, tokenizer.sentencepiece) == ("huggingface", b"")
    text = inspect.getsource(json)
    assert tokenizer.encode(text) == model.encode(text) != stale.encode(text)
    assert tokenizer_sha256(tmp_path) == tokenizer.sha256 != model.sha256
    # The same pieces, but one pair of them is not merged
    fields["model"]["merges"].pop(5)
    save_both(tmp_path, model, model)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert load_tokenizer(tmp_path).sentencepiece == b""
    # One token more
    fields = save_both(tmp_path, model, model)
    more = fields["added_tokens"][0] | {"id": model.vocab_size, "content": "<|im_end|>"}
    fields["added_tokens"].append(more)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert load_tokenizer(tmp_path).vocab_size == model.vocab_size + 1


@pytest.mark.parametrize("read", [load_tokenizer, tokenizer_sha256])
def test_a_tokenizer_model_of_tiktoken_is_left_for_the_tokenizer_json(read, tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    match = "is tiktoken's .*; put the tokenizer.json of the same model beside it"
    refused(tmp_path, match, read=read)
    save_hugging_face(tmp_path, BYTE_LEVEL)
    assert load_tokenizer(tmp_path).kind == "huggingface"


def test_without_the_library_a_tokenizer_json_is_one_error_line(tmp_path, monkeypatch):
    save_hugging_face(tmp_path, BYTE_LEVEL)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    match = r"needs the library tokenizers: pip install -e '\.\[hf\]'"
    refused(tmp_path, match, OSError)


def bpe_of(**vocab):
    return {"type": "BPE", "vocab": vocab, "merges": []}


def replacing(old: str, new: str) -> dict:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def precompiled(texts: bytes, size: int = 0) -> dict:
    """A normalizer of SentencePiece whose table is empty, although its size may be another."""
    charsmap = base64.b64encode(size.to_bytes(4, "little") + texts).decode()
    return {"type": "Precompiled", "precompiled_charsmap": charsmap}


PREFIXED = BYTE_LEVEL["model"] | {"continuing_subword_prefix": "##"}
WORD_PIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}
DOUBLING = {"type": "Sequence", "normalizers": 40 * [replacing("a", "aa")]}
SPLIT = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "part, match",
    [
        ({"model": bpe_of(), "added_tokens": []}, "must have ids"),
        ({"model": bpe_of(a=2**40)}, "all of them below"),
        ({"model": bpe_of(a=-1)}, "all of them below"),
        ({"model": 3}, "damaged"),
        ({"model": PREFIXED}, "has continuing_subword"),
        ({"decoder": None}, "decoder null is not one"),
        ({"decoder": WORD_PIECE}, "decoder WordPiece is not one"),
        ({"decoder": replacing("e", "X")}, "another text of its ids"),
        ({"decoder": {"type": "Sequence"}}, "damaged"),
        ({"normalizer": {"type": "New"}}, "its step New is not known here"),
        ({"normalizer": precompiled(b"", size=2**32 - 1)}, "says 4,294,967,295 bytes and has 0"),
        ({"normalizer": DOUBLING}, "could make texts too long"),
        ({"normalizer": precompiled(b"")}, "fails for a short text .index out of bounds"),
        ({"pre_tokenizer": SPLIT}, "not of Hugging Face's kind"),
        ({"added_tokens": [{"id": 2**31}]}, "damaged"),
        ({"added_tokens": 7}, "damaged"),
    ],
)
def test_a_damaged_tokenizer_json_is_one_error_line(part, match, tmp_path, capfd):
    save_hugging_face(tmp_path, BYTE_LEVEL | part)
    assert refused(tmp_path, match).count("tokenizer.json: damaged tokenizer file") == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "file, content, match",
    [
        ("config", [], "config.json: damaged .*not an object"),
        ("generation_config", {"eos_token_id": 9999}, "json: bos or eos, 9999, is not an id"),
        (
            "config",
            {"bos_token_id": "1"},
            "bos_token_id must be an id or a list of ids, got '1'",
        ),
        (
            "config",
            {"eos_token_id": [True]},
            "eos_token_id must be an id or a list of ids, got T",
        ),
        ("config", {"eos_token_id": [[]]}, "must be an id or a list of ids, got .."),
        (
            "generation_config",
            {"eos_token_id": {"a": 1}},
            "an id or a list of ids, got {'a': 1}",
        ),
        ("tokenizer_config", {"eos_token": ["</s>"]}, "eos_token .'</s>'."),
        ("tokenizer_config", {"eos_token": {"text": "</s>"}}, "eos_token {'text': '</s>'}"),
        (
            "tokenizer_config",
            {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.json"]},
            "has a file for each version of transformers, .'tokenizer.json', 'tokenizer.4.0.json'.",
        ),
        ("tokenizer_config", {"eos_token": "<end>"}, "token '<end>' of tokenizer_config.json"),
        ("tokenizer_config", {"eos_token": 7}, "does not have"),
        ("tokenizer_config", {"eos_token": {}}, "eos_token {}"),
    ],
)
def test_wrong_files_beside_a_tokenizer_json_are_named(file, content, match, tmp_path):
    save_hugging_face(tmp_path, BYTE_LEVEL, **{file: content})
    refused(tmp_path, match)


@pytest.mark.parametrize("text, refusal", [("WORLD", True), ("th", False), ("<s>", False)])
@pytest.mark.parametrize(
    "file, said",
    [
        ("tokenizer_config", lambda text: {"additional_special_tokens": [text]}),
        ("tokenizer_config", lambda text: {"extra_special_tokens": {"x": text}}),
        ("tokenizer_config", lambda text: {"pad_token": text}),
        ("tokenizer_config", lambda text: {"added_tokens_decoder": {"9": {"content": text}}}),
        ("special_tokens_map", lambda text: {"cls_token": {"content": text}}),
        ("added_tokens", lambda text: {text: 9}),
    ],
)
def test_tokens_that_stand_only_beside_a_tokenizer_are_those_of_auto_tokenizer_or_refused(
    file, said, text, refusal, tmp_path
):
    files = {file: said(text), "config": {"model_type": "llama"}}
    save_hugging_face(tmp_path, BYTE_LEVEL, **files)
    if refusal:
        match = rf"it does not have the token 'WORLD' of {file}.json: .*save_pretrained"
        assert "damaged" not in refused(tmp_path, match)
        return
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for tried in (f"Hello {text} {text}e", text):
        assert ours.encode_special(tried) == theirs(tried, add_special_tokens=False).input_ids


def test_a_tokenizer_model_must_have_the_tokens_that_stand_beside_it(tmp_path):
    SentencePieceTokenizer(foreign_model()).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "</s>"}')
    assert load_tokenizer(tmp_path).vocab_size
    for file, said in (
        ("special_tokens_map.json", {"pad_token": {"content": "<pad>"}}),
        ("added_tokens.json", {"<pad>": 300}),
    ):
        (tmp_path / file).write_text(json.dumps(said))
        refused(tmp_path, f"it does not have the .*token '<pad>' of {file}: .*save_pretrained")
        (tmp_path / file).unlink()


def test_an_added_token_whose_id_the_library_does_not_keep_is_refused(tmp_path):
    more = BYTE_LEVEL["added_tokens"][-1] | {"id": 650, "content": "WORLD"}
    fields = BYTE_LEVEL | {"added_tokens": [*BYTE_LEVEL["added_tokens"], more]}
    save_hugging_face(tmp_path, fields)
    refused(tmp_path, "added token 'WORLD' has the id 650, but the library gives it 601")


def test_a_right_id_that_the_model_also_makes_of_text_is_not_called_wrong(tmp_path):
    model = BYTE_LEVEL["model"] | {"ignore_merges": True}
    fields = BYTE_LEVEL | {"model": model, "pre_tokenizer": LEVEL | {"use_regex": False}}
    save_hugging_face(tmp_path, fields, tokenizer_config=NAMES)
    assert "ids there are wrong" not in refused(tmp_path, "the id is right, .* ignore_merges")


def test_a_special_token_that_cannot_be_kept_out_of_texts_is_refused(tmp_path):
    letter = BYTE_LEVEL["model"]["vocab"]["e"]
    save_hugging_face(tmp_path, BYTE_LEVEL, config={"eos_token_id": letter})
    match = "eos, id 71, is 'e' here, which a text can have: .* config.json "
    assert "damaged" not in refused(tmp_path, match)


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {
        "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
        "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]},
    },
}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ONLY_EOS = TEMPLATE | {"single": TEMPLATE["single"][1:]}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}
ROBERTA |= {"trim_offsets": True, "add_prefix_space": False}
BOTH = {"type": "Sequence", "processors": [LEVEL, BYTE_LEVEL["post_processor"]]}


LLAMA_CLASS = {"tokenizer_class": "LlamaTokenizer"}
GPT2_CLASS = {"tokenizer_class": "GPT2Tokenizer"}
DIGITS = [{"type": "Digits", "individual_digits": True}, LEVEL]
DIGITS = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": DIGITS}}


@pytest.mark.parametrize(
    "fields, said, family, differs",
    [
        (LLAMA, LLAMA_CLASS, "llama", True),
        (LLAMA, {"tokenizer_class": "LlamaTokenizerFast"}, "llama", True),
        (LLAMA | {"normalizer": None}, LLAMA_CLASS, "llama", True),
        (METASPACE, LLAMA_CLASS, "llama", False),
        (METASPACE, LLAMA_CLASS | {"legacy": True}, "llama", True),
        (METASPACE, LLAMA_CLASS | {"add_prefix_space": False}, "llama", True),
        (LLAMA, LLAMA_CLASS, "mistral", False),
        (LLAMA, {"tokenizer_class": "PreTrainedTokenizerFast"}, "llama", False),
        (LLAMA, {}, "llama", False),
        (BYTE_LEVEL, LLAMA_CLASS, "llama", False),
        (BYTE_LEVEL, GPT2_CLASS, "llama", False),
        (BYTE_LEVEL | DIGITS, GPT2_CLASS, "llama", True),
        (BYTE_LEVEL, {}, "qwen3", True),
    ],
)
def test_a_class_that_would_replace_the_steps_of_a_tokenizer_json_is_told_once(
    fields, said, family, differs, tmp_path, capsys
):
    files = {"tokenizer_config": NAMES | said, "config": {"model_type": family}}
    save_hugging_face(tmp_path, fields, **files)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = ["  two and  12 ", "return self", " a b", "e\u0301t\u00e9 2024  if\n\n x"]
    texts += ["a</s>b"]  # with "legacy", a space stands behind a special token too
    ids = [theirs(text, add_special_tokens=False).input_ids for text in texts]
    assert ([ours.encode_special(text) for text in texts] != ids) is differs
    load_tokenizer(tmp_path)
    said = capsys.readouterr().err.splitlines()
    said = [line for line in said if line.startswith("warning: ") and str(tmp_path) in line]
    assert len(said) == differs
    assert not differs or "transformers 5 makes a " in said[0]


@pytest.mark.parametrize("said", [{}, {"add_bos_token": False}, {"add_eos_token": True}], ids=str)
@pytest.mark.parametrize("around", [None, LEVEL, TEMPLATE, ONLY_EOS, ROBERTA, BOTH], ids=str)
def test_bos_and_eos_stand_around_a_text_where_auto_tokenizer_puts_them(around, said, tmp_path):
    config = NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"} | said
    fields = BYTE_LEVEL | {"post_processor": around}
    save_hugging_face(tmp_path, fields, tokenizer_config=config, config={"model_type": "llama"})
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.before + ours.encode("a text") + ours.after == theirs("a text").input_ids
    assert prompt_ids(ours, "a text") == ours.before + ours.encode("a text")
    assert prompt_ids(ours, "") == (ours.before or [1])
    assert ours.between == ([] if ours.before or ours.after else [2])


def test_a_folder_with_a_tokenizer_model_alone_says_where_bos_and_eos_stand(tmp_path):
    model = SentencePieceTokenizer(foreign_model())
    model.save(tmp_path)
    assert load_tokenizer(tmp_path).content() == model.content()
    said = NAMES | {"add_bos_token": False, "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.before, tokenizer.after, tokenizer.between) == ([], [], [2])
    (tmp_path / "other").mkdir()
    tokenizer.save(tmp_path / "other")
    again = load_tokenizer(tmp_path / "other")
    assert (again.before, again.config, again.sha256) == ([], said, tokenizer.sha256)
    assert again.sha256 == tokenizer_sha256(tmp_path / "other") != model.sha256
    files = tokenizer_files(again)
    assert json.loads(files["tokenizer.json"])["post_processor"] is None
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "{{ messages }}"
    assert files["tokenizer.model"] == model.content()
    # What changes no id leaves it the same tokenizer for a data set.
    said = NAMES | {"chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert tokenizer_sha256(tmp_path) == model.sha256
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    assert load_tokenizer(tmp_path).end_ids == {0, 1}
    (tmp_path / "config.json").write_text('{"eos_token_id": 290}')
    refused(tmp_path, "bos or eos, 290, is not a special token")


def test_a_prompt_that_spells_a_special_token_says_so_and_special_means_it(made, capsys):
    for kind, name, token in (
        ("sentencepiece", "</s>", 2),
        ("tiktoken", "<|endoftext|>", 261),
        ("huggingface", "</s>", 2),
    ):
        tokenizer = made[kind]
        text = f"one{name}two"
        assert tokenizer.decode(prompt_ids(tokenizer, text)) == text
        warning = capsys.readouterr().err
        assert f"spells {name}, which is text" in warning and warning.count("\n") == 1
        ids = prompt_ids(tokenizer, text, special=True)
        at = ids.index(token, 1)
        assert tokenizer.decode(ids[:at]) == "one" and tokenizer.decode(ids[at:]) == "two"
        assert prompt_ids(tokenizer, "one", special=True) == prompt_ids(tokenizer, "one")
        assert capsys.readouterr().err == ""
    # A chat template writes bos itself.
    ids = prompt_ids(made["huggingface"], "<s>one", special=True)
    assert ids == prompt_ids(made["huggingface"], "one")
    with pytest.raises(ValueError, match="no special token of this char tokenizer"):
        prompt_ids(CharTokenizer("one"), "one", special=True)


@pytest.mark.parametrize(
    "kind", [BYTE_LEVEL, LLAMA, METASPACE], ids=["bytes", "llama", "metaspace"]
)
def test_special_tokens_of_a_prompt_are_those_of_auto_tokenizer(kind, tmp_path):
    config = NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"}
    save_hugging_face(tmp_path, kind, tokenizer_config=config, config={"model_type": "llama"})
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a </s> b", "</s>", "x</s></s>y <unk>z", "plain"):
        assert ours.before + ours.encode_special(text) == theirs(text).input_ids


def steps(name, *parts):
    return {"type": "Sequence", name: list(parts)}


PREPENDING = {"type": "Prepend", "prepend": 20 * "x"}
SLOW = 3 * r"[\s\S]{0,200}" + r"[^\s\S]"  # it looks at eight million places from each character
NAMELESS = TEMPLATE | {"special_tokens": {}}
MANY = TEMPLATE["single"][:1] * 20_000 + TEMPLATE["single"][1:]
TWICE = {"type": "Sequence", "processors": [TEMPLATE, TEMPLATE]}
LONG = {"<s>": {"id": "<s>", "ids": [1] * 20_000, "tokens": ["<s>"] * 20_000}}


@pytest.mark.parametrize(
    "part, match",
    [
        ({"decoder": steps("decoders", LEVEL, *24 * [replacing("a", "aa")])}, "too long"),
        ({"normalizer": steps("normalizers", *22 * [{"type": "ByteLevel"}])}, "too long"),
        ({"pre_tokenizer": steps("pretokenizers", *22 * [LEVEL])}, "too long"),
        ({"normalizer": steps("normalizers", replacing("", "ab"))}, "replaces the empty text"),
        ({"normalizer": steps("normalizers", *3 * [PREPENDING])}, "too long"),
        ({"normalizer": steps("normalizers", *9 * [{"type": "NFKD"}])}, "too long"),
        ({"normalizer": precompiled(b"short\0" + 300 * b"x" + b"\0")}, "too long"),
        ({"normalizer": steps("normalizers", *65 * [{"type": "Nmt"}])}, "too long"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": SLOW}}}, "or take more than"),
        ({"normalizer": replacing("x", "") | {"pattern": {"Regex": SLOW}}}, "or take more than"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(b+)+c"}}}, "or take more than"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": 64 * "a?" + "b"}}}, "or take more than"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": r"(.*)\1\1\1c"}}}, "back to a group"),
        ({"post_processor": NAMELESS}, "damaged tokenizer file .no '<s>'"),
        ({"post_processor": TEMPLATE | {"single": MANY}}, "more than 64 ids around"),
        ({"post_processor": TEMPLATE | {"special_tokens": LONG}}, "damaged"),
        ({"post_processor": {"type": "New"}}, "post-processor New is not known"),
        ({"post_processor": TWICE}, "tokens around a text in two steps"),
    ],
    ids=range(18),
)
def test_a_tokenizer_json_that_would_fill_any_memory_or_take_for_ever_is_one_error_line(
    part, match, tmp_path, monkeypatch
):
    monkeypatch.setattr("text.tokenizer_json.LONGEST_TRY", 0.3)
    save_hugging_face(tmp_path, BYTE_LEVEL | part)
    refused(tmp_path, match)


def test_merges_left_out_by_chance_are_refused(tmp_path):
    save_hugging_face(tmp_path, BYTE_LEVEL | {"model": BYTE_LEVEL["model"] | {"dropout": 0.9}})
    said = refused(
        tmp_path, "merges by chance .dropout=0.9., .* other ids each time: make that null$"
    )
    assert "damaged" not in said


def test_a_damaged_file_beside_a_tokenizer_json_is_named(tmp_path):
    save_hugging_face(tmp_path, BYTE_LEVEL)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    said = refused(tmp_path, "chat_template.jinja: damaged tokenizer file")
    assert said.count("damaged tokenizer file") == 1 and "tokenizer.json" not in said


def test_the_chat_template_that_transformers_saves_apart_goes_along(tmp_path):
    for file, content in tokenizer_files(ByteTokenizer()).items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    made = tokenizer_files(load_tokenizer(tmp_path))
    assert json.loads(made["tokenizer_config.json"])["chat_template"] == "{{ messages }}"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    (tmp_path / "out").mkdir()
    for file, content in tokenizer_files(load_tokenizer(tmp_path)).items():
        (tmp_path / "out" / file).write_bytes(content)
    again = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert again == theirs == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
