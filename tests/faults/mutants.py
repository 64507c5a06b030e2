"""Every fault must be able to fail:

    PYTHONPATH=.:tests python -m faults.mutants [words of a mutant ...]

Each mutant is a copy of the program with one protection taken out. The fault that is named beside
it must notice. What is printed is the table of who noticed what. The exit code is 1 if a mutant
survived.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

from .harness import ROOT

# A mutant is:  what is taken out | words in the name of the fault | tries, if not its few
# then, once or more: the file, and the lines that go (-) and come (+), without their indentation.
MUTANTS = """
a file is not synced before it is renamed | order of write
data/files.py
- os.fsync(file.fileno())
+ pass

the folder is not synced | order of write
data/files.py
- os.fsync(handle)
+ pass

a checkpoint is written under its final name | kill -9 before, in and after | 40
data/files.py
- temporary = path.with_name(f".{path.name}.tmp")
+ temporary = path

the old checkpoint is removed before the new one is there | kill -9 before, in and after | 60
data/files.py
- os.replace(temporary, path)
+ [old.unlink() for old in path.parent.glob("ckpt_*")]
+ os.replace(temporary, path)

the CRC is not looked at | bit rot of a checkpoint | 95
weights/checkpoint.py
- broken = archive.testzip()
+ broken = None

a damaged checkpoint ends the search | newest j of k | 14
weights/checkpoint.py
- if isinstance(error, OSError) and error.errno not in (errno.EIO, errno.ELOOP):
+ if True:

the step in the name is not compared | another's name | 5
weights/checkpoint.py
- if step_in_name(path) not in (None, state["step"]):
+ if False:

the lock is not asked | two writers | 2
weights/lock.py
- fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
+ pass

the lock is a file that must not exist | killed writer | 1
weights/lock.py
- flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
+ if self.path.exists():
+     raise ValueError("in use")
+ flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)

loss and gradient are not checked | nan or inf | 10
train.py
- check_finite(loss, norm, scaler, run.step + 1)
+ pass

weights are saved unchecked | nan or inf | 40
weights/checkpoint.py
- bad = first_non_finite(state)
- if bad:
-     raise FloatingPointError(f"{bad} holds NaN or Inf after step {state['step']}: not saved")
+ pass

the loader draws from the global generator | stopped at a random step | 6
data/loader.py
- starts = train_starts(n_tokens, block_size, seed, numbers)
+ starts = np.random.randint(0, n_tokens - block_size, len(numbers))

the loader draws from the generator that others draw from | other intervals | 2
data/loader.py
- starts = train_starts(n_tokens, block_size, seed, numbers)
+ starts = np.random.randint(0, n_tokens - block_size, len(numbers))

dropout is not seeded by the step | stopped at a random step | 12
train.py
- torch.manual_seed(config.seed * 1_000_003 + run.step + (ranks.rank << 43))
+ pass

the optimizer's state is not restored | stopped at a random step | 8
run/setup.py
- optimizers.load_state_dict(spread_optimizer_state(saved["optimizer"], model, ranks))
+ pass

a signal is heard only where a save is due | in a step | 3
train.py
- last = interrupts.agreed() or at_end
+ last = (interrupts.agreed() and run.step % 4 == 0) or at_end

a long step is not left | many micro-batches | 1
train.py
- if i and interrupts is not None and interrupts.agreed():
+ if False:

a signal in an evaluation counts as one evaluated | in an evaluation | 3
run/evaluate.py
- return None
+ return 0.0

a second signal is not heard | second signal
run/signals.py
- raise SystemExit(128 + number)
+ pass

nohup is not respected | nohup | 1
config/command.py
- caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
+ caught = numbers

a stopped preparation leaves its folder | in data/prepare.py | 6
data/files.py
- shutil.rmtree(folder)
+ pass

threads add to a gradient in any order | compiled on two threads | 2
run/setup.py
- add_in_fixed_order(bool(config.compile))
+ pass

a full disk at a resume ends the run | metrics.jsonl at a resume | 1
run/log.py
- warn(f"metrics.jsonl failed, it is written again with the next record: {error}")
+ raise

a file that was not written anew is added to | metrics.jsonl at a resume | 1
run/log.py
- if not (self.file_is_ours and is_own_file(path)):
+ if not is_own_file(path):

what was deleted is not made again | deleted files | 8
run/folder.py
- _restore_what_was_lost(run)
+ pass

a save that fails ends the training | full disk in a save | 2
run/folder.py
- if required:
+ if True:

a failed save leaves its temporary file | full disk in a save | 2
data/files.py
- except BaseException:
-     temporary.unlink(missing_ok=True)
+ except BaseException:
+     pass

half a record stays | metrics.jsonl | 4
run/log.py
- file.truncate(before)
+ pass

