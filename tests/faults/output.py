"""What becomes of a program's output must not become of its work.

Each program is started as a user does it, and its output is closed, full, read by nobody, or cannot
hold the text.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from conftest import ROOT

from .harness import Report, command, fault, train_child

TEXT = "\u4e2d\u6587, \xe9t\xe9 and a line.\n" * 200
PROGRAMS = (  # words, the work that is there afterwards, whether something is printed
    ("train.py --help", None),
    ("sample.py --help", None),
    ("data/prepare.py --help", None),
    ("-m lab.bench --help", None),
    ("-m lab.compare --list", None),
    ("-m lab.watch --help", None),
    ("-m exchange.hf --help", None),
    ("-m run.sharded --help", None),
    ("data/prepare.py TEXT tokenizer=byte", "data/text/meta.json"),
    ("train.py RUN", "new/ckpt_00000012.pt"),
    ("sample.py DONE max_new_tokens=9", None),
    ("sample.py DONE eval=val dataset=WORDS", None),
    ("-m exchange.hf export DONE exported", "exported/model.safetensors"),
    ("-m exchange.hf import exported out_dir=imported", "imported/ckpt_00000000.pt"),
    ("-m exchange.hf import nothing", None),  # an error
)
ENDS = ("closed", "nobody reads it", "full", "ascii", "cp1252")


@fault("any program, without its output", whole=len(PROGRAMS) * len(ENDS), few=0)
def without_output(report: Report, tries: int, folder: Path) -> None:
    """The exit code is that of the work, but 1 if the disk behind stdout is full."""
    train_child(folder / "done", max_iters=12)
    for end in ENDS:
        place = folder / end.replace(" ", "_")
        place.mkdir()
        (place / "t\xe9\u4e2dxt.txt").write_text(TEXT, encoding="utf-8")
        for words, work in islice(PROGRAMS, max(1, tries // len(ENDS))):
            code, errors = run_without(end, place, words_of(words, place))
            wanted = 2 if "nothing" in words else int(end == "full")
            failure = ""
            if "Traceback" in errors or "Exception ignored" in errors:
                failure = f"a traceback: {errors[-500:]}"
            elif end == "nobody reads it" and words == "train.py RUN":
                work, wanted = "new/config.json", 128 + signal.SIGPIPE  # it saves and ends
            if not failure and code != wanted:
                failure = f"exit code {code} instead of {wanted}: {errors[-500:]}"
            if not failure and work and not (place / work).exists():
                failure = f"{work} is not there: {errors[-500:]}"
            report.count(f"{words}, {end}", failure)


def words_of(text: str, place: Path) -> list[str]:
    """The words of one of PROGRAMS for a shell whose current folder is `place`."""
    own = {"TEXT": ["t\xe9\u4e2dxt.txt", "name=text"], "DONE": [str(place.parent / "done")]}
    own["RUN"] = command(Path("new"), max_iters=12, sample_tokens=5)
    program, *others = text.split()
    words = [program if program == "-m" else str(ROOT / program)]
    words += [part for word in others for part in own.get(word, [word])]
    dataset = next(word for word in own["RUN"] if word.startswith("dataset="))
    return [dataset if word == "dataset=WORDS" else word for word in words]


def run_without(end: str, place: Path, words: list[str]) -> tuple[int, str]:
    """(exit code, what came on stderr) of a program in the folder `place`, whose output ends so."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables["ROOTLLAMA_DATA"] = str(place / "data")
    if end in ("ascii", "cp1252"):
        variables["PYTHONIOENCODING"] = end
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=place,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=full if end == "full" else subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=(lambda: os.close(1)) if end == "closed" else None,
        )
    if end in ("closed", "nobody reads it"):
        process.stdout.close()
        process.stdout = None
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors.decode(errors="replace")


@fault("Ctrl-C while any program imports what it needs", whole=64, few=0)
def stopped_while_importing(report: Report, tries: int, folder: Path) -> None:
    """From the first line of the program on it must end at once, with 130 and without a word."""
    for (words, _), delay in zip(islice(cycle(PROGRAMS[:8]), tries), delays(tries), strict=True):
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", *words_of(words, folder / "x")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        lines = iter(process.stderr.readline, b"")
        # The program's own first line is config.command, whose last import is this one.
        begun = any(b" config.command" in line for line in lines)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        rest = b"".join(line for line in lines if not line.startswith(b"import time:"))
        code = process.wait(60)
        failure = "" if begun and code in (130, 0) and not rest else f"{code}: {rest[-500:]!r}"
        report.count(f"{words}, after {delay:.2f} s", failure)


def delays(tries: int) -> Iterator[float]:
    """Seconds, evenly spread over the time that the imports take."""
    return (0.02 + 2.5 * i / tries for i in range(tries))
