"""Several ranks, as torchrun starts them. Where one rank is lost, no other may go on or wait for
ever. The job that is started again, by torchrun or by hand, must end as the one to which nothing
happened.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import run.setup
from weights import checkpoint

from .disk import bad_save, no_room
from .harness import (
    ROOT,
    Ended,
    Report,
    at_batch,
    bad_end,
    difference,
    fault,
    last_saved,
    other_files,
    start_program,
    train_ranks,
    unreadable,
    untidy,
    words,
)
from .kill import HEAVY, last_step, printed

WAYS = ((2, "ddp"), (2, "fsdp"), (4, "ddp"))
KNOBS = HEAVY | {"batch_size": 4, "max_iters": 40, "save_interval": 4, "resume": "auto"}
SOON = 20.0  # seconds for the end of a job that has lost a rank, on a machine with other work
PATIENCE = 5  # seconds that ranks wait for one that hangs
TORCHRUN_WAITS = 30  # seconds, for ranks that do not end when it asks them to


class Job:
    """`torchrun train.py` for a run in `out`; `program` stands for train.py. What all ranks print
    is added to OUT.log."""

    def __init__(
        self, out: Path, size: int, way: str, *options: str, program: Path = ROOT / "train.py"
    ):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher = [*torchrun, f"--nproc_per_node={size}", *options]
        self.out, self.size, self.before = out, size, last_step(out)
        self.process = start_program(out, *launcher, program=program, **KNOBS, parallel=way)

    def ranks(self) -> dict[int, int]:
        """rank -> process, of the ranks that are there now."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"\nPPid:\t{self.process.pid}\n" not in (folder / "status").read_text():
                    continue
                variables = (folder / "environ").read_text(errors="replace").split("\0")
            except OSError:  # it has just ended
                continue
            rank = [v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")]
            found |= {int(number): int(folder.name) for number in rank}
        return found

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 120
        while last_step(self.out) < step and self.is_running() and time.monotonic() < end:
            time.sleep(0.01)

    def reach(self, steps: int) -> dict[int, int]:
        """Waits until the job has done so many new steps; the processes of its ranks."""
        self.wait_for_step(self.before + steps)
        ranks = self.ranks()
        assert len(ranks) == self.size, printed(self.out)[-1000:]
        return ranks

    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = 120) -> int:
        """The exit code of torchrun; -9, and nothing left of the job, if it has not ended after so
        many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in (*self.ranks().values(), self.process.pid):
                os.kill(pid, signal.SIGKILL)
            return self.process.wait()


def bad_last(whole: Path, job: Job) -> str:
    """How the last of some jobs, to which nothing more happens, ends otherwise than the uncut run,
    as a failure."""
    code = job.wait()
    failure = f"exit code {code}: {printed(job.out)[-1000:]}" if code else ""
    return failure or difference(whole, job.out) or untidy(job.out) or other_files(whole, job.out)


def whole_job(folder: Path, size: int, way: str, **knobs: object) -> Path:
    """The run of so many ranks to which nothing happens; it is made if it is not there."""
    out = folder / f"whole{size}{way}"
    if not out.exists():
        codes, texts = train_ranks(size, out, parallel=way, **(knobs or KNOBS))
        assert not any(codes), texts
    return out


def lost_steps(out: Path) -> int:
    return last_step(out) - last_saved(out)


def orphans(pids: dict[int, int]) -> str:
    """The processes of ranks that are still there, as a failure."""
    end = time.monotonic() + 3
    while time.monotonic() < end:
        left = [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]
        if not left:
            return ""
        time.sleep(0.05)
    return f"still there: {left}"


def told(out: Path, lines: int) -> str:
    """A failure unless the ranks have told their end in at most so many lines, without a traceback.
    torchrun may add its own."""
    text = printed(out)
    said = re.findall(r"^error: .*", text, re.M)
    if re.search(r'File ".*(train|ranks)\.py", line', text):
        return f"a traceback: {text[text.find('Traceback') :][:6000]}"
    return f"told {said}" if len(said) > lines else ""


def over(job: Job, ranks: dict[int, int], seconds: float) -> tuple[str, float]:
    """Waits for the end of a job that has lost a rank: (failure, seconds until its end)."""
    begin = time.monotonic()
    code = job.wait(seconds)
    late = time.monotonic() - begin
    failure = f"exit code {code} after {late:.1f} s" if code in (0, -signal.SIGKILL) else ""
    return failure or orphans(ranks) or told(job.out, 1) or unreadable(job.out), late


@fault("kill -9 of a rank, which torchrun starts again", whole=6, few=0)
def killed_and_restarted(report: Report, tries: int, folder: Path) -> None:
    """Once before there is a checkpoint, and once more at a random step."""
    pick = random.Random(0)
    for i in range(tries):
        size, way = WAYS[i % len(WAYS)]
        whole, out = whole_job(folder, size, way), folder / f"run{i}"
        job = Job(out, size, way, "--max-restarts=2")
        os.kill(job.reach(1)[pick.randrange(size)], signal.SIGKILL)
        starts = printed(out).count("machine  ")
        while printed(out).count("machine  ") == starts and job.is_running():
            time.sleep(0.05)
        job.wait_for_step(min(last_step(out) + pick.randint(1, 15), 38))
        ranks = job.ranks()
        os.kill(ranks[pick.randrange(size)], signal.SIGKILL)
        lost = lost_steps(out)
        report.count(f"{size} {way}", bad_last(whole, job) or orphans(ranks), lost)
    report.note = "killed twice, 2 and 4 ranks"


@fault("kill -9 of a rank, which nobody starts again", whole=6, few=0)
def killed(report: Report, tries: int, folder: Path) -> None:
    """The job must be over soon and say so. Started again by hand, it must go on."""
    pick, seconds = random.Random(1), []
    for i in range(tries):
        size, way = WAYS[i % len(WAYS)]
        whole, out = whole_job(folder, size, way), folder / f"run{i}"
        job = Job(out, size, way)
        ranks = job.reach(pick.randint(1, 30))
        os.kill(ranks[i % size], signal.SIGKILL)
        failure, late = over(job, ranks, SOON)
        seconds.append(late)
        lost = lost_steps(out)
        failure = failure or bad_last(whole, Job(out, size, way))
        report.count(f"{size} {way}", failure, lost)
    report.note = f"at most {max(seconds):.1f} s from the kill to the end of torchrun"


@fault("a rank that hangs", whole=3, few=0)
def hangs(report: Report, tries: int, folder: Path) -> None:
    """The others must give up when their patience is over. That is half an hour, but a program of
    our own makes it short here."""
    pick, program = random.Random(2), folder / "impatient.py"
    program.write_text(
        f"import sys\nfrom datetime import timedelta\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"import train\nfrom run import ranks\nranks.PATIENCE = timedelta(seconds={PATIENCE})\n"
        f"ranks.exit_with(train.main, sys.argv[1:])\n"
    )
    for i in range(tries):
        size, way = WAYS[i % len(WAYS)]
        whole, out = whole_job(folder, size, way), folder / f"run{i}"
        job = Job(out, size, way, program=program)
        ranks = job.reach(pick.randint(1, 30))
        os.kill(ranks[i % size], signal.SIGSTOP)
        failure, _ = over(job, ranks, PATIENCE + TORCHRUN_WAITS + SOON)
        lost = lost_steps(out)
        failure = failure or bad_last(whole, Job(out, size, way))
        report.count(f"{size} {way}", failure, lost)
    report.note = f"with a patience of {PATIENCE} s"


@fault("SIGTERM or SIGINT to torchrun", whole=6, few=0)
def signalled(report: Report, tries: int, folder: Path) -> None:
    """torchrun passes it on to all ranks, which must save and end without losing a step."""
    pick = random.Random(3)
    for i in range(tries):
        (size, way), number = WAYS[i % len(WAYS)], (signal.SIGTERM, signal.SIGINT)[i % 2]
        whole, out = whole_job(folder, size, way), folder / f"run{i}"
        job = Job(out, size, way)
        ranks = job.reach(pick.randint(1, 30))
        job.process.send_signal(number)
        code = job.wait(SOON)  # torchrun has one of its own, whatever its ranks end with
        failure = "" if code == 1 else f"exit code {code}"
        if f"{number.name}: saved at step " not in printed(out):
            failure = failure or f"not saved: {printed(out)[-2000:]}"
        failure, lost = failure or orphans(ranks) or told(out, 0), lost_steps(out)
        failure = failure or (f"{lost} steps lost" if lost else "")
        failure = failure or bad_last(whole, Job(out, size, way))
        report.count(f"{number.name}, {size} {way}", failure, lost)


@fault("full disk in a save of several ranks", whole=6, few=0)
def full(report: Report, tries: int, folder: Path) -> None:
    """From step 6 on, for main. In every second try there is room again for the last save."""
    for i in range(tries):
        (size, way), last_fits = WAYS[i % len(WAYS)], i % 2 == 0
        out, aside = folder / f"run{i}", folder / f"aside{i}"
        whole = whole_job(folder, size, way, keep=3)
        room = (whole / "ckpt_00000008.pt").stat().st_size * (i + 1) // (tries + 1)
        before = partial(no_room, room, last_fits, aside)
        codes, texts = train_ranks(size, out, before, keep=3, parallel=way)
        failure = bad_save(Ended(codes[0], texts[0]), out, aside, last_fits)
        if codes != [codes[0]] * size or any(texts[1:]):
            failure = failure or f"ranks end with {codes} and say {texts[1:]}"
        if not failure and not last_fits:
            codes, texts = train_ranks(size, out, keep=3, parallel=way, resume="auto")
            failure = f"{codes}: {texts}" if any(codes) else ""
        report.count(f"{room} bytes, {size} {way}", failure or difference(whole, out))


@fault("the data of one rank are damaged, or change while they are read", whole=6, few=2)
def data_of_one_rank(report: Report, tries: int, folder: Path) -> None:
    """No rank may train on, and one line must say why. Damaged data are found before the start."""
    for i in range(tries):
        (size, way), change_in = WAYS[i // 2 % len(WAYS)], 7 if i % 2 else None
        out, other = folder / f"run{i}", folder / f"other{i}" / "words"
        shutil.copytree(words(), other)
        if not change_in:
            tokens = bytearray((other / "train.bin").read_bytes())
            tokens[random.Random(i).randrange(len(tokens))] ^= 1
            (other / "train.bin").write_bytes(tokens)
        codes, texts = train_ranks(size, out, partial(own_data, other, change_in), parallel=way)
        saved, said = [step for step, _ in checkpoint.all_in(out)], "".join(texts)
        good = (codes, saved) == (([1] * size, [4]) if change_in else ([2, *[1] * (size - 1)], []))
        failure = "" if good else f"{codes}, {saved}: {said[-1500:]}"
        # One of the codes stands for all: one line of error.
        report.count(f"{size} {way}", failure or bad_end(Ended(codes[0], said), codes[0]))


def change_a_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


def own_data(folder: Path, change_in: int | None) -> None:
    """In a child: rank 1 has its data set there, and it is written to in this step, counted from
    1."""
    if os.environ["RANK"] == "1":
        opened = run.setup.open_dataset
        run.setup.open_dataset = lambda _, *options: opened(folder, *options)
        if change_in:
            at_batch(change_in - 1, partial(change_a_byte, folder / "train.bin"))
