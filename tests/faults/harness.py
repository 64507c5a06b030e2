"""What the faults share: the register, the count of tries, runs as processes that can be killed, and what equal means.

Runs are children forked from a server that has imported everything, so that one takes a tenth of a second to start;
apart from that they are processes like any other: what happens to one on kill -9 is done by the kernel.
"""

import hashlib
import multiprocessing.forkserver
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import torch._dynamo  # AdamW would import it in every child
import torch.distributed as dist
import torch.distributed.fsdp  # and the ranks of a shared model this
from conftest import ROOT, SMALL, prepare_words

import checkpoint
import metrics
import run as run_module
import train
from world import leave

TIMES = ("step_ms", "tok_per_s", "peak_memory_mb")  # of a record: what no two runs have equal
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["faults.catalogue"])


@dataclass
class Report:
    """The tries of one fault. A try fails with words that say how; silently wrong is the worst way to fail."""

    tries: int = 0
    passed: int = 0
    silent: int = 0
    lost: int | None = None  # most optimizer steps that had to be done again
    recoveries: list[float] = field(default_factory=list)  # seconds from a fresh start to the first new step
    failures: list[str] = field(default_factory=list)
    note: str = ""  # a figure of the fault's own, for the table

    def count(self, failure: str = "", *, silent: bool = False, lost: int | None = None,
              recovery: float | None = None) -> None:
        """One try; it passed if there is no failure to tell."""
        self.tries += 1
        self.passed += not failure
        self.silent += silent
        if failure:
            self.failures.append(failure)
        if lost is not None:
            self.lost = max(lost, self.lost or 0)
        if recovery is not None:
            self.recoveries.append(recovery)

    @property
    def good(self) -> bool:
        return self.tries > 0 and self.passed == self.tries and not self.silent

    def row(self) -> dict:
        """For the table and for JSON."""
        seconds = statistics.median(self.recoveries) if self.recoveries else None
        return asdict(self) | {"recovery": seconds, "good": self.good}


@dataclass(frozen=True)
class Fault:
    """One row of the table: run(tries, folder) makes that many tries in an empty folder."""

    name: str
    run: Callable[[int, Path], Report]
    whole: int  # tries in `make faults`
    few: int  # tries in `make test`; 0 = none, it would take too long


FAULTS: list[Fault] = []


def fault(name: str, whole: int, few: int) -> Callable:
    """Registers a function (tries, folder) -> Report as a fault."""
    def register(function: Callable[[int, Path], Report]) -> Callable[[int, Path], Report]:
        FAULTS.append(Fault(name, function, whole, few))
        return function
    return register


def words(folder: Path, name: str = "words") -> Path:
    """A folder for run.DATA with the data set `name`."""
    data = folder / "data"
    if not (data / name).exists():
        data.mkdir(parents=True, exist_ok=True)
        prepare_words(data, name)
    return data


def command(out: Path, **knobs: object) -> list[str]:
    """The arguments of train.py for a model that takes milliseconds, with `knobs` on top, for a run in `out`."""
    small = dict(argument.split("=") for argument in SMALL)
    return [str(ROOT / "config" / "tiny.py"), *(f"{k}={v}" for k, v in (small | {"out_dir": out} | knobs).items())]


def _child(arguments: list[str], data: Path, output: Path, before: Callable[[], None] | None,
           variables: dict[str, str]) -> None:
    os.environ.update(variables)
    os.setsid()  # so that a signal to its group reaches it and what it started, as Ctrl-C does
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the faults themselves were started under
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)
    run_module.DATA = data
    train.plot_losses, train.matmul_rate = lambda folder: None, lambda device, dtype: 1e9  # both take longer than a run
    if before:
        before()
    leave(train.main, arguments)


