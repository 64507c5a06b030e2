"""Measure this program on this machine:  python bench.py [WHAT] [options]  (--help lists them; alone: everything).

All that is compared is timed in turn, every other round backwards (A B B A ...), so that a machine whose speed drifts
drifts for all alike. The ceiling is measured here and now: for a step of train.py it is the rate of large matrix
products, for sampling, which reads every weight for each token, the rate of reading, and for a norm that of a copy.
"""

import copy
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import bench_beside as beside
import bench_cost as costs
import bench_plan
from bench_beside import fresh_run, middle, own_options, print_table, spread, values_in_turn, written
from bench_norm import NormBench, at_least_one, machine, norms, seconds_of, several, why_not
from config.schema import Config, convert, help_text, one_line, print_help, user_errors
from cost import flops_per_token, parameter_count
from device import autocast, choose_device, choose_dtype, matmul_rate, peak_memory
from generate import generate
from model import Decoder, ModelConfig, knob
from run import Run, read_config
from sample import SampleOptions, for_inference
from train import first_step, timed_step

USAGE = "python bench.py WHAT [config/PRESET.py] [key=value ...]\n\nWithout WHAT, everything that can be measured here."
M15 = "n_layer=6 n_head=6 n_embd=288 n_hidden=768 block_size=256 vocab_size=32000 tie_embeddings=true"
M110 = "n_layer=12 n_head=12 n_embd=768 n_hidden=2048 block_size=1024 vocab_size=32000 tie_embeddings=true"
M8030 = ("n_layer=32 n_head=32 n_kv_head=8 n_embd=4096 n_hidden=14336 block_size=8192 vocab_size=128256 "
         "tie_embeddings=false activation_checkpointing=true")  # Llama 3.1 8B
BESIDE = "beside=transformers"
EVERYTHING = [line.split() for line in (
    *(f"train {shape} dtype={dtype} optimizer=adamw {BESIDE}" for dtype in ("float32", "auto") for shape in (
        "n_layer=4 n_head=4 n_embd=128 n_hidden=384 block_size=64 batch_size=12",
        "n_layer=6 n_head=6 n_embd=384 n_hidden=1024 block_size=256 batch_size=16")),
    f"sample {M15} batches=1,16 tokens=128 compile=true {BESIDE}",
    f"sample {M110} batches=1,16 steps=3 compile=true {BESIDE}",
    f"sample {M15} batches=1 tokens=128 llama2c=run", f"sample {M110} batches=1 steps=3 llama2c=run", "norm",
    "nanogpt", "memory rounds=3", "growth", "prepare rounds=3", "start steps=20 rounds=5",
    f"plan {M8030} batch_size=256 gpus=64 flops=989e12 efficiency=0.393 memory=80")]  # efficiency: test_bench_plan.py


def main(argv: list[str]) -> int:
    """Returns the exit code, 0; the user's errors leave with 2, Ctrl-C with 130. What was measured is printed."""
    if {"-h", "--help"} & set(argv):
        print_help(USAGE, *(help_text(f"{name}: {about}", kind) for name, (_, kind, about) in BENCHES.items()),
                   help_text("Every knob of a run, for all that can be given a preset:", Config, ModelConfig))
        return 0
    with user_errors():
        if argv and argv[0] not in BENCHES:
            raise ValueError(f"bench.py measures {', '.join(BENCHES)}, got {argv[0]!r}")
        if argv:
            BENCHES[argv[0]][0](argv[1:])
        for line in EVERYTHING if not argv else []:
            attempt(line)
    return 0


def attempt(line: list[str]) -> None:
    """Measures, or says why that cannot be done here; then without the others, if they were asked for."""
    print(f"\n$ python bench.py {' '.join(line)}", flush=True)
    try:
        BENCHES[line[0]][0](line[1:])
    except (ValueError, OSError) as error:
        print(f"not measured: {one_line(error)}", flush=True)
        if BESIDE in line:
            attempt([word for word in line if word != BESIDE])


# -- train: the step of a run ------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """The options of `bench.py train` as they are written; every knob of a run can be set, too."""

    steps: int = knob(20, "timed steps of each way, after the first")
    beside: Literal["none", "transformers"] = knob("none", "transformers = a plain loop around its model, too")


