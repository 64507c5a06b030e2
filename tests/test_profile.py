"""profile=N: what the steps spend their time on is seen, and nothing else changes."""

import gzip
import json
from types import SimpleNamespace

import pytest
from conftest import largest_file
from test_train import assert_same_run, signal_after

from run.profile import TRACE_FILE, Profiler


def traced(folder):
    """The names of what is in a trace."""
    trace = json.loads(gzip.decompress((folder / TRACE_FILE).read_bytes()))
    return [event["name"] for event in trace["traceEvents"]]


def test_a_profiled_run_is_bitwise_the_same_and_its_trace_has_the_steps(start, tmp_path):
    assert start("dropout=0.1", out="plain")[0] == 0
    code, out, err = start("dropout=0.1", "profile=2")
    assert code == 0 and err == ""
    assert_same_run(tmp_path / "plain", tmp_path / "run")
    names = traced(tmp_path / "run")
    assert [name for name in names if name.startswith("ProfilerStep")] == [
        "ProfilerStep#3",
        "ProfilerStep#4",
    ]
    assert "aten::mm" in names and f"{TRACE_FILE} has all of steps 4 to 5: https://ui.perf" in out
    table = out.split("the costliest operators of steps 4 to 5:\n")[1].splitlines()[1:11]
    assert all(len(line) <= 80 for line in table) and any("aten::" in line for line in table)
    times = [float(line.split()[0]) for line in table]
    assert times == sorted(times, reverse=True) and times[0] > 0
    assert not (tmp_path / "plain" / TRACE_FILE).exists()


def test_a_run_that_ends_before_all_steps_are_recorded_has_those_that_are(
    start, tmp_path, monkeypatch
):
    signal_after(monkeypatch, 6)
    code, out, _ = start("profile=50")
    assert code == 143 and f"{TRACE_FILE} has all of steps 4 to 6" in out
    assert "ProfilerStep#5" in traced(tmp_path / "run")


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_that_ends_in_the_warm_up_says_that_nothing_is_recorded(start, tmp_path, steps):
    code, out, err = start("profile=1", f"max_iters={steps}")
    assert code == 0 and "costliest" not in out and err.count("\n") == 1
    assert "nothing is profiled: the run ended in its first 3 steps" in err
    assert not (tmp_path / "run" / TRACE_FILE).exists()


def profiled(folder, lock=None, is_main=True):
    """A profiler that has recorded one step of a run in this folder, and what it said."""
    config, ranks, said = SimpleNamespace(profile=9), SimpleNamespace(is_main=is_main), []
    lock = lock or SimpleNamespace(check=lambda: None)
    run = SimpleNamespace(config=config, ranks=ranks, folder=folder, step=4, lock=lock)
    profiler = Profiler(run, said.append)
    for _ in range(4):
        profiler.step()
    return profiler, said


def test_a_full_disk_is_a_warning_and_leaves_nothing(tmp_path, capfd):
    profiler, said = profiled(tmp_path)
    with largest_file(1000):  # PyTorch itself says nothing
        profiler.stop()
    err = capfd.readouterr().err
    assert "trace.json.gz could not be made (OSError('only a part of it" in err
    assert len(said) == 1 and not list(tmp_path.iterdir())


def test_nothing_is_written_into_a_folder_that_another_process_has_taken(tmp_path, capfd):
    def check():
        raise OSError("it is not this process's any more")

    profiler, _ = profiled(tmp_path, SimpleNamespace(check=check))
    profiler.stop()
    assert "not this process's any more" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_the_main_rank_is_profiled(tmp_path):
    profiler, said = profiled(tmp_path, is_main=False)
    profiler.stop()
    assert not said and not list(tmp_path.iterdir())
