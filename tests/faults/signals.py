"""A signal loses nothing: within one step and a save the run is saved and over, and resume=auto goes on from there.

The exit code is 128 + the signal's number, the second signal quits at once, and a data set whose preparation is stopped
leaves nothing behind.
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

import checkpoint
import data.prepare
import metrics
import run as run_module
import train
from data.corpus import Corpus, Piece
from data.loader import open_dataset
from model import Decoder

from .harness import ROOT, Child, Report, command, difference, fault, run, traceback_in, words

SIGNALS = (signal.SIGTERM, signal.SIGINT)
KNOBS = {"micro_batch_size": 2, "eval_interval": 3, "dropout": 0.1}  # 12 steps, 48 micro-batches, 4 evaluations
PATIENCE = 5.0  # seconds for the end of a process, on a machine that has other work
AT_ONCE = 1.0  # seconds that a second signal may take
COMPILERS = {"c++", "g++", "cc1plus", "clang", "clang++", "as", "ld", "collect2"}
RUNS: list[run_module.Run] = []  # in a child: its run, once it is built


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
    build = run_module.build

    def remembered(*arguments) -> run_module.Run:
        RUNS.append(build(*arguments))
        return RUNS[-1]

    run_module.build = remembered
    place(Trap(occasion, spring))


def note(moment: Path) -> None:
    """When it happened, and after how many steps of the run."""
    text = json.dumps({"time": time.monotonic(), "step": RUNS[-1].step if RUNS else 0})
    unfinished = moment.with_suffix(".part")
    unfinished.write_text(text)
    os.rename(unfinished, moment)  # not os.replace, in which there may be a trap


def send(number: int, moment: Path) -> None:
    note(moment)
    os.kill(os.getpid(), number)


def dawdle(moment: Path) -> None:
    """A minute of small products: a place that is slow without being stuck in one call."""
    note(moment)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        torch.ones(64, 64) @ torch.ones(64, 64)


def around(trap: Trap, owner: object, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """The trap lies just before and just after owner.name."""
    inner = getattr(owner, name)

    def passed(*arguments, **named):
        counts = when(*arguments)
        if counts:
            trap.reached()
        result = inner(*arguments, **named)
        if counts:
            trap.reached()
        return result

    setattr(owner, name, passed)


def in_forward(trap: Trap, training: bool) -> None:
    forward = Decoder.forward

    def passed(self, *arguments):
        if self.training == training:
            trap.reached()
        return forward(self, *arguments)

    Decoder.forward = passed


def in_a_step(trap: Trap) -> None:
    around(trap, train, "batch")


def in_a_micro_batch(trap: Trap) -> None:
    in_forward(trap, training=True)


def in_an_evaluation(trap: Trap) -> None:
    in_forward(trap, training=False)


def in_a_save(trap: Trap) -> None:
    """In the middle of the file, before it gets its name and after."""
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
    for owner, name in ((run_module, "open_dataset"), (run_module, "build"), (train, "claim_folder"),
                        (train, "open_log")):
        around(trap, owner, name)


def in_preparation(trap: Trap) -> None:
    """Where train.py prepares the data set that every Python has, which is a short one here."""
    data.prepare.open_corpus = lambda sources: Corpus("python", "a short text", short_text, tokenizer="byte")
    for name in ("open_corpus", "make_tokenizer", "encode", "describe", "xz_bits_per_byte"):
        around(trap, data.prepare, name)
    around(trap, data.prepare, "sync", when=lambda path: path.name == "train.bin")
    around(trap, data.prepare.os, "rename", when=lambda source, target: target.name == "python")


def short_text():
    pick = random.Random(0)
    for number in range(40):
        text = "".join(pick.choices("abcdefgh \n", k=1000))
        yield Piece("val" if number % 10 == 0 else "train", True, text)


def spread(i: int, tries: int, over: float) -> float:
    """The i-th of so many tries, spread evenly between 0 and `over`: the only one is in the middle."""
    return over * (2 * i + 1) / (2 * tries)


def patience(whole: Path) -> float:
    """Seconds that a run like this one may take to stop: one step, one save, and the end of the process. Three times
    over, since other work on the machine comes and goes."""
    state, again = checkpoint.load_newest(whole), whole / "again.pt"
    begin = time.monotonic()
    checkpoint.save(again, {k: v for k, v in state.items() if k not in ("format", "format_version")})
    saving = time.monotonic() - begin
    again.unlink()
    step = max(r.get("step_ms", 0) for r in metrics.read_metrics(whole)) / 1000
    return 3 * (step + saving) + PATIENCE


def stop(child: Child, number: int, moment: Path, limit: float) -> tuple[str, float, int]:
    """Waits for a child that a signal stops: (failure, seconds from the signal to its end, steps before the signal)."""
    code = child.wait()
    end, text = time.monotonic(), child.text()
    if not moment.exists():
        return f"it ended with {code} before the signal came: {text[-300:]}", 0.0, 0
    noted = json.loads(moment.read_text())
    seconds = end - noted["time"]
    failure = traceback_in(text)
    if not failure and code != 128 + number:
        failure = f"exit code {code} after {signal.Signals(number).name}: {text[-300:]}"
    if not failure and seconds > limit:
        failure = f"it took {seconds:.1f} s to stop, {limit:.1f} s is a step and a save"
    return failure, seconds, noted["step"]


def half_made(folder: Path) -> str:
    """What a stopped save has left in the folder of a run, as a failure."""
    left = [p.name for p in folder.glob(".*") if p.name != ".lock"] if folder.exists() else []
    return f"left behind: {', '.join(left)}" if left else ""


def stop_in_training(place: Callable[[Trap], None], occasions: int, tries: int, folder: Path,
                     signals: tuple[int, ...] = SIGNALS) -> Report:
    """Each try stops a run at one occasion of the place and resumes it."""
    report, data_sets, slowest = Report(), words(folder), 0.0
    assert run(command(folder / "whole", **KNOBS), data_sets)[0] == 0
    limit = patience(folder / "whole")
    for i in range(tries):
        number, occasion = signals[i % len(signals)], 1 + int(spread(i, tries, occasions))
        out, moment = folder / f"cut{i}", folder / f"moment{i}"
        child = Child(command(out, **KNOBS), data_sets,
                      before=partial(trapped, place, occasion, partial(send, number, moment)))
        failure, seconds, step = stop(child, number, moment, limit)
        lost, slowest = None, max(slowest, seconds)
        if not failure:
            failure, lost = resumed(folder / "whole", out, child.text(), step, data_sets)
        report.count(failure and f"{signal.Signals(number).name}, occasion {occasion}: {failure}", lost=lost)
    report.note = f"at most {slowest:.2f} s from the signal to the end"
    return report


def resumed(whole: Path, cut: Path, text: str, step: int, data_sets: Path, before: Callable[[], None] | None = None,
            **knobs: object) -> tuple[str, int | None]:
    """(failure, steps done again) of going on after a stop whose signal came when `step` steps were done."""
    saved = re.search(r"saved at step (\d+); train.py \S+ goes on from here", text)
    if not saved:
        return f"it does not say that it saved: {text[-300:]}", None
    at, done = int(saved[1]), max((r["step"] for r in metrics.read_metrics(cut) if "loss" in r), default=0)
    if not step <= at <= step + 1:
        return f"it went on from step {step} to step {at}", None
    if half_made(cut):
        return half_made(cut), None
    code, text = run(command(cut, resume="auto", **(KNOBS | knobs)), data_sets, before)
    if code or not re.search(rf" from step {at}\n|already at step {at} of", text):
        return f"the resumed run ended with {code} and did not go on from step {at}: {text[-300:]}", None
    return difference(whole, cut), done - at


@fault("SIGTERM, SIGINT or SIGHUP in a step", whole=30, few=1)
def stopped_in_a_step(tries: int, folder: Path) -> Report:
    return stop_in_training(in_a_step, 24, tries, folder, (*SIGNALS, signal.SIGHUP))


@fault("SIGTERM or SIGINT in a micro-batch", whole=20, few=1)
def stopped_in_a_micro_batch(tries: int, folder: Path) -> Report:
    return stop_in_training(in_a_micro_batch, 48, tries, folder, (signal.SIGINT, signal.SIGTERM))


@fault("SIGTERM or SIGINT in an evaluation", whole=20, few=1)
def stopped_in_an_evaluation(tries: int, folder: Path) -> Report:
    return stop_in_training(in_an_evaluation, 8, tries, folder)


@fault("SIGTERM or SIGINT in a save", whole=20, few=1)
def stopped_in_a_save(tries: int, folder: Path) -> Report:
    return stop_in_training(in_a_save, 12, tries, folder, (signal.SIGINT, signal.SIGTERM))


@fault("SIGTERM or SIGINT in set-up", whole=20, few=1)
def stopped_in_set_up(tries: int, folder: Path) -> Report:
    """Of a fresh run and, every second pair of tries, of one that goes on from step 4."""
    report, data_sets, slowest = Report(), words(folder), 0.0
    assert run(command(folder / "whole", **KNOBS), data_sets)[0] == 0
    assert run(command(folder / "half", **KNOBS), data_sets, partial(trapped, in_a_step, 7, hang_up))[0] == 129
    limit = patience(folder / "whole")
    for i in range(tries):
        number, occasion = SIGNALS[i % 2], 1 + int(spread(i, tries, 8))
        out, moment = folder / f"cut{i}", folder / f"moment{i}"
        if i % 4 > 1:
            shutil.copytree(folder / "half", out)
        before = partial(trapped, in_set_up, occasion, partial(send, number, moment))
        child = Child(command(out, resume="auto", **KNOBS), data_sets, before)
        failure, seconds, _ = stop(child, number, moment, limit)
        slowest = max(slowest, seconds)
        failure = failure or half_made(out)
        if not failure:
            code, text = run(command(out, resume="auto", **KNOBS), data_sets)
            start = f" from step {4 if i % 4 > 1 else 0}\n"
            failure = (difference(folder / "whole", out) if not code and start in text else
                       f"the next start ended with {code} and did not go on{start}: {text[-300:]}")
        report.count(failure and f"{signal.Signals(number).name}, occasion {occasion}: {failure}", lost=0)
    report.note = f"at most {slowest:.2f} s from the signal to the end"
    return report


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def ignoring_hang_up(place: Callable[[Trap], None], occasion: int) -> None:
    """What nohup does, and then a terminal that closes."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    trapped(place, occasion, hang_up)