def training(arguments: list[str]) -> None:
    """Times train.py's own step, eager and compiled, and transformers', in turn."""
    options, places, knobs = own_options(TrainBench, arguments)
    config, theirs = read_config([*places, *written(knobs)]), {}
    if options.beside == "transformers":
        beside.check_comparable(config)
    runs = {name: fresh_run(config, compile=name == "compiled") for name in ("eager", "compiled")}
    if options.beside == "transformers":
        theirs = {"transformers": runs["eager"], "transformers compiled": runs["compiled"]}
        if reason := why_not("compile", runs["eager"].config.device):
            print(f"not measured: transformers compiled: {reason}")
            del theirs["transformers compiled"]
    with ExitStack() as processes:
        others = {name: processes.enter_context(beside.OwnProcess("step", run.config, dataset=run.data.folder))
                  for name, run in theirs.items()}
        report_training(runs, others, options.steps)


def report_training(runs: dict[str, Run], others: dict[str, Callable[[], float]], steps: int) -> None:
    """Times `steps` steps of each in turn and prints a line for each."""
    config = runs["eager"].config
    tokens, rate = config.batch_size * config.model.block_size, matmul_rate(config.device, config.dtype)
    print(f"{parameter_count(config.model):,} parameters, {config.batch_size} x {config.model.block_size} tokens, "
          f"{config.optimizer}; {machine(config.device, config.dtype)}\nmatrix products: {rate / 1e9:,.0f} GFLOP/s")
    first = {name: first_step(run)[-1] for name, run in runs.items()} | {name: step() for name, step in others.items()}
    seconds = values_in_turn({name: partial(lambda run: timed_step(run)[-1], run) for name, run in runs.items()}
                             | others, steps)
    like = [*others] or ["eager"]
    rows = [("", "first step", "ms of a step", "tokens/s", *(f"of {name}" for name in like), "of matmul rate")]
    for name, times in seconds.items():
        given_up = name == "compiled" and not runs[name].config.compile
        rows.append(("eager (no compiler)" if given_up else name, f"{first[name]:.1f} s",
                     spread(times, 1000), f"{tokens / middle(times):,.0f}",
                     *(f"{middle(seconds[other]) / middle(times):.2f}" for other in like),
                     f"{tokens * flops_per_token(config.model) / middle(times) / rate:.0%}"))
    print_table(rows)
    print(f"peak memory of ours together: {peak_memory(config.device) / 1e9:.2f} GB")


# -- sample: the tokens of generate ------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class SampleBench:
    """The options of `bench.py sample` as they are written: what sample.py makes of the preset's model, untrained."""

    dtypes: str = knob("auto", "of the matrix products, such as float32,bfloat16; auto = float32 and sample.py's own")
    quantize: str = knob("all", "of none, int8; all = both")
    compile: bool = knob(False, "each of these compiled, too")
    batches: str = knob("1,4", "samples at once, each of these")
    tokens: int = knob(32, "new tokens of each sample")
    steps: int = knob(5, "timed rounds of each")
    beside: Literal["none", "transformers"] = knob("none", "transformers = its generate in float32, too")
    llama2c: str = knob("", "path of llama2.c's program run, to be measured too, with one sample; '' = not")


def sampling(arguments: list[str]) -> None:
    """Times sample.py's generate in each way, and others', in turn, for each number of samples at once."""
    options, places, knobs = own_options(SampleBench, arguments)
    torch._dynamo.config.recompile_limit = 256  # one step is compiled for each way, batch and model
    batches = [at_least_one(convert("batches", text, int)) for text in options.batches.split(",")]
    run = read_config([*places, *written(knobs)])
    device = choose_device(run.device)
    dtypes = options.dtypes if options.dtypes != "auto" else f"float32,{choose_dtype('auto', device)}"
    dtypes = [choose_dtype(d, device) for d in several("dtypes", dtypes, ("float32", "bfloat16", "float16"))]
    kinds, compiled = several("quantize", options.quantize, ("none", "int8")), sorted({False, options.compile})
    ways = [SampleOptions(device=device, dtype=dtype, quantize=kind, compile=compile)
            for dtype, kind, compile in product(dtypes, kinds, compiled)]
    config = dataclasses.replace(run.model, vocab_size=run.model.vocab_size or 32000)
    base, run = Decoder(config), dataclasses.replace(run, model=config, device=device)
    size, models, hf = matrix_bytes(base), {}, None
    if options.beside == "transformers":
        beside.check_comparable(run)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        if options.beside == "transformers":
            hf = processes.enter_context(beside.OwnProcess("rate", run))
        in_c = beside.llama2c_rate(options.llama2c, base, Path(folder)) if options.llama2c else None
        for way in ways:  # each model once: several of a billion parameters are a lot
            if stored(way) not in models:
                models[stored(way)] = copy.deepcopy(base).to(device)
                for_inference(models[stored(way)], way)
        limit = read_rate(device)
        print(f"{parameter_count(config):,} parameters, vocab {config.vocab_size:,}, {options.tokens} tokens after the "
              f"first; {machine(device)}\nreading 256 MB: {limit / 1e9:.1f} GB/s")
        for batch in batches:
            calls = {way.dtype + " int8" * (way.quantize == "int8") + " compiled" * way.compile: (
                partial(sampling_rate, models[stored(way)], way, batch, options.tokens),
                matrix_bytes(models[stored(way)])) for way in ways}
            if hf:
                calls["transformers"] = partial(hf, batch, options.tokens), size
            if in_c and batch == 1:
                calls["llama2.c"] = partial(in_c, options.tokens), size
            report_sampling(batch, calls, options.steps, limit)


