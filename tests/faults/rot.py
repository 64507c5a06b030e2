"""Bits that rot, blocks that are lost, files that change while they are read. What is loaded must
be what was written; or the checkpoint before it, with a warning; or nothing, with an error. It must
never be something else.
"""

import contextlib
import io
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import train
from data.loader import open_dataset
from weights import checkpoint
from weights.open import load_model

from .harness import (
    Report,
    Silent,
    bad_end,
    bad_resume,
    before_call,
    difference,
    fault,
    train_child,
    uncut,
    words,
)

OTHERS = ("512 zeros", "burst", "truncation", "4096 zeros", "burst", "truncation")
OTHERS += ("512 zeros", "burst", "truncation")
KINDS = ["bit", *(kind for other in OTHERS for kind in (other, "bit"))]


def damage(content: bytes, kind: str, pick: random.Random) -> bytes:
    """A copy of a file's content with one damage, anywhere in it; never equal to the content."""
    while True:
        worse, at = bytearray(content), pick.randrange(len(content))
        if kind == "bit":
            worse[at] ^= 1 << pick.randrange(8)
        elif kind == "burst":
            worse[at : at + 64] = pick.randbytes(len(worse[at : at + 64]))
        elif kind == "truncation":
            del worse[at:]
        else:  # blocks of a disk are lost whole, at multiples of their size
            size = int(kind.split()[0])
            at -= at % size
            worse[at : at + size] = bytes(len(worse[at : at + size]))
        if worse != content:
            return bytes(worse)


def same(a: object, b: object) -> bool:
    """Equal in type, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def trained(folder: Path) -> Path:
    """A finished run, with checkpoints at steps 4, 8 and 12 and a best.pt."""
    return uncut(folder / "whole", keep=3)


def attempt(function: Callable) -> tuple[object, str]:
    """(what function() returned, or the error that it raised; what it wrote to stderr)."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            result = function()
        except (ValueError, OSError) as error:
            result = error
    return result, said.getvalue()


def unclear(error: Exception, name: str) -> str:
    """A failure unless the error names a file, in one line."""
    text = str(error)
    clear = name in text and "\n" not in text and len(text) < 2000
    return "" if clear else f"unclear: {text[:300]!r}"


def taken_for(found: object, right: object, name: str) -> str:
    """A failure unless what was found is right, or an error that names a file."""
    if isinstance(found, Exception):
        return unclear(found, name)
    return "" if same(found, right) else Silent("something else was loaded")


# Checkpoints


@fault("bit rot of a checkpoint", whole=1900, few=10)
def rotten_checkpoint(report: Report, tries: int, folder: Path) -> None:
    """The newest checkpoint is damaged. In four of five tries the one before it is there and must
    be taken, with a warning that names both. In the fifth try there must be an error that names the
    damaged one."""
    whole, unseen, plain = trained(folder), 0, 0
    paths = {step: checkpoint.path_of(whole, step) for step in (8, 12)}
    states = {step: checkpoint.load(path) for step, path in paths.items()}
    older, newer, content = paths[8].name, paths[12].name, paths[12].read_bytes()
    scene = folder / "scene"
    for i in range(tries):
        kind, alone = KINDS[i % len(KINDS)], i % 5 == 4
        scene.mkdir()
        if not alone:
            os.link(paths[8], scene / older)
        (scene / newer).write_bytes(damage(content, kind, random.Random(i)))
        found, said = attempt(partial(checkpoint.load_newest, scene))
        loaded = {step for step, state in states.items() if same(found, state)}
        failure = ""
        if isinstance(found, Exception):
            failure = unclear(found, newer) if alone else f"the sound one was not taken: {found}"
        elif 8 in loaded and not (older in said and newer in said):
            failure = f"not said: {said!r}"
        elif not loaded:
            failure = Silent("another state was loaded")
        unseen += 12 in loaded
        report.count(f"{kind}, try {i}", failure)
        plain += kind == "bit" and plainly_wrong(scene / newer, states[12])
        shutil.rmtree(scene)
    bits = sum(KINDS[i % len(KINDS)] == "bit" for i in range(tries))
    report.note = (
        f"{unseen} damages were in bytes that mean nothing; torch.load alone gave wrong values in "
        f"silence for {plain} of the {bits} flipped bits"
    )


