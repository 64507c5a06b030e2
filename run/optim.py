"""The optimizers: which parameter gets which rule, Muon, and when a gradient counts as a spike."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from norm import NORM_LEAVES
from run.machine import choose_dtype

ADAMW_KEEPS = {"step", "exp_avg", "exp_avg_sq"}  # of each parameter; `step` is a scalar
SPIKE_WINDOW = 128  # how many recent gradient norms tell what is usual
SPIKE_LEAST = 32  # with fewer recent norms, nothing is called a spike
# The weights that write into the residual stream, [V, C] or [C, in], and which of their dimensions
# the stream's channels C are; and the matrices that do not write into it.
WRITERS, READERS = {"embed": 1, "out": 0, "down": 0}, ("q", "k", "v", "gate", "up", "head")
# Muon orthogonalises matrices of up to this many elements at once, or one larger matrix. It needs a
# few times their memory.
ELEMENTS_AT_ONCE = 2**26


def group_of(name: str, parameter: Tensor) -> str:
    """The optimizer group of a parameter: `hidden` (a Block's matrix, or an adapter's), `head`,
    `embed`, `gain` (of a norm) or `norm` (what else a norm learns, and the scale of the embedding).
    ValueError for a parameter of unknown role."""
    *_, role, leaf = name.split(".")
    if leaf in NORM_LEAVES:
        return "gain" if leaf == "gain" and role != "embed_scale" else "norm"
    if role in ("embed", "head"):
        return role
    if name.startswith("blocks.") and parameter.ndim == 2:
        return "hidden"
    raise ValueError(
        f"no optimizer group is known for the parameter {name}: give it one in optim.group_of()"
    )


def stream_dimension(name: str) -> int | None:
    """The dimension of a weight that holds the channels of the residual stream, if it writes into
    the stream; None if it does not. ValueError for a parameter of unknown role, and for an adapter
    or a bias of a matrix that writes.

    Without its mean over that dimension no weight gives the stream a mean, and a LayerNorm that
    reads the stream is an RMSNorm (Jiang et al. 2023, arXiv 2305.14858).
    """
    *_, role, leaf = name.split(".")
    if leaf == "weight" and role in WRITERS:
        return WRITERS[role]
    if role in READERS or (leaf in NORM_LEAVES and role not in WRITERS):
        return None
    raise ValueError(
        f"it is not known whether the parameter {name} writes into the residual stream: say it in "
        f"optim.stream_dimension()"
    )


def subtract_mean(x: Tensor, dimension: int) -> None:
    """Takes the mean over a dimension from x, in place. By a sum: for a mean, ranks that share the
    rows in unequal parts would send each other all of them, and not their sums alone."""
    x.sub_(x.sum(dimension, keepdim=True) / x.shape[dimension])


class Optimizers:
    """One or two optimizers over one model. Each trained parameter is in exactly one group.

    With optimizer="muon" the Blocks' matrices go to Muon and the rest to AdamW. Biases and the
    embedding have no weight decay, and gains have one of their own. The learning rate of embedding
    and head is multiplied by `embed_lr`. With centred_writers, the weights that write into the
    residual stream, and their gradients, can be centred.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: str,
        weight_decay: float,
        betas: tuple[float, float],
        momentum: float,
        embed_lr: float = 1.0,
        gain_decay: float = 0.0,
        centred_writers: bool = False,
        muon: "type[Muon] | None" = None,
    ):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = {parameter: name for name, parameter in trained}
        groups = {
            "hidden": {"params": [], "weight_decay": weight_decay, "scale": 1.0},
            "head": {"params": [], "weight_decay": weight_decay, "scale": embed_lr},
            "embed": {"params": [], "weight_decay": 0.0, "scale": embed_lr},
            "gain": {"params": [], "weight_decay": gain_decay, "scale": 1.0},
            "norm": {"params": [], "weight_decay": 0.0, "scale": 1.0},
        }
        for name, parameter in trained:
            groups[group_of(name, parameter)]["params"].append(parameter)
        groups = {name: group for name, group in groups.items() if group["params"]}

        self.all: list[Optimizer] = []
        if optimizer == "muon":
            self.all.append((muon or Muon)([groups.pop("hidden")], momentum))
        elif optimizer != "adamw":
            raise ValueError(f"optimizer={optimizer} is not built here")
        if groups:  # if Muon trains adapters, which are all `hidden`, nothing is left for AdamW
            self.all.append(AdamW(list(groups.values()), betas))
        held = [p for o in self.all for g in o.param_groups for p in g["params"]]
        if len(held) != len(trained) or set(held) != set(self.names):
            raise RuntimeError("each parameter that is trained must be in exactly one optimizer")
        over = [(p, stream_dimension(name)) for name, p in trained] if centred_writers else []
        self.writers = [(p, dimension) for p, dimension in over if dimension is not None]

    def __iter__(self) -> Iterator["Optimizer"]:
        return iter(self.all)

    def set_lr(self, lr: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]

    def zero_grad(self) -> None:
        for parameter in self.names:
            parameter.grad = None

    @torch.no_grad()
    def centre_writers(self) -> None:
        """Takes their mean from the weights that write into the residual stream."""
        for parameter, dimension in self.writers:
            subtract_mean(parameter, dimension)

    @torch.no_grad()
    def centre_gradients(self) -> None:
        """The same for their gradients. So what an RMSNorm sends back along the mean, and LayerNorm
        does not, reaches neither the clipping nor the moments."""
        for parameter, dimension in self.writers:
            subtract_mean(parameter.grad, dimension)

    def reserve_moments(self) -> list[Tensor]:
        """Tensors as large as the moments that the first step will make. No tensors after it."""
        room = []
        for optimizer in self.all:
            moments = 1 if isinstance(optimizer, Muon) else 2
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if parameter not in optimizer.state:
                    room += [torch.empty_like(parameter) for _ in range(moments)]
        return room

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """name of a parameter -> its state. By name, because positions shift if a group changes."""
        return {self.names[p]: dict(state) for o in self.all for p, state in o.state.items()}

    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Restores what state_dict gave, which is {} before the first step. ValueError if it does
        not fit."""
        if not saved:
            return
        self.check_fit(saved)
        for optimizer in self.all:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                optimizer.state[parameter] = {
                    key: value.to(parameter.device, copy=True)
                    for key, value in saved[self.names[parameter]].items()
                }

    def check_fit(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """ValueError unless `saved` has, for each parameter that is trained, the tensors that its
        optimizer keeps, in the parameter's shape. The tensors need no data."""
        own = set(self.names.values())
        if own != saved.keys():
            raise ValueError(
                f"the optimizer's state does not fit the model:"
                f"{list_names(own - saved.keys(), 'missing')}"
                f"{list_names(saved.keys() - own, 'unknown')}"
            )
        for optimizer in self.all:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                name = self.names[parameter]
                kept = {"momentum_buffer"} if isinstance(optimizer, Muon) else ADAMW_KEEPS
                for key in sorted(kept ^ saved[name].keys()):
                    verb = "lacks" if key in kept else "has a surplus"
                    raise ValueError(
                        f"the optimizer's state does not fit the model: it {verb} {key} of {name}"
                    )
                for key, value in saved[name].items():
                    wanted = [] if key == "step" else list(parameter.shape)
                    if list(value.shape) != wanted:
                        raise ValueError(
                            f"the optimizer's {key} of {name} is {list(value.shape)}, "
                            f"but {wanted} is wanted"
                        )


