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
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from http.client import HTTPException
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from config.command import counted, expand_home, one_line, shell_path, warn
from data import SPLITS
from data.rows import ROWS, row_suffix, rows_in, text_in, texts_in
from text.formats import (
    BINARY,
    BYTE_ORDER_MARK,
    DROP_NUL,
    HEAD,
    UNPACK,
    not_text,
    not_utf8,
    open_unpacked,
    skip_bytes,
    unpacked_name,
    unpacked_size,
)
from text.messages import Messages, conversation_in, is_conversation

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
    text: str  # of a conversation, all that is said in it
    messages: Messages = []
    place: str = ""  # of a conversation: file and row, for an error


@dataclass(frozen=True)
class Corpus:
    """A source of text. Each call of pieces() begins at the start and gives the same pieces."""

    name: str
    source: str  # a description for meta.json
    pieces: Callable[[], Iterator[Piece]]
    size: int | None = None  # bytes of UTF-8; None where that is not known beforehand
    chat: bool = False  # whether the pieces are conversations
    stream: bool = False  # comes from the network; a preparation that stopped can be continued
    tokenizer: str = "sentencepiece"  # the default for `tokenizer=`


def open_corpus(sources: list[str], field: str | None = None) -> Corpus:
    """The corpus that the command line names: one of NAMED, or the user's files and folders.

    field: where the rows of these files have their text; None for 'text'. ValueError if it is given
    and there are no rows.
    """
    if len(sources) == 1 and sources[0] in NAMED:
        if field is not None:
            refuse_field(field, sources[0])
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
    one_text = len(paths) == 1 and paths[0].is_file() and row_suffix(paths[0]) is None
    if not one_text:
        return documents(paths, field)
    if field is not None:
        refuse_field(field, sources[0])
    tell_of_rows(paths)
    return text_file(paths[0])


def refuse_field(field: str, source: str) -> None:
    raise ValueError(
        f"field={field} is for the rows of {', '.join(ROWS)}, of which {source} has none: leave it "
        "out"
    )


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


def text_pieces(path: Path, parts: list[tuple[str, int]]) -> Iterator[Piece]:
    """A text in UTF-8 in pieces of CHUNK bytes.

    parts: (split, the byte before which it ends) of each part, which is a document. The text is
    taken exactly as it is, with CRLF line ends. Only a byte order mark at its head is no part of
    it. Raises ValueError if it is not UTF-8, or has a NUL byte.
    """
    start = 0
    with open_unpacked(path) as file:
        for split, stop in parts:
            for position, text in text_blocks(path, file, start, stop):
                yield Piece(split, position == start, text)
            start = stop


def text_blocks(path: Path, file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, str]]:
    """(where it begins, a block of the text) of bytes start..stop. The file stands at `start`."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), start
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
        yield position, text
        position += len(block)


def text_parts(path: Path) -> list[tuple[str, int]]:
    """The `parts` of a text that is cut as in nanoGPT: the first 90% of its bytes are train and the
    rest is val. If that cut is inside a character, it moves to the character's end.
    """
    size = unpacked_size(path)
    cut = int(size * 0.9)
    with open_unpacked(path) as file:
        skip_bytes(file, cut)
        cut += len(list(takewhile(lambda byte: byte & 0xC0 == 0x80, file.read(3))))
    return [("train", cut), ("val", size)]


def text_file(path: Path) -> Corpus:
    """One text, of which the end is val."""
    parts = text_parts(path)
    name = Path(unpacked_name(path.name)).stem
    return Corpus(name, path.name, partial(text_pieces, path, parts), parts[-1][1])


OF_A_DATA_SET = (*(f"{split}.bin" for split in SPLITS), "meta.json")
HIDDEN, UNREADABLE = "hidden file* or folder*", "unreadable file* or folder*"  # see counted


def what_it_holds(path: Path) -> tuple[str, str] | None:
    """not_text of a file that is read as text, as JSON or as a table, and of its content if it is
    compressed.
    """
    if row_suffix(path) == ".parquet":
        packed = unpacked_name(path.name) != path.name
        return ("compressed parquet", UNPACK) if packed else None
    with open_unpacked(path) as file:
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


def tell_of_rows(texts: Iterable[Path]) -> None:
    """Warns of files that are read as text, by their name, and look like lines of JSON with a text
    in each."""
    found = []
    for path in texts:
        with open_unpacked(path) as file:
            head = file.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
        with suppress(ValueError, RecursionError, KeyError):
            if head.startswith(b"{"):
                text_in(json.loads(head.partition(b"\n")[0]), "text")
                found.append(str(path))
    if found:
        warn(
            f"{some(found)}: each line looks like a JSON object with a 'text', and is trained on "
            "as it stands: a name that ends with .jsonl makes each of these texts a document"
        )


def some(names: list[str], most: int = 3) -> str:
    """The first few of the names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def folder_files(folder: Path, field: str) -> list[Path]:
    """The files below a folder that hold text or rows with this field.

    What is left out is counted by its kind and named on one line. Links to folders and to files
    outside of the folder are among it: a folder from elsewhere must not bring private files of this
    machine into a data set.
    """
    kept: list[Path] = []
    left_out: dict[str, list[str]] = {}  # why, as in `counted` -> names
    root = folder.resolve()

    def leave_out(path: str | Path, why: str) -> None:
        shown = one_line(Path(path).relative_to(folder).as_posix())
        left_out.setdefault(one_line(why), []).append(shown)

    def unreadable(error: OSError) -> None:
        leave_out(error.filename, UNREADABLE)

    for place, folders, files in os.walk(folder, onerror=unreadable):
        for name in list(folders):
            hidden = name.startswith(".")
            if hidden or os.path.islink(os.path.join(place, name)):
                leave_out(Path(place, name), HIDDEN if hidden else "link* to folders")
                folders.remove(name)
        for path in (Path(place, name) for name in sorted(files)):
            if why := why_left_out(path, root, field):
                leave_out(path, why)
            else:
                kept.append(path)
    if left_out:
        parts = (f"{counted(len(n), why)} ({some(sorted(n))})" for why, n in left_out.items())
        print(f"{one_line(folder)}: left out {', '.join(sorted(parts))}")
    return kept


