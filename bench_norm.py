"""bench.py norm: every norm, in every way there is to compute it, against a copy of its input.

A norm does little but move memory, so its ceiling is the rate of a copy, measured in turn with it.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import norm_triton
from config.schema import choose, knobs_of, split_arguments, typed
from device import choose_device, choose_dtype, copy_rate, keep_freed_memory, processor, synchronize, versions
from model import knob
from norm import EAGER, IMPLEMENTED, Norm

EPS = 1e-5
FLOOR = {  # operation: elements that must be moved per element of x, in forward and in forward + backward
    "norm": (2, 2 + 3),  # reads x, writes y; reads x and dy, writes dx
    "add + norm": (4, 4 + 4),  # reads x and branch, writes total and y; reads total and both gradients, writes one
}
KINDS = {  # operation: implementation: the norms that it has; `none` computes nothing, so there is nothing to time
    "norm": IMPLEMENTED,
    "add + norm": dict.fromkeys(("eager", "fused", "compile"), ("layernorm", "rmsnorm"))
                  | dict.fromkeys(("triton", "liger"), ("rmsnorm",)),
}
Name = tuple[str, str, str]  # operation, kind, implementation


@dataclass(frozen=True, kw_only=True)
class NormBench:
    """The options of `bench.py norm` as they are written."""

    shapes: str = knob("auto", "rows x width of x, such as 16384x768,2048x128; auto = what suits the device")
    dtypes: str = knob("auto", "of x, such as float32,bfloat16; auto = both, on CUDA the one that train.py takes")
    kinds: str = knob("all", "norms, such as rmsnorm,layernorm")
    impls: str = knob("all", "of eager, fused (PyTorch's kernel; on a CPU only LayerNorm has one), compile, triton, "
                             "liger (add + norm of Liger-Kernel); all = those that run here")
    steps: int = knob(20, "timed calls of each")
    device: str = knob("auto", "auto (CUDA, then MPS, then CPU), cpu, mps, cuda or cuda:N")


@dataclass(frozen=True)
class Row:
    """How long one norm takes one way: medians in seconds; `kept` is what its forward keeps for the backward."""

    operation: str  # of FLOOR
    kind: str
    impl: str
    forward: float  # seconds, without gradients
    both: float  # seconds of forward + backward
    kept: float  # bytes per element of x


@dataclass(frozen=True)
class Table:
    """The rows of one shape and dtype of x, and the seconds of a copy of x that was timed in turn with them."""

    shape: tuple[int, int]
    dtype: torch.dtype
    copy: float
    rows: list[Row]

    def rate(self, moved: int, seconds: float) -> float:
        """Bytes/s, if `moved` elements per element of x move in that time."""
        return moved * self.shape[0] * self.shape[1] * self.dtype.itemsize / seconds


def at_least_one(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    return steps


def in_turn(names: list, rounds: int) -> Iterator:
    """Each name once a round, every other round backwards."""
    for i in range(rounds):
        yield from (names if i % 2 else names[::-1])


def machine(device: str, *details: str) -> str:
    """What a result depends on, in one line."""
    return ", ".join([f"{device} ({processor(device)})", *details, f"{torch.get_num_threads()} threads",
                      f"torch {torch.__version__}", f"commit {versions()['commit']}"])


def norms(arguments: list[str]) -> Callable[[], None]:
    """Reads the options, and returns what measures them; ValueError for the user's mistakes."""
    places, pairs = split_arguments(arguments)
    if places:
        raise ValueError(f"bench.py norm takes only key=value, got {' '.join(places)}")
    options = NormBench(**typed(pairs, knobs_of(NormBench), "command line"))
    device, steps = choose_device(options.device), at_least_one(options.steps)
    shapes, dtypes = inputs_to_time(options, device)
    kinds = several("kinds", options.kinds, tuple(kind for kind in EAGER if kind != "none"))
    impls = impls_to_time(options.impls, device)
    names = [(operation, kind, impl) for operation, kind, impl in product(KINDS, kinds, impls)
             if kind in KINDS[operation].get(impl, ())]
    if not names:
        raise ValueError(f"impls={options.impls} has nothing of kinds={options.kinds}")
    if "triton" in impls and any(width > norm_triton.LARGEST_WIDTH for _, width in shapes):
        raise ValueError(f"triton norms at most {norm_triton.LARGEST_WIDTH} channels: leave it out of impls")
    return partial(report_norms, device, shapes, dtypes, names, steps)


