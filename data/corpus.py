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
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from http.client import HTTPException
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from config.command import counted, expand_home, one_line, shell_path, warn
from data import SPLITS
from data.formats import BYTE_ORDER_MARK, DROP_NUL, HEAD, not_text, not_utf8

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
    paths = [Path(expand_home(source)) for source in sources]
    for source, path in zip(sources, paths, strict=True):
        if not (path.is_dir() or path.is_file()):
            raise FileNotFoundError(
                f"{source} is not a file or folder, nor one of {', '.join(NAMED)}"
                f"{what_was_meant(source)}"
            )
        if path.is_file():
            check_readable(path)
    one_text = len(paths) == 1 and paths[0].is_file() and rows_of(paths[0]) is None
    if one_text:
        tell_of_rows(paths)
    return text_file(paths[0]) if one_text else documents(paths)


def what_was_meant(source: str) -> str:
    """What somebody who names this source may want, as the end of a message; '' if unknown."""
    if "://" in source:
        return "; download it, and name the file"
    name = source.rpartition("/")[2].lower()
    near = get_close_matches(KIN.get(name, name), NAMED, 1)
    return f"; did you mean {near[0]}?" if near else ""


# Train or val


def split_of(name: str, val_share: float) -> str:
    """'train' or 'val', by a hash of the document's name, so other documents do not matter."""
    number = int(name_hash(name)[:8], 16)
    return "val" if number < val_share * 2**32 else "train"


def name_hash(name: str) -> str:
    """SHA-256 of a name, which need not be UTF-8, in hexadecimal."""
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()


def split_files(names: dict[str, Path], val_share: float) -> list[tuple[str, Path]]:
    """(split, path) of each document, in the order of their names' hashes, so val comes first."""
    return [(split_of(name, val_share), names[name]) for name in sorted(names, key=name_hash)]


def cut_text(text: str) -> list[Piece]:
    """The first 90% of the characters for train and the rest for val."""
    cut = int(len(text) * 0.9)
    pieces = Piece("train", True, text[:cut]), Piece("val", True, text[cut:])
    return [piece for piece in pieces if piece.text]


# The user's files


def text_pieces(split: str, path: Path, start: int, stop: int) -> Iterator[Piece]:
    """Bytes start..stop of a UTF-8 file as one document, in pieces of CHUNK bytes.

    The text is taken exactly as it is, with CRLF line ends. Only a byte order mark at the head of
    the file is no part of it. Raises ValueError if it is not UTF-8, or has a NUL byte.
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
                place = position - waiting + error.start
                raise ValueError(
                    f"{path}: byte {place} {not_utf8(error.object, error.start)}"
                ) from None
            if "\0" in text:
                place = position - waiting + len(text.partition("\0")[0].encode())
                raise ValueError(f"{path}: byte {place} is NUL, which no text has: {DROP_NUL}")
            if position == 0:
                text = text.removeprefix(BYTE_ORDER_MARK)
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


def text_in(row: object) -> str:
    """The 'text' of a row; ValueError says what the row has instead."""
    if not isinstance(row, dict) or not row:
        raise ValueError(f"it is {row!r:.40}")
    if "text" not in row:
        raise ValueError(f"it has {', '.join(map(repr, row)):.200}, but no 'text'")
    text = row["text"]
    if not isinstance(text, str):
        raise ValueError(f"its 'text' is {text!r:.40}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("its 'text' spells half a surrogate pair") from None
    return text


def json_lines(path: Path) -> Iterator[str]:
    """The 'text' of each line of a file of JSON lines. Blank lines are skipped."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = text_in(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}: line {number} is not a JSON object with a 'text' string "
                    f"({error}); mend or drop it"
                ) from None
            yield text


