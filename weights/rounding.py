"""Quantisation simulated: the matrices of a model's Blocks are rounded to few values, but stored
and multiplied as before. It tells what the rounding costs in loss, and nothing about speed or
memory; int8 that saves memory is in weights/quantize.py.

Reading order: simulate_quantization; KINDS; the two ways to round.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from model import Decoder


@torch.no_grad()
def simulate_quantization(model: Decoder, kind: str) -> Decoder:
    """Rounds the matrices of attention and feed-forward as KINDS[kind] says, in place, and for w4a4
    also what they multiply.

    Embedding, head and norms stay as they are, as in GPTQ and AWQ, so what is seen is the doing of
    the Blocks. Products of queries and keys, and of attention weights and values, are not rounded.
    ValueError for a kind that there is not.
    """
    if kind not in KINDS:
        raise ValueError(f"a kind of quantisation must be one of {', '.join(KINDS)}, got {kind!r}")
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(KINDS[kind](module.weight))
            if kind == "w4a4":
                module.register_forward_pre_hook(round_input)
    return model


def round_input(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """What a matrix multiplies, [..., in], with a scale for each token."""
    (x,) = inputs
    return round_to_grid(x.float(), bits=4).to(x.dtype)


def round_to_grid(x: Tensor, bits: int, group: int = 0) -> Tensor:
    """Each element of x [..., C] rounded to the nearest multiple of a scale. The largest |element|
    becomes 2^(bits - 1) - 1 times the scale, so the grid is symmetric: 15 values with 4 bits.

    There is a scale for each row, or for each `group` neighbours in it, of which the last group may
    be shorter.
    """
    rounded = []
    for part in x.split(group or x.shape[-1], dim=-1):
        largest = part.abs().amax(-1, keepdim=True)
        scale = (largest / (2 ** (bits - 1) - 1)).clamp(min=torch.finfo(x.dtype).tiny)
        rounded.append((part / scale).round() * scale)
    return torch.cat(rounded, dim=-1)


def round_to_ternary(weight: Tensor) -> Tensor:
    """Each element rounded to the nearest of -s, 0 and s, where s is the mean of |weight| over the
    whole matrix: the weights of BitNet b1.58, Ma et al. 2024, arXiv 2402.17764. BitNet trains with
    this rounding; here it comes after the training.
    """
    scale = weight.abs().mean().clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / scale).round().clamp(-1, 1) * scale


# How the weights [out, in] of a matrix are rounded; w4a4 also rounds what they multiply.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": partial(round_to_grid, bits=8),
    "int4": partial(round_to_grid, bits=4),
    "int4g32": partial(round_to_grid, bits=4, group=32),
    "w4a4": partial(round_to_grid, bits=4),
    "ternary": round_to_ternary,
}
