"""Several ranks, as torchrun starts them: where one is lost no other goes on or waits for ever, and the job that is
started again, by torchrun or by hand, ends as the one that nothing happened to."""

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

import checkpoint
import run as run_module

from .disk import ended, no_room, unlike, unsaid, untidy
from .harness import ROOT, Ranks, Report, command, difference, fault, words
from .kill import HEAVY, last_step, printed, unreadable

WAYS = ((2, "ddp"), (2, "fsdp"), (4, "ddp"))
KNOBS = HEAVY | {"batch_size": 4, "max_iters": 40, "save_interval": 4, "resume": "auto"}
SOON = 20.0  # seconds until a job has ended in which a rank was lost, on a machine that has other work
PATIENCE = 5  # seconds that ranks wait for one that hangs


class Job:
    """`torchrun train.py` for a run in `out`, beside which its data set is; `driver` stands for train.py. What all
    print goes to OUT.log."""

    def __init__(self, out: Path, size: int, way: str, *options: str, driver: Path = ROOT / "train.py"):
        self.out = out
        arguments = command(out, **KNOBS | {"parallel": way, "dataset": words(out.parent) / "words"})
        with open(f"{out}.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", *options,
                 driver, *arguments], stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.size, self.before = size, last_step(out)

    def ranks(self) -> dict[int, int]:
        """The process of each rank that is there now."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"\nPPid:\t{self.process.pid}\n" in (folder / "status").read_text():
                    variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                    found |= {int(v.removeprefix("RANK=")): int(folder.name) for v in variables if v[:5] == "RANK="}
            except OSError:  # it has just ended
                continue
        return found

    def reach(self, step: int) -> dict[int, int]:
        """Waits until the job has done so many new steps; the processes of its ranks."""
        end = time.monotonic() + 120
        while last_step(self.out) < self.before + step and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        ranks = self.ranks()
        assert len(ranks) == self.size, printed(self.out)[-1000:]
        return ranks

    def wait(self, seconds: float = 120) -> int:
        """The exit code of torchrun; -9, and nothing left of it, if it has not ended by then."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in (*self.ranks().values(), self.process.pid):
                os.kill(pid, signal.SIGKILL)
            return self.process.wait()


def uncut(folder: Path, size: int, way: str) -> Path:
    """The run that nothing happens to."""
    out = folder / f"whole{size}{way}"
    if not out.exists():
        ranks = Ranks(size, command(out, **KNOBS | {"parallel": way}), words(folder))
        assert ranks.wait() == [0] * size, ranks.texts()
    return out


def lost_steps(out: Path) -> int:
    return last_step(out) - max((step for step, _ in checkpoint.all_in(out)), default=0)


