"""A run's folder has one writer: of two that start at once, one trains and the other is told so at once; and a writer
that was killed does not stand in the way of the next."""

import random
import shutil
import signal
import time
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import train

from .harness import Child, Report, command, difference, fault, run, words
from .kill import left_behind
from .resume import book_of, first_other_step, witness

PATIENCE = 30  # seconds for what takes far less


@fault("two writers at once", whole=40, few=2)
def two_writers(tries: int, folder: Path) -> Report:
    """Both start afresh in each first try, both resume in each second one."""
    data, report, whole, begun, seconds = words(folder), Report(), folder / "whole", folder / "begun", []
    assert run(command(whole), data)[0] == 0
    run(command(begun), data, partial(witness, book_of(begun), 6, signal.SIGKILL))
    for i in range(tries):
        out, gate = folder / f"run{i}", folder / f"gate{i}"
        gate.mkdir()
        if i % 2:
            shutil.copytree(begun, out)
        pair = [Child(command(out, resume="auto"), data, partial(meet, gate, me), gate / f"{me}.log") for me in (0, 1)]
        ended = wait([child.process.sentinel for child in pair], PATIENCE)
        moment = time.monotonic()
        (gate / "ended").touch()
        codes = [child.wait() for child in pair]
        loser = pair[0].process.sentinel not in ended
        late = moment - float((gate / f"{int(loser)}.attempt").read_text())
        told = pair[loser].text()
        failure = f"exit codes {codes}: {told[-500:]}" if codes[loser] != 2 or codes[not loser] != 0 else ""
        if not (told.startswith(f"error: {out} is in use by ") and told.count("\n") == 1):
            failure = failure or f"not one clear line: {told[-500:]}"
        failure = failure or (f"told only after {late:.1f} s" if late > 1 else "")
        wrong = "" if failure else difference(whole, out)
        failure = failure or wrong or left_behind(whole, out)
        report.count(failure, silent=bool(wrong))
        seconds.append(late)
    report.note = f"told after {max(seconds):.2f} s at most"
    return report


def meet(gate: Path, me: int) -> None:
    """In a child: waits until both are there; then, whoever may train waits before its first step until the other has
    ended. The moment at which it tried to get the folder is noted."""
    take, make_batch = train.Lock, train.batch

    def lock(folder):
        (gate / f"{me}.attempt").write_text(str(time.monotonic()))
        return take(folder)

    def batch(*arguments):
        wait_until(gate / "ended")
        return make_batch(*arguments)

    train.Lock, train.batch = lock, batch
    (gate / f"{me}").touch()
    wait_until(gate / f"{1 - me}")


def wait_until(there: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not there.exists() and time.monotonic() < end:
        time.sleep(0.001)


@fault("the lock of a killed writer", whole=20, few=1)
def lock_of_a_killed_writer(tries: int, folder: Path) -> Report:
    data, report, whole = words(folder), Report(), folder / "whole"
    assert run(command(whole), data, partial(witness, book_of(whole)))[0] == 0
    for i in range(tries):
        out = folder / f"run{i}"
        kill = partial(witness, book_of(out), random.Random(i).randrange(12), signal.SIGKILL)
        code, text = run(command(out), data, kill)
        stale = (out / ".lock").exists()
        if code == -signal.SIGKILL and stale:
            code, text = run(command(out, resume="auto"), data, partial(witness, book_of(out)))
        wrong = "" if code else difference(whole, out) or first_other_step(whole, out)
        report.count((f"exit code {code}, lock file {stale}: {text[-500:]}" if code else wrong)
                     or left_behind(whole, out), silent=bool(wrong))
    return report
