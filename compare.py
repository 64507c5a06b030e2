"""Compare norms, or any other knobs, on equal terms.

python compare.py [config/PRESET.py] [knob=A,B,...] [learning_rate=X,Y,...] [seeds=5] [knob=value ...]
python compare.py --list                 every norm in one line
python compare.py watch RUN [RUN ...]    what runs with watch=true saw inside the model, as a plot

An arm is one combination of the listed knobs except the learning rate, the first is the reference. A cell is an arm at
one rate with one seed, trained by train.py in a process of its own. All is written to out_dir (out/compare-PRESET).
  seeds=5                       paired seeds: arms share data order and initial weights; 0 = only time the arms
  jobs=1                        cells trained at once, which share the threads
  steps=30                      training steps timed of each arm, in turn, when nothing else runs
  equal_time=true               also train each arm for the reference's time, if it is faster or slower per step

The same command again goes on where it stopped. Every knob can be set, and those that are not text can be lists:"""

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import norm
import train
import watch
from checkpoint import NEVER_COMPARED, all_in, write_atomically
from config.schema import Config, convert, help_text, knobs_of, print_help, split_arguments, user_errors
from device import processor, versions
from lock import Lock
from metrics import read_metrics
from model import ModelConfig
from report import Study, best_cells, speed_section, time_ratio, write_report
from run import Run, read_config, set_up
from train import NOT_FINITE, Interrupts, first_step, timed_step

OPTIONS = {"seeds": ("5", int, 0), "jobs": ("1", int, 1), "steps": ("30", int, 2), "equal_time": ("true", bool, False)}
AUTOMATIC = ("device", "dtype", "compile")  # decided once, so that no two cells can differ in them
CONTROL = {"norm": "none", "norm_pos": "pre", "qk_norm": "false", "norm_impl": "eager"}  # timed only: no norm at all
UNTIMED = 3  # rounds before those that count, beside the first steps, which compile
Knobs = dict[str, str]  # name -> value, as text of a command line


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    preset: list[str]  # its path, or nothing for the default
    folder: Path
    fixed: Knobs  # those with one value
    arms: dict[str, Knobs]  # by label; the first is the reference
    rates: list[str]
    first_seed: int
    seeds: int
    jobs: int
    steps: int
    equal_time: bool


@dataclass(frozen=True)
class Cell:
    """One training run of the comparison."""

    arm: str
    knobs: Knobs  # as on train.py's command line
    config: Config  # what preset and knobs come to

    @property
    def key(self) -> str:
        """Equal for two cells exactly if they are the same run, of the same code."""
        knobs = {k: v for k, v in self.config.flat().items() if k not in NEVER_COMPARED}
        return json.dumps(knobs | {"code": versions()["code"]}, sort_keys=True)

    @property
    def name(self) -> str:
        words = f"{self.arm}-lr{self.config.learning_rate:g}-seed{self.config.seed}"
        return f"{re.sub('[^a-zA-Z0-9_.-]+', '-', words)}-{hashlib.sha256(self.key.encode()).hexdigest()[:8]}"


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 1 if a cell failed, 2 for the user's error, 130 and 143 after Ctrl-C and SIGTERM."""
    if argv[:1] == ["watch"]:
        return watch.main(argv[1:])
    if {"-h", "--help"} & set(argv):
        print_help(help_text(__doc__, Config, ModelConfig))
        return 0
    if argv == ["--list"]:
        print("\n".join(f"{kind:18}{function.__doc__.splitlines()[0]}" for kind, function in norm.EAGER.items()))
        return 0
    with user_errors():
        plan = read_plan(argv)
        lock = Lock(plan.folder)
    with lock:
        with user_errors():
            lab = Lab(plan, shlex.join(["python", "compare.py", *argv]))
        with lab.interrupts:
            try:
                lab.run()
            except SystemExit as stop:  # a number after a signal, a text after a fault
                fault = stop.code if isinstance(stop.code, str) else "stopped"
                print(f"{fault}\nfinished cells are kept, and the same command goes on from here", file=sys.stderr)
                return stop.code if fault == "stopped" else 1
    return 0


