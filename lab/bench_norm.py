"""lab.bench norm: every norm, in every way there is to compute it, beside a copy of its input.

A norm does little but move memory, so its ceiling is the rate of a copy, which is timed in turn
with it. Order: what the options ask for; what is timed; the timing; the table that is printed.
"""

import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from config.command import split_arguments
from config.schema import knobs_of, parse_knobs
from lab.measure import check_count, chosen, in_turn, machine_line
from model import knob
from norm import IMPLEMENTED, NORMS, Norm
from run.machine import choose_device, choose_dtype, keep_freed_memory, synchronize

EPS = 1e-5
# operation: elements that must be moved per element of x, in the forward and in both directions
FLOOR = {
    # The forward reads x and writes y; the backward reads x and dy and writes dx.
    "norm": (2, 2 + 3),
    # The forward reads x and branch and writes total and y; the backward reads total and both of
    # their gradients and writes one, which is that of x and of branch.
    "add + norm": (4, 4 + 4),
}
# operation: implementation: the norms that have it. (`none` computes nothing, so it is not timed.)
ADD_NORM = dict.fromkeys(("eager", "fused", "compile"), ("layernorm", "rmsnorm"))
ADD_NORM["liger"] = ("rmsnorm",)
KINDS = {"norm": IMPLEMENTED, "add + norm": ADD_NORM}
Name = tuple[str, str, str]  # operation, kind, implementation


@dataclass(frozen=True, kw_only=True)
class NormBench:
    """The options of `lab.bench norm` as they are written."""

    shapes: str = knob(
        "auto", "rows x width of x, such as 16384x768,2048x128; auto = what suits the device"
    )
    dtypes: str = knob(
        "auto", "of x, such as float32,bfloat16; auto = both, on CUDA the one that train.py takes"
    )
    kinds: str = knob("all", "norms, such as rmsnorm,layernorm")
    impls: str = knob(
        "all",
        "of eager, fused (PyTorch's kernel; on a CPU only LayerNorm has one), compile, "
        "liger (add + norm of Liger-Kernel); all = those that run here",
    )
    steps: int = knob(20, "timed calls of each")
    device: str = knob("auto", "auto (CUDA, then MPS, then CPU), cpu, mps, cuda or cuda:N")


@dataclass(frozen=True)
class Row:
    """How long one norm takes when it is computed in one way: medians in seconds."""

    operation: str  # of FLOOR
    kind: str
    impl: str
    forward: float  # seconds, without gradients
    both: float  # seconds of forward + backward
    kept: float  # bytes per element of x that the forward keeps for the backward


@dataclass(frozen=True)
class Table:
    """The rows of one shape and dtype of x."""

    shape: tuple[int, int]
    dtype: torch.dtype
    copy: float  # seconds of a copy of x, timed in turn with the rows
    rows: list[Row]

    def rate(self, moved: int, seconds: float) -> float:
        """Bytes/s if `moved` elements per element of x are moved in that time."""
        return moved * self.shape[0] * self.shape[1] * self.dtype.itemsize / seconds


def norms(arguments: list[str]) -> None:
    """Times what the options ask for; ValueError for the user's mistakes."""
    places, pairs = split_arguments(arguments)
    if places:
        raise ValueError(f"lab.bench norm takes only key=value, got {' '.join(places)}")
    options = NormBench(**parse_knobs(pairs, knobs_of(NormBench), "command line"))
    check_count("steps", options.steps)
    device = choose_device(options.device)
    shapes, dtypes = inputs_to_time(options, device)
    kinds = chosen("kinds", options.kinds, tuple(kind for kind in NORMS if kind != "none"))
    impls = impls_to_time(options.impls, device)
    names = [
        (operation, kind, impl)
        for operation, kind, impl in product(KINDS, kinds, impls)
        if kind in KINDS[operation].get(impl, ())
    ]
    if not names:
        raise ValueError(f"impls={options.impls} has nothing of kinds={options.kinds}")
    report_norms(device, shapes, dtypes, names, options.steps)