def orphans(pids: dict[int, int]) -> str:
    """The processes that are still there, as a failure."""
    end = time.monotonic() + 3
    while (left := [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.05)
    return f"still there: {left}" if left else ""


def told(out: Path, lines: int) -> str:
    """A failure unless train.py has told its end in at most so many lines, and no traceback."""
    text = printed(out)
    said = re.findall(r"^error: .*", text, re.M)
    trace = re.search(r'File ".*(train|world)\.py", line', text)
    return f"a traceback: {text[-3000:]}" if trace else f"told {said}" if len(said) > lines else ""


def ends_as(whole: Path, job: Job) -> tuple[str, bool]:
    """How the last of some jobs, with nothing more happening to it, ends otherwise than the uncut run: (failure,
    whether silently)."""
    code = job.wait()
    wrong = "" if code else difference(whole, job.out)
    return (f"exit code {code}: {printed(job.out)[-1000:]}" if code else wrong or untidy(job.out)), bool(wrong)


@fault("kill -9 of a rank, which torchrun starts again", whole=6, few=0)
def killed_and_restarted(tries: int, folder: Path) -> Report:
    """Once before there is a checkpoint, then at a random step."""
    report, pick = Report(), random.Random(0)
    for i in range(tries):
        size, way = WAYS[i % len(WAYS)]
        whole, out = uncut(folder, size, way), folder / f"run{i}"
        job = Job(out, size, way, "--max-restarts=2")
        os.kill(job.reach(1)[pick.randrange(size)], signal.SIGKILL)
        first = printed(out).count("machine  ")
        while printed(out).count("machine  ") == first and job.process.poll() is None:
            time.sleep(0.05)
        step = last_step(out)
        while last_step(out) < min(step + pick.randint(1, 15), 38) and job.process.poll() is None:
            time.sleep(0.01)
        ranks = job.ranks()
        os.kill(ranks[pick.randrange(size)], signal.SIGKILL)
        lost = lost_steps(out)
        failure, silent = ends_as(whole, job)
        report.count(failure or orphans(ranks), silent=silent, lost=lost)
    report.note = "killed twice, 2 and 4 ranks"
    return report


@fault("kill -9 of a rank, which nobody starts again", whole=6, few=0)
def killed(tries: int, folder: Path) -> Report:
    """The job is over soon and says so; started again by hand, it goes on."""
    report, pick, seconds = Report(), random.Random(1), []
    for i in range(tries):
        size, way = WAYS[i % len(WAYS)]
        whole, out = uncut(folder, size, way), folder / f"run{i}"
        job = Job(out, size, way)
        ranks = job.reach(pick.randint(1, 30))
        os.kill(ranks[i % size], signal.SIGKILL)
        failure, silent, lost, late = over(job, ranks, SOON)
        seconds.append(late)
        if not failure:
            failure, silent = ends_as(whole, Job(out, size, way))
        report.count(failure, silent=silent, lost=lost)
    report.note = f"at most {max(seconds):.1f} s from the kill to the end of torchrun"
    return report


def over(job: Job, ranks: dict[int, int], seconds: float) -> tuple[str, bool, int, float]:
    """Waits for a job that has lost a rank: (failure, False, steps lost, seconds until its end)."""
    begin = time.monotonic()
    code = job.wait(seconds)
    late = time.monotonic() - begin
    failure = f"exit code {code} after {late:.1f} s" if code in (0, -signal.SIGKILL) else ""
    return failure or orphans(ranks) or told(job.out, 1) or unreadable(job.out), False, lost_steps(job.out), late


@fault("a rank that hangs", whole=3, few=0)
def hangs(tries: int, folder: Path) -> Report:
    """The others give up when their patience is over, which is half an hour unless a driver makes it shorter."""
    report, pick, driver = Report(), random.Random(2), folder / "driver.py"
    driver.write_text(f"import sys\nfrom datetime import timedelta\nsys.path.insert(0, {str(ROOT)!r})\n"
                      f"import world\nimport train\nworld.PATIENCE = timedelta(seconds={PATIENCE})\n"
                      f"world.leave(train.main, sys.argv[1:])\n")
    for i in range(tries):
        size, way = WAYS[i % len(WAYS)]
        whole, out = uncut(folder, size, way), folder / f"run{i}"
        job = Job(out, size, way, driver=driver)
        ranks = job.reach(pick.randint(1, 30))
        os.kill(ranks[i % size], signal.SIGSTOP)
        failure, silent, lost, _ = over(job, ranks, PATIENCE + 30 + SOON)  # 30: as long torchrun waits
        if not failure:
            failure, silent = ends_as(whole, Job(out, size, way))
        report.count(failure, silent=silent, lost=lost)
    report.note = f"with a patience of {PATIENCE} s"
    return report


@fault("SIGTERM or SIGINT to torchrun", whole=6, few=0)
def signalled(tries: int, folder: Path) -> Report:
    report, pick = Report(), random.Random(3)
    for i in range(tries):
        (size, way), number = WAYS[i % len(WAYS)], (signal.SIGTERM, signal.SIGINT)[i % 2]
        whole, out = uncut(folder, size, way), folder / f"run{i}"
        job = Job(out, size, way)
        ranks = job.reach(pick.randint(1, 30))
        job.process.send_signal(number)
        code = job.wait(SOON)
        failure = "" if code == 1 else f"exit code {code}"  # torchrun's own, whatever its ranks end with
        saved = re.search(rf"^{signal.Signals(number).name}: saved at step (\d+); ", printed(out), re.M)
        failure = failure or ("" if saved else f"not saved: {printed(out)[-2000:]}") or orphans(ranks) or told(out, 0)
        lost, silent = lost_steps(out), False
        failure = failure or (f"{lost} steps lost" if lost else "")
        if not failure:
            cut = checkpoint.path_of(out, int(saved[1]))
            regular = cut.name in {path.name for path in whole.iterdir()}
            failure, silent = ends_as(whole, Job(out, size, way))
            assert regular or not cut.exists()
        report.count(failure, silent=silent, lost=lost)
    return report


@fault("full disk in a save of several ranks", whole=6, few=1)
def full(tries: int, folder: Path) -> Report:
    """From step 6 on, for main; in every second try there is room again for the last save."""
    report, data = Report(), words(folder)
    for i in range(tries):
        (size, way), last_fits = WAYS[i % len(WAYS)], i % 2 == 0
        knobs, out, aside = {"keep": 3, "parallel": way}, folder / f"run{i}", folder / f"aside{i}"
        whole = folder / f"small{size}{way}"
        if not whole.exists():
            assert not any(Ranks(size, command(whole, **knobs), data).wait())
        room = (whole / "ckpt_00000008.pt").stat().st_size * (i + 1) // (tries + 1)
        ranks = Ranks(size, command(out, **knobs), data,
                      partial(no_room, room, range(6, 12 if last_fits else 13), aside))
        codes, texts = ranks.wait(), ranks.texts()
        failure = ended((codes[0], texts[0]), 0 if last_fits else 1, 0 if last_fits else 1) or untidy(out)
        failure = failure or unlike(aside, out) or unsaid(texts[0], out / "ckpt_00000008.pt")
        if not failure and (codes != [codes[0]] * size or any(texts[1:])):
            failure = f"ranks end with {codes} and say {texts[1:]}"
        if not failure and not last_fits:
            assert not any(Ranks(size, command(out, resume="auto", **knobs), data).wait())
        report.count(failure or difference(whole, out))
    return report


@fault("the data of one rank are damaged, or change while they are read", whole=6, few=2)
def data_of_one_rank(tries: int, folder: Path) -> Report:
    report, data = Report(), words(folder)
    for i in range(tries):
        (size, way), out, other = WAYS[i // 2 % len(WAYS)], folder / f"run{i}", folder / f"other{i}" / "words"
        shutil.copytree(data / "words", other)
        changes = i % 2 == 1
        if not changes:
            tokens = bytearray((other / "train.bin").read_bytes())
            tokens[random.Random(i).randrange(len(tokens))] ^= 1
            (other / "train.bin").write_bytes(tokens)
        ranks = Ranks(size, command(out, parallel=way), data, partial(own_data, other, 7 if changes else None))
        codes, said = ranks.wait(), "".join(ranks.texts())
        there = [step for step, _ in checkpoint.all_in(out)]
        good = (codes == [1] * size and there == [4]) if changes else (codes == [2] + [1] * (size - 1) and not there)
        one = len(re.findall("^error: ", said, re.M)) == 1 and "Traceback" not in said
        report.count("" if good and one else f"{codes}, {there}: {said[-1500:]}")
    return report


def own_data(folder: Path, changed_in: int | None) -> None:
    """In a child: rank 1 has its data set there, and it is written to in this step."""
    from ranks import in_step

    if os.environ["RANK"] == "1":
        opened = run_module.open_dataset
        run_module.open_dataset = lambda _: opened(folder)
        if changed_in:
            in_step(changed_in, partial(os.utime, folder / "train.bin", (1, 1)))