def list_names(names: Iterable[str], what: str) -> str:
    """' 5 missing (a, b, c, ...)', or '' if there are no names."""
    names = sorted(names)
    if not names:
        return ""
    more = ", ..." if len(names) > 3 else ""
    return f" {len(names)} {what} ({', '.join(names[:3])}{more})"


class Optimizer:
    """Groups of parameters, each with a learning rate of its own, and what is kept of each
    parameter. It has what a GradScaler asks for: param_groups and step().

    It is not a torch.optim.Optimizer, since to build one imports all of PyTorch's compiler: two
    seconds of every start.
    """

    def __init__(self, groups: Iterable[dict]):
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.0} | group for group in groups]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}


class AdamW(Optimizer):
    """Loshchilov & Hutter 2019, as PyTorch's fused kernels compute it."""

    def __init__(self, groups: Iterable[dict], betas: tuple[float, float]):
        super().__init__(groups)
        self.beta1, self.beta2 = betas

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if p not in self.state:
                    self.state[p] = {
                        "step": torch.zeros((), device=p.device),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            kept = [self.state[p] for p in parameters]
            adamw(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in kept],
                [state["exp_avg_sq"] for state in kept],
                [],  # what AMSGrad would keep
                [state["step"] for state in kept],
                fused=True,
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=1e-8,
                maximize=False,
            )


