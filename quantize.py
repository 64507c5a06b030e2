"""Matrices for inference: rounded once to the dtype of the products, packed for a CPU, to int8 with a scale for each
output, or with the gains of the norms in them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device import processor
from model import Decoder
from norm import Norm

FEW = 8  # rows of x up to which torch's int8 kernel is the fastest way: it reads the weights anew for every few rows
ROWS = 4  # of x, that packed matrices are in the best order for: a few samples at once
SMALL, SMALL_ON_INTEL = 2**17, 2**22  # weights: in float32, fewer are not packed
BLOCK = 2**20  # weights that a CPU converts at once: they are still in its cache when they are multiplied


class Int8Linear(nn.Module):
    """x [..., in] -> x W^T [..., out], W [out, in] rounded to int8 times one scale for each output channel.

    Symmetric and weight-only (W8A16): the products are those of x in its own dtype, or autocast's. Where each weight is
    read for little work, as in sampling, less is read; where there is much work, converting W costs a little.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        largest = weight.detach().abs().amax(1, keepdim=True)  # [out, 1]
        # In bfloat16, as the kernel wants it: rounding moves it by at most 1/256, so 127 is still the largest multiple.
        scale = (largest / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        self.register_buffer("weight", (weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.flatten())

    def forward(self, x: Tensor) -> Tensor:
        device, width = x.device.type, x.shape[-1]
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        rows = x.reshape(-1, width)
        # The kernel reads 16 channels at a time, past the end of a row where they do not come out even.
        if device == "cpu" and x.dtype == torch.bfloat16 and len(rows) <= FEW and width % 16 == 0:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            parts = self.weight.split(max(1, BLOCK // width)) if device == "cpu" else (self.weight,)
            y = torch.cat([F.linear(rows, part.to(x.dtype)) for part in parts], dim=-1) * self.scale
        return y.view(*x.shape[:-1], -1)


def quantize_int8(model: Decoder) -> Decoder:
    """Every matrix of the Blocks and the head to int8, in place. Embedding and norms stay as they are; a tied head is
    rounded, too, as a matrix of its own."""
    return with_matrices(model, Int8Linear)


def round_matrices(model: Decoder, dtype: torch.dtype) -> Decoder:
    """The same matrices to `dtype`, in place: what autocast does with them in each call, so under it no bit changes.

    In inference mode it does not keep what it has rounded: each new token would cost a pass over all weights in fp32.
    """
    return with_matrices(model, lambda weight: plain_linear(weight.detach().to(dtype)))


def plain_linear(weight: Tensor) -> nn.Linear:
    """A linear layer that has this weight, not a copy."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


class PackedLinear(nn.Module):
    """x [..., in] -> x W^T [..., out] on a CPU, W in the order of memory that oneDNN reads fastest for few rows of x.

    The same products as nn.Linear's in `dtype`, in another order of summation.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous(), ROWS)
        self.register_buffer("weight", packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, None, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether PyTorch packs on this CPU: with oneDNN on x86, bfloat16 only where the hardware has it."""
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    has_dtype = dtype == torch.float32 or torch.cpu._is_avx512_bf16_supported()
    return x86 and has_dtype and torch.backends.mkldnn.is_available()


def pack_matrices(model: Decoder, dtype: torch.dtype) -> Decoder:
    """The same matrices in `dtype`, in place, for a CPU that can_pack it. Small ones of float32 stay as they are: they
    are read from the cache, where MKL is faster; for one row it is on Intel's processors up to larger ones (LOG.md)."""
    small = SMALL_ON_INTEL if "Intel" in processor("cpu") else SMALL

    def linear(weight: Tensor) -> nn.Module:
        if dtype == torch.float32 and weight.numel() < small:
            return plain_linear(weight.detach())
        return PackedLinear(weight, dtype)

    return with_matrices(model, linear)


def with_matrices(model: Decoder, make: Callable[[Tensor], nn.Module]) -> Decoder:
    """Puts make(weight) in the place of every linear layer, one after the other, and of the head."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(child.weight))
    if model.head is None:
        model.head = make(model.embed.weight)
    return model


@torch.no_grad()
def fold_norms(model: Decoder) -> Decoder:
    """Moves the gains of an RMSNorm model into the matrices that follow, in place. FlashNorm, arXiv 2407.09577.

    For inference: the same function, up to rounding, with less to compute. ValueError where no matrix follows a norm,
    or a bias would be needed. The final norm keeps its gain where the head is tied: its matrix is the embedding too.
    """
    config = model.config
    if config.norm not in ("rmsnorm", "rmsnorm1p") or config.norm_pos != "pre":
        raise ValueError(f"only rmsnorm and rmsnorm1p with norm_pos=pre can be folded, this model has {config.norm} "
                         f"with {config.norm_pos}")
    after: list[tuple[nn.Module, str, tuple[nn.Linear, ...]]] = []
    if model.head is not None:
        after.append((model, "norm", (model.head,)))
    for block in model.blocks:
        after.append((block, "attn_norm", (block.attn.q, block.attn.k, block.attn.v)))
        after.append((block, "ffn_norm", tuple(m for m in (block.ffn.gate, block.ffn.up) if m is not None)))
    for parent, name, matrices in after:
        gain = getattr(parent, name).gain + (1 if config.norm == "rmsnorm1p" else 0)
        for matrix in matrices:
            matrix.weight *= gain  # [out, C] * [C]
        setattr(parent, name, Norm("rmsnorm_noparam", config.n_embd, config.norm_eps, config.norm_impl))
    return model
