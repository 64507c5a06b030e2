"""centred_writers: what writes into the residual stream has no mean, so LayerNorm is RMSNorm."""

import pytest
import torch
from conftest import ROOT, SMALL

import train
from run.optim import stream_dimension
from run.setup import read_config, set_up
from run.watch import observe_next_batch

CENTRED = "centred_writers=true"
IN_PARTS = ["micro_batch_size=2", "watch=true"]


@pytest.fixture
def begin(tmp_path, data_folder):
    """begin('key=value', ...): a very small run before its first step."""

    def begin(*knobs):
        words = [*SMALL, f"dataset={data_folder / 'words'}", f"out_dir={tmp_path / 'run'}"]
        named = {word.partition("=")[0]: word for word in (*words, *knobs)}  # the last one wins
        return set_up(read_config([str(ROOT / "config" / "tiny.py"), *named.values()]))

    return begin


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def furthest(one, other):
    return max((weight - other[name]).abs().max().item() for name, weight in one.items())


def means(run):
    """name -> the largest mean of a row of the embedding, or of a column of another writer, as a
    share of the deviation of its numbers."""
    found = {}
    for name, weight in weights(run).items():
        if name.endswith(("out.weight", "down.weight", "embed.weight")):
            over = 1 if name == "embed.weight" else 0
            found[name] = (weight.mean(over).abs().max() / weight.std()).item()
    return found


EVERY_WAY = [
    ["optimizer=adamw"],
    ["optimizer=muon", "weight_decay=0.5"],
    ["tie_embeddings=true"],
    ["norm_pos=lns", "embed_scale=sqrt", "n_kv_head=1"],
    ["norm_pos=final", "ffn=gelu"],
]


@pytest.mark.parametrize("knobs", EVERY_WAY, ids=" ".join)
def test_both_norms_learn_and_compute_the_same_from_a_stream_without_a_mean(
    begin, monkeypatch, knobs
):
    # Muon would multiply in bfloat16 where there is such hardware, which rounds far more coarsely.
    monkeypatch.setattr("run.optim.choose_dtype", lambda *_: "float32")
    runs = [
        begin(f"norm={norm}", CENTRED, *IN_PARTS, *knobs)
        for norm in ("rmsnorm", "layernorm_nobias")
    ]
    for _ in range(5):
        losses = [train.train_step(run)[0] for run in runs]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    rms, layer = runs
    assert furthest(weights(rms), weights(layer)) < 1e-5
    for run in runs:
        assert max(observe_next_batch(run)["residual_mean_share"]) < 1e-6
    rms.model.load_state_dict(layer.model.state_dict())
    ids = torch.arange(32).view(1, 32) % 16
    assert torch.allclose(rms.model(ids), layer.model(ids), atol=1e-5)


def test_they_do_not_without_the_knob(begin):
    rms, layer = (begin(f"norm={norm}", *IN_PARTS) for norm in ("rmsnorm", "layernorm_nobias"))
    for run in (rms, layer):
        for _ in range(5):
            train.train_step(run)
    assert furthest(weights(rms), weights(layer)) > 1e-3
    assert max(observe_next_batch(rms)["residual_mean_share"]) > 0.01


def test_only_the_writers_are_centred_at_the_start(begin):
    plain, run = begin(), begin(CENTRED)
    assert len(means(run)) == 5 and max(means(run).values()) < 1e-6 < min(means(plain).values())
    before, after = weights(plain), weights(run)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == means(run).keys()


@pytest.mark.parametrize("knob", ["init_from={}", "branch={}", "resume=yes"])
def test_weights_that_were_trained_without_it_are_centred_before_the_first_step(
    start, begin, tmp_path, knob
):
    start("max_iters=4", out="trunk")
    own = {} if knob.startswith("init_from") else {"max_iters=8"}
    out = tmp_path / ("trunk" if knob == "resume=yes" else "run")
    run = begin(CENTRED, knob.format(tmp_path / "trunk"), f"out_dir={out}", *own)
    assert len(means(run)) == 5 and max(means(run).values()) < 1e-6


def overflow(run):
    """A loss scale with which every gradient is Inf, as float16 may make it."""
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)


def expect_no_spike(run):
    run.grad_norms = [1e-6] * 64


@pytest.mark.parametrize("cause", [overflow, expect_no_spike])
def test_a_skipped_update_changes_no_bit(begin, cause):
    run = begin(CENTRED, "skip_spikes=6")
    train.train_step(run)
    before = weights(run)
    cause(run)
    train.train_step(run)
    assert run.step == 2 and furthest(before, weights(run)) == 0


def test_what_may_write_into_the_stream_unknown_is_refused_by_name():
    readers = ("q_norm.gain", "q.weight", "k.lora_a", "gate.weight", "up.weight", "head.weight")
    assert {stream_dimension(f"blocks.0.ffn.{name}") for name in readers} == {None}
    assert stream_dimension("embed.weight") == 1 and stream_dimension("embed_scale.gain") is None
    for name in ("blocks.0.attn.out.lora_b", "blocks.0.ffn.down.bias", "blocks.0.moe.expert"):
        with pytest.raises(ValueError, match=f"whether the parameter {name} writes into the res"):
            stream_dimension(name)