class Muon(Optimizer):
    """Each matrix moves by its momentum, made orthogonal (Jordan et al. 2024). The step is scaled
    to the size of AdamW's, so one learning rate serves both (Liu et al. 2025, arXiv 2502.16982).

    The arithmetic is that of torch.optim.Muon. But matrices of one shape or its transpose are
    stacked for one product, because one alone is too small to keep a processor busy.
    """

    def __init__(self, groups: Iterable[dict], momentum: float):
        super().__init__(groups)
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            of_one_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    of_one_shape[tuple(sorted(p.shape))].append(p)
            for (rows, cols), matrices in of_one_shape.items():
                most = self.matrices_at_once(rows * cols)
                for i in range(0, len(matrices), most):
                    self.update(matrices[i : i + most], group)

    def matrices_at_once(self, elements: int) -> int:
        """How many matrices with this number of elements are orthogonalised together."""
        return max(1, ELEMENTS_AT_ONCE // elements)

    def update(self, matrices: list[Tensor], group: dict) -> None:
        """One step for matrices that all have one shape or its transpose."""
        for p in matrices:
            if p not in self.state:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        buffers = [self.state[p]["momentum_buffer"] for p in matrices]
        gradients = [p.grad for p in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
        # Nesterov's momentum: the gradient counts once more.
        momenta = [g.lerp(b, self.momentum) for g, b in zip(gradients, buffers, strict=True)]
        # An orthogonal matrix has an RMS of 1 / sqrt(longer side); AdamW's steps have about 0.2.
        size = 0.2 * math.sqrt(max(matrices[0].shape))
        for p, direction in zip(matrices, self.orthogonal_directions(momenta), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(direction, alpha=-group["lr"] * size)

    def orthogonal_directions(self, momenta: list[Tensor]) -> list[Tensor]:
        """The momenta, which all have one shape or its transpose, made orthogonal."""
        stacked = torch.stack([wide(matrix) for matrix in momenta])
        stacked /= torch.linalg.vector_norm(stacked, dim=(1, 2), keepdim=True).clamp(min=1e-7)
        dtype = getattr(torch, choose_dtype("auto", str(stacked.device)))
        ready = orthogonalise(stacked.to(dtype)).to(stacked.dtype)
        pairs = zip(ready, momenta, strict=True)
        return [one if wide(matrix) is matrix else one.mT for one, matrix in pairs]


def wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose if the transpose has fewer rows."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def orthogonalise(x: Tensor) -> Tensor:
    """Makes matrices x [n, rows, cols], rows <= cols, nearly orthogonal: the singular vectors stay,
    and all singular values become about 1. All products are in x's dtype.

    It is five steps of a quintic Newton-Schulz iteration, after Jordan et al. 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def check_finite(loss: float, norm: float, scaler: torch.amp.GradScaler, step: int) -> None:
    """FloatingPointError if the loss or the gradient's norm of a step is NaN or Inf.

    A float16 gradient may overflow. Then the scaler skips the step and halves its scale, so a norm
    of NaN or Inf is an error only when the scale is below 1 already.
    """
    may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1
    if not math.isfinite(loss) or not (math.isfinite(norm) or may_overflow):
        raise FloatingPointError(
            f"loss {loss}, gradient norm {norm} at step {step}: stopped before the update"
        )


def spike_threshold(recent: list[float], limit: float) -> float:
    """The gradient norm above which an update is a spike: the mean of the `recent` norms plus
    `limit` times their standard deviation. inf if limit is 0 or there are too few recent norms.

    The rule is that of OLMo-core's SkipStepOptimizer.
    """
    if not limit or len(recent) < SPIKE_LEAST:
        return math.inf
    mean = math.fsum(recent) / len(recent)
    return mean + limit * math.sqrt(math.fsum((norm - mean) ** 2 for norm in recent) / len(recent))


def with_norm(recent: list[float], norm: float, threshold: float) -> list[float]:
    """The recent norms with a new one. A spike is with_norm only as the threshold, so it does not
    hide the next spike. If the norms have risen for good, the threshold still follows: with limit 6
    each spike lifts its distance to the mean by about an eighth.
    """
    return [*recent, min(norm, threshold)][-SPIKE_WINDOW:]
