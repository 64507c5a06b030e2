"""A run that was stopped and resumed is the run that was not: the same batches, losses, weights and optimizer state,
bit for bit. And what only looks at a run, or writes it down, changes nothing about it."""

import hashlib
import itertools
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import checkpoint
import train

from .harness import Report, command, difference, fault, run, state_hash, words

STEPS, SAVE_INTERVAL, CUTS = 24, 5, 20
COMBINATIONS = [
    {"micro_batch_size": 8 // accumulation, "dropout": dropout, "dtype": dtype, "eval_interval": interval,
     "optimizer": optimizer}
    for accumulation, dropout, dtype, interval, optimizer in itertools.product(
        (1, 4), (0, 0.1), ("float32", "bfloat16"), (0, 3), ("adamw", "muon"))]
SIGNALS = [(signal.SIGTERM,), (signal.SIGKILL,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGKILL, signal.SIGTERM)]


@fault("stopped at a random step, then resumed", whole=len(COMBINATIONS) * CUTS, few=6)
def exact_resume(tries: int, folder: Path) -> Report:
    data, report, stopped = words(folder), Report(), 0
    for i in range(tries):
        at = i * 11 % len(COMBINATIONS)  # an order in which a few of them have every value of every knob
        knobs = COMBINATIONS[at] | {"n_layer": 1, "max_iters": STEPS, "save_interval": SAVE_INTERVAL}
        whole, cut = folder / f"whole{at}", folder / f"cut{i}"
        if not whole.exists():
            code, text = run(command(whole, **knobs), data, partial(witness, book_of(whole)))
            assert code == 0 and len(read_book(whole)) == 2 * STEPS, text
        stops = stops_of(at, i // len(COMBINATIONS))
        failure, lost = stop_and_resume(cut, knobs, data, stops)
        wrong = "" if failure else difference(whole, cut) or first_other_step(whole, cut)
        report.count(f"{knobs}, stopped at {stops}: {failure or wrong}" if failure or wrong else "",
                     silent=bool(wrong), lost=lost)
        stopped += len(stops)
        shutil.rmtree(cut)
    report.note = f"{stopped:,} stops in {min(tries, len(COMBINATIONS))} ways to train"
    return report


def stops_of(combination: int, number: int) -> list[tuple[int, int]]:
    """(step, signal) of the one or two stops of a combination's try `number`; the first is at another step in each."""
    first = random.Random(combination).sample(range(STEPS), CUTS)[number]
    second = random.Random(first).randint(first, STEPS) + 1
    return list(zip((first, second), SIGNALS[(combination + number) % len(SIGNALS)], strict=False))


def stop_and_resume(out: Path, knobs: dict, data: Path, stops: list[tuple[int, int]]) -> tuple[str, int]:
    """(failure, most steps lost at a stop) of a run in `out` that is stopped and started again until it is done."""
    lost = 0
    for step, number in stops:
        code, text = run(command(out, resume="auto", **knobs), data, partial(witness, book_of(out), step, number))
        if step >= STEPS:  # it was done before
            break
        if code != (-number if number == signal.SIGKILL else 128 + number):
            return f"exit code {code} after signal {number}: {text[-500:]}", lost
        saved = max((s for s, _ in checkpoint.all_in(out)), default=0)
        done = step if number == signal.SIGKILL else step + 1  # asked to stop, it first ends and saves the step
        if not 0 <= done - saved <= (SAVE_INTERVAL - 1 if number == signal.SIGKILL else 0):
            return f"{done} steps done, {saved} saved after signal {number}", lost
        lost = max(lost, done - saved)
    code, text = run(command(out, resume="auto", **knobs), data, partial(witness, book_of(out)))
    return ("" if code == 0 else f"exit code {code} of the resumed run: {text[-500:]}"), lost


@fault("other intervals of evaluating, saving and looking", whole=40, few=2)
def looking_changes_nothing(tries: int, folder: Path) -> Report:
    data, report, plain = words(folder), Report(), {"eval_interval": 0, "save_interval": 0}
    base = [{"dropout": 0.1, "micro_batch_size": 2, "optimizer": optimizer} for optimizer in ("adamw", "muon")]
    for i, knobs in enumerate(base):
        whole = folder / f"plain{i}"
        code, text = run(command(whole, **knobs, **plain), data, partial(witness, book_of(whole)))
        assert code == 0, text
    for i in range(tries):
        pick = random.Random(i)
        looking = {"eval_interval": pick.randint(1, 5), "save_interval": pick.randint(1, 5), "keep": pick.randint(1, 3),
                   "eval_iters": pick.choice((0, 1, 7)), "watch": pick.choice(("true", "false")),
                   "log_interval": pick.randint(1, 9), "sample_tokens": pick.choice((0, 5))}
        whole, other = folder / f"plain{i % 2}", folder / f"other{i}"
        code, text = run(command(other, **base[i % 2], **looking), data, partial(witness, book_of(other)))
        wrong = "" if code else first_other_step(whole, other) or (
            "the final weights differ" if len({state_hash(f, but="best_val_loss") for f in (whole, other)}) > 1 else "")
        report.count(f"{looking}: {wrong or text[-500:]}" if code or wrong else "", silent=bool(wrong))
        shutil.rmtree(other)
    return report


def book_of(out: Path) -> Path:
    """Where `witness` writes about the run in `out`."""
    return Path(f"{out}.book")


def witness(book: Path, stop: int | None = None, number: int = 0) -> None:
    """In a child: a line in `book` for the batch of each step, and one for its loss. Step `stop` is counted from 0; in
    the middle of it the process sends itself the signal `number`."""
    make_batch, train_step, file = train.batch, train.train_step, open(book, "ab", buffering=0)

    def batch(data, step, *rest):
        x, y = make_batch(data, step, *rest)
        file.write(f"batch {step} {hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()}\n".encode())
        if step == stop:
            os.kill(os.getpid(), number)
        return x, y

    def step(run):
        result = train_step(run)
        file.write(f"loss {run.step - 1} {result[0].hex()}\n".encode())
        return result

    train.batch, train.train_step = batch, step


def read_book(out: Path) -> dict[str, set[str]]:
    """{"batch 0": {hash}, "loss 0": {number}, ...}: a step that was done again, and not in the same way, has two."""
    seen: dict[str, set[str]] = {}
    for line in book_of(out).read_text().splitlines() if book_of(out).exists() else ():
        key, _, value = line.rpartition(" ")
        seen.setdefault(key, set()).add(value)
    return seen


def first_other_step(whole: Path, cut: Path) -> str:
    """The first batch or loss that is not the same in both runs, as a failure; empty if there is none."""
    ours, others = read_book(whole), read_book(cut)
    return next((f"{key} differs" for key in ours | others if ours.get(key) != others.get(key)), "")
