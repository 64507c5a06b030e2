"""The loss of a model over windows of a data set that are always the same, and what it says about the model."""

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

from data.loader import DATA, Dataset, open_dataset, read_windows, val_starts
from device import autocast, to_device
from model import Decoder
from world import ALONE, World

LONGEST = 2048  # tokens of a window unless more are asked for: some models could read 100,000 at once, few machines
LOGITS = 2**24  # computed at once unless the batch is given: 64 MB in fp32, and with more a CPU is no faster


@torch.no_grad()
def mean_loss(forward: Callable[[Tensor, Tensor], Tensor], tokens: np.ndarray, starts: np.ndarray, block_size: int,
              batch: int, device: str, dtype: str, stop: Callable[[], bool] = lambda: False,
              world: World = ALONE) -> float | None:
    """Mean loss (nats per token) of forward(x, y) over the windows of `tokens` that begin at `starts`, `batch` at once
    on each rank, which take turns.

    NaN or Inf where the model gives it; None if stop() became true in between.
    """
    total = 0.0
    for i in range(0, len(starts), batch * world.size):
        if stop():
            return None
        some = starts[i + world.rank * batch:][:batch]
        x, y = read_windows(tokens, some if len(some) else starts[:1], block_size)  # no rank may be missing in forward
        short = (0, 0, 0, batch - len(x))  # always one shape, so a compiled model has one graph
        x, y = F.pad(x, short), F.pad(y, short, value=-100)  # -100: not counted in the loss
        with autocast(device, dtype):
            loss = forward(to_device(x, device), to_device(y, device)).item()
        total += loss * len(some) if len(some) else 0.0
    return world.sum(total) / len(starts)


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of one split of a data set."""

    split: str
    loss: float  # nats per token
    bytes_per_token: float
    windows: int
    block_size: int  # tokens of a window
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers."""
        return self.loss / math.log(2) / self.bytes_per_token

    def __str__(self) -> str:
        tokens = self.windows * self.block_size
        return (f"{self.split + ' loss':14}{self.loss:.6f} nats per token\n"
                f"perplexity    {self.perplexity:.4f}\n"
                f"bits per byte {self.bits_per_byte:.6f}\n"
                f"tokens        {tokens:,} in {self.windows:,} windows of {self.block_size:,}\n"
                f"time          {self.seconds:.2f} s, {tokens / self.seconds:,.0f} tokens/s")


def evaluate(model: Decoder, data: Dataset, split: str, device: str, dtype: str, *, windows: int = 0,
             block_size: int = 0, batch: int = 0) -> Evaluation:
    """The loss over the split's windows, or `windows` of them evenly spread, of block_size tokens, `batch` at once.

    0 = all of the windows; the model's context, up to LONGEST; as many at once as give LOGITS. ValueError if the split
    or the context is too short, FloatingPointError if the loss is not finite.
    """
    context = model.config.block_size
    if block_size > context:
        raise ValueError(f"block_size={block_size:,} is more than the {context:,} tokens of this model's context")
    block_size = block_size or min(context, LONGEST)
    tokens = getattr(data, split)
    starts = val_starts(len(tokens), block_size, windows)
    most = max(1, LOGITS // (block_size * model.config.vocab_size))
    begin = time.perf_counter()
    loss = mean_loss(model.eval(), tokens, starts, block_size, min(batch or most, len(starts)), device, dtype)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}: the model's weights are damaged, or too large for this dtype "
                                 f"(then dtype=float32 helps)")
    return Evaluation(split, loss, data.bytes_per_token(split), len(starts), block_size, time.perf_counter() - begin)


def open_known(name: str, known: dict[str, Any], place: Path) -> Dataset:
    """The data set data/<name>; '' = the one that the model was trained on, by what is `known` of that.

    ValueError if its ids mean something else to the model in `place`, or it is not the same data any more.
    """
    wanted = name or known.get("name", "")
    if wanted == "":
        raise ValueError(f"{place} does not say what it was trained on: name a prepared data set with dataset=NAME")
    if not name and (not isinstance(wanted, str) or Path(wanted).name != wanted or wanted == ".."):
        raise ValueError(f"{place} says it was trained on {wanted!r:.80}, which is no name of a data set")
    data = open_dataset(Path(name) if "/" in name else DATA / wanted)
    if data.meta["tokenizer_sha256"] != known["tokenizer_sha256"]:
        raise ValueError(f"{data.folder} was not made with the tokenizer of {place}: python data/prepare.py TEXT "
                         f"tokenizer={place} name=NAME makes one that is")
    if not name and data.meta["content_sha256"] != known.get("content_sha256"):
        raise ValueError(f"{data.folder} is not the data any more that {place} was trained on: dataset={wanted} "
                         f"evaluates on it all the same")
    return data
