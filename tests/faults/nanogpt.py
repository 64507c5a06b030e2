"""The same faults against nanoGPT's train.py, to stand beside ours. It is no part of `make faults`:

    PYTHONPATH=.:tests python -m faults.nanogpt PATH_TO_NANOGPT [words of a name ...]

Its programs run unmodified, in a copy of their folder for each row, with a small data set in their
format. A run is a child forked from a server that has imported torch, and train.py is the main
program of the child. What a fault needs inside the process is a patch of torch, made before
train.py starts. Only the signals go to an ordinary `python train.py`.

A row passes where ours would. It is silently wrong if a run ended with exit code 0, or a checkpoint
loaded, with something wrong in it and no line that said so.
"""

import itertools
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .__main__ import table
from .harness import SERVER, Before, Child, Ended, Report, Silent, words
from .rot import KINDS, damage, same

MODEL = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8)
LOOP = dict(max_iters=40, warmup_iters=2, lr_decay_iters=100, learning_rate=0.001)
LOOP |= dict(gradient_accumulation_steps=1, eval_interval=4, eval_iters=2, log_interval=1)
REST = dict(dataset="words", device="cpu", dtype="float32", compile=False, out_dir="out")
SMALL = MODEL | LOOP | REST | dict(always_save_checkpoint=True)
HEAVY = dict(n_embd=384, batch_size=2, block_size=16, eval_interval=2, eval_iters=1)  # saves 42 MB
# All that train.py reads of a checkpoint.
USED = ("model", "optimizer", "model_args", "iter_num", "best_val_loss")
BASE = 20  # the step of the checkpoint that `trained` makes


def main(argv: list[str]) -> int:
    if not argv or not Path(argv[0], "train.py").is_file():
        print("error: give the folder of a copy of nanoGPT", file=sys.stderr)
        return 2
    chosen = [row for row in ROWS if all(word in row[0] for word in argv[1:])]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        rows = list(pool.map(partial(measured, Path(argv[0])), chosen))
    print(f"\n{table(rows)}\n\ntorch {torch.__version__}, Python {sys.version.split()[0]}")
    for row in rows:
        for failure, times in Counter(row["failures"]).most_common(6):
            print(f"FAILED {times} x {row['name']}: {failure}")
    return 0


def measured(source: Path, row: tuple[str, int, Callable]) -> dict:
    begin, report, (name, tries, function) = time.monotonic(), Report(), row
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "nanoGPT")
        shutil.copytree(source, tree, ignore=shutil.ignore_patterns(".git", "assets"))
        prepare(tree / "data" / "words")
        function(report, tries, tree)
    seconds = time.monotonic() - begin
    print(f"{name}: {report.passed} of {report.tries}, {seconds:.0f} s", flush=True)
    return report.row() | {"name": name}


