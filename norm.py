"""Every norm, and every way to compute it.

The contract, which tests/test_norm.py checks clause by clause:
  - Statistics and gain are computed in fp32 (in float64 if x is float64). There is ONE cast at the
    end, and the output has the dtype of the input.
  - eps stands inside the root, and the caller always gives it.
  - A row whose squares overflow, in fp32 from about 1e19 on, becomes NaN, so that training stops.
    1 / sqrt(inf) is 0, and a row of zeros would go on unseen.
  - Autocast is off inside a norm, so that it cannot change the precision of one norm and not of
    another.
  - Initialisation draws no random numbers: with the same seed all other weights of a model are the
    same, whatever its norm is.

A norm is one function of x [..., C], its parameters and its constants. There are three ways to
compute it. `eager` is the readable reference and the specification. `fused` is PyTorch's own
kernel, where there is one; it may round gain and bias first, and it leaves zeros where squares
overflow. `compile` is the eager function through torch.compile; if the whole model is compiled,
the norm becomes part of the model's graph. Each way is tested against float64.

Reading order: the eager functions; the fused ones; the table, in which a new norm is entered; how a
function is chosen; and Norm, the module.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- eager: the specification ----------------------------------------------------------------------


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension: [..., C] -> [..., 1]. NaN if the squares
    overflow.
    """
    mean_square = x.square().mean(-1, keepdim=True)
    return torch.rsqrt(mean_square.masked_fill(mean_square == math.inf, math.nan) + eps)


def layernorm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * gain + bias: re-centres and re-scales.

    Ba et al. 2016, arXiv 1607.06450. gain and bias [C]. var is the biased variance (divided by C).
    """
    wide = at_least_fp32(x)
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * inverse_rms(centred, eps) * gain + bias).to(x.dtype)


def layernorm_nobias(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * gain: LayerNorm without its bias.

    As in nanoGPT with bias=False, and in ModernBERT (Warner et al. 2024, arXiv 2412.13663).
    gain [C].
    """
    wide = at_least_fp32(x)
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * inverse_rms(centred, eps) * gain).to(x.dtype)


def rmsnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain: re-scales only. LLaMA's norm.

    Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4. gain [C]. LLaMA and Hugging Face cast to x's
    dtype before they multiply by the gain. Here the gain is multiplied in fp32, so the result is
    rounded once. For x in fp32 both orders give the same numbers.
    """
    wide = at_least_fp32(x)
    return (wide * inverse_rms(wide, eps) * gain).to(x.dtype)


def rmsnorm_noparam(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps): RMSNorm without a gain.

    The matrix that follows a norm can do what the gain does. As in modded-nanogpt.
    """
    wide = at_least_fp32(x)
    return (wide * inverse_rms(wide, eps)).to(x.dtype)


