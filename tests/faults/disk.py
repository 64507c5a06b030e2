"""A disk that is full, read-only or gone may cost what could not be written, but never what is
there already, and never the run.

A save that fails must be named in one line, and training goes on. Only the last save decides the
exit code.
"""

import ctypes
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from conftest import largest_file

import data.prepare
import train
from data.corpus import Corpus, Piece
from run.log import Log
from run.metrics import METRICS_FILE
from weights import checkpoint

from .harness import (
    ROOT,
    Ended,
    Report,
    Silent,
    at_batch,
    bad_end,
    bad_resume,
    checkpoints,
    curve,
    difference,
    fault,
    state_hash,
    train_child,
    uncut,
    untidy,
)

KNOBS = {"keep": 3}  # saves at steps 4, 8 and 12, the best one at 5, 10 and 12
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


def sizes(most: int, count: int) -> list[int]:
    """From 1 to most - 1, each the same factor above the one before."""
    return [round((most - 1) ** (i / max(1, count - 1))) for i in range(count)]


def other_state(whole: Path, out: Path) -> str:
    """How the final state differs, as a failure. Records that found no room may be missing."""
    return "" if state_hash(whole) == state_hash(out) else Silent("the final state differs")


# A save


@fault("full disk in a save", whole=20, few=1)
def full_in_a_save(report: Report, tries: int, folder: Path) -> None:
    """From step 6 on. In every second try there is room again for the last save."""
    whole = uncut(folder / "whole", **KNOBS)
    for i, size in enumerate(sizes((whole / "ckpt_00000008.pt").stat().st_size, tries)):
        out, aside, last_fits = folder / f"run{i}", folder / f"aside{i}", i % 2 == 0
        ended = train_child(out, partial(no_room, size, last_fits, aside), **KNOBS)
        failure = bad_save(ended, out, aside, last_fits)
        if curve(out) != curve(whole):
            failure = failure or "training did not go on as it should have"
        if not last_fits:
            failure = failure or bad_resume(whole, out, **KNOBS)
        report.count(f"{size} bytes", failure or difference(whole, out))
    report.note = "a limit from 1 byte to one byte less than a checkpoint"


def no_room(size: int, last_fits: bool, aside: Path) -> None:
    """In a child: the checkpoints from step 6 on, perhaps without the last, meet a disk that is
    full after `size` bytes. What was there before is copied `aside`."""
    save, steps = checkpoint.save, range(6, 12 if last_fits else 13)

    def limited(path: Path, state: dict) -> None:
        if state["step"] not in steps:
            save(path, state)
            return
        if not aside.exists():
            shutil.copytree(path.parent, aside)
        with largest_file(size):
            save(path, state)

    checkpoint.save = limited


def bad_save(ended: Ended, out: Path, aside: Path, last_fits: bool) -> str:
    """What is wrong after no_room, as a failure. The exit code must tell of the last save. Numbered
    checkpoints that were there must still be there, bit for bit. One warning must say what could
    not be saved, and why."""
    before, after = checkpoints(aside), checkpoints(out)
    numbered = [name for name in before if name.startswith("ckpt_")]
    changed = [name for name in numbered if after.get(name) != before[name]]
    failure = bad_end(ended, 0 if last_fits else 1) or untidy(out)
    if changed or not numbered:
        failure = failure or f"no longer as before: {', '.join(changed)}"
    start = f"warning: {out / 'ckpt_00000008.pt'} could not be saved ("
    said = [line for line in ended.text.splitlines() if line.startswith(start)]
    if len(said) != 1 or "()" in said[0] or not said[0].endswith("training goes on"):
        failure = failure or f"not one clear warning: {ended.text[-500:]}"
    return failure


# metrics.jsonl and the printed lines


