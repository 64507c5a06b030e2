"""python -m lab.compare: norms, or any other knobs, compared on equal terms.

Order: main; the plan, which is what the command line asks for; the cells of the plan and their
results; the processes in which cells are trained; and Lab, which does what the plan says.
"""

import gc
import hashlib
import itertools
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, so Python would not find the imports below
    hint = "run it as a module, from the root of the repository: python -m lab.compare"
    print(f"error: {hint}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":  # before the imports that take seconds
    from config.command import start

    start()

import torch
from tqdm import tqdm

import train
from config.command import names_folder, one_line, printable, run_command, user_errors
from config.help import help_text, training_help
from config.preset import KNOBS, load_json, read_knobs
from config.schema import Config, parse_value
from data.files import is_own_file, open_regular, write_atomically
from data.loader import read_meta
from data.mixture import read_shares
from lab.measure import (
    as_arguments,
    chosen,
    fresh_run,
    in_turn,
    read_options,
    that_count,
)
from lab.report import WRITTEN, Study, best_cells, speed_section, write_report
from lab.timing import read_timing, time_in_processes
from lab.verdict import time_ratio
from model import knob
from norm import NORMS
from run.machine import choose_device, processor, versions
from run.metrics import METRICS_FILE, is_number, read_metrics, training_seconds
from run.setup import find_dataset, read_config
from run.signals import Interrupts
from train import NOT_FINITE, validation_losses
from weights.checkpoint import NEVER_COMPARED, all_in
from weights.lock import Lock
from weights.open import load_model, open_weights
from weights.rounding import KINDS, simulate_quantization

USAGE = """\
Compare norms, or any other knobs, on equal terms.

python -m lab.compare [config/PRESET.py] [knob=A,B,...] [learning_rate=X,Y,...] [key=value ...]
python -m lab.compare --list        every norm in one line

An arm is one combination of the listed knobs, without the learning rate; the first arm is the
reference. A cell is one arm at one learning rate with one seed, trained by train.py in a process of
its own. All arms of a seed share the order of the data and the initial weights. Everything is
written to out_dir (out/compare-PRESET), and the same command goes on where it was stopped.

Options:"""
EVERY_KNOB = "Every knob of a run can be set, and every knob that is not a text can be a list."

NOT_FOR_A_COMPARISON = {
    "resume": "which always goes on where it was stopped",
    "branch": "whose cells begin at their first step",
    "keep": "whose weights are deleted when a cell has ended",
    "keep_every": "whose weights are deleted when a cell has ended",
    "sample_prompt": "whose cells print no sample",
    "sample_tokens": "whose cells print no sample",
    "sample_interval": "whose cells print no sample",
    "profile": "whose cells must not be slowed down: train.py profiles one of them",
}
# Decided once and then given to every cell, so that no two cells can differ in them.
AUTOMATIC = ("device", "dtype", "compile")
# An arm with these knobs has no norm at all: it is only timed, to know what the norms cost.
CONTROL = {
    "norm": "none",
    "norm_pos": "pre",
    "qk_norm": "false",
    "norm_impl": "eager",
    "induction_init": "false",
}
CELL_NAME = re.compile("[a-zA-Z0-9_.-]+-[0-9a-f]{8}")  # of its folder
Knobs = dict[str, str]  # name -> value, as text of a command line


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The options of `lab.compare`; every knob of a run can be set, too."""

    seeds: int = knob(5, "seeds of each arm and learning rate; 0 = only time the arms")
    jobs: int = knob(1, "cells trained at once, which share the threads")
    steps: int = knob(10, "training steps timed of each arm, in turn, when nothing else runs")
    processes: int = knob(5, "processes, one after the other, each of which times so many steps")
    margin: float = knob(
        0.0, "nats per token within which arms count as equal, fixed beforehand; 0 = no such test"
    )
    equal_time: bool = knob(
        True, "train each arm that is faster or slower for the reference's time, too"
    )
    quantize: str = knob(
        "",
        f"evaluate each cell with its matrices rounded, too: a list of {', '.join(KINDS)}; or all",
    )

    def __post_init__(self):
        for name, least in (
            ("seeds", 0),
            ("jobs", 1),
            ("steps", 2),
            ("processes", 2),
            ("margin", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.kinds and not self.seeds:
            raise ValueError("quantize evaluates trained cells, and seeds=0 trains none: leave one")

    @property
    def kinds(self) -> list[str]:
        """The kinds of quantisation that are asked for."""
        return chosen("quantize", self.quantize, tuple(KINDS)) if self.quantize else []


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    options: CompareOptions
    preset: list[str]  # its path, or nothing for the default
    folder: Path
    fixed: Knobs  # knobs with one value for all arms
    arms: dict[str, Knobs]  # by label; the first is the reference
    rates: list[str]
    first_seed: int


@dataclass(frozen=True)
class Cell:
    """One training run of the comparison."""

    arm: str
    knobs: Knobs  # as on train.py's command line
    config: Config  # what the preset and the knobs come to

    @property
    def key(self) -> str:
        """Equal for two cells exactly if they are the same run by the same code."""
        knobs = {k: v for k, v in self.config.flat().items() if k not in NEVER_COMPARED}
        content = content_of(self.config.dataset, self.config.init_from)
        return json.dumps(knobs | content | {"code": versions()["code"]}, sort_keys=True)

    @property
    def name(self) -> str:
        """The name of its folder."""
        words = f"{self.arm}-lr{self.config.learning_rate:g}-seed{self.config.seed}"
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:8]
        return f"{re.sub('[^a-zA-Z0-9_.-]+', '-', words)}-{digest}"  # a CELL_NAME


@lru_cache
def content_of(dataset: str, init_from: str) -> dict[str, str | int]:
    """What tells whether the data and the weights that a cell begins with are still the same."""
    folders = [find_dataset(source, None) for source in read_shares(dataset) or [dataset]]
    metas = [read_meta(folder / "meta.json") for folder in folders]
    names = ("content_sha256", "tokenizer_sha256")
    content = {name: ",".join(meta[name] for meta in metas) for name in names}
    return content | ({"weights": open_weights(init_from).checksum()} if init_from else {})


class CellFailed(Exception):
    """A cell ended with an error; the text has the end of its log."""


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 1 if a cell failed, 2 for the user's error, 130 and 143 after
    Ctrl-C and SIGTERM."""
    if {"-h", "--help"} & set(argv):
        print(help_text(USAGE, CompareOptions), training_help(EVERY_KNOB), sep="\n\n")
        return 0
    if argv == ["--list"]:
        for kind, entry in NORMS.items():
            print(f"{kind:18}{entry.words}")
        return 0
    with user_errors():
        plan = read_plan(argv)
        lock = Lock(plan.folder)
    with lock:
        with user_errors():
            lab = Lab(plan, shlex.join(["python", "-m", "lab.compare", *argv]), lock)
            lock.clean_up()
        with lab.interrupts:
            try:
                lab.run()
                return 0
            except SystemExit as stop:  # after a signal
                reason, code = "stopped", stop.code
            except CellFailed as error:
                reason, code = printable(str(error)), 1
            except (ValueError, OSError) as error:  # files, which may be damaged or lost meanwhile
                reason, code = f"error: {one_line(error)}", 1
            hint = "finished cells are kept, and the same command goes on from here"
            print(f"{reason}\n{hint}", file=sys.stderr)
            return code


# -- The plan --------------------------------------------------------------------------------------


def read_plan(argv: list[str]) -> Plan:
    """The command line, checked as far as possible before there are cells. Raises ValueError."""
    options, preset, knobs = read_options(CompareOptions, argv)
    lists = read_lists(knobs)
    rates = lists.pop("learning_rate", [])
    arms = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    fixed = {name: text for name, text in knobs.items() if name not in lists}
    fixed |= {"learning_rate": rates[0]} if rates else {}
    refuse_useless_knobs(preset, fixed, arms)
    base = read_config([*preset, *as_arguments(that_count(preset, fixed | arms[0]))])
    if not base.max_iters:
        raise ValueError(
            "max_iters=0 would give each cell as many steps as its minutes allow, and cells are "
            "compared at equal steps: write max_iters=1000, for instance"
        )
    if names_folder(base.dataset) or Path(base.dataset).is_file():
        raise ValueError(
            f"dataset={base.dataset} may change between two cells: "
            f"python data/prepare.py TEXT name=NAME first"
        )
    stem = Path(preset[0]).resolve().name.removesuffix(".py") if preset else "small"
    return Plan(
        options=options,
        preset=preset,
        folder=Path(base.out_dir if "out_dir" in knobs else f"out/compare-{stem}"),
        fixed=fixed,
        arms={label(arm) or stem: arm for arm in arms},
        rates=rates or [fixed.get("learning_rate", repr(base.learning_rate))],
        first_seed=base.seed,
    )


def read_lists(knobs: Knobs) -> dict[str, list[str]]:
    """The values of each knob that is a list. ValueError if it must not be one, or has a value
    twice."""
    meanings = {
        "seed": "the first seed, seeds=N says how many",
        "out_dir": "the folder of the whole comparison",
    }
    for name, meaning in meanings.items():
        if "," in knobs.get(name, ""):
            raise ValueError(f"{name}={knobs[name]} cannot be a list: it is {meaning}")
    for name, reason in NOT_FOR_A_COMPARISON.items():
        if name in knobs:
            raise ValueError(f"{name} is not for a comparison, {reason}: leave it out")
    lists = {}
    for name, (kind, _) in KNOBS.items():
        if kind is not str and "," in knobs.get(name, ""):
            values = knobs[name].split(",")
            if len({parse_value(name, value, kind) for value in values}) < len(values):
                raise ValueError(f"{name}={knobs[name]} has a value twice: keep one")
            lists[name] = values
    return {name: lists[name] for name in knobs if name in lists}  # as the command line has them


def refuse_useless_knobs(preset: list[str], fixed: Knobs, arms: list[Knobs]) -> None:
    """ValueError for a knob that has no effect in any arm, or that makes an arm of its own without
    having an effect there.
    """
    counting = [that_count(preset, fixed | arm) for arm in arms]
    for arm, count in zip(arms, counting, strict=True):
        everywhere = [name for name in fixed if not any(name in other for other in counting)]
        if everywhere or arm.keys() - count.keys():
            here = {name: text for name, text in fixed.items() if name in everywhere} | arm
            read_knobs([*preset, *as_arguments(count | here)])  # its error says what is needed


def label(knobs: Knobs) -> str:
    """'rmsnorm, dropout=0.1': a word speaks for itself, any other value needs its knob's name."""

    def is_word(text: str) -> bool:
        return bool(re.fullmatch("[a-z][a-z0-9_]*", text)) and text not in booleans

    booleans = ("true", "false", "yes", "no")
    return ", ".join(text if is_word(text) else f"{name}={text}" for name, text in knobs.items())


def square_of(arms: dict[str, Knobs]) -> list[str]:
    """The arms, if they are those of two knobs with two values each, whose interaction can be
    tested; else []."""
    varied = len(next(iter(arms.values())))
    return list(arms) if (varied, len(arms)) == (2, 4) else []


def record_of(plan: Plan, first: dict[str, "Cell"]) -> dict[str, Any]:
    """What plan.json says of a plan, given one cell of each arm."""
    left_out = (*NEVER_COMPARED, "learning_rate", "seed")
    knobs = {arm: cell.config.flat() for arm, cell in first.items()}
    return {
        "arms": {
            arm: {name: value for name, value in own.items() if name not in left_out}
            for arm, own in knobs.items()
        },
        "learning_rates": [float(rate) for rate in plan.rates],
        "first_seed": plan.first_seed,
        "seeds": [plan.options.seeds],  # and before it those of earlier reports
        "margin": plan.options.margin,
    }


def read_record(path: Path) -> dict[str, Any]:
    """What plan.json says. ValueError if it is damaged."""
    saved, sound = load_json(path), False
    with suppress(TypeError, LookupError, AttributeError):
        numbers = [*saved["learning_rates"], *saved["seeds"], saved["first_seed"], saved["margin"]]
        sound = all(type(knobs) is dict for knobs in saved["arms"].values())
        sound = sound and all(map(is_number, numbers)) and len(saved["seeds"]) > 0
    if not sound:
        raise ValueError(f"{path} is damaged: bring it back, or name another out_dir")
    return saved


def refuse_another_plan(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError unless `now` is the plan `saved` or contains it: a report is replaced only by one
    that says as much. A margin is for good, since one that is chosen when the differences are known
    proves nothing, and a report is quoted without the words beside it."""
    if what := first_lacking(saved, now):
        raise ValueError(
            f"out_dir={folder} has the results of a plan with {what}: ask for all of that plan, "
            f"with more if you like, or name another out_dir"
        )


def first_lacking(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing of the plan `saved` that the plan `now` does not have, in words, or ''."""
    for arm, knobs in saved["arms"].items():
        if lacking := least_lacking(knobs, now["arms"].values()):
            words = ", ".join(f"{name}={value}" for name, value in lacking.items())
            return one_line(f"the arm {arm} ({words})")
    seeds, count = saved["seeds"][-1], now["seeds"][-1]
    if not count:  # steps are timed, and no report is written
        return ""
    first, ours = saved["first_seed"], now["first_seed"]
    if first < ours or first + seeds > ours + count:
        return f"seeds={seeds} from {first}"
    if rates := set(saved["learning_rates"]) - set(now["learning_rates"]):
        return f"learning_rate={min(rates):g}"
    if saved["margin"] != now["margin"]:
        return f"margin={saved['margin']:g}, which was fixed before its results"
    return ""


def least_lacking(knobs: dict[str, Any], arms: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Those of `knobs` that the most similar of the arms does not have; {} if one has them all."""
    lacking = [{k: v for k, v in knobs.items() if arm.get(k) != v} for arm in arms]
    return min(lacking, key=len)


# -- Cells and their results -----------------------------------------------------------------------


def cell_of(plan: Plan, arm: str, rate: str, seed: int, **more: str) -> Cell:
    """The ValueError of knobs that do not go together names the cell."""
    knobs = plan.fixed | plan.arms[arm] | {"learning_rate": rate, "seed": str(seed)} | more
    try:
        knobs = that_count(plan.preset, knobs)
        return Cell(arm, knobs, read_config([*plan.preset, *as_arguments(knobs)]))
    except ValueError as error:
        raise ValueError(f"{arm}, learning_rate={rate}, seed={seed}: {error}") from error


def grid(plan: Plan) -> list[Cell]:
    """Every cell at equal steps, seed by seed and every other seed backwards, so that a machine
    whose speed drifts drifts for all arms alike."""
    pairs = list(itertools.product(plan.arms, plan.rates))
    in_order = in_turn(pairs, plan.options.seeds)
    return [
        cell_of(plan, arm, rate, plan.first_seed + i // len(pairs))
        for i, (arm, rate) in enumerate(in_order)
    ]


def read_results(path: Path) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """The whole lines of results.jsonl, and Cell.key -> the record of each finished cell. A last
    line that a kill cut short is left out."""
    if not path.exists():
        return b"", {}
    with open_regular(path) as file:
        content = file.read()
    lines, found = content[: content.rfind(b"\n") + 1], {}
    for number, line in enumerate(lines.splitlines(), start=1):
        try:
            record = json.loads(line)
            sound = is_result(record)
            key = json.dumps(record["knobs"], sort_keys=True)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(
                f"{path} is damaged (line {number}): delete the bad line, and its cell is trained "
                f"again"
            )
        other = found.setdefault(key, record)
        if any(other[name] != record[name] for name in ("val_loss", "diverged")):
            raise ValueError(
                f"{path} has two results for one cell, {one_line(record['cell'])} (the second is "
                f"line {number}): delete the wrong one"
            )
    return lines, found


def is_result(record: dict[str, Any]) -> bool:
    """Whether a line of results.jsonl can be from `result_of`: what the report reads is there, and
    is of the right type. TypeError, LookupError and AttributeError also mean that it is not."""
    numbers = "learning_rate seed max_iters train_seconds peak_memory_mb parameters threads".split()
    loss, bits, versions_of = record["val_loss"], record["val_bpb"], record["versions"].values()
    knobs, quantized = record["knobs"], record.get("quantized", {"none": None})
    return (
        all(is_number(record[name]) for name in numbers)
        and all(type(record[name]) is bool for name in ("diverged", "compile"))
        and all(type(record[name]) is str for name in ("cell", "device", "dtype"))
        and (is_number(loss) or (loss is None and record["diverged"]))
        and (is_number(bits) or bits is None)
        and all(type(version) in (str, type(None)) for version in versions_of)
        and all(record[name] >= 0 for name in numbers)
        and type(knobs) is dict
        and all(record[name] == knobs[name] for name in ("learning_rate", "seed", "max_iters"))
        and record["learning_rate"] > 0
        and CELL_NAME.fullmatch(record["cell"]) is not None  # no path to another folder
        and "none" in quantized
        and all(is_number(loss) or loss is None for loss in quantized.values())
    )


def result_of(cell: Cell, folder: Path, exit_code: int) -> dict[str, Any]:
    """The record of a finished cell; its curves stay in its metrics.jsonl. CellFailed if what the
    cell has written is not there any more."""
    about = load_json(folder / "config.json")
    records = read_metrics(folder)
    steps = [record for record in records if {"loss", "step_ms", "peak_memory_mb"} <= record.keys()]
    evaluations = [record for record in records if "val_loss" in record]
    val_loss = val_bpb = None
    if exit_code == 0:
        if not steps or not evaluations:
            raise CellFailed(
                f"error: {folder / METRICS_FILE} lacks the steps or the evaluation of this "
                f"cell any more: delete {folder}, and the cell is trained again"
            )
        val_loss, val_bpb = evaluations[-1]["val_loss"], evaluations[-1].get("val_bpb")
    return {
        "cell": folder.name,
        "arm": cell.arm,
        "learning_rate": cell.config.learning_rate,
        "seed": cell.config.seed,
        "val_loss": val_loss,
        "val_bpb": val_bpb,
        "diverged": val_loss is None or val_loss > steps[0]["loss"],
        "steps": steps[-1]["step"] if steps else 0,
        "max_iters": cell.config.max_iters,
        "train_seconds": training_seconds(records),
        "peak_memory_mb": max((record["peak_memory_mb"] for record in steps), default=0.0),
        **{name: about[name] for name in AUTOMATIC},
        **{name: about[name] for name in ("micro_batch_size", "parameters", "versions")},
        "knobs": json.loads(cell.key),
    }


def quantized_losses(config: Config, folder: Path, kinds: list[str]) -> dict[str, float | None]:
    """The validation loss of a cell's last checkpoint for each kind of simulated quantisation, and
    under "none" without one; None where it is not finite. All are computed here and uncompiled, so
    that they differ in the rounding alone."""
    run, losses = fresh_run(config, compile=False), {}
    for kind in ("none", *kinds):
        model, _, _ = load_model(folder, device=run.config.device)
        run.model = run.forward = model if kind == "none" else simulate_quantization(model, kind)
        try:
            losses[kind] = run.data.mean(validation_losses(run, Interrupts()))
        except FloatingPointError:  # a result, like a loss that diverged
            losses[kind] = None
    return losses


# -- The processes in which cells are trained ------------------------------------------------------


class CellInterrupts(Interrupts):
    """Passes Ctrl-C and SIGTERM on to the cells that are running, which save and end. While no cell
    is running, a signal ends this process."""

    def __init__(self):
        super().__init__()
        self.processes: dict[str, subprocess.Popen] = {}  # by the name of their cell

    def note(self, number: int, frame: Any = None) -> None:
        for process in self.processes.values():
            process.send_signal(number)
        super().note(number, frame)
        if not self.processes:
            raise SystemExit(128 + number)


def launch(command: list[str], threads: int | None) -> subprocess.Popen:
    """Starts train.py in a session of its own, so that a terminal's Ctrl-C reaches it only once,
    through CellInterrupts. If this process is killed, the pipe breaks, and train.py saves and ends.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    return subprocess.Popen(
        [sys.executable, train.__file__, *command],
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def follow(process: subprocess.Popen, log: Path, ended: queue.SimpleQueue, cell: Cell) -> None:
    """For a thread: copies what the process prints into the log, and when the process has ended
    puts (cell, exit code) into the queue `ended`."""
    try:
        with process.stdout, open(log, "ab", buffering=0) as file:
            file.writelines(process.stdout)
    finally:
        ended.put((cell, process.wait()))


# -- The comparison --------------------------------------------------------------------------------


class Lab:
    """Does what a Plan says, and keeps the results. Raises ValueError before anything is made."""

    def __init__(self, plan: Plan, command: str, lock: Lock | None = None):
        self.plan, self.options, self.command = plan, plan.options, command
        self.lock = lock
        self.interrupts = CellInterrupts()
        self.cells = grid(plan)
        self.first = {arm: cell_of(plan, arm, plan.rates[0], plan.first_seed) for arm in plan.arms}
        self.results_file = plan.folder / "results.jsonl"
        self.timing_file = plan.folder / "timing.json"
        self.plan_file = plan.folder / "plan.json"
        ours = (self.plan_file, self.results_file, self.timing_file)
        for path in (*ours, *map(plan.folder.joinpath, WRITTEN)):
            if path.is_dir() and not path.is_symlink():
                raise ValueError(
                    f"{path} is a folder, and the comparison writes a file of this name: move it "
                    f"away, or name another out_dir"
                )
        self.lines, self.results = read_results(self.results_file)
        self.timing = read_timing(self.timing_file)
        self.record = self.checked_record()
        self.threads = max(1, torch.get_num_threads() // self.options.jobs)
        self.choices = self.choose()
        self.refuse_missing_kinds()
        self.timed, self.control = self.timed_cells()

    def checked_record(self) -> dict[str, Any]:
        """What plan.json is to say. ValueError if there are results or a report of another plan."""
        now, folder = record_of(self.plan, self.first), self.plan.folder
        names = (self.results_file.name, *WRITTEN)
        found = [name for name in names if os.path.lexists(folder / name)]
        if found and not self.plan_file.exists():
            raise ValueError(
                f"out_dir={folder} has a {found[0]} but no plan.json, so it may be of another "
                f"comparison and would be replaced: name another folder"
            )
        saved = read_record(self.plan_file) if self.plan_file.exists() else now
        if not found:
            return now
        refuse_another_plan(folder, saved, now)
        looked = saved["seeds"] if "report.md" in found else saved["seeds"][:-1]
        seeds = [count for count in looked if count != now["seeds"][0]] + now["seeds"]
        return now | {"seeds": seeds}

    def keep_plan(self) -> None:
        """Writes plan.json, before there is a result that the plan could be made to fit."""
        self.check_lock()
        text = json.dumps(self.record) + "\n"
        write_atomically(self.plan_file, lambda file: file.write(text.encode()))

    def refuse_missing_kinds(self) -> None:
        """ValueError if a finished cell, whose weights are gone, was not evaluated as is asked."""
        for result in (self.results[c.key] for c in self.cells if c.key in self.results):
            for kind in self.options.kinds:
                if not result["diverged"] and kind not in result.get("quantized", {}):
                    raise ValueError(
                        f"the cell {result['cell']} was finished without quantize={kind}, and its "
                        f"weights are deleted: leave {kind} out, or name another out_dir"
                    )

    def choose(self) -> dict[str, Any]:
        """What auto means in this comparison: what it meant for the cells that are finished, else
        what it means for the reference. Every arm goes through train.py's own checks."""
        wanted = []
        for arm in self.plan.arms:
            try:
                run = fresh_run(self.first[arm].config)
            except ValueError as error:
                raise ValueError(f"{arm}: {error}") from error
            wanted.append(run.config.flat())
            self.data = run.data
        finished = [self.results[cell.key] for cell in self.cells if cell.key in self.results]
        chosen = [*finished, *wanted][0]
        try:
            choose_device(chosen["device"])
        except ValueError as error:
            raise ValueError(
                f"{self.results_file} has cells of another machine, and all must be of one: "
                f"{error}: go on there, or name another out_dir"
            ) from None
        return {name: chosen[name] for name in AUTOMATIC}

    def automatic(self, cell: Cell) -> Knobs:
        """The knobs that the cell leaves to auto, as they were chosen for all cells."""
        left_open = [name for name in AUTOMATIC if getattr(cell.config, name) == "auto"]
        return {name: str(self.choices[name]).lower() for name in left_open}

    def folder_of(self, cell: Cell) -> Path:
        return self.plan.folder / "cells" / cell.name

    def run(self) -> None:
        """Trains, times and reports. SystemExit after a signal, CellFailed if a cell failed."""
        if self.cells:
            self.keep_plan()
        self.train(self.cells)
        timing = self.timing_of_arms()
        if not self.cells:
            print(speed_section(self.study(timing, {})))
            return
        extra = self.equal_time_cells(timing["seconds"])
        self.train(list(itertools.chain(*extra.values())))
        self.check_lock()
        print(f"\n{write_report(self.study(timing, extra))}\n\n{self.plan.folder / 'report.md'}")

    def train(self, cells: list[Cell]) -> None:
        """Trains the cells that are not finished, `jobs` at once.

        After a signal, or when a cell fails, no other cell is started, and those that are running
        are told to save and end; then SystemExit or CellFailed is raised."""
        gc.collect()
        torch.cuda.empty_cache()  # what checks and timing used here is needed by the cells
        # Two arms may be the same run, for instance if they differ in log_interval.
        waiting = [*{cell.key: cell for cell in cells if cell.key not in self.results}.values()]
        running, ended, failure = self.interrupts.processes, queue.SimpleQueue(), ""
        bar = tqdm(
            total=len(cells),
            initial=len(cells) - len(waiting),
            unit="cell",
            disable=not waiting or not sys.stderr.isatty(),  # of nothing it would print 0cell
            dynamic_ncols=True,
        )
        with bar:
            while True:
                stopping = failure or self.interrupts.noted
                if waiting and len(running) < self.options.jobs and not stopping:
                    self.start(waiting.pop(0), ended)
                    continue
                if not running:
                    break
                cell, code = ended.get()
                if code in (0, NOT_FINITE):
                    bar.write(self.finish(cell, code), file=sys.stdout)
                    bar.update()
                elif not failure and not self.interrupts.noted:
                    failure = self.explain(cell, code)
                    for process in running.values():
                        process.terminate()
                del running[cell.name]
        if self.interrupts.noted:
            raise SystemExit(128 + self.interrupts.noted)
        if failure:
            raise CellFailed(failure)

    def start(self, cell: Cell, ended: queue.SimpleQueue) -> None:
        """Starts the cell's process, and a thread that follows it."""
        folder = self.folder_of(cell)
        self.check_lock()
        log = folder / "log.txt"
        if folder.is_symlink():
            raise CellFailed(f"error: {folder} is a link, and nothing is written through one")
        folder.mkdir(parents=True, exist_ok=True)
        if not is_own_file(log):
            log.unlink(missing_ok=True)
        own = {"out_dir": str(folder), "resume": "auto", "sample_tokens": "0"}
        knobs = that_count(self.plan.preset, cell.knobs | self.automatic(cell) | own)
        threads = self.threads if self.options.jobs > 1 else None
        process = launch([*self.plan.preset, *as_arguments(knobs)], threads)
        self.interrupts.processes[cell.name] = process
        threading.Thread(target=follow, args=(process, log, ended, cell)).start()

    def check_lock(self) -> None:
        """To be called before anything is written: FolderLost if it may be another process's."""
        if self.lock is not None:
            self.lock.check()

    def finish(self, cell: Cell, code: int) -> str:
        """Keeps the result and then deletes the weights, which are large and can be made again.
        Returns a line to print."""
        folder = self.folder_of(cell)
        result = result_of(cell, folder, code) | {"threads": self.threads}
        if self.options.kinds and not result["diverged"]:
            config = replace(cell.config, **self.choices)
            result["quantized"] = quantized_losses(config, folder, self.options.kinds)
        self.check_lock()
        self.lines += (json.dumps(result) + "\n").encode()
        write_atomically(self.results_file, lambda file: file.write(self.lines))
        self.results[cell.key] = result
        for path in (folder / "best.pt", *(path for _, path in all_in(folder))):
            path.unlink(missing_ok=True)
        outcome = "diverged"
        if not result["diverged"]:
            outcome = f"val loss {result['val_loss']:.4f} nats per token"
        rate, seed = cell.config.learning_rate, cell.config.seed
        return f"{cell.arm}, learning rate {rate:g}, seed {seed}: {outcome}"

    def explain(self, cell: Cell, code: int) -> str:
        """The end of a failed cell's log, and an error."""
        log = self.folder_of(cell) / "log.txt"
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        error = (
            f"error: the cell {cell.name} ended with exit code {code}; this was the end of {log}"
        )
        return "\n".join([*tail, error])

    def timed_cells(self) -> tuple[dict[str, Cell], dict[str, str]]:
        """(name -> cell of all that is timed, arm -> the name of its control).

        First come the arms, then their controls, which have no norms. All have a learning rate of
        next to nothing, so that none of them diverges."""
        arms, controls, control = {}, {}, {}
        for arm, knobs in self.plan.arms.items():
            still = {"rate": "1e-6", "min_lr": "0", "seed": self.plan.first_seed}
            still |= self.automatic(self.first[arm])
            arms[arm] = cell_of(self.plan, arm, **still)
            if arms[arm].config.init_from:
                continue  # weights that were trained with a norm would be nothing without it
            others = label({name: text for name, text in knobs.items() if name not in CONTROL})
            control[arm] = f"no norm, {others}" if others else "no norm"
            controls[control[arm]] = cell_of(self.plan, arm, **still, **CONTROL)
        return arms | controls, control

    def command_lines(self) -> dict[str, list[str]]:
        """Of each cell that is timed."""
        return {
            name: [*self.plan.preset, *as_arguments(cell.knobs)]
            for name, cell in self.timed.items()
        }

    def timing_of_arms(self) -> dict[str, Any]:
        """Seconds per training step of all arms and controls in turn, while nothing else runs.
        They are kept in timing.json."""
        cells = {name: json.loads(cell.key) for name, cell in self.timed.items()}
        steps, processes = self.options.steps, self.options.processes
        saved = tuple(self.timing.get(name) for name in ("cells", "steps", "processes"))
        if saved == (cells, steps, processes):
            return self.timing
        print(f"timing {processes} x {steps} steps of each: {'; '.join(self.timed)}", flush=True)
        gc.collect()  # what checks used here is needed by the processes
        torch.cuda.empty_cache()
        found = time_in_processes(self.command_lines(), steps, processes)
        timing = found | {"cells": cells}
        self.check_lock()
        text = json.dumps(timing) + "\n"
        write_atomically(self.timing_file, lambda file: file.write(text.encode()))
        return timing

    def equal_time_cells(self, seconds: dict[str, list[list[float]]]) -> dict[str, list[Cell]]:
        """Arm -> its cells at equal wall-clock: at the arm's best learning rate, with as many steps
        as fit into the reference's training time. Arms that are not faster or slower have none."""
        reference, *others = self.plan.arms
        records, extra = self.records(self.cells), {}
        if not self.options.equal_time or not best_cells(records, reference):
            return {}
        for arm in others:
            config, best = self.first[arm].config, best_cells(records, arm)
            ratio, low, high = time_ratio(seconds[arm], seconds[reference])
            steps = max(1, round(self.first[reference].config.max_iters / ratio))
            if not best or low <= 1 <= high or steps == config.max_iters:
                continue
            best_rate, warmup = best[0]["learning_rate"], min(steps, config.warmup_iters)
            rate = next(text for text in self.plan.rates if float(text) == best_rate)
            length = {"max_iters": str(steps), "warmup_iters": str(warmup)}
            if config.taper_end:
                for name in ("taper_start", "taper_end"):
                    of_steps = getattr(config, name) * steps / config.max_iters
                    length[name] = str(max(1, round(of_steps)))
            extra[arm] = [cell_of(self.plan, arm, rate, cell["seed"], **length) for cell in best]
        return extra

    def records(self, cells: list[Cell]) -> list[dict[str, Any]]:
        """The results of cells. Their arm may have had another label when they were trained."""
        return [self.results[cell.key] | {"arm": cell.arm} for cell in cells]

    def study(self, timing: dict[str, Any], extra: dict[str, list[Cell]]) -> Study:
        plan = self.plan
        what = " and ".join(next(iter(plan.arms.values()))) or "one arm"
        configs = {name: cell.config for name, cell in self.timed.items()}
        return Study(
            title=f"Comparison of {what} on {self.data.name}",
            folder=plan.folder,
            arms=list(plan.arms),
            cells=self.records(self.cells),
            extra={arm: self.records(cells) for arm, cells in extra.items()},
            equal_time=self.options.equal_time,
            seconds=timing["seconds"],
            control=self.control,
            facts=self.facts(timing) if self.cells else {},
            tokens={name: c.batch_size * c.model.block_size for name, c in configs.items()},
            kinds=self.options.kinds,
            margin=self.options.margin,
            square=square_of(plan.arms),
        )

    def words_of_plan(self) -> str:
        """What was fixed beforehand, and what was not."""
        margin = f"a margin of {self.options.margin:g}" if self.options.margin else "no margin"
        *earlier, seeds = map(str, self.record["seeds"])
        if not earlier:
            return f"seeds: {seeds}, {margin}; both were fixed before the first report"
        return (
            f"{margin}; seeds were added after a report: {', then '.join([*earlier, seeds])}. "
            f"Intervals and p do not allow for such looks"
        )

    def facts(self, timing: dict[str, Any]) -> dict[str, str]:
        """How the comparison was made, for a reader who wants to make it again."""
        plan, options, cell, config = self.plan, self.options, self.cells[0], self.cells[0].config
        results = self.records(self.cells)
        minutes = sum(result["train_seconds"] for result in results) / 60
        device, dtype, compiled = (self.choices[name] for name in AUTOMATIC)
        micro = " and ".join(map(str, sorted(set(timing["micro_batch_size"].values()))))
        versions_of = [", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in results]
        versions_of = [re.sub(r"[^\w .,+-]", "?", text) for text in versions_of]  # from a file
        tokens = self.data.fingerprint["tokens"]
        again = as_arguments(cell.knobs | self.automatic(cell) | {"out_dir": "out/again"})
        weights = shlex.join(["python", "train.py", *plan.preset, *again])
        return {
            "command": f"`{self.command}`",
            "plan": self.words_of_plan(),
            "cells": (
                f"arms {len(plan.arms)} x learning rates {len(plan.rates)} x seeds "
                f"{options.seeds} from {plan.first_seed}; {minutes:.1f} minutes of training, "
                f"{options.jobs} at once"
            ),
            "data": (
                f"{config.dataset}: {tokens['train']:,} training and {tokens['val']:,} "
                f"validation tokens; {config.batch_size} x {config.model.block_size} tokens per "
                f"step"
            ),
            "machine": (
                f"{processor(device)}, threads: {results[0]['threads']} for a cell, "
                f"{torch.get_num_threads()} for timing, {dtype}, micro-batches of {micro}, "
                f"{'' if compiled is True else 'not '}compiled"
            ),
            "versions": "; ".join(sorted(set(versions_of))),
            "weights": f"not kept; the first cell's: `{weights}`",
        }


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