@fault("SIGHUP under nohup", whole=5, few=1)
def not_stopped_under_nohup(tries: int, folder: Path) -> Report:
    report, data_sets = Report(), words(folder)
    assert run(command(folder / "whole"), data_sets)[0] == 0
    for i in range(tries):
        before = partial(ignoring_hang_up, in_a_step, 1 + int(spread(i, tries, 24)))
        code, text = run(command(folder / f"run{i}"), data_sets, before)
        report.count(difference(folder / "whole", folder / f"run{i}") if code == 0 else f"exit code {code}: {text}")
    return report


@fault("a second signal in a step, an evaluation or a save", whole=18, few=1)
def stopped_at_once(tries: int, folder: Path) -> Report:
    """The place is slow; what was saved before stays as it is, and a resume repeats the steps after it."""
    report, data_sets, slowest = Report(), words(folder), 0.0
    assert run(command(folder / "whole", **KNOBS), data_sets)[0] == 0
    for i in range(tries):
        place, occasion = ((in_a_save, 10), (in_a_step, 14), (in_an_evaluation, 5))[i % 3]
        first, second = SIGNALS[i % 2], SIGNALS[i // 2 % 2]
        out, moment, heard = folder / f"cut{i}", folder / f"moment{i}", folder / f"heard{i}"
        child = Child(command(out, **KNOBS), data_sets, partial(slow_and_listening, place, occasion, moment, heard))
        child.wait_for(moment.exists)
        before = contents(out)
        child.signal(first)
        child.wait_for(heard.exists)
        child.signal(second)
        begin = time.monotonic()
        code = child.wait()
        seconds = time.monotonic() - begin
        slowest = max(slowest, seconds)
        failure, lost = quit_cleanly(child, code, second, seconds, before), None
        if not failure:
            failure, lost = repeated(folder / "whole", out, data_sets, json.loads(moment.read_text())["step"])
        report.count(failure and f"{place.__name__}: {failure}", lost=lost)
    report.note = f"at most {slowest:.2f} s from the second signal to the end"
    return report


def slow_and_listening(place: Callable[[Trap], None], occasion: int, moment: Path, heard: Path) -> None:
    """In a child: the place takes a minute, and a file tells that the first signal was noted."""
    listen = train.Interrupts.note

    def told(self, number: int, frame: object = None) -> None:
        listen(self, number, frame)
        heard.touch()

    train.Interrupts.note = told
    trapped(place, occasion, partial(dawdle, moment))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.pt")}


def quit_cleanly(child: Child, code: int, number: int, seconds: float, before: dict[str, bytes]) -> str:
    if code != 128 + number:
        return f"exit code {code} after a second signal, {signal.Signals(number).name}: {child.text()[-300:]}"
    if seconds > AT_ONCE:
        return f"it took {seconds:.1f} s to quit"
    if contents(child.folder) != before:
        return "the checkpoints are not what they were before"
    for path in child.folder.glob("*.pt"):
        try:
            checkpoint.load(path)
        except ValueError as error:
            return str(error)
    return traceback_in(child.text()) or half_made(child.folder)


def repeated(whole: Path, cut: Path, data_sets: Path, step: int) -> tuple[str, int]:
    """(failure, steps done again) of a run that quit without saving when `step` steps were done."""
    saved = checkpoint.load_newest(cut)["step"]
    code, text = run(command(cut, resume="auto", **KNOBS), data_sets)
    return (difference(whole, cut) if code == 0 else f"the resumed run ended with {code}: {text[-300:]}"), step - saved


@fault("SIGTERM or SIGINT while train.py prepares its data", whole=20, few=1)
def stopped_while_preparing(tries: int, folder: Path) -> Report:
    report, slowest = Report(), 0.0
    knobs = {"dataset": "python"}
    whole = run(command(folder / "whole", **knobs), folder / "data", partial(in_preparation, Trap(0, hang_up)))
    assert whole[0] == 0, whole
    for i in range(tries):
        number, occasion = SIGNALS[i % 2], 1 + int(spread(i, tries, 14))
        out, data_sets, moment = folder / f"cut{i}", folder / f"data{i}", folder / f"moment{i}"
        before = partial(trapped, in_preparation, occasion, partial(send, number, moment))
        child = Child(command(out, **knobs), data_sets, before)
        failure, seconds, _ = stop(child, number, moment, PATIENCE)
        slowest = max(slowest, seconds)
        failure = failure or half_prepared(data_sets, "python") or half_made(out)
        if not failure:
            code, text = run(command(out, resume="auto", **knobs), data_sets, partial(in_preparation, Trap(0, hang_up)))
            failure = difference(folder / "whole", out) if code == 0 else f"the next start ended with {code}: {text}"
        report.count(failure and f"{signal.Signals(number).name}, occasion {occasion}: {failure}")
    report.note = f"at most {slowest:.2f} s from the signal to the end"
    return report


def half_prepared(data_sets: Path, name: str) -> str:
    """What a stopped preparation has left, as a failure: there is either nothing or a whole data set."""
    left = [p.name for p in data_sets.iterdir() if p.name.startswith(".")] if data_sets.exists() else []
    if left:
        return f"left behind: {', '.join(left)}"
    if (data_sets / name).exists():
        open_dataset(data_sets / name)
    return ""


@fault("SIGTERM or SIGINT in data/prepare.py", whole=20, few=1)
def stopped_prepare(tries: int, folder: Path) -> Report:
    """At any moment from the first file it makes on, with a tokenizer that is trained and with one that is not."""
    report, slowest, took = Report(), 0.0, {}
    (folder / "code" / "data").mkdir(parents=True)  # the script makes its data sets beside itself
    for path in (ROOT / "data").glob("*.py"):
        shutil.copy(path, folder / "code" / "data")
    text = folder / "text.txt"
    pick = random.Random(0)
    text.write_text("".join(pick.choice(("the cat ", "sat on ", "a mat.\n")) for _ in range(400_000)))
    for i in range(tries):
        number, tokenizer = SIGNALS[i % 2], ("byte", "sentencepiece")[i // 2 % 2]
        script = [sys.executable, str(folder / "code" / "data" / "prepare.py"), str(text), f"tokenizer={tokenizer}",
                  *(["vocab_size=280"] if tokenizer == "sentencepiece" else [])]
        if tokenizer not in took:
            begin = time.monotonic()
            subprocess.run([*script, "name=whole"], check=True, capture_output=True)
            took[tokenizer] = time.monotonic() - begin
            shutil.rmtree(folder / "code" / "data" / "whole")
        failure, seconds = stop_prepare(script, folder, number, spread(i, tries, took[tokenizer]))
        slowest = max(slowest, seconds)
        report.count(failure and f"{signal.Signals(number).name}, {tokenizer}: {failure}")
    report.note = f"at most {slowest:.2f} s from the signal to the end"
    return report


def stop_prepare(script: list[str], folder: Path, number: int, delay: float) -> tuple[str, float]:
    """Starts the script and stops it `delay` seconds after it has begun to make files: (failure, seconds to the end)"""
    data_sets = folder / "code" / "data"
    with open(folder / "printed", "w+") as printed:
        process = subprocess.Popen([*script, "name=words"], stdout=printed, stderr=printed, start_new_session=True)
        while process.poll() is None and not list(data_sets.glob("*words*")):
            time.sleep(0.002)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
        begin = time.monotonic()
        code = process.wait()
        seconds = time.monotonic() - begin
        printed.seek(0)
        text = printed.read()
    made = (data_sets / "words").exists()
    failure = traceback_in(text) or half_prepared(data_sets, "words")
    if not failure and code not in ((0, 128 + number, -number) if made else (128 + number,)):  # made: it was at its end
        failure = f"exit code {code}, and the data set is {'there' if made else 'not there'}: {text[-300:]}"
    if not failure and seconds > PATIENCE:
        failure = f"it took {seconds:.1f} s to stop"
    shutil.rmtree(data_sets / "words", ignore_errors=True)
    return failure, seconds


@fault("SIGTERM or SIGINT while the first step is compiled", whole=8, few=0)
def stopped_while_compiling(tries: int, folder: Path) -> Report:
    """The signal goes to the whole group, as from a terminal: the C++ compiler dies of it, which is no broken one."""
    report, data_sets, slowest = Report(), words(folder), 0.0
    if not shutil.which("g++"):
        report.count()
        report.note = "not tried: there is no g++ here"
        return report
    knobs = {"compile": "true", "eval_interval": 0, "n_layer": 1, "dropout": 0.0}
    warm = partial(compiling_into, folder / "kernels")
    whole = run(command(folder / "whole", **(KNOBS | knobs)), data_sets, warm)
    assert whole[0] == 0 and "does not work" not in whole[1], whole
    limit = patience(folder / "whole")
    for i in range(tries):
        number, out = SIGNALS[i % 2], folder / f"cut{i}"
        child = Child(command(out, **(KNOBS | knobs)), data_sets, partial(compiling_into, folder / f"kernels{i}"))
        seen: set[int] = set()
        wanted = 1 + int(spread(i, tries, 50))  # the first ones only try what this machine has
        child.wait_for(lambda: len(compilers_of(child.process.pid, seen)) >= wanted)  # noqa: B023  waited for at once
        os.killpg(child.process.pid, number)
        begin = time.monotonic()
        code, seconds = child.wait(), time.monotonic() - begin
        slowest, lost, text = max(slowest, seconds), None, child.text()
        failure = traceback_in(text)
        if not failure and (code != 128 + number or "does not work" in text):
            failure = f"exit code {code}: {text[-300:]}"
        if not failure and seconds > limit:
            failure = f"it took {seconds:.1f} s to stop, {limit:.1f} s is a step and a save"
        if not failure:
            failure, lost = resumed(folder / "whole", out, text, 0, data_sets, warm, **knobs)
        report.count(failure and f"{signal.Signals(number).name}, compiler {wanted}: {failure}", lost=lost)
    report.note = f"at most {slowest:.1f} s from the signal to the end"
    return report


def compiling_into(kernels: Path) -> None:
    """In a child: torch.compile finds nothing that is compiled already, or what another child has compiled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kernels)


def compilers_of(pid: int, seen: set[int]) -> set[int]:
    """Adds to `seen` the compilers among the descendants of a process that run now."""
    names, children = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = path.read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        number, _, name = head.partition(" (")
        names[int(number)] = name
        children.setdefault(int(tail.split()[1]), []).append(int(number))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    seen.update(number for number in found if names.get(number) in COMPILERS)
    return seen