def inputs_to_time(options: NormBench, device: str) -> tuple[list[tuple[int, int]], list[torch.dtype]]:
    """The shapes (rows, width) and dtypes of x."""
    on_cuda, shapes, dtypes = device.startswith("cuda"), options.shapes, options.dtypes
    if shapes == "auto":  # on a CPU: far beyond its caches, and a step of config/small.py
        shapes = "8192x768,8192x2048,8192x4096" if on_cuda else "16384x768,2048x128"
    if dtypes == "auto":
        dtypes = choose_dtype("auto", device) if on_cuda else "float32,bfloat16"
    dtypes = several("dtypes", dtypes, ("float32", "bfloat16", "float16"))
    return ([read_shape(shape) for shape in shapes.split(",")],
            [getattr(torch, choose_dtype(dtype, device)) for dtype in dtypes])


def several(key: str, text: str, choices: tuple[str, ...]) -> list[str]:
    """'a,b' -> ['a', 'b'], each one of `choices`; 'all' is all of them."""
    return list(choices) if text == "all" else list(dict.fromkeys(choose(key, t, choices) for t in text.split(",")))


def read_shape(text: str) -> tuple[int, int]:
    """'16384x768' -> (16384, 768)."""
    if not re.fullmatch(r"[1-9]\d{0,8}x[1-9]\d{0,8}", text):
        raise ValueError(f"shapes must be written ROWSxWIDTH, such as 16384x768, got {text!r}")
    rows, width = text.split("x")
    return int(rows), int(width)


def impls_to_time(text: str, device: str) -> list[str]:
    """The implementations asked for. One that does not run here is an error if it was named, else left out and told."""
    wanted = several("impls", text, ("eager", "fused", "compile", "triton", "liger"))
    reasons = {impl: why for impl in wanted if (why := why_not(impl, device))}
    if reasons and text != "all":
        raise ValueError("; ".join(f"impls={impl}: {why}" for impl, why in reasons.items()))
    for impl, why in reasons.items():
        print(f"without {impl}: {why}")
    return [impl for impl in wanted if impl not in reasons]


def why_not(impl: str, device: str) -> str | None:
    """Why the implementation does not run on this device, None where it does."""
    if impl in ("triton", "liger") and not device.startswith("cuda"):
        return f"it needs a CUDA device, this is {device}"
    try:
        if impl == "compile":
            torch.compile(torch.neg)(torch.ones(2, device=device))
        elif impl == "liger":
            liger_function()
        return norm_triton.available() if impl == "triton" else None
    except (torch._dynamo.exc.TorchDynamoException, ImportError) as error:
        return str(error).strip().splitlines()[0][:200]


@cache
def liger_function() -> Callable[..., tuple[Tensor, Tensor]]:
    """Liger-Kernel's function of (branch, x, gain, eps, offset, casting mode, in place) -> (normed, total)."""
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm
    return liger_fused_add_rms_norm