tokens are not compared with their checksum | data, before | 150
data/loader.py
- if zlib.crc32(part) != checksums[i]:
+ if False:

meta.json is not compared with its checksum | data, before | 400
data/loader.py
- if meta.get("checksum") != found:
+ if False:

nobody looks whether the data change | data change while | 4
data/loader.py
- for path, before in self.opened.items():
+ for path, before in ():

the norms before a spike are not restored | with skip_spikes=6 | 4
run/setup.py
- run.step, run.grad_norms, run.past = saved["step"], saved["grad_norms"], saved["folder"]
+ run.step, run.grad_norms, run.past = saved["step"], [], saved["folder"]

a preset is executed | hostile | 999
config/preset.py
- values = {}
+ values = exec(compile(syntax_tree(path), "preset", "exec"), {}) or {}

pickles are not looked into, and may hold anything | hostile | 999
weights/checkpoint.py
- unexpected = unexpected_global(archive)
+ unexpected = None
weights/checkpoint.py
- state = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
+ state = torch.load(file, map_location="cpu", weights_only=False, mmap=False)

links are followed out of a text folder | hostile | 999
data/corpus.py
- if not path.resolve().is_relative_to(root):
+ if False:

deep presets are not expected | fuzz of a preset | 2000
config/preset.py
- except (RecursionError, MemoryError) as error:  # so says Python's parser
+ except ZeroDivisionError as error:

a field of meta.json is not tested | fuzz of meta.json | 400
data/loader.py
- if not good(meta.get(name)):
+ if False:

what a checkpoint unfolds to is not counted | fuzz of a checkpoint | 400
weights/checkpoint.py
- for name, kind in FIELDS.items():
+ for name, kind in ():

ranks ask for the dead | which torchrun starts | 1
run/ranks.py
- store=meeting_place(ranks),
+ store=next(dist.rendezvous("env://", timeout=PATIENCE))[0],

DDP sums the first gradient of a process in another order | which nobody starts again | 1
train.py
- nothing_can_fail = alone and run.config.device == "cpu" and not compiles
+ nothing_can_fail = True

a lost rank is a traceback | data of one rank | 4
run/ranks.py
- if not lost:
+ if True:

a descriptor leaks with each save | 10,000 steps
data/files.py
- finally:
-     os.close(handle)
+ finally:
+     pass
"""


class Mutant(NamedTuple):
    what: str
    words: str  # in the name of the fault
    options: list[str]  # of the fault: its few tries, or so many
    edits: list[tuple[str, list[str], list[str]]]  # (file, lines that go, lines that come)


def every_mutant() -> list[Mutant]:
    return [read_mutant(text) for text in MUTANTS.strip().split("\n\n")]


def read_mutant(text: str) -> Mutant:
    first, *lines = text.splitlines()
    what, words, *tries = first.split(" | ")
    edits: list[tuple[str, list[str], list[str]]] = []
    for line in lines:
        if line[:2] in ("- ", "+ "):
            edits[-1][1 if line[0] == "-" else 2].append(line[2:])
        else:
            edits.append((line, [], []))
    return Mutant(what, words, [f"tries={tries[0]}" if tries else "few=true"], edits)


def edited(text: str, old: list[str], new: list[str]) -> str:
    """The text with some of its lines replaced. ValueError unless they are there exactly once."""
    pattern = r"\n( *)" + r"\n\1".join(map(re.escape, old)) + r"(?=\n)"
    found = list(re.finditer(pattern, text))
    if len(found) != 1:
        raise ValueError(f"{old} is there {len(found)} times")
    lines = indent("\n".join(new), found[0][1])
    return f"{text[: found[0].start()]}\n{lines}{text[found[0].end() :]}"


def main(argv: list[str]) -> int:
    chosen = [mutant for mutant in every_mutant() if all(word in mutant.what for word in argv)]
    print("| taken out | the fault | passed |\n| --- | --- | --- |", flush=True)
    found = [is_found(mutant) for mutant in chosen]
    return 0 if chosen and all(found) else 1


def is_found(mutant: Mutant) -> bool:
    """Whether the fault fails on the mutant. Prints the row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
        for name in filter(lambda name: (ROOT / name).is_file(), names):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for name, old, new in mutant.edits:
            text = (copy / name).read_text(encoding="utf-8")
            (copy / name).write_text(edited(text, old, new), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "faults", *mutant.options, *mutant.words.split()],
            cwd=copy,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests'}"},
            capture_output=True,
        )
    verdicts = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    result = f"SURVIVED {done.stderr[-300:]}"
    if done.returncode == 1 and verdicts:
        result = verdicts[0].split(": ")[-1]
    print(f"| {mutant.what} | {mutant.words} | {result} |", flush=True)
    return not result.startswith("SURVIVED")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
