"""Every norm, and every way to compute it.

The contract, which tests/test_norm.py checks clause by clause:
  - statistics and gain in fp32 (float64 stays float64), ONE cast at the end, output dtype == input dtype;
  - eps stands inside the root and is always given;
  - autocast is off inside, so that no device policy changes the precision of one norm and not of another;
  - initialisation draws no random numbers: the same seed gives the same other weights for every norm.

A norm is one function of (x, *weights, *constants). `eager` is the readable reference and the specification; `fused` is
PyTorch's own kernel, where it has one; `compile` the eager function through torch.compile (and simply inlined where the
whole model is compiled); `triton` the CUDA kernel in norm_triton.py. Each is tested against float64.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from inspect import getfullargspec

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def widen(x: Tensor) -> Tensor:
    """fp32, or float64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layernorm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * gain + bias: re-centres and re-scales. Ba et al. 2016, arXiv 1607.06450.

    x [..., C], gain and bias [C] -> [..., C] in x's dtype. The variance is the biased one (divided by C).
    """
    wide = widen(x)
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * scale * gain + bias).to(x.dtype)


def layernorm_nobias(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * gain: LayerNorm without its bias, as in nanoGPT's bias=False and ModernBERT."""
    wide = widen(x)
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


def rmsnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain: re-scales only; LLaMA's norm. Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4.

    x [..., C], gain [C] -> [..., C] in x's dtype. LLaMA and Hugging Face cast to x's dtype before they multiply by the
    gain; here the gain is multiplied in fp32 and rounding happens once. In fp32 the two are the same.
    """
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


def rmsnorm_noparam(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps): RMSNorm without a gain, which the next matrix can absorb. As in modded-nanogpt."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rmsnorm1p(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (1 + gain): RMSNorm whose gain starts at zero. Gemma, arXiv 2403.08295.

    1 + gain is formed in fp32: in bfloat16 it would lose the small gains.
    """
    return rmsnorm(x, 1 + gain, eps)