def read_plan(argv: list[str]) -> Plan:
    """The command line, checked as far as one can without the grid. Raises ValueError."""
    preset, pairs = split_arguments(argv)
    options = {name: convert(name, pairs.pop(name, text), kind) for name, (text, kind, _) in OPTIONS.items()}
    for name, (_, _, least) in OPTIONS.items():
        if options[name] < least:
            raise ValueError(f"{name} must be {least} or more, got {options[name]}")
    for name, meaning in ("seed", "the first seed, seeds=N says how many"), ("out_dir", "the folder of all"):
        if "," in pairs.get(name, ""):
            raise ValueError(f"{name}={pairs[name]} cannot be a list: it is {meaning}")
    if "resume" in pairs:
        raise ValueError("resume is not for a comparison, which always goes on where it stopped: leave it out")
    kinds = {name: kind for name, (kind, _) in knobs_of(Config, ModelConfig).items() if kind is not str}
    lists = {name: text.split(",") for name, text in pairs.items() if name in kinds and "," in text}
    for name, values in lists.items():
        if len({convert(name, value, kinds[name]) for value in values}) < len(values):
            raise ValueError(f"{name}={pairs[name]} has a value twice: keep one")
    base = read_config([*preset, *arguments(pairs | {name: values[0] for name, values in lists.items()})])
    if "/" in base.dataset or Path(base.dataset).is_file():
        raise ValueError(f"dataset={base.dataset} may change meanwhile: python data/prepare.py TEXT name=NAME first")
    stem = Path(preset[0]).resolve().name.removesuffix(".py") if preset else "small"
    rates = lists.pop("learning_rate", [pairs.get("learning_rate", repr(base.learning_rate))])
    arms = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    fixed = {name: text for name, text in pairs.items() if name not in lists}
    return Plan(preset, Path(pairs.get("out_dir", f"out/compare-{stem}")), fixed,
                {label(arm) or stem: arm for arm in arms}, rates, base.seed, **options)


def arguments(knobs: Knobs) -> list[str]:
    return [f"{name}={text}" for name, text in knobs.items()]


def label(knobs: Knobs) -> str:
    """'rmsnorm, dropout=0.1': a word speaks for itself, anything else needs its name."""
    return ", ".join(text if re.fullmatch("[a-z][a-z0-9_]*", text) and text not in ("true", "false", "yes", "no") else
                     f"{name}={text}" for name, text in knobs.items())


def cell_of(plan: Plan, arm: str, rate: str, seed: int, **more: str) -> Cell:
    """ValueError names the cell whose knobs do not go together."""
    knobs = plan.fixed | plan.arms[arm] | {"learning_rate": rate, "seed": str(seed)} | more
    try:
        return Cell(arm, knobs, read_config([*plan.preset, *arguments(knobs)]))
    except ValueError as error:
        raise ValueError(f"{arm}, learning_rate={rate}, seed={seed}: {error}") from error


