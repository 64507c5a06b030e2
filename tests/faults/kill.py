"""A run that is killed with kill -9, at whatever moment, goes on from its last checkpoint without a hand, and ends as
the run that was never killed. At every moment its folder holds whole checkpoints, which sample.py can read.

kill -9 cannot show what a power cut would leave, because the kernel still writes what it has taken. That rests on the
order of the system calls, which has a fault of its own here.
"""

import builtins
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint
import train
from weights import load_model

from .harness import ROOT, Child, Report, command, difference, fault, run, words
from .resume import first_other_step, witness

HEAVY = {"n_embd": 256, "n_hidden": 1024, "batch_size": 2, "block_size": 8, "save_interval": 2,
         "eval_interval": 5}  # 25 MB of weights and state: most of the time goes into saving them
KILLS_PER_RUN = 10
STEPS_PER_KILL = 6  # about as many as there is time for before one, so that a run is not done before its last
LIGHT = {"n_layer": 1, "resume": "auto"}


class Kill(NamedTuple):
    failure: str
    in_save: bool
    lost: int  # steps that had been done and were not saved
    recovery: float | None  # seconds; None if it was killed before its first new step


@fault("kill -9 at any moment", whole=300, few=4)
def kill_at_any_moment(tries: int, folder: Path) -> Report:
    data, report, pick, in_save, runs = words(folder), Report(), random.Random(0), 0, 0
    run(command(folder / "warm", max_iters=1), data)  # the first start takes longer
    whole, kills_per_run, start = folder / "whole", min(tries, KILLS_PER_RUN), time.monotonic()
    knobs = HEAVY | {"max_iters": STEPS_PER_KILL * kills_per_run}
    code, text = run(command(whole, resume="auto", **knobs), data, partial(observed, whole))
    assert code == 0, text
    longest = 2 * (time.monotonic() - start) / kills_per_run
    while report.tries < tries:
        out, kills, runs = folder / f"run{runs}", [], runs + 1
        while len(kills) < min(kills_per_run, tries - report.tries):
            kill = start_and_kill(command(out, resume="auto", **knobs), out, data, pick.uniform(0, longest))
            if kill is None:  # it was done before
                break
            kills.append(kill)
        code, text = run(command(out, resume="auto", **knobs), data, partial(observed, out))
        in_save += sum(kill.in_save for kill in kills)
        count_all(report, kills, code, text, whole, out)
        shutil.rmtree(out)
    report.note = f"{in_save / report.tries:.0%} of the kills inside a save, {runs} runs; recovery is without imports"
    return report


def count_all(report: Report, kills: list[Kill], code: int, text: str, whole: Path, out: Path) -> None:
    """Counts the kills of one run, which has ended since; the last of them answers for how it ended."""
    wrong = "" if code else difference(whole, out) or first_other_step(whole, out)
    failure = f"exit code {code} after the last kill: {text[-500:]}" if code else wrong or left_behind(whole, out)
    for i, kill in enumerate(kills, start=1):
        last, much = i == len(kills), kill.lost > HEAVY["save_interval"]
        report.count(kill.failure or (f"{kill.lost} steps lost" if much else failure if last else ""),
                     silent=bool(wrong and last), lost=kill.lost, recovery=kill.recovery)


def start_and_kill(arguments: list[str], out: Path, data: Path, delay: float) -> Kill | None:
    """Starts the run in `out`, or goes on with it, and kills it after `delay` seconds; None if it ended before."""
    saving(out).write_bytes(b"0")
    before, start = len(times(out)), time.monotonic()
    child = Child(arguments, data, partial(observed, out))
    child.process.join(delay)
    if child.process.exitcode is None:
        child.signal(signal.SIGKILL)
    code = child.wait()
    if code == 0:
        return None
    known = max((step for step, _ in times(out)[:before]), default=0)
    new = [moment for step, moment in times(out)[before:] if step > known]
    done = max((step for step, _ in times(out)), default=0)
    lost = done - max((step for step, _ in checkpoint.all_in(out)), default=0)
    failure = f"exit code {code}: {child.text()[-500:]}" if code != -signal.SIGKILL else unreadable(out)
    return Kill(failure, saving(out).read_bytes() == b"1", lost, new[0] - start if new else None)