def json_list(path: Path) -> Iterator[str]:
    """The 'text' of each object in the list that a .json file holds, which is read whole.

    Some programs give the name .json to a file of lines, so one that is not a list is read as such.
    """
    with open(path, "rb") as file:
        is_list = file.read(HEAD).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    where = ""
    try:
        if is_list:
            for number, row in enumerate(json.loads(path.read_bytes()), 1):
                where = f"item {number}: "
                yield text_in(row)
        else:
            yield from json_lines(path)
    except (ValueError, RecursionError) as error:
        reason = f"{where}{error}".removeprefix(f"{path}: ")
        raise ValueError(
            f"{path}: neither a JSON list of objects with a 'text' string nor a line for each "
            f"({reason})"
        ) from None


def parquet_rows(path: Path) -> Iterator[str]:
    """The 'text' column of a .parquet file, row by row."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: reading it needs pyarrow; pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            names, before = file.schema_arrow.names, 0
            if "text" not in names:
                raise ValueError(f"it has {', '.join(map(repr, names)):.200}, but no 'text'")
            kind = file.schema_arrow.field("text").type
            for rows in file.iter_batches(batch_size=1000, columns=["text"]):
                for number, text in enumerate(rows.column("text").to_pylist(), before + 1):
                    if not isinstance(text, str):
                        found = "null" if text is None else kind
                        raise ValueError(f"in row {number}, 'text' is {found}")
                    yield text
                before += len(rows)
    except (ArrowException, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: not a parquet file with strings in a 'text' column ({reason})"
        ) from None


ROWS = {  # files of which each row is a document
    **dict.fromkeys((".jsonl", ".jsonlines", ".jl", ".ndjson"), json_lines),
    ".json": json_list,
    ".parquet": parquet_rows,
}
TABLES = (".csv", ".tsv", ".tab")
OF_A_DATA_SET = (*(f"{split}.bin" for split in SPLITS), "meta.json")
HIDDEN, UNREADABLE = "hidden file* or folder*", "unreadable file* or folder*"  # see counted


def rows_of(path: Path) -> Callable[[Path], Iterator[str]] | None:
    """The function that reads the rows of this file; None for a text."""
    return ROWS.get(path.suffix.lower())


def what_it_holds(path: Path) -> tuple[str, str] | None:
    """not_text of a file that is read as text or as JSON."""
    if rows_of(path) is parquet_rows:
        return None
    with open(path, "rb") as file:
        return not_text(file.read(HEAD))


def check_readable(path: Path) -> None:
    """ValueError with the way out for a file that is named and is neither text nor rows."""
    if path.name in OF_A_DATA_SET and (path.parent / "meta.json").is_file():
        raise ValueError(
            f"{path} is a part of the data set {path.parent}: name that folder, as in "
            f"train.py dataset={shell_path(path.parent)}"
        )
    if found := what_it_holds(path):
        what, cure = found
        raise ValueError(f"{path} is {what}, not text in UTF-8: {cure}")
    if path.suffix.lower() in TABLES:
        refuse_tables([str(path)])


def tell_of_rows(texts: Iterable[Path]) -> None:
    """Warns of files that are read as text, by their name, and look like lines of JSON with a text
    in each."""
    found = []
    for path in texts:
        with open(path, "rb") as file:
            head = file.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
        with suppress(ValueError, RecursionError):
            if head.startswith(b"{"):
                text_in(json.loads(head.partition(b"\n")[0]))
                found.append(str(path))
    if found:
        warn(
            f"{some(found)}: each line looks like a JSON object with a 'text', and is trained on "
            "as it stands: a name that ends with .jsonl makes each of these texts a document"
        )


def refuse_tables(names: list[str]) -> None:
    raise ValueError(
        f"{some(names)}: the columns of a table are not read, and as text they would be trained on "
        'with their commas or tabs: write each row as a line {"text": "..."} of a .jsonl file'
    )


def some(names: list[str], most: int = 3) -> str:
    """The first few of the names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def folder_files(folder: Path) -> dict[str, Path]:
    """The files below a folder that hold text or rows, by their names relative to it.

    What is left out is counted and named on one line. Links to folders and to files outside of the
    folder are among it: a folder from elsewhere must not bring private files of this machine into
    a data set. A table is an error, since it may be what the user wants to be read.
    """
    kept: dict[str, Path] = {}
    left_out: dict[str, list[str]] = {}  # why, as in `counted` -> names
    tables, root = [], folder.resolve()

    def leave_out(path: str | Path, why: str, what: str = "") -> None:
        shown = one_line(Path(path).relative_to(folder).as_posix())
        left_out.setdefault(why, []).append(f"{shown}: {what}" if what else shown)

    def unreadable(error: OSError) -> None:
        leave_out(error.filename, UNREADABLE)

    for place, folders, files in os.walk(folder, onerror=unreadable):
        for name in list(folders):
            hidden = name.startswith(".")
            if hidden or os.path.islink(os.path.join(place, name)):
                leave_out(Path(place, name), HIDDEN if hidden else "link* to folders")
                folders.remove(name)
        for path in (Path(place, name) for name in sorted(files)):
            if why := why_left_out(path, root):
                leave_out(path, *why)
            elif path.suffix.lower() in TABLES:
                tables.append(str(path))
            else:
                kept[path.relative_to(folder).as_posix()] = path
    if tables:
        refuse_tables(sorted(tables))
    if left_out:
        parts = (f"{counted(len(n), why)} ({some(sorted(n))})" for why, n in left_out.items())
        print(f"{one_line(folder)}: left out {', '.join(sorted(parts))}")
    return kept