def grid(plan: Plan) -> list[Cell]:
    """Every cell at equal steps, seed by seed, every other seed backwards: what drifts, drifts for all arms."""
    return [cell for i in range(plan.seeds)
            for cell in [cell_of(plan, arm, rate, plan.first_seed + i) for arm in plan.arms for rate in plan.rates]
            [::-1 if i % 2 else 1]]


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Cell.key -> record of each finished cell. A last line that a kill cut short is cut off the file too."""
    whole = path.read_bytes() if path.exists() else b""
    lines = whole[:whole.rfind(b"\n") + 1]
    if lines != whole:
        os.truncate(path, len(lines))
    try:
        records = [json.loads(line) for line in lines.splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the bad line, and its cell is trained again") from error
    return {json.dumps(record["knobs"], sort_keys=True): record for record in records}


def result_of(cell: Cell, folder: Path, exit_code: int) -> dict[str, Any]:
    """The record of a finished cell; its curves stay in its metrics.jsonl."""
    records, about = read_metrics(folder), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    steps = [r for r in records if "loss" in r]
    timed = zip(steps, [0, *(r["step"] for r in steps)], strict=False)  # each with the step of the one before
    last = [r for r in records if "val_loss" in r][-1] if exit_code == 0 else {"val_loss": None, "val_bpb": None}
    return {"cell": folder.name, "arm": cell.arm, "learning_rate": cell.config.learning_rate, "seed": cell.config.seed,
            "val_loss": last["val_loss"], "val_bpb": last["val_bpb"],
            "diverged": last["val_loss"] is None or last["val_loss"] > steps[0]["loss"],
            "steps": steps[-1]["step"] if steps else 0, "max_iters": cell.config.max_iters,
            "train_seconds": sum((r["step"] - before) * r["step_ms"] for r, before in timed) / 1000,
            "peak_memory_mb": max((r["peak_memory_mb"] for r in steps), default=0.0),
            **{name: about[name] for name in (*AUTOMATIC, "micro_batch_size", "parameters", "versions")},
            "knobs": json.loads(cell.key)}


class Passing(Interrupts):
    """Ctrl-C and SIGTERM go on to the cells, which save and end, and are waited for; without a cell they end us."""

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
    """train.py in a session of its own: Ctrl-C reaches it once, through us. Killing us breaks its pipe: it saves."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    return subprocess.Popen([sys.executable, train.__file__, *command], env=environment, start_new_session=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def follow(process: subprocess.Popen, log: Path, ended: queue.SimpleQueue, cell: Cell) -> None:
    """Copies what a process prints into its log until it ends, then tells so. For a thread."""
    try:
        with process.stdout, open(log, "ab", buffering=0) as file:
            file.writelines(process.stdout)
    finally:
        ended.put((cell, process.wait()))


