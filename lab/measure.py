"""What the measurements of this folder share.

In this order: how an option is read, how calls are timed in turn, how a training step is timed, and
how a measurement is printed.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from config.command import split_arguments
from config.preset import read_layers, without_effect_of
from config.schema import Config, knobs_of, parse_choice, parse_knobs
from run.machine import processor, synchronize, versions
from run.setup import Run, set_up
from train import train_step, warm_up


def read_options(kind: type, argv: list[str]) -> tuple[Any, list[str], dict[str, str]]:
    """(options, places, knobs): the options, of the dataclass `kind`, that a command line sets; its
    words without '='; and whatever else it sets. ValueError if an option is wrong."""
    places, pairs = split_arguments(argv)
    own = knobs_of(kind)
    options = kind(**parse_knobs({k: v for k, v in pairs.items() if k in own}, own, "command line"))
    for name in ("steps", "rounds", "tokens"):
        check_count(name, getattr(options, name, 1))
    return options, places, {k: v for k, v in pairs.items() if k not in own}


def as_arguments(knobs: dict[str, Any]) -> list[str]:
    """{'a': 1} -> ['a=1']."""
    return [f"{name}={value}" for name, value in knobs.items()]


def that_count(preset: list[str], knobs: dict[str, Any]) -> dict[str, Any]:
    """`knobs` without those that have no effect beside the others: an arm needs no norm_alpha if
    its norm has none. A command line with them would be refused.
    """
    _, of_preset, own = read_layers([*preset, *as_arguments(knobs)])
    useless = without_effect_of(own, of_preset | own | {"launched": False})
    return {name: value for name, value in knobs.items() if name not in useless}


def check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be 1 or more, got {count}")


def chosen(key: str, text: str, choices: tuple[str, ...]) -> list[str]:
    """'a,b' -> ['a', 'b'], each of which must be one of `choices`; 'all' stands for all of them."""
    if text == "all":
        return list(choices)
    return list(dict.fromkeys(parse_choice(key, word, choices) for word in text.split(",")))


def in_turn(names: list, rounds: int) -> Iterator:
    """Each name once in each round, forwards and backwards by turns: A B, B A, A B ...

    So a machine whose speed drifts drifts for all of them alike."""
    for i in range(rounds):
        yield from (names[::-1] if i % 2 else names)


def values_in_turn(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list]:
    """What each call returned in each round. The calls are made in turn."""
    values: dict[Any, list] = {name: [] for name in calls}
    for name in in_turn(list(calls), rounds):
        values[name].append(calls[name]())
    return values


def fresh_run(config: Config, **changes: Any) -> Run:
    """A run before its first step, which writes nothing to the disk."""
    own = {"resume": "no", "threads": config.threads or torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        return set_up(replace(config, out_dir=str(Path(folder) / "run"), **own, **changes))


def seconds_of_start(run: Run) -> float:
    """How long a run takes to get ready, which may include compiling, and to do its first step."""
    start = time.perf_counter()
    warm_up(run)
    train_step(run)
    synchronize(run.config.device)
    return time.perf_counter() - start


def seconds_of_step(run: Run) -> float:
    """How long the next optimizer step of a run takes, which is done."""
    start = time.perf_counter()
    train_step(run)
    synchronize(run.config.device)
    return time.perf_counter() - start


def spread(values: list[float], scale: float = 1, digits: int = 0) -> str:
    """Median and quartiles: '138 (131-176)'."""
    low = high = statistics.median(values)
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    numbers = (statistics.median(values), low, high)
    middle, low, high = (f"{scale * number:,.{digits}f}" for number in numbers)
    return f"{middle} ({low}-{high})"


def machine_line(device: str, *details: str) -> str:
    """What a measurement depends on: the device, the threads, and the versions of the programs."""
    name, commit = processor(device), versions()["commit"]
    software = f"{torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}"
    return ", ".join((f"{device} ({name})", *details, software))


def print_columns(rows: list[tuple[str, ...]]) -> None:
    """Rows of cells as aligned lines. The first row is the heads; the first column is aligned to
    the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]), flush=True)
