"""Tokenizer files as they are on the disk, and what a tokenizer.json of Hugging Face says.

In reading order: reading a file, with errors that name it; the steps, ids and pieces in a
tokenizer.json; the library that runs it.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST_FILE = 2**25  # bytes; the file of Llama 3's tokenizer has half of that
LARGEST_ID = 2**22  # unused ids take memory, too; the largest vocabularies have 2**18 ids
SPACE = "\u2581"  # SentencePiece writes a space as this character
DECODERS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip"}  # known here
NO_PREFIX = {"add_prefix_space": False, "prepend_scheme": "never"}


# Reading a file


def read_capped(path: Path) -> bytes:
    """The content of a tokenizer's file; an error if it is no file or larger than LARGEST_FILE."""
    if not path.is_file():  # opening a FIFO would wait for ever
        raise FileNotFoundError(f"{path}: no such tokenizer file; name an existing .model file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(
            f"{path}: has more than {LARGEST_FILE:,} bytes, no tokenizer needs as many"
        )
    return path.read_bytes()


class Mismatch(ValueError):
    """The bos or eos that the files beside a tokenizer.json name does not fit it."""


@contextmanager
def blamed_on(path: Path, foreign: bool = False) -> Iterator[None]:
    """Turns the errors that a damaged file causes into a ValueError of one line that names it.

    foreign: the file is Hugging Face's, so the files beside it can be wrong instead (Mismatch).
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if foreign and isinstance(error, Mismatch):
            raise ValueError(
                f"{path}: {error}: it is not the tokenizer of the config.json and "
                "generation_config.json beside it, or these are wrong"
            ) from None
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path}: damaged tokenizer file ({reason}); make or fetch it again"
        ) from None


def read_json_object(path: Path) -> dict:
    """The object in a JSON file; ValueError in one line if the file holds anything else."""
    content = read_capped(path)
    with blamed_on(path):
        fields = json.loads(content.decode())
        if not isinstance(fields, dict):
            raise ValueError("not an object in braces")
        return fields


# Steps, ids and pieces


def flattened(part: dict | None) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer or decoder, with Sequences inside it dissolved."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    (name,) = {"normalizers", "pretokenizers", "decoders"} & part.keys()
    return [step for inner in part[name] for step in flattened(inner)]


def without_prefix(tokenizer: dict) -> dict:
    """A tokenizer.json without the steps that put a space before a text.

    The same object if it has no such step.
    """
    before = flattened(tokenizer.get("normalizer"))
    splits = flattened(tokenizer.get("pre_tokenizer"))
    kept = [step for step in before if step["type"] != "Prepend"]
    bare = [
        step | {name: off for name, off in NO_PREFIX.items() if name in step} for step in splits
    ]
    if (kept, bare) == (before, splits):
        return tokenizer
    return tokenizer | {
        "normalizer": {"type": "Sequence", "normalizers": kept},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": bare},
    }


def byte_alphabet() -> list[str]:
    """The character with which a byte-level vocabulary writes each byte.

    A visible character of Latin-1 stands for itself; the other bytes get U+0100 and following.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def json_ids(tokenizer: dict) -> dict[str, int]:
    """The id of each entry of a tokenizer.json, with the tokens that were added.

    Raises ValueError if an id is negative or LARGEST_ID or more.
    """
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, dict):
        ids = dict(vocab)
    else:  # a Unigram model has a list of (piece, score)
        ids = {entry[0]: i for i, entry in enumerate(vocab)}
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if not ids or not all(type(i) is int and 0 <= i < LARGEST_ID for i in ids.values()):
        raise ValueError(f"it must have ids, all of them below {LARGEST_ID:,}")
    return ids


def json_pieces(tokenizer: dict) -> list[bytes]:
    """The bytes of each id of a tokenizer.json; b"" for special tokens and for unused ids.

    Raises ValueError if its decoder does more than to join pieces, as WordPiece's does.
    """
    kinds = {step["type"] for step in flattened(tokenizer["decoder"])}
    if not kinds or kinds - DECODERS:
        raise ValueError(
            f"its decoder {', '.join(sorted(kinds - DECODERS)) or 'null'} is not one that is known "
            f"here: {', '.join(sorted(DECODERS))}"
        )
    ids = json_ids(tokenizer)
    pieces = [b""] * (max(ids.values()) + 1)
    for piece, i in ids.items():
        pieces[i] = piece_bytes(piece, kinds)
    for token in tokenizer["added_tokens"]:
        pieces[token["id"]] = b"" if token["special"] else token["content"].encode()
    return pieces


BYTE_OF = {char: byte for byte, char in enumerate(byte_alphabet())}


def piece_bytes(piece: str, decoders: set[str]) -> bytes:
    """The bytes that these decoders make of an entry of the vocabulary."""
    if "ByteFallback" in decoders and re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[1:-1], 16)])
    if "ByteLevel" in decoders and all(char in BYTE_OF for char in piece):
        return bytes(BYTE_OF[char] for char in piece)
    if {"Metaspace", "Replace"} & decoders:
        piece = piece.replace(SPACE, " ")
    return piece.encode()


def special_ids(role: str, files: list[dict], ids: dict[str, int]) -> list[int]:
    """The ids of the role "bos" or "eos"; empty if no file names one.

    files: the content of generation_config.json and config.json, which name ids, and of
    tokenizer_config.json, which names a text. The first that names the role decides.
    """
    *numbers, texts = files
    for file in numbers:
        if (known := file.get(f"{role}_token_id")) is not None:
            return known if isinstance(known, list) else [known]
    token = texts.get(f"{role}_token")
    text = token["content"] if isinstance(token, dict) else token
    if text is None:
        return []
    if text not in ids:
        raise ValueError(f"it does not have tokenizer_config.json's {role}_token {text!r:.99}")
    return [ids[text]]


# The library


def run_by_library(tokenizer: dict) -> Any:
    """The tokenizers.Tokenizer of a tokenizer.json.

    Raises ValueError if it is damaged and OSError if the library is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise OSError(
            "a tokenizer.json of Hugging Face needs the library tokenizers: pip install -e '.[hf]'"
        ) from None
    # With these, pieces are not simply joined. A wrong prefix makes the library end the process.
    names = ("continuing_subword_prefix", "end_of_word_suffix")
    unknown = [name for name in names if tokenizer["model"].get(name)]
    if unknown:
        raise ValueError(f"its model has {' and '.join(unknown)}, which is not known here")
    # A few replacements that each double the text would fill any memory.
    steps = flattened(tokenizer.get("normalizer"))
    replaced = [len(step["content"]) for step in steps if step["type"] == "Replace"]
    if math.prod(max(1, size) for size in replaced) > 64:
        raise ValueError("its normalizer makes texts too long")
    with silent_panics(), rust_errors("not of Hugging Face's kind"):
        made = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    made.encode_special_tokens = True  # the library's name for: encode them as ordinary text
    return made


@contextmanager
def rust_errors(reason: str) -> Iterator[None]:
    """Turns the errors of a Rust library into ValueError.

    They are of type Exception itself, or panics, which derive from BaseException only.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{reason} ({' '.join(str(error).split()):.200})") from None


@contextmanager
def silent_panics() -> Iterator[None]:
    """Sends stderr to nowhere, where Rust reports a panic even if Python catches it afterwards."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
