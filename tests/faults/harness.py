"""What the faults share.

Reading order: the register of faults and the count of their tries; runs in processes of their own,
which can be killed; what every run must look like afterwards; when two runs are equal; how a fault
changes the program in a child process.

The processes are forked from a server that has imported everything, so that a run takes a tenth of
a second to start. Apart from that they are ordinary processes: kill -9 is done to them by the
kernel.
"""

import atexit
import hashlib
import json
import multiprocessing.forkserver
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # the ranks of a shared model would import this
from conftest import ROOT, SMALL, prepare_words

import run.setup
import train
from config.command import start
from run.metrics import METRICS_FILE, read_metrics
from run.ranks import exit_with
from weights import checkpoint
from weights.open import load_model

TIMES = ("step_ms", "tok_per_s", "peak_memory_mb")  # of a record: no two runs have the same
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["faults.catalogue"])
Before = Callable[[], None] | None  # what is called in a child before train.main


# The register and the count


class Silent(str):
    """A failure in words, as all are here, and the worst kind: the program told nobody about it."""


@dataclass
class Report:
    """The tries of one fault."""

    tries: int = 0
    passed: int = 0
    silent: int = 0
    lost: int | None = None  # the most optimizer steps that had to be done again
    recoveries: list[float] = field(default_factory=list)  # seconds from a start to its first step
    failures: list[str] = field(default_factory=list)
    note: str = ""  # a figure of the fault's own, for the table

    def count(
        self,
        what: str,
        failure: str,
        lost: int | None = None,
        recovery: float | None = None,
    ) -> None:
        """Counts one try, `what`, which has passed if the failure is empty."""
        self.tries += 1
        self.passed += not failure
        self.silent += isinstance(failure, Silent)
        if failure:
            self.failures.append(f"{what}: {failure}" if what else failure)
        if lost is not None:
            self.lost = max(lost, self.lost or 0)
        if recovery is not None:
            self.recoveries.append(recovery)

    @property
    def good(self) -> bool:
        return self.tries > 0 and self.passed == self.tries

    def row(self) -> dict:
        """The row of the table, as JSON takes it."""
        seconds = statistics.median(self.recoveries) if self.recoveries else None
        return asdict(self) | {"recovery": seconds, "good": self.good}

    def not_tried(self, reason: str) -> None:
        """This machine cannot have the fault, which is no failure."""
        self.tries, self.passed, self.note = 1, 1, f"not tried: {reason}"


@dataclass(frozen=True)
class Fault:
    """One row of the table. make_tries(report, tries, folder) counts so many tries, which it makes
    in an empty folder."""

    name: str
    make_tries: Callable[[Report, int, Path], None]
    whole: int  # tries of `make faults`
    few: int  # tries of `make test`; 0: none, because it takes long or tests/test_*.py try it, too

    def run(self, tries: int, folder: Path) -> Report:
        report = Report()
        self.make_tries(report, tries, folder)
        return report


FAULTS: list[Fault] = []


def fault(name: str, whole: int, few: int) -> Callable:
    """Registers a function as make_tries of a fault."""

    def register(function: Callable) -> Callable:
        FAULTS.append(Fault(name, function, whole, few))
        return function

    return register


# Runs in processes of their own


@cache
def words() -> Path:
    """The folder of a small data set, which each process makes once."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prepare_words(folder)
    return folder / "words"


def command(out: Path, **knobs: object) -> list[str]:
    """The arguments of train.py for a run in `out` of a model that takes milliseconds; `knobs`
    replace those of the model."""
    small = dict(argument.split("=") for argument in SMALL) | {"dataset": words(), "out_dir": out}
    return [str(ROOT / "config" / "tiny.py"), *(f"{k}={v}" for k, v in (small | knobs).items())]


class Ended(NamedTuple):
    """How a process ended."""

    code: int  # -9 after kill -9
    text: str  # all that it printed, both streams


class Child:
    """train.py for a run in `out`, in a process of its own.

    `before` is called in it first: a top-level function of a module, or a functools.partial of one,
    which breaks what the fault is about. What the process prints goes to `output`, or to OUT.log.
    `data` is the folder in which it looks for data sets by name. `variables` are added to its
    environment.
    """

    def __init__(
        self,
        out: Path,
        before: Before = None,
        *,
        data: Path | None = None,
        output: Path | None = None,
        variables: dict[str, str] | None = None,
        **knobs: object,
    ):
        self.folder, self.output = out, output or Path(f"{out}.log")
        self.output.unlink(missing_ok=True)
        # The server is not told our sys.path.
        with patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):
            multiprocessing.forkserver.ensure_running()
        arguments = (command(out, **knobs), data, self.output, before, variables or {})
        self.process = SERVER.Process(target=_in_child, args=arguments)
        self.process.start()

    def end(self, seconds: float = 300) -> Ended:
        """Waits for the end. TimeoutError, after the child has been killed, if that takes longer
        than so many seconds."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.signal(signal.SIGKILL)
            self.process.join()
            raise TimeoutError(f"still running after {seconds} s: {self.text()[-500:]}")
        return Ended(self.process.exitcode, self.text())

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def text(self) -> str:
        """All that it has printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_for(self, seen: Callable[[], object], seconds: float = 60) -> bool:
        """Waits until seen() is true, the child has ended or the time is over. Returns seen()."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.exitcode is None and not seen():
            time.sleep(0.002)
        return bool(seen())