def inputs_to_time(
    options: NormBench, device: str
) -> tuple[list[tuple[int, int]], list[torch.dtype]]:
    """The shapes (rows, width) and dtypes of x."""
    on_cuda, shapes, dtypes = device.startswith("cuda"), options.shapes, options.dtypes
    if shapes == "auto":  # on a CPU: one far beyond its caches, and a small one
        shapes = "8192x768,8192x2048,8192x4096" if on_cuda else "16384x768,2048x128"
    if dtypes == "auto":
        dtypes = choose_dtype("auto", device) if on_cuda else "float32,bfloat16"
    names = chosen("dtypes", dtypes, ("float32", "bfloat16", "float16"))
    return (
        [read_shape(shape) for shape in shapes.split(",")],
        [getattr(torch, choose_dtype(name, device)) for name in names],
    )


def read_shape(text: str) -> tuple[int, int]:
    """'16384x768' -> (16384, 768)."""
    if not re.fullmatch(r"[1-9]\d{0,8}x[1-9]\d{0,8}", text):
        raise ValueError(f"shapes must be written ROWSxWIDTH, such as 16384x768, got {text!r}")
    rows, width = text.split("x")
    return int(rows), int(width)


def impls_to_time(text: str, device: str) -> list[str]:
    """The implementations asked for. One that does not run here is an error if it was named; if all
    were asked for, it is left out, and a line says why."""
    wanted = chosen("impls", text, ("eager", "fused", "compile", "liger"))
    reasons = {impl: why for impl in wanted if (why := why_not(impl, device))}
    if reasons and text != "all":
        raise ValueError("; ".join(f"impls={impl}: {why}" for impl, why in reasons.items()))
    for impl, why in reasons.items():
        print(f"without {impl}: {why}")
    return [impl for impl in wanted if impl not in reasons]


def why_not(impl: str, device: str) -> str | None:
    """Why the implementation does not run on this device; None if it does."""
    if impl == "liger" and not device.startswith("cuda"):
        return f"it needs a CUDA device, this is {device}"
    import torch._dynamo  # here, since a signal in the import would make `except` fail, too

    try:
        if impl == "compile":
            torch.compile(torch.neg)(torch.ones(2, device=device))
        elif impl == "liger":
            liger_function()
    except (torch._dynamo.exc.TorchDynamoException, ImportError) as error:
        return str(error).strip().splitlines()[0][:200]
    return None


@cache
def liger_function() -> Callable[..., tuple[Tensor, Tensor]]:
    """Liger-Kernel's (branch, x, gain, eps, offset, casting mode, in place) -> (normed, total)."""
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm


