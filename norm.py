"""Every norm, and every way to compute it.

The contract, which tests/test_norm.py checks clause by clause:
  - statistics and gain in fp32 (float64 stays float64), ONE cast at the end, output dtype == input dtype;
  - eps stands inside the root and is always given;
  - autocast is off inside, so that no device policy changes the precision of one norm and not of another;
  - initialisation draws no random numbers: the same seed gives the same other weights for every norm.

`eager` is the readable reference. `fused` is PyTorch's own kernel, `compile` the eager function through torch.compile
(and simply inlined where the whole model is compiled). Each is tested against float64.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rmsnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension. Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4.

    x [..., C], gain [C] -> [..., C] in x's dtype. LLaMA and Hugging Face cast to x's dtype before they multiply by the
    gain; here the gain is multiplied in fp32 and rounding happens once. In fp32 the two are the same.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * gain).to(x.dtype)


def layernorm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * gain + bias over the last dimension. Ba et al. 2016, arXiv 1607.06450.

    x [..., C], gain and bias [C] -> [..., C] in x's dtype. The variance is the biased one (divided by C).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * scale * gain + bias).to(x.dtype)


def fused_rmsnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """F.rms_norm. The gain is rounded to x's dtype: mixed dtypes make PyTorch fall back to a chain of small kernels."""
    return F.rms_norm(x, gain.shape, gain.to(x.dtype), eps)


def fused_layernorm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.layer_norm, with gain and bias rounded to x's dtype for the same reason."""
    return F.layer_norm(x, gain.shape, gain.to(x.dtype), bias.to(x.dtype), eps)


EAGER = {"rmsnorm": rmsnorm, "layernorm": layernorm}
FUSED = {"rmsnorm": fused_rmsnorm, "layernorm": fused_layernorm}


@cache
def norm_function(kind: str, impl: str):
    """The function that computes `kind` the way `impl` says: eager, fused or compile."""
    if impl == "eager":
        return EAGER[kind]
    if impl == "fused":
        return FUSED[kind]
    # A plain function, not a method of each instance: one set of guards, so no recompilation per layer.
    return torch.compile(EAGER[kind])


class Norm(nn.Module):
    """A norm over the last dimension of size `width`, with a gain (ones) and, for LayerNorm, a bias (zeros)."""

    def __init__(self, kind: str, width: int, eps: float, impl: str = "eager"):
        super().__init__()
        if kind not in EAGER:
            raise ValueError(f"norm must be one of {', '.join(EAGER)}, got {kind!r}")
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layernorm" else None
        self.kind, self.eps, self.function = kind, eps, norm_function(kind, impl)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if self.bias is None:
                return self.function(x, self.gain, self.eps)
            return self.function(x, self.gain, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.gain.numel()}, eps={self.eps}"