@fault("full disk under metrics.jsonl", whole=20, few=1)
def full_under_metrics(report: Report, tries: int, folder: Path) -> None:
    """A few records find no room. They are missing and a warning says so; the other records and the
    training must be as ever."""
    whole = uncut(folder / "whole")
    for i in range(tries):
        pick, out = random.Random(i), folder / f"run{i}"
        first = pick.randint(1, 10)
        steps, room = range(first, first + pick.randint(1, 3)), pick.randint(0, 60)
        ended = train_child(out, partial(no_room_for_records, steps, room))
        failure = bad_end(ended) or untidy(out)
        missing = tuple(f"step={step} " for step in steps)
        if curve(out) != [line for line in curve(whole) if not line.startswith(missing)]:
            failure = failure or "other records are missing"
        if ended.text.count("warning: metrics.jsonl failed") < len(steps):
            failure = failure or f"it is not said: {ended.text[-400:]}"
        failure = failure or other_state(whole, out)
        report.count(f"steps {list(steps)}, {room} bytes", failure)


def no_room_for_records(steps: range, room: int) -> None:
    """In a child: metrics.jsonl can grow by only `room` bytes, less than a record, when a record of
    one of these steps comes."""
    append = Log._append

    def limited(self, record: dict) -> None:
        size = (self.folder / METRICS_FILE).stat().st_size
        with largest_file(size + room if record["step"] in steps else resource.RLIM_INFINITY):
            append(self, record)

    Log._append = limited


@fault("full disk under metrics.jsonl at a resume", whole=10, few=0)
def full_at_a_resume(report: Report, tries: int, folder: Path) -> None:
    """A run that goes on writes the file anew, without the records of the steps that it repeats.
    There is no room for that. A warning must say so, and the next record must mend the file."""
    whole = uncut(folder / "whole")
    for i in range(tries):
        pick, out = random.Random(i), folder / f"run{i}"
        step, room = pick.randint(5, 11), pick.randint(0, 300)
        failure = bad_end(train_child(out, partial(killed_at, step)), -signal.SIGKILL)
        ended = train_child(out, partial(no_room_at_first, room), resume="auto")
        failure = failure or bad_end(ended) or untidy(out)
        if ended.text.count("warning: metrics.jsonl failed") != 1:
            failure = failure or f"it is not said: {ended.text[-400:]}"
        report.count(f"step {step}, {room} bytes", failure or difference(whole, out))


