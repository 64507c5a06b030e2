"""Measure this program on this machine:  python bench.py train [config/PRESET.py] [steps=20] [key=value ...]

What is timed is train.py's own step, eager and compiled in turn (A B B A ...), so that a machine whose speed drifts
drifts for both. The ceiling is the rate of large matrix products, measured here and now.
"""

import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from config.schema import Config, convert, help_text, load_config, split_arguments, user_errors
from device import matmul_rate, peak_memory, versions
from model import ModelConfig, flops_per_token, parameter_count
from train import Run, first_step, set_up, timed_step

USAGE = ("python bench.py train [config/PRESET.py] [steps=20] [key=value ...]\n\n"
         "steps=20 are timed of each way, after the first. Every knob of a run can be set:")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 2 for the user's error."""
    if not argv or {"-h", "--help"} & set(argv):
        print(help_text(USAGE, Config, ModelConfig))
        return 0
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        what, *rest = argv
        if what not in BENCHES:
            raise ValueError(f"bench.py measures {', '.join(BENCHES)}, got {what!r}")
        _, pairs = split_arguments(rest)
        steps = convert("steps", pairs.get("steps", "20"), int)
        if steps < 1:
            raise ValueError(f"steps must be 1 or more, got {steps}")
        config = load_config([a for a in rest if not a.removeprefix("--").startswith("steps=")])
        prepared = BENCHES[what](dataclasses.replace(config, out_dir=str(Path(folder) / "run"), resume="no"))
    report_training(prepared, steps)
    return 0


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
          f"{config.optimizer}; {config.device}, {config.dtype}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, commit {versions()['commit']}\nmatrix products: {rate / 1e9:,.0f} GFLOP/s\n"
          f"{'':10}{'first step':>12}{'median':>10}{'quartiles':>16}{'tokens/s':>12}{'of matmul rate':>16}")
    first = {name: first_step(run)[-1] for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(steps):
        for name in (list(runs) if i % 2 else list(runs)[::-1]):
            seconds[name].append(timed_step(runs[name])[-1])
    for name, times in seconds.items():
        median = statistics.median(times)
        low, _, high = statistics.quantiles(times, n=4) if steps > 1 else (median,) * 3
        share = tokens * flops_per_token(config.model) / median / rate
        name_now = name if runs[name].config.compile == (name == "compiled") else "eager (no compiler)"
        print(f"{name_now:10}{first[name]:>10.1f} s{1000 * median:>7.0f} ms{1000 * low:>8.0f} -{1000 * high:>5.0f} ms"
              f"{tokens / median:>12,.0f}{share:>15.0%}")
    print(f"peak memory of both together: {peak_memory(config.device) / 1e9:.2f} GB")


BENCHES = {"train": runs_to_time}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
