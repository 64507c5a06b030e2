"""Where text comes from: the standard library, the user's files, a download or a stream, as pieces in a fixed order."""

import codecs
import hashlib
import json
import os
import platform
import sysconfig
import tokenize
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

CHUNK = 2**20  # bytes of text in a piece, at most, but for rows of .jsonl, .parquet and streams
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Of the standard library: tests are not how one writes a program, and these two packages are generated tables.
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}


class Piece(NamedTuple):
    """A document, or a chunk of one; start=False goes on with the document of the piece before it."""

    split: str
    start: bool
    text: str


@dataclass(frozen=True)
class Corpus:
    """Where text comes from. Each call of pieces() goes through it in the same order, always from the start.

    size: bytes of text if known, else None. stream: from the network, so that a stopped preparation goes on.
    """

    name: str
    source: str
    pieces: Callable[[], Iterator[Piece]]
    size: int | None = None
    stream: bool = False
    tokenizer: str = "sentencepiece"


def split_of(key: str, val_share: float) -> str:
    """'train' or 'val' by a hash of the document's name: fixed, whatever other documents there are."""
    return "val" if int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) < val_share * 2**32 else "train"


def split_files(names: dict[str, Path], val_share: float) -> list[tuple[str, Path]]:
    """(split, path) of each document, ordered by the hash of its name, so that those of val come first."""
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return [(split_of(name, val_share), names[name]) for name in order]


def read_text(split: str, path: Path, start: int, stop: int) -> Iterator[Piece]:
    """Bytes start..stop of a UTF-8 file, as a document in pieces of CHUNK; BOM and CRLF stay as they are."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), start
    with open(path, "rb") as file:
        file.seek(start)
        while position < stop:
            block = file.read(min(CHUNK, stop - position))
            if not block:
                raise OSError(f"{path}: became shorter while it was read; run again")
            begun = len(decoder.getstate()[0])  # bytes of a character that the last chunk's end cut
            try:
                yield Piece(split, position == start, decoder.decode(block, final=position + len(block) == stop))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: byte {position - begun + error.start} is not UTF-8; "
                                 "convert the file to UTF-8") from None
            position += len(block)


def python_source() -> Corpus:
    """The standard library's .py files, tests left out; 10% of the files are val."""
    root = Path(sysconfig.get_path("stdlib"))
    names = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_SOURCE]
        paths = [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")]
        kept = [path for path in paths if path.is_file() and path.stat().st_size]
        names |= {path.relative_to(root).as_posix(): path for path in kept}
    if len(names) < 2:
        raise FileNotFoundError(f"{root}: this Python has no source of its standard library; prepare a text of yours")

    def pieces() -> Iterator[Piece]:
        for split, path in split_files(names, 0.1):
            with open(path, "rb") as file:
                encoding, _ = tokenize.detect_encoding(file.readline)
            yield Piece(split, True, path.read_bytes().decode(encoding))

    size = sum(path.stat().st_size for path in names.values())
    source = f"{len(names)} files of the standard library of Python {platform.python_version()}"
    return Corpus("python", source, pieces, size)


def text_file(path: Path) -> Corpus:
    """One text: its first 90% of bytes, up to a whole character, are train and the rest is val, as in nanoGPT."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(int(size * 0.9))
        following = file.read(3)
    inside = len(list(takewhile(lambda byte: byte & 0xC0 == 0x80, following)))  # the rest of a cut character
    cut = int(size * 0.9) + inside

    def pieces() -> Iterator[Piece]:
        yield from read_text("train", path, 0, cut)
        yield from read_text("val", path, cut, size)

    return Corpus(path.stem, path.name, pieces, size)


def json_rows(path: Path) -> Iterator[str]:
    """The 'text' of each line of a .jsonl file; blank lines are skipped."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    text = json.loads(line)["text"]
                    text.encode()  # escapes in JSON can spell what is no Unicode text
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    raise ValueError(f"{path}: line {number} is not a JSON object with a 'text' string; "
                                     "mend or drop it") from None
                yield text


def parquet_rows(path: Path) -> Iterator[str]:
    """The 'text' column of a .parquet file, row by row."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: reading it needs pyarrow; pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(batch_size=1000, columns=["text"]):
                texts = rows.column("text").to_pylist()
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError("a row has no text")
                yield from texts
    except (ArrowException, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a parquet file with strings in a 'text' column ({reason})") from None


ROWS = {".jsonl": json_rows, ".parquet": parquet_rows}


def is_text(path: Path) -> bool:
    """Whether a file found in a folder looks like text: its first 8 KB hold no NUL byte."""
    with open(path, "rb") as file:
        return b"\0" not in file.read(8192)


def folder_files(folder: Path) -> dict[str, Path]:
    """The text files below a folder by relative name; hidden and empty ones are left out, and, counted, binary ones and
    links to what is outside: a folder from elsewhere must not bring this machine's private files into a data set."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    inside = [path for path in found if path.resolve().is_relative_to(folder.resolve())]
    if len(inside) < len(found):
        print(f"{folder}: skipped {len(found) - len(inside)} links to files outside of it")
    names = {path.relative_to(folder).as_posix(): path for path in inside}
    names = {name: path for name, path in names.items() if not any(part[0] == "." for part in name.split("/"))}
    kept = {name: path for name, path in names.items() if path.suffix in ROWS or is_text(path)}
    if len(kept) < len(names):
        print(f"{folder}: skipped {len(names) - len(kept)} binary files")
    return kept


def cut_text(text: str) -> list[Piece]:
    """The first 90% of the characters for train, the rest for val."""
    cut = int(len(text) * 0.9)
    return [piece for piece in (Piece("train", True, text[:cut]), Piece("val", True, text[cut:])) if piece.text]


def documents(paths: list[Path]) -> Corpus:
    """Folders and files: a text file is a document, so is each row of .jsonl and .parquet. 10% of them are val; but
    where these are not 5 to 20% of the bytes, documents being few or unequal, each gives its last 10% to val."""
    names: dict[str, Path] = {}
    for path in paths:
        found = folder_files(path) if path.is_dir() else {path.name: path}
        names |= {(name if name not in names else f"{path}/{name}"): found[name] for name in found}
    texts = {name: path for name, path in names.items() if path.suffix not in ROWS}

    def pieces(whole: bool = True) -> Iterator[Piece]:
        for split, path in split_files(texts, 0.1):
            yield from read_text(split, path, 0, path.stat().st_size) if whole else text_file(path).pieces()
        for name in sorted(names.keys() - texts.keys()):
            for row, text in enumerate(ROWS[names[name].suffix](names[name])):
                yield from [Piece(split_of(f"{name}:{row}", 0.1), True, text)] if whole else cut_text(text)

    sizes = Counter()
    for piece in pieces():
        sizes[piece.split] += len(piece.text.encode())
    whole = 0.05 * sizes.total() <= sizes["val"] <= 0.2 * sizes.total()
    first = paths[0].resolve()
    how = "split by document" if whole else "few or unequal, so each is cut 90/10"
    source = f"{len(names)} files of {', '.join(path.resolve().name for path in paths)}, {how}"
    return Corpus(first.name if first.is_dir() else first.stem, source, partial(pieces, whole), sizes.total())


def shakespeare() -> Corpus:
    """karpathy's tinyshakespeare, downloaded and checked, with nanoGPT's split and its characters as tokens."""
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=30) as answer:
            content = answer.read(2_000_000)
    except (OSError, HTTPException) as error:
        raise OSError(f"shakespeare could not be downloaded ({error}); get its input.txt elsewhere, then "
                      "python data/prepare.py input.txt name=shakespeare tokenizer=char") from None
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError(f"{SHAKESPEARE}: what came is not tinyshakespeare (its SHA-256 differs); try again later")
    pieces = cut_text(content.decode())
    return Corpus("shakespeare", "tinyshakespeare of karpathy/char-rnn", lambda: iter(pieces), len(content),
                  tokenizer="char")