def killed_at(step: int) -> None:
    """In a child: kill -9 comes in this step, counted from 0."""
    at_batch(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def no_room_at_first(room: int) -> None:
    """In a child: when all records are written for the first time, the disk is full after `room`
    bytes, less than they need."""
    write_all = Log._write_all

    def limited(self) -> None:
        Log._write_all = write_all
        with largest_file(room):
            write_all(self)

    Log._write_all = limited


@fault("full disk under the printed log", whole=10, few=0)
def full_under_the_log(report: Report, tries: int, folder: Path) -> None:
    """Its lines are lost, which the exit code says, and nothing else may be."""
    whole = uncut(folder / "whole")
    for i in range(tries):
        out, room = folder / f"run{i}", random.Random(i).randint(0, 40)
        ended = train_child(out, partial(no_room_for_lines, room))
        lost = "peak_memory_mb" not in ended.text  # the last line, and with it the error's own
        failure = "" if "Traceback" not in ended.text and ended.code == lost else ended.text[-500:]
        failure = failure or untidy(out)
        report.count(f"{room} bytes", failure or difference(whole, out))


def no_room_for_lines(room: int) -> None:
    """In a child: from the second record on, the file that it prints to can grow by only `room`
    bytes at each line."""
    line = Log.line

    def limited(self, *arguments) -> None:
        size = os.fstat(1).st_size + room
        with largest_file(size if len(self.records) > 1 else resource.RLIM_INFINITY):
            line(self, *arguments)

    Log.line = limited


# A full file system


def own_mounts() -> None:
    """In a child: mounts that only it sees, which takes no privilege where the kernel allows it.
    OSError otherwise."""
    library, user, group = ctypes.CDLL(None, use_errno=True), os.geteuid(), os.getegid()
    if library.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("none", Path("/"), "", MS_REC | MS_PRIVATE)


def mount(source: str | Path, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    library = ctypes.CDLL(None, use_errno=True)
    names = [os.fsencode(name) for name in (source, target, kind)]
    if library.mount(*names, ctypes.c_ulong(flags), os.fsencode(options)):
        raise OSError(ctypes.get_errno(), f"mount of {target}")


@cache
def no_mounts() -> str:
    """Why a child cannot have mounts of its own; '' if it can."""
    with tempfile.TemporaryDirectory() as name:
        code, text = train_child(Path(name) / "run", partial(try_mounts, Path(name)))
    return "" if code == 7 else f"no mounts here: {text.strip().splitlines()[-1]}"


def try_mounts(folder: Path) -> None:
    own_mounts()
    mount("none", folder, "tmpfs")
    os._exit(7)


def small_disk(size: int, disk: Path, aside: Path) -> None:
    """In a child: `disk` is a file system of `size` bytes. All that the run has put on it is copied
    `aside` at the end."""
    own_mounts()
    mount("none", disk, "tmpfs", options=f"size={size}")
    main = train.main

    def copied(arguments: list[str]) -> int:
        try:
            return main(arguments)
        finally:
            shutil.copytree(disk, aside)

    train.main = copied


@fault("full file system", whole=20, few=0)
def full_file_system(report: Report, tries: int, folder: Path) -> None:
    """From a fraction of a checkpoint to room for all. What could be saved must be resumed where
    there is room. If that is best.pt alone, which a fresh start would overwrite, the run must be
    refused and best.pt must stay."""
    if no_mounts():
        return report.not_tried(no_mounts())
    whole, codes, disk = uncut(folder / "whole"), Counter(), folder / "disk"
    all_of_it = 5 * (whole / "ckpt_00000012.pt").stat().st_size
    disk.mkdir()
    for i in range(tries):
        size, aside = 4096 + all_of_it * (i + 1) // (tries + 1), folder / f"aside{i}"
        ended = train_child(disk / "run", partial(small_disk, size, disk, aside))
        out, codes[ended.code] = aside / "run", codes[ended.code] + 1
        failure = bad_end(ended, ended.code if ended.code in (0, 1, 2) else 0) or untidy(out)
        if not failure and ended.code == 0:
            failure = difference(whole, out)
        elif not failure:
            before = checkpoints(out)
            only_best = list(before) == ["best.pt"]
            failure = bad_end(train_child(out, resume="auto"), 2 if only_best else 0)
            if only_best and checkpoints(out) != before:
                failure = failure or "a run with best.pt alone was touched"
            if not only_best:
                failure = failure or other_state(whole, out)
        report.count(f"{size} bytes", failure)
    times = (f"{code}: {count} times" for code, count in sorted(codes.items()))
    report.note = f"exit codes {', '.join(times)}"


# The preparation of data


@fault("full disk while train.py prepares its data", whole=10, few=1)
def full_while_preparing(report: Report, tries: int, folder: Path) -> None:
    """One line, and nothing is left behind."""
    if no_mounts():
        return report.not_tried(no_mounts())
    disk = folder / "disk"
    disk.mkdir()
    for i, size in enumerate(sizes(100_000, tries)):
        aside, out = folder / f"aside{i}", folder / f"run{i}"
        before = partial(small_disk_for_data, max(4096, size), disk, aside)
        ended = train_child(out, before, data=disk, dataset="python")
        left = [*aside.rglob("*"), *([out] if out.exists() else [])]
        report.count(f"{size} bytes", bad_end(ended, 2) or (f"left behind: {left}" if left else ""))


def small_disk_for_data(size: int, disk: Path, aside: Path) -> None:
    small_disk(size, disk, aside)
    corpus = Corpus("python", "a text", text_of_100_kb, tokenizer="byte")
    data.prepare.open_corpus = lambda *asked: corpus


def text_of_100_kb() -> Iterator[Piece]:
    for number in range(100):
        yield Piece("val" if number % 10 == 0 else "train", True, f"{number:09} " * 100)


@fault("full disk in data/prepare.py", whole=20, few=1)
def full_in_prepare(report: Report, tries: int, folder: Path) -> None:
    """A limit from 1 byte to one byte less than train.bin needs. One line must say so, and nothing
    is left behind."""
    text = folder / "text.txt"
    text.write_text("the cat sat on a mat\n" * 5000)
    for i, size in enumerate(sizes(94_500, tries)):
        tokenizer = ("byte", "char", "sentencepiece")[i % 3]
        most = min(size, 8_000) if tokenizer == "sentencepiece" else size
        arguments = [text, f"tokenizer={tokenizer}", "name=words"]
        done = subprocess.run(
            [sys.executable, ROOT / "data" / "prepare.py", *arguments],
            env={**os.environ, "ROOTLLAMA_DATA": str(folder)},
            capture_output=True,
            text=True,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most)),
        )
        failure = bad_end(Ended(done.returncode, done.stdout + done.stderr), 2)
        left = [path for path in folder.iterdir() if path != text]
        failure = failure or (f"left behind: {left}" if left else "")
        report.count(f"{size} bytes, {tokenizer}", failure)
        for path in left:
            shutil.rmtree(path, ignore_errors=True)


