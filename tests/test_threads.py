"""How many threads compute: as many as other programs leave cores free, and then always as many."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

from config import command
from run import machine
from run.setup import build, read_config, set_up


@pytest.fixture
def usual_threads(monkeypatch):
    """PyTorch has four threads on four cores, and nobody has asked for another number."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 4)


@pytest.mark.parametrize(
    "free, threads",
    [(4.0, 4), (3.9, 4), (3.6, 4), (3.4, 3), (1.2, 1), (0.1, 1), (6.5, 4), (float("inf"), 4)],
)
def test_each_thread_has_a_core_that_is_free(usual_threads, monkeypatch, capsys, free, threads):
    monkeypatch.setattr(machine, "free_cores", lambda: free)
    assert machine.choose_threads(0) == threads
    told = capsys.readouterr().err
    assert bool(told) == (threads < 4)
    if threads == 3:
        assert told == "other programs leave 3.4 of 4 cores free: 3 threads\n"


def test_what_the_user_asks_for_counts_more(usual_threads, monkeypatch):
    monkeypatch.setattr(machine, "free_cores", lambda: 1.0)
    assert machine.choose_threads(3) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert machine.choose_threads(0) == 4
    with pytest.raises(ValueError, match="threads=5 is more than the 4 cores of this machine"):
        machine.choose_threads(5)


def test_free_cores_are_those_that_idle_or_work_for_us(monkeypatch):
    s = os.sysconf("SC_CLK_TCK")  # ticks of a second
    # Of three cores 0 and 2 are ours. user nice system idle iowait irq softirq steal
    before = "cpu 9 9 9 9 9 9 9 9\ncpu0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0"
    after = (
        f"cpu 9 9 9 9 9 9 9 9\n"
        f"cpu0 {3 * s} 0 {s} 0 0 0 0 0\n"  # it worked for four seconds
        f"cpu1 0 0 0 {9 * s} 0 0 0 0\n"
        f"cpu2 0 {s} 0 {s} {s} 0 0 {s}"  # for one, and was free for three
    )
    texts, clock = iter([before, after]), iter([10.0, 14.0])
    ours = iter([(0.5, 0, 0, 0, 10.0), (1.0, 0.5, 0.5, 0.5, 14.0)])  # two seconds in between
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda _: {0, 2})
    monkeypatch.setattr(command.Path, "read_text", lambda _: next(texts))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(command.os, "times", lambda: next(ours))
    monkeypatch.setattr(command, "_at_start", command._processor_seconds())
    assert command.free_cores() == (3 + 2) / 4


@pytest.mark.parametrize("text", ["", "cpu0 1 2", "cpu0 a b c d e f g h i j", None])
def test_where_nobody_can_say_all_cores_are_free(monkeypatch, text):
    def read_text(path):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(command, "_at_start", (0.0, 0.0, 0.0))
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(command.Path, "read_text", read_text)
    assert command.free_cores() == float("inf")
    monkeypatch.undo()
    monkeypatch.setattr(command, "_at_start", None)
    assert command.free_cores() == float("inf")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what each core does")
def test_busy_programs_are_seen():
    if command._processor_seconds() is None:
        pytest.skip("this sandbox hides what each core does")
    code = "from config.command import start; start(); import time; time.sleep(1); " + (
        "from config.command import free_cores; print(free_cores())"
    )
    cores = sorted(os.sched_getaffinity(0))
    loops = [
        subprocess.Popen(
            [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: 0"]
        )
        for core in cores
    ]
    try:
        time.sleep(0.5)
        free = float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert free < 0.5 * len(cores)


@pytest.fixture
def one_thread_afterwards():
    yield
    torch.set_num_threads(1)


def test_a_run_that_goes_on_keeps_its_threads(start, tmp_path, monkeypatch, one_thread_afterwards):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    code, out, _ = start("threads=2", "max_iters=4", "dtype=float32")
    assert code == 0 and "machine  cpu, float32, 2 threads, not compiled" in out
    torch.set_num_threads(1)  # now a program has begun that keeps the other core busy
    code, out, _ = start("max_iters=6", "resume=yes")
    assert code == 0 and "2 threads" in out and torch.get_num_threads() == 2
    assert json.loads(Path(tmp_path, "run", "config.json").read_text())["threads"] == 2

    code, out, _ = start("max_iters=8", "resume=yes", "threads=1")
    assert code == 0 and "threads: checkpoint=2, now=1" in out and torch.get_num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    code, out, _ = start("max_iters=10", "resume=yes")
    assert code == 0 and "threads: checkpoint=1, now=2" in out


def test_a_rank_has_the_threads_that_the_first_one_chose(tmp_path, data_folder, monkeypatch):
    places = (f"dataset={data_folder / 'words'}", f"out_dir={tmp_path / 'run'}")
    words = {word.partition("=")[0]: word for word in (*SMALL, *places)}
    run = set_up(read_config([*words.values()]))
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    begin = {"weights": None, "saved": None, "base": {}}
    build(replace(run.config, threads=3), run.data, begin, run.ranks)
    assert counts == [3]


def test_a_machine_with_fewer_cores_has_threads_of_its_own(
    start, monkeypatch, one_thread_afterwards
):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert start("threads=2", "max_iters=4")[0] == 0
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    torch.set_num_threads(1)
    code, out, _ = start("max_iters=6", "resume=yes")
    assert code == 0 and "threads: checkpoint=2, now=1" in out


def test_too_many_threads_are_refused(start):
    code, _, err = start("threads=4097")
    assert (
        code == 2
        and err.startswith("error: threads=4097 is more than the ")
        and "\n" not in err[:-1]
    )