def why_left_out(path: Path, root: Path) -> tuple[str, ...]:
    """Why a file in a folder is not read, as arguments of leave_out; () if it is read."""
    if path.name.startswith("."):
        return (HIDDEN,)
    if not os.path.exists(path):
        return ("broken link*" if os.path.islink(path) else UNREADABLE,)
    if not os.path.isfile(path):  # a FIFO could make us wait for ever
        return ("special file*",)
    if not path.resolve().is_relative_to(root):
        return ("link* to files outside of it",)
    if not os.access(path, os.R_OK):
        return (UNREADABLE,)
    if not path.stat().st_size:
        return ("empty file*",)
    if found := what_it_holds(path):
        return "file* not in UTF-8", found[0]
    if rows_of(path) is json_list:
        try:
            next(json_list(path), None)
        except ValueError:
            return (".json file* without rows of text",)
    return ()


def documents(paths: list[Path]) -> Corpus:
    """Folders and files: each text file is a document, and so is each row of .jsonl and .parquet.

    A tenth of the documents is val. If that makes val smaller than 5% or larger than 20% of the
    bytes, because documents are few or unequal, the last tenth of each document is val instead.
    """
    names: dict[str, Path] = {}
    for path in paths:
        found = folder_files(path) if path.is_dir() else {path.name: path}
        names |= {(name if name not in names else f"{path}/{name}"): found[name] for name in found}
    texts = {name: path for name, path in names.items() if rows_of(path) is None}
    tell_of_rows(texts.values())

    def pieces(whole: bool = True) -> Iterator[Piece]:
        for split, path in split_files(texts, 0.1):
            if whole:
                yield from text_pieces(split, path, 0, path.stat().st_size)
            else:
                yield from text_file(path).pieces()
        for name in sorted(names.keys() - texts.keys()):
            for row, text in enumerate(rows_of(names[name])(names[name])):
                if whole:
                    yield Piece(split_of(f"{name}:{row}", 0.1), True, text)
                else:
                    yield from cut_text(text)

    sizes = Counter()
    for piece in pieces():
        sizes[piece.split] += len(piece.text.encode())
    whole = 0.05 * sizes.total() <= sizes["val"] <= 0.2 * sizes.total()
    how = "split by document" if whole else "few or unequal, so each is cut 90/10"
    of = ", ".join(path.resolve().name for path in paths)
    source = f"{counted(len(names), 'file*')} of {of}, {how}"
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

    def pieces() -> Iterator[Piece]:
        yield from cut_text(content.decode())

    source = "tinyshakespeare of karpathy/char-rnn"
    return Corpus("shakespeare", source, pieces, len(content), tokenizer="char")


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
KIN = {"openwebtext": "fineweb-edu"}  # other programs' data sets -> the one here that is like them