def _in_child(
    arguments: list[str], data: Path | None, output: Path, before: Before, variables: dict[str, str]
) -> None:
    os.environ.update(variables)
    os.setsid()  # a signal to its group reaches it and what it has started, as Ctrl-C does
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    # Whatever the faults themselves were started under:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    start()
    torch.set_num_threads(1)
    if data:
        run.setup.DATA = data
    train.plot_losses = lambda folder: None  # it takes longer than a run
    if before:
        before()
    exit_with(train.main, arguments)


class RankProcesses:
    """train.py on several ranks of this machine, each a Child. What rank N prints goes to
    OUT.N.log.

    This process holds the store where the ranks meet; with torchrun it would be torchrun.
    """

    def __init__(
        self,
        size: int,
        out: Path,
        before: Before = None,
        store: dist.TCPStore | None = None,
        **knobs: object,
    ):
        self.store = store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": 0,
        }
        self.children = []
        for rank in range(size):
            own = shared | {"RANK": rank, "LOCAL_RANK": rank}
            variables = {name: str(value) for name, value in own.items()}
            output = Path(f"{out}.{rank}.log")
            self.children.append(Child(out, before, output=output, variables=variables, **knobs))

    def end(self, seconds: float = 120) -> tuple[list[int], list[str]]:
        """(the exit code of each rank, what each printed). TimeoutError, after all have been
        killed, if one does not end within so many seconds."""
        try:
            ends = [child.end(seconds) for child in self.children]
        finally:
            for child in self.children:
                if child.process.exitcode is None:
                    child.signal(signal.SIGKILL)
        return [code for code, _ in ends], [text for _, text in ends]


def train_ranks(
    size: int, out: Path, before: Before = None, **knobs: object
) -> tuple[list[int], list[str]]:
    """Ranks from their start to their end: (the exit code of each, what each printed)."""
    return RankProcesses(size, out, before, **knobs).end()


def train_child(out: Path, before: Before = None, **others: object) -> Ended:
    """A Child from its start to its end."""
    return Child(out, before, **others).end()


def uncut(out: Path, before: Before = None, **others: object) -> Path:
    """`out`, with a finished run to which nothing has happened; it is made if it is not there."""
    if not out.exists() and not before:
        shutil.copytree(_finished(**others), out)
    elif not out.exists():
        ended = train_child(out, before, **others)
        assert ended.code == 0, ended
    return out