def prepare(folder: Path) -> None:
    """Our made-up prose, a token per character, in the files that their prepare.py writes."""
    text = words().with_suffix(".txt").read_text()
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    folder.mkdir(parents=True)
    ids[: len(ids) * 9 // 10].tofile(folder / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(folder / "val.bin")
    meta = {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def arguments(**knobs: object) -> list[str]:
    return [f"--{key}={value}" for key, value in (SMALL | knobs).items()]


def _in_child(tree: Path, argv: list[str], output: Path, before: Before) -> None:
    os.chdir(tree)
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    sys.modules.pop("model", None)  # ours has the same name
    sys.path.insert(0, str(tree))
    sys.argv = ["train.py", *argv]
    if before:
        before()
    runpy.run_path("train.py", run_name="__main__")


class NanoRun(Child):
    """train.py with these knobs in `tree`, in a process of its own. `before` is called in it
    first."""

    def __init__(self, tree: Path, before: Before = None, config: str = "", **knobs: object):
        self.output = tree / f"{time.monotonic_ns()}.log"
        argv = [config] * bool(config) + arguments(**knobs)
        self.process = SERVER.Process(target=_in_child, args=(tree, argv, self.output, before))
        self.process.start()


def run(tree: Path, before: Before = None, **knobs: object) -> Ended:
    """A run from its start to its end."""
    return NanoRun(tree, before, **knobs).end()


def trained(tree: Path) -> Path:
    """The checkpoint at the end of a run of BASE steps."""
    run(tree, out_dir="base", max_iters=BASE, n_embd=64)
    return tree / "base" / "ckpt.pt"


def steps_done(text: str) -> int:
    """Optimizer steps of the run so far; 0 if this process made none."""
    return max((int(step) + 1 for step in re.findall(r"^iter (\d+):", text, re.M)), default=0)


def last_line(text: str) -> str:
    return re.sub(r"\d+", "N", (text.strip().splitlines() or [""])[-1][:160])


def load(path: Path) -> dict | None:
    """What train.py reads of a checkpoint, loaded as train.py and sample.py load it; None if that
    is an error."""
    try:
        state = torch.load(path, map_location="cpu")
        return {key: state[key] for key in USED}
    except Exception:  # any kind of "no" is the same here
        return None


def start_as(saved: Path) -> dict[str, str]:
    return {"init_from": "resume" if saved.exists() else "scratch"}


# Resuming


def spy(path: Path) -> None:
    """Writes the places of each training batch, and the bits of each training loss, to a file."""

    def noted(function: Callable, shown: Callable) -> Callable:
        def call(*a, **k):
            result = function(*a, **k)
            if torch.is_grad_enabled():
                with path.open("a") as file:
                    file.write(f"{function.__name__} {shown(result)}\n")
            return result

        return call

    functional = torch.nn.functional
    torch.randint = noted(torch.randint, torch.Tensor.tolist)
    functional.cross_entropy = noted(functional.cross_entropy, lambda loss: loss.item().hex())


def spied(path: Path) -> tuple[list[str], list[str]]:
    """(the batches, the losses) of a run; the file is removed."""
    lines = path.read_text().splitlines()
    path.unlink()
    batches = [line for line in lines if line.startswith("randint")]
    return batches, [line for line in lines if line.startswith("cross_entropy")]


def resume(report: Report, tries: int, tree: Path) -> None:
    again, whole, rest = 0, tree / "whole", tree / "rest"
    cuts = [(cut, dropout) for cut in (2, *range(4, 40, 4)) for dropout in (0.0, 0.1)]
    for cut, dropout in cuts[:tries]:
        knobs = {"dropout": dropout, "eval_interval": min(cut, 4)}
        # The last checkpoint of this one is that of its last step.
        run(tree, partial(spy, whole), out_dir="uncut", **knobs)
        run(tree, out_dir="cut", max_iters=cut, **knobs)
        code, text = run(tree, partial(spy, rest), out_dir="cut", init_from="resume", **knobs)
        (batches, losses), (drawn, then) = spied(whole), spied(rest)
        again += drawn == batches[: len(drawn)]
        failure = last_line(text) if code else ""
        if then != losses[cut:]:
            failure = failure or "losses differ"
        if not same(load(tree / "uncut" / "ckpt.pt"), load(tree / "cut" / "ckpt.pt")):
            failure = failure or "the final state differs"
        report.count("", failure)
    report.note = f"{again} of {tries} drew the batches of the run's first steps once more"


def evaluating(report: Report, tries: int, tree: Path) -> None:
    run(tree, partial(spy, tree / "every4"))
    usual = spied(tree / "every4")
    for interval in (1, 2, 3, 5, 8)[:tries]:
        run(tree, partial(spy, tree / "other"), eval_interval=interval)
        report.count("", "" if spied(tree / "other") == usual else "other batches and losses")


# Kills and signals


def mark_saves() -> None:
    def marked(*a, save: Callable = torch.save, **k):
        print("[save begins]")
        save(*a, **k)
        print("[save ended]")

    torch.save = marked


def kills(report: Report, tries: int, tree: Path) -> None:
    """Each run is killed up to 10 times. Each time it is then asked for one more step, after which
    it ends by itself."""
    inside, steps, saved = 0, 0, tree / "out" / "ckpt.pt"
    for i in range(tries):
        victim = NanoRun(tree, mark_saves, **start_as(saved), **HEAVY, max_iters=10**6)
        time.sleep(random.Random(i).uniform(0, 3))
        victim.signal(signal.SIGKILL)
        text = victim.end().text
        done = steps_done(text) or steps
        inside += text.rfind("[save begins]") > text.rfind("[save ended]")
        begin = time.monotonic()
        restart = NanoRun(tree, **start_as(saved), **HEAVY, max_iters=0)
        restart.wait_for(lambda: steps_done(restart.text()))  # noqa: B023 - waited for at once
        recovery = time.monotonic() - begin
        code, text = restart.end()
        steps = 0 if code else steps_done(text) - 1
        recovery = None if code else recovery
        failure = last_line(text) if code else ""
        report.count("", failure, done - steps, recovery)
        if code or i % 10 == 9:
            shutil.rmtree(saved.parent)
            steps = 0
    lost = tries - report.passed
    report.note = f"{inside} kills inside a save; the one checkpoint was lost in {lost}"


def signals(report: Report, tries: int, tree: Path) -> None:
    codes, log = set(), tree / "log"
    for i in range(tries):
        number, step = (signal.SIGTERM, signal.SIGINT)[i % 2], random.Random(i).randrange(12, 48)
        argv = arguments(out_dir=f"out{i}", eval_interval=10, max_iters=10**6, n_embd=192)
        with log.open("w") as sink:
            process = subprocess.Popen(
                [sys.executable, "-u", "train.py", *argv],
                cwd=tree,
                stdout=sink,
                stderr=sink,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        end = time.monotonic() + 120
        while steps_done(log.read_text()) < step and time.monotonic() < end:
            time.sleep(0.002)
        process.send_signal(number)
        codes.add(f"{process.wait(120)} after {number.name}")
        lost = steps_done(log.read_text()) - load(tree / f"out{i}" / "ckpt.pt")["iter_num"]
        report.count("", "ended at once, without a save" if lost else "", lost)
    report.note = "exit code " + ", ".join(sorted(codes))


# The disk


def limit(size: int) -> None:
    """The first save may make no file longer than `size`, as on a full disk; later ones may."""

    def cut(*a, save: Callable = torch.save, **k):
        torch.save, hard = save, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            save(*a, **k)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    torch.save = cut


def full_disk(report: Report, tries: int, tree: Path) -> None:
    base, lost = trained(tree), 0
    content = base.read_bytes()
    for i in range(tries):
        base.write_bytes(content)
        size = len(content) * (i + 1) // (tries + 1)
        code, text = run(tree, partial(limit, size), out_dir="base", init_from="resume", n_embd=64)
        gone = load(base) is None
        lost += gone
        failure = f"the run ended: {last_line(text)}" if code else ""
        report.count("", failure, BASE * gone)
    report.note = f"the one checkpoint was lost in {lost}"


def bit_rot(report: Report, tries: int, tree: Path) -> None:
    path, tried, silent = trained(tree), Counter(), Counter()
    content, good = path.read_bytes(), load(path)
    for i in range(tries):
        kind = KINDS[i % len(KINDS)]
        path.write_bytes(damage(content, kind, random.Random(i)))
        state = load(path)
        wrong = state is not None and names(state) == names(good) and not same(state, good)
        tried[kind] += 1
        silent[kind] += wrong
        report.count(kind, Silent("loaded with other values") if wrong else "")
    shares = [f"{silent[kind]} of {number:,} {kind}" for kind, number in tried.items()]
    report.note = f"loaded with other values: {', '.join(shares)}"


def names(value: object) -> object:
    """Names and shapes, without values. If they are others, load_state_dict or AdamW would say
    so."""
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    return {key: names(v) for key, v in value.items()} if isinstance(value, dict) else None


# NaN, two writers, code in files, changed data


def poison(step: int, what: str) -> None:
    """The loss of this step, or only its gradient, is NaN."""
    cross_entropy, count = torch.nn.functional.cross_entropy, itertools.count()

    def poisoned(*a, **k):
        loss = cross_entropy(*a, **k)
        if torch.is_grad_enabled() and next(count) == step:
            if what == "loss":
                return loss * torch.nan
            loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss

    torch.nn.functional.cross_entropy = poisoned


def nan(report: Report, tries: int, tree: Path) -> None:
    ruined = Counter()
    for i in range(tries):
        what, always, step = (
            ("loss", "gradient")[i % 2],
            i % 4 < 2,
            random.Random(i).randrange(6, 30),
        )
        knobs = {"out_dir": f"out{i}", "always_save_checkpoint": always}
        code, text = run(tree, partial(poison, step, what), **knobs)
        weights = load(tree / f"out{i}" / "ckpt.pt")["model"].values()
        bad = not all(tensor.isfinite().all() for tensor in weights)
        ruined[always] += bad
        failure = "ckpt.pt has NaN" if bad else ""
        if code == 0:
            failure = "trained on to the end with NaN, exit code 0"
        if bad and "nan" not in text:
            failure = Silent(failure)
        report.count("", failure, step if bad else None)
    report.note = (
        f"ckpt.pt full of NaN in {ruined[True]} of {tries // 2}, with always_save_checkpoint=False "
        f"in {ruined[False]} of {tries // 2}; the log has loss nan"
    )


def two_writers(report: Report, tries: int, tree: Path) -> None:
    left, saved = Counter(), tree / "out" / "ckpt.pt"
    knobs = {"n_embd": 128, "eval_interval": 2, "eval_iters": 1}
    rates, states = (0.001, 0.002), []
    for rate in rates:
        run(tree, learning_rate=rate, **knobs)
        states.append(load(saved))
    for _ in range(tries):
        pair = [NanoRun(tree, learning_rate=rate, **knobs) for rate in rates]
        codes, state = [child.end().code for child in pair], load(saved)
        whose = "of one of them" if any(same(state, s) for s in states) else "of neither"
        left["not loadable" if state is None else whose] += 1
        report.count("", "" if any(codes) else Silent("both ran to the end, exit code 0"))
    report.note = "ckpt.pt then: " + ", ".join(f"{number} {what}" for what, number in left.items())


class Code:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sentinel),)


def code_in_files(report: Report, tries: int, tree: Path) -> None:
    saved, config, ran = tree / "out" / "ckpt.pt", tree / "config.py", []
    saved.parent.mkdir()
    for kind in ("zip", "legacy", "pickle", "a config file", "meta.pkl")[:tries]:
        sentinel = tree / f"ran {kind}"
        config.write_text(f"os.mkdir({str(sentinel)!r})" if kind == "a config file" else "")
        if kind in ("zip", "legacy"):
            model = {"model": Code(sentinel)}
            torch.save(model, saved, _use_new_zipfile_serialization=kind == "zip")
        elif kind in ("pickle", "meta.pkl"):
            path = saved if kind == "pickle" else tree / "data" / "words" / kind
            path.write_bytes(pickle.dumps(Code(sentinel)))
        start = "resume" if kind in ("zip", "legacy", "pickle") else "scratch"
        run(tree, config=config.name, init_from=start, max_iters=1)
        ran += [kind] * sentinel.exists()
        report.count("", f"code in {kind} ran" if sentinel.exists() else "")
    report.note = f"it ran from {' and '.join(ran)}; torch.load refuses it in ckpt.pt"


def scattered(ids: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(ids)) % 1000 == 500, 1000, ids).astype(ids.dtype)