class Child:
    """train.py with these arguments, in a process of its own. `before` is called in it first: a top-level function of
    a module here, or a functools.partial of one, that replaces what the fault is about. What it prints goes to
    `output`, which is beside its out_dir unless it is named. `variables` are added to its environment."""

    def __init__(self, arguments: list[str], data: Path, before: Callable[[], None] | None = None,
                 output: Path | None = None, variables: dict[str, str] | None = None):
        out = next(a.removeprefix("out_dir=") for a in reversed(arguments) if a.startswith("out_dir="))
        self.folder, self.output = Path(out), output or Path(f"{out}.log")
        self.output.unlink(missing_ok=True)
        with patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):  # it is not told our sys.path
            multiprocessing.forkserver.ensure_running()
        self.process = SERVER.Process(target=_child, args=(arguments, data, self.output, before,
                                                            variables or {}))
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """The exit code; -9 after kill -9. TimeoutError, and the child killed, if it has not ended by then."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.signal(signal.SIGKILL)
            self.process.join()
            raise TimeoutError(f"still running after {seconds} s: {self.text()[-500:]}")
        return self.process.exitcode

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def text(self) -> str:
        """All that it has printed so far, both streams."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_for(self, seen: Callable[[], object], seconds: float = 60) -> bool:
        """Until seen() is true (True), or the child has ended, or the time is over (False)."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.exitcode is None:
            if seen():
                return True
            time.sleep(0.002)
        return bool(seen())


class Ranks:
    """train.py with these arguments on several ranks of this machine, each a Child; this process has the store where
    they meet, which with torchrun is torchrun's. What rank N prints goes to OUT.N.log."""

    def __init__(self, size: int, arguments: list[str], data: Path, before: Callable[[], None] | None = None,
                 store: dist.TCPStore | None = None):
        out = next(a.removeprefix("out_dir=") for a in reversed(arguments) if a.startswith("out_dir="))
        self.store = store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        self.all = [Child(arguments, data, before, Path(f"{out}.{rank}.log"),
                          {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()})
                    for rank in range(size)]

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit code of each rank. TimeoutError, and all killed, if one has not ended by then."""
        try:
            return [child.wait(seconds) for child in self.all]
        finally:
            for child in self.all:
                if child.process.exitcode is None:
                    child.signal(signal.SIGKILL)

    def texts(self) -> list[str]:
        return [child.text() for child in self.all]


def run(arguments: list[str], data: Path, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """A child from start to end: (exit code, all it printed)."""
    child = Child(arguments, data, before)
    return child.wait(), child.text()


def traceback_in(text: str) -> str:
    """What is wrong with a child's output, as a failure: a traceback where one clear line was wanted."""
    return f"a traceback: {text[-600:]}" if "Traceback (most recent call last)" in text else ""


def state_hash(folder: Path, but: str = "") -> str:
    """SHA-256 over all that the newest checkpoint says about the state of the run (`but` one field): names, bits and
    numbers."""
    state, digest = checkpoint.load_newest(folder), hashlib.sha256()
    tensors = dict(state["model"]) | {f"{n} {k}": t for n, s in state["optimizer"].items() for k, t in s.items()}
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else
                      repr(tensor.item()).encode())
    rest = {k: v for k, v in state.items() if k not in ("model", "optimizer", "config", "data", but)}
    digest.update(repr(sorted(rest.items())).encode())
    return digest.hexdigest()


def curve(folder: Path) -> list[str]:
    """Every record of a run, numbers as hex, without the times."""
    return [" ".join(f"{k}={v.hex() if isinstance(v, float) else v}" for k, v in record.items() if k not in TIMES)
            for record in metrics.read_metrics(folder)]


def difference(whole: Path, cut: Path) -> str:
    """How the run in `cut` differs from the uncut one in `whole`, as a failure; empty if it is bit for bit the same."""
    if curve(whole) != curve(cut):
        pairs = zip(curve(whole), curve(cut), strict=False)
        return f"records differ, first {next((p for p in pairs if p[0] != p[1]), 'in their number')}"
    return "" if state_hash(whole) == state_hash(cut) else "the final state differs"
