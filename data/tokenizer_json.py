"""Tokenizer files as they are on the disk, and what a Hugging Face tokenizer.json says: its steps, its ids and their
bytes, and the library that runs it."""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST_FILE = 2**25  # bytes of a tokenizer's file, twice those of Llama 3's
SPACE = "\u2581"  # SentencePiece writes a space as this character
READABLE = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip"}  # decoders that json_pieces knows
LARGEST_ID = 2**22  # an id takes memory even if it is left out; the largest vocabularies have 2**18
NO_PREFIX = {"add_prefix_space": False, "prepend_scheme": "never"}


def read_capped(path: Path) -> bytes:
    """The content of a tokenizer's file. ValueError if that is no file, or far larger than any tokenizer's."""
    if not path.is_file():  # opening a FIFO would wait for ever
        raise FileNotFoundError(f"{path}: no such tokenizer file; name an existing .model file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: has more than {LARGEST_FILE:,} bytes, no tokenizer needs as many")
    return path.read_bytes()


class Mismatch(ValueError):
    """Of bos or eos, which the files beside a tokenizer.json name, with what it has."""


@contextmanager
def damage(path: Path, foreign: bool = False) -> Iterator[None]:
    """Makes one line that names the file of what can go wrong inside a damaged one, or with a foreign one's company."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if foreign and isinstance(error, Mismatch):
            raise ValueError(f"{path}: {error}: it is not the tokenizer of the config.json and generation_config.json "
                             "beside it, or these are wrong") from None
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: damaged tokenizer file ({reason}); make or fetch it again") from None


def read_json(path: Path) -> dict:
    """The one object in a JSON file. Raises ValueError in one line if there is something else."""
    content = read_capped(path)
    with damage(path):
        fields = json.loads(content.decode())
        if not isinstance(fields, dict):
            raise ValueError("not an object in braces")
        return fields


def steps(part: dict | None) -> list[dict]:
    """A part of a tokenizer.json as a flat list, with a Sequence's steps in its place."""
    if part is None or part["type"] != "Sequence":
        return [] if part is None else [part]
    name, = {"normalizers", "pretokenizers", "decoders"} & part.keys()
    return [step for inner in part[name] for step in steps(inner)]


def without_prefix(tokenizer: dict) -> dict:
    """A tokenizer.json without the steps that put a space before a text; the same object if it has none."""
    before, splits = steps(tokenizer.get("normalizer")), steps(tokenizer.get("pre_tokenizer"))
    kept = [step for step in before if step["type"] != "Prepend"]
    bare = [step | {name: off for name, off in NO_PREFIX.items() if name in step} for step in splits]
    if (kept, bare) == (before, splits):
        return tokenizer
    return tokenizer | {"normalizer": {"type": "Sequence", "normalizers": kept},
                        "pre_tokenizer": {"type": "Sequence", "pretokenizers": bare}}


def byte_alphabet() -> list[str]:
    """The character by which byte-level vocabularies spell each byte: its own if one sees it, else U+0100 and on."""
    seen, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def json_ids(tokenizer: dict) -> dict[str, int]:
    """The id of each entry of a tokenizer.json, added tokens included. ValueError if one is out of all bounds."""
    vocab = tokenizer["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}  # Unigram: a list
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if not ids or not all(type(i) is int and 0 <= i < LARGEST_ID for i in ids.values()):
        raise ValueError(f"it must have ids, all of them below {LARGEST_ID:,}")
    return ids


def json_pieces(tokenizer: dict) -> list[bytes]:
    """The bytes of each id of a tokenizer.json; special tokens, and ids that it leaves out, give none.

    Raises ValueError if its decoder does something else than to join pieces, such as WordPiece's.
    """
    kinds, ids = {step["type"] for step in steps(tokenizer["decoder"])}, json_ids(tokenizer)
    if not kinds or kinds - READABLE:
        raise ValueError(f"its decoder {', '.join(sorted(kinds - READABLE)) or 'null'} is not one that is known here: "
                         f"{', '.join(sorted(READABLE))}")
    bytes_of = {char: byte for byte, char in enumerate(byte_alphabet())} if "ByteLevel" in kinds else {}
    pieces = [b""] * (max(ids.values()) + 1)
    for piece, i in ids.items():
        if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            pieces[i] = bytes([int(piece[1:-1], 16)])
        elif bytes_of and all(char in bytes_of for char in piece):
            pieces[i] = bytes(bytes_of[char] for char in piece)
        else:
            pieces[i] = (piece.replace(SPACE, " ") if {"Metaspace", "Replace"} & kinds else piece).encode()
    for token in tokenizer["added_tokens"]:
        pieces[token["id"]] = b"" if token["special"] else token["content"].encode()
    return pieces


def special_ids(role: str, files: list[dict], ids: dict[str, int]) -> list[int]:
    """The ids of the role, "bos" or "eos": what the first tells of generation_config.json, config.json (as ids) and
    tokenizer_config.json (as text), in this order. Empty if none does."""
    *numbers, texts = files
    for file in numbers:
        if (known := file.get(f"{role}_token_id")) is not None:
            return known if isinstance(known, list) else [known]
    token = texts.get(f"{role}_token")
    text = token["content"] if isinstance(token, dict) else token
    if text is not None and text not in ids:
        raise ValueError(f"it does not have tokenizer_config.json's {role}_token {text!r:.99}")
    return [] if text is None else [ids[text]]


def run_by_library(tokenizer: dict) -> Any:
    """The tokenizers.Tokenizer of a tokenizer.json. ValueError if it is damaged, OSError if there is no library."""
    try:
        import tokenizers
    except ImportError:
        raise OSError("a tokenizer.json of Hugging Face needs the library tokenizers: pip install -e '.[hf]'") from None
    unknown = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if tokenizer["model"].get(name)]
    if unknown:  # pieces that are not just joined; a wrong prefix makes the library end the process
        raise ValueError(f"its model has {' and '.join(unknown)}, which is not known here")
    replaced = [len(step["content"]) for step in steps(tokenizer.get("normalizer")) if step["type"] == "Replace"]
    if math.prod(max(1, size) for size in replaced) > 64:
        raise ValueError("its normalizer makes texts too long")  # a few steps, each doubling, would fill any memory
    with silent_panics(), rust_errors("not of Hugging Face's kind"):
        made = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    made.encode_special_tokens = True  # which means: as ordinary text
    return made


@contextmanager
def rust_errors(reason: str) -> Iterator[None]:
    """Rust's errors as ValueError. They are bare Exceptions, or panics, which have no base but BaseException."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{reason} ({' '.join(str(error).split()):.200})") from None


@contextmanager
def silent_panics() -> Iterator[None]:
    """Rust writes a panic to stderr, past Python and in several lines, even if it is then caught as an exception."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
