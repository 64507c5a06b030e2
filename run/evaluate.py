"""The loss of a model over windows of a data set. The windows are always the same.

Reading order: mean_loss, which training also calls; evaluate, for `sample.py eval=`; how the data
set is found that a model was trained on.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config.command import shell_path
from data import DATA
from data.loader import Dataset, open_dataset, val_starts
from data.mixture import read_shares
from model import IGNORED, Decoder
from run.machine import autocast, to_device
from run.ranks import ALONE, Ranks
from run.setup import dataset_folder, find_same_data
from run.signals import Interrupts
from text.tokenizer import load_tokenizer
from weights.open import LONGEST_WINDOW, refuse_longer_than_context

# If no batch is given, about this many logits are computed at once: 64 MB in fp32. A CPU gains
# nothing from more.
LOGITS_AT_ONCE = 2**24
WINDOW_TOKENS = 2**20  # tokens whose bytes are counted at once


@torch.no_grad()
def mean_loss(
    forward: Callable[..., Tensor],
    data: Dataset,
    split: str,
    starts: np.ndarray,
    block_size: int,
    batch: int,
    device: str,
    dtype: str,
    interrupts: Interrupts | None = None,
    ranks: Ranks = ALONE,
) -> float | None:
    """The mean of forward(x, y), in nats per token that counts, over the windows of a split that
    begin at `starts`. It is NaN or Inf if the model's loss is, and None if a signal came before the
    end.

    In each round every rank computes `batch` windows of its own.
    """
    total = seen = 0.0
    for i in range(0, len(starts), batch * ranks.size):
        if interrupts is not None and interrupts.agreed():
            return None
        own = starts[i + ranks.rank * batch :][:batch]
        # A rank that has no window left still calls forward, because fsdp needs all ranks there.
        x, y, *positions = data.windows(split, own if len(own) else starts[:1], block_size)
        # A compiled model has one graph for each shape, so rows that do not count fill the batch.
        missing = (0, 0, 0, batch - len(x))
        x, y = F.pad(x, missing), F.pad(y, missing, value=IGNORED)
        positions = [F.pad(places, missing) for places in positions]
        with autocast(device, dtype):
            loss = forward(*(to_device(part, device) for part in (x, y, *positions))).item()
        if len(own):
            windows = int((y != IGNORED).sum()) / block_size
            total, seen = total + loss * windows, seen + windows
    return ranks.sum(total) / ranks.sum(seen)


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on one split of a data set."""

    split: str
    loss: float  # nats per token
    bytes_per_token: float | None  # of the tokens that were predicted; None: see `withheld`
    windows: int
    block_size: int  # tokens of a window
    seconds: float
    withheld: str = ""  # why there are no bits per byte, in words
    of_answers: bool = False  # whether the tokens of answers alone count

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in a unit that does not depend on the tokenizer."""
        return self.bytes_per_token and self.loss / math.log(2) / self.bytes_per_token

    def __str__(self) -> str:
        tokens = self.windows * self.block_size
        answers = ", of which those of answers count" if self.of_answers else ""
        bits = f"withheld: {self.withheld}" if self.withheld else f"{self.bits_per_byte:.6f}"
        return (
            f"{self.split + ' loss':14}{self.loss:.6f} nats per token\n"
            f"perplexity    {self.perplexity:.4f}\n"
            f"bits per byte {bits}\n"
            f"tokens        {tokens:,} in {self.windows:,} windows of {self.block_size:,}"
            f"{answers}\n"
            f"time          {self.seconds:.2f} s, {tokens / self.seconds:,.0f} tokens/s"
        )


def evaluate(
    model: Decoder,
    data: Dataset,
    split: str,
    device: str,
    dtype: str,
    *,
    windows: int = 0,
    block_size: int = 0,
    batch: int = 0,
) -> Evaluation:
    """The loss over `windows` windows of `block_size` tokens, evenly spread over the split. `batch`
    windows are computed at once.

    windows=0 takes all windows. block_size=0 takes the model's context, but at most LONGEST_WINDOW.
    batch=0 takes as many windows as give LOGITS_AT_ONCE. ValueError if the split or the context is
    shorter than a window, FloatingPointError if the loss is not finite.
    """
    context = model.config.block_size
    refuse_longer_than_context(block_size, context)
    block_size = block_size or min(context, LONGEST_WINDOW)
    starts = val_starts(len(getattr(data, split)), block_size, windows)
    batch = batch or max(1, LOGITS_AT_ONCE // (block_size * model.config.vocab_size))
    batch = min(batch, len(starts))
    begin = time.perf_counter()
    loss = mean_loss(model.eval(), data, split, starts, block_size, batch, device, dtype)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss}: the model's weights are damaged, or they are too large for this "
            f"dtype (then use dtype=float32)"
        )
    seconds = time.perf_counter() - begin
    measured, withheld = bytes_per_predicted_token(data, split, starts, block_size)
    return Evaluation(
        split, loss, measured, len(starts), block_size, seconds, withheld, bool(data.answers)
    )


def bytes_per_predicted_token(
    data: Dataset, split: str, starts: np.ndarray, block_size: int
) -> tuple[float | None, str]:
    """How many bytes of text a token stands for, in the mean over the tokens that are predicted,
    and count, in the windows of `split` that begin at `starts`; and "".

    Bits per byte = loss in nats / ln 2 / this. If the tokens do not spell their text, or nothing
    here can say what they spell, it is None, and the text says why in words.
    """
    if lost := data.lost_share(split):
        return None, f"the tokenizer has lost {100 * lost:.3g}% of the {split} text"
    try:
        tokenizer = load_tokenizer(data.folder)
    except (ValueError, OSError) as error:  # for instance, a library that it needs is missing
        return None, str(error)
    ends = np.zeros(tokenizer.vocab_size, dtype=bool)  # ids that stand between documents
    ends[list(tokenizer.end_ids)] = True
    lengths = np.array([len(piece) for piece in tokenizer.pieces])
    at_start = lengths  # of the first token of a document, whose dummy prefix is no text
    if tokenizer.dummy_prefix:
        at_start = lengths - np.array([piece.startswith(b" ") for piece in tokenizer.pieces])
    textless = ends.copy()
    textless[list(tokenizer.special.values())] = True  # those of a chat template, for instance
    total = count = 0
    for some_starts in np.array_split(starts, -(-len(starts) * block_size // WINDOW_TOKENS)):
        before, predicted = (
            ids.numpy() for ids in data.windows(split, some_starts, block_size)[:2]
        )
        before, predicted = (ids[predicted != IGNORED] for ids in (before, predicted))
        if ((lengths[predicted] == 0) & ~textless[predicted]).any():
            return None, f"the tokenizer does not know all characters of the {split} text"
        total += int(np.where(ends[before], at_start[predicted], lengths[predicted]).sum())
        count += len(predicted)
    if not total:
        return None, "the tokens that are predicted stand for no text"
    return total / count, ""


def open_known_dataset(name: str, known: dict[str, Any], place: Path) -> Dataset:
    """The data set `name`, as train.py understands it. If `name` is '', it is the data set under
    data/ that the model in `place` was trained on, as its checkpoint describes it in `known`.

    ValueError if the data set has another tokenizer than the model, or, with name='', if its data
    have changed.
    """
    wanted = name or known.get("name", "")
    if wanted == "":
        raise ValueError(
            f"{place} does not say what it was trained on: name a prepared data set with "
            f"dataset=NAME"
        )
    if not name and isinstance(wanted, str) and read_shares(wanted):
        raise ValueError(
            f"{place} was trained on the mixture {wanted}: name one of its data sets with "
            f"dataset=NAME"
        )
    if not name and (not isinstance(wanted, str) or Path(wanted).name != wanted or wanted == ".."):
        raise ValueError(
            f"{place} says it was trained on {wanted!r:.80}, which is no name of a data set"
        )
    folder = dataset_folder(name) if name else find_same_data(known) or DATA / wanted
    if not name and not folder.exists():
        raise ValueError(
            f"the data set {wanted} that {place} was trained on is not under {DATA}: name where it "
            f"is with dataset=FOLDER"
        )
    if folder.exists() and not any((folder / n).exists() for n in ("meta.json", "train.bin")):
        raise ValueError(
            f"{folder} is not prepared: make a data set of it with python data/prepare.py "
            f"{shell_path(folder)} tokenizer={shell_path(place)} name=NAME, then dataset=NAME"
        )
    data = open_dataset(folder, doc_mask="doc_mask" in known)
    if data.meta["tokenizer_sha256"] != known["tokenizer_sha256"]:
        raise ValueError(
            f"{data.folder} was not made with the tokenizer of {place}: python data/prepare.py "
            f"TEXT tokenizer={shell_path(place)} name=NAME makes a data set with it"
        )
    if not name and data.meta["content_sha256"] != known.get("content_sha256"):
        raise ValueError(
            f"{data.folder} is not the data any more that {place} was trained on: dataset={wanted} "
            f"evaluates on it all the same"
        )
    return data