def add_norm(norm: Norm, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """(total, normed): what stands between two branches of a Decoder, [M, N] -> [M, N] both."""
    total = x + branch
    return total, norm(total)


def add_norm_triton(norm: Norm, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    return norm_triton.add_rmsnorm(x, branch, norm.gain, EPS)


def add_norm_liger(norm: Norm, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    # "gemma" is our precision: all in fp32, one cast at the end. In place it would overwrite the gradient it is given.
    normed, total = liger_function()(branch, x, norm.gain, EPS, 0.0, "gemma", False)
    return total, normed


def add_norm_function(impl: str, norm: Norm) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """add_norm of this norm, in the way that `impl` says."""
    function = {"triton": add_norm_triton, "liger": add_norm_liger}.get(impl, add_norm)
    return partial(torch.compile(function, dynamic=False) if impl == "compile" else function, norm)


@dataclass(frozen=True, eq=False)
class Arm:
    """One operation to time: `function` of `inputs`, whose outputs get the gradients `given`."""

    operation: str
    kind: str
    impl: str
    function: Callable
    inputs: tuple[Tensor, ...]
    given: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]

    def forward(self) -> None:
        with torch.no_grad():
            self.function(*self.inputs)

    def both(self) -> None:
        torch.autograd.grad(self.function(*self.inputs), (*self.inputs, *self.parameters), self.given)

    def kept(self) -> int:
        """Bytes of all that the forward keeps for the backward, each storage counted once."""
        saved = []  # so all are held until they are counted, and no address is used twice
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
            self.function(*self.inputs)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        return sum(storages.values())


def arms_on(device: str, shape: tuple[int, int], dtype: torch.dtype, names: list[Name]) -> list[Arm]:
    """The arms of these (operation, kind, implementation), all on the same tensors."""
    x, branch, d_total, d_normed = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    inputs = {"norm": (x.requires_grad_(),), "add + norm": (x, branch.requires_grad_())}
    given = {"norm": (d_normed,), "add + norm": (d_total, d_normed)}
    arms = []
    for operation, kind, impl in names:
        own = operation == "norm" or impl == "fused"  # else sum and norm are one function, of which this is the gain
        norm = Norm(kind, shape[1], EPS, impl if own else "eager").to(device)
        function = norm if operation == "norm" else add_norm_function(impl, norm)
        arms.append(Arm(operation, kind, impl, function, inputs[operation], given[operation],
                        tuple(norm.parameters())))
    return arms


def measure_norms(device: str, shape: tuple[int, int], dtype: torch.dtype, names: list[Name],
                  steps: int) -> Table:
    """Times the arms and a copy for one shape and dtype in turn: `steps` calls of each, after two that warm it up."""
    torch._dynamo.reset()  # static graphs for each shape, as in training; the second would else be a dynamic one
    arms = arms_on(device, shape, dtype, names)
    source, target = torch.randn(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype)
    calls = {"copy": lambda: target.copy_(source)}
    calls |= {(arm, part): getattr(arm, part) for arm in arms for part in ("forward", "both")}
    # All norms in one process need more graphs than a run does; past the limit "compile" would silently mean eager.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for call in [*calls.values()] * 2:
            call()
        seconds = medians(calls, device, steps)
        rows = [Row(arm.operation, arm.kind, arm.impl, seconds[arm, "forward"], seconds[arm, "both"],
                    arm.kept() / source.numel()) for arm in arms]
    return Table(shape, dtype, seconds["copy"], rows)


def medians(calls: dict[Any, Callable[[], Any]], device: str, steps: int) -> dict[Any, float]:
    """Seconds of each, called in turn.

    On CUDA 1 GiB is read before each call. That empties the L2 cache, which an input just used would still lie in, and
    leaves nothing that must be written back; meanwhile the CPU launches ahead, as it does in a training step.
    """
    evict = torch.zeros(2**28, device=device) if device.startswith("cuda") else None
    seconds = {name: [] for name in calls}
    for name in in_turn(list(calls), steps):
        seconds[name].append(seconds_of(calls[name], device, evict))
    return {name: statistics.median(times) for name, times in seconds.items()}


def seconds_of(call: Callable[[], Any], device: str, evict: Tensor | None) -> float:
    if evict is not None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        evict.sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def table_text(table: Table) -> str:
    """The table as aligned lines, one for each row."""
    rows, width = table.shape
    copy = table.rate(2, table.copy)
    part = f"{'ms':>9}{'GB/s':>8}{'of copy':>9}"
    lines = [f"{rows} x {width} {str(table.dtype).removeprefix('torch.')}: a copy takes {1000 * table.copy:.3f} ms, "
             f"{copy / 1e9:.1f} GB/s", f"{'':37}{'forward':>26}{'forward + backward':>26}{'kept':>9}",
             f"{'':37}{part}{part}{'B/elem':>9}"]
    for row in table.rows:
        cells = [f"{1000 * t:>9.3f}{table.rate(moved, t) / 1e9:>8.1f}{table.rate(moved, t) / copy:>9.0%}"
                 for moved, t in zip(FLOOR[row.operation], (row.forward, row.both), strict=True)]
        lines.append(f"{row.operation:12}{row.kind:17}{row.impl:8}{''.join(cells)}{row.kept:>9.2f}")
    return "\n".join(lines)


def report_norms(device: str, shapes: list[tuple[int, int]], dtypes: list[torch.dtype],
                 names: list[Name], steps: int) -> None:
    """Prints a table for each shape and dtype."""
    if device == "cpu":
        keep_freed_memory()
    elif device.startswith("cuda"):
        torch.cuda.set_device(device)  # the one whose stream the events time
    print(f"{machine(device)}\ncopies of 256 MiB read and write {copy_rate(device) / 1e9:.1f} GB/s; "
          f"GB/s of a norm: what it must at least read and write, by its time; medians of {steps}")
    for shape, dtype in product(shapes, dtypes):
        print("\n" + table_text(measure_norms(device, shape, dtype, names, steps)), flush=True)
