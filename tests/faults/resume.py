"""A run that is stopped and resumed must be the run that was never stopped: the same batches,
losses, weights and optimizer state, bit for bit. And what only looks at a run, or writes it down,
must change nothing about it.
"""

import hashlib
import itertools
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import torch

import train

from .harness import (
    Before,
    Report,
    Silent,
    after_call,
    bad_end,
    difference,
    fault,
    last_saved,
    state_hash,
    train_child,
    uncut,
)

STEPS, SAVE_INTERVAL, CUTS = 24, 5, 20
CHOICES = dict(micro_batch_size=(8, 2), dropout=(0, 0.1), dtype=("float32", "bfloat16"))
CHOICES |= dict(eval_interval=(0, 3), optimizer=("adamw", "muon"))
WAYS = [dict(zip(CHOICES, way, strict=True)) for way in itertools.product(*CHOICES.values())]
SIGNALS = [
    (signal.SIGTERM,),
    (signal.SIGKILL,),
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGKILL, signal.SIGTERM),
]


@fault("stopped at a random step, then resumed", whole=len(WAYS) * CUTS, few=1)
def exact_resume(report: Report, tries: int, folder: Path) -> None:
    """A run is stopped once or twice, by SIGTERM or kill -9. All of it must be bitwise equal to the
    run that was not, and a kill may cost no more than the steps since the last save."""
    stopped = 0
    for i in range(tries):
        way = (i + 1) * 11 % len(WAYS)  # in this order, few tries have every value of every knob
        knobs = WAYS[way] | {"n_layer": 1, "max_iters": STEPS, "save_interval": SAVE_INTERVAL}
        whole, cut = folder / f"whole{way}", folder / f"cut{i}"
        uncut(whole, partial(witness, book_of(whole)), **knobs)
        assert len(read_book(whole)) == 2 * STEPS
        stops = stops_of(way, i // len(WAYS))
        failure, lost = stop_and_resume(cut, knobs, stops)
        failure = failure or difference(whole, cut) or first_other_step(whole, cut)
        report.count(f"{knobs}, stopped at {stops}", failure, lost)
        stopped += len(stops)
        shutil.rmtree(cut)
    report.note = f"{stopped:,} stops in {min(tries, len(WAYS))} ways to train"


def stops_of(way: int, number: int) -> list[tuple[int, int]]:
    """(step, signal) of the one or two stops of try `number` of a way to train. The first stop is
    at another step in each try."""
    first = random.Random(way).sample(range(STEPS), CUTS)[number]
    second = random.Random(first).randint(first, STEPS) + 1
    return list(zip((first, second), SIGNALS[(way + number) % len(SIGNALS)], strict=False))


def stop_and_resume(
    out: Path, knobs: dict, stops: list[tuple[int, int]], before: Before = None
) -> tuple[str, int]:
    """(failure, most steps lost at a stop) of a run that is stopped, and started again until it is
    done. `before` is called first in each child."""
    lost = 0
    for step, number in stops:
        stopping = partial(witness, book_of(out), step, number, before)
        ended = train_child(out, stopping, resume="auto", **knobs)
        if step >= STEPS:  # it was done before
            break
        killed = number == signal.SIGKILL
        if failure := bad_end(ended, -number if killed else 128 + number):
            return failure, lost
        # A run that is asked to stop ends its micro-batch first. If that was the last one of the
        # step, the step is done and saved, else it is begun anew by the resumed run.
        whole_step = not killed and knobs.get("micro_batch_size") != 2
        done, saved = step + whole_step, last_saved(out)
        if not 0 <= done - saved <= (SAVE_INTERVAL - 1 if killed else 0):
            return f"{done} steps done, {saved} saved after signal {number}", lost
        lost = max(lost, done - saved)
    watched = partial(witness, book_of(out), before=before)
    return bad_end(train_child(out, watched, resume="auto", **knobs)), lost


@fault("compiled on two threads: stopped, then resumed", whole=8, few=0)
def exact_compiled_resume(report: Report, tries: int, folder: Path) -> None:
    """As above. Threads that add to one gradient at once would give every run other last digits."""
    if not shutil.which("g++"):
        return report.not_tried("there is no g++ here")
    before = partial(two_threads, folder / "kernels")
    for i in range(tries):
        way, stops = i % 2, stops_of(i % 2, i // 2)
        knobs = {"n_layer": 1, "batch_size": 32, "max_iters": STEPS, "compile": "true"}
        knobs |= {"save_interval": SAVE_INTERVAL, "dtype": ("float32", "bfloat16")[way]}
        whole, cut = folder / f"whole{way}", folder / f"cut{i}"
        uncut(whole, before, **knobs)
        failure, lost = stop_and_resume(cut, knobs, stops, before)
        if "does not work" in Path(f"{cut}.log").read_text():
            failure = failure or "the compiler does not work"
        failure = failure or difference(whole, cut)
        report.count(f"{knobs}, stopped at {stops}", failure, lost)


def two_threads(kernels: Path) -> None:
    """In a child: what is compiled is kept in this folder."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kernels)
    torch.set_num_threads(2)


@fault("other intervals of evaluating, saving and looking", whole=40, few=1)
def looking_changes_nothing(report: Report, tries: int, folder: Path) -> None:
    """Runs that evaluate, save, watch, log and sample at other steps must have the batches, the
    losses and the final weights of a run that does none of it."""
    for i in range(tries):
        pick, base, other = random.Random(i), folder / f"plain{i % 2}", folder / f"other{i}"
        way = {"dropout": 0.1, "micro_batch_size": 2, "optimizer": ("adamw", "muon")[i % 2]}
        uncut(base, partial(witness, book_of(base)), **way, eval_interval=0, save_interval=0)
        looking = {
            "eval_interval": pick.randint(1, 5),
            "save_interval": pick.randint(1, 5),
            "keep": pick.randint(1, 3),
            "eval_iters": pick.choice((0, 1, 7)),
            "watch": pick.choice(("true", "false")),
            "log_interval": pick.randint(1, 9),
            "sample_tokens": pick.choice((0, 5)),
        }
        ended = train_child(other, partial(witness, book_of(other)), **way, **looking)
        failure = bad_end(ended) or first_other_step(base, other)
        if len({state_hash(run, but="best_val_loss") for run in (base, other)}) > 1:
            failure = failure or Silent("the final weights differ")
        report.count(str(looking), failure)
        shutil.rmtree(other)


def book_of(out: Path) -> Path:
    """The file in which `witness` writes about the run in `out`."""
    return Path(f"{out}.book")


def witness(book: Path, stop: int | None = None, number: int = 0, before: Before = None) -> None:
    """In a child: writes a line into `book` for the batch of each step, and one for its loss. In
    the middle of step `stop`, counted from 0, the process sends itself the signal `number`."""
    if before:
        before()
    file = open(book, "ab", buffering=0)

    def write_batch(made, data, step, *_):
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in made))
        file.write(f"batch {step} {digest.hexdigest()}\n".encode())
        if step == stop:
            os.kill(os.getpid(), number)

    def write_loss(done, run, *_):
        if done is None:  # a signal came in the step, which is done again
            return
        file.write(f"loss {run.step - 1} {done[0].hex()}\n".encode())

    after_call(train, "batch", write_batch)
    after_call(train, "train_step", write_loss)


def read_book(out: Path) -> dict[str, set[str]]:
    """{"batch 0": {hash}, "loss 0": {number}, ...}. A step that was repeated in another way has two
    in its set."""
    seen: dict[str, set[str]] = {}
    for line in book_of(out).read_text().splitlines() if book_of(out).exists() else ():
        key, _, value = line.rpartition(" ")
        seen.setdefault(key, set()).add(value)
    return seen


def first_other_step(whole: Path, cut: Path) -> str:
    """The first batch or loss that two runs do not have in common, as a failure."""
    ours, others = read_book(whole), read_book(cut)
    odd = (key for key in ours | others if ours.get(key) != others.get(key))
    return next((Silent(f"{key} differs") for key in odd), "")
