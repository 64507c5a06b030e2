"""A signal must lose nothing. Within one step and one save the run is saved and over, with exit
code 128 + the number of the signal, and resume=auto goes on from there.

A second signal ends the run at once. So does a first one before training has begun: while a run is
set up or compiled, nothing is there to be lost. A data set whose preparation is stopped leaves
nothing behind.
"""

import io
import json
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

import torch

import data.prepare
import run.setup
import train
from data.corpus import Corpus, Piece
from data.loader import open_dataset
from model import Decoder
from run.metrics import read_metrics
from run.signals import Interrupts
from weights import checkpoint

from .harness import (
    ROOT,
    Child,
    Ended,
    Report,
    after_call,
    bad_end,
    bad_resume,
    before_call,
    checkpoints,
    difference,
    fault,
    left_over,
    train_child,
    uncut,
    unreadable,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
KNOBS = dict(micro_batch_size=2, eval_interval=3, dropout=0.1)  # 48 micro-batches, 4 evaluations
PATIENCE = 20.0  # seconds for a step, a save and the end of a process, on a very busy machine
AT_ONCE = 10.0  # seconds that a second signal may take, in a place that takes a minute
COMPILERS = {"c++", "g++", "cc1plus", "clang", "clang++", "as", "ld", "collect2"}
RUNS: list[run.setup.Run] = []  # in a child: its run, once it is built


# Traps: places in the program where the signal comes


class Trap:
    """In a child: springs when it is reached for the `occasion`-th time."""

    def __init__(self, occasion: int, spring: Callable[[], None]):
        self.left, self.spring = occasion, spring

    def reached(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.spring()


def trapped(place: Callable[[Trap], None], occasion: int, spring: Callable[[], None]) -> None:
    """In a child, before it starts: lays a trap at the place."""
    after_call(run.setup, "build", lambda built, *_: RUNS.append(built))
    place(Trap(occasion, spring))


def around(trap: Trap, owner: object, name: str, when: Callable = lambda *_: True) -> None:
    """The trap lies just before and just after the calls of owner.name for which `when` is true."""
    before_call(owner, name, lambda *arguments: trap.reached() if when(*arguments) else None)
    after_call(owner, name, lambda _, *arguments: trap.reached() if when(*arguments) else None)


def in_a_step(trap: Trap) -> None:
    around(trap, train, "batch")


def in_a_micro_batch(trap: Trap) -> None:
    before_call(Decoder, "forward", lambda model, *_: trap.reached() if model.training else None)


def in_an_evaluation(trap: Trap) -> None:
    before_call(Decoder, "forward", lambda model, *_: None if model.training else trap.reached())


def in_a_save(trap: Trap) -> None:
    """In the middle of the file, before it gets its name, and after."""
    save = torch.save

    def halved(state: dict, file) -> None:
        whole = io.BytesIO()
        save(state, whole)
        half = whole.getbuffer().nbytes // 2
        file.write(whole.getbuffer()[:half])
        file.flush()
        trap.reached()
        file.write(whole.getbuffer()[half:])

    torch.save = halved
    around(trap, os, "replace", when=lambda source, target: str(target).endswith(".pt"))


def in_set_up(trap: Trap) -> None:
    around(trap, run.setup, "open_dataset")
    around(trap, run.setup, "build")
    around(trap, train, "warm_up")
    around(trap, train, "claim_folder")


def in_preparation(trap: Trap) -> None:
    """Where train.py prepares the data set that every Python has, which is a short one here."""
    corpus = Corpus("python", "a short text", short_text, tokenizer="byte")
    data.prepare.open_corpus = lambda *asked: corpus
    for name in ("open_corpus", "make_tokenizer", "encode_pieces", "meta_of", "xz_bits_per_byte"):
        around(trap, data.prepare, name)
    around(trap, data.prepare, "sync", when=lambda path: path.name == "train.bin")
    around(trap, os, "rename", when=lambda source, target: target.name == "python")


def short_text():
    pick = random.Random(0)
    for number in range(40):
        text = "".join(pick.choices("abcdefgh \n", k=1000))
        yield Piece("val" if number % 10 == 0 else "train", True, text)


# What a trap does


def note(moment: Path) -> None:
    """Writes when it happened, and after how many steps of the run."""
    unfinished = moment.with_suffix(".part")
    steps = RUNS[-1].step if RUNS else 0
    unfinished.write_text(json.dumps({"time": time.monotonic(), "step": steps}))
    unfinished.rename(moment)  # not by os.replace, in which there may be a trap


def send(number: int, moment: Path) -> None:
    note(moment)
    os.kill(os.getpid(), number)


def dawdle(moment: Path) -> None:
    """A minute of small products: a place that is slow without being stuck in one call."""
    note(moment)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        torch.ones(64, 64) @ torch.ones(64, 64)


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def spread(i: int, tries: int, over: float) -> float:
    """The i-th of so many numbers, spread evenly between 0 and `over`. A single one is in the
    middle."""
    return over * (2 * i + 1) / (2 * tries)


def stop(child: Child, number: int, moment: Path) -> tuple[str, float, int]:
    """Waits for a child that a signal stops: (failure, seconds from the signal to its end, steps
    before the signal)."""
    ended, end = child.end(), time.monotonic()
    if not moment.exists():
        return f"it ended with {ended.code} before the signal: {ended.text[-300:]}", 0.0, 0
    noted = json.loads(moment.read_text())
    seconds = end - noted["time"]
    return bad_end(ended, 128 + number) or too_slow(seconds), seconds, noted["step"]


def too_slow(seconds: float, limit: float = PATIENCE) -> str:
    return f"it took {seconds:.1f} s to stop, not {limit:.1f} s" if seconds > limit else ""


# A signal while a run trains


def stop_in_training(
    place: Callable, occasions: int, numbers: tuple, report: Report, tries: int, folder: Path
) -> None:
    """Each try stops a run at one occasion of the place and resumes it."""
    whole, slowest = uncut(folder / "whole", **KNOBS), 0.0
    for i in range(tries):
        number, occasion = numbers[i % len(numbers)], 1 + int(spread(i, tries, occasions))
        out, moment = folder / f"cut{i}", folder / f"moment{i}"
        before = partial(trapped, place, occasion, partial(send, number, moment))
        child = Child(out, before, **KNOBS)
        failure, seconds, step = stop(child, number, moment)
        lost, slowest = None, max(slowest, seconds)
        if not failure:
            failure, lost = resumed(whole, out, child.text(), step)
        report.count(f"{number.name}, occasion {occasion}", failure, lost)
    report.note = f"at most {slowest:.2f} s from the signal to the end"


def resumed(whole: Path, cut: Path, text: str, step: int) -> tuple[str, int | None]:
    """(failure, steps done again) of going on after a stop whose signal came after `step` steps."""
    saved = re.search(r"saved at step (\d+); train.py \S+ goes on from here", text)
    if not saved:
        return f"it does not say that it saved: {text[-300:]}", None
    at = int(saved[1])
    if not step <= at <= step + 1:
        return f"it went on from step {step} to step {at}", None
    if left_over(cut):
        return left_over(cut), None
    done = max((r["step"] for r in read_metrics(cut) if "loss" in r), default=0)
    ended = train_child(cut, resume="auto", **KNOBS)
    if not re.search(rf" from step {at}\n|already at step {at} of", ended.text):
        return f"it did not go on from step {at}: {ended}", None
    return bad_end(ended) or difference(whole, cut), done - at


for name, whole, few, place, occasions, numbers in (
    ("SIGTERM, SIGINT or SIGHUP in a step", 30, 0, in_a_step, 24, (*SIGNALS, signal.SIGHUP)),
    ("SIGTERM or SIGINT in a micro-batch", 20, 0, in_a_micro_batch, 48, SIGNALS[::-1]),
    ("SIGTERM or SIGINT in an evaluation", 20, 0, in_an_evaluation, 8, SIGNALS),
    ("SIGTERM or SIGINT in a save", 20, 1, in_a_save, 12, SIGNALS[::-1]),
):
    fault(name, whole, few)(partial(stop_in_training, place, occasions, numbers))


def in_a_long_step(trap: Trap) -> None:
    """In a micro-batch, after which each one takes a fifth of a second."""

    def reached(model: Decoder, *_) -> None:
        if model.training:
            trap.reached()
            time.sleep(0.2 if trap.left < 1 else 0)

    before_call(Decoder, "forward", reached)


@fault("SIGTERM or SIGINT in a step of many micro-batches", whole=8, few=0)
def stopped_in_a_long_step(report: Report, tries: int, folder: Path) -> None:
    """The run must not wait for the step, which would take 13 seconds. What is done of it must be
    thrown away, and the run must be saved as it was before."""
    count, slowest = 64, 0.0
    knobs = {"batch_size": count, "micro_batch_size": 1, "max_iters": 3, "dropout": 0.1}
    whole = uncut(folder / "whole", **knobs)
    for i in range(tries):
        number, occasion = SIGNALS[i % 2], 1 + int(spread(i, tries, 2.5 * count))
        out, moment = folder / f"cut{i}", folder / f"moment{i}"
        before = partial(trapped, in_a_long_step, occasion, partial(send, number, moment))
        child = Child(out, before, **knobs)
        failure, seconds, _ = stop(child, number, moment)
        slowest = max(slowest, seconds)
        if f"saved at step {occasion // count};" not in child.text():
            failure = failure or f"not saved at the last whole step: {child.text()[-300:]}"
        failure = failure or left_over(out) or bad_resume(whole, out, **knobs)
        report.count(f"{number.name}, micro-batch {occasion}", failure, lost=0)
    report.note = f"at most {slowest:.2f} s from the signal to the end"


@fault("SIGTERM or SIGINT in set-up", whole=20, few=1)
def stopped_in_set_up(report: Report, tries: int, folder: Path) -> None:
    """Of a fresh run and, in every second pair of tries, of one that goes on from step 3. The run
    must end at once, leave nothing half made, and the next start must find things as they were."""
    whole, slowest = uncut(folder / "whole", **KNOBS), 0.0
    stopped = train_child(folder / "half", partial(trapped, in_a_step, 7, hang_up), **KNOBS)
    assert stopped.code == 129 and "saved at step 3;" in stopped.text, stopped
    for i in range(tries):
        number, occasion = SIGNALS[i % 2], 1 + int(spread(i, tries, 8))
        out, moment, begun = folder / f"cut{i}", folder / f"moment{i}", i % 4 > 1
        if begun:
            shutil.copytree(folder / "half", out)
        before = partial(trapped, in_set_up, occasion, partial(send, number, moment))
        child = Child(out, before, resume="auto", **KNOBS)
        failure, seconds, _ = stop(child, number, moment)
        slowest = max(slowest, seconds)
        failure = failure or left_over(out)
        if not failure:
            ended, start = train_child(out, resume="auto", **KNOBS), 3 if begun else 0
            failure = bad_end(ended) or difference(whole, out)
            if f" from step {start}\n" not in ended.text:
                failure = failure or f"it did not go on from step {start}: {ended}"
        report.count(f"{number.name}, occasion {occasion}", failure, lost=0)
    report.note = f"at most {slowest:.2f} s from the signal to the end"


def ignoring_hang_up(place: Callable[[Trap], None], occasion: int) -> None:
    """In a child: what nohup does, and then a terminal that closes."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    trapped(place, occasion, hang_up)


@fault("SIGHUP under nohup", whole=5, few=0)
def not_stopped_under_nohup(report: Report, tries: int, folder: Path) -> None:
    """The run must not even notice."""
    whole = uncut(folder / "whole")
    for i in range(tries):
        out, occasion = folder / f"run{i}", 1 + int(spread(i, tries, 24))
        ended = train_child(out, partial(ignoring_hang_up, in_a_step, occasion))
        report.count(f"occasion {occasion}", bad_end(ended) or difference(whole, out))


@fault("a second signal in a step, an evaluation or a save", whole=18, few=1)
def stopped_at_once(report: Report, tries: int, folder: Path) -> None:
    """The place is slow, and the second signal must not wait for it. What was saved before must
    stay as it is. A resumed run repeats the steps since then."""
    whole, slowest = uncut(folder / "whole", **KNOBS), 0.0
    places = ((in_a_save, 10), (in_a_step, 14), (in_an_evaluation, 5))
    for i in range(tries):
        place, occasion = places[i % 3]
        first, second = SIGNALS[i % 2], SIGNALS[i // 2 % 2]
        out, moment, heard = folder / f"cut{i}", folder / f"moment{i}", folder / f"heard{i}"
        before = partial(slow_and_listening, place, occasion, moment, heard)
        child = Child(out, before, **KNOBS)
        child.wait_for(moment.exists)
        saved = checkpoints(out)
        child.signal(first)
        child.wait_for(heard.exists)
        child.signal(second)
        begin = time.monotonic()
        ended = child.end()
        seconds = time.monotonic() - begin
        slowest, lost = max(slowest, seconds), None
        failure = bad_end(ended, 128 + second) or too_slow(seconds, AT_ONCE) or left_over(out)
        if checkpoints(out) != saved:
            failure = failure or "the checkpoints are not what they were before"
        failure = failure or unreadable(out)
        if not failure:
            steps = json.loads(moment.read_text())["step"]
            lost = steps - checkpoint.load_newest(out)["step"]
            failure = bad_resume(whole, out, **KNOBS)
        report.count(place.__name__, failure, lost)
    report.note = f"at most {slowest:.2f} s from the second signal to the end"


def slow_and_listening(place: Callable, occasion: int, moment: Path, heard: Path) -> None:
    """In a child: the place takes a minute, and a file tells that the first signal was noted."""
    after_call(Interrupts, "note", lambda *_: heard.touch())
    trapped(place, occasion, partial(dawdle, moment))


# A signal while data are prepared


@fault("SIGTERM or SIGINT while train.py prepares its data", whole=20, few=1)
def stopped_while_preparing(report: Report, tries: int, folder: Path) -> None:
    """There must be a whole data set or none, and the next start must make it and train on it."""
    slowest = 0.0
    knobs, calm = {"dataset": "python"}, partial(in_preparation, Trap(0, hang_up))
    whole = uncut(folder / "whole", calm, data=folder / "data", **knobs)
    for i in range(tries):
        number, occasion = SIGNALS[i % 2], 1 + int(spread(i, tries, 14))
        out, data_sets, moment = folder / f"cut{i}", folder / f"data{i}", folder / f"moment{i}"
        before = partial(trapped, in_preparation, occasion, partial(send, number, moment))
        child = Child(out, before, data=data_sets, **knobs)
        failure, seconds, _ = stop(child, number, moment)
        slowest = max(slowest, seconds)
        failure = failure or half_prepared(data_sets, "python") or left_over(out)
        failure = failure or bad_resume(whole, out, calm, data=data_sets, **knobs)
        report.count(f"{number.name}, occasion {occasion}", failure)
    report.note = f"at most {slowest:.2f} s from the signal to the end"


def half_prepared(data_sets: Path, name: str) -> str:
    """What a stopped preparation has left, as a failure. A data set that is there must be whole."""
    if (data_sets / name).exists():
        open_dataset(data_sets / name)
    return left_over(data_sets)


@fault("SIGTERM or SIGINT in data/prepare.py", whole=20, few=0)
def stopped_prepare(report: Report, tries: int, folder: Path) -> None:
    """At any moment after it has made its first file, with a tokenizer that is trained and with one
    that is not. There must be a whole data set or none."""
    slowest, took = 0.0, {}
    data_sets = folder / "data"
    data_sets.mkdir()
    text, pick = folder / "text.txt", random.Random(0)
    text.write_text("".join(pick.choices(("the cat ", "sat on ", "a mat.\n"), k=100_000)))
    for i in range(tries):
        number, tokenizer = SIGNALS[i % 2], ("byte", "sentencepiece")[i // 2 % 2]
        script = [sys.executable, ROOT / "data" / "prepare.py", text, f"tokenizer={tokenizer}"]
        if tokenizer == "sentencepiece":
            script.append("vocab_size=280")
        if tokenizer not in took:
            begin = time.monotonic()
            there = os.environ | {"ROOTLLAMA_DATA": str(data_sets)}
            subprocess.run([*script, "name=whole"], env=there, check=True, capture_output=True)
            took[tokenizer] = time.monotonic() - begin
            shutil.rmtree(data_sets / "whole")
        delay = spread(i, tries, took[tokenizer])
        failure, seconds = stop_prepare(script, data_sets, number, delay)
        slowest = max(slowest, seconds)
        report.count(f"{number.name}, {tokenizer}", failure)
    report.note = f"at most {slowest:.2f} s from the signal to the end"


def stop_prepare(script: list, data_sets: Path, number: int, delay: float) -> tuple[str, float]:
    """Starts the script, and stops it `delay` seconds after it has begun to make files: (failure,
    seconds to its end)."""
    printed, made = data_sets.parent / "printed", data_sets / "words"
    with open(printed, "w") as log:
        process = subprocess.Popen(
            [*script, "name=words"],
            env=os.environ | {"ROOTLLAMA_DATA": str(data_sets)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while process.poll() is None and not list(data_sets.glob("*words*")):
        time.sleep(0.002)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, number)
    at_its_end = made.exists()  # so it may end by itself
    begin = time.monotonic()
    code = process.wait()
    ended = Ended(code, printed.read_text())
    seconds = time.monotonic() - begin
    at_its_end = at_its_end and code in (0, -number)
    failure = bad_end(ended, ended.code if at_its_end else 128 + number)
    failure = failure or half_prepared(data_sets, "words") or too_slow(seconds)
    shutil.rmtree(made, ignore_errors=True)
    return failure, seconds


# A signal while the model is compiled


@fault("SIGTERM or SIGINT while the first step is compiled", whole=8, few=0)
def stopped_while_compiling(report: Report, tries: int, folder: Path) -> None:
    """The signal goes to the whole group, as from a terminal, so the C++ compiler dies of it. The
    run must end at once, must not take the compiler for a broken one, and the next start must begin
    afresh."""
    if not shutil.which("g++"):
        return report.not_tried("there is no g++ here")
    slowest = 0.0
    knobs = KNOBS | {"compile": "true", "eval_interval": 0, "n_layer": 1, "dropout": 0.0}
    warm = partial(compiling_into, folder / "kernels")
    whole = uncut(folder / "whole", warm, **knobs)
    assert "does not work" not in Path(f"{whole}.log").read_text()
    for i in range(tries):
        number, out = SIGNALS[i % 2], folder / f"cut{i}"
        child = Child(out, partial(compiling_into, folder / f"kernels{i}"), **knobs)
        wanted = 1 + int(spread(i, tries, 50))  # the first ones only try what this machine has
        wait_for_compilers(child, wanted)
        os.killpg(child.process.pid, number)
        begin = time.monotonic()
        ended, seconds = child.end(), time.monotonic() - begin
        slowest = max(slowest, seconds)
        failure = bad_end(ended, 128 + number) or too_slow(seconds) or left_over(out)
        if "does not work" in ended.text:
            failure = failure or "the compiler was taken for a broken one"
        failure = failure or bad_resume(whole, out, warm, **knobs)
        report.count(f"{number.name}, compiler {wanted}", failure, lost=0)
    report.note = f"at most {slowest:.1f} s from the signal to the end"


def compiling_into(kernels: Path) -> None:
    """In a child: torch.compile finds only what was compiled into this folder before."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kernels)


def wait_for_compilers(child: Child, wanted: int) -> None:
    """Waits until the child has started so many compilers."""
    seen: set[int] = set()

    def enough() -> bool:
        seen.update(compilers_of(child.process.pid))
        return len(seen) >= wanted

    child.wait_for(enough)


def compilers_of(pid: int) -> set[int]:
    """The compilers among the descendants of a process that run now."""
    names, children = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            head, _, tail = Path(f"/proc/{name}/stat").read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        number, _, name = head.partition(" (")
        names[int(number)] = name
        children.setdefault(int(tail.split()[1]), []).append(int(number))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return {number for number in found if names.get(number) in COMPILERS}
