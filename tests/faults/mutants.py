"""Every fault must be able to fail:  PYTHONPATH=.:tests python -m faults.mutants [words of a mutant ...]

Each mutant is the program with one of its protections taken out, in a copy. The fault named beside it must find that:
what is printed is the table of who found what, and the exit code is 1 if a mutant survived.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .harness import ROOT


@dataclass(frozen=True)
class Mutant:
    """`edits` are (file, old, new); the fault whose name has all of `words` makes so many tries, or its few."""

    what: str
    words: str
    edits: tuple[tuple[str, str, str], ...]
    tries: int = 0


def mutant(what: str, words: str, file: str, old: str, new: str, tries: int = 0) -> Mutant:
    return Mutant(what, words, ((file, old, new),), tries)


MUTANTS = (
    mutant("a file is not synced before it is renamed", "order of write", "checkpoint.py",
           "            os.fsync(file.fileno())\n", ""),
    mutant("the folder is not synced", "order of write", "checkpoint.py", "            os.fsync(handle)\n",
           "            pass\n"),
    mutant("a checkpoint is written under its final name", "kill -9 before, in and after", "checkpoint.py",
           'path.with_name(f".{path.name}.tmp")', "path", tries=40),
    mutant("the old checkpoint is removed before the new one is there", "kill -9 before, in and after", "checkpoint.py",
           "        os.replace(temporary, path)\n", "        [p.unlink() for _, p in all_in(path.parent)]\n"
           "        os.replace(temporary, path)\n", tries=60),
    mutant("the CRC is not looked at", "bit rot of a checkpoint", "checkpoint.py", "archive.testzip()", "None"),
    mutant("a damaged checkpoint ends the search", "newest j of k", "checkpoint.py",
           "            problems.append(str(error))\n", "            raise\n"),
    mutant("the step in the name is not compared", "another's name", "checkpoint.py",
           'if step_of(path) not in (None, state["step"])', "if False"),
    mutant("the lock is not asked", "two writers", "lock.py",
           "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    mutant("the lock is a file that must not exist", "killed writer", "lock.py",
           "        handle = os.open(", "        if self.path.exists():\n            raise ValueError('in use')\n"
           "        handle = os.open("),
    mutant("loss and gradient are not checked", "nan or inf", "train.py", "    check_finite(run, loss, norm)\n", "",
           tries=10),
    mutant("weights are saved unchecked", "nan or inf", "checkpoint.py",
           "    if bad:\n        raise Floating", "    if False:\n        raise Floating", tries=40),
    mutant("the loader draws from the global generator", "stopped at a random step", "data/loader.py",
           "    starts = train_starts(len(dataset.train), block_size, batch_size, seed, step)\n",
           "    starts = np.random.randint(0, len(dataset.train) - block_size, batch_size)\n"),
    mutant("the loader draws from the generator that others draw from", "other intervals", "data/loader.py",
           "    starts = train_starts(len(dataset.train), block_size, batch_size, seed, step)\n",
           "    starts = np.random.randint(0, len(dataset.train) - block_size, batch_size)\n"),
    mutant("dropout is not seeded by the step", "stopped at a random step", "train.py",
           "    torch.manual_seed(config.seed * 1_000_003 + step + (run.world.rank << 43))\n", "", tries=12),
    mutant("the optimizer's state is not restored", "stopped at a random step", "run.py",
           '        optimizers.load_state_dict(restore(saved, model) if "shards" in saved else\n'
           '                                   like_parameters(saved["optimizer"], model, world))\n', "", tries=8),
    mutant("a signal is heard only where a save is due", "in a step", "train.py",
           "last = interrupts.agreed() or run.step >= config.max_iters",
           "last = interrupts.agreed() and run.step % 4 == 0 or run.step >= config.max_iters", tries=3),
    mutant("a signal in an evaluation counts as one evaluated", "in an evaluation", "evaluate.py",
           "            return None\n        some", "            return 0.0\n        some", tries=3),
    mutant("a second signal is not heard", "second signal", "train.py", "            raise SystemExit(128 + number)\n",
           "            pass\n"),
    mutant("nohup is not respected", "nohup", "config/schema.py", " if signal.getsignal(n) is not signal.SIG_IGN", ""),
    mutant("a stopped preparation leaves its folder", "in data/prepare.py", "data/prepare.py",
           "            shutil.rmtree(folder)\n", "            pass\n", tries=6),
    mutant("a save that fails ends the training", "full disk in a save", "train.py",
           '            warn(f"{reason}; training goes on")\n', "            raise\n"),
    mutant("a failed save leaves its temporary file", "full disk in a save", "checkpoint.py",
           "        temporary.unlink(missing_ok=True)\n", ""),
    mutant("half a record stays", "metrics.jsonl", "metrics.py", "file.truncate(before)", "pass", tries=4),
    mutant("tokens are not compared with their checksum", "data, before", "data/loader.py",
           "zlib.crc32(part) != checksums[i]", "False"),
    mutant("meta.json is not compared with its checksum", "data, before", "data/loader.py",
           'meta.get("checksum") != found', "False", tries=400),
    mutant("nobody looks whether the data change", "data change while", "data/loader.py",
           "        for path, before in self.opened.items():\n", "        for path, before in ():\n"),
    mutant("the norms before a spike are not restored", "with skip_spikes=6", "run.py", ', saved["grad_norms"]', ", []",
           tries=4),
    mutant("a preset is executed", "hostile", "config/schema.py", "    values = {}\n    for line in tree.body:",
           '    exec(compile(tree, "preset", "exec"), {})\n    values = {}\n    for line in tree.body:', tries=308),
    Mutant("pickles are not looked into, and may hold anything", "hostile", (
        ("checkpoint.py", "broken or foreign_global(archive)", "broken"),
        ("checkpoint.py", "weights_only=True", "weights_only=False")), tries=308),
    mutant("links are followed out of a text folder", "hostile", "data/corpus.py",
           " if path.resolve().is_relative_to(folder.resolve())]", "]", tries=308),
    mutant("deep presets are not expected", "fuzz of a preset", "config/schema.py",
           "except (RecursionError, MemoryError)", "except ZeroDivisionError", tries=2000),
    mutant("a field of meta.json is not tested", "fuzz of meta.json", "data/loader.py",
           "        if not good(meta.get(field)):", "        if False:", tries=400),
    mutant("what a checkpoint unfolds to is not counted", "fuzz of a checkpoint", "checkpoint.py",
           "    for name, kind in FIELDS.items():\n", "    for name, kind in ():\n", tries=400),
    mutant("ranks ask for the dead", "which torchrun starts", "world.py", "store=meeting_place(world)",
           'store=next(dist.rendezvous("env://", timeout=PATIENCE))[0]', tries=1),
    mutant("a lost rank is a traceback", "data of one rank", "world.py", "        if not lost:\n", "        if True:\n",
           tries=4),
    mutant("a descriptor leaks with each save", "10,000 steps", "checkpoint.py", "            os.close(handle)\n",
           "            pass\n"),
)


def main(argv: list[str]) -> int:
    chosen = [m for m in MUTANTS if all(word in m.what for word in argv)]
    print("| taken out | the fault | passed |\n| --- | --- | --- |", flush=True)
    found = [(one, found_by(one)) for one in chosen]
    return 0 if chosen and all(words for _, words in found) else 1


def found_by(one: Mutant) -> bool:
    """Whether the fault goes red on the mutant; it prints its row."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in files.splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for name, old, new in one.edits:
            text = (copy / name).read_text(encoding="utf-8")
            if text.count(old) != 1:
                raise ValueError(f"{one.what}: {old!r} is {text.count(old)} times in {name}")
            (copy / name).write_text(text.replace(old, new), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests'}"}
        options = [f"tries={one.tries}"] if one.tries else ["few=true"]
        done = subprocess.run([sys.executable, "-m", "faults", *options, *one.words.split()], cwd=copy, text=True,
                              env=environment, capture_output=True)
    red = done.returncode == 1 and "FAILED" in done.stdout
    result = next((line.split(": ")[-1] for line in done.stdout.splitlines() if line.startswith("FAILED ")), "SURVIVED")
    print(f"| {one.what} | {one.words} | {result if red else f'SURVIVED {done.stderr[-300:]}'} |", flush=True)
    return red


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