def why_left_out(path: Path, root: Path, field: str) -> str:
    """Why a file in a folder is not read, in the words of `counted`; '' if it is read."""
    if path.name.startswith("."):
        return HIDDEN
    if not os.path.exists(path):
        return "broken link*" if os.path.islink(path) else UNREADABLE
    if not os.path.isfile(path):  # a FIFO could make us wait for ever
        return "special file*"
    if not path.resolve().is_relative_to(root):
        return "link* to files outside of it"
    if not os.access(path, os.R_OK):
        return UNREADABLE
    if not path.stat().st_size:
        return "empty file*"
    if found := what_it_holds(path):
        kind = f"{path.suffix.lower()} binary".strip()
        return f"{kind} file*" if found[0] == BINARY else f"file* holding {found[0]}"
    if row_suffix(path) == ".json":
        try:
            if not holds_conversations(path):
                next(texts_in(path, field), None)
        except ValueError:
            return ".json file* without rows of text"
    return ""


def documents(paths: list[Path], field: str | None = None) -> Corpus:
    """Folders and files: each text is a document, and so is the text in each row of the others.

    A tenth of the documents is val. If that makes val smaller than 5% or larger than 20% of the
    bytes, because documents are few or unequal, the last tenth of each document is val instead.
    """
    where = "text" if field is None else field
    names: dict[str, Path] = {}
    for path in paths:
        for file in folder_files(path, where) if path.is_dir() else [path]:
            names[name_among(names, path, file)] = file
    texts = {name: path for name, path in names.items() if row_suffix(path) is None}
    rows = {name: names[name] for name in sorted(names.keys() - texts.keys())}
    if field is not None and not rows:
        refuse_field(field, ", ".join(map(str, paths)))
    of = ", ".join(path.resolve().name for path in paths)
    first = paths[0].resolve()
    name = first.name if first.is_dir() else Path(unpacked_name(first.name)).stem
    if field is None and any(map(holds_conversations, rows.values())):
        if texts:
            raise ValueError(
                f"{some(sorted(texts))} are texts, and {some(sorted(rows))} conversations: prepare "
                "them as two data sets, which train.py can mix"
            )
        return conversations(name, of, rows)
    tell_of_rows(texts.values())
    parts = {path: text_parts(path) for path in texts.values()}

    def pieces(whole: bool = True) -> Iterator[Piece]:
        for split, path in split_files(texts, 0.1):
            end = parts[path][-1][1]
            yield from text_pieces(path, [(split, end)] if whole else parts[path])
        for name, path in rows.items():
            for row, text in enumerate(texts_in(path, where)):
                if whole:
                    yield Piece(split_of(f"{name}:{row}", 0.1), True, text)
                else:
                    yield from cut_text(text)

    sizes = Counter()
    for piece in pieces():
        sizes[piece.split] += len(piece.text.encode())
    whole = 0.05 * sizes.total() <= sizes["val"] <= 0.2 * sizes.total()
    how = "split by document" if whole else "few or unequal, so each is cut 90/10"
    source = f"{counted(len(names), 'file*')} of {of}, {how}"
    return Corpus(name, source, partial(pieces, whole), sizes.total())


def conversations(name: str, of: str, rows: dict[str, Path]) -> Corpus:
    """Files of conversations, of which a tenth is val: by a hash of the row's name, or, if that is
    far from a tenth because they are few, each tenth row, but at least the last one."""

    def pieces(each: int = 0) -> Iterator[Piece]:
        number = 0
        for file, path in rows.items():
            for row, (place, messages) in enumerate(conversations_in(path)):
                split = split_of(f"{file}:{row}", 0.1)
                if each:
                    split = "val" if number % each == each - 1 else "train"
                text = "\n".join(message["content"] for message in messages)
                yield Piece(split, True, text, messages, f"{path}: {place}")
                number += 1

    sizes = Counter(piece.split for piece in pieces())
    total = sizes.total()
    by_hash = 0.05 * total <= sizes["val"] <= 0.2 * total
    source = f"{counted(total, 'conversation*')} of {of}"
    return Corpus(name, source, partial(pieces, 0 if by_hash else min(10, total)), chat=True)


def holds_conversations(path: Path) -> bool:
    """Whether the first row of a file is a conversation, and not a text."""
    _, row = next(rows_in(path), ("", {}))
    return "text" not in row and is_conversation(row)


def conversations_in(path: Path) -> Iterator[tuple[str, Messages]]:
    """(place, messages) of each row of a file. ValueError for a row that has none."""
    for place, row in rows_in(path):
        try:
            yield place, conversation_in(row)
        except ValueError as error:
            raise ValueError(f"{path}: {place}: {error}: mend or drop it") from None


def name_among(names: Container[str], source: Path, file: Path) -> str:
    """A name for a file of a source which no other file has. Its split depends on the name.

    A compressed file gets the name of the file that it unpacks to, so that both are split alike.
    """
    inside = file.relative_to(source).as_posix() if source.is_dir() else file.name
    candidates = (unpacked_name(inside), inside, f"{source}/{inside}")
    # If all are taken, the same source was named before, and its files are read once.
    return next((name for name in candidates if name not in names), candidates[-1])


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