def rmsnorm1p(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (1 + gain): its gain starts at zero. Gemma's norm.

    Gemma Team 2024, arXiv 2403.08295. gain [C]. 1 + gain is computed in fp32, because bfloat16
    would round small gains away.
    """
    return rmsnorm(x, 1 + gain, eps)


def ssnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain, one gain for all channels: single-scale RMSNorm.

    Park et al. 2025, arXiv 2506.19697. gain [1]. A gain of its own lets a channel become an
    outlier, which is in the way of quantisation.
    """
    return rmsnorm(x, gain, eps)


def prmsnorm(x: Tensor, gain: Tensor, eps: float, p: float) -> Tensor:
    """x / sqrt(mean(x[:k]^2) + eps) * gain, k = ceil(p C): uses the first k channels.

    Zhang & Sennrich 2019, arXiv 1910.07467, section 4. gain [C]. The paper rounds k up, and so does
    this function; the code of its authors rounds k down.
    """
    wide = at_least_fp32(x)
    first = wide[..., : math.ceil(p * x.shape[-1])]  # [..., k]
    return (wide * inverse_rms(first, eps) * gain).to(x.dtype)


def dyt(x: Tensor, gain: Tensor, alpha: Tensor) -> Tensor:
    """tanh(alpha x) * gain: DyT, which squashes each element by itself, without statistics.

    Zhu et al. 2025, arXiv 2503.10622. gain [C], alpha [1], both learned. There is no bias, because
    its authors use none in LLaMA. They also scale the embedding by a learned factor, as Decoder
    does.
    """
    return (torch.tanh(alpha * at_least_fp32(x)) * gain).to(x.dtype)


def derf(x: Tensor, gain: Tensor, bias: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """erf(alpha x + shift) * gain + bias: like dyt, with the error function.

    Chen et al. 2025, arXiv 2512.10938. gain and bias [C], alpha and shift [1], all learned.
    """
    return (torch.erf(alpha * at_least_fp32(x) + shift) * gain + bias).to(x.dtype)


def tapernorm(
    x: Tensor, gain: Tensor, log_scale: Tensor, eps: float, gate: Tensor | float = 1.0
) -> Tensor:
    """(gate / sqrt(mean(x^2) + eps) + (1 - gate) e^log_scale) x * gain: RMSNorm that is faded out.

    Kanavalau et al. 2026, arXiv 2602.10408. gain [C], log_scale [1]. While the model trains, `gate`
    falls from 1 to 0 (run/taper.py), and what is left is one factor for each channel. Its authors
    give the second branch a gain of its own, which begins as a copy; here both share one.
    """
    wide = at_least_fp32(x)
    factor = gate * inverse_rms(wide, eps) + (1 - gate) * log_scale.exp()  # [..., 1]
    return (wide * factor * gain).to(x.dtype)


def gate_at(step: int, start: int, end: int) -> float:
    """The gate of tapernorm after `step` steps: 1 until `start`, 0 from `end` on, and half a cosine
    between them."""
    done = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    return (1 + math.cos(math.pi * done)) / 2


def no_norm(x: Tensor) -> Tensor:
    """x: no norm. The control that shows what a norm costs and whether it is needed."""
    return x


# -- fused: PyTorch's kernels ----------------------------------------------------------------------
# Gain and bias are rounded to x's dtype first. With mixed dtypes PyTorch would not use its kernel,
# but a chain of small ones.


def fused_layernorm(x: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """On a CPU in fp32: the kernel there adds up the gradients of gain and bias in the dtype of x,
    and over thousands of rows in bfloat16 they would be wrong by several percent.
    """
    wide = at_least_fp32(x) if x.device.type == "cpu" else x
    bias = bias if bias is None else bias.to(wide.dtype)
    return F.layer_norm(wide, gain.shape, gain.to(wide.dtype), bias, eps).to(x.dtype)


def fused_layernorm_nobias(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return fused_layernorm(x, gain, None, eps)


def fused_rmsnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, gain.shape, gain.to(x.dtype), eps)


def fused_rmsnorm_noparam(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None, eps)


def fused_rmsnorm1p(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return fused_rmsnorm(x, 1 + gain, eps)  # the sum is in fp32, as in rmsnorm1p


def fused_ssnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return fused_rmsnorm(x, gain.expand(x.shape[-1]), eps)


# -- The table: a new norm is entered here ---------------------------------------------------------


@dataclass(frozen=True)
class NormEntry:
    """All that the rest of the repository needs to know of a norm.

    `eager` and `fused` (None: there is no kernel) take x, then the parameters `channels` and
    `scalars`, then the `constants`, each by its name; and if it fades, `gate`. A norm without an
    eps has no statistics, so it does not bring the residual stream to a known scale. A parameter
    that is called gain may be decayed (gain_decay), no other one; none may be called weight, as
    matrices are.
    """

    words: str  # the first line of eager's docstring, which python -OO removes
    eager: Callable[..., Tensor]
    fused: Callable[..., Tensor] | None = None
    channels: dict[str, float] = field(default_factory=dict)  # [C] each -> where it starts
    scalars: dict[str, float] = field(default_factory=dict)  # [1] each -> where it starts
    constants: tuple[str, ...] = ("eps",)
    scales_embedding: bool = False  # by a learned factor, which begins at sqrt(C)
    fades_from: str = ""  # the norm that it is at first; qk_norm and the last norm stay this one

    @property
    def start(self) -> dict[str, float]:
        """Each parameter, by name, and the number that it starts from."""
        return self.channels | self.scalars

    @property
    def has_statistics(self) -> bool:
        return "eps" in self.constants

    def size(self, width: int) -> int:
        """The number of parameters of this norm over `width` channels."""
        return len(self.channels) * width + len(self.scalars)


NORMS = {
    "layernorm": NormEntry(
        "(x - mean) / sqrt(var + eps) * gain + bias: re-centres and re-scales.",
        layernorm,
        fused_layernorm,
        channels={"gain": 1.0, "bias": 0.0},
    ),
    "layernorm_nobias": NormEntry(
        "(x - mean) / sqrt(var + eps) * gain: LayerNorm without its bias.",
        layernorm_nobias,
        fused_layernorm_nobias,
        channels={"gain": 1.0},
    ),
    "rmsnorm": NormEntry(
        "x / sqrt(mean(x^2) + eps) * gain: re-scales only. LLaMA's norm.",
        rmsnorm,
        fused_rmsnorm,
        channels={"gain": 1.0},
    ),
    "rmsnorm_noparam": NormEntry(
        "x / sqrt(mean(x^2) + eps): RMSNorm without a gain.",
        rmsnorm_noparam,
        fused_rmsnorm_noparam,
    ),
    "rmsnorm1p": NormEntry(
        "x / sqrt(mean(x^2) + eps) * (1 + gain): its gain starts at zero. Gemma's norm.",
        rmsnorm1p,
        fused_rmsnorm1p,
        channels={"gain": 0.0},
    ),
    "ssnorm": NormEntry(
        "x / sqrt(mean(x^2) + eps) * gain, one gain for all channels: single-scale RMSNorm.",
        ssnorm,
        fused_ssnorm,
        scalars={"gain": 1.0},
    ),
    "prmsnorm": NormEntry(
        "x / sqrt(mean(x[:k]^2) + eps) * gain, k = ceil(p C): uses the first k channels.",
        prmsnorm,
        channels={"gain": 1.0},
        constants=("eps", "p"),
    ),
    "dyt": NormEntry(
        "tanh(alpha x) * gain: DyT, which squashes each element by itself, without statistics.",
        dyt,
        channels={"gain": 1.0},
        scalars={"alpha": 0.5},
        constants=(),
        scales_embedding=True,
    ),
    "derf": NormEntry(
        "erf(alpha x + shift) * gain + bias: like dyt, with the error function.",
        derf,
        channels={"gain": 1.0, "bias": 0.0},
        scalars={"alpha": 0.5, "shift": 0.0},
        constants=(),
        scales_embedding=True,
    ),
    "tapernorm": NormEntry(
        "(gate / sqrt(mean(x^2) + eps) + (1 - gate) e^log_scale) x * gain: RMSNorm that is faded "
        "out.",
        tapernorm,
        channels={"gain": 1.0},
        scalars={"log_scale": 0.0},
        fades_from="rmsnorm",
    ),
    "none": NormEntry(
        "x: no norm. The control that shows what a norm costs and whether it is needed.",
        no_norm,
        no_norm,
        constants=(),
    ),
}
FUSED = {kind: entry.fused for kind, entry in NORMS.items() if entry.fused}
EAGER = {kind: entry.eager for kind, entry in NORMS.items()}
IMPLEMENTED = {"eager": EAGER, "fused": FUSED, "compile": EAGER}
NORM_LEAVES = {name for entry in NORMS.values() for name in entry.start}

# -- How a function is chosen ----------------------------------------------------------------------


def norm_problem(kind: str, impl: str) -> str | None:
    """Why there is no such norm, as an error message; None if there is one."""
    if kind not in NORMS:
        return f"norm must be one of {', '.join(NORMS)}, got {kind!r}"
    if kind not in IMPLEMENTED[impl]:
        return (
            f"norm_impl={impl} has no kernel for norm={kind}, only for "
            f"{', '.join(IMPLEMENTED[impl])}: use norm_impl=compile or eager"
        )
    return None


@cache
def norm_function(kind: str, impl: str) -> Callable[..., Tensor]:
    """The function that computes the norm `kind` in the way `impl`; ValueError if there is none."""
    if problem := norm_problem(kind, impl):
        raise ValueError(problem)
    if impl == "compile" and kind != "none":
        return partial(compiled_norm, EAGER[kind])
    return IMPLEMENTED[impl][kind]


def compiled_norm(function: Callable[..., Tensor], x: Tensor, **arguments) -> Tensor:
    """function(x, ...) through torch.compile. If the whole model is being compiled, the function is
    simply called, and so becomes part of the model's graph.
    """
    if torch.compiler.is_compiling():
        return function(x, **arguments)
    return compile_once(function)(x, **arguments)


@cache
def compile_once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same compiled function for all layers, so that not every layer compiles its own."""
    return torch.compile(function)


# -- The module ------------------------------------------------------------------------------------


class Norm(nn.Module):
    """A norm over the last dimension, which has `width` channels.

    `p` is prmsnorm's share of the channels. `alpha` is the number from which a parameter of that
    name starts, as in dyt and derf.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        eps: float,
        impl: str = "eager",
        p: float = 0.0625,
        alpha: float = 0.5,
    ):
        super().__init__()
        self.kind, self.width = kind, width
        self.function = norm_function(kind, impl)
        entry, given = NORMS[kind], {"eps": eps, "p": p}
        self.constants = {name: given[name] for name in entry.constants}
        self.start = {k: alpha if k == "alpha" else v for k, v in entry.start.items()}
        for name in self.start:
            size = width if name in entry.channels else 1
            self.register_parameter(name, nn.Parameter(torch.empty(size)))
        if entry.fades_from:
            self.register_buffer("gate", torch.empty(1), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, value in self.start.items():
            nn.init.constant_(getattr(self, name), value)
        for gate in self._buffers.values():
            gate.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.function(x, **self._parameters, **self._buffers, **self.constants)

    def extra_repr(self) -> str:
        return ", ".join(map(str, (self.kind, self.width, *self.constants.values())))


def fading_norms(model: nn.Module) -> list[Norm]:
    """Those norms inside the model that have a gate."""
    return [m for m in model.modules() if isinstance(m, Norm) and m._buffers]