def observed(out: Path) -> None:
    """In a child: notes each step with its moment, what `witness` does, and in a byte whether it is inside a save."""
    witness(Path(f"{out}.book"))
    save, train_step, moments = checkpoint.save, train.train_step, open(f"{out}.times", "ab", buffering=0)
    flag = os.open(saving(out), os.O_RDWR | os.O_CREAT)

    def noted_save(*arguments):
        os.pwrite(flag, b"1", 0)
        save(*arguments)
        os.pwrite(flag, b"0", 0)

    def noted_step(run):
        result = train_step(run)
        moments.write(f"{run.step} {time.monotonic()}\n".encode())
        return result

    checkpoint.save, train.train_step = noted_save, noted_step


def saving(out: Path) -> Path:
    """The file whose one byte says whether the run in `out` is inside a save."""
    return Path(f"{out}.saving")


def times(out: Path) -> list[tuple[int, float]]:
    """(step, moment) of each step that was done for the run in `out`, by whatever process."""
    file = Path(f"{out}.times")
    pairs = (line.split() for line in (file.read_text().splitlines() if file.exists() else ()))
    return [(int(step), float(moment)) for step, moment in pairs]


def unreadable(out: Path) -> str:
    """What of the checkpoints in `out` cannot be loaded, or not be sampled from, as a failure."""
    try:
        for _, path in checkpoint.all_in(out):
            checkpoint.load(path)
        for which, there in (("latest", checkpoint.all_in(out)), ("best", (out / "best.pt").exists())):
            if there:
                load_model(out, which)
    except (ValueError, OSError) as error:
        return f"not to be sampled from after the kill: {error}"
    return ""


def left_behind(whole: Path, out: Path) -> str:
    """A file that only one of the runs has, the one that was never killed and the one that was, as a failure."""
    odd = {path.name for path in whole.iterdir()} ^ {path.name for path in out.iterdir()}
    return f"files that only one of the runs has: {sorted(odd)}" if odd else ""


@fault("kill -9 of python train.py itself", whole=6, few=0)
def kill_the_program(tries: int, folder: Path) -> Report:
    words(copy_program(folder))
    report, pick, kills, whole, out = Report(), random.Random(0), [], folder / "whole", folder / "run"
    knobs = HEAVY | {"max_iters": 100}
    assert start_program(whole, knobs=knobs).wait() == 0, printed(whole)
    while len(kills) < tries:
        done, start = last_step(out), time.monotonic()
        process = start_program(out, knobs=knobs)
        while process.poll() is None and last_step(out) <= done and time.monotonic() < start + 120:
            time.sleep(0.01)
        recovery = time.monotonic() - start
        time.sleep(pick.uniform(0, 0.1))  # longer than two steps and a save take
        process.kill()
        code = process.wait()
        lost = last_step(out) - max((step for step, _ in checkpoint.all_in(out)), default=0)
        failure = unreadable(out) if code == -signal.SIGKILL else f"exit code {code}: {printed(out)[-500:]}"
        kills.append(Kill(failure, False, lost, recovery))
    count_all(report, kills, start_program(out, knobs=knobs).wait(), printed(out), whole, out)
    report.note = "recovery is with the imports of Python and torch"
    return report


def copy_program(folder: Path) -> Path:
    """The program, without its data sets, in `folder`: train.py looks for those beside itself."""
    for part in (".", "config", "data"):
        (folder / part).mkdir(exist_ok=True)
        for file in (ROOT / part).glob("*.py"):
            shutil.copy(file, folder / part)
    return folder


def start_program(out: Path, *before: object, knobs: dict) -> subprocess.Popen:
    """`python train.py` for a run in `out`, beside which the program is; `before`: a command that is to run it."""
    arguments = command(out, resume="auto", **knobs)
    with open(f"{out}.log", "ab") as log:
        return subprocess.Popen([*map(str, before), sys.executable, "train.py", *arguments], stdout=log, stderr=log,
                                cwd=out.parent)


def printed(out: Path) -> str:
    """All that the program has printed about the run in `out`, in all its processes."""
    return Path(f"{out}.log").read_text() if Path(f"{out}.log").exists() else ""


def last_step(out: Path) -> int:
    return max((int(step) for step in re.findall(r"^step (\d+)/\d+ \| loss", printed(out), re.M)), default=0)


