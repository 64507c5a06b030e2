"""Measure this program on this machine:  python bench.py train|sample|norm [options]  (--help lists them).

All that is compared is timed in turn, every other round backwards (A B B A ...), so that a machine whose speed drifts
drifts for all alike. The ceiling is measured here and now: for a step of train.py it is the rate of large matrix
products, for sampling, which reads every weight for each token, and for a norm it is the rate of a copy.
"""

import copy
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from torch import Tensor

from bench_norm import NormBench, at_least_one, in_turn, machine, norms, several
from config.schema import Config, convert, help_text, knobs_of, split_arguments, typed, user_errors
from cost import flops_per_token, parameter_count
from device import autocast, choose_device, choose_dtype, copy_rate, matmul_rate, peak_memory
from model import Decoder, ModelConfig, knob
from run import Run, read_config, set_up
from sample import SampleOptions, for_inference, generate
from train import first_step, timed_step

USAGE = """python bench.py train [config/PRESET.py] [steps=20] [key=value ...]
python bench.py sample [config/PRESET.py] [key=value ...]
python bench.py norm [key=value ...]

norm: every norm, and the residual sum with the norm after it, in every way there is to compute them. Options:"""
SAMPLE_USAGE = "sample: tokens that sample.py makes with random weights of the preset's model. Options:"
TRAIN_USAGE = """train: a step of train.py, eager and compiled. steps=20 are timed of each way, after the first.
Every knob of a run can be set, for sample too:"""


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 2 for the user's error, or 130 after Ctrl-C."""
    if not argv or {"-h", "--help"} & set(argv):
        print(help_text(USAGE, NormBench), help_text(SAMPLE_USAGE, SampleBench),
              help_text(TRAIN_USAGE, Config, ModelConfig), sep="\n\n")
        return 0
    with user_errors():
        what, *rest = argv
        if what not in BENCHES:
            raise ValueError(f"bench.py measures {', '.join(BENCHES)}, got {what!r}")
        measure = BENCHES[what](rest)
    try:
        measure()
    except KeyboardInterrupt:  # what was measured is printed
        return 130
    return 0


# -- train: the step of a run ------------------------------------------------------------------------------------------

def training(arguments: list[str]) -> Callable[[], None]:
    """Sets the runs up, and returns what measures them; ValueError for the user's mistakes."""
    _, pairs = split_arguments(arguments)
    steps = at_least_one(convert("steps", pairs.get("steps", "20"), int))
    config = read_config([a for a in arguments if not a.removeprefix("--").startswith("steps=")])
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_to_time(dataclasses.replace(config, out_dir=str(Path(folder) / "run"), resume="no"))
    return partial(report_training, runs, steps)


def runs_to_time(config: Config) -> dict[str, Run]:
    """The same run twice, eager and compiled."""
    return {name: set_up(dataclasses.replace(config, compile=compiled))
            for name, compiled in (("eager", False), ("compiled", True))}