# The folder of the run


@fault("read-only or vanished out_dir, deleted files, EIO", whole=24, few=1)
def without_out_dir(report: Report, tries: int, folder: Path) -> None:
    """At step 5, 6 or 7. What is lost must be made again, and what cannot be written must be
    named."""
    whole = uncut(folder / "whole", **KNOBS)
    faults: list[tuple[Callable[[Path], None], int]] = [  # with the exit code
        (vanish, 0),
        (vanish_with_parent, 1),
        (failing_writes, 0),
        (failing_writes_to_the_end, 1),
        (delete_config, 0),
        (delete_tokenizer, 0),
    ]
    if not no_mounts():
        faults.append((read_only, 1))
    if os.geteuid():  # root may write wherever it likes
        faults.append((not_permitted, 1))
    for i in range(tries):
        (happen, code), at = faults[i % len(faults)], random.Random(i).randint(5, 7)
        out = folder / f"parent{i}" / "run"
        out.mkdir(parents=True)
        before = partial(happen_at, at, happen, out)
        ended = train_child(out, before, output=folder / f"run{i}.log", **KNOBS)
        if happen is not_permitted:
            out.chmod(0o755)
        failure = bad_end(ended, code) or untidy(out)
        if "warning: " not in ended.text:
            failure = failure or f"it is not said: {ended.text[-400:]}"
        if "step 12/12 |" not in ended.text:
            failure = failure or f"training did not go on: {ended.text[-400:]}"
        if code == 0:
            failure = failure or other_state(whole, out)
            missing = [n for n in ("config.json", "tokenizer.json") if not (out / n).exists()]
            failure = failure or (f"not made again: {missing}" if missing else "")
        report.count(f"{happen.__name__} at step {at}", failure)
    report.note = ", ".join(happen.__name__.replace("_", " ") for happen, _ in faults)


def happen_at(step: int, happen: Callable[[Path], None], out: Path) -> None:
    """In a child: happen(out) comes just before the batch of this step."""
    if happen is read_only:
        own_mounts()
    at_batch(step, partial(happen, out))


def vanish(out: Path) -> None:
    shutil.rmtree(out)


def delete_config(out: Path) -> None:
    (out / "config.json").unlink()


def delete_tokenizer(out: Path) -> None:
    (out / "tokenizer.json").unlink()


def vanish_with_parent(out: Path) -> None:
    shutil.rmtree(out.parent)


def not_permitted(out: Path) -> None:
    out.chmod(0o555)


def read_only(out: Path) -> None:
    """Lays out_dir over itself, read-only."""
    mount(out, out, "", MS_BIND)
    mount("none", out, "", MS_BIND | MS_REMOUNT | MS_RDONLY)


def failing_writes(out: Path, saves: int = 1) -> None:
    """The disk fails in the middle of the next numbered save, or of the next `saves`."""
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
