"""python -m lab.bench: how fast this program is on this machine, also beside other programs.

Whatever is compared is timed in turn, every other round backwards, so that a machine whose speed
drifts drifts for all alike. The ceiling is measured here and now: for a training step it is the
rate of large matrix products; for sampling, which reads every weight for each token, the rate of
reading; for a norm the rate of a copy.

Order: main; a training step; sampling. The other benches have files of their own.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Literal

if not __package__:  # started as a file, so Python would not find the imports below
    hint = "run it as a module, from the root of the repository: python -m lab.bench"
    print(f"error: {hint}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":  # before the imports that take seconds
    from config.command import start

    start()

import torch
from torch import Tensor

from config.command import one_line, run_command, user_errors
from config.help import help_text, training_help
from config.schema import parse_value
from lab.bench_beside import NanoBench, OwnProcess, check_comparable, nanogpt
from lab.bench_gpu import gpu
from lab.bench_llama2c import llama2c_rates
from lab.bench_memory import MemoryBench, memory
from lab.bench_norm import NormBench, norms, seconds_of, why_not
from lab.gpu_parts import GpuBench
from lab.measure import (
    as_arguments,
    check_count,
    chosen,
    fresh_run,
    machine_line,
    print_columns,
    read_options,
    seconds_of_start,
    seconds_of_step,
    spread,
    values_in_turn,
)
from model import Decoder, knob, parameter_count
from run.machine import (
    autocast,
    choose_device,
    choose_dtype,
    flops_per_token,
    measure_matmul_rate,
    peak_memory,
    total_memory,
)
from run.setup import Run, read_config
from sample import SampleOptions, generate, prepare_for_inference

USAGE = """\
python -m lab.bench WHAT [config/PRESET.py] [key=value ...]