def add_norm(norm: Norm, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """(total, normed): what stands between two branches of a Decoder, [M, N] -> [M, N] both."""
    total = x + branch
    return total, norm(total)


def add_norm_liger(norm: Norm, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    # "gemma" has our precision: all in fp32, and one cast at the end. In place, it would overwrite
    # the gradient that it is given.
    normed, total = liger_function()(branch, x, norm.gain, EPS, 0.0, "gemma", False)
    return total, normed


def add_norm_function(impl: str, norm: Norm) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The sum and this norm, computed as `impl` says."""
    function = add_norm_liger if impl == "liger" else add_norm
    if impl == "compile":
        function = torch.compile(function, dynamic=False)
    return partial(function, norm)


@dataclass(frozen=True, eq=False)
class Arm:
    """One operation to time: `function` of `inputs`; `given` are the gradients of its outputs."""

    operation: str
    kind: str
    impl: str
    function: Callable
    inputs: tuple[Tensor, ...]
    given: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        """The outputs, without what a backward would need."""
        with torch.no_grad():
            return self.function(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of the inputs and of the parameters."""
        outputs = self.function(*self.inputs)
        return torch.autograd.grad(outputs, (*self.inputs, *self.parameters), self.given)

    def kept(self) -> int:
        """Bytes of all that the forward keeps for the backward, each storage counted once."""
        saved = []  # holds all of them until they are counted, so that no address is used twice

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.function(*self.inputs)
        storages = [tensor.untyped_storage() for tensor in saved]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def arms_on(
    device: str, shape: tuple[int, int], dtype: torch.dtype, names: list[Name]
) -> list[Arm]:
    """The arms of these (operation, kind, implementation), all on the same tensors."""
    x, branch, d_total, d_normed = (
        torch.randn(shape, device=device, dtype=dtype) for _ in range(4)
    )
    inputs = {"norm": (x.requires_grad_(),), "add + norm": (x, branch.requires_grad_())}
    given = {"norm": (d_normed,), "add + norm": (d_total, d_normed)}
    arms = []
    for name in names:
        operation, kind, impl = name
        # Otherwise sum and norm are one function, and the norm only holds its gain.
        norm_alone = operation == "norm" or impl == "fused"
        norm = Norm(kind, shape[1], EPS, impl if norm_alone else "eager").to(device)
        function = norm if operation == "norm" else add_norm_function(impl, norm)
        parameters = tuple(norm.parameters())
        arms.append(Arm(*name, function, inputs[operation], given[operation], parameters))
    return arms


def measure_norms(
    device: str, shape: tuple[int, int], dtype: torch.dtype, names: list[Name], steps: int
) -> Table:
    """Times the arms and a copy for one shape and dtype in turn: `steps` calls of each, after two
    that warm it up."""
    torch._dynamo.reset()  # else the second shape would get a dynamic graph, unlike in training
    arms = arms_on(device, shape, dtype, names)
    source = torch.randn(shape, device=device, dtype=dtype)
    target = torch.empty(shape, device=device, dtype=dtype)
    calls = {"copy": lambda: target.copy_(source)}
    calls |= {(arm, part): getattr(arm, part) for arm in arms for part in ("forward", "both")}
    # All norms in one process need more graphs than a run does. Beyond the compiler's usual limit
    # "compile" would silently mean eager.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for call in [*calls.values()] * 2:
            call()
        seconds = medians(calls, device, steps)
        rows = []
        for arm in arms:
            forward, both = seconds[arm, "forward"], seconds[arm, "both"]
            kept = arm.kept() / source.numel()
            rows.append(Row(arm.operation, arm.kind, arm.impl, forward, both, kept))
    return Table(shape, dtype, seconds["copy"], rows)


def medians(calls: dict[Any, Callable[[], Any]], device: str, steps: int) -> dict[Any, float]:
    """Seconds of each call. The calls are made in turn.

    On CUDA 1 GiB is read before each call. That empties the L2 cache, where the input of the call
    would still lie, and leaves nothing in it that must be written back. While the GPU reads, the
    CPU launches ahead, as it does in a training step."""
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


@cache
def copy_rate(device: str, size: int = 2**28) -> float:
    """Bytes/s, read plus written, of copies of `size` bytes on this device, measured once: the best
    of five. It is the ceiling of whatever only moves memory. (Smaller blocks would stay in a cache,
    which is faster than memory.)"""
    # Ones, because untouched zeros may all be one page of memory, which lies in the cache.
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target, seconds = source.clone(), []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):  # so that waiting for a CUDA device weighs little
            target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 4 * 2 * size / min(seconds)


def table_text(table: Table) -> str:
    """The table as aligned lines, one for each row."""
    (rows, width), dtype = table.shape, str(table.dtype).removeprefix("torch.")
    copy = table.rate(2, table.copy)
    part = f"{'ms':>9}{'GB/s':>8}{'of copy':>9}"
    lines = [
        f"{rows} x {width} {dtype}: a copy takes {1000 * table.copy:.3f} ms, {copy / 1e9:.1f} GB/s",
        f"{'':37}{'forward':>26}{'forward + backward':>26}{'kept':>9}",
        f"{'':37}{part}{part}{'B/elem':>9}",
    ]
    for row in table.rows:
        line = f"{row.operation:12}{row.kind:17}{row.impl:8}"
        for moved, seconds in zip(FLOOR[row.operation], (row.forward, row.both), strict=True):
            rate = table.rate(moved, seconds)
            line += f"{1000 * seconds:>9.3f}{rate / 1e9:>8.1f}{rate / copy:>9.0%}"
        lines.append(f"{line}{row.kept:>9.2f}")
    return "\n".join(lines)


def report_norms(
    device: str,
    shapes: list[tuple[int, int]],
    dtypes: list[torch.dtype],
    names: list[Name],
    steps: int,
) -> None:
    """Prints a table for each shape and dtype."""
    if device == "cpu":
        keep_freed_memory()
    elif device.startswith("cuda"):
        torch.cuda.set_device(device)  # CUDA events time the stream of the current device
    print(machine_line(device))
    print(
        f"copies of 256 MiB read and write {copy_rate(device) / 1e9:.1f} GB/s; GB/s of a norm: "
        f"what it must at least read and write, divided by its time; medians of {steps}"
    )
    if any(impl == "compile" for _, _, impl in names):
        print("compiling for each shape and dtype, which takes a while", file=sys.stderr)
    for shape, dtype in product(shapes, dtypes):
        print("\n" + table_text(measure_norms(device, shape, dtype, names, steps)), flush=True)
