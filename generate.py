"""Token ids from a model: generate, then the arithmetic that it is made of, each piece a function of tensors alone."""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Decoder, ModelConfig


@torch.inference_mode()  # on a generator it holds only while the generator runs, not in the caller between tokens
def generate(model: Decoder, ids: list[int], max_new_tokens: int, *, num_samples: int = 1, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int = 0,
             vocab_size: int | None = None, compile: bool = False) -> Iterator[list[int]]:
    """Continues `ids` (at least one) num_samples times at once; yields per new token one id for each sample.

    Ids from vocab_size up (the padding of a model's vocabulary; None = it has none) are never drawn. The same arguments
    give the same ids; torch's own random state is neither read nor changed. With `compile` the last digits are others.
    Leaves the model in eval mode. FloatingPointError if the logits are not finite.
    """
    device, block_size = model.embed.weight.device, model.config.block_size
    model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    window = unread = torch.tensor([ids], device=device)  # [B, T] what the model sees; B is 1 until the prompt is read
    seen = torch.zeros(num_samples, model.config.vocab_size, dtype=torch.bool, device=device)
    seen[:, ids] = True
    size = min(block_size, len(ids) + max_new_tokens)
    size = 1 << (size - 1).bit_length() if compile else size  # of few sizes, since each is compiled for
    cache = KVCache(model.config, 1, size, device, cache_dtype(model))
    for _ in range(max_new_tokens):
        start = window_start(window.shape[1], block_size)
        if start:
            window = unread = window[:, start:]
            cache.length = 0
        step, held = (compiled_step(device.type), FixedCache(cache)) if compile and cache.length else (next_ids, cache)
        uniform = torch.rand(num_samples, 1, generator=generator, device=device)
        new = step(model, unread, held, uniform, seen, repetition_penalty, vocab_size, temperature, top_k, top_p, min_p)
        *new_ids, finite = new.tolist()  # the one wait for the device
        if not finite:
            raise FloatingPointError("the model's logits hold NaN or Inf: its weights are damaged, or too large for "
                                     "this dtype (then dtype=float32 helps)")
        cache.length, unread = window.shape[1], new[:-1, None].clone()  # a CUDA graph writes there again
        repeat_cache(cache, num_samples)
        seen.scatter_(1, unread, True)
        window = torch.cat((window.expand(num_samples, -1), unread), dim=1)
        yield new_ids