@fault("kill -9 before, in and after each call that changes a file", whole=1000, few=8)
def kill_at_each_call(tries: int, folder: Path) -> Report:
    """Not more tries than there are such moments, of a run from its start and of one that is resumed."""
    folder = folder.resolve()  # as the kernel names it
    data, report, whole, begun = words(folder), Report(), folder / "whole", folder / "begun"
    assert run(command(whole, **LIGHT), data)[0] == 0
    run(command(begun, **LIGHT), data, partial(witness, folder / "begun.book", 6, signal.SIGKILL))
    moments = [(fresh, i) for fresh in (True, False)
               for i in range(len(moments_of(folder / f"moments{fresh}", None if fresh else begun, data)))]
    for fresh, i in moments if tries >= len(moments) else random.Random(0).sample(moments, tries):
        out = folder / "run"
        if not fresh:
            shutil.copytree(begun, out)
        code, text = run(command(out, **LIGHT), data, partial(spy, out, partial(die_at, [i])))
        moment = (folder / f"moments{fresh}.calls").read_text().splitlines()[i]
        failure = unreadable(out) if code == -signal.SIGKILL else f"exit code {code}: {text[-500:]}"
        code, text = (0, "") if failure else run(command(out, **LIGHT), data)
        failure = failure or (f"exit code {code}: {text[-500:]}" if code else "")
        wrong = "" if failure else difference(whole, out)
        failure = failure or wrong or left_behind(whole, out)
        report.count(f"{moment}: {failure}" if failure else "", silent=bool(wrong))
        shutil.rmtree(out, ignore_errors=True)
    report.note = f"of {len(moments)} moments that there are"
    return report


def moments_of(out: Path, begun: Path | None, data: Path) -> list[str]:
    """What `spy` notes of a run in `out` that is killed by nobody, from its start or from a copy of `begun`."""
    if begun:
        shutil.copytree(begun, out)
    calls = Path(f"{out}.calls")
    code, text = run(command(out, **LIGHT), data, partial(spy, out, partial(write_down, calls)))
    assert code == 0, text
    return calls.read_text().splitlines()


def write_down(calls: Path, moment: str) -> None:
    with open(calls, "a") as file:
        file.write(moment + "\n")


def die_at(left: list[int], moment: str) -> None:
    """kill -9 at the moment that as many others precede as the list says."""
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1


CALLS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "ftruncate")
PART = 50_000  # bytes


def spy(out: Path, note: Callable[[str], None]) -> None:
    """In a child: calls note("before fsync NAME"), note("after fsync NAME") and so on around every call that concerns
    `out` or a file in it; while a file is written, in the middle of its first write and of one in each PART."""
    def name(file: Any) -> str | None:
        path = Path(os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file)
        return path.name if out in (path, path.parent) else None

    def noted(call: str, function: Callable) -> Callable:
        def both(file, *rest, **options):
            what = name(file)
            if what:
                note(f"before {call} {what}")
            result = function(file, *rest, **options)
            if what:
                note(f"after {call} {what}")
            return Written(result, what, note) if what and call == "open for writing" else result
        return both

    def opened(file, mode="r", *rest, **options):
        reading = set(mode) <= set("rbt")
        return (noted("open for reading", real_open) if reading else for_writing)(file, mode, *rest, **options)

    real_open = io.open
    for_writing = noted("open for writing", real_open)
    builtins.open = io.open = opened
    for call in CALLS:
        setattr(os, call, noted(call, getattr(os, call)))


