"""A data set on the disk, and the batch of a step.

The batch of step s is a pure function of (seed, s). There is no state and no worker process, so a
run that is resumed needs nothing from here: it asks for the batch of the next step. Tokens are read
from the disk when they are needed (memory maps), and the global random generators are never used.

A data set is a folder with train.bin and val.bin (token ids and nothing else), meta.json (what
data/prepare.py knows about them) and the file of the tokenizer that made them. Beside each .bin
file stand its places: where documents begin, and, of conversations, where answers begin and end.

In reading order: Dataset; `batch` and what it calls; the windows for evaluation; `open_dataset` and
the checks that it makes.
"""

import json
import os
import shlex
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data import PART_TOKENS, SPLITS, checksum, places_file
from model import IGNORED
from text.tokenizer import tokenizer_sha256

FULL_SCAN = 200_000_000  # tokens; of a larger file only so many are checked, in spread parts
UNCHANGED = ("st_size", "st_mtime_ns", "st_ctime_ns")  # of a file with the same content
LARGEST_META = 2**26  # bytes


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set that passed the checks of open_dataset."""

    folder: Path
    meta: dict  # the content of meta.json
    train: np.ndarray  # ids, 1-dimensional, a read-only memory map
    val: np.ndarray  # the same
    opened: dict[Path, os.stat_result]  # train.bin and val.bin as they were when they were opened
    doc_mask: bool = False  # whether windows come with the positions of tokens in their documents
    doc_windows: bool = False  # whether training windows begin where documents begin
    answers_only: bool = True  # whether in training, too, only the answers of conversations count
    # Of each split, int64 in ascending order: where documents begin, if one of the two needs it;
    # and where answers begin and end in turn, if answers alone count in the loss.
    documents: dict[str, np.ndarray] = field(default_factory=dict)
    answers: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def place(self) -> str:
        """For messages: where these data are."""
        return str(self.folder)

    @property
    def fingerprint(self) -> dict:
        """What must stay the same between a run and its resumption."""
        keys = ("dtype", "vocab_size", "tokens", "content_sha256", "tokenizer_sha256")
        answers = {"answers": True} if self.answers else {}  # which alone count in the loss
        return {"name": self.name} | {key: self.meta[key] for key in keys} | answers

    @property
    def sources(self) -> tuple["Dataset", ...]:
        """The data sets of which this one is made: itself alone. A Mixture has several."""
        return (self,)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each source, its share of the rows."""
        return (1.0,)

    def mean(self, values: Sequence[float]) -> float:
        """The mean of one value for each source."""
        return values[0]

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text per token. Bits per byte = loss in nats / ln 2 / this."""
        return self.meta["bytes"][split] / self.meta["tokens"][split]

    def lost_share(self, split: str) -> float:
        """The share of the split's bytes that the tokenizer could not keep."""
        return self.meta.get("lost_bytes", {}).get(split, 0) / self.meta["bytes"][split]

    def rows(self, numbers: np.ndarray, block_size: int, seed: int) -> tuple[torch.Tensor, ...]:
        """The training windows with these numbers, which count from the first step on."""
        n_tokens = len(self.train)
        if self.doc_windows:
            starts = document_starts(document_windows(self, block_size), seed, numbers)
        else:
            starts = train_starts(n_tokens, block_size, seed, numbers)
        return self.windows("train", starts, block_size)

    def windows(self, split: str, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, ...]:
        """(x, y) of read_windows(), with IGNORED in y where a token does not count in the loss.
        With doc_mask also the position of each token of x in its document, int64 [B, T]. Of a
        document that has begun before the window, it is the position in the window.

        OSError if a file was changed, even at this moment.
        """
        self.check_unchanged()  # a file that was cut short would end the process
        x, y = read_windows(getattr(self, split), starts, block_size)
        self.check_unchanged()
        if self.answers and (self.answers_only or split == "val"):
            rest = ~self.in_answers(split, starts + 1, block_size)
            y = y.masked_fill(torch.from_numpy(rest), IGNORED)  # not in place: x may share memory
        if not self.doc_mask:
            return x, y
        places = starts[:, None] + np.arange(block_size)  # [B, T], of x
        documents = self.documents[split]
        begin = documents[np.searchsorted(documents, places, side="right") - 1]
        return x, y, torch.from_numpy(places - np.maximum(begin, starts[:, None]))

    def in_answers(self, split: str, starts: np.ndarray, block_size: int) -> np.ndarray:
        """Whether each token of windows is in an answer, bool [B, T]."""
        places = starts[:, None] + np.arange(block_size)
        edges = np.searchsorted(self.answers[split], places, side="right")
        return edges % 2 == 1  # an answer has begun and not ended

    def check_unchanged(self) -> None:
        """OSError if a file was changed after it was opened: its memory map has changed, too.

        A file that was deleted or replaced is no error: the map keeps the old content. Nor is one
        that has a new time and the same content, as after `touch`.
        """
        for path, before in self.opened.items():
            try:
                now = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if not os.path.samestat(now, before):
                continue
            # A program can set the time of the content back, but not that of the file's status.
            if all(getattr(now, field) == getattr(before, field) for field in UNCHANGED):
                continue
            try:
                if now.st_size != before.st_size:
                    raise ValueError("it has another size now")
                tokens, checksums = getattr(self, path.stem), self.meta["crc32"][path.stem]
                check_content(path, tokens, self.meta["vocab_size"], checksums, scanned=len(tokens))
            except ValueError:
                raise OSError(
                    f"{path} was changed while it was being read: prepare the data set again"
                ) from None
            self.opened[path] = now