Without WHAT, everything but gpu that can be measured here."""
SMALL = "n_layer=4 n_head=4 n_embd=128 n_hidden=384 block_size=64 batch_size=12 optimizer=adamw"
LARGE = "n_layer=6 n_head=6 n_embd=384 n_hidden=1024 block_size=256 batch_size=16 optimizer=adamw"
LLAMA = "vocab_size=32000 tie_embeddings=true compile=true"
M15 = f"n_layer=6 n_head=6 n_embd=288 n_hidden=768 block_size=256 {LLAMA}"
M110 = f"n_layer=12 n_head=12 n_embd=768 n_hidden=2048 block_size=1024 {LLAMA}"
BESIDE = "beside=transformers"
EVERYTHING = [
    f"train {SMALL} dtype=float32 {BESIDE}",
    f"train {LARGE} dtype=float32 {BESIDE}",
    f"train {SMALL} dtype=auto {BESIDE}",
    f"train {LARGE} dtype=auto {BESIDE}",
    f"sample {M15} batches=1,16 tokens=128 {BESIDE}",
    f"sample {M110} batches=1,16 steps=3 {BESIDE}",
    "norm",
    "nanogpt",
    "memory rounds=3",
]


def main(argv: list[str]) -> int:
    """Returns the exit code, 0; an error of the user ends with 2, Ctrl-C with 130. The measurements
    are printed."""
    if {"-h", "--help"} & set(argv):
        benches = [help_text(f"{name}: {what}", kind) for name, (_, kind, what) in BENCHES.items()]
        every_knob = "Every knob of a run, for all that can be given a preset:"
        print(USAGE, *benches, training_help(every_knob), sep="\n\n")
        return 0
    with user_errors():
        if not argv:
            for line in EVERYTHING:
                attempt(line.split())
        elif argv[0] in BENCHES:
            run_bench(argv)
        else:
            raise ValueError(f"lab.bench measures {', '.join(BENCHES)}, got {argv[0]!r}")
    return 0


def run_bench(line: list[str]) -> None:
    what, *arguments = line
    function, _, _ = BENCHES[what]
    function(arguments)


def attempt(line: list[str]) -> None:
    """Measures, or says why that cannot be done here. If others beside ours were asked for, it then
    measures without them."""
    print(f"\n$ python -m lab.bench {' '.join(line)}", flush=True)
    try:
        run_bench(line)
    except (ValueError, OSError) as error:
        print(f"not measured: {one_line(error)}", flush=True)
        if BESIDE in line:
            attempt([word for word in line if word != BESIDE])


# -- train: a step of a run ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """The options of `lab.bench train` as they are written; every knob of a run can be set, too."""

    steps: int = knob(20, "timed steps of each way, after the first")
    beside: Literal["none", "transformers"] = knob(
        "none", "transformers = a plain loop around its model, too"
    )


def training(arguments: list[str]) -> None:
    """Times train.py's own step, eager and compiled, and transformers', in turn."""
    options, places, knobs = read_options(TrainBench, arguments)
    config = read_config([*places, *as_arguments(knobs)])
    with_others = options.beside == "transformers"
    if with_others:
        check_comparable(config)
    runs = {name: fresh_run(config, compile=name == "compiled") for name in ("eager", "compiled")}
    theirs = {}
    if with_others:
        theirs = {"transformers": runs["eager"], "transformers compiled": runs["compiled"]}
        if reason := why_not("compile", runs["eager"].config.device):
            print(f"not measured: transformers compiled: {reason}")
            del theirs["transformers compiled"]
    with ExitStack() as processes:
        others = {}
        for name, run in theirs.items():
            process = OwnProcess("step", run.config, dataset=run.data.folder)
            others[name] = processes.enter_context(process)
        report_training(runs, others, options.steps)


def report_training(
    runs: dict[str, Run], others: dict[str, Callable[[], float]], steps: int
) -> None:
    """Times `steps` steps of each in turn and prints a line for each."""
    config, model = runs["eager"].config, runs["eager"].config.model
    tokens = config.batch_size * model.block_size
    print(
        f"{parameter_count(model):,} parameters, {config.batch_size} x {model.block_size} tokens, "
        f"{config.optimizer}; {machine_line(config.device, config.dtype)}"
    )
    first = {name: seconds_of_start(run) for name, run in runs.items()}
    first |= {name: step() for name, step in others.items()}
    calls = {name: partial(seconds_of_step, run) for name, run in runs.items()}
    # The rate of products is measured in turn, too, so that a busy moment slows both alike.
    products = {"products": partial(measure_matmul_rate, config.device, config.dtype, 0.05)}
    seconds = values_in_turn(calls | others | products, steps)
    rates = seconds.pop("products")
    rate = median(rates)
    print(f"matrix products: {spread(rates, 1e-9)} GFLOP/s")
    yardsticks = [median(seconds[name]) for name in others or ["eager"]]
    ratios = [f"of {name}" for name in others or ["eager"]]
    rows = [("", "first step", "ms of a step", "tokens/s", *ratios, "of matmul rate")]
    for name, times in seconds.items():
        given_up = name == "compiled" and not runs[name].config.compile
        label = "eager (no compiler)" if given_up else name
        step = median(times)
        row = [label, f"{first[name]:.1f} s", spread(times, 1000), f"{tokens / step:,.0f}"]
        row += [f"{other / step:.2f}" for other in yardsticks]
        row += [f"{tokens * flops_per_token(model) / step / rate:.0%}"]
        rows.append(tuple(row))
    print_columns(rows)
    print(f"peak memory of ours together: {peak_memory(config.device) / 1e9:.2f} GB")


# -- sample: the tokens of generate ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampleBench:
    """The options of `lab.bench sample` as they are written: what sample.py makes of the preset's
    model with random weights. Every knob of a run can be set, too."""

    dtypes: str = knob(
        "auto",
        "of the matrix products, such as float32,bfloat16; auto = float32 and sample.py's own",
    )
    quantize: str = knob("all", "of none, int8; all = both")
    compile: bool = knob(False, "each of these compiled, too")
    batches: str = knob("1,4", "samples at once, each of these")
    tokens: int = knob(32, "new tokens of each sample")
    steps: int = knob(5, "timed rounds of each")
    beside: Literal["none", "transformers"] = knob(
        "none", "transformers = its generate in float32, too"
    )
    llama2c: str = knob("", "a checkout of llama2.c: for one sample its run and its runq, too")


@dataclass(frozen=True)
class Way:
    """A way to make tokens."""

    rate: Callable[[int], float]  # samples at once -> tokens/s
    size: int  # bytes of the matrices that are read for each token


def sampling(arguments: list[str]) -> None:
    """Times sample.py's generate in each way, and others', in turn, for each number of samples at
    once."""
    options, places, knobs = read_options(SampleBench, arguments)
    torch._dynamo.config.recompile_limit = 256  # one step is compiled for each way, batch and model
    batches = [parse_value("batches", text, int) for text in options.batches.split(",")]
    for batch in batches:
        check_count("batches", batch)
    config = read_config([*places, *as_arguments(knobs)])
    device = choose_device(config.device)
    model = replace(config.model, vocab_size=config.model.vocab_size or 32000)
    config = replace(config, model=model, device=device)
    ways = ways_to_sample(options, device)
    copies = 1 + len({way.quantize if way.quantize != "none" else way.dtype for way in ways})
    needed, room = 4 * parameter_count(model) * copies, total_memory(device)
    if needed > room:
        raise ValueError(
            f"{copies} copies of {parameter_count(model) / 1e9:.1f} billion parameters need about "
            f"{needed / 1e9:,.0f} GB, {device} has {room / 1e9:,.0f} GB: lower n_embd, n_layer or "
            f"vocab_size, or ask for fewer dtypes and quantize=none"
        )
    if options.beside == "transformers":
        check_comparable(config)
    base, theirs = Decoder(model), None
    with ExitStack() as processes:
        if options.beside == "transformers":
            theirs = processes.enter_context(OwnProcess("rate", config))
        found = our_ways(base, ways, options.tokens)
        if theirs:
            found["transformers"] = Way(partial(theirs, options.tokens), matrix_bytes(base))
        alone = {}  # makes one sample at once
        if options.llama2c:
            work = processes.enter_context(tempfile.TemporaryDirectory())
            rates = llama2c_rates(Path(options.llama2c), model, Path(work))
            for name, rate in rates.items():
                size = matrix_bytes(base) // (4 if name == "runq" else 1)
                alone[f"llama2.c {name}"] = Way(partial(rate, options.tokens), size)
        limit = read_rate(device)
        print(
            f"{parameter_count(model):,} parameters, vocab {model.vocab_size:,}, {options.tokens} "
            f"tokens after the first; {machine_line(device)}\n"
            f"reading 256 MB: {limit / 1e9:.1f} GB/s"
        )
        for batch in batches:
            report_sampling(batch, found | alone if batch == 1 else found, options.steps, limit)


def ways_to_sample(options: SampleBench, device: str) -> list[SampleOptions]:
    """Every combination of the dtypes, kinds of quantization, and compiled or not."""
    dtypes = options.dtypes
    if dtypes == "auto":
        dtypes = f"float32,{choose_dtype('auto', device)}"
    dtypes = chosen("dtypes", dtypes, ("float32", "bfloat16", "float16"))
    dtypes = [choose_dtype(dtype, device) for dtype in dtypes]
    kinds = chosen("quantize", options.quantize, ("none", "int8"))
    compiled = [False, True] if options.compile else [False]
    return [
        SampleOptions(device=device, dtype=dtype, quantize=kind, compile=compile)
        for dtype, kind, compile in product(dtypes, kinds, compiled)
    ]


def our_ways(base: Decoder, ways: list[SampleOptions], tokens: int) -> dict[str, Way]:
    """Each way by its name. Ways that store their matrices alike share one copy of the model: a
    copy for each would need much memory."""
    models, found = {}, {}
    for way in ways:
        stored = way.quantize if way.quantize != "none" else (way.dtype, way.compile)
        if stored not in models:
            models[stored] = copy.deepcopy(base).to(way.device)
            prepare_for_inference(models[stored], way)
        name = way.dtype + " int8" * (way.quantize == "int8") + " compiled" * way.compile
        rate = partial(sampling_rate, models[stored], way, tokens)
        found[name] = Way(rate, matrix_bytes(models[stored]))
    return found


def report_sampling(batch: int, ways: dict[str, Way], steps: int, limit: float) -> None:
    """Times `steps` rounds of all ways in turn and prints a line for each. `limit` is the rate, in
    bytes/s, at which memory can be read."""
    calls = {name: partial(way.rate, batch) for name, way in ways.items()}
    rates = values_in_turn(calls, steps)
    first = median(next(iter(rates.values())))
    rows = [("", "samples", "tokens/s", "of the first", "matrices", "read at", "of the limit")]
    for name, found in rates.items():
        size, rate = ways[name].size, median(found)
        read = size * rate / batch  # one reading serves all samples
        row = [name, f"{batch}", spread(found, 1, int(rate < 20)), f"{rate / first:.2f}"]
        row += [f"{size / 1e6:,.0f} MB", f"{read / 1e9:.1f} GB/s", f"{read / limit:.0%}"]
        rows.append(tuple(row))
    print_columns(rows)


def sampling_rate(model: Decoder, way: SampleOptions, tokens: int, batch: int) -> float:
    """Tokens/s of `batch` samples. The first two tokens are not timed: the first reads the prompt,
    and at the second the step may be compiled."""
    with autocast(way.device, way.dtype):
        making = generate(model, [0], tokens + 2, num_samples=batch, compile=way.compile)
        next(making), next(making)
        start = time.perf_counter()
        for _ in making:  # each id is on the CPU when it comes, so the device has finished
            pass
        return batch * tokens / (time.perf_counter() - start)


def matrix_bytes(model: Decoder) -> int:
    """Bytes of all matrices that are read for a token. Of the embedding only a row is read, so it
    does not count unless it is the head, too."""
    head = model.embed if model.head is None else model.head
    weights = [getattr(module, "weight", None) for module in (*model.blocks.modules(), head)]
    matrices = [weight for weight in weights if isinstance(weight, Tensor)]
    return sum(matrix.numel() * matrix.element_size() for matrix in matrices)


@cache
def read_rate(device: str, size: int = 2**28) -> float:
    """Bytes/s at which memory is read: the best of several sums of `size` bytes, and of their
    products with a vector."""
    matrix = torch.ones(2**12, size // 2**14, device=device)
    vector = torch.ones(matrix.shape[1], device=device)
    reads = (matrix.sum, lambda: matrix @ vector)
    return size / min(seconds_of(read, device, None) for _ in range(5) for read in reads)


BENCHES = {  # the function, its options, and what it measures
    "train": (training, TrainBench, "a step of train.py, eager and compiled"),
    "sample": (sampling, SampleBench, "tokens of sample.py, of a model with random weights"),
    "norm": (norms, NormBench, "every norm, and residual sums with the norm after, in every way"),
    "nanogpt": (nanogpt, NanoBench, "FOLDER TEXT: time to loss; FOLDER is a checkout of nanoGPT"),
    "memory": (memory, MemoryBench, "of a training step, ours and transformers'"),
    "gpu": (gpu, GpuBench, "whether everything works on this GPU, and how fast, in eight minutes"),
}


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