CHANGES = {  # what becomes of the ids in train.bin
    "other tokens": lambda ids: ids[::-1],
    "half": lambda ids: ids[: len(ids) // 2],
    "empty": lambda ids: ids[:0],
    "shorter than a block": lambda ids: ids[:20],
    "an odd byte": lambda ids: np.append(ids.view(np.uint8), np.uint8(0)),
    "32-bit ids": lambda ids: ids.astype(np.uint32),
    "each id too large": lambda ids: ids + np.uint16(1000),
    "each 1,000th id too large": lambda ids: scattered(ids),
}
CASES = [*CHANGES, "other tokens, in flight", "half, in flight"]


def change(kind: str, path: Path) -> None:
    """Puts another file in the place of train.bin."""
    ids = np.fromfile(path, dtype=np.uint16)
    new = CHANGES[kind.removesuffix(", in flight")](ids)
    path.with_name("new").write_bytes(new.tobytes())
    os.replace(path.with_name("new"), path)


def data(report: Report, tries: int, tree: Path) -> None:
    path, noticed = tree / "data" / "words" / "train.bin", []
    trained(tree)
    good = path.read_bytes()
    knobs = dict(out_dir="base", init_from="resume", n_embd=64, eval_interval=500)
    for kind in CASES[:tries]:
        in_flight = kind.endswith("in flight")
        path.write_bytes(good)
        if not in_flight:
            change(kind, path)
        child = NanoRun(tree, **knobs, max_iters=1000 if in_flight else BASE + 20)
        if in_flight and child.wait_for(lambda: steps_done(child.text())):  # noqa: B023 - at once
            change(kind, path)
        code = child.end().code
        noticed += [kind] * (code != 0)
        report.count(kind, "" if code else Silent("trained on"))
    report.note = f"an error for: {', '.join(noticed)}"


ROWS = (
    ("resume is exact: losses and final state", 20, resume),
    ("evaluating more or less often changes no training loss", 5, evaluating),
    ("kill -9 at any moment, 42 MB saved each 2 steps", 100, kills),
    ("SIGTERM or SIGINT in training: saved, 0 steps lost", 20, signals),
    ("a full disk in a save", 20, full_disk),
    ("bit rot of a checkpoint", 1900, bit_rot),
    ("NaN in a loss or a gradient: it stops, nothing of it is saved", 20, nan),
    ("two runs write to one folder: one is refused", 10, two_writers),
    ("code in a checkpoint, a config or a data set does not run", 5, code_in_files),
    ("train.bin changed before a resume or while a run reads it: noticed", 10, data),
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