# The batch of a step


def batch(
    dataset: Dataset,
    step: int,
    batch_size: int,
    block_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[torch.Tensor, ...]:
    """(x, y), int64 [B, T]: this rank's part of the batch of a step. With doc_mask also positions,
    see Dataset.windows.

    batch_size counts the sequences of all ranks together, so B = batch_size / world_size. T is
    block_size. y is x one token later, which is what the model has to predict.
    """
    if batch_size % world_size:
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of the {world_size} devices that share it"
        )
    share = batch_size // world_size
    return dataset.rows(step * batch_size + rank * share + np.arange(share), block_size, seed)


def read_windows(
    tokens: np.ndarray, starts: np.ndarray, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y), int64 [B, T]: the tokens of each window, and those one place later."""
    places = starts[:, None] + np.arange(block_size + 1)  # [B, T + 1]
    windows = torch.from_numpy(tokens[places].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def train_starts(n_tokens: int, block_size: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Where the windows with these numbers start, int64. Number 0 is the first one of step 0.

    Epochs follow each other without a gap, and a batch may take windows from two of them. Within an
    epoch every window comes exactly once. Raises ValueError if the split is shorter than a window.
    """
    check_length(n_tokens, block_size)
    epochs, places = np.divmod(numbers, windows_per_epoch(n_tokens, block_size))
    return np.array(
        [
            epoch_starts(n_tokens, block_size, seed, int(epoch))[place]
            for epoch, place in zip(epochs, places, strict=True)
        ]
    )