class Lab:
    """Does what a Plan says, and keeps what came out. Raises ValueError before anything is made."""

    def __init__(self, plan: Plan, command: str):
        self.plan, self.command, self.interrupts = plan, command, Passing()
        self.cells, self.folder, self.results_file = grid(plan), plan.folder / "cells", plan.folder / "results.jsonl"
        self.first = {arm: cell_of(plan, arm, plan.rates[0], plan.first_seed) for arm in plan.arms}
        self.results = read_results(self.results_file)
        self.threads = max(1, torch.get_num_threads() // plan.jobs)
        self.choices = self.choose()
        self.timed, self.control = self.timed_cells()

    def choose(self) -> dict[str, Any]:
        """Puts each arm through train.py's own checks. Returns what auto comes to: as before, or for the reference."""
        chosen = [self.results[cell.key] for cell in self.cells if cell.key in self.results]
        for arm in self.plan.arms:
            try:
                run = self.prepare(self.first[arm])
            except ValueError as error:
                raise ValueError(f"{arm}: {error}") from error
            chosen.append(run.config.flat())
            self.data = run.data
        return {name: chosen[0][name] for name in AUTOMATIC}

    def prepare(self, cell: Cell) -> Run:
        """The cell's Run before its first step, here in this process; nothing is written."""
        return set_up(replace(cell.config, out_dir=str(self.plan.folder / "none"), resume="no"))

    def automatic(self, cell: Cell) -> Knobs:
        """What the cell left to auto, as it was chosen for all."""
        return {name: str(self.choices[name]).lower() for name in AUTOMATIC if getattr(cell.config, name) == "auto"}

    def run(self) -> None:
        """Everything in its order. SystemExit with a number after a signal, with a text if a cell failed."""
        self.train(self.cells)
        timing = self.time_arms()
        if not self.cells:
            print(speed_section(self.study(timing, {})))
            return
        extra = self.equal_time_cells(timing["seconds"])
        self.train(list(itertools.chain(*extra.values())))
        print(f"\n{write_report(self.study(timing, extra))}\n\n{self.plan.folder / 'report.md'}")

    def train(self, cells: list[Cell]) -> None:
        """Trains the cells that are not finished, `jobs` at once; when one fails, the others save and end."""
        gc.collect()
        torch.cuda.empty_cache()  # the cells need what was used here for checks and timing
        waiting = [cell for cell in cells if cell.key not in self.results]
        running, ended, stop = self.interrupts.processes, queue.SimpleQueue(), None
        with tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="cell", disable=not sys.stderr.isatty(),
                  dynamic_ncols=True) as bar:
            while running or (waiting and not stop):
                while waiting and len(running) < self.plan.jobs and not stop:
                    self.start(waiting.pop(0), ended)
                cell, code = ended.get()
                if code in (0, NOT_FINITE):
                    bar.write(self.finish(cell, code), file=sys.stdout)
                    bar.update()
                elif not (stop or self.interrupts.noted):
                    stop = self.explain(cell, code)
                    for process in running.values():
                        process.terminate()
                running.pop(cell.name)
                stop = 128 + self.interrupts.noted if self.interrupts.noted else stop
        if stop:
            raise SystemExit(stop)

    def start(self, cell: Cell, ended: queue.SimpleQueue) -> None:
        folder = self.folder / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        knobs = cell.knobs | self.automatic(cell) | {"out_dir": str(folder), "resume": "auto", "sample_tokens": "0"}
        process = launch([*self.plan.preset, *arguments(knobs)], self.threads if self.plan.jobs > 1 else None)
        self.interrupts.processes[cell.name] = process
        threading.Thread(target=follow, args=(process, folder / "log.txt", ended, cell)).start()

    def finish(self, cell: Cell, code: int) -> str:
        """Keeps the result, then drops the weights, which are large and can be made again. Returns a line to print."""
        folder = self.folder / cell.name
        result = result_of(cell, folder, code) | {"threads": self.threads}
        with open(self.results_file, "a", encoding="utf-8") as file:
            print(json.dumps(result), file=file, flush=True)
            os.fsync(file.fileno())
        self.results[cell.key] = result
        for path in (folder / "best.pt", *(path for _, path in all_in(folder))):
            path.unlink(missing_ok=True)
        outcome = "diverged" if result["diverged"] else f"val loss {result['val_loss']:.4f} nats per token"
        return f"{cell.arm}, learning rate {cell.config.learning_rate:g}, seed {cell.config.seed}: {outcome}"

    def explain(self, cell: Cell, code: int) -> str:
        log = self.folder / cell.name / "log.txt"
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        return f"{tail}\nerror: the cell {cell.name} ended with exit code {code}; this was the end of {log}"

    def timed_cells(self) -> tuple[dict[str, Cell], dict[str, str]]:
        """(what to time, the arms and then their controls without norms; arm -> its control)."""
        arms, controls, control = {}, {}, {}  # at a learning rate of next to nothing, so that none of them diverges
        for arm, knobs in self.plan.arms.items():
            still = {"rate": "1e-6", "min_lr": "0", "seed": self.plan.first_seed, **self.automatic(self.first[arm])}
            arms[arm] = cell_of(self.plan, arm, **still)
            others = label({name: text for name, text in knobs.items() if name not in CONTROL})
            if not arms[arm].config.init_from:  # weights that have learned with a norm are nothing without
                control[arm] = f"no norm, {others}" if others else "no norm"
                controls[control[arm]] = cell_of(self.plan, arm, **still, **CONTROL)
        return arms | controls, control

    def time_arms(self) -> dict[str, Any]:
        """Seconds per training step of all arms in turn, with nothing else running; kept in timing.json."""
        path, what = self.plan.folder / "timing.json", {name: json.loads(c.key) for name, c in self.timed.items()}
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if (saved.get("cells"), saved.get("steps")) == (what, self.plan.steps):
            return saved
        print(f"timing {self.plan.steps} steps of each: {'; '.join(self.timed)}")
        torch._dynamo.reset()
        runs = {name: self.prepare(cell) for name, cell in self.timed.items()}
        with torch._dynamo.config.patch(recompile_limit=8 * len(runs)):  # all come from one Decoder.forward
            seconds = {name: [first_step(run)[-1]] for name, run in runs.items()}
            for i in range(UNTIMED + self.plan.steps):
                for name in list(runs)[::-1 if i % 2 else 1]:
                    seconds[name].append(timed_step(runs[name])[-1])
        timing = {"seconds": {name: times[-self.plan.steps:] for name, times in seconds.items()},
                  "micro_batch_size": {name: run.config.micro_batch_size for name, run in runs.items()},
                  "steps": self.plan.steps, "cells": what}
        write_atomically(path, lambda file: file.write((json.dumps(timing) + "\n").encode()))
        return timing

    def equal_time_cells(self, seconds: dict[str, list[float]]) -> dict[str, list[Cell]]:
        """Arm -> its cells, at its best learning rate, with as many steps as fit into the reference's training time."""
        (reference, *others), records, extra = self.plan.arms, self.records(self.cells), {}
        for arm in others if self.plan.equal_time and best_cells(records, reference) else ():
            config, best = self.first[arm].config, best_cells(records, arm)
            ratio, low, high = time_ratio(seconds[arm], seconds[reference])
            steps = max(1, round(self.first[reference].config.max_iters / ratio))
            if best and not low <= 1 <= high and steps != config.max_iters:
                rate = next(text for text in self.plan.rates if float(text) == best[0]["learning_rate"])
                length = {"max_iters": str(steps), "warmup_iters": str(min(steps, config.warmup_iters))}
                extra[arm] = [cell_of(self.plan, arm, rate, cell["seed"], **length) for cell in best]
        return extra

    def records(self, cells: list[Cell]) -> list[dict[str, Any]]:
        return [self.results[cell.key] | {"arm": cell.arm} for cell in cells]

    def study(self, timing: dict[str, Any], extra: dict[str, list[Cell]]) -> Study:
        plan, what = self.plan, " and ".join(next(iter(self.plan.arms.values()))) or "one arm"
        return Study(
            title=f"Comparison of {what} on {self.data.folder.name}", folder=plan.folder, arms=list(plan.arms),
            cells=self.records(self.cells), extra={arm: self.records(cells) for arm, cells in extra.items()},
            equal_time=plan.equal_time, seconds=timing["seconds"], control=self.control,
            facts=self.facts(timing) if self.cells else {},
            tokens={name: c.config.batch_size * c.config.model.block_size for name, c in self.timed.items()})

    def facts(self, timing: dict[str, Any]) -> dict[str, str]:
        """How it was made, to be read and to be done again."""
        plan, cell, results = self.plan, self.cells[0], self.records(self.cells)
        micro = " and ".join(map(str, sorted(set(timing["micro_batch_size"].values()))))
        again = arguments(cell.knobs | self.automatic(cell) | {"out_dir": "out/again"})
        return {
            "command": f"`{self.command}`",
            "cells": f"arms {len(plan.arms)} x learning rates {len(plan.rates)} x seeds {plan.seeds} from "
                     f"{plan.first_seed}; {sum(r['train_seconds'] for r in results) / 60:.1f} minutes of training, "
                     f"{plan.jobs} at once",
            "data": f"{cell.config.dataset}: {len(self.data.train):,} training and {len(self.data.val):,} validation "
                    f"tokens; {cell.config.batch_size} x {cell.config.model.block_size} tokens per step",
            "machine": f"{processor(self.choices['device'])}, threads: {results[0]['threads']} for a cell, "
                       f"{torch.get_num_threads()} for timing, {self.choices['dtype']}, micro-batches of {micro}, "
                       f"{'' if self.choices['compile'] is True else 'not '}compiled",
            "versions": "; ".join(sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in results})),
            "weights": f"not kept; the first cell's: `{shlex.join(['python', 'train.py', *plan.preset, *again])}`"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
