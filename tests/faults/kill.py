"""A run that is killed with kill -9, at whatever moment, must go on from its last checkpoint by
itself and end as the run that was never killed. At every moment its folder must hold whole
checkpoints, which sample.py can read.

kill -9 cannot show what a power cut would leave, because the kernel still writes what it has taken.
What a power cut leaves depends on the order of the system calls, which is a fault of its own here.
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

import train
from weights import checkpoint

from .harness import (
    Child,
    Ended,
    Report,
    after_call,
    bad_end,
    bad_resume,
    before_call,
    difference,
    fault,
    last_saved,
    other_files,
    start_program,
    train_child,
    uncut,
    unreadable,
)
from .resume import first_other_step, witness

# 25 MB of weights and state, so that most of the time goes into saving them.
HEAVY = dict(n_embd=256, n_hidden=1024, batch_size=2, block_size=8)
HEAVY |= dict(save_interval=2, eval_interval=5)
KILLS_PER_RUN = 10
STEPS_PER_KILL = 6  # about as many as there is time for before one, so the run lasts for all kills
LIGHT = {"n_layer": 1, "resume": "auto"}


class Kill(NamedTuple):
    failure: str
    in_save: bool
    lost: int  # steps that had been done and were not saved
    recovery: float | None  # seconds; None if it was killed before its first new step


@fault("kill -9 at any moment", whole=300, few=1)
def kill_at_any_moment(report: Report, tries: int, folder: Path) -> None:
    """Each run is killed up to 10 times. No kill may cost more than the steps since the last save,
    and every kill must leave whole checkpoints."""
    pick, in_save, runs = random.Random(0), 0, 0
    uncut(folder / "warm", max_iters=2)  # the first start takes longer
    whole, kills_per_run, start = folder / "whole", min(tries, KILLS_PER_RUN), time.monotonic()
    knobs = HEAVY | {"max_iters": STEPS_PER_KILL * kills_per_run, "resume": "auto"}
    uncut(whole, partial(observed, whole), **knobs)
    longest = 2 * (time.monotonic() - start) / kills_per_run
    while report.tries < tries:
        out, kills, runs = folder / f"run{runs}", [], runs + 1
        while len(kills) < min(kills_per_run, tries - report.tries):
            kill = start_and_kill(out, pick.uniform(0, longest), knobs)
            if kill is None:  # it was done before
                break
            kills.append(kill)
        in_save += sum(kill.in_save for kill in kills)
        count_all(report, kills, train_child(out, partial(observed, out), **knobs), whole, out)
        shutil.rmtree(out)
    share = in_save / report.tries
    report.note = (
        f"{share:.0%} of the kills inside a save, {runs} runs; recovery is without imports"
    )


def count_all(report: Report, kills: list[Kill], ended: Ended, whole: Path, out: Path) -> None:
    """Counts the kills of one run, which has `ended` since. The last kill answers for its end."""
    end = bad_end(ended) or difference(whole, out) or first_other_step(whole, out)
    end = end or other_files(whole, out)
    for i, kill in enumerate(kills, start=1):
        failure = kill.failure
        if kill.lost > HEAVY["save_interval"]:
            failure = failure or f"{kill.lost} steps lost"
        if i == len(kills):
            failure = failure or end
        report.count(f"kill {i} of {out.name}", failure, kill.lost, kill.recovery)


def start_and_kill(out: Path, delay: float, knobs: dict) -> Kill | None:
    """Starts or resumes the run in `out`, and kills it after `delay` seconds; None if it ended
    before."""
    saving(out).write_bytes(b"0")
    before, start = len(times(out)), time.monotonic()
    child = Child(out, partial(observed, out), **knobs)
    child.process.join(delay)
    if child.process.exitcode is None:
        child.signal(signal.SIGKILL)
    ended = child.end()
    if ended.code == 0:
        return None
    known = max((step for step, _ in times(out)[:before]), default=0)
    new = [moment for step, moment in times(out)[before:] if step > known]
    done = max((step for step, _ in times(out)), default=0)
    failure = bad_end(ended, -signal.SIGKILL) or unreadable(out)
    recovery = new[0] - start if new else None
    return Kill(failure, saving(out).read_bytes() == b"1", done - last_saved(out), recovery)


def observed(out: Path) -> None:
    """In a child: notes the moment of each step, what `witness` notes, and, in a byte, whether the
    run is inside a save."""
    witness(Path(f"{out}.book"))
    flag = os.open(saving(out), os.O_RDWR | os.O_CREAT)
    moments = open(f"{out}.times", "ab", buffering=0)
    before_call(checkpoint, "save", lambda *_: os.pwrite(flag, b"1", 0))
    after_call(checkpoint, "save", lambda *_: os.pwrite(flag, b"0", 0))

    def write_moment(done, run, *_):
        moments.write(f"{run.step} {time.monotonic()}\n".encode())

    after_call(train, "train_step", write_moment)


def saving(out: Path) -> Path:
    """The file whose one byte says whether the run in `out` is inside a save."""
    return Path(f"{out}.saving")


def times(out: Path) -> list[tuple[int, float]]:
    """(step, moment) of each step that was done for the run in `out`, by whatever process."""
    file = Path(f"{out}.times")
    pairs = (line.split() for line in (file.read_text().splitlines() if file.exists() else ()))
    return [(int(step), float(moment)) for step, moment in pairs]


@fault("kill -9 of python train.py itself", whole=6, few=0)
def kill_the_program(report: Report, tries: int, folder: Path) -> None:
    """The same with the command that a user types, which takes seconds to import PyTorch."""
    pick, kills, out = random.Random(0), [], folder / "run"
    knobs = HEAVY | {"max_iters": 100, "resume": "auto"}
    whole = uncut(folder / "whole", **knobs)
    while len(kills) < tries:
        done, start = last_step(out), time.monotonic()
        process = start_program(out, **knobs)
        while process.poll() is None and last_step(out) <= done and time.monotonic() < start + 120:
            time.sleep(0.01)
        recovery = time.monotonic() - start
        time.sleep(pick.uniform(0, 0.1))  # longer than two steps and a save take
        process.kill()
        failure = bad_end(Ended(process.wait(), printed(out)), -signal.SIGKILL) or unreadable(out)
        kills.append(Kill(failure, False, last_step(out) - last_saved(out), recovery))
    ended = Ended(start_program(out, **knobs).wait(), printed(out))
    count_all(report, kills, ended, whole, out)
    report.note = "recovery is with the imports of Python and torch"


def printed(out: Path) -> str:
    """All that the program has printed about the run in `out`, in all its processes."""
    log = Path(f"{out}.log")
    return log.read_text() if log.exists() else ""


def last_step(out: Path) -> int:
    """The last step that the program has printed."""
    steps = re.findall(r"^step (\d+)/\d+ \| loss", printed(out), re.M)
    return max(map(int, steps), default=0)


# A kill at every call that changes a file


@fault("kill -9 before, in and after each call that changes a file", whole=1000, few=1)
def kill_at_each_call(report: Report, tries: int, folder: Path) -> None:
    """Both of a run from its start and of one that is resumed. There are no more tries than there
    are such moments."""
    folder = folder.resolve()  # the kernel names it so
    whole, begun = uncut(folder / "whole", **LIGHT), folder / "begun"
    train_child(begun, partial(witness, folder / "begun.book", 6, signal.SIGKILL), **LIGHT)
    moments = [
        (source, i, moment)
        for name, source in (("fresh", None), ("resumed", begun))
        for i, moment in enumerate(moments_of(folder / name, source))
    ]
    for source, i, moment in random.Random(0).sample(moments, min(tries, len(moments))):
        out = folder / "run"
        if source:
            shutil.copytree(source, out)
        ended = train_child(out, partial(spy, out, partial(die_at, [i])), **LIGHT)
        failure = bad_end(ended, -signal.SIGKILL) or unreadable(out)
        report.count(moment, failure or bad_resume(whole, out, **LIGHT) or other_files(whole, out))
        shutil.rmtree(out, ignore_errors=True)
    report.note = f"of {len(moments)} moments that there are"


def moments_of(out: Path, source: Path | None = None) -> list[str]:
    """What `spy` notes of a run that nobody kills, from its start or from a copy of `source`."""
    if source:
        shutil.copytree(source, out)
    calls = Path(f"{out}.calls")
    ended = train_child(out, partial(spy, out, partial(write_down, calls)), **LIGHT)
    assert ended.code == 0, ended
    return calls.read_text().splitlines()


def write_down(calls: Path, moment: str) -> None:
    with open(calls, "a") as file:
        file.write(moment + "\n")


def die_at(left: list[int], moment: str) -> None:
    """kill -9 at the moment before which there are so many others as the list says."""
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1


CALLS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "ftruncate")
PART = 50_000  # bytes


def spy(out: Path, note: Callable[[str], None]) -> None:
    """In a child: calls note("before fsync NAME"), note("after fsync NAME") and so on around every
    call that concerns `out` or a file in it. While a file is written, it also calls note("in write
    NAME") in the middle of its first write, and of one write in each PART."""

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
        return (for_reading if reading else for_writing)(file, mode, *rest, **options)

    for_reading, for_writing = (noted(f"open for {w}", io.open) for w in ("reading", "writing"))
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
        written = self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.note(f"in write {self.name}")
        return written + self.file.write(data[len(data) // 2 :])


# The order of the calls


@fault("order of write, fsync and rename", whole=2, few=1)
def order_of_calls(report: Report, tries: int, folder: Path) -> None:
    """The first try looks at the functions that Python calls. The second looks at the kernel's
    calls, where strace works."""
    folder = folder.resolve()  # the kernel names it so
    seen = []
    wanted = {"config.json", "tokenizer.json", "metrics.jsonl", "best.pt"}
    wanted |= {"ckpt_00000004.pt", "ckpt_00000012.pt"}
    for way in [spied, traced if strace_works() else spied][:tries]:
        (folder / str(len(seen))).mkdir()
        calls = way(folder / str(len(seen)) / "run")
        committed = [call.split()[2] for call in calls if call.startswith("rename")]
        missing = wanted - set(committed)
        failure = f"not seen: {sorted(missing)}" if missing else out_of_order(calls)
        if not any(call.startswith("unlink ckpt_") for call in calls):
            failure = failure or "no removal was seen"
        report.count(way.__name__, failure)
        seen.append(f"{len(committed)} renames and 1 removal by {way.__name__}")
    report.note = "; ".join(seen)


def out_of_order(calls: list[str]) -> str:
    """The first of the calls that a power cut could turn into a loss, as a failure. They are `write
    NAME`, `fsync NAME`, `read NAME`, `rename FROM TO` and `unlink NAME`; `.` is the folder.

    A file must be on the disk before it is renamed. A checkpoint must be read back in between. The
    folder must be on the disk before anything else is renamed or removed.
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
    """Whether there is strace here, and whether it may watch a process."""
    program = ["strace", "-o", os.devnull, sys.executable, "-c", ""]
    return (
        bool(shutil.which("strace")) and not subprocess.run(program, capture_output=True).returncode
    )


def traced(out: Path) -> list[str]:
    """The calls of `python train.py` that concern the folder of its run, by strace."""
    calls = "openat,write,writev,pwrite64,fsync,fdatasync,?rename,?renameat,?renameat2"
    calls += ",?unlink,?unlinkat"
    options = ["-ff", "-y", "-s", "0", "-e", f"trace={calls}", "-o", out.parent / "trace"]
    code = start_program(out, "strace", *options, sys.executable).wait()
    assert code == 0, printed(out)
    texts = [path.read_text() for path in out.parent.glob("trace.*")]
    texts = [text for text in texts if f"{out}/" in text]
    # The order of the calls of two threads would not be known.
    assert len(texts) == 1, "more than one thread changes files"
    found = (call_in(line, str(out)) for line in texts[0].splitlines())
    return [call for call in found if call]


def call_in(line: str, out: str) -> str:
    """A line of strace's in the words of out_of_order; '' if the call failed, or is not about files
    in `out`."""
    name, _, rest = line.partition("(")
    paths = [
        path.removeprefix(out).lstrip("/") or "."
        for path in re.findall(r'[<"]([^<>"]*)[>"]', rest)
        if path == out or path.startswith(out + "/")
    ]
    if not paths or ") = -1 " in line:
        return ""
    if name == "openat":
        return f"read {paths[0]}" if "O_RDONLY" in rest and "O_DIRECTORY" not in rest else ""
    other_names = {"writev": "write", "pwrite64": "write", "fdatasync": "fsync"}
    kind = other_names.get(name, re.sub("at2?$", "", name))
    return " ".join((kind, *paths[: 2 if kind == "rename" else 1]))


def spied(out: Path) -> list[str]:
    """The same calls, from the functions that spy() replaces."""
    forms = {
        "in write": "write",
        "before open for reading": "read",
        "after fsync": "fsync",
        "before unlink": "unlink",
        "before replace": "rename",
        "before rename": "rename",
    }
    calls = []
    for moment in moments_of(out):
        when, _, name = moment.rpartition(" ")
        if when in forms:
            to = f" {name[1:].removesuffix('.tmp')}" if forms[when] == "rename" else ""
            calls.append(f"{forms[when]} {'.' if name == out.name else name}{to}")
    return calls
