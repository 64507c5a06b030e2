"""Parameter groups, optimizers and the learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from device import choose_dtype
from norm import NORM_LEAVES

HAVE_FUSED_ADAMW = ("cuda", "cpu", "mps")
SPIKE_WINDOW, SPIKE_LEAST = 128, 32  # gradient norms that a spike is judged by, and the fewest that suffice
AT_ONCE = 2**26  # elements that Muon makes orthogonal together, at most: a step needs a few times their memory


def lr_at(step: int, *, schedule: str, peak: float, floor: float, warmup: int, total: int,
          decay_fraction: float) -> float:
    """Learning rate of optimizer step `step` (0 is the first); a pure function, so resuming needs no state.

    Warm-up rises linearly to `peak` at step `warmup`. Then cosine and linear fall to `floor`, which step `total` would
    have; wsd stays at `peak` and falls linearly over the last `decay_fraction` of `total`; constant stays.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    start = max(warmup, total * (1 - decay_fraction)) if schedule == "wsd" else warmup
    done = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "wsd": 1 - done}[schedule]
    return floor + (peak - floor) * left


def spike_threshold(recent: list[float], limit: float) -> float:
    """The gradient norm above which an update is a spike: the mean of the `recent` norms and `limit` of their standard
    deviations; inf if limit is 0, or while too few are known.

    As OLMo-core's SkipStepOptimizer has it for the gradient. Remember a spike as the threshold, not as itself: then it
    does not hide the next one, and where the level has really risen, the threshold follows by an eighth each time.
    """
    if not limit or len(recent) < SPIKE_LEAST:
        return math.inf
    mean = math.fsum(recent) / len(recent)
    return mean + limit * math.sqrt(math.fsum((norm - mean) ** 2 for norm in recent) / len(recent))


def group_of(name: str, parameter: Tensor) -> str:
    """`hidden` (a Block's matrix), `head`, `embed` or `gain` (all of a norm's own); an unknown name is an error."""
    *_, role, leaf = name.split(".")
    if leaf in NORM_LEAVES:
        return "gain"
    if role in ("embed", "head"):
        return role
    if name.startswith("blocks.") and parameter.ndim == 2:
        return "hidden"
    raise ValueError(f"no optimizer group is known for the parameter {name}: give it one in optim.group_of()")


def orthogonalise(x: Tensor) -> Tensor:
    """x [n, rows, cols], rows <= cols, with about its singular vectors and all singular values near 1.

    Five steps of a quintic Newton-Schulz iteration, after Jordan et al. 2024; only matrix products, so in x's dtype.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """The momentum of each matrix, made orthogonal (Jordan et al. 2024), is its step, scaled to the size of AdamW's
    (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves both.

    torch.optim.Muon's arithmetic, but with all matrices of one shape, or its transpose, in one product: one by one they
    are too small to keep a processor busy.
    """

    def __init__(self, params: Iterable, momentum: float):
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[tuple(sorted(p.shape))].append(p)
            for (rows, cols), matrices in alike.items():
                most = self.at_once(rows * cols)
                for i in range(0, len(matrices), most):
                    self.move(matrices[i:i + most], **{k: group[k] for k in ("lr", "momentum", "weight_decay")})

    def at_once(self, elements: int) -> int:
        """How many matrices of so many elements are made orthogonal together."""
        return max(1, AT_ONCE // elements)

    def move(self, matrices: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        """The step of matrices of one shape, or its transpose."""
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in matrices]
        gradients = [p.grad for p in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = [g.lerp(b, momentum) for g, b in zip(gradients, buffers, strict=True)]  # Nesterov's
        size = 0.2 * math.sqrt(max(matrices[0].shape))  # the root mean square of AdamW's steps, times that of ours
        for p, direction in zip(matrices, self.directions(ahead), strict=True):
            p.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr * size)

    def directions(self, ahead: list[Tensor]) -> list[Tensor]:
        """The matrices, of one shape or its transpose, made orthogonal."""
        together = torch.stack([wide(matrix) for matrix in ahead])
        together /= torch.linalg.vector_norm(together, dim=(1, 2), keepdim=True).clamp(min=1e-7)
        dtype = getattr(torch, choose_dtype("auto", str(together.device)))
        ready = orthogonalise(together.to(dtype)).to(together.dtype)
        return [one if wide(matrix) is matrix else one.mT for matrix, one in zip(ahead, ready, strict=True)]


def wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where that has fewer rows."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


class Optimizers:
    """One or two torch optimizers over one model, each parameter but frozen ones in exactly one group of one of them.

    Gains, biases and the embedding are not decayed; embedding and head learn at `embed_lr` times the rate. With `muon`
    the Blocks' matrices go to Muon.
    """

    def __init__(self, model: nn.Module, *, optimizer: str, weight_decay: float, betas: tuple[float, float],
                 momentum: float, embed_lr: float = 1.0, muon: Callable[..., Muon] = Muon):
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        groups: dict[str, list[Tensor]] = {"hidden": [], "head": [], "embed": [], "gain": []}
        for parameter, name in self.names.items():
            groups[group_of(name, parameter)].append(parameter)
        settings = {"hidden": {"weight_decay": weight_decay, "scale": 1.0}, "gain": {"weight_decay": 0.0, "scale": 1.0},
                    "head": {"weight_decay": weight_decay, "scale": embed_lr},
                    "embed": {"weight_decay": 0.0, "scale": embed_lr}}
        ready = {name: {"params": group} | settings[name] for name, group in groups.items() if group}
        self.all: list[torch.optim.Optimizer] = []
        if optimizer == "muon":
            self.all.append(muon([ready.pop("hidden")], momentum))
        elif optimizer != "adamw":
            raise ValueError(f"optimizer={optimizer} is not built here")
        if ready:  # not if adapters are all there is, and Muon has them
            fused = next(model.parameters()).device.type in HAVE_FUSED_ADAMW
            self.all.append(torch.optim.AdamW(list(ready.values()), betas=betas, fused=fused))
        held = [p for o in self.all for g in o.param_groups for p in g["params"]]
        assert len(held) == len(self.names) and set(held) == set(self.names), "each parameter in exactly one group"

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.all)

    def set_lr(self, lr: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """name of parameter -> its state. By name, because positions shift when a group changes."""
        return {self.names[p]: dict(state) for o in self.all for p, state in o.state.items()}

    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Restores what state_dict gave, {} before the first step; wrong names and wrong shapes are refused."""
        if not saved:
            return
        surplus, missing = saved.keys() - set(self.names.values()), set(self.names.values()) - saved.keys()
        if surplus or missing:
            raise ValueError(f"the optimizer's state does not fit the model: {describe(missing, 'missing')}"
                             f"{describe(surplus, 'unknown')}")
        for optimizer in self.all:
            for parameter in (p for g in optimizer.param_groups for p in g["params"]):
                name = self.names[parameter]
                for key, value in saved[name].items():
                    if value.ndim and value.shape != parameter.shape:
                        raise ValueError(f"the optimizer's {key} of {name} is {list(value.shape)}, "
                                         f"the parameter is {list(parameter.shape)}")
                optimizer.state[parameter] = {key: value.to(parameter.device, copy=True)
                                              for key, value in saved[name].items()}


def describe(names: Iterable[str], what: str) -> str:
    """' 3 missing (a, b, ...)', or nothing."""
    names = sorted(names)
    return f" {len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
