"""What training costs beside its arithmetic: memory, growth with the model's size, preparing a text, starting.

Programs are measured in fresh processes; that of a step or of a preparation is this file: `python bench_cost.py CHILD
...`, for the benches alone, prints a line of JSON.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import bench_beside as beside
from bench_beside import ROOT, finished, finished_json, fresh_run, middle, own_options, print_table, spread, written
from bench_norm import machine
from config.schema import Config, knobs_of, typed, user_errors
from cost import flops_per_token, memory_estimate, parameter_count
from data.corpus import open_corpus
from data.loader import batch
from data.prepare import prepare, train_tokenizer
from data.tokenizer import load_tokenizer
from device import choose_device, choose_dtype, matmul_rate, peak_memory, total_memory
from model import ModelConfig, knob
from run import Run, read_config
from train import Interrupts, first_step, open_log, timed_step

LARGE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_hidden": 1024, "block_size": 256, "batch_size": 16,
         "vocab_size": 32000, "dtype": "float32", "optimizer": "adamw"}  # what `memory` takes without a preset
SIZES = {1: (2, 128), 4: (8, 192), 15: (8, 384), 60: (12, 640), 124: (17, 768), 350: (27, 1024), 1000: (20, 2048)}
GROWTH = {"parameters": [(size, 256, 4) for size in SIZES],  # millions of them, block_size and batch_size
          "context": [(15, 2**i, 2**13 // 2**i) for i in range(8, 14)], "batch": [(15, 256, 2**i) for i in range(6)]}
STEPS = {"small": {}, "small, 12 x 64": {"n_head": 4, "block_size": 64, "batch_size": 12, "optimizer": "adamw"}}


@dataclass(frozen=True, kw_only=True)
class ProcessBench:
    """The options of `bench.py memory`, `growth` and `start`; every knob of a run can be set, too."""

    steps: int = knob(2, "timed steps of each process, after the first")
    rounds: int = knob(1, "processes of each kind, in turn")


# -- processes of their own --------------------------------------------------------------------------------------------

def memory_now(device: str) -> tuple[float, float]:
    """Bytes of this process now, and at most so far; of tensors on CUDA.

    Not getrusage's maximum: Linux begins that with what the process had that started this one.
    """
    if device.startswith("cuda"):
        return 0, peak_memory(device)
    status = Path("/proc/self/status")
    if not status.is_file():
        raise ValueError("the memory of a process is read from /proc, which is not there")
    found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status.read_text()))
    return 1024 * int(found["VmRSS"]), 1024 * int(found["VmHWM"])


def step_of(program: str, config: Config) -> Callable[[], float]:
    """A function that does the next eager step, ours or transformers', and returns its seconds. The first is done."""
    if program == "ours":
        run = fresh_run(config)
        first_step(run)
        return lambda: timed_step(run)[-1]
    step = beside.hf_step(config)
    step()
    return step


def training_cost(program: str, steps: str, *arguments: str) -> dict[str, float]:
    """Seconds of a step after the first, and the bytes of training beside what it needs at any size: the imports, and
    what starts with the first step. A step of a very small model comes before, to have these."""
    config = read_config(list(arguments))
    config = replace(config, device=choose_device(config.device), compile=False,
                     micro_batch_size=config.micro_batch_size or config.batch_size)
    small = ModelConfig(n_layer=1, n_head=1, n_embd=8, n_hidden=8, block_size=8, vocab_size=config.model.vocab_size)
    step_of(program, replace(config, model=small, batch_size=1, micro_batch_size=1))
    before, step = memory_now(config.device)[0], step_of(program, config)
    seconds = middle([step() for _ in range(int(steps))])
    return {"seconds": seconds, "bytes": memory_now(config.device)[1] - before}


