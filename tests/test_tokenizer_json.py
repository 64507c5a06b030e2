import json

import pytest
import tokenizers

from text.tokenizer_json import (
    byte_alphabet,
    flattened,
    json_ids,
    json_pieces,
    read_json_object,
    rust_errors,
    without_prefix,
)


def test_the_byte_alphabet_is_that_of_the_library():
    alphabet = byte_alphabet()
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for char in map(chr, range(256)):
        spelled = "".join(alphabet[byte] for byte in char.encode())
        assert level.pre_tokenize_str(char)[0][0] == spelled
    assert sorted(alphabet) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_sequences_are_flattened_and_nothing_is_no_step():
    a, b, c = ({"type": kind} for kind in "abc")
    inner = {"type": "Sequence", "decoders": [b, c]}
    assert flattened({"type": "Sequence", "decoders": [a, inner]}) == [a, b, c]
    assert flattened(a) == [a] and flattened(None) == []


def test_only_what_puts_a_space_before_a_text_is_taken_out():
    digits = {"type": "Digits", "individual_digits": True}
    plain = {"normalizer": {"type": "NFC"}, "pre_tokenizer": digits}
    assert without_prefix(plain) is plain
    level = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    old = {"type": "Metaspace", "replacement": "_", "add_prefix_space": True}
    new = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": False}
    bare = without_prefix(
        {
            "normalizer": {"type": "Prepend", "prepend": "_"},
            "model": 3,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [level, old, new]},
        }
    )
    level["add_prefix_space"] = old["add_prefix_space"] = False
    new["prepend_scheme"] = "never"
    assert bare == {
        "model": 3,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [level, old, new]},
    }


def test_the_ids_of_a_unigram_model_are_the_places_in_its_list():
    model, added = {"vocab": [["a", 0.0], ["b", -1.5]]}, [{"content": "c", "id": 7}]
    assert json_ids({"model": model, "added_tokens": added}) == {"a": 0, "b": 1, "c": 7}


@pytest.mark.parametrize(
    "decoder, first, second",
    [
        ("Fuse", "<0x41>", "\u2581a\u0120"),
        ("ByteFallback", "A", "\u2581a\u0120"),
        ("Metaspace", "<0x41>", " a\u0120"),
        ("ByteLevel", "<0x41>", "\u2581a\u0120"),
    ],
)
def test_pieces_are_read_as_the_decoder_says(decoder, first, second):
    tokenizer = {
        "decoder": {"type": decoder},
        "model": {"vocab": {"<0x41>": 0, "\u2581a\u0120": 1}},
        "added_tokens": [
            {"content": " x", "id": 3, "special": False},
            {"content": "y", "id": 2, "special": True},
        ],
    }
    assert json_pieces(tokenizer) == [first.encode(), second.encode(), b"", b" x"]


def test_byte_level_pieces_are_bytes():
    tokenizer = {
        "decoder": {"type": "ByteLevel"},
        "model": {"vocab": {"\u0120a\u010a": 1, "\u00e4\u00bd": 0}},
        "added_tokens": [{"content": "\u00e9", "id": 4, "special": False}],
    }
    assert json_pieces(tokenizer) == [b"\xe4\xbd", b" a\n", b"", b"", "\u00e9".encode()]


@pytest.mark.parametrize("text, shown", [("why", "why"), ("token `\n` is new", "token ` ` is new")])
def test_errors_of_rust_become_one_line(text, shown):
    with pytest.raises(ValueError, match=rf"it cannot \({shown}\)"), rust_errors("it cannot"):
        raise Exception(text)


@pytest.mark.parametrize("other", [KeyboardInterrupt, KeyError, MemoryError])
def test_errors_of_python_pass(other):
    with pytest.raises(other), rust_errors("it cannot"):
        raise other


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a": 1'])
def test_a_file_that_is_no_json_object_is_one_error_line(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match="x.json: damaged") as raised:
        read_json_object(tmp_path / "x.json")
    assert "\n" not in str(raised.value)
    (tmp_path / "x.json").write_text(json.dumps({"a": [1]}))
    assert read_json_object(tmp_path / "x.json") == {"a": [1]}
