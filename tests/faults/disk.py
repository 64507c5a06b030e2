"""A disk that is full, read-only or gone costs what could not be written, never what is there, and never the run.

A save that fails is named in one line and training goes on; only the last one decides the exit code.
"""

import ctypes
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch
from conftest import largest_file

import checkpoint
import data.prepare
import metrics
import train
from data.corpus import Corpus, Piece

from .harness import ROOT, Child, Report, command, curve, difference, fault, run, state_hash, traceback_in, words

KNOBS = {"keep": 3}  # saves at steps 4, 8 and 12, the best one at 5, 10 and 12
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


def sizes(most: int, count: int) -> list[int]:
    """From 1 to most - 1, each the same factor above the one before."""
    return [round((most - 1) ** (i / max(1, count - 1))) for i in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.pt")}


def untidy(folder: Path) -> str:
    """What is wrong with the files of a run, as a failure: each is whole, and none is temporary."""
    if not folder.exists():
        return ""
    left = [p.name for p in folder.glob(".*") if p.name != ".lock"]
    if left:
        return f"left behind: {', '.join(left)}"
    for path in folder.glob("*.pt"):
        try:
            checkpoint.load(path)
        except ValueError as error:
            return str(error)
    return broken_records(folder)


def broken_records(folder: Path) -> str:
    path = folder / metrics.FILE
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no end of line")
            json.loads(line)
        except ValueError as error:
            return f"{path.name} has a broken line: {line!r} ({error})"
    return ""


def ended(result: tuple[int, str], code: int, errors: int) -> str:
    """How a child ended otherwise than with this code and so many `error:` lines and no traceback, as a failure."""
    said = [line for line in result[1].splitlines() if line.startswith("error:")]
    if traceback_in(result[1]):
        return traceback_in(result[1])
    return "" if (result[0], len(said)) == (code, errors) else f"exit code {result[0]}, {said}: {result[1][-400:]}"


# --- the save

@fault("full disk in a save", whole=20, few=2)
def full_in_a_save(tries: int, folder: Path) -> Report:
    """From step 6 on; in every second try there is room again for the last save."""
    report, data_sets, whole = Report(), words(folder), folder / "whole"
    assert run(command(whole, **KNOBS), data_sets)[0] == 0
    for i, size in enumerate(sizes((whole / "ckpt_00000008.pt").stat().st_size, tries)):
        out, aside, last_fits = folder / f"run{i}", folder / f"aside{i}", i % 2 == 0
        before = partial(no_room, size, range(6, 12 if last_fits else 13), aside)
        result = run(command(out, **KNOBS), data_sets, before)
        failure = ended(result, 0 if last_fits else 1, 0 if last_fits else 1) or untidy(out)
        failure = failure or unlike(aside, out) or unsaid(result[1], out / "ckpt_00000008.pt")
        if not failure and curve(out) != curve(whole):
            failure = "training did not go on as it should have"
        if not failure and not last_fits:
            result = run(command(out, resume="auto", **KNOBS), data_sets)
            failure = ended(result, 0, 0)
        report.count(failure and f"{size} bytes: {failure}" or difference(whole, out))
    report.note = "a limit from 1 byte to one byte less than a checkpoint"
    return report


def no_room(size: int, steps: range, aside: Path) -> None:
    """In a child: a checkpoint of one of these steps meets a full disk; what was there before is copied `aside`."""
    save = checkpoint.save

    def limited(path: Path, state: dict) -> None:
        if state["step"] not in steps:
            save(path, state)
            return
        if not aside.exists():
            shutil.copytree(path.parent, aside)
        with largest_file(size):
            save(path, state)

    checkpoint.save = limited


def unlike(before: Path, after: Path) -> str:
    """Which of the numbered checkpoints that were there is not there any more, bit for bit, as a failure."""
    old, new = contents(before), contents(after)
    changed = [name for name in old if name.startswith("ckpt_") and new.get(name) != old[name]]
    return f"no longer as before: {', '.join(changed)}" if changed or not old else ""


def unsaid(text: str, path: Path) -> str:
    """A failure unless one warning says that the path could not be saved, and why."""
    said = [line for line in text.splitlines() if line.startswith(f"warning: {path} could not be saved (")]
    good = len(said) == 1 and "()" not in said[0] and said[0].endswith("training goes on")
    return "" if good else f"not one warning about {path.name} but {said}: {text[-400:]}"


# --- metrics.jsonl and the log

@fault("full disk under metrics.jsonl", whole=20, few=1)
def full_under_metrics(tries: int, folder: Path) -> Report:
    """A few records find no room: they are missing and that is said; the others and the training are as ever."""
    report, data_sets, whole = Report(), words(folder), folder / "whole"
    assert run(command(whole), data_sets)[0] == 0
    for i in range(tries):
        pick, out = random.Random(i), folder / f"run{i}"
        first = pick.randint(1, 10)
        steps, room = range(first, first + pick.randint(1, 3)), pick.randint(0, 60)
        result = run(command(out), data_sets, partial(no_room_for_records, steps, room))
        failure = ended(result, 0, 0) or untidy(out)
        wanted = [line for line in curve(whole) if int(line.split()[0].removeprefix("step=")) not in steps]
        if not failure and curve(out) != wanted:
            failure = "other records are missing"
        if not failure and result[1].count("warning: metrics.jsonl failed") < len(steps):
            failure = f"it is not said: {result[1][-400:]}"
        if not failure and state_hash(whole) != state_hash(out):
            failure = "the final state differs"
        report.count(failure and f"steps {list(steps)}, {room} bytes: {failure}")
    return report


def no_room_for_records(steps: range, room: int) -> None:
    """In a child: metrics.jsonl can grow by `room` bytes, less than a record, when a record of these steps comes."""
    append = train.Log._to_file

    def limited(self, record: dict) -> None:
        if record["step"] not in steps:
            append(self, record)
            return
        with largest_file((self.folder / metrics.FILE).stat().st_size + room):
            append(self, record)

    train.Log._to_file = limited


@fault("full disk under the printed log", whole=10, few=1)
def full_under_the_log(tries: int, folder: Path) -> Report:
    """Its lines are lost, and nothing else."""
    report, data_sets, whole = Report(), words(folder), folder / "whole"
    assert run(command(whole), data_sets)[0] == 0
    for i in range(tries):
        out = folder / f"run{i}"
        code, text = run(command(out), data_sets, partial(no_room_for_lines, random.Random(i).randint(0, 40)))
        failure = f"exit code {code}: {text[-300:]}" if code else traceback_in(text) or untidy(out)
        report.count(failure or difference(whole, out))
    return report


def no_room_for_lines(room: int) -> None:
    """In a child: the file that it prints to can grow by `room` bytes at each line, from the second record on."""
    line = train.Log.line

    def limited(self, text: str, file=None) -> None:
        with largest_file(os.fstat(1).st_size + room if self.steps_timed > 1 else resource.RLIM_INFINITY):
            line(self, text, file)

    train.Log.line = limited


# --- a full file system

def own_mounts() -> None:
    """In a child: mounts that only it sees, which takes no privilege where the kernel allows it. OSError otherwise."""
    library, user, group = ctypes.CDLL(None, use_errno=True), os.geteuid(), os.getegid()
    if library.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("none", Path("/"), "", MS_REC | MS_PRIVATE)


def mount(source: str | Path, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    library = ctypes.CDLL(None, use_errno=True)
    words = [os.fsencode(word) for word in (source, target, kind)]
    if library.mount(*words, ctypes.c_ulong(flags), os.fsencode(options)):
        raise OSError(ctypes.get_errno(), f"mount of {target}")


@lru_cache
def no_mounts() -> str:
    """Why a child cannot have mounts of its own; empty if it can."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, text = run(command(folder / "run"), folder, partial(try_mounts, folder))
    return "" if code == 7 else text.strip().splitlines()[-1]


def try_mounts(folder: Path) -> None:
    own_mounts()
    mount("none", folder, "tmpfs")
    os._exit(7)


def small_disk(size: int, disk: Path, aside: Path) -> None:
    """In a child: `disk` is a file system of `size` bytes, and all that the run has put on it is copied aside."""
    own_mounts()
    mount("none", disk, "tmpfs", options=f"size={size}")
    main = train.main

    def copied(arguments: list[str]) -> int:
        try:
            return main(arguments)
        finally:
            shutil.copytree(disk, aside)

    train.main = copied


@fault("full file system", whole=20, few=1)
def full_file_system(tries: int, folder: Path) -> Report:
    """From a fraction of a checkpoint to room for all; what could be saved is resumed where there is room. If that is
    best.pt alone, which a fresh start would overwrite, the run is refused and best.pt stays."""
    if no_mounts():
        return Report(tries, tries, note=f"not tried, no mounts here: {no_mounts()}")
    report, data_sets, whole, codes = Report(), words(folder), folder / "whole", {}
    assert run(command(whole), data_sets)[0] == 0
    all_of_it = 5 * (whole / "ckpt_00000012.pt").stat().st_size
    disk = folder / "disk"
    disk.mkdir()
    for i in range(tries):
        size, aside = 4096 + all_of_it * (i + 1) // (tries + 1), folder / f"aside{i}"
        result = run(command(disk / "run"), data_sets, partial(small_disk, size, disk, aside))
        code = result[0]
        codes[code] = codes.get(code, 0) + 1
        failure = ended(result, code if code in (0, 1, 2) else 0, 1 if code else 0) or untidy(aside / "run")
        if not failure and code == 0:
            failure = difference(whole, aside / "run")
        elif not failure:
            before = contents(aside / "run")
            lone = "best.pt" in before and not any(name.startswith("ckpt_") for name in before)
            result = run(command(aside / "run", resume="auto"), data_sets)
            failure = ended(result, 2, 1) if lone else ended(result, 0, 0)
            if lone and contents(aside / "run") != before:
                failure = "a run with best.pt alone was touched"
            elif not failure and not lone and state_hash(whole) != state_hash(aside / "run"):
                failure = "the final state differs"  # records that found no room are missing
        report.count(failure and f"{size} bytes: {failure}")
    report.note = "exit codes " + ", ".join(f"{code}: {n} times" for code, n in sorted(codes.items()))
    return report


# --- the preparation of data

@fault("full disk while train.py prepares its data", whole=10, few=1)
def full_while_preparing(tries: int, folder: Path) -> Report:
    if no_mounts():
        return Report(tries, tries, note=f"not tried, no mounts here: {no_mounts()}")
    report, disk = Report(), folder / "disk"
    disk.mkdir()
    for i, size in enumerate(sizes(100_000, tries)):
        aside, out = folder / f"aside{i}", folder / f"run{i}"
        before = partial(small_disk_for_data, max(4096, size), disk, aside)
        result = run(command(out, dataset="python"), disk, before)
        left = [str(p.relative_to(aside)) for p in aside.rglob("*")] + [str(p) for p in [out] if p.exists()]
        report.count(ended(result, 2, 1) or (f"left behind: {left}" if left else ""))
    return report


def small_disk_for_data(size: int, disk: Path, aside: Path) -> None:
    small_disk(size, disk, aside)
    data.prepare.open_corpus = lambda sources: Corpus("python", "a text", text_of_100_kb, tokenizer="byte")


def text_of_100_kb() -> Iterator[Piece]:
    for number in range(100):
        yield Piece("val" if number % 10 == 0 else "train", True, f"{number:09} " * 100)


@fault("full disk in data/prepare.py", whole=20, few=1)
def full_in_prepare(tries: int, folder: Path) -> Report:
    """A limit from 1 byte to one byte less than train.bin needs."""
    report, text, out = Report(), folder / "text.txt", folder / "words"
    text.write_text("the cat sat on a mat\n" * 5000)
    script = "import sys, data.prepare as p; p.__file__ = sys.argv[1]; sys.exit(p.main(sys.argv[2:]))"
    for i, size in enumerate(sizes(94_500, tries)):
        tokenizer = ("byte", "char", "sentencepiece")[i % 3]
        few = resource.RLIMIT_FSIZE, (size if tokenizer != "sentencepiece" else min(size, 8_000),) * 2
        done = subprocess.run([sys.executable, "-c", script, str(folder / "p.py"), str(text), f"tokenizer={tokenizer}",
                               "name=words"], cwd=ROOT, capture_output=True, text=True,
                              preexec_fn=partial(resource.setrlimit, *few))
        failure = ended((done.returncode, done.stdout + done.stderr), 2, 1)
        left = [p.name for p in folder.iterdir() if p != text]
        if not failure and left:
            failure = f"left behind: {', '.join(left)}"
        report.count(failure and f"{size} bytes, {tokenizer}: {failure}")
        for path in folder.iterdir():
            if path != text:
                shutil.rmtree(path, ignore_errors=True)
    assert not out.exists()
    return report


# --- out_dir

@fault("read-only or vanished out_dir, EIO", whole=20, few=3)
def without_out_dir(tries: int, folder: Path) -> Report:
    """At a random step; what is lost is made again, what cannot be written is named."""
    report, data_sets, whole = Report(), words(folder), folder / "whole"
    assert run(command(whole, **KNOBS), data_sets)[0] == 0
    faults: list[tuple[Callable[..., None], int]] = [(vanish, 0), (vanish_with_parent, 1), (failing_writes, 0),
                                                     (failing_writes_to_the_end, 1)]
    if not no_mounts():
        faults.append((read_only, 1))
    if os.geteuid():  # root may write wherever it likes
        faults.append((not_permitted, 1))
    for i in range(tries):
        (happen, code), at = faults[i % len(faults)], random.Random(i).randint(5, 7)
        out = folder / f"parent{i}" / "run"
        out.mkdir(parents=True)
        child = Child(command(out, **KNOBS), data_sets, partial(happen_at, at, happen, out), folder / f"run{i}.log")
        result = child.wait(), child.text()
        if happen is not_permitted:
            out.chmod(0o755)
        failure = ended(result, code, code) or (untidy(out) if out.exists() else "")
        if not failure and "warning: " not in result[1]:
            failure = f"it is not said: {result[1][-400:]}"
        if not failure and "step 12/12 |" not in result[1]:
            failure = f"training did not go on: {result[1][-400:]}"
        if not failure and code == 0 and state_hash(whole) != state_hash(out):
            failure = "the final state differs"
        report.count(failure and f"{happen.__name__} at step {at}: {failure}")
    report.note = ", ".join(happen.__name__.replace("_", " ") for happen, _ in faults)
    return report


def happen_at(step: int, happen: Callable[[Path], None], out: Path) -> None:
    """In a child: calls happen(out) just before the batch of this step is read."""
    if happen is read_only:
        own_mounts()
    batch = train.batch

    def read(data_set, at: int, *rest):
        if at == step:
            happen(out)
        return batch(data_set, at, *rest)

    train.batch = read


def vanish(out: Path) -> None:
    shutil.rmtree(out)


def vanish_with_parent(out: Path) -> None:
    shutil.rmtree(out.parent)


def not_permitted(out: Path) -> None:
    out.chmod(0o555)


def read_only(out: Path) -> None:
    """Lays out_dir over itself, read-only."""
    mount(out, out, "", MS_BIND)
    mount("none", out, "", MS_BIND | MS_REMOUNT | MS_RDONLY)


def failing_writes(out: Path, saves: int = 1) -> None:
    """The disk fails in the middle of the next numbered save."""
    save, failing = torch.save, [saves]

    def failed(state: dict, file) -> None:
        if failing[0] and state["optimizer"]:
            failing[0] -= 1
            file.write(b"PK\x03\x04")
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        save(state, file)

    torch.save = failed


def failing_writes_to_the_end(out: Path) -> None:
    failing_writes(out, saves=-1)