def report_training(runs: dict[str, Run], steps: int) -> None:
    """Times `steps` steps of each run in turn and prints a line for each."""
    config = runs["eager"].config
    tokens = config.batch_size * config.model.block_size
    rate = matmul_rate(config.device, config.dtype)
    print(f"{parameter_count(config.model):,} parameters, {config.batch_size} x {config.model.block_size} tokens, "
          f"{config.optimizer}; {machine(config.device, config.dtype)}\nmatrix products: {rate / 1e9:,.0f} GFLOP/s\n"
          f"{'':10}{'first step':>12}{'median':>10}{'quartiles':>16}{'tokens/s':>12}{'of matmul rate':>16}")
    first = {name: first_step(run)[-1] for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in in_turn(list(runs), steps):
        seconds[name].append(timed_step(runs[name])[-1])
    for name, times in seconds.items():
        median = statistics.median(times)
        low, _, high = statistics.quantiles(times, n=4) if steps > 1 else (median,) * 3
        share = tokens * flops_per_token(config.model) / median / rate
        name_now = name if runs[name].config.compile == (name == "compiled") else "eager (no compiler)"
        print(f"{name_now:10}{first[name]:>10.1f} s{1000 * median:>7.0f} ms{1000 * low:>8.0f} -{1000 * high:>5.0f} ms"
              f"{tokens / median:>12,.0f}{share:>15.0%}")
    print(f"peak memory of both together: {peak_memory(config.device) / 1e9:.2f} GB")


# -- sample: the tokens of generate ------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class SampleBench:
    """The options of `bench.py sample` as they are written."""

    dtypes: str = knob("auto", "of the matrix products, such as float32,bfloat16; auto = float32 and sample.py's own")
    quantize: str = knob("all", "of none, int8; all = both")
    batches: str = knob("1,4", "samples at once, each of these")
    tokens: int = knob(32, "new tokens of each sample")
    steps: int = knob(5, "timed rounds of each")


def sampling(arguments: list[str]) -> Callable[[], None]:
    """Reads the options, and returns what measures them; ValueError for the user's mistakes."""
    places, pairs = split_arguments(arguments)
    own = knobs_of(SampleBench)
    options = SampleBench(**typed({k: v for k, v in pairs.items() if k in own}, own, "command line"))
    at_least_one(options.steps), at_least_one(options.tokens)
    batches = [at_least_one(convert("batches", text, int)) for text in options.batches.split(",")]
    config = read_config([*places, *(f"{k}={v}" for k, v in pairs.items() if k not in own)])
    device = choose_device(config.device)
    dtypes = options.dtypes if options.dtypes != "auto" else f"float32,{choose_dtype('auto', device)}"
    dtypes = [choose_dtype(d, device) for d in several("dtypes", dtypes, ("float32", "bfloat16", "float16"))]
    ways = [SampleOptions(device=device, dtype=dtype, quantize=quantize)
            for dtype, quantize in product(dtypes, several("quantize", options.quantize, ("none", "int8")))]
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 32000)
    return partial(report_sampling, model, ways, batches, options)


def report_sampling(config: ModelConfig, ways: list[SampleOptions], batches: list[int], options: SampleBench) -> None:
    """Times sample.py's generate in each way and prints a line for each way and batch."""
    device, base, models = ways[0].device, Decoder(config).to(ways[0].device), {}
    for way in ways:  # each model once: several of a billion parameters are a lot
        if stored(way) not in models:
            models[stored(way)] = base if stored(way) == "float32" else copy.deepcopy(base)
            for_inference(models[stored(way)], way)
    print(f"{parameter_count(config):,} parameters, vocab {config.vocab_size:,}, {options.tokens} tokens after the "
          f"first; {machine(device)}\ncopies read and write {copy_rate(device) / 1e9:.1f} GB/s\n"
          f"{'':16}{'samples':>8}{'tokens/s':>10}{'of the first':>14}{'matrices':>12}{'read at':>11}")
    for batch in batches:
        rates: dict[SampleOptions, list[float]] = {way: [] for way in ways}
        for way in in_turn(ways, options.steps):
            rates[way].append(sampling_rate(models[stored(way)], way, batch, options.tokens))
        for way, found in rates.items():
            size, rate = matrix_bytes(models[stored(way)]), statistics.median(found)
            name = way.dtype + (" int8" if way.quantize == "int8" else "")
            print(f"{name:16}{batch:>8}{rate:>10,.1f}{rate / statistics.median(rates[ways[0]]):>14.2f}"
                  f"{size / 1e6:>9,.0f} MB{size * rate / batch / 1e9:>6.1f} GB/s", flush=True)


def stored(way: SampleOptions) -> str:
    """What the matrices are in memory."""
    return way.dtype if way.quantize == "none" else way.quantize


def sampling_rate(model: Decoder, way: SampleOptions, batch: int, tokens: int) -> float:
    """Tokens/s of `batch` samples, less the first, which reads the prompt."""
    with autocast(way.device, way.dtype):
        making = generate(model, [0], tokens + 1, num_samples=batch)
        next(making)
        start = time.perf_counter()
        for _ in making:  # each is on the CPU when it comes, so the device has finished
            pass
        return batch * tokens / (time.perf_counter() - start)


def matrix_bytes(model: Decoder) -> int:
    """Bytes of all matrices that are read for a token: not the embedding, of which that is a row."""
    head = model.embed if model.head is None else model.head
    weights = [getattr(module, "weight", None) for module in (*model.blocks.modules(), head)]
    return sum(weight.nbytes for weight in weights if isinstance(weight, Tensor))


BENCHES = {"train": training, "sample": sampling, "norm": norms}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
