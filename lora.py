"""LoRA: the weights stay as they are, small matrices beside them learn. Hu et al. 2021, arXiv 2106.09685."""

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import UNGATED, Decoder, ModelConfig

PROJECTIONS = {"attn": ("q", "k", "v", "out"), "ffn": ("gate", "up", "down")}


class LoRALinear(nn.Module):
    """W x + scale B A x: weight W [out, in] is frozen, A [rank, in] is random and B [out, rank] zero, so at its start
    it is exactly the layer that it replaces."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.weight, self.scale = nn.Parameter(linear.weight.detach(), requires_grad=False), scale
        self.lora_a = nn.Parameter(torch.empty(rank, inputs, device=linear.weight.device))
        self.lora_b = nn.Parameter(torch.empty(outputs, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_adapters(model: Decoder, rank: int, alpha: float, seed: int) -> None:
    """Freezes the model and puts an adapter on each projection of each Block, in place."""
    model.requires_grad_(False)
    for block in model.blocks:
        for part, roles in PROJECTIONS.items():
            for role in roles:
                linear = getattr(getattr(block, part), role)
                if linear is None:  # a feed-forward without a gate
                    continue
                setattr(getattr(block, part), role, LoRALinear(linear, rank, alpha / rank))
    draw_adapters(model, seed)


@torch.no_grad()
def draw_adapters(model: Decoder, seed: int) -> None:
    """Draws each A as nn.Linear draws its weights, from a generator seeded by its name, and makes each B zero."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            bound, generator = 1 / math.sqrt(module.lora_a.shape[1]), torch.Generator()
            generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            module.lora_a.copy_(torch.empty(module.lora_a.shape).uniform_(-bound, bound, generator=generator))
            module.lora_b.zero_()


def merged(weights: dict[str, Tensor], adapters: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights with their adapters added in. ValueError if these are not for those."""
    result = dict(weights)
    for name in sorted(adapters):
        stem, dot, kind = name.rpartition(".")
        a, b, w = adapters.get(f"{stem}.lora_a"), adapters.get(f"{stem}.lora_b"), weights.get(f"{stem}.weight")
        if dot and kind in ("lora_a", "lora_b") and None not in (a, b, w) and b.ndim == a.ndim == w.ndim == 2 and (
                (b.shape[0], a.shape[1]) == w.shape and b.shape[1] == a.shape[0]):
            if kind == "lora_a":
                result[f"{stem}.weight"] = w + scale * (b @ a)
        else:
            raise ValueError(f"the adapter {name} does not fit the weights it is for")
    return result


def adapter_count(config: ModelConfig, rank: int) -> int:
    """Parameters of the adapters of a model."""
    C, F = config.n_embd, config.hidden_size
    Q, K = config.n_head * config.head_size, config.kv_heads * config.head_size
    feed_forward = (2 if config.ffn in UNGATED else 3) * (C + F)
    return config.n_layer * rank * (2 * (C + Q) + 2 * (C + K) + feed_forward)
