"""Parameter groups, optimizers and the learning-rate schedule."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from norm import NORM_LEAVES

HAVE_FUSED_ADAMW = ("cuda", "cpu", "mps")
SPIKE_WINDOW, SPIKE_LEAST = 128, 32  # gradient norms that a spike is judged by, and the fewest that suffice


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
    left = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
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


class Optimizers:
    """One or two torch optimizers over one model, each parameter but frozen ones in exactly one group of one of them.

    Gains, biases and the embedding are not decayed; embedding and head learn at `embed_lr` times the rate. With `muon`
    the Blocks' matrices go to Muon (Jordan et al. 2024), its step scaled to the size of AdamW's (Liu et al. 2025,
    arXiv 2502.16982), so one learning rate serves both.
    """

    def __init__(self, model: nn.Module, *, optimizer: str, weight_decay: float, betas: tuple[float, float],
                 momentum: float, embed_lr: float = 1.0):
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
            self.all.append(torch.optim.Muon([ready.pop("hidden")], momentum=momentum, adjust_lr_fn="match_rms_adamw"))
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