def preparing_cost(program: str, text: str, tokenizer: str) -> dict[str, float]:
    """Seconds that it takes to make the ids of a text a file, and the bytes beside what the imports take."""
    before, start = memory_now("cpu")[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if program == "prepare.py":
            prepare([text], Path(folder) / "made", tokenizer)
        else:
            made, ids = load_tokenizer(tokenizer), []
            with open(text, encoding="utf-8") as lines:
                for line in lines:
                    ids.extend(made.encode(line))
            np.array(ids, dtype=np.uint16 if made.vocab_size < 2**16 else np.uint32).tofile(Path(folder) / "made")
    return {"seconds": time.perf_counter() - start, "bytes": memory_now("cpu")[1] - before}


CHILDREN = {"ours": training_cost, "transformers": training_cost, "prepare.py": preparing_cost,
            "plain loop": preparing_cost}


def children(calls: dict[Any, list], rounds: int) -> dict[Any, tuple[list[float], float]]:
    """name -> (seconds in each round, median of the bytes), as CHILDREN measure them in processes of their own."""
    found = beside.values_in_turn({name: partial(finished_json, [sys.executable, ROOT / "bench_cost.py", *words])
                            for name, words in calls.items()}, rounds)
    return {name: ([v["seconds"] for v in values], middle([v["bytes"] for v in values]))
            for name, values in found.items()}


# -- memory and growth -------------------------------------------------------------------------------------------------

def memory(arguments: list[str]) -> None:
    """Peak memory of a training step, ours and transformers'."""
    options, places, knobs = own_options(ProcessBench, arguments)
    words = [*places, *written(knobs if places else LARGE | knobs)]
    config = read_config(words)
    beside.check_comparable(config)
    model, tokens = config.model, config.batch_size * config.model.block_size
    found = children({name: [name, options.steps, *words] for name in ("ours", "transformers")}, options.rounds)
    fixed = 16 * parameter_count(model)
    print(f"{parameter_count(model):,} parameters, {tokens:,} tokens; {machine(choose_device(config.device))}\n"
          f"weights, gradient and two moments: {fixed / 1e6:,.0f} MB; the logits of a step in fp32, once: "
          f"{4 * tokens * model.vocab_size / 1e6:,.0f} MB")
    print_table([("", "peak memory", "of transformers'", "of weights and moments", "ms of a step")] + [
        (name, f"{size / 1e6:,.0f} MB", f"{size / found['transformers'][1]:.2f}", f"{size / fixed:.1f}",
         spread(seconds, 1000)) for name, (seconds, size) in found.items()])


def growth(arguments: list[str]) -> None:
    """Time and memory of a step against parameters, context and batch."""
    options, places, knobs = own_options(ProcessBench, arguments)
    cells = {name: [[*places, *written(shape_of(*shape) | knobs)] for shape in shapes]
             for name, shapes in GROWTH.items()}
    config = read_config(next(iter(cells.values()))[0])
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    print(f"{machine(device, dtype)}; matrix products: {matmul_rate(device, dtype) / 1e9:,.0f} GFLOP/s")
    for name, lines in cells.items():
        report_growth(name, lines, options, device, dtype)


def shape_of(millions: int, block_size: int, batch_size: int) -> dict[str, object]:
    """The knobs of a model of so many million parameters, and of what it is trained on in a step."""
    n_layer, n_embd = SIZES[millions]
    return {"n_layer": n_layer, "n_head": n_embd // 64, "n_embd": n_embd, "n_hidden": 0, "vocab_size": 4096,
            "tie_embeddings": True, "optimizer": "adamw", "block_size": block_size, "batch_size": batch_size}


def report_growth(name: str, lines: list[list[str]], options: ProcessBench, device: str, dtype: str) -> None:
    """A row for each command line of a run; what is too large for this machine is not tried."""
    configs, room = [read_config(line) for line in lines], 0.85 * total_memory(device) - memory_now(device)[0]
    needs = [sum(memory_estimate(c.model, c.batch_size, dtype, device)) for c in configs]
    found = children({i: ["ours", options.steps, *line] for i, line in enumerate(lines) if needs[i] < room},
                     options.rounds)
    rows = [(name, "parameters", "tokens", "us per token", "of the first", "of matmul rate", "memory", "of estimate")]
    tokens = [config.batch_size * config.model.block_size for config in configs]
    for i, (seconds, size) in found.items():
        model, each = configs[i].model, middle(seconds) / tokens[i]
        rows.append(("", f"{parameter_count(model):,}", f"{configs[i].batch_size} x {model.block_size}",
                     spread(seconds, 1e6 / tokens[i], 1), f"{each * tokens[0] / middle(found[0][0]):.2f}",
                     f"{flops_per_token(model) / each / matmul_rate(device, dtype):.0%}", f"{size / 1e9:.2f} GB",
                     f"{size / needs[i]:.2f}"))
    print()
    print_table(rows)
    for i in set(range(len(lines))) - found.keys():
        print(f"not measured: {parameter_count(configs[i].model):,} parameters at {configs[i].batch_size} x "
              f"{configs[i].model.block_size} need about {needs[i] / 1e9:.1f} GB, {room / 1e9:.1f} GB are to be had")


# -- preparing and starting --------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class PrepareBench:
    """The options of `bench.py prepare` as they are written."""

    vocab_size: int = knob(32000, "of the tokenizer, which is trained on the text first")
    rounds: int = knob(1, "processes of each kind, in turn")


def preparing(arguments: list[str]) -> None:
    """data/prepare.py against the loop that one would write, with the same tokenizer, on a text or on `python`."""
    options, places, knobs = own_options(PrepareBench, arguments)
    typed(knobs, knobs_of(PrepareBench), "command line")  # it has no others
    with tempfile.TemporaryDirectory() as folder:
        text = Path(*places) if places else Path(folder) / "python.txt"
        if not places:
            text.write_text("".join(piece.text for piece in open_corpus(["python"]).pieces()), encoding="utf-8")
        tokenizer, content = train_tokenizer(open_corpus([str(text)]), options.vocab_size), text.read_text("utf-8")
        tokenizer.save(Path(folder))
        start, cores = time.perf_counter(), os.cpu_count() or 1
        tokenizer.encode(content)
        size = text.stat().st_size / 1e6
        limit = cores * size / (time.perf_counter() - start)
        found = children({name: [name, text, folder] for name in ("prepare.py", "plain loop")}, options.rounds)
    print(f"{size:.2f} MB of text, {tokenizer.vocab_size:,} pieces; {machine('cpu')}\n"
          f"the tokenizer alone, on each of {cores} cores: {limit:.1f} MB/s")
    print_table([("", "MB/s", "of the loop", "of the limit", "peak memory")] + [
        (name, spread([size / t for t in seconds], 1, 2), f"{middle(found['plain loop'][0]) / middle(seconds):.2f}",
         f"{size / middle(seconds) / limit:.0%}", f"{peak / 1e6:,.0f} MB") for name, (seconds, peak) in found.items()])


def starting(arguments: list[str]) -> None:
    """How long train.py takes to do one step, and what a step spends around its arithmetic."""
    options, _, knobs = own_options(ProcessBench, arguments, most=0)
    wanted = {name: read_config(written(shape | knobs)) for name, shape in STEPS.items()}
    cold = {"max_iters": 1, "warmup_iters": 0, "compile": "false", "sample_tokens": 0, "out_dir": "OUT/run"} | knobs
    command = [ROOT / "train.py", ROOT / "config" / "tiny.py", *written(cold)]
    found = beside.values_in_turn({"train.py, one step": partial(seconds_of_python, command),
                                   "import torch": partial(seconds_of_python, ["-c", "import torch"])}, options.rounds)
    print(f"{machine(choose_device(wanted['small'].device))}\n")
    print_table([("from nothing", "seconds", "of import torch")] + [
        (name, spread(times, 1, 2), f"{middle(times) / middle(found['import torch']):.2f}")
        for name, times in found.items()])
    rows = [("around a step", "ms of a step", "of that its batch", "log line beside", "both of a step")]
    for name, config in wanted.items():
        steps, loader, log = around_a_step(fresh_run(config, compile=False), options.steps)
        rows.append((name, spread(steps, 1000, 1), f"{1000 * loader:.2f} ms", f"{1000 * log:.2f} ms",
                     f"{(loader + log) / (middle(steps) + log):.1%}"))
    print()
    print_table(rows)


def seconds_of_python(words: list) -> float:
    """Seconds that Python takes with these words; OUT in them is a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        finished([sys.executable, *(str(word).replace("OUT", folder) for word in words)])
        return time.perf_counter() - start


def around_a_step(run: Run, steps: int) -> tuple[list[float], float, float]:
    """Seconds of each step, of the batch in it, and of its line in the log: means, since few steps get a line."""
    first_step(run)
    config, done = run.config, [timed_step(run) for _ in range(steps)]
    count, nowhere = 4 * config.log_interval, io.StringIO()
    with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(nowhere),
          contextlib.redirect_stderr(nowhere)):
        run.config = replace(config, out_dir=folder)
        with open_log(run, None, Interrupts()) as log:
            start = time.perf_counter()
            for i in range(count):
                batch(run.data, i, config.batch_size, config.model.block_size, config.seed)
            half = time.perf_counter()
            for i in range(count):
                log.training(i + 2, *done[0])
            return [step[-1] for step in done], (half - start) / count, (time.perf_counter() - half) / count


if __name__ == "__main__":
    with user_errors(), contextlib.redirect_stdout(sys.stderr):  # which may say what it prepares
        result = CHILDREN[sys.argv[1]](*sys.argv[1:])
    print(json.dumps(result))