def plainly_wrong(path: Path, state: dict) -> bool:
    """Whether torch.load alone takes a damaged file for a sound one, with other values in it."""
    try:
        return not same(torch.load(path, map_location="cpu", weights_only=True), state)
    except Exception:  # it has noticed; there are many kinds
        return False


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Those that sample.py would sample from."""
    model, _, _ = load_model(run, "best")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@fault("bit rot of best.pt, then sampled", whole=200, few=4)
def rotten_best(report: Report, tries: int, folder: Path) -> None:
    """sample.py must have the right weights, or an error that names the file."""
    whole = trained(folder)
    best, right = whole / "best.pt", weights(whole)
    content = best.read_bytes()
    for i in range(tries):
        kind = KINDS[i % len(KINDS)]
        best.write_bytes(damage(content, kind, random.Random(i)))
        found, _ = attempt(partial(weights, whole))
        report.count(f"{kind}, try {i}", taken_for(found, right, "best.pt"))


@fault("the newest j of k checkpoints damaged", whole=14, few=5)
def depth(report: Report, tries: int, folder: Path) -> None:
    """Every j up to k, for k up to 4. The newest sound one must be taken, each damaged one must be
    named, and none may be deleted."""
    source = checkpoint.path_of(trained(folder), 12)
    cases = [(k, j) for k in range(1, 5) for j in range(k + 1)]
    for k, j in cases[:tries]:
        scene, state = folder / f"{k}.{j}", checkpoint.load(source)
        scene.mkdir()
        paths = [checkpoint.path_of(scene, step) for step in range(1, k + 1)]
        for step, path in enumerate(paths, 1):
            checkpoint.save(path, without_format(state) | {"step": step})
        for path in paths[k - j :]:
            path.write_bytes(damage(path.read_bytes(), "truncation", random.Random(j)))
        found, said = attempt(partial(checkpoint.load_newest, scene))
        failure = ""
        if isinstance(found, Exception):
            failure = "" if j == k else f"got {str(found)[:200]}"
        elif j == k or found["step"] != k - j:
            failure = Silent(f"got step {found['step']}")
        if not all(path.name in said for path in paths[k - j :]):
            failure = failure or f"not named: {said!r}"
        if not all(path.exists() for path in paths):
            failure = failure or "one was deleted"
        report.count(f"{j} of {k}", failure)


def without_format(state: dict) -> dict:
    """The fields of a checkpoint as checkpoint.save takes them."""
    return {name: v for name, v in state.items() if name not in ("format", "format_version")}


def exchange(a: Path, b: Path) -> None:
    aside = a.with_suffix(".x")
    os.replace(a, aside)
    os.replace(b, a)
    os.replace(aside, b)


SWAPS = {  # what is done to the files of a run (8, 12, 16, best, 12 of another run)
    "step 8 renamed to 12": lambda p8, p12, p16, best, other: os.replace(p8, p12),
    "steps 8 and 12 exchanged": lambda p8, p12, p16, best, other: exchange(p8, p12),
    "step 12 renamed to 8": lambda p8, p12, p16, best, other: os.replace(p12, p8),
    "best.pt renamed to 16": lambda p8, p12, p16, best, other: os.replace(best, p16),
    "step 12 of another run": lambda p8, p12, p16, best, other: shutil.copy(other, p12),
}


@fault("a checkpoint under another's name", whole=len(SWAPS), few=1)
def swapped(report: Report, tries: int, folder: Path) -> None:
    """Training must resume from one that is what its name says, or, if the newest is of another
    run, not at all."""
    whole = trained(folder)
    other = checkpoint.path_of(uncut(folder / "other", keep=3, seed=7), 12)
    for i, (name, swap) in enumerate(list(SWAPS.items())[:tries]):
        scene, goes_on = folder / f"scene{i}", name != "step 12 of another run"
        shutil.copytree(whole, scene)
        files = [checkpoint.path_of(scene, step) for step in (8, 12, 16)]
        swap(*files, scene / "best.pt", other)
        ended = train_child(scene, keep=3, resume="auto")
        failure = bad_end(ended, 0 if goes_on else 2)
        if not ("warning: " in ended.text or "error: " in ended.text):
            failure = failure or f"nothing was said: {ended.text[-500:]}"
        report.count(name, failure or (difference(whole, scene) if goes_on else ""))


@fault("bit rot, then resume=auto to the end", whole=38, few=0)
def rotten_and_resumed(report: Report, tries: int, folder: Path) -> None:
    """The whole command. It must go back to the checkpoint before the damaged one, and end as the
    run that was never cut."""
    whole, scene = trained(folder), folder / "scene"
    for i in range(tries):
        kind = KINDS[i * 5 % len(KINDS)]
        shutil.copytree(whole, scene)
        checkpoint.path_of(scene, 12).unlink()
        path = checkpoint.path_of(scene, 8)
        path.write_bytes(damage(path.read_bytes(), kind, random.Random(i)))
        report.count(f"{kind}, try {i}", bad_resume(whole, scene, keep=3), lost=4)
        shutil.rmtree(scene)


# Data


def opened(folder: Path) -> list:
    """All that a run can learn from a data set."""
    data = open_dataset(folder)
    return [data.meta, data.train.tolist(), data.val.tolist()]


FILES = ("train.bin", "val.bin", "meta.json", "tokenizer.json")


@fault("bit rot of the data, before a start", whole=1900, few=40)
def rotten_data(report: Report, tries: int, folder: Path) -> None:
    """The data must be opened as they were, or be refused with an error that names the folder."""
    scene, right = folder / "words", opened(words())
    shutil.copytree(words(), scene)
    for i in range(tries):
        name, kind = FILES[i % len(FILES)], KINDS[i // len(FILES) % len(KINDS)]
        content = (words() / name).read_bytes()
        (scene / name).write_bytes(damage(content, kind, random.Random(i)))
        found, _ = attempt(partial(opened, scene))
        failure = taken_for(found, right, str(scene))
        if i % 50 == 0 and isinstance(found, Exception):  # the whole command says so, too
            ended = train_child(folder / "run", dataset=scene)
            one_line = ended.text.startswith("error: ") and ended.text.count("\n") == 1
            failure = failure or bad_end(ended, 2) or ("" if one_line else ended.text[-300:])
        report.count(f"{kind} in {name}, try {i}", failure)
        (scene / name).write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(64))


def replace(path: Path) -> None:
    """By another file under the same name, as every editor does it: a run that has the old file
    open can still read it."""
    other = path.with_suffix(".new")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)


def change_at(step: int, place: str, change: Callable[[], None]) -> None:
    """In a child: change() comes before the call of train.PLACE after so many steps."""
    before_call(train, place, lambda run, *_: change() if run.step == step else None)


@fault("the data change while they are read", whole=48, few=1)
def data_change(report: Report, tries: int, folder: Path) -> None:
    """A file that is changed in place must end the run in one line, and when the file is back, the
    run must go on to the end of the uncut one. A file that is put in the place of the old one is no
    change, because the run still has the old one open."""
    whole, put_back = trained(folder), 0
    cases = [
        (change, place, name)
        for name in ("train.bin", "val.bin")
        for change in (truncate, overwrite, replace)
        for place in ("train_step", "validation_losses")
    ]
    for i in range(tries):
        change, place, name = cases[i * 7 % len(cases)]
        step = 5 + i % 2 * 5
        if place == "train_step":
            step = random.Random(i).choice((1, 2, 3, 5, 6, 7, 9, 10, 11))
        source, out = folder / f"data{i}" / "words", folder / f"run{i}"
        shutil.copytree(words(), source)
        before = partial(change_at, step, place, partial(change, source / name))
        ended = train_child(out, before, keep=3, dataset=source)
        failure = bad_end(ended, 0 if change is replace else 1)
        if not failure and change is not replace:
            failure = "" if name in ended.text else f"unclear: {ended.text[-500:]}"
            shutil.copyfile(words() / name, source / name)
            put_back += 1
            failure = failure or bad_resume(whole, out, keep=3, dataset=source)
        failure = failure or difference(whole, out)
        report.count(f"{change.__name__} {name} at {place} {step}", failure)
    report.note = f"{put_back} put back and resumed"
