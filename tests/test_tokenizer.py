import inspect
import io
import json
import random
import textwrap

import pytest
import sentencepiece
import tiktoken

import data.tokenizer as tokenizer_module
from data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    load_tokenizer,
    named_tiktoken,
    read_sentencepiece,
    tokenizer_sha256,
    train_sentencepiece,
)

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


@pytest.fixture(scope="module")
def made() -> dict:
    trained = train_sentencepiece([inspect.getsource(textwrap), inspect.getsource(json.decoder)], 800)
    return {"byte": ByteTokenizer(), "char": CharTokenizer("hello wrd"), "sentencepiece": trained,
            "tiktoken": small_tiktoken()}


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "tiktoken"])
def test_decode_of_encode_is_the_text(made, kind):
    tokenizer = made[kind]
    assert tokenizer.exact
    for text in TRICKY + random_texts(400):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "tiktoken"])
def test_decoding_token_by_token_gives_the_same_bytes(made, kind):
    tokenizer = made[kind]
    for text in TRICKY:
        assert b"".join(tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)) == text.encode()


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "tiktoken"])
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


def test_characters_outside_a_char_vocabulary_are_listed(made):
    with pytest.raises(ValueError, match="characters 'XZ' are not among the 8"):
        made["char"].encode("hello ZXZ")


@pytest.mark.parametrize("kind", ["byte", "char", "sentencepiece", "tiktoken"])
def test_a_saved_tokenizer_loads_as_the_same(made, kind, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    made[kind].save(first)
    loaded = load_tokenizer(first)
    loaded.save(second)
    assert (loaded.kind, loaded.vocab_size, loaded.bos_id) == (kind, made[kind].vocab_size, made[kind].bos_id)
    assert loaded.encode("hello world") == made[kind].encode("hello world")
    assert tokenizer_sha256(first) == tokenizer_sha256(second)
    name = "tokenizer.model" if kind == "sentencepiece" else "tokenizer.json"
    assert [path.name for path in first.iterdir()] == [name]


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
    assert tokenizer.dummy_prefix and not tokenizer.exact and tokenizer.bos_id == reference.bos_id()
    for text in TRICKY:
        if "\u2581" not in text:
            assert tokenizer.encode(text) == reference.encode(text)


def test_only_the_dummy_space_of_a_foreign_model_is_taken_away():
    tokenizer = SentencePieceTokenizer(foreign_model())
    for text in ["hello", " hello", "  hello ", "a\u2581b", "\n x"]:
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
        file.truncate(tokenizer_module.LARGEST_FILE + 1)
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
