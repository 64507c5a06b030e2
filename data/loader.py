"""The batch of step s is a pure function of (seed, s): no state, no worker, nothing to resume.

Tokens are read from disk as they are needed (memory maps). Global random generators are never touched.
"""

import json
import os
import shlex
import stat
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data import PART, checksum
from data.tokenizer import tokenizer_sha256

DATA = Path(__file__).resolve().parent  # where data/prepare.py puts its folders
SPLITS = ("train", "val")
FULL_SCAN = 200_000_000  # tokens; a larger file is checked in evenly spread parts that add up to this
LARGEST_META = 2**26  # bytes


@dataclass(frozen=True)
class Dataset:
    """A data set that passed open_dataset's checks: train and val are read-only maps of ids, 1-dimensional."""

    folder: Path
    meta: dict
    train: np.ndarray
    val: np.ndarray
    opened: dict[Path, os.stat_result]  # of the two files, when they were opened

    @property
    def fingerprint(self) -> dict:
        """What must not change between a run and its resumption."""
        keys = ("dtype", "vocab_size", "tokens", "content_sha256", "tokenizer_sha256")
        return {"name": self.folder.resolve().name} | {key: self.meta[key] for key in keys}

    def check_unchanged(self) -> None:
        """OSError if somebody has written to a file since it was opened: what is mapped would be other data, or nothing
        at all. A file that was deleted or replaced is still there for us."""
        for path, before in self.opened.items():
            try:
                now = os.stat(path)
            except FileNotFoundError:
                continue
            if os.path.samestat(now, before) and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise OSError(f"{path} was changed while it was being read: prepare the data set again")

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text per token: bits per byte = loss in nats / ln 2 / this."""
        return self.meta["bytes"][split] / self.meta["tokens"][split]


def open_dataset(folder: str | Path) -> Dataset:
    """Opens data/<name>. Raises OSError (a file is missing or unreadable) or ValueError, in one line."""
    folder = Path(folder)
    if not any((folder / file).exists() for file in ("meta.json", "train.bin")):
        text, name = shlex.quote(str(folder)), shlex.quote(folder.name)
        words = f"{text} name=NAME tokenizer=RUN" if folder.exists() else f"{name} (or YOUR-TEXT name={name})"
        raise FileNotFoundError(f"{folder}: no such data set; make it with: python data/prepare.py {words}")
    meta = read_meta(folder / "meta.json")
    opened = {folder / f"{split}.bin": check_regular(folder / f"{split}.bin") for split in SPLITS}
    tokens = {split: map_tokens(path, status.st_size, meta, split)
              for split, (path, status) in zip(SPLITS, opened.items(), strict=True)}
    if tokenizer_sha256(folder) != meta["tokenizer_sha256"]:
        raise ValueError(f"{folder}: its tokenizer file is not the one the tokens were made with; prepare it again")
    return Dataset(folder, meta, **tokens, opened=opened)


def check_regular(path: Path) -> os.stat_result:
    """The status of a regular, readable file; opens nothing else, since opening a FIFO would wait for ever."""
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
    return type(value) is int and value > 0


def is_counts(value: object) -> bool:
    return isinstance(value, dict) and all(is_count(value.get(split)) for split in SPLITS)


def is_checksums(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(split), list) and
                                           all(type(crc) is int for crc in value[split]) for split in SPLITS)


FIELDS = {  # of meta.json: the test that a value must pass, and its meaning
    "format_version": (lambda value: type(value) is int and value == 1, "1 (another version of this program made it?)"),
    "dtype": (lambda value: value in ("uint16", "uint32"), "'uint16' or 'uint32'"),
    "vocab_size": (lambda value: is_count(value) and value <= 2**32, "a whole number above 0"),
    "tokens": (is_counts, "a number of tokens above 0 for train and for val"),
    "bytes": (is_counts, "a number of bytes above 0 for train and for val"),
    "crc32": (is_checksums, f"a list of checksums for train and for val, one for each {PART:,} tokens"),
} | dict.fromkeys(("tokenizer", "tokenizer_sha256", "content_sha256"), (lambda value: isinstance(value, str), "a text"))


def read_meta(path: Path) -> dict:
    """The checked content of meta.json."""
    if check_regular(path).st_size > LARGEST_META:
        raise ValueError(f"{path}: larger than {LARGEST_META:,} bytes, no meta.json is; prepare the data set again")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        found = checksum(meta)  # here too, since it walks as deep
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error}); prepare the data set again") from None
    for field, (good, meaning) in FIELDS.items():
        if not good(meta.get(field)):
            raise ValueError(f"{path}: {field} is {meta.get(field)!r:.80}, must be {meaning}; prepare the data again")
    bos_id = meta.get("bos_id")
    if not (bos_id is None or type(bos_id) is int and 0 <= bos_id < meta["vocab_size"]):
        raise ValueError(f"{path}: bos_id is {bos_id!r:.80}, must be null or an id below vocab_size; "
                         "prepare the data again")
    if meta.get("checksum") != found:
        raise ValueError(f"{path}: its checksum says that it was changed or damaged; prepare the data again")
    return meta


def map_tokens(path: Path, size: int, meta: dict, split: str) -> np.ndarray:
    """The checked tokens of one split, a file of `size` bytes."""
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    if size == 0:
        raise ValueError(f"{path}: empty; prepare the data set again")
    wanted = meta["tokens"][split] * dtype.itemsize
    if size != wanted:
        raise ValueError(f"{path}: has {size} bytes, not the {wanted} of meta.json's {meta['tokens'][split]} tokens; "
                         "truncated? prepare the data set again")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    check_content(path, tokens, meta["vocab_size"], meta["crc32"][split])
    return tokens


def check_content(path: Path, tokens: np.ndarray, vocab_size: int, checksums: list[int]) -> None:
    """Raises ValueError if a token is not what was prepared, or an id is not below vocab_size: on a GPU that would be
    a device-side assert, far from here."""
    parts = -(-len(tokens) // PART)
    if len(checksums) != parts:
        raise ValueError(f"{path}: has {parts} parts, meta.json {len(checksums)} checksums; prepare the data set again")
    for i in np.linspace(0, parts - 1, min(parts, FULL_SCAN // PART)).astype(int).tolist():
        part = tokens[i * PART:(i + 1) * PART]
        if part.max() >= vocab_size:
            at = i * PART + int(np.argmax(part >= vocab_size))
            raise ValueError(f"{path}: id {tokens[at]} at byte {at * tokens.itemsize} is not below vocab_size="
                             f"{vocab_size}; prepare the data set again")
        if zlib.crc32(part) != checksums[i]:
            raise ValueError(f"{path}: the {part.nbytes:,} bytes from byte {i * PART * tokens.itemsize:,} on are not "
                             f"what was prepared (their checksum differs): damaged or changed; prepare it again")


def check_length(n_tokens: int, block_size: int) -> None:
    if n_tokens < block_size + 1:
        raise ValueError(f"a split has {n_tokens} tokens, needs at least block_size + 1 = {block_size + 1}; "
                         "lower block_size or prepare more text")


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_starts(n_tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """Starts of one epoch's windows, shuffled; block_size apart from an offset that differs in each epoch.

    One window fewer than would fit leaves the offset a whole block to move in, so borders fall everywhere in time.
    Raw PCG64 output, because numpy keeps that the same in every version, but not permutation().
    """
    windows = max(1, n_tokens // block_size - 1)
    random = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    offset = int(random.random_raw()) % (n_tokens - windows * block_size)
    starts = np.argsort(random.random_raw(windows), kind="stable") * block_size + offset
    starts.setflags(write=False)
    return starts


def train_starts(n_tokens: int, block_size: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Where the windows of step's global batch start: int64 [batch_size], each + block_size + 1 <= n_tokens.

    Within an epoch no window comes twice. Raises ValueError if the split is shorter than one window.
    """
    check_length(n_tokens, block_size)
    windows = max(1, n_tokens // block_size - 1)
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size), windows)
    return np.array([epoch_starts(n_tokens, block_size, seed, int(epoch))[place]
                     for epoch, place in zip(epochs, places, strict=True)])


def val_starts(n_tokens: int, block_size: int, count: int) -> np.ndarray:
    """Starts of windows that do not overlap, int64: all of them if count is 0, else count spread over the split."""
    check_length(n_tokens, block_size)
    windows = (n_tokens - 1) // block_size
    chosen = min(count, windows) or windows
    return np.arange(chosen) * windows // chosen * block_size


def read_windows(tokens: np.ndarray, starts: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y), int64 [B, T]: the tokens of each window, and those one place further, which are to be predicted."""
    windows = torch.from_numpy(tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def batch(dataset: Dataset, step: int, batch_size: int, block_size: int, seed: int, rank: int = 0,
          world_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of step's global batch of batch_size sequences: x, y int64 [batch_size / world_size, T].

    OSError if the files have been written to since they were opened.
    """
    dataset.check_unchanged()
    if batch_size % world_size:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {world_size} devices that share it")
    starts = train_starts(len(dataset.train), block_size, batch_size, seed, step)
    share = batch_size // world_size
    return read_windows(dataset.train, starts[rank * share:(rank + 1) * share], block_size)