@cache
def _finished(**others: object) -> Path:
    """The folder of such a run, which each process makes once: many faults compare with the same
    one."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    ended = train_child(folder / "run", **others)
    assert ended.code == 0, ended
    return folder / "run"


def start_program(
    out: Path, *launcher: object, program: Path = ROOT / "train.py", **knobs: object
) -> subprocess.Popen:
    """`LAUNCHER python train.py` for a run in `out`, not forked but started as a user does it. What
    it prints is added to OUT.log."""
    words_before = [*launcher] if launcher else [sys.executable]
    with open(f"{out}.log", "ab") as log:
        return subprocess.Popen(
            [*words_before, program, *command(out, **knobs)],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


# What every run must look like


def bad_end(ended: Ended, code: int = 0) -> str:
    """How a process ended otherwise than with this exit code, and with one `error:` line if the
    code tells of an error, as a failure. A traceback is always one."""
    said = [line for line in ended.text.splitlines() if line.startswith("error:")]
    if "Traceback (most recent call last)" in ended.text:
        return f"a traceback: {ended.text[-600:]}"
    if ended.code != code or len(said) != (code in (1, 2, 3)):
        return f"exit code {ended.code} instead of {code}: {ended.text[-500:]}"
    return ""


def checkpoints(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


def last_saved(folder: Path) -> int:
    return max((step for step, _ in checkpoint.all_in(folder)), default=0)


def unreadable(folder: Path) -> str:
    """A checkpoint of a run that cannot be sampled from, as a failure."""
    for path in folder.glob("*.pt"):
        try:
            load_model(path)
        except (ValueError, OSError) as error:
            return str(error)
    return ""


def left_over(folder: Path) -> str:
    """What is half made in a folder, as a failure."""
    hidden = folder.glob(".*") if folder.exists() else []
    names = [path.name for path in hidden if path.name != ".lock"]
    return f"left behind: {', '.join(names)}" if names else ""


def other_files(whole: Path, cut: Path) -> str:
    """The files that only one of two runs has, as a failure. A Child does not draw loss.png."""
    odd = {path.name for path in whole.iterdir()} ^ {path.name for path in cut.iterdir()}
    odd -= {"loss.png"}
    return f"files that only one of the runs has: {sorted(odd)}" if odd else ""


def untidy(folder: Path) -> str:
    """What is wrong with the files of a run that ended by itself, as a failure: one is half made, a
    checkpoint cannot be loaded, or a line of metrics.jsonl is no JSON, which has no NaN."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    path = folder / METRICS_FILE
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            json.loads(line, parse_constant=refuse)
            if not line.endswith(b"\n"):
                raise ValueError("it has no end")
        except ValueError as error:
            return f"{path.name} has a broken line: {line!r} ({error})"
    return left_over(folder) or unreadable(folder)


# When two runs are equal


def state_hash(folder: Path, but: str = "") -> str:
    """SHA-256 over all that the newest checkpoint says about the state of the run: names, numbers
    and the bits of tensors. The field `but` is left out."""
    state, digest = checkpoint.load_newest(folder), hashlib.sha256()
    tensors = dict(state["model"])
    for name, moments in state["optimizer"].items():
        tensors |= {f"{name} {key}": tensor for key, tensor in moments.items()}
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    apart = ("model", "optimizer", "config", "data", but)
    rest = {name: value for name, value in state.items() if name not in apart}
    digest.update(repr(sorted(rest.items())).encode())
    return digest.hexdigest()


def curve(folder: Path) -> list[str]:
    """Every record of a run, without times; a number is shown by its bits."""
    records = []
    for record in read_metrics(folder):
        shown = {k: v.hex() if isinstance(v, float) else v for k, v in record.items()}
        records.append(" ".join(f"{k}={v}" for k, v in shown.items() if k not in TIMES))
    return records


def difference(whole: Path, cut: Path) -> str:
    """How a run that was cut differs from the uncut one, as a failure; '' if every bit is equal."""
    if curve(whole) != curve(cut):
        pairs = zip(curve(whole), curve(cut), strict=False)
        first = next((pair for pair in pairs if pair[0] != pair[1]), "in their number")
        return Silent(f"records differ, first {first}")
    return "" if state_hash(whole) == state_hash(cut) else Silent("the final state differs")


def bad_resume(whole: Path, cut: Path, before: Before = None, **others: object) -> str:
    """Resumes the run in `cut` to its end: how it does not end as the uncut one, as a failure."""
    ended = train_child(cut, before, **{"resume": "auto"} | others)
    return bad_end(ended) or difference(whole, cut)


# Changes of the program in a child


def before_call(owner: Any, name: str, act: Callable) -> None:
    """From now on act(*arguments) comes before each call of owner.name(*arguments)."""
    around_call(owner, name, before=act)


def after_call(owner: Any, name: str, act: Callable) -> None:
    """From now on act(result, *arguments) comes after each call of owner.name(*arguments)."""
    around_call(owner, name, after=act)


def around_call(
    owner: Any, name: str, before: Callable | None = None, after: Callable | None = None
) -> None:
    inner = getattr(owner, name)

    def called(*arguments, **named):
        if before:
            before(*arguments)
        result = inner(*arguments, **named)
        if after:
            after(result, *arguments)
        return result

    setattr(owner, name, called)


def at_batch(step: int, act: Callable[[], None]) -> None:
    """act() comes in the middle of the optimizer step `step`, counted from 0: before its batch is
    read."""
    before_call(train, "batch", lambda data, at, *_: act() if at == step else None)
