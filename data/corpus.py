"""Where text comes from: the standard library, the user's files, a download or a stream.

Every source becomes a Corpus, which gives the text piece by piece in an order that never changes.
In reading order: Piece and Corpus; `open_corpus`, which chooses the source; how documents are
divided into train and val; the user's files; the sources that have a name.
"""

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

CHUNK = 2**20  # bytes: a longer file comes in pieces of this size; a row is always one piece
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Folders of the standard library that are left out: tests are not how one writes a program, the
# last two are generated tables, and the others are not part of the library.
NOT_SOURCE = set(
    "test tests idle_test site-packages dist-packages __pycache__ encodings pydoc_data".split()
)


class Piece(NamedTuple):
    """A document, or a part of one: start=False continues the document of the piece before."""

    split: str  # "train" or "val"
    start: bool
    text: str


@dataclass(frozen=True)
class Corpus:
    """A source of text. Each call of pieces() begins at the start and gives the same pieces."""

    name: str
    source: str  # a description for meta.json
    pieces: Callable[[], Iterator[Piece]]
    size: int | None = None  # bytes of UTF-8; None where that is not known beforehand
    stream: bool = False  # comes from the network; a preparation that stopped can be continued
    tokenizer: str = "sentencepiece"  # the default for `tokenizer=`


def open_corpus(sources: list[str]) -> Corpus:
    """The corpus that the command line names: one of NAMED, or the user's files and folders."""
    if len(sources) == 1 and sources[0] in NAMED:
        return NAMED[sources[0]]()
    paths = [Path(source) for source in sources]
    for path in paths:
        if not (path.is_dir() or path.is_file()):
            raise FileNotFoundError(
                f"{path} is not a file or folder, nor one of {', '.join(NAMED)}"
            )
    one_text = len(paths) == 1 and paths[0].is_file() and paths[0].suffix not in ROWS
    return text_file(paths[0]) if one_text else documents(paths)


# Train or val


def split_of(name: str, val_share: float) -> str:
    """'train' or 'val', by a hash of the document's name, so other documents do not matter."""
    number = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    return "val" if number < val_share * 2**32 else "train"


def split_files(names: dict[str, Path], val_share: float) -> list[tuple[str, Path]]:
    """(split, path) of each document, in the order of their names' hashes, so val comes first."""
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return [(split_of(name, val_share), names[name]) for name in order]


def cut_text(text: str) -> list[Piece]:
    """The first 90% of the characters for train and the rest for val."""
    cut = int(len(text) * 0.9)
    pieces = Piece("train", True, text[:cut]), Piece("val", True, text[cut:])
    return [piece for piece in pieces if piece.text]


# The user's files


def text_pieces(split: str, path: Path, start: int, stop: int) -> Iterator[Piece]:
    """Bytes start..stop of a UTF-8 file as one document, in pieces of CHUNK bytes.

    The text is taken exactly as it is, with a byte order mark and with CRLF line ends. Raises
    ValueError if it is not UTF-8.
    """
    decoder, position = codecs.getincrementaldecoder("utf-8")(), start
    with open(path, "rb") as file:
        file.seek(start)
        while position < stop:
            block = file.read(min(CHUNK, stop - position))
            if not block:
                raise OSError(f"{path}: became shorter while it was read; run again")
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last block cut
            try:
                text = decoder.decode(block, final=position + len(block) == stop)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: byte {position - waiting + error.start} is not UTF-8; "
                    "convert the file to UTF-8"
                ) from None
            yield Piece(split, position == start, text)
            position += len(block)


def text_file(path: Path) -> Corpus:
    """One text, cut as in nanoGPT: the first 90% of its bytes are train and the rest is val.

    If that cut is inside a character, it moves to the character's end.
    """
    size = path.stat().st_size
    cut = int(size * 0.9)
    with open(path, "rb") as file:
        file.seek(cut)
        cut += len(list(takewhile(lambda byte: byte & 0xC0 == 0x80, file.read(3))))

    def pieces() -> Iterator[Piece]:
        yield from text_pieces("train", path, 0, cut)
        yield from text_pieces("val", path, cut, size)

    return Corpus(path.stem, path.name, pieces, size)


def json_rows(path: Path) -> Iterator[str]:
    """The 'text' of each line of a .jsonl file. Blank lines are skipped."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()  # fails on half a surrogate pair, which JSON can spell
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise ValueError(
                    f"{path}: line {number} is not a JSON object with a 'text' string; "
                    "mend or drop it"
                ) from None
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
        raise ValueError(
            f"{path}: not a parquet file with strings in a 'text' column ({reason})"
        ) from None


ROWS = {".jsonl": json_rows, ".parquet": parquet_rows}  # files of which each row is a document


def looks_like_text(path: Path) -> bool:
    """Whether the first 8 KB of a file hold no NUL byte."""
    with open(path, "rb") as file:
        return b"\0" not in file.read(8192)


def folder_files(folder: Path) -> dict[str, Path]:
    """The text files below a folder, by their names relative to it.

    Hidden and empty files are left out. So are binary files, and links to files outside of the
    folder: a folder from elsewhere must not bring private files of this machine into a data set.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    inside = [path for path in found if path.resolve().is_relative_to(folder.resolve())]
    if len(inside) < len(found):
        print(f"{folder}: skipped {len(found) - len(inside)} links to files outside of it")
    names = {path.relative_to(folder).as_posix(): path for path in inside}
    shown = {n: p for n, p in names.items() if not any(part[0] == "." for part in n.split("/"))}
    kept = {n: p for n, p in shown.items() if p.suffix in ROWS or looks_like_text(p)}
    if len(kept) < len(shown):
        print(f"{folder}: skipped {len(shown) - len(kept)} binary files")
    return kept