class KVCache:
    """Preallocated keys and values of one batch of sequences, for each layer [B, K, S, D]: `length` tokens are filled,
    of at most `size`. One tensor of all layers would be copied whole by compiled code that writes into a part."""

    def __init__(self, config: ModelConfig, batch: int, size: int, device, dtype=torch.float32):
        shape = (batch, config.kv_heads, size, config.head_size)
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
                                  for _ in range(2))
        self.length = 0

    def positions(self, T: int) -> slice:
        """Of the next T tokens."""
        return slice(self.length, self.length + T)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Writes k and v [B, K, T, D] behind what is filled. Returns views of all of that layer, [B, K, length + T, D],
        and which of these each new token sees, [T, length + T] bool, where that is not all, or all up to itself."""
        start, end = self.length, self.length + k.shape[2]
        self.keys[layer][:, :, start:end], self.values[layer][:, :, start:end] = k, v
        mask = k.new_ones(end - start, end, dtype=torch.bool).tril(start) if 0 < start < end - 1 else None
        if layer == len(self.keys) - 1:  # all layers have them now
            self.length = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end], mask


class FixedCache(KVCache):
    """A cache whose length is data: the step of a token is the same operations on the same memory at every length.

    All that is preallocated is read, with a mask over what is not filled.
    """

    def __init__(self, cache: KVCache):
        self.keys, self.values = cache.keys, cache.values
        self.length = torch.full((1,), cache.length, device=cache.keys[0].device)
        for memory in self.keys + self.values:  # a CUDA graph need not copy what stays in its place
            torch._dynamo.mark_static_address(memory)

    def positions(self, T: int) -> Tensor:
        return self.length

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for memory, new in ((self.keys[layer], k), (self.values[layer], v)):
            memory.index_copy_(2, self.length, new.to(memory.dtype))
        filled = torch.arange(memory.shape[2], device=k.device) <= self.length
        return self.keys[layer], self.values[layer], filled[None]


def next_ids(model: Decoder, ids: Tensor, cache: KVCache, uniform: Tensor, seen: Tensor, repetition_penalty: float,
             vocab_size: int | None, temperature: float, *filters: float) -> Tensor:
    """Reads ids [B or 1, T] behind what the cache has; what follows each, [B], and then whether the logits are finite.

    `uniform` [B, 1] decides the draw. With nothing to wait for in it, it is what a token costs, and can be compiled.
    """
    logits = model.logits(model.features(ids, cache)[:, -1]).float()
    finite = torch.isfinite(logits.sum())
    logits = penalise(logits.expand(len(seen), -1), seen, repetition_penalty)[:, :vocab_size]
    if temperature == 0:
        new = logits.argmax(-1)
    else:
        new = draw(logits_to_probabilities(logits, temperature, *filters), uniform)
    return torch.cat((new, finite[None].long()))


@functools.cache
def compiled_step(device: str) -> Callable[..., Tensor]:
    """next_ids compiled, on CUDA as a graph that is launched as one."""
    return torch.compile(next_ids, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)


def window_start(length: int, block_size: int) -> int:
    """The index of the first of `length` tokens that the model still sees.

    Everything, up to block_size. Then the oldest half of the window is dropped, and what remains is read again from
    position 0, so the model always sees a context as in training; the next block_size / 2 tokens cost one step each.
    """
    half = max(1, block_size // 2)
    return -(-max(0, length - block_size) // half) * half


def cache_dtype(model: Decoder) -> torch.dtype:
    """The dtype of keys and values: that of the active autocast, else of the model's weights. On a CPU it is float32,
    in which PyTorch's attention of one token takes a third of the time of bfloat16's, or less."""
    weight = model.embed.weight
    if torch.is_autocast_enabled(weight.device.type) and weight.device.type != "cpu":
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def repeat_cache(cache: KVCache, batch: int) -> None:
    """Repeats the cache of one sequence for `batch` of them; a wide one stays as it is."""
    if len(cache.keys[0]) != batch:
        cache.keys, cache.values = ([t.repeat(batch, 1, 1, 1) for t in layers] for layers in (cache.keys, cache.values))


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens that were `seen` [B, V] bool less likely if penalty > 1. Keskar et al. 2019, arXiv 1909.05858, 4.1.

    As all implementations but unlike the paper, which divides always, negative logits [B, V] are multiplied.
    """
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def logits_to_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                            min_p: float = 0.0) -> Tensor:
    """fp32 logits [B, V] -> what to draw from [B, V]. Each step works on what the one before has left, renormalised.

    1. temperature divides the logits; 0 is its limit, the likeliest token for certain.
    2. top_k keeps the k likeliest; 0 = all, and so does a k above V.
    3. top_p keeps the fewest, likeliest first, that reach p together. Holtzman et al. 2019, arXiv 1904.09751.
    4. min_p keeps those of at least min_p times the likeliest's probability. Nguyen et al. 2024, arXiv 2407.01082.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    shifted = logits - logits.amax(-1, keepdim=True)  # at most 0, so that no temperature overflows
    probabilities = (shifted / max(temperature, 1e-6)).softmax(-1)
    if 0 < top_k < logits.shape[-1]:
        kept, where = probabilities.topk(top_k)
        probabilities = normalised(torch.zeros_like(probabilities).scatter(-1, where, kept))
    if top_p < 1:
        ordered, where = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # of all likelier ones; exactly 0 for the first, which always stays
        probabilities = normalised(probabilities.scatter(-1, where, ordered.masked_fill(before >= top_p, 0)))
    if min_p > 0:
        least = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = normalised(probabilities.masked_fill(probabilities < least, 0))
    return probabilities


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """An id for each row [B, V]: the first at which the running sum is above a number [B, 1] from [0, 1).

    torch.multinomial draws a number for every entry, one after the other: a third of the time of a small model's step.
    """
    wide = torch.float32 if probabilities.device.type == "mps" else torch.float64  # which MPS does not have
    sums = probabilities.cumsum(-1, dtype=wide)
    below = sums[:, -1:] * (1 - 2**-23)  # however it is rounded, the last sum stays above
    return torch.searchsorted(sums, uniform * below, right=True).flatten()
