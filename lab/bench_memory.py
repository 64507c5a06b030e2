"""lab.bench memory: the peak memory of a training step, ours and transformers'.

Each is measured in a fresh process, which is this file, started as
`python -m lab.bench_memory CHILD STEPS key=value ...` by the bench alone.
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from config.command import user_errors
from config.schema import Config
from lab.bench_beside import check_comparable, hf_step, json_of
from lab.measure import (
    as_arguments,
    fresh_run,
    machine_line,
    print_columns,
    read_options,
    seconds_of_start,
    seconds_of_step,
    spread,
    values_in_turn,
)
from model import ModelConfig, knob, parameter_count
from run.machine import choose_device, peak_memory
from run.setup import read_config

WITHOUT_PRESET = """
n_layer=6 n_head=6 n_embd=384 n_hidden=1024 block_size=256 batch_size=16 vocab_size=32000
dtype=float32 optimizer=adamw
""".split()
PROGRAMS = ("ours", "transformers")


@dataclass(frozen=True, kw_only=True)
class MemoryBench:
    """The options of `lab.bench memory`; every knob of a run can be set, too."""

    steps: int = knob(2, "timed steps of each process, after the first")
    rounds: int = knob(1, "processes of each kind, in turn")


def memory(arguments: list[str]) -> None:
    """Prints a line for each program."""
    options, places, knobs = read_options(MemoryBench, arguments)
    default = {} if places else dict(word.split("=") for word in WITHOUT_PRESET)
    words = [*places, *as_arguments(default | knobs)]
    config = read_config(words)
    check_comparable(config)
    program = [sys.executable, "-m", "lab.bench_memory"]
    calls = {name: partial(json_of, [*program, name, options.steps, *words]) for name in PROGRAMS}
    found = values_in_turn(calls, options.rounds)
    peak = {name: median(run["bytes"] for run in runs) for name, runs in found.items()}
    model, tokens = config.model, config.batch_size * config.model.block_size
    fixed, logits = 16 * parameter_count(model), 4 * tokens * model.vocab_size
    print(
        f"{parameter_count(model):,} parameters, {tokens:,} tokens; "
        f"{machine_line(choose_device(config.device))}\n"
        f"weights, gradient and two moments: {fixed / 1e6:,.0f} MB; "
        f"the logits of a step in fp32, once: {logits / 1e6:,.0f} MB"
    )
    rows = [("", "peak memory", "of transformers'", "of weights and moments", "ms of a step")]
    for name, runs in found.items():
        size, times = peak[name], spread([run["seconds"] for run in runs], 1000)
        shares = f"{size / peak['transformers']:.2f}", f"{size / fixed:.1f}"
        rows.append((name, f"{size / 1e6:,.0f} MB", *shares, times))
    print_columns(rows)


# -- The process that is measured ------------------------------------------------------------------


def training_cost(program: str, steps: int, arguments: list[str]) -> dict[str, float]:
    """The seconds of a step after the first, and the bytes of training beyond what it needs at any
    size: the imports, and what the first step loads. A very small model does a step before, so that
    this is there already."""
    config = read_config(arguments)
    config = replace(
        config,
        device=choose_device(config.device),
        compile=False,
        micro_batch_size=config.micro_batch_size or config.batch_size,
    )
    small = ModelConfig(
        n_layer=1, n_head=1, n_embd=8, n_hidden=8, block_size=8, vocab_size=config.model.vocab_size
    )
    start_training(program, replace(config, model=small, batch_size=1, micro_batch_size=1))
    before, _ = memory_now(config.device)
    step = start_training(program, config)
    seconds = median(step() for _ in range(steps))
    _, most = memory_now(config.device)
    return {"seconds": seconds, "bytes": most - before}


def start_training(program: str, config: Config) -> Callable[[], float]:
    """Does the first eager step, ours or transformers'; returns a function that does the next one
    and returns its seconds."""
    if program == "ours":
        run = fresh_run(config)
        seconds_of_start(run)
        return partial(seconds_of_step, run)
    step = hf_step(config)
    step()
    return step


def memory_now(device: str) -> tuple[float, float]:
    """Bytes of this process now, and the most so far; on CUDA those of its tensors.

    The most is not getrusage's: Linux begins that with what the process had that started this one.
    """
    if device.startswith("cuda"):
        return 0, peak_memory(device)
    status = Path("/proc/self/status")
    if not status.is_file():
        raise ValueError("the memory of a process is read from /proc, which is not there")
    found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status.read_text()))
    return 1024 * int(found["VmRSS"]), 1024 * int(found["VmHWM"])


if __name__ == "__main__":
    # stdout is for the result alone; set_up may say that it prepares a data set.
    with user_errors(), contextlib.redirect_stdout(sys.stderr):
        result = training_cost(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    print(json.dumps(result))
