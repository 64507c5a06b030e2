"""LoRA (Hu et al. 2021, arXiv 2106.09685): the weights of a model stay as they are, and small
matrices beside them, the adapters, learn.

Reading order: a layer with an adapter; adapters for a whole model; adapters merged into weights.
"""

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import UNGATED, Decoder, ModelConfig

PROJECTIONS = {"attn": ("q", "k", "v", "out"), "ffn": ("gate", "up", "down")}


class LoRALinear(nn.Module):
    """x [..., in] -> W x + scale B A x [..., out]. The weight W [out, in] is frozen; A [rank, in]
    starts random and B [out, rank] zero, so at its start the layer is the one that it replaces.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        outputs, inputs = linear.weight.shape
        device = linear.weight.device
        self.weight, self.scale = nn.Parameter(linear.weight.detach(), requires_grad=False), scale
        self.lora_a = nn.Parameter(torch.empty(rank, inputs, device=device))
        self.lora_b = nn.Parameter(torch.empty(outputs, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        adapted = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight) + self.scale * adapted


def add_adapters(model: Decoder, rank: int, alpha: float, seed: int) -> None:
    """Freezes the model and puts an adapter on each projection of each Block, in place."""
    model.requires_grad_(False)
    for block in model.blocks:
        for part, roles in PROJECTIONS.items():
            layers = getattr(block, part)
            for role in roles:
                linear = getattr(layers, role)
                if linear is not None:  # a feed-forward may have no gate
                    setattr(layers, role, LoRALinear(linear, rank, alpha / rank))
    draw_adapters(model, seed)


@torch.no_grad()
def draw_adapters(model: Decoder, seed: int) -> None:
    """Draws each A as nn.Linear draws its weights, from a generator that is seeded by `seed` and
    the layer's name, and makes each B zero.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            bound = 1 / math.sqrt(module.lora_a.shape[1])
            drawn = torch.empty(module.lora_a.shape).uniform_(-bound, bound, generator=generator)
            module.lora_a.copy_(drawn)
            module.lora_b.zero_()


def merge_adapters(
    weights: dict[str, Tensor], adapters: dict[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The weights with W + scale B A in the place of each W that has an adapter. ValueError if the
    adapters are not for these weights.
    """
    merged = dict(weights)
    for name in sorted(adapters):
        layer, dot, kind = name.rpartition(".")
        a, b = adapters.get(f"{layer}.lora_a"), adapters.get(f"{layer}.lora_b")
        w = weights.get(f"{layer}.weight")
        fits = (
            bool(dot)
            and kind in ("lora_a", "lora_b")
            and None not in (a, b, w)
            and a.ndim == b.ndim == w.ndim == 2
            and (b.shape[0], a.shape[1]) == w.shape
            and b.shape[1] == a.shape[0]
        )
        if not fits:
            raise ValueError(f"the adapter {name} does not fit the weights it is for")
        if kind == "lora_a":  # once for each pair
            merged[f"{layer}.weight"] = w + scale * (b @ a)
    return merged


def adapter_count(config: ModelConfig, rank: int) -> int:
    """Parameters of all adapters of a model."""
    C, F = config.n_embd, config.hidden_size
    Q, K = config.n_head * config.head_size, config.kv_heads * config.head_size
    feed_forward = (2 if config.ffn in UNGATED else 3) * (C + F)
    return config.n_layer * rank * (2 * (C + Q) + 2 * (C + K) + feed_forward)