@lru_cache(maxsize=2)  # a batch takes from at most two epochs, unless an epoch is very short
def epoch_starts(n_tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """The starts of all windows of an epoch, in random order.

    The windows stand side by side. The first one starts at an offset that is drawn anew for each
    epoch, so the borders between windows are at other tokens each time. The random numbers are raw
    output of PCG64: numpy promises to keep it the same in every version, but not permutation().
    """
    windows = windows_per_epoch(n_tokens, block_size)
    random = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    offset = int(random.random_raw()) % (n_tokens - windows * block_size)
    order = np.argsort(random.random_raw(windows), kind="stable")
    starts = order * block_size + offset
    starts.setflags(write=False)  # the cache gives the same array to every caller
    return starts


def document_starts(windows: np.ndarray, seed: int, numbers: np.ndarray) -> np.ndarray:
    """The same as train_starts, of windows that are the same in every epoch."""
    epochs, places = np.divmod(numbers, len(windows))
    pairs = zip(epochs, places, strict=True)
    return windows[[shuffled(len(windows), seed, int(epoch))[place] for epoch, place in pairs]]


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """0 to count - 1 in an order that is random, and another one in each epoch."""
    random = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    return np.argsort(random.random_raw(count), kind="stable")


@lru_cache(maxsize=8)
def document_windows(data: Dataset, block_size: int) -> np.ndarray:
    """The starts of windows that cover the training split, each at the beginning of a document.

    The next window begins with the document that this one cuts off at its end. Only a document
    that is longer than a window goes on where the window ends. Less than two windows at the end of
    the split are left out.
    """
    check_length(len(data.train), block_size)
    documents, starts = data.documents["train"], [0]
    last = len(data.train) - block_size - 1  # the last place where a window has room
    while starts[-1] + block_size <= last:
        start, end = starts[-1], starts[-1] + block_size
        begun = documents[np.searchsorted(documents, end, side="right") - 1]
        starts.append(int(begun) if begun > start else end)
    return np.array(starts)


def windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """One window fewer than would fit, which leaves the offset of an epoch a block to move in."""
    return max(1, n_tokens // block_size - 1)


def check_length(n_tokens: int, block_size: int) -> None:
    """ValueError if a split has no room for a window of block_size tokens and the next token."""
    if n_tokens < block_size + 1:
        raise ValueError(
            f"a split has {n_tokens} tokens, needs at least block_size + 1 = {block_size + 1}; "
            "lower block_size or prepare more text"
        )


# The windows for evaluation


def val_starts(n_tokens: int, block_size: int, count: int) -> np.ndarray:
    """The starts of `count` windows that do not overlap, spread over the split, int64.

    count = 0 means all windows; so does a count that is larger than their number.
    """
    check_length(n_tokens, block_size)
    windows = (n_tokens - 1) // block_size
    chosen = min(count, windows) or windows
    return np.arange(chosen) * windows // chosen * block_size


# Opening a data set


def open_dataset(
    folder: str | Path,
    doc_mask: bool = False,
    doc_windows: bool = False,
    answers_only: bool = True,
) -> Dataset:
    """Opens a folder that data/prepare.py made, and checks its files. For the options see Dataset.

    Raises OSError if a file is missing or unreadable and ValueError if its content is wrong. The
    message is one line that says what to do.
    """
    folder = Path(folder)
    check_prepared(folder)
    opened, tokens, documents, answers = {}, {}, {}, {}
    try:
        meta = read_meta(folder / "meta.json")
        for split in SPLITS:
            path = folder / f"{split}.bin"
            opened[path] = check_regular(path)
            tokens[split] = map_tokens(path, opened[path].st_size, meta, split)
            if doc_mask or doc_windows:
                documents[split] = read_places(folder, split, "documents", meta)
            if places_file(split, "answers") in meta.get("places", {}):
                answers[split] = read_places(folder, split, "answers", meta)
    except ValueError as error:
        raise ValueError(f"{error}; prepare the data set again") from None
    if tokenizer_sha256(folder) != meta["tokenizer_sha256"]:
        raise ValueError(
            f"{folder}: its tokenizer file is not the one that the tokens were made with; "
            "prepare the data set again"
        )
    return Dataset(
        folder,
        meta,
        **tokens,
        opened=opened,
        doc_mask=doc_mask,
        doc_windows=doc_windows,
        answers_only=answers_only,
        documents=documents,
        answers=answers,
    )


def check_prepared(folder: Path) -> None:
    """FileNotFoundError with the command that makes the data set, if `folder` holds none."""
    if (folder / "meta.json").exists() or (folder / "train.bin").exists():
        return
    if "," in folder.name and not folder.exists():
        raise FileNotFoundError(
            f"{folder}: no such data set; a mixture gives each of its data sets a share above 0, "
            f"as in dataset=code:0.7,books:0.3"
        )
    if folder.exists():  # a text, or a folder of texts, of which a data set can be made
        words = f"{shlex.quote(str(folder))} name=NAME"
    else:
        from data.corpus import NAMED  # which nobody else needs to load data

        name = shlex.quote(folder.name)
        words = name if folder.name in NAMED else f"YOUR-TEXT name={name}"
    raise FileNotFoundError(
        f"{folder}: no such data set; make it with: python data/prepare.py {words}"
    )


def check_regular(path: Path) -> os.stat_result:
    """The status of a readable, regular file; OSError for anything else.

    Anything else is not opened: opening a FIFO, for one, would wait for ever.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path}: not a regular file; prepare the data set again")
        open(path, "rb").close()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; prepare the data set again") from None
    except PermissionError:
        raise PermissionError(f"{path}: permission denied; make it readable") from None
    return status


def is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**63  # float() of a larger one may fail


def is_counts(value: object) -> bool:
    return isinstance(value, dict) and all(is_count(value.get(split)) for split in SPLITS)


def is_loss(value: object) -> bool:
    return isinstance(value, dict) and all(
        is_count(value.get(split)) or value.get(split) == 0 for split in SPLITS
    )


def is_checksums(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(split), list) and all(type(crc) is int for crc in value[split])
        for split in SPLITS
    )


def is_bits(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < 1000)


def is_places(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(about, list) and len(about) == 2 and all(type(n) is int for n in about)
        for about in value.values()
    )


def is_share(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


FIELDS = {  # of meta.json: the test that a value must pass, and the words for it
    "format_version": (lambda value: is_count(value) and value == 1, "1 (from another version?)"),
    "dtype": (lambda value: value in ("uint16", "uint32"), "'uint16' or 'uint32'"),
    "vocab_size": (lambda value: is_count(value) and value <= 2**32, "a whole number above 0"),
    "tokens": (is_counts, "a number of tokens above 0 for train and for val"),
    "bytes": (is_counts, "a number of bytes above 0 for train and for val"),
    "crc32": (is_checksums, "a list of checksums for train and for val"),
    "xz_bits_per_byte": (is_bits, "null or a number of bits"),
    "val_overlap": (is_share, "null or a share between 0 and 1"),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_sha256", "content_sha256"),
        (lambda value: isinstance(value, str), "a text"),
    ),
}


def read_meta(path: Path) -> dict:
    """The checked content of meta.json."""
    if check_regular(path).st_size > LARGEST_META:
        raise ValueError(f"{path}: larger than {LARGEST_META:,} bytes, which no meta.json is")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        found = checksum(meta)  # inside `try`, because deep nesting can make it fail, too
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error})") from None
    for name, (good, meaning) in FIELDS.items():
        if not good(meta.get(name)):
            raise ValueError(f"{path}: {name} is {meta.get(name)!r:.80}, must be {meaning}")
    bos_id = meta.get("bos_id")
    if not (bos_id is None or type(bos_id) is int and 0 <= bos_id < meta["vocab_size"]):
        raise ValueError(f"{path}: bos_id is {bos_id!r:.80}, must be null or below vocab_size")
    if "places" in meta and not is_places(meta["places"]):  # an older version had none
        raise ValueError(
            f"{path}: places is {meta['places']!r:.80}, must be a count and a checksum of each file"
        )
    if "lost_bytes" in meta and not is_loss(meta["lost_bytes"]):
        raise ValueError(
            f"{path}: lost_bytes is {meta['lost_bytes']!r:.80}, must be a number of bytes for "
            "train and for val"
        )
    if meta.get("checksum") != found:
        raise ValueError(f"{path}: its checksum says that it was changed or damaged")
    return meta


def map_tokens(path: Path, size: int, meta: dict, split: str) -> np.ndarray:
    """The checked tokens of one split, as a memory map of its file of `size` bytes."""
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    count = meta["tokens"][split]
    if size == 0:
        raise ValueError(f"{path}: empty")
    if size != count * dtype.itemsize:
        raise ValueError(
            f"{path}: has {size} bytes, not the {count * dtype.itemsize} of meta.json's {count} "
            "tokens; truncated?"
        )
    tokens = np.memmap(path, dtype=dtype, mode="r")
    check_content(path, tokens, meta["vocab_size"], meta["crc32"][split])
    return tokens


def read_places(folder: Path, split: str, kind: str, meta: dict) -> np.ndarray:
    """The checked places of documents or answers in a split, int64 in ascending order."""
    path = folder / places_file(split, kind)
    if path.name not in meta.get("places", {}):
        raise ValueError(
            f"{folder} does not say where {kind} begin, for an older version has prepared it"
        )
    check_regular(path)
    content = path.read_bytes()
    if [len(content) // 8, zlib.crc32(content)] != meta["places"][path.name]:
        raise ValueError(f"{path}: is not what was prepared (its size or checksum differs)")
    places = np.frombuffer(content, "<i8").astype(np.int64)
    outside = len(places) and not 0 <= places[0] <= places[-1] <= meta["tokens"][split]
    if outside or (np.diff(places) < 0).any():
        raise ValueError(f"{path}: its places are not in order, or not in the split")
    if (len(places) % 2) if kind == "answers" else not len(places) or places[0]:
        raise ValueError(f"{path}: the first document or the last answer is not whole")
    return places


def check_content(
    path: Path,
    tokens: np.ndarray,
    vocab_size: int,
    checksums: list[int],
    scanned: int | None = None,
) -> None:
    """ValueError if tokens are not those that were prepared, or if an id is not below vocab_size.

    Of a larger file, about `scanned` tokens are looked at; None = FULL_SCAN of them.
    On a GPU such an id would end the run with a device-side assert that does not name the cause.
    """
    parts = -(-len(tokens) // PART_TOKENS)
    if len(checksums) != parts:
        raise ValueError(f"{path}: has {parts} parts, meta.json {len(checksums)} checksums")
    most = -(-(FULL_SCAN if scanned is None else scanned) // PART_TOKENS)
    checked = np.linspace(0, parts - 1, min(parts, most)).astype(int)
    for i in checked.tolist():
        begin = i * PART_TOKENS
        part = tokens[begin : begin + PART_TOKENS]
        if part.max() >= vocab_size:
            at = begin + int(np.argmax(part >= vocab_size))
            raise ValueError(
                f"{path}: id {tokens[at]} at byte {at * tokens.itemsize} is not below "
                f"vocab_size={vocab_size}"
            )
        if zlib.crc32(part) != checksums[i]:
            raise ValueError(
                f"{path}: the {part.nbytes:,} bytes from byte {begin * tokens.itemsize:,} on are "
                "not what was prepared (their checksum differs)"
            )