def report_sampling(batch: int, calls: dict[str, tuple[Callable[[], float], int]], steps: int, limit: float) -> None:
    """A line for each way to make tokens: a function that returns tokens/s, and the bytes of its matrices."""
    rates = values_in_turn({name: call for name, (call, _) in calls.items()}, steps)
    first = middle(next(iter(rates.values())))
    rows = [("", "samples", "tokens/s", "of the first", "matrices", "read at", "of the limit")]
    for name, found in rates.items():
        size, rate = calls[name][1], middle(found)
        rows.append((name, f"{batch}", spread(found, 1, int(rate < 20)), f"{rate / first:.2f}", f"{size / 1e6:,.0f} MB",
                     f"{size * rate / batch / 1e9:.1f} GB/s", f"{size * rate / batch / limit:.0%}"))
    print_table(rows)


def stored(way: SampleOptions) -> tuple[str, bool]:
    """What the matrices are in memory."""
    return (way.dtype, way.compile) if way.quantize == "none" else (way.quantize, False)


def sampling_rate(model: Decoder, way: SampleOptions, batch: int, tokens: int) -> float:
    """Tokens/s of `batch` samples, less the first two: one reads the prompt, one may be compiled for."""
    with autocast(way.device, way.dtype):
        making = generate(model, [0], tokens + 2, num_samples=batch, compile=way.compile)
        next(making), next(making)
        start = time.perf_counter()
        for _ in making:  # each is on the CPU when it comes, so the device has finished
            pass
        return batch * tokens / (time.perf_counter() - start)


def matrix_bytes(model: Decoder) -> int:
    """Bytes of all matrices that are read for a token: not the embedding, of which that is a row."""
    head = model.embed if model.head is None else model.head
    weights = [getattr(module, "weight", None) for module in (*model.blocks.modules(), head)]
    return sum(weight.numel() * weight.element_size() for weight in weights if isinstance(weight, Tensor))


@cache
def read_rate(device: str, size: int = 2**28) -> float:
    """Bytes/s at which memory is read: the best of sums over `size` bytes, and of their products with a vector."""
    matrix = torch.ones(2**12, size // 2**14, device=device)
    vector = torch.ones(matrix.shape[1], device=device)
    reads = (matrix.sum, lambda: matrix @ vector)
    return size / min(seconds_of(read, device, None) for _ in range(5) for read in reads)


BENCHES = {  # what does it, its options, and what it is
    "train": (training, TrainBench, "a step of train.py, eager and compiled; beside these, every knob of a run"),
    "sample": (sampling, SampleBench, "tokens that sample.py makes with random weights of a preset's model"),
    "norm": (lambda rest: norms(rest)(), NormBench, "every norm, and residual sums with the norm after, in every way"),
    "nanogpt": (beside.nanogpt, beside.NanoBench, "FOLDER TEXT: time to loss; FOLDER is a checkout of nanoGPT"),
    "memory": (costs.memory, costs.ProcessBench, "of a training step, ours and transformers'"),
    "growth": (costs.growth, costs.ProcessBench, "time and memory of a step against parameters, context and batch"),
    "prepare": (costs.preparing, costs.PrepareBench, "[TEXT]: data/prepare.py and a plain loop"),
    "start": (costs.starting, costs.ProcessBench, "of train.py until it has done a step, and what is around a step"),
    "plan": (bench_plan.planning, bench_plan.PlanBench, "many devices, computed; beside these, every knob of a run")}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
