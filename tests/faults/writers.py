"""The folder of a run has one writer. Of two that start at once, one must train and the other must
be told so at once. A writer that was killed must not stand in the way of the next.
"""

import random
import shutil
import signal
import time
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import train

from .harness import (
    Child,
    Report,
    bad_end,
    bad_resume,
    before_call,
    difference,
    fault,
    other_files,
    train_child,
    uncut,
)
from .resume import book_of, first_other_step, witness

PATIENCE = 30  # seconds for what takes far less


@fault("two writers at once", whole=40, few=1)
def two_writers(report: Report, tries: int, folder: Path) -> None:
    """In each first try both start afresh, in each second one both resume."""
    whole, begun, seconds = uncut(folder / "whole"), folder / "begun", []
    train_child(begun, partial(witness, book_of(begun), 6, signal.SIGKILL))
    for i in range(tries):
        out, gate = folder / f"run{i}", folder / f"gate{i}"
        gate.mkdir()
        if i % 2:
            shutil.copytree(begun, out)
        outputs = [gate / "0.log", gate / "1.log"]
        pair = [
            Child(out, partial(meet, gate, me), output=outputs[me], resume="auto") for me in (0, 1)
        ]
        first_ended = wait([child.process.sentinel for child in pair], PATIENCE)
        moment = time.monotonic()
        (gate / "ended").touch()
        ends = [child.end() for child in pair]
        loser = int(pair[0].process.sentinel not in first_ended)
        told = ends[loser].text
        late = moment - float((gate / f"{loser}.attempt").read_text())
        failure = bad_end(ends[loser], 2) or bad_end(ends[1 - loser])
        if not (told.startswith(f"error: {out} is in use by ") and told.count("\n") == 1):
            failure = failure or f"not one clear line: {told[-500:]}"
        if late > 1:
            failure = failure or f"told only after {late:.1f} s"
        failure = failure or difference(whole, out) or other_files(whole, out)
        report.count(f"try {i}", failure)
        seconds.append(late)
    report.note = f"told after {max(seconds):.2f} s at most"


def meet(gate: Path, me: int) -> None:
    """In a child: waits until both are there, and notes when it tries to get the folder. The one
    that gets it waits before its first step until the other has ended."""
    attempt = gate / f"{me}.attempt"
    before_call(train, "Lock", lambda folder: attempt.write_text(str(time.monotonic())))
    before_call(train, "batch", lambda *_: wait_until(gate / "ended"))
    (gate / f"{me}").touch()
    wait_until(gate / f"{1 - me}")


def wait_until(there: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not there.exists() and time.monotonic() < end:
        time.sleep(0.001)


@fault("the lock of a killed writer", whole=20, few=0)
def lock_of_a_killed_writer(report: Report, tries: int, folder: Path) -> None:
    """kill -9 leaves the file of the lock behind. The next run must start all the same."""
    whole = folder / "whole"
    uncut(whole, partial(witness, book_of(whole)))
    for i in range(tries):
        out, step = folder / f"run{i}", random.Random(i).randrange(12)
        ended = train_child(out, partial(witness, book_of(out), step, signal.SIGKILL))
        failure = bad_end(ended, -signal.SIGKILL)
        if not (out / ".lock").exists():
            failure = failure or "there is no file of the lock"
        failure = failure or bad_resume(whole, out, partial(witness, book_of(out)))
        failure = failure or first_other_step(whole, out) or other_files(whole, out)
        report.count(f"step {step}", failure)
