"""minutes=: the number of steps is measured once, and from there on the run is like any other."""

import itertools
import json
import os
import signal

import pytest
from test_train import assert_same_run, signal_after

import train
from weights import checkpoint

FIRST = ("max_iters=0", "minutes=0.05", "warmup_iters=2")
STEPS = 12  # of a quarter of a second each


@pytest.fixture
def steady(monkeypatch):
    """A quarter of a second passes between two looks at the clock, whatever the machine does."""
    clock = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: 0.25 * next(clock))


def steps_of(folder):
    return json.loads((folder / "config.json").read_text())["max_iters"]


@pytest.mark.parametrize(
    "more", [(), ("optimizer=muon", "dropout=0.1", "skip_spikes=6"), ("lr_schedule=wsd",)]
)
def test_it_is_bitwise_the_run_of_as_many_steps(start, steady, tmp_path, more):
    code, out, err = start(*FIRST, *more)
    assert code == 0 and err == "" and steps_of(tmp_path / "run") == STEPS
    assert out.startswith(f"{STEPS} steps take about 0.05 minutes here: max_iters={STEPS}\n")
    code, out, _ = start(f"max_iters={STEPS}", *more, out="other")
    assert code == 0 and "minutes" not in out
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_it_takes_about_so_long(start, steady, tmp_path):
    code, out, _ = start("max_iters=0", "minutes=0.1", "eval_interval=0", "warmup_iters=0")
    assert code == 0 and steps_of(tmp_path / "run") == 6 / 0.25
    assert "seconds:           6.0\n" in out


def test_other_work_for_a_moment_of_the_trial_does_not_shorten_the_run(
    start, tmp_path, monkeypatch
):
    now = 0.0

    def clock():  # of two steps, each between two calls, one takes four times as long
        nonlocal now
        now += next(passed)
        return now

    passed = itertools.cycle((0.25, 0.25, 1.0, 1.0))
    monkeypatch.setattr(train.time, "perf_counter", clock)
    code, _, _ = start("max_iters=0", "minutes=0.2", "eval_interval=0", "warmup_iters=0")
    assert code == 0 and steps_of(tmp_path / "run") == 12 / 0.25


def test_what_was_fixed_stays_on_a_resume(start, steady, tmp_path, monkeypatch):
    start(*FIRST, out="whole")
    with monkeypatch.context() as patch:
        fix_length = train.fix_length
        patch.setattr(train, "fix_length", lambda run: (fix_length(run), signal_after(patch, 3)))
        assert start(*FIRST)[0] == 128 + signal.SIGTERM
    code, out, _ = start(*FIRST, "resume=auto")
    assert code == 0 and "minutes here" not in out
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert "nothing to do" in start(*FIRST, "resume=auto")[1]


def test_other_minutes_cannot_change_a_run_that_has_begun(start, tmp_path):
    start("max_iters=12")
    code, _, err = start("max_iters=0", "minutes=3", "resume=auto")
    said = "minutes=3 cannot change the length of a run that has begun, which is max_iters=12"
    assert code == 2 and said in err and err.count("\n") == 1
    assert start("max_iters=14", "resume=auto")[0] == 0


@pytest.mark.parametrize(
    "knobs, said",
    [
        (("minutes=3",), "minutes=3.0 has no effect without max_iters=0"),
        (("max_iters=0",), "max_iters=0 takes as many steps as minutes allow: write minutes=3"),
        (("max_iters=0", "minutes=-1"), "minutes must be 0 or more"),
        (("max_iters=0", "minutes=nan"), "must be finite"),
        (("max_iters=0", "minutes=1e15"), "minutes must be at most 1,000,000"),
        (
            ("max_iters=0", "minutes=1e-6", "warmup_iters=2"),
            "minutes=1e-06 allows 0 steps here, and warmup_iters=2",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(start, tmp_path, knobs, said):
    code, out, err = start(*knobs)
    assert code == 2 and said in err and err.count("\n") == 1 and out == ""
    assert not os.path.exists(tmp_path / "run")


def test_nan_in_the_first_steps_is_told_by_the_training(start, monkeypatch):
    def step(run, *_):
        raise FloatingPointError("loss NaN at step 1")

    monkeypatch.setattr(train, "train_step", step)
    code, _, err = start(*FIRST)
    assert code == train.NOT_FINITE and err.startswith("error: loss NaN at step 1.")


def test_the_last_lines_are_a_block_of_numbers(start):
    out = start("max_iters=4", "eval_interval=0")[1]
    block = dict(line.split(":") for line in out.splitlines()[-8:])
    names = "val_bpb val_loss steps tokens seconds tokens_per_second parameters peak_memory_mb"
    assert list(block) == names.split()
    assert int(block["steps"]) == 4 and int(block["tokens"]) == 4 * 8 * 32
    assert all(float(value) >= 0 for value in block.values())
    assert f"val loss {float(block['val_loss']):.4f} | {float(block['val_bpb']):.4f} bits" in out


def test_a_checkpoint_that_says_nothing_of_its_length_is_refused(start, tmp_path):
    start("max_iters=12")
    for path in (tmp_path / "run").glob("ckpt_*.pt"):
        state = checkpoint.load(path)
        state["config"] |= {"max_iters": 0, "minutes": 3.0}
        checkpoint.save(path, state)
    code, _, err = start("max_iters=0", "minutes=3", "resume=auto")
    assert code == 2 and "which is max_iters=0" in err and err.count("\n") == 1
