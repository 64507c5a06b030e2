"""branch=: a run goes on elsewhere from where another one was, bit for bit."""

import pytest
import torch
from test_train import assert_same_run

from run.metrics import read_metrics
from weights import checkpoint

TRUNK = ("save_interval=2", "keep=9", "eval_interval=4", "log_interval=1")


def trunk(start, *more):
    assert start("max_iters=8", *TRUNK, *more, out="trunk")[0] == 0


@pytest.mark.parametrize("more", [(), ("optimizer=muon", "dropout=0.1", "skip_spikes=6")])
def test_a_branch_with_nothing_changed_is_bitwise_the_trunk(start, tmp_path, more):
    trunk(start, *more)
    place = tmp_path / "trunk" / "ckpt_00000004.pt"
    code, out, err = start("max_iters=8", *TRUNK, *more, f"branch={place}", out="twin")
    assert code == 0 and err == "" and f"branching off at step 4 of {place.parent}\n" in out
    assert_same_run(tmp_path / "trunk", tmp_path / "twin")


def test_branches_have_other_schedules_and_the_trunk_stays_as_it_is(start, tmp_path):
    trunk(start, "lr_schedule=constant")
    before = {p.name: p.read_bytes() for p in (tmp_path / "trunk").iterdir() if p.is_file()}
    for decay, out in (("0.5", "late"), ("1.0", "soon")):
        knobs = ("lr_schedule=wsd", f"decay_fraction={decay}", "max_iters=6")
        place = tmp_path / "trunk" / "ckpt_00000002.pt"
        assert start(*TRUNK, *knobs, f"branch={place}", out=out)[0] == 0
    rates = {
        name: {r["step"]: r["lr"] for r in read_metrics(tmp_path / name) if "lr" in r}
        for name in ("trunk", "late", "soon")
    }
    assert rates["late"].keys() == rates["soon"].keys() == set(range(1, 7))
    for name in ("late", "soon"):  # the trunk's records up to the branch, then its own
        assert all(rates[name][step] == rates["trunk"][step] for step in (1, 2))
    assert rates["soon"][4] < rates["late"][4] == rates["trunk"][4]
    assert {p.name: p.read_bytes() for p in (tmp_path / "trunk").iterdir()} == before


def test_a_branch_has_a_best_checkpoint_of_its_own_even_if_the_trunks_was_better(start, tmp_path):
    trunk(start)
    worse = ("learning_rate=0.3", "grad_clip=0", f"branch={tmp_path / 'trunk'}")
    assert start("max_iters=12", *TRUNK, *worse, out="other")[0] == 0
    best = [checkpoint.load(tmp_path / name / "best.pt") for name in ("trunk", "other")]
    assert best[0]["best_val_loss"] < best[1]["best_val_loss"]


def test_a_branch_that_stopped_goes_on_by_itself_when_the_trunk_is_gone(start, tmp_path):
    trunk(start)
    place = tmp_path / "trunk"
    knobs = (*TRUNK, "lr_schedule=constant", f"branch={place}")
    assert start("max_iters=12", *knobs, out="whole")[0] == 0
    assert start("max_iters=10", *knobs, out="parts")[0] == 0
    place.rename(tmp_path / "elsewhere")
    again = ("max_iters=12", *knobs, "resume=auto")
    code, out, err = start(*again, out="parts")
    assert code == 0 and "branching off" not in out and "missing" not in err
    whole, parts = (
        checkpoint.load(checkpoint.path_of(tmp_path / name, 12)) for name in ("whole", "parts")
    )
    assert all(torch.equal(w, parts["model"][n]) for n, w in whole["model"].items())


@pytest.mark.parametrize(
    "branch, said",
    [
        ("{}/none", "none does not exist: name a checkpoint of a run, or its folder"),
        ("{}/trunk/best.pt", "best.pt has no optimizer state"),
        ("{}/empty", "no sound checkpoint in"),
        ("{}/trunk", "has done 8 steps, and max_iters=8 counts them, too: set a larger one"),
    ],
)
def test_what_no_training_can_go_on_from_is_refused(start, tmp_path, branch, said):
    trunk(start)
    (tmp_path / "empty").mkdir()
    code, _, err = start("max_iters=8", f"branch={branch.format(tmp_path)}", out="other")
    assert code == 2 and said in err and err.count("\n") == 1
    assert not list((tmp_path / "other").glob("ckpt*"))


def test_what_would_make_it_another_run_is_refused(start, tmp_path):
    trunk(start)
    place = tmp_path / "trunk"
    code, _, err = start(f"branch={place}", "max_iters=9", "n_embd=48", out="other")
    assert code == 2 and "n_embd: checkpoint=32, now=48" in err
    assert start(f"branch={place}", "max_iters=9", out="other")[0] == 0
    code, _, err = start("max_iters=9", "resume=auto", out="other")
    assert code == 2 and f"was begun with branch={place}: put branch back" in err
    code, _, err = start(f"branch={place}", "max_iters=9", "resume=auto", out="trunk")
    assert code == 2 and "was begun without branch: leave it out" in err


def test_a_run_of_adapters_is_no_trunk(start, tmp_path):
    trunk(start)
    place = tmp_path / "trunk" / "ckpt_00000008.pt"
    state = checkpoint.load(place)
    checkpoint.save(place, state | {"config": state["config"] | {"lora_rank": 2}})
    code, _, err = start(f"branch={place}", "max_iters=9", out="other")
    assert code == 2 and "is a run of adapters" in err


def test_the_checkpoints_of_every_so_many_steps_stay(start, tmp_path):
    knobs = ("save_interval=2", "keep=1", "keep_every=4", "eval_interval=0")
    assert start("max_iters=11", *knobs)[0] == 0
    assert [step for step, _ in checkpoint.all_in(tmp_path / "run")] == [4, 8, 11]
    for wrong in ("keep_every=3", "keep_every=4 save_interval=0"):
        code, _, err = start(*knobs[:2], "max_iters=4", *wrong.split(), out="other")
        assert code == 2 and "must be a multiple of save_interval=" in err
