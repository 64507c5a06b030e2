"""Bits that rot, blocks that are lost, files that change while they are read: what is loaded is what was written, or
the checkpoint before it and said so, or nothing and said so. Never something else."""

import contextlib
import io
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import checkpoint
import train
from data.loader import open_dataset
from weights import load_model

from .harness import Report, command, difference, fault, run, words

KINDS = ("bit", "512 zeros", "bit", "burst", "bit", "truncation", "bit", "4096 zeros", "bit", "burst", "bit",
         "truncation", "bit", "512 zeros", "bit", "burst", "bit", "truncation", "bit")  # ten bits to three of each


def damage(content: bytes, kind: str, pick: random.Random) -> bytes:
    """A copy of a file's content with one damage, anywhere in it; never equal to the content."""
    while True:
        worse, at = bytearray(content), pick.randrange(len(content))
        if kind == "bit":
            worse[at] ^= 1 << pick.randrange(8)
        elif kind == "burst":
            worse[at:at + 64] = pick.randbytes(len(worse[at:at + 64]))
        elif kind == "truncation":
            del worse[at:]
        else:  # blocks of a disk are lost whole, at multiples of their size
            size = int(kind.split()[0])
            at -= at % size
            worse[at:at + size] = bytes(len(worse[at:at + size]))
        if worse != content:
            return bytes(worse)


def same(a: object, b: object) -> bool:
    """Equal in type, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def trained(folder: Path, **knobs: object) -> Path:
    """A finished run, with checkpoints at steps 4, 8 and 12 and a best.pt."""
    code, text = run(command(folder / "whole", keep=3, **knobs), words(folder))
    assert code == 0, text
    return folder / "whole"


def attempt(function: Callable) -> tuple[object, str]:
    """(what function() returned, or the error that it raised; what it wrote to stderr)."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            result = function()
        except (ValueError, OSError) as error:
            result = error
    return result, said.getvalue()


def unclear(error: Exception, name: str) -> str:
    """What is wrong with an error that should name a file in one line, as a failure."""
    text = str(error)
    return "" if name in text and "\n" not in text and len(text) < 2000 else f"unclear: {text[:300]!r}"


@fault("bit rot of a checkpoint", whole=1900, few=95)
def rotten_checkpoint(tries: int, folder: Path) -> Report:
    whole, report, plain, unseen = trained(folder), Report(), 0, 0
    older, newer = (checkpoint.path_of(whole, step) for step in (8, 12))
    content, states = newer.read_bytes(), {step: checkpoint.load(checkpoint.path_of(whole, step)) for step in (8, 12)}
    for i in range(tries):
        kind, alone = KINDS[i % len(KINDS)], i % 5 == 4
        scene = folder / "scene"
        scene.mkdir()
        if not alone:
            os.link(older, scene / older.name)
        (scene / newer.name).write_bytes(damage(content, kind, random.Random(i)))
        found, said = attempt(partial(checkpoint.load_newest, scene))
        loaded = {step for step, state in states.items() if same(found, state)}
        if isinstance(found, Exception):
            failure = unclear(found, newer.name) if alone else f"the sound one was not taken: {found}"
        elif 8 in loaded:
            failure = "" if older.name in said and newer.name in said else f"not said: {said!r}"
        else:
            failure = "" if 12 in loaded else "another state was loaded"
        unseen += 12 in loaded
        report.count(f"{kind}, try {i}: {failure}" if failure else "", silent=failure.startswith("another"))
        plain += kind == "bit" and plainly_wrong(scene / newer.name, states[12])
        shutil.rmtree(scene)
    bits = sum(KINDS[i % len(KINDS)] == "bit" for i in range(tries))
    report.note = (f"{unseen} damages were in bytes that mean nothing; torch.load alone gave wrong values in "
                   f"silence for {plain} of the {bits} flipped bits")
    return report


