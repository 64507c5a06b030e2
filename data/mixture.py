"""Several data sets in one run, as in dataset=code:0.7,books:0.3.

The source of row i of step s is a function of (seed, s, i), and so is the window that the row takes
from its source. So a mixture, like a single data set, has no state: resumes are exact, and any
number of ranks reads the same batch.
"""

import hashlib
import json
import re
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.command import shell_path
from data import SPLITS
from data.loader import Dataset

CYCLE = 1000  # rows after which each source has had exactly its share of them
PART = "[^,:]+:[0-9.]+"


@dataclass(frozen=True, eq=False)
class Mixture:
    """Data sets with one tokenizer, and how many of CYCLE rows come from each."""

    name: str  # as in dataset=
    sources: tuple[Dataset, ...]
    rows_of_cycle: tuple[int, ...]

    @property
    def place(self) -> str:
        return self.name

    @property
    def folder(self) -> Path:
        """Of the first source; the tokenizer there is that of all."""
        return self.sources[0].folder

    @property
    def fingerprint(self) -> dict[str, Any]:
        """As that of a Dataset. Another share of a source is another content, and there are answers
        if any source has some."""
        each = [source.fingerprint for source in self.sources]
        parts = [[p["content_sha256"] for p in each], self.rows_of_cycle]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        tokens = {split: sum(p["tokens"][split] for p in each) for split in SPLITS}
        own = {"name": self.name, "tokens": tokens, "content_sha256": digest}
        return dict(ChainMap(*each)) | own

    def rows(self, numbers: np.ndarray, block_size: int, seed: int) -> tuple[torch.Tensor, ...]:
        """The training windows with these numbers, which count from the first step on."""
        which, own = sources_of_rows(self.rows_of_cycle, seed, numbers)
        found = [self.sources[i].rows(own[which == i], block_size, seed) for i in np.unique(which)]
        # Now the rows of the first source come first, then those of the second, and so on.
        back = torch.from_numpy(np.argsort(np.argsort(which, kind="stable")))
        return tuple(torch.cat(parts)[back] for parts in zip(*found, strict=True))

    def check_unchanged(self) -> None:
        for source in self.sources:
            source.check_unchanged()

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each source, its share of the rows."""
        return tuple(rows / CYCLE for rows in self.rows_of_cycle)

    def mean(self, values: Sequence[float]) -> float:
        """The mean of one value for each source, weighted by the shares."""
        return float(np.dot(values, self.shares))


def sources_of_rows(
    rows_of_cycle: tuple[int, ...], seed: int, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each row number: the index of its source, and how many rows of that source come before.

    Rows come in cycles. In each cycle every source has its number of rows, in an order that is
    drawn anew, so what comes before a row is known without looking at earlier cycles.
    """
    cycles, places = np.divmod(numbers, CYCLE)
    which, before = np.empty_like(numbers), np.empty_like(numbers)
    for cycle in np.unique(cycles):
        here = cycles == cycle
        labels, earlier = one_cycle(rows_of_cycle, seed, int(cycle))
        which[here] = labels[places[here]]
        before[here] = cycle * np.take(rows_of_cycle, which[here]) + earlier[places[here]]
    return which, before


@lru_cache(maxsize=2)  # a batch takes from at most two cycles, unless it has more than CYCLE rows
def one_cycle(
    rows_of_cycle: tuple[int, ...], seed: int, cycle: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows of one cycle: the source, and how many rows of it the cycle has before."""
    labels = np.repeat(np.arange(len(rows_of_cycle)), rows_of_cycle)
    random = np.random.PCG64(np.random.SeedSequence([seed, cycle, CYCLE]))
    labels = labels[np.argsort(random.random_raw(CYCLE), kind="stable")]
    earlier = np.zeros(CYCLE, dtype=np.int64)
    for source, rows in enumerate(rows_of_cycle):
        earlier[labels == source] = np.arange(rows)
    return labels, earlier


def read_shares(dataset: str) -> dict[str, float] | None:
    """{"code": 0.7, "books": 0.3} of "code:0.7,books:0.3"; None if that names one data set alone.

    The shares need not sum to 1. ValueError if one is not a number above 0, or if a source comes
    twice.
    """
    if not re.fullmatch(f"{PART}(,{PART})+", dataset):
        return None
    shares: dict[str, float] = {}
    for part in dataset.split(","):
        name, _, share = part.partition(":")
        if name in shares:
            raise ValueError(f"dataset={dataset} has {name} twice: give it one share")
        try:
            shares[name] = float(share)
        except ValueError:
            shares[name] = 0.0
        if not shares[name] > 0:
            raise ValueError(
                f"dataset={dataset}: the share of {name} must be a number above 0, got {share!r}"
            )
    return shares


def share_rows(shares: dict[str, float]) -> tuple[int, ...]:
    """How many of CYCLE rows each source gets; the largest remainders are rounded up. ValueError
    if one would get none."""
    exact = np.array(list(shares.values())) / sum(shares.values()) * CYCLE
    rows = np.floor(exact).astype(int)
    rows[np.argsort(rows - exact, kind="stable")[: CYCLE - rows.sum()]] += 1
    if rows.min() < 1:
        name = list(shares)[int(rows.argmin())]
        raise ValueError(f"{name} would get less than one row of {CYCLE:,}: give it a larger share")
    return tuple(rows.tolist())


def mix(name: str, sources: Sequence[Dataset], shares: dict[str, float]) -> Mixture:
    """The mixture; ValueError if the data sets do not have one tokenizer."""
    first = sources[0]
    for other in sources[1:]:
        if other.meta["tokenizer_sha256"] != first.meta["tokenizer_sha256"]:
            raise ValueError(
                f"{other.folder} and {first.folder} have two tokenizers, and a mixture has one: "
                f"prepare the text of {other.name} again with "
                f"tokenizer={shell_path(first.folder)}"
            )
    return Mixture(name, tuple(sources), share_rows(shares))