class Written:
    """A file open for writing, whose writes are noted."""

    def __init__(self, file: Any, name: str, note: Callable[[str], None]):
        self.file, self.name, self.note, self.parts = file, name, note, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        self.note(f"after close {self.name}")

    def write(self, data: bytes) -> int:
        if self.file.tell() < self.parts * PART:
            return self.file.write(data)
        self.parts = self.file.tell() // PART + 1
        written = self.file.write(data[:len(data) // 2])
        self.file.flush()
        self.note(f"in write {self.name}")
        return written + self.file.write(data[len(data) // 2:])


@fault("order of write, fsync and rename", whole=2, few=1)
def order_of_calls(tries: int, folder: Path) -> Report:
    """The first try looks at the functions that Python calls, the second, where there is strace, at the kernel's."""
    folder = folder.resolve()  # as the kernel names it
    report, ways, seen = Report(), [spied, traced if strace_works() else spied], []
    for i, way in enumerate(ways[:tries]):
        (folder / str(i)).mkdir()
        calls = way(folder / str(i) / "run")
        committed = [call.split()[2] for call in calls if call.startswith("rename")]
        removed = [call for call in calls if call.startswith("unlink ckpt_")]
        wanted = {"config.json", "tokenizer.json", "metrics.jsonl", "best.pt", "ckpt_00000004.pt", "ckpt_00000012.pt"}
        missed = f"not seen: {sorted(wanted - set(committed))}" if wanted - set(committed) or not removed else ""
        report.count(missed or out_of_order(calls))
        seen.append(f"{len(committed)} renames and {len(removed)} removal by {way.__name__}")
    report.note = "; ".join(seen)
    return report


def out_of_order(calls: list[str]) -> str:
    """The first of the calls that a power cut could make a loss, as a failure. They are `write NAME`, `fsync NAME`,
    `read NAME`, `rename FROM TO` and `unlink NAME`; `.` is the folder.

    A file must be on the disk before it is renamed; a checkpoint must be read back in between; the folder must be on
    the disk before anything else is renamed or removed.
    """
    state: dict[str, str] = {}  # the last that was done with a file
    for call in calls:
        what, name, *to = call.split()
        if what in ("rename", "unlink") and state.get(".") == "rename":
            return f"{call} before the rename that came before it was flushed"
        if what == "rename" and state.get(name) != ("read" if to[0].endswith(".pt") else "fsync"):
            return f"{call} after {state.get(name)}"
        if what == "rename":
            state["."] = what
        elif what != "read" or state.get(name) == "fsync":
            state[name] = what
    return "the last rename was not flushed" if state.get(".") == "rename" else ""


def strace_works() -> bool:
    """Whether there is strace here, and it may watch a process."""
    return bool(shutil.which("strace")) and not subprocess.run(
        ["strace", "-o", os.devnull, sys.executable, "-c", ""], capture_output=True).returncode


def traced(out: Path) -> list[str]:
    """The calls of `python train.py` for a run in `out` that concern it, by strace."""
    program = out.parent
    words(copy_program(program))
    calls = "openat,write,writev,pwrite64,fsync,fdatasync,?rename,?renameat,?renameat2,?unlink,?unlinkat"
    arguments = ["-ff", "-y", "-s", "0", "-e", f"trace={calls}", "-o", program / "trace"]
    code = start_program(out, "strace", *arguments, knobs={}).wait()
    assert code == 0, printed(out)
    traces = [text for text in (path.read_text() for path in program.glob("trace.*")) if f"{out}/" in text]
    assert len(traces) == 1, "more than one thread changes files"  # their order would not be known
    found = (call_in(line, str(out)) for line in traces[0].splitlines())
    return [call for call in found if call]


def call_in(line: str, out: str) -> str:
    """A line of strace's as out_of_order has it; empty if it is not about files in `out`, or failed."""
    name, _, rest = line.partition("(")
    paths = [path.removeprefix(out).lstrip("/") or "." for path in re.findall(r'[<"]([^<>"]*)[>"]', rest)
             if path == out or path.startswith(out + "/")]
    if not paths or ") = -1 " in line:
        return ""
    if name == "openat":
        return f"read {paths[0]}" if "O_RDONLY" in rest and "O_DIRECTORY" not in rest else ""
    kind = {"writev": "write", "pwrite64": "write", "fdatasync": "fsync"}.get(name, re.sub("at2?$", "", name))
    return " ".join((kind, *paths[:2 if kind == "rename" else 1]))


def spied(out: Path) -> list[str]:
    """The same, from the functions that spy() replaces."""
    forms = {"in write": "write", "before open for reading": "read", "after fsync": "fsync", "before unlink": "unlink",
             "before replace": "rename", "before rename": "rename"}
    calls = []
    for moment in moments_of(out, None, words(out.parent)):
        when, _, name = moment.rpartition(" ")
        if when in forms:
            whither = f" {name[1:].removesuffix('.tmp')}" if forms[when] == "rename" else ""
            calls.append(f"{forms[when]} {'.' if name == out.name else name}{whither}")
    return calls