def plainly_wrong(path: Path, state: dict) -> bool:
    """Whether torch.load alone takes a damaged file for a sound one, with other values in it."""
    try:
        return not same(torch.load(path, map_location="cpu", weights_only=True), state)
    except Exception:  # many kinds: it has noticed
        return False


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Those that sample.py would sample from."""
    model, _, _ = load_model(run, "best")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@fault("bit rot of best.pt, then sampled", whole=200, few=15)
def rotten_best(tries: int, folder: Path) -> Report:
    whole, report = trained(folder), Report()
    best, right = whole / "best.pt", weights(whole)
    content = best.read_bytes()
    for i in range(tries):
        best.write_bytes(damage(content, KINDS[i % len(KINDS)], random.Random(i)))
        found, _ = attempt(partial(weights, whole))
        wrong = not isinstance(found, Exception) and not same(found, right)
        failure = "other weights were loaded" if wrong else unclear(found, "best.pt") \
            if isinstance(found, Exception) else ""
        report.count(f"{KINDS[i % len(KINDS)]}, try {i}: {failure}" if failure else "", silent=wrong)
    return report


@fault("the newest j of k checkpoints damaged", whole=14, few=14)
def depth(tries: int, folder: Path) -> Report:
    """Every j up to k, for k up to 4: the newest sound one is taken, and nothing is ever deleted."""
    source, report = checkpoint.path_of(trained(folder), 12), Report()
    cases = [(k, j) for k in range(1, 5) for j in range(k + 1)]
    for k, j in cases[:tries]:
        scene, state = folder / f"{k}.{j}", checkpoint.load(source)
        scene.mkdir()
        fields = {name: value for name, value in state.items() if name not in ("format", "format_version")}
        paths = [checkpoint.path_of(scene, step) for step in range(1, k + 1)]
        for step, path in enumerate(paths, 1):
            checkpoint.save(path, fields | {"step": step})
        for path in paths[k - j:]:
            path.write_bytes(damage(path.read_bytes(), "truncation", random.Random(j)))
        found, said = attempt(partial(checkpoint.load_newest, scene))
        right = isinstance(found, ValueError) if j == k else not isinstance(found, Exception) and found["step"] == k - j
        failure = "" if right else f"got {str(found)[:200]}"
        failure = failure or ("" if all(path.name in said for path in paths[k - j:]) else f"not named: {said!r}")
        failure = failure or ("" if all(path.exists() for path in paths) else "one was deleted")
        report.count(f"{j} of {k}: {failure}" if failure else "", silent=not right and not isinstance(found, Exception))
    return report


def exchange(a: Path, b: Path) -> None:
    os.replace(a, a.with_suffix(".x"))
    os.replace(b, a)
    os.replace(a.with_suffix(".x"), b)


SWAPS = {  # what is done to the folder of a run, and whether the run can then go on
    "step 8 renamed to 12": (lambda here, other: os.replace(*(checkpoint.path_of(here, s) for s in (8, 12))), True),
    "steps 8 and 12 exchanged": (lambda here, other: exchange(*(checkpoint.path_of(here, s) for s in (8, 12))), True),
    "step 12 renamed to 8": (lambda here, other: os.replace(*(checkpoint.path_of(here, s) for s in (12, 8))), True),
    "best.pt renamed to 16": (lambda here, other: os.replace(here / "best.pt", checkpoint.path_of(here, 16)), True),
    "step 12 of another run": (lambda here, other: shutil.copy(checkpoint.path_of(other, 12), here), False)}


@fault("a checkpoint under another's name", whole=len(SWAPS), few=len(SWAPS))
def swapped(tries: int, folder: Path) -> Report:
    """Training resumes from one that is what its name says, or not at all."""
    whole, report, data = trained(folder), Report(), words(folder)
    code, text = run(command(folder / "other", keep=3, seed=7), data)
    assert code == 0, text
    for i, (name, (swap, goes_on)) in enumerate(list(SWAPS.items())[:tries]):
        scene = folder / f"scene{i}"
        shutil.copytree(whole, scene)
        swap(scene, folder / "other")
        code, text = run(command(scene, keep=3, resume="auto"), data)
        failure = unsaid(code, text, 0 if goes_on else 2)
        wrong = difference(whole, scene) if goes_on and not failure else ""
        report.count(f"{name}: {failure or wrong}" if failure or wrong else "", silent=bool(wrong))
    return report


def unsaid(code: int, text: str, wanted: int) -> str:
    """A failure unless the exit code is the wanted one and there is no traceback but a word about what happened."""
    if code != wanted or "Traceback" in text:
        return f"exit code {code}: {text[-500:]}"
    return "" if "warning: " in text or "error: " in text else f"nothing was said: {text[-500:]}"


@fault("bit rot, then resume=auto to the end", whole=38, few=3)
def rotten_and_resumed(tries: int, folder: Path) -> Report:
    """The whole command: it goes back to the checkpoint before, and still ends as the run that was never cut."""
    whole, report, data = trained(folder), Report(), words(folder)
    for i in range(tries):
        scene, kind = folder / f"scene{i}", KINDS[i * 5 % len(KINDS)]
        shutil.copytree(whole, scene)
        checkpoint.path_of(scene, 12).unlink()
        path = checkpoint.path_of(scene, 8)
        path.write_bytes(damage(path.read_bytes(), kind, random.Random(i)))
        code, text = run(command(scene, keep=3, resume="auto"), data)
        failure = f"exit code {code}: {text[-500:]}" if code else difference(whole, scene)
        report.count(f"{kind}, try {i}: {failure}" if failure else "", silent=bool(failure) and not code, lost=4)
        shutil.rmtree(scene)
    return report


def opened(folder: Path) -> list:
    """All that a run can learn from a data set."""
    data = open_dataset(folder)
    return [data.meta, data.train.tolist(), data.val.tolist()]


FILES = ("train.bin", "val.bin", "meta.json", "tokenizer.json")


@fault("bit rot of the data, before a start", whole=1900, few=150)
def rotten_data(tries: int, folder: Path) -> Report:
    source, report = words(folder) / "words", Report()
    right = opened(source)
    scene = folder / "damaged" / "words"
    shutil.copytree(source, scene)
    for i in range(tries):
        name, kind = FILES[i % len(FILES)], KINDS[i // len(FILES) % len(KINDS)]
        content = (source / name).read_bytes()
        (scene / name).write_bytes(damage(content, kind, random.Random(i)))
        found, _ = attempt(partial(opened, scene))
        wrong = not isinstance(found, Exception) and not same(found, right)
        failure = "other data were opened" if wrong else unclear(found, str(scene)) \
            if isinstance(found, Exception) else ""
        if i % 50 == 0 and isinstance(found, Exception):  # and so says the command
            code, text = run(command(folder / "run"), scene.parent)
            one_line = text.startswith("error: ") and text.count("\n") == 1
            failure = failure or ("" if code == 2 and one_line else f"exit code {code}: {text[-300:]}")
        report.count(f"{kind} in {name}, try {i}: {failure}" if failure else "", silent=wrong)
        (scene / name).write_bytes(content)
    return report


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(64))


def replace(path: Path) -> None:
    """By another file under the same name, as data/prepare.py and every editor do it: the old one can still be read."""
    other = path.with_suffix(".new")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)


def at_step(step: int, place: str, change: Callable[[Path], None], path: Path) -> None:
    """In the child: `path` is changed just before the batch of `step`, or before the evaluation after that step."""
    function = getattr(train, place)

    def changed(*arguments, **others):
        if step == (arguments[1] if place == "batch" else arguments[0].step):
            change(path)
        return function(*arguments, **others)

    setattr(train, place, changed)


@fault("the data change while they are read", whole=48, few=4)
def data_change(tries: int, folder: Path) -> Report:
    """In place: the run ends in one line, and goes on to the uncut run's end when the file is back. A file put in the
    old one's place is no change, because the old one is still there for the run that has it open."""
    whole, source, report, put_back = trained(folder), words(folder) / "words", Report(), 0
    cases = [(change, place, name) for name in ("train.bin", "val.bin") for change in (truncate, overwrite, replace)
             for place in ("batch", "validation_loss")]
    for i in range(tries):
        change, place, name = cases[i * 7 % len(cases)]
        step = random.Random(i).choice((1, 2, 3, 5, 6, 7, 9, 10, 11)) if place == "batch" else 5 + i % 2 * 5
        data, out = folder / f"data{i}", folder / f"run{i}"
        shutil.copytree(source, data / "words")
        code, text = run(command(out, keep=3), data, partial(at_step, step, place, change, data / "words" / name))
        failure = "" if code == (0 if change is replace else 1) else f"exit code {code}: {text[-500:]}"
        if not failure and change is not replace:
            errors = [line for line in text.splitlines() if line.startswith("error: ")]
            clear = len(errors) == 1 and name in errors[0] and "Traceback" not in text
            failure = "" if clear else f"unclear: {text[-500:]}"
            shutil.copyfile(source / name, data / "words" / name)
            put_back += 1
            code, text = run(command(out, keep=3, resume="auto"), data)
            failure = failure or (f"exit code {code} of the resumed run: {text[-500:]}" if code else "")
        wrong = "" if failure else difference(whole, out)
        report.count(f"{change.__name__} {name} at {place} {step}: {failure or wrong}" if failure or wrong else "",
                     silent=bool(wrong))
        shutil.rmtree(data)
    report.note = f"{put_back} put back and resumed"
    return report