def hub_stream(name: str, path: str, tokenizer: str, /, **options) -> Corpus:
    """The train split of a Hugging Face data set, streamed; 1% of its documents are val."""
    def pieces() -> Iterator[Piece]:
        try:
            import datasets
        except ImportError:
            raise ValueError(f"{name}: streaming it needs datasets; pip install datasets") from None
        try:
            for row, fields in enumerate(datasets.load_dataset(path, split="train", streaming=True, **options)):
                yield Piece(split_of(f"{name}:{row}", 0.01), True, fields["text"])
        except Exception as error:  # whatever the network or the library does, the way on is the same
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise OSError(f"{path}: streaming stopped ({reason}); run the same command again to go on") from None

    return Corpus(name, f"{path} on Hugging Face", pieces, stream=True, tokenizer=tokenizer)


NAMED = {
    "python": python_source,
    "shakespeare": shakespeare,
    "tinystories": lambda: hub_stream("tinystories", "roneneldan/TinyStories", "sentencepiece"),
    "fineweb-edu": lambda: hub_stream("fineweb-edu", "HuggingFaceFW/fineweb-edu", "tiktoken:gpt2", name="sample-10BT"),
}


def open_corpus(sources: list[str]) -> Corpus:
    """The corpus that the words of the command line name: one of NAMED, or the user's own files and folders."""
    if len(sources) == 1 and sources[0] in NAMED:
        return NAMED[sources[0]]()
    paths = [Path(source) for source in sources]
    for path in paths:
        if not (path.is_dir() or path.is_file()):
            raise FileNotFoundError(f"{path} is not a file or folder, nor one of {', '.join(NAMED)}")
    one_text = len(paths) == 1 and paths[0].is_file() and paths[0].suffix not in ROWS
    return text_file(paths[0]) if one_text else documents(paths)