def prmsnorm(x: Tensor, gain: Tensor, eps: float, p: float) -> Tensor:
    """x / sqrt(mean(x[:k]^2) + eps) * gain, k = ceil(p C): the first k judge the scale. arXiv 1910.07467, sec. 4.

    The authors' code rounds k down where the paper rounds up; here it is the paper.
    """
    wide = widen(x)
    some = wide[..., :math.ceil(p * x.shape[-1])]
    return (wide * torch.rsqrt(some.square().mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


def dyt(x: Tensor, gain: Tensor, alpha: Tensor) -> Tensor:
    """tanh(alpha x) * gain: squashes each element by itself, no statistics. Zhu et al. 2025, arXiv 2503.10622.

    alpha [1] is learned. No bias, as its authors leave it out in LLaMA; Decoder adds their scale of the embedding.
    """
    return (torch.tanh(alpha * widen(x)) * gain).to(x.dtype)


def derf(x: Tensor, gain: Tensor, bias: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """erf(alpha x + shift) * gain + bias: as dyt, with the error function. Chen et al. 2025, arXiv 2512.10938."""
    return (torch.erf(alpha * widen(x) + shift) * gain + bias).to(x.dtype)


def none(x: Tensor) -> Tensor:
    """x: no norm at all; the control that tells what a norm costs and whether it is needed."""
    return x


def fused_rmsnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """F.rms_norm. The gain is rounded to x's dtype: mixed dtypes make PyTorch fall back to a chain of small kernels."""
    return F.rms_norm(x, gain.shape, gain.to(x.dtype), eps)


def fused_rmsnorm1p(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """F.rms_norm with the gain that is added to one in fp32 first."""
    return fused_rmsnorm(x, 1 + gain, eps)


def fused_rmsnorm_noparam(x: Tensor, eps: float) -> Tensor:
    """F.rms_norm without a weight."""
    return F.rms_norm(x, x.shape[-1:], None, eps)


def fused_layernorm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.layer_norm, with gain and bias rounded to x's dtype for the same reason."""
    return F.layer_norm(x, gain.shape, gain.to(x.dtype), bias.to(x.dtype), eps)


def fused_layernorm_nobias(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """F.layer_norm without a bias."""
    return F.layer_norm(x, gain.shape, gain.to(x.dtype), None, eps)


EAGER: dict[str, Callable[..., Tensor]] = {
    "layernorm": layernorm, "layernorm_nobias": layernorm_nobias, "rmsnorm": rmsnorm,
    "rmsnorm_noparam": rmsnorm_noparam, "rmsnorm1p": rmsnorm1p, "prmsnorm": prmsnorm, "dyt": dyt, "derf": derf,
    "none": none}
FUSED: dict[str, Callable[..., Tensor]] = {
    "layernorm": fused_layernorm, "layernorm_nobias": fused_layernorm_nobias, "rmsnorm": fused_rmsnorm,
    "rmsnorm_noparam": fused_rmsnorm_noparam, "rmsnorm1p": fused_rmsnorm1p, "none": none}
TRITON = ("rmsnorm", "none")
IMPLEMENTED = {"eager": tuple(EAGER), "fused": tuple(FUSED), "compile": tuple(EAGER), "triton": TRITON}
PARAMETERS: dict[str, dict[str, float]] = {  # name -> initial value, in the order in which the function takes them
    "layernorm": {"gain": 1.0, "bias": 0.0}, "layernorm_nobias": {"gain": 1.0}, "rmsnorm": {"gain": 1.0},
    "rmsnorm_noparam": {}, "rmsnorm1p": {"gain": 0.0}, "prmsnorm": {"gain": 1.0}, "dyt": {"gain": 1.0, "alpha": 0.5},
    "derf": {"gain": 1.0, "bias": 0.0, "alpha": 0.5, "shift": 0.0}, "none": {}}
NORM_LEAVES = ("gain", "bias", "alpha", "shift")  # last parts of their parameters' names
SCALARS = ("alpha", "shift")  # of all parameters these have one element, the others one per channel
LARGE, ROWS = 2**22, 8  # bytes from which on LargeRMSNorm wins, and the rows that its backward has side by side
ELEMENTWISE = ("dyt", "derf", "none")  # without statistics, so without eps; the stream's scale passes through


def check_entries() -> None:
    """Each norm is entered everywhere alike: parameters in another order than the arguments would train in silence."""
    for kind in EAGER | PARAMETERS:
        function, parameters = EAGER.get(kind, lambda: None), [*PARAMETERS.get(kind, "?")]
        takes = getfullargspec(function).args[1:]
        alike = takes == [*parameters, "eps", "p"][:len(takes)] and {*parameters} <= {*NORM_LEAVES}
        assert alike and function.__doc__, (
            f"norm {kind}: EAGER, PARAMETERS, NORM_LEAVES and the function's arguments and docstring do not agree")


check_entries()


def refusal(kind: str, impl: str) -> str | None:
    """Why there is no such norm; None if there is."""
    if kind not in EAGER:
        return f"norm must be one of {', '.join(EAGER)}, got {kind!r}"
    if kind not in IMPLEMENTED[impl]:
        return (f"norm_impl={impl} has no kernel for norm={kind}, only for {', '.join(IMPLEMENTED[impl])}: use "
                f"norm_impl=compile or eager")
    return None


@cache
def norm_function(kind: str, impl: str) -> Callable[..., Tensor]:
    """The function that computes `kind` the way `impl` says; ValueError where there is no such way, or not here."""
    if problem := refusal(kind, impl):
        raise ValueError(problem)
    if impl == "eager" or kind == "none":
        return EAGER[kind]
    if impl == "fused":
        return FUSED[kind]
    if impl == "compile":
        return partial(compiled_norm, kind)
    import norm_triton  # here, so that this file works without it

    if problem := norm_triton.available():
        raise ValueError(problem)
    return norm_triton.rmsnorm


def compiled_norm(kind: str, x: Tensor, *arguments) -> Tensor:
    """The eager function through torch.compile; a large RMSNorm on a CPU with a backward of our own."""
    if torch.compiler.is_compiling():  # part of a larger compilation already
        return EAGER[kind](x, *arguments)
    if kind == "rmsnorm" and x.device.type == "cpu" and x.nbytes >= LARGE and torch.is_grad_enabled():
        return LargeRMSNorm.apply(x.contiguous(), *arguments)
    return compiled(EAGER[kind])(x, *arguments)


@cache
def compiled(function: Callable) -> Callable:
    """A plain function, not a method of each instance: one set of guards, so no recompilation per layer."""
    return torch.compile(function)


def rmsnorm_and_squares(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rmsnorm, and the sum of the squares of each row [..., 1], which costs nothing to keep."""
    squares = widen(x).square().sum(-1, keepdim=True)
    return (widen(x) * torch.rsqrt(squares / x.shape[-1] + eps) * gain).to(x.dtype), squares


def rmsnorm_gradient(dy: Tensor, x: Tensor, scale: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by x [M, R, C], whose rows have `scale` [M, R, 1], and by the gain, as partial sums [M, C].

    R rows are written out side by side, so that Inductor's CPU code has one loop over M for both gradients and makes
    the second pass over its rows while they are in a core's cache.
    """
    gradients, by_gain = [], 0.0
    for dy_row, row, factor in zip(dy.unbind(1), x.unbind(1), scale.unbind(1), strict=True):
        normed, inner = widen(row) * factor, widen(dy_row) * gain
        gradients.append(((inner - normed * (inner * normed).mean(-1, keepdim=True)) * factor).to(x.dtype))
        by_gain = by_gain + dy_row * normed
    return torch.stack(gradients, 1), by_gain


class LargeRMSNorm(torch.autograd.Function):
    """RMSNorm of [..., C] whose backward reads x and dy from memory once.

    Left alone, Inductor's CPU code reads them for dx and once more for the gain (LOG.md). On CUDA it fuses the two.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        y, squares = compiled(rmsnorm_and_squares)(x, gain, eps)
        ctx.save_for_backward(x, gain, squares)
        ctx.eps = eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # autograd takes `squares` for a constant
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, squares = ctx.saved_tensors
        scale, side_by_side = torch.rsqrt(squares / x.shape[-1] + ctx.eps), math.gcd(squares.numel(), ROWS)
        rows = [t.view(-1, side_by_side, t.shape[-1]) for t in (dy.contiguous(), x, scale)]
        dx, by_gain = compiled(rmsnorm_gradient)(*rows, gain)
        return dx.view_as(x), by_gain.sum(0), None


class Norm(nn.Module):
    """A norm over the last dimension of size `width`. `p` is prmsnorm's share, `alpha` the start of dyt and derf."""

    def __init__(self, kind: str, width: int, eps: float, impl: str = "eager", p: float = 0.0625, alpha: float = 0.5):
        super().__init__()
        self.kind, self.function = kind, norm_function(kind, impl)
        self.constants = () if kind in ELEMENTWISE else (eps, p) if kind == "prmsnorm" else (eps,)
        self.width, self.start = width, PARAMETERS[kind] | ({"alpha": alpha} if "alpha" in PARAMETERS[kind] else {})
        for name in self.start:
            self.register_parameter(name, nn.Parameter(torch.empty(1 if name in SCALARS else width)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, value in self.start.items():
            nn.init.constant_(getattr(self, name), value)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.function(x, *self._parameters.values(), *self.constants)

    def of_sum(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """(x + branch, its norm), both [..., C], by one kernel; for norm_impl=triton."""
        import norm_triton

        with torch.autocast(x.device.type, enabled=False):
            return norm_triton.add_rmsnorm(x, branch, self.gain, *self.constants)

    def extra_repr(self) -> str:
        return ", ".join(map(str, (self.kind, self.width, *self.constants)))