def documents(paths: list[Path]) -> Corpus:
    """Folders and files: each text file is a document, and so is each row of .jsonl and .parquet.

    A tenth of the documents is val. If that makes val smaller than 5% or larger than 20% of the
    bytes, because documents are few or unequal, the last tenth of each document is val instead.
    """
    names: dict[str, Path] = {}
    for path in paths:
        found = folder_files(path) if path.is_dir() else {path.name: path}
        names |= {(name if name not in names else f"{path}/{name}"): found[name] for name in found}
    texts = {name: path for name, path in names.items() if path.suffix not in ROWS}

    def pieces(whole: bool = True) -> Iterator[Piece]:
        for split, path in split_files(texts, 0.1):
            if whole:
                yield from text_pieces(split, path, 0, path.stat().st_size)
            else:
                yield from text_file(path).pieces()
        for name in sorted(names.keys() - texts.keys()):
            for row, text in enumerate(ROWS[names[name].suffix](names[name])):
                if whole:
                    yield Piece(split_of(f"{name}:{row}", 0.1), True, text)
                else:
                    yield from cut_text(text)

    sizes = Counter()
    for piece in pieces():
        sizes[piece.split] += len(piece.text.encode())
    whole = 0.05 * sizes.total() <= sizes["val"] <= 0.2 * sizes.total()
    how = "split by document" if whole else "few or unequal, so each is cut 90/10"
    source = f"{len(names)} files of {', '.join(path.resolve().name for path in paths)}, {how}"
    first = paths[0].resolve()
    name = first.name if first.is_dir() else first.stem
    return Corpus(name, source, partial(pieces, whole), sizes.total())


# The sources that have a name


def python_source() -> Corpus:
    """The .py files of the standard library of the Python that runs; a tenth of them is val."""
    root = Path(sysconfig.get_path("stdlib"))
    names = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_SOURCE]
        for name in files:
            path = Path(folder, name)
            if name.startswith("_sysconfigdata") or not name.endswith(".py"):
                continue
            if path.is_file() and path.stat().st_size:
                names[path.relative_to(root).as_posix()] = path
    if len(names) < 2:
        raise FileNotFoundError(
            f"{root}: this Python has no source of its standard library; prepare a text of yours"
        )

    def pieces() -> Iterator[Piece]:
        for split, path in split_files(names, 0.1):
            with open(path, "rb") as file:
                encoding, _ = tokenize.detect_encoding(file.readline)
            yield Piece(split, True, path.read_bytes().decode(encoding))

    size = sum(path.stat().st_size for path in names.values())
    source = f"{len(names)} files of the standard library of Python {platform.python_version()}"
    return Corpus("python", source, pieces, size)


def shakespeare() -> Corpus:
    """karpathy's tinyshakespeare, downloaded and checked, with nanoGPT's split and characters."""
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=30) as answer:
            content = answer.read(2_000_000)
    except (OSError, HTTPException) as error:
        raise OSError(
            f"shakespeare could not be downloaded ({error}); get its input.txt elsewhere, then "
            "python data/prepare.py input.txt name=shakespeare tokenizer=char"
        ) from None
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{SHAKESPEARE}: what came is not tinyshakespeare (its SHA-256 differs); "
            "try again later"
        )
    pieces, source = cut_text(content.decode()), "tinyshakespeare of karpathy/char-rnn"
    return Corpus("shakespeare", source, lambda: iter(pieces), len(content), tokenizer="char")


def hub_stream(name: str, path: str, tokenizer: str, /, **options) -> Corpus:
    """The train split of a data set on Hugging Face, as a stream; a hundredth of its rows is val.

    options: what datasets.load_dataset is given besides.
    """

    def pieces() -> Iterator[Piece]:
        try:
            import datasets
        except ImportError:
            raise ValueError(f"{name}: streaming it needs datasets; pip install datasets") from None
        try:
            rows = datasets.load_dataset(path, split="train", streaming=True, **options)
            for row, fields in enumerate(rows):
                yield Piece(split_of(f"{name}:{row}", 0.01), True, fields["text"])
        # Network and library can fail in many ways; the user's way on is the same in each.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise OSError(
                f"{path}: streaming stopped ({reason}); run the same command again to go on"
            ) from None

    return Corpus(name, f"{path} on Hugging Face", pieces, stream=True, tokenizer=tokenizer)


NAMED = {
    "python": python_source,
    "shakespeare": shakespeare,
    "tinystories": lambda: hub_stream("tinystories", "roneneldan/TinyStories", "sentencepiece"),
    "fineweb-edu": lambda: hub_stream(
        "fineweb-edu", "HuggingFaceFW/fineweb-edu", "tiktoken:gpt2", name="sample-10BT"
    ),
}
