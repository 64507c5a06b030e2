"""norm=tapernorm: the norms of the Blocks are faded into fixed factors while a model trains."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL, slow
from test_train import assert_same_run, signal_after

import train
from model import Decoder
from norm import fading_norms, gate_at, tapernorm
from run.metrics import read_metrics
from run.setup import read_config, set_up
from run.taper import taper
from sample import main as sample_main
from weights import checkpoint
from weights.open import load_model

FADE = ("norm=tapernorm", "taper_start=4", "taper_end=10")  # of 12 steps
FOLDED = {"attn": ("q", "k", "v"), "ffn": ("gate", "up")}  # the matrices behind each norm


@pytest.fixture
def make_run(tmp_path, data_folder):
    def make_run(*knobs):
        usual = [*SMALL, f"dataset={data_folder / 'words'}", f"out_dir={tmp_path / 'run'}"]
        words = {word.split("=")[0]: word for word in (*usual, *(knobs or FADE))}
        return set_up(read_config([str(ROOT / "config" / "tiny.py"), *words.values()]))

    return make_run


def val_losses(folder):
    return {r["step"]: r["val_loss"] for r in read_metrics(folder) if "val_loss" in r}


def test_by_hand():
    x, gain = torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.tensor(2.0)  # its RMS is 2.5
    for gate, factor in ((1.0, 1 / 2.5), (0.25, 0.25 / 2.5 + 0.75 * 0.1), (0.0, 0.1)):
        y = tapernorm(x, gain, torch.tensor(0.1).log(), 0.0, gate)
        assert torch.allclose(y, 2 * factor * x)


def test_the_gate_falls_as_half_a_cosine():
    gates = [gate_at(step, 10, 16) for step in (0, 9, 10, 12, 13, 14, 16, 99)]
    assert gates == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25, 0, 0], abs=1e-15)
    assert gates[2] == 1 and gates[-1] == 0  # exactly


def test_until_it_fades_it_is_rmsnorm_bit_for_bit(make_run):
    # Else the gradients of log_scale, which are 0, change in which order the others are summed.
    unclipped = "grad_clip=0"
    faded, plain = make_run(*FADE, unclipped), make_run("norm=rmsnorm", unclipped)
    for step in range(6):
        taper(faded)
        losses = [train.train_step(run)[0] for run in (faded, plain)]
        assert (losses[0] == losses[1]) == (step < 5)  # at 4 the gate is still 1
        if step < 4:
            others = dict(plain.model.named_parameters())
            for name, parameter in faded.model.named_parameters():
                if name.endswith("log_scale"):
                    assert (parameter == 0).all()
                else:
                    assert torch.equal(parameter, others[name])


def test_the_factor_is_the_one_with_the_least_square_difference(make_run):
    run = make_run(*FADE, "micro_batch_size=2")
    for _ in range(4):
        train.train_step(run)
    norm, inputs = run.model.blocks[1].ffn_norm, []
    hook = norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        run.model(*train.windows_of(run, run.step))  # the batch of the next step, whole
        hook.remove()
        taper(run)
        x, eps, y = inputs[0].double(), norm.constants["eps"], norm.double()

    def difference(change):
        branches = (y.function(x, y.gain, y.log_scale + change, eps, gate) for gate in (1.0, 0.0))
        one, other = branches
        return (one - other).square().sum()

    assert difference(0) < min(difference(1e-3), difference(-1e-3))
    # of a parabola: where its lowest point is, from three points
    low, mid, high = (difference(change).item() for change in (-1e-2, 0, 1e-2))
    assert abs(1e-2 * (low - high) / (low - 2 * mid + high) / 2) < 1e-4


def test_in_the_end_a_model_without_norms_in_its_blocks_computes_the_same(start, tmp_path):
    assert start(*FADE)[0] == 0
    model, _, _ = load_model(tmp_path / "run")
    plain = Decoder(replace(model.config, norm="rmsnorm", norm_pos="final")).eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name])
        for block, faded in zip(plain.blocks, model.blocks, strict=True):
            for branch, matrices in FOLDED.items():
                norm = getattr(faded, f"{branch}_norm")
                for matrix in matrices:
                    weight = getattr(getattr(block, branch), matrix).weight
                    weight *= norm.log_scale.exp() * norm.gain
        ids = torch.arange(64).view(2, 32) % model.config.vocab_size
        assert torch.allclose(plain(ids), model(ids), atol=1e-5)
        for norm in fading_norms(model):
            norm.gate.fill_(1.0)
        assert not torch.allclose(plain(ids), model(ids), atol=1e-2)  # so the gate counts


@pytest.mark.parametrize("step", [4, 6, 12])
def test_a_checkpoint_has_the_gate_of_its_step(start, tmp_path, data_folder, capsys, step):
    knobs = ("eval_interval=2", "eval_iters=0", "save_interval=2", "keep=9")
    assert start(*FADE, *knobs)[0] == 0
    trained = val_losses(tmp_path / "run")[step]
    words = [str(tmp_path / "run"), "eval=val", "dtype=float32", f"checkpoint={step}"]
    sample_main([*words, f"dataset={data_folder / 'words'}"])
    assert f"{trained:.6f} nats" in capsys.readouterr().out
    gate = gate_at(step, 4, 10)
    model, _, _ = load_model(tmp_path / "run", str(step))
    assert all(norm.gate.item() == pytest.approx(gate) for norm in fading_norms(model))


@pytest.mark.parametrize("stop", [4, 5, 8])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(start, tmp_path, monkeypatch, stop):
    knobs = (*FADE, "optimizer=muon", "eval_interval=1", "eval_iters=2")
    assert start(*knobs, out="whole")[0] == 0
    with monkeypatch.context() as patch:
        signal_after(patch, step=stop)
        assert start(*knobs)[0] == 143
    assert checkpoint.load_newest(tmp_path / "run")["step"] == stop
    assert start(*knobs, "resume=yes")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_what_it_begins_with_cannot_change_later(start):
    assert start(*FADE, "max_iters=11")[0] == 0
    code, _, err = start(*FADE, "taper_start=3", "resume=yes")
    assert code == 2 and "taper_start: checkpoint=4, now=3" in err


def test_one_graph_serves_all_gates(make_run, no_code):
    run = make_run(*FADE, "compile=true")
    train.warm_up(run)
    torch._dynamo.utils.counters.clear()
    for _ in range(11):
        taper(run)
        train.train_step(run)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("way", [slow("compile=true"), slow("norm_impl=compile")])
def test_compiled_it_learns_the_same(make_run, way):
    run, plain = make_run(*FADE, way), make_run()
    for _ in range(11):
        for each in (run, plain):
            taper(each)
        losses = [train.train_step(each)[0] for each in (run, plain)]
        assert math.isclose(*losses, rel_tol=1e-4)
