"""lab.bench gpu: the first minutes on a new GPU. Does all of it run, is it right, is it fast?

Each part is a process of its own with a limit of time, so that one that fails or hangs costs the
others nothing. That process is this file, started as `python -m lab.bench_gpu PART key=value ...`
by the bench alone. On a machine without CUDA the parts do the same with tiny models: this proves
the parts, and says nothing of a card.

Order: the parts; the bench; how a part is run; the table.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from config.command import one_line, split_arguments, user_errors
from config.schema import knobs_of, parse_knobs
from lab.bench_beside import last_words, with_our_modules
from lab.gpu_parts import (
    PATIENCE_WITH_LOST,
    Figure,
    GpuBench,
    card_rates,
    exactness,
    lost_rank,
    muon_share,
    nanogpt_speed,
    norm_share,
    out_of_memory,
    ranks_speed,
    resumed,
    sample_speed,
    shakespeare_loss,
    train_preset,
)
from lab.measure import as_arguments, chosen, machine_line
from run.machine import choose_device, choose_dtype
from run.setup import find_dataset


@dataclass(frozen=True)
class Part:
    """One process: what it measures, and how long it may take."""

    measure: Callable[[GpuBench], Iterator[Figure]]
    seconds: float
    needs: str = ""  # of what_is_missing


# The most valuable first. Those that need no path and one device take at most eight minutes.
PARTS = {
    "rates": Part(card_rates, 20),
    "124m": Part(partial(train_preset, "llama_124m", 256, 50), 75),
    "exact": Part(exactness, 40),
    "1b": Part(partial(train_preset, "llama_1b", 32, 60), 80),
    "sample": Part(sample_speed, 50),
    "memory": Part(out_of_memory, 35, "CUDA"),
    "resume": Part(resumed, 45),
    "350m": Part(partial(train_preset, "llama_350m", 32, 60), 75),
    "norm": Part(norm_share, 35),
    "muon": Part(muon_share, 25),
    "nanogpt": Part(nanogpt_speed, 90, "CUDA and nanogpt=FOLDER"),
    "shakespeare": Part(shakespeare_loss, 150, "text=FILE of tinyshakespeare"),
    "ranks": Part(ranks_speed, 300, "several devices"),
    "lost": Part(lost_rank, PATIENCE_WITH_LOST + 60, "several devices"),
}


def gpu(arguments: list[str]) -> None:
    """Runs the parts asked for, one after the other, and prints the table of their figures."""
    options = checked_options(arguments)
    names = chosen("parts", options.parts, tuple(PARTS))
    missing = {name: what_is_missing(PARTS[name].needs, options) for name in names}
    minutes = sum(PARTS[name].seconds for name in names if not missing[name]) / 60
    print(machine_line(options.device, choose_dtype("auto", options.device)))
    if not options.on_card:
        print(f"{options.device}, tiny: small models, and no verdict on the speed of a card")
    print(f"at most {minutes:.1f} minutes", flush=True)
    figures = []
    for name in names:
        if missing[name]:
            figures.append(Figure(part=name, note=f"not here: it needs {missing[name]}"))
            continue
        limit = PARTS[name].seconds
        print(f"{name}, at most {limit:.0f} s", flush=True)
        own = as_arguments({k: v for k, v in asdict(options).items() if v and k != "parts"})
        figures += figures_of(name, [sys.executable, "-m", "lab.bench_gpu", name, *own], limit)
    print(f"\n{figures_table(figures)}")


def checked_options(arguments: list[str]) -> GpuBench:
    """The options, with absolute paths and the device that is meant. ValueError if they are wrong;
    the data set is prepared if it is a text."""
    words, pairs = split_arguments(arguments)
    if words:
        raise ValueError(f"lab.bench gpu takes only key=value, got {' '.join(words)}")
    options = GpuBench(**parse_knobs(pairs, knobs_of(GpuBench), "command line"))
    chosen("parts", options.parts, tuple(PARTS))
    device = choose_device(options.device)
    if options.nanogpt and not Path(options.nanogpt, "bench.py").is_file():
        raise ValueError(f"nanogpt={options.nanogpt} has no bench.py: name a checkout of nanoGPT")
    if options.text and not Path(options.text).is_file():
        raise ValueError(f"text={options.text} is no file: name nanoGPT's input.txt")
    dataset = find_dataset(options.dataset, None)
    if not (dataset / "meta.json").is_file():
        raise ValueError(f"dataset={options.dataset}: {dataset} is no data set")
    places = {"dataset": dataset, "nanogpt": options.nanogpt, "text": options.text}
    places = {name: str(Path(place).resolve()) for name, place in places.items() if place}
    return replace(options, device=device, **places)


def what_is_missing(needs: str, options: GpuBench) -> str | None:
    """What a part with these `needs` would need here; None if nothing."""
    cards = torch.cuda.device_count() if options.on_card else 0
    found = {
        "": True,
        "CUDA": options.on_card,
        "several devices": options.device == "cpu" or cards > 1,  # processes share a CPU
        "text=FILE of tinyshakespeare": options.text,
        "CUDA and nanogpt=FOLDER": options.on_card and options.nanogpt,
    }
    return None if found[needs] else needs


def figures_of(part: str, command: list[str], limit: float) -> list[Figure]:
    """What a process prints within `limit` seconds, in an empty folder that is removed after it.
    If it fails or takes longer, the last figure says so."""
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        errors = stack.enter_context(tempfile.TemporaryFile())
        process = subprocess.Popen(
            command,
            cwd=work,
            env=with_our_modules(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        stack.enter_context(process)
        note = ""
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            note = f"failed: it took more than {limit:.0f} s"
        finally:  # also after Ctrl-C, which reaches this process alone
            kill_with_all_below(process.pid)
        if note:
            output, _ = process.communicate()
        elif process.returncode:
            errors.seek(0)
            said = one_line(last_words(errors.read()), 300)
            note = f"failed: it ended with {process.returncode}: {said}"
    figures = [replace(Figure(**json.loads(line)), part=part) for line in output.splitlines()]
    return [*figures, Figure(part=part, note=note)] if note else figures


def kill_with_all_below(pid: int) -> None:
    """Kills a process, all of its group, and what torchrun has started, which are other groups."""
    below = [pid]
    for parent in below:  # grows meanwhile
        children = Path(f"/proc/{parent}/task/{parent}/children")
        with contextlib.suppress(OSError):  # it has just ended, or there is no /proc
            below += map(int, children.read_text().split())
    for kill, target in [(os.killpg, pid), *((os.kill, child) for child in below)]:
        with contextlib.suppress(ProcessLookupError):
            kill(target, signal.SIGKILL)


def figures_table(figures: list[Figure]) -> str:
    """A line for each figure."""
    rows = [("part", "figure", "measured", "unit", "expected", "verdict")]
    for figure in figures:
        value = "" if figure.note else number_text(figure.value)
        said = (figure.unit, expected_text(figure), verdict_on(figure))
        rows.append((figure.part, figure.name, value, *said))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def expected_text(figure: Figure) -> str:
    """'at least 50, wanted'; '' if nothing is expected."""
    low, high = number_text(figure.low), number_text(figure.high)
    if figure.low == figure.high:
        bounds = low
    elif math.isfinite(figure.low) and math.isfinite(figure.high):
        bounds = f"{low} to {high}"
    elif math.isfinite(figure.low):
        bounds = f"at least {low}"
    elif math.isfinite(figure.high):
        bounds = f"at most {high}"
    else:
        return ""
    return f"{bounds}, {figure.source}"


def verdict_on(figure: Figure) -> str:
    """ok or off; the note of a figure that is none; '' if nothing is expected."""
    if figure.note or not expected_text(figure):
        return figure.note
    return "ok" if figure.low <= figure.value <= figure.high else "off"


def number_text(value: float) -> str:
    """Three digits at least: 523,187 or 54.3 or 0.00127."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    with user_errors(), contextlib.redirect_stdout(sys.stderr):  # stdout is for figures alone
        name, *words = sys.argv[1:]
        found = GpuBench(**parse_knobs(split_arguments(words)[1], knobs_of(GpuBench), "options"))
        for figure in PARTS[name].measure(found):
            print(json.dumps(asdict(figure)), file=sys.__stdout__, flush=True)
