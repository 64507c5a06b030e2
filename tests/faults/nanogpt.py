"""The same faults against nanoGPT's train.py, to stand beside ours; no part of `make faults`.

PYTHONPATH=.:tests python -m faults.nanogpt PATH_TO_NANOGPT [words of a name ...]

Its programs run unmodified, in a copy of their folder made for each row, with a small data set in their format. A run
is a child forked from a server that has imported torch; train.py is the child's main program (runpy), its knobs are
its own --key=value. What a fault needs inside the process is a patch of torch made before train.py starts. The signals
are sent to an ordinary `python train.py`. A row passes where ours would. "Silently wrong" is a run that ended with
exit code 0, or a checkpoint that loaded, with something wrong in it and no line that said so.
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
from .harness import SERVER, Child, Report
from .rot import KINDS, damage, same

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "gradient_accumulation_steps": 1,
         "max_iters": 40, "warmup_iters": 2, "lr_decay_iters": 100, "learning_rate": 0.001, "eval_interval": 4,
         "eval_iters": 2, "log_interval": 1, "dataset": "words", "device": "cpu", "dtype": "float32",
         "compile": False, "always_save_checkpoint": True, "out_dir": "out"}
HEAVY = {"n_embd": 384, "batch_size": 2, "block_size": 16, "eval_interval": 2, "eval_iters": 1}  # saves 42 MB
USED = ("model", "optimizer", "model_args", "iter_num", "best_val_loss")  # all that train.py reads of a checkpoint
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


def measured(source: Path, row: tuple[str, int, Callable[[int, Path], Report]]) -> dict:
    begin, (name, tries, function) = time.monotonic(), row
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "nanoGPT")
        shutil.copytree(source, tree, ignore=shutil.ignore_patterns(".git", "assets"))
        prepare(tree / "data" / "words")
        report = function(tries, tree).row()
    print(f"{name}: {report['passed']} of {report['tries']}, {time.monotonic() - begin:.0f} s", flush=True)
    return report | {"name": name}


def prepare(folder: Path) -> None:
    """Made-up prose, a token per character, in the files that its prepare.py for Shakespeare writes."""
    pick = random.Random(0)
    text = " ".join(pick.choice("the cat sat on a mat and saw the rat run to its hole".split()) for _ in range(5000))
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    folder.mkdir(parents=True)
    ids[:len(ids) * 9 // 10].tofile(folder / "train.bin")
    ids[len(ids) * 9 // 10:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def arguments(**knobs: object) -> list[str]:
    return [f"--{key}={value}" for key, value in (SMALL | knobs).items()]


def _child(tree: Path, argv: list[str], output: Path, before: Callable[[], None] | None) -> None:
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


class Run(Child):
    """train.py with these knobs in `tree`, in a process of its own; `before` is called in it first."""

    def __init__(self, tree: Path, before: Callable[[], None] | None = None, config: str = "", **knobs: object):
        self.output = tree / f"{time.monotonic_ns()}.log"
        argv = [config] * bool(config) + arguments(**knobs)
        self.process = SERVER.Process(target=_child, args=(tree, argv, self.output, before))
        self.process.start()


def run(tree: Path, before: Callable[[], None] | None = None, **knobs: object) -> tuple[int, str]:
    """A run from start to end: (exit code, all it printed)."""
    child = Run(tree, before, **knobs)
    return child.wait(), child.text()


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
    """What train.py reads of a checkpoint, loaded as train.py and sample.py load it; None if that is an error."""
    try:
        state = torch.load(path, map_location="cpu")
        return {key: state[key] for key in USED}
    except Exception:  # any kind of "no" is the same here
        return None


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

    torch.randint = noted(torch.randint, lambda places: places.tolist())
    torch.nn.functional.cross_entropy = noted(torch.nn.functional.cross_entropy, lambda loss: loss.item().hex())


def spied(path: Path) -> tuple[list[str], list[str]]:
    """(the batches, the losses) of a run."""
    lines = path.read_text().splitlines()
    return [x for x in lines if x.startswith("randint")], [x for x in lines if x.startswith("cross_entropy")]


def resume(tries: int, tree: Path) -> Report:
    report, again = Report(), 0
    cuts = [(cut, dropout) for cut in (2, *range(4, 40, 4)) for dropout in (0.0, 0.1)]
    for cut, dropout in cuts[:tries]:
        whole, rest, knobs = tree / "whole", tree / "rest", {"dropout": dropout, "eval_interval": min(cut, 4)}
        for book in (whole, rest):
            book.unlink(missing_ok=True)
        run(tree, partial(spy, whole), out_dir="uncut", **knobs)  # its last checkpoint is that of its last step
        run(tree, out_dir="cut", max_iters=cut, **knobs)
        code, text = run(tree, partial(spy, rest), out_dir="cut", init_from="resume", **knobs)
        (batches, losses), (drawn, then) = spied(whole), spied(rest)
        again += drawn == batches[:len(drawn)]
        exact = same(load(tree / "uncut" / "ckpt.pt"), load(tree / "cut" / "ckpt.pt"))
        report.count(last_line(text) if code else "losses differ" if then != losses[cut:] else
                     "" if exact else "the final state differs")
    report.note = f"{again} of {tries} drew the batches of the run's first steps once more"
    return report


def evaluating(tries: int, tree: Path) -> Report:
    report = Report()
    run(tree, partial(spy, tree / "every4"))
    for interval in (1, 2, 3, 5, 8)[:tries]:
        run(tree, partial(spy, tree / "other"), eval_interval=interval)
        report.count("" if spied(tree / "other") == spied(tree / "every4") else "other batches and losses")
        (tree / "other").unlink()
    return report


def mark_saves() -> None:
    def marked(*a, save: Callable = torch.save, **k):
        print("[save begins]")
        save(*a, **k)
        print("[save ended]")

    torch.save = marked


def kills(tries: int, tree: Path) -> Report:
    """Each run is killed up to 10 times, and each time then asked for one more step, after which it ends by itself."""
    report, inside, steps, saved = Report(), 0, 0, tree / "out" / "ckpt.pt"
    for i in range(tries):
        victim = Run(tree, mark_saves, init_from="resume" if saved.exists() else "scratch", **HEAVY, max_iters=10**6)
        time.sleep(random.Random(i).uniform(0, 3))
        victim.signal(signal.SIGKILL)
        victim.wait()
        done = steps_done(victim.text()) or steps
        inside += victim.text().rfind("[save begins]") > victim.text().rfind("[save ended]")
        begin = time.monotonic()
        restart = Run(tree, init_from="resume" if saved.exists() else "scratch", **HEAVY, max_iters=0)
        restart.wait_for(lambda: steps_done(restart.text()))  # noqa: B023 - used up before the loop goes on
        recovery, broken = time.monotonic() - begin, restart.wait() != 0
        steps = 0 if broken else steps_done(restart.text()) - 1
        report.count(last_line(restart.text()) if broken else "", lost=done - steps,
                     recovery=None if broken else recovery)
        if broken or i % 10 == 9:
            shutil.rmtree(saved.parent)
            steps = 0
    report.note = f"{inside} kills inside a save; the one checkpoint was lost in {tries - report.passed}"
    return report


def signals(tries: int, tree: Path) -> Report:
    report, codes, log = Report(), set(), tree / "log"
    for i in range(tries):
        number, step = (signal.SIGTERM, signal.SIGINT)[i % 2], random.Random(i).randrange(12, 48)
        argv = arguments(out_dir=f"out{i}", eval_interval=10, max_iters=10**6, n_embd=192)
        with log.open("w") as sink:
            process = subprocess.Popen([sys.executable, "-u", "train.py", *argv], cwd=tree, stdout=sink, stderr=sink,
                                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        end = time.monotonic() + 120
        while steps_done(log.read_text()) < step and time.monotonic() < end:
            time.sleep(0.002)
        process.send_signal(number)
        codes.add(f"{process.wait(120)} after {number.name}")
        lost = steps_done(log.read_text()) - load(tree / f"out{i}" / "ckpt.pt")["iter_num"]
        report.count("ended at once, without a save" if lost else "", lost=lost)
    report.note = "exit code " + ", ".join(sorted(codes))
    return report


def limit(size: int) -> None:
    """The first save may make no file longer than `size`, as on a disk that is full; later ones may."""
    def cut(*a, save: Callable = torch.save, **k):
        torch.save, hard = save, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            save(*a, **k)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    torch.save = cut


def full_disk(tries: int, tree: Path) -> Report:
    report, base, lost = Report(), trained(tree), 0
    content = base.read_bytes()
    for i in range(tries):
        base.write_bytes(content)
        size = len(content) * (i + 1) // (tries + 1)
        code, text = run(tree, partial(limit, size), out_dir="base", init_from="resume", n_embd=64)
        lost += load(base) is None
        report.count("the run ended: " + last_line(text) if code else "", lost=BASE if load(base) is None else 0)
    report.note = f"the one checkpoint was lost in {lost}"
    return report


def bit_rot(tries: int, tree: Path) -> Report:
    report, path, silent = Report(), trained(tree), Counter()
    content, good = path.read_bytes(), load(path)
    for i in range(tries):
        kind = KINDS[i % len(KINDS)]
        path.write_bytes(damage(content, kind, random.Random(i)))
        state = load(path)
        wrong = state is not None and names(state) == names(good) and not same(state, good)
        silent[kind] += wrong
        report.count(f"{kind}: loaded with other values" if wrong else "", silent=wrong)
    of = Counter(KINDS[i % len(KINDS)] for i in range(tries))
    report.note = "loaded with other values: " + ", ".join(f"{silent[k]} of {n:,} {k}" for k, n in of.items())
    return report


def names(value: object) -> object:
    """Names and shapes, without values: where they are others, load_state_dict or AdamW would say so."""
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    return {key: names(v) for key, v in value.items()} if isinstance(value, dict) else None


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


def nan(tries: int, tree: Path) -> Report:
    report, ruined = Report(), Counter()
    for i in range(tries):
        what, always, step = ("loss", "gradient")[i % 2], i % 4 < 2, random.Random(i).randrange(6, 30)
        code, text = run(tree, partial(poison, step, what), out_dir=f"out{i}", always_save_checkpoint=always)
        weights = load(tree / f"out{i}" / "ckpt.pt")["model"].values()
        bad = not all(tensor.isfinite().all() for tensor in weights)
        ruined[always] += bad
        report.count("trained on to the end with NaN, exit code 0" if code == 0 else "ckpt.pt has NaN" if bad else "",
                     silent=bad and "nan" not in text, lost=step if bad else None)
    report.note = (f"ckpt.pt full of NaN in {ruined[True]} of {tries // 2}, with always_save_checkpoint=False in "
                   f"{ruined[False]} of {tries // 2}; the log has loss nan")
    return report


def two_writers(tries: int, tree: Path) -> Report:
    report, left, knobs = Report(), Counter(), {"n_embd": 128, "eval_interval": 2, "eval_iters": 1}
    rates, states = (0.001, 0.002), []
    for rate in rates:
        run(tree, learning_rate=rate, **knobs)
        states.append(load(tree / "out" / "ckpt.pt"))
    for _ in range(tries):
        pair = [Run(tree, learning_rate=rate, **knobs) for rate in rates]
        codes = [child.wait() for child in pair]
        state = load(tree / "out" / "ckpt.pt")
        left["not loadable" if state is None else "of one of them" if any(same(state, s) for s in states) else
             "of neither"] += 1
        report.count("both ran to the end, exit code 0" if codes == [0, 0] else "", silent=codes == [0, 0])
    report.note = "ckpt.pt then: " + ", ".join(f"{number} {what}" for what, number in left.items())
    return report


class Code:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sentinel),)


def code_in_files(tries: int, tree: Path) -> Report:
    report, saved, config, ran = Report(), tree / "out" / "ckpt.pt", tree / "config.py", []
    saved.parent.mkdir()
    for kind in ("zip", "legacy", "pickle", "a config file", "meta.pkl")[:tries]:
        sentinel = tree / f"ran {kind}"
        config.write_text(f"os.mkdir({str(sentinel)!r})" if kind == "a config file" else "")
        if kind in ("zip", "legacy"):
            torch.save({"model": Code(sentinel)}, saved, _use_new_zipfile_serialization=kind == "zip")
        elif kind in ("pickle", "meta.pkl"):
            path = saved if kind == "pickle" else tree / "data" / "words" / kind
            path.write_bytes(pickle.dumps(Code(sentinel)))
        resumes = kind in ("zip", "legacy", "pickle")
        Run(tree, config=config.name, init_from="resume" if resumes else "scratch", max_iters=1).wait()
        ran += [kind] * sentinel.exists()
        report.count(f"code in {kind} ran" if sentinel.exists() else "")
    report.note = f"it ran from {' and '.join(ran)}; torch.load refuses it in ckpt.pt" if ran else ""
    return report


def change(kind: str, path: Path) -> None:
    ids = np.fromfile(path, dtype=np.uint16)
    scattered = np.where(np.arange(len(ids)) % 1000 == 500, 1000, ids).astype(np.uint16)
    new = {"other tokens": ids[::-1], "half": ids[:len(ids) // 2], "empty": ids[:0], "shorter than a block": ids[:20],
           "an odd byte": ids, "32-bit ids": ids.astype(np.uint32), "each id too large": ids + 1000,
           "each 1,000th id too large": scattered}[kind.removesuffix(", in flight")]
    path.with_name("new").write_bytes(new.tobytes() + b"\0" * (kind == "an odd byte"))
    os.replace(path.with_name("new"), path)


def data(tries: int, tree: Path) -> Report:
    report, path, noticed = Report(), tree / "data" / "words" / "train.bin", []
    trained(tree)
    good = path.read_bytes()
    kinds = ("other tokens", "half", "empty", "shorter than a block", "an odd byte", "32-bit ids", "each id too large",
             "each 1,000th id too large", "other tokens, in flight", "half, in flight")
    for kind in kinds[:tries]:
        path.write_bytes(good)
        if "in flight" not in kind:
            change(kind, path)
        child = Run(tree, out_dir="base", init_from="resume", n_embd=64, eval_interval=500,
                    max_iters=1000 if "in flight" in kind else BASE + 20)
        if "in flight" in kind and child.wait_for(lambda: steps_done(child.text())):  # noqa: B023 - used up here
            change(kind, path)
        code = child.wait()
        noticed += [kind] * (code != 0)
        report.count("" if code else f"{kind}: trained on", silent=code == 0)
    report.note = f"an error for: {', '.join(noticed)}"
    return report


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
    ("train.bin changed before a resume or while a run reads it: noticed", 10, data))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
