"""A look into the model: that it sees what is there, and that nobody notices."""

import json
import math

import pytest
import torch
from conftest import slow, tracker_to
from test_train import during_step

import train
from model import Decoder, ModelConfig, rotate
from run import watch as recording
from run.log import flat_numbers
from run.machine import autocast
from run.metrics import METRICS_FILE, has_evaluation, plot_losses, read_metrics
from weights import checkpoint

TINY = dict(
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=16,
    n_hidden=24,
    block_size=8,
    vocab_size=11,
    dropout=0.3,
)


def model_and_batch(**changes):
    """A model whose matrices and gains are all of them far from where they start, and a batch [3,
    8] for it.
    """
    model = Decoder(ModelConfig(**TINY | changes))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    ids = torch.randint(11, (3, 9), generator=draw)
    return model, ids[:, :-1], ids[:, 1:]


@torch.no_grad()
def streams(model, ids):
    """The residual stream before each Block and after the last, computed from the outside."""
    model.eval()
    x = [model.dropout(model.embed_scale(model.embed(ids)))]
    for block in model.blocks:
        x.append(block(x[-1], model.cos[:8], model.sin[:8]))
    return x


def root_mean_square(x):
    return x.detach().double().square().mean().sqrt().item()


def records_of(folder):
    return [r for r in read_metrics(folder) if "watch" in r]


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm": "layernorm"}, {"norm_pos": "post"}, {"norm_pos": "final"}, {"norm": "dyt"}],
    ids=str,
)
def test_the_residual_stream_is_measured_before_each_block_and_after_the_last(changes):
    model, *batch = model_and_batch(**changes)
    seen, x = recording.observe(model, *batch), streams(model, batch[0])
    assert seen["residual_rms"] == pytest.approx([root_mean_square(h) for h in x])
    assert seen["residual_mean_share"] == pytest.approx(
        [root_mean_square(h.mean(-1)) / root_mean_square(h) for h in x]
    )


def test_a_stream_that_is_all_mean_has_a_share_of_one_and_a_centred_one_of_none():
    model, *batch = model_and_batch()
    with torch.no_grad():
        model.embed.weight.fill_(3.0)
    assert recording.observe(model, *batch)["residual_mean_share"][0] == pytest.approx(1)
    with torch.no_grad():
        model.embed.weight[:, ::2] = -3.0
    assert recording.observe(model, *batch)["residual_mean_share"][0] == 0


def test_the_largest_attention_logit_is_what_brute_force_finds():
    model, *batch = model_and_batch()
    largest = []
    for block, x in zip(model.blocks, streams(model, batch[0]), strict=False):
        h = block.attn_norm(x)
        q, k = (
            rotate(linear(h).view(3, 8, -1, 4).transpose(1, 2), model.cos[:8], model.sin[:8])
            for linear in (block.attn.q, block.attn.k)
        )  # [B, H, T, D] and [B, K, T, D]
        largest.append(
            max(
                abs((q[b, head, t] @ k[b, head // 2, s]).detach()).item() / math.sqrt(4)
                for b in range(3)
                for head in range(4)
                for t in range(8)
                for s in range(t + 1)
            )
        )
    assert recording.observe(model, *batch)["attn_logit_max"] == pytest.approx(largest)


@pytest.mark.parametrize("at_once", [recording.LOGITS_AT_ONCE, 8, 1])
def test_a_large_logit_of_a_key_in_the_future_does_not_count_and_a_negative_one_does(at_once):
    q, k = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    q[0, 0, 1, 0], k[0, 0, 2, 0], k[0, 0, 1, 0] = 1.0, 100.0, -6.0
    assert recording.largest_logit(q, k, at_once=at_once).item() == 3.0


def test_logits_are_those_after_the_norm_of_queries_and_keys():
    model, *batch = model_and_batch(qk_norm=True)
    before = recording.observe(model, *batch)["attn_logit_max"]
    with torch.no_grad():
        model.blocks[0].attn.q_norm.gain *= 2
    after = recording.observe(model, *batch)["attn_logit_max"]
    assert after[0] == pytest.approx(2 * before[0])


def test_the_feed_forward_is_measured_where_down_reads():
    model, *batch = model_and_batch()
    seen, inside = recording.observe(model, *batch)["ffn_rms"], []
    for block in model.blocks:
        block.ffn.down.register_forward_pre_hook(
            lambda _, inputs: inside.append(root_mean_square(inputs[0]))
        )
    streams(model, batch[0])
    assert seen == pytest.approx(inside)


def parts_of_feed_forwards(model, ids):
    """Of each Block what the feed-forward reads and writes, what enters its activation, and what
    `down` reads: float64 [3, 8, ...]."""
    found = []
    for block in model.blocks:
        ffn, own = block.ffn, {}
        found.append(own)
        ffn.register_forward_hook(
            lambda _, inputs, y, own=own: own.update(x=inputs[0].double(), y=y.double())
        )
        (ffn.gate or ffn.up).register_forward_hook(lambda _, __, z, own=own: own.update(z=z))
        ffn.down.register_forward_pre_hook(
            lambda _, inputs, own=own: own.update(inside=inputs[0].double())
        )
    streams(model, ids)
    return found


def kurtosis_by_hand(x):
    values = x.flatten().tolist()
    mean = sum(values) / len(values)
    second, fourth = (sum((v - mean) ** n for v in values) / len(values) for n in (2, 4))
    return fourth / second**2 - 3


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm": "layernorm", "ffn": "gelu"}, {"norm_pos": "out", "ffn": "relu2"}],
    ids=str,
)
def test_the_feed_forward_is_measured_where_it_reads_and_where_it_writes(changes):
    model, *batch = model_and_batch(**changes)
    seen, parts = recording.observe(model, *batch), parts_of_feed_forwards(model, batch[0])
    by_hand = {
        "ffn_in_mean": lambda p: p["x"].mean(),
        "ffn_in_sd": lambda p: (p["x"] - p["x"].mean()).square().mean().sqrt(),
        "ffn_in_mean_rms": lambda p: p["x"].mean(-1).square().mean().sqrt(),
        "ffn_out_mean": lambda p: p["y"].mean(),
        "ffn_out_sd": lambda p: (p["y"] - p["y"].mean()).square().mean().sqrt(),
        "ffn_out_negative": lambda p: (p["y"] < 0).sum() / p["y"].numel(),
        "ffn_kurtosis": lambda p: kurtosis_by_hand(p["inside"]),
    }
    for name, wanted in by_hand.items():
        assert seen[name] == pytest.approx([float(wanted(p)) for p in parts], rel=1e-4), name


@pytest.mark.parametrize("ffn", ["swiglu", "geglu", "gelu", "relu2"])
def test_a_gate_is_closed_below_a_tenth_of_what_it_could_let_through_and_open_above_nine(ffn):
    model, *batch = model_and_batch(ffn=ffn)
    seen, parts = recording.observe(model, *batch), parts_of_feed_forwards(model, batch[0])
    for layer, z in enumerate(part["z"].double() for part in parts):
        share = model.blocks[layer].ffn.activation(z) / z
        if ffn == "relu2":  # this share grows without an end, but it begins where the gate opens
            share = (share > 0).double()
        for name, of in (("closed", share < 0.1), ("open", share > 0.9)):
            wanted = of.double().mean().item()
            assert wanted > 0 and seen[f"ffn_gate_{name}"][layer] == pytest.approx(wanted)


def test_excess_kurtosis_of_numbers_known_by_hand():
    """Two points have 1 - 3, one among n zeros n^2 / (n - 1) - 6, a normal distribution 0."""
    one_of = torch.zeros(100)
    one_of[7] = -5.0
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    assert recording.excess_kurtosis(torch.tensor([3.0, 5.0])).item() == pytest.approx(-2)
    assert recording.excess_kurtosis(one_of).item() == pytest.approx(100**2 / 99 - 6)
    assert recording.excess_kurtosis(1e12 * normal + 5).item() == pytest.approx(0, abs=0.05)
    assert math.isnan(recording.excess_kurtosis(torch.ones(5)).item())


def test_every_parameter_of_a_norm_is_recorded_not_gains_alone():
    model, *batch = model_and_batch(norm="derf")
    seen = recording.observe(model, *batch)
    for name in ("gain", "bias", "alpha", "shift"):
        own = [getattr(block.ffn_norm, name).detach().double() for block in model.blocks]
        assert seen[f"ffn_norm_{name}_mean"] == pytest.approx([x.mean().item() for x in own])
        deviations = [(x - x.mean()).square().mean().sqrt().item() for x in own]
        assert seen[f"ffn_norm_{name}_sd"] == pytest.approx(deviations, abs=1e-7)
        assert seen[f"norm_{name}_max"] == [getattr(model.norm, name).max().item()]


def test_gains_go_by_the_path_of_their_norm():
    model, *batch = model_and_batch(qk_norm=True, norm_pos="sandwich")
    seen = recording.observe(model, *batch)
    blocks = {
        "attn_norm",
        "attn.q_norm",
        "attn.k_norm",
        "ffn_norm",
        "attn_norm_out",
        "ffn_norm_out",
    }
    assert {name.rpartition("_gain_")[0] for name in seen if "_gain_" in name} == blocks | {"norm"}
    for role in blocks:
        gains = [block.get_submodule(role).gain for block in model.blocks]
        assert seen[f"{role}_gain_min"] == [gain.min().item() for gain in gains]
        assert seen[f"{role}_gain_mean"] == pytest.approx([gain.mean().item() for gain in gains])
        assert seen[f"{role}_gain_max"] == [gain.max().item() for gain in gains]
    assert seen["norm_gain_max"] == [model.norm.gain.max().item()]


def test_whatever_a_norm_learns_is_watched():
    model, *batch = model_and_batch(norm="derf", qk_norm=True)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.attn.q_norm.alpha.fill_(0.5 + i)
        model.norm.bias[3] = -2.0
    seen = recording.observe(model, *batch)
    assert seen["attn.q_norm_alpha_max"][:2] == [0.5, 1.5] and seen["norm_bias_min"] == [-2.0]
    assert {name for name in seen if "shift" in name} >= {"ffn_norm_shift_mean"}


@pytest.mark.parametrize("norm", ["none", "rmsnorm_noparam"])
def test_norms_without_gains_have_none(norm):
    model, *batch = model_and_batch(norm=norm)
    assert not [
        name
        for name in recording.observe(model, *batch)
        if "gain" in name or name == "norm_grad_norm"
    ]


def test_the_scale_of_the_embedding_is_no_norm():
    model, *batch = model_and_batch(norm="dyt")
    seen = recording.observe(model, *batch)
    assert "norm_gain_mean" in seen
    assert "embed_scale_grad_norm" in seen
    assert "embed_scale_gain_mean" not in seen


@pytest.mark.parametrize("dtype, scale", [("float32", 1.0), ("float32", 1024.0), ("bfloat16", 1.0)])
@pytest.mark.parametrize("tied", [False, True])
def test_gradient_norms_are_those_of_a_backward_by_hand(dtype, scale, tied):
    model, *batch = model_and_batch(tie_embeddings=tied)
    seen = recording.observe(model, *batch, dtype, scale)
    model.eval()
    with autocast("cpu", dtype):
        loss = model(*batch)
    loss.backward()
    parts = {
        "embed": [model.embed],
        "blocks": model.blocks,
        "norm": [model.norm],
        "head": [model.head],
    }
    if tied:
        del parts["head"]
    for name, modules in parts.items():
        by_hand = [
            math.sqrt(sum(p.grad.double().square().sum() for p in module.parameters()))
            for module in modules
        ]
        assert seen[f"{name}_grad_norm"] == pytest.approx(by_hand, rel=1e-5)
    assert {name for name in seen if name.endswith("grad_norm")} == {
        f"{name}_grad_norm" for name in parts
    }


def test_activation_checkpointing_is_kept_and_changes_no_number():
    model, *batch = model_and_batch()
    plain, forwards = recording.observe(model, *batch), []
    for block in model.blocks:
        block.ffn.up.register_forward_hook(lambda *_: forwards.append(1))
    model.activation_checkpointing = True
    assert recording.observe(model, *batch) == plain
    assert len(forwards) == 2 * len(model.blocks)  # once more in backward


@pytest.mark.parametrize("training", [True, False])
def test_a_look_leaves_no_trace(training):
    model, *batch = model_and_batch()
    model.train(training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
    recording.observe(model, *batch)
    assert all(
        torch.equal(p, w) and (p.grad == 1).all()
        for p, w in zip(model.parameters(), weights, strict=True)
    )
    assert torch.equal(random, torch.get_rng_state())
    assert all(
        module.training == training and not module._forward_hooks for module in model.modules()
    )


def raise_at(module, error, when):
    """The module raises the error if when(its first input)."""

    def act(_, inputs):
        if when(inputs[0]):
            raise error

    return module.register_forward_pre_hook(act)


def test_a_look_that_fails_leaves_no_trace_either():
    model, *batch = model_and_batch()
    hook = raise_at(model.blocks[1].ffn, ZeroDivisionError(), lambda x: True)
    with pytest.raises(ZeroDivisionError):
        recording.observe(model, *batch)
    hook.remove()
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_too_little_gpu_memory_means_fewer_sequences():
    model, ids, targets = model_and_batch()
    one, full = recording.observe(model, ids[:1], targets[:1]), torch.cuda.OutOfMemoryError("full")
    hook = raise_at(model, full, lambda ids: len(ids) > 1)
    assert recording.observe(model, ids, targets) == one
    hook.remove()
    raise_at(model, full, lambda ids: True)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        recording.observe(model, ids, targets)


@pytest.mark.parametrize(
    "knobs",
    [
        ["norm=layernorm", "n_kv_head=1", "activation_checkpointing=true"],
        ["dtype=bfloat16", "optimizer=muon", "qk_norm=true", "tie_embeddings=true"],
        slow([]),
        slow(["norm=none", "learning_rate=1e-4"]),
    ],
)
def test_a_watched_run_is_bitwise_the_same_run(start, tmp_path, knobs):
    knobs = ["dropout=0.1", "micro_batch_size=2", "log_interval=2", *knobs]
    assert start(*knobs)[0] == 0
    assert start(*knobs, "watch=true", out="watched")[0] == 0
    losses = [
        [
            (r["step"], r["loss"], r["grad_norm"])
            for r in read_metrics(tmp_path / name)
            if "loss" in r
        ]
        for name in ("run", "watched")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    plain, watched = (checkpoint.load_newest(tmp_path / name) for name in ("run", "watched"))
    assert [
        name
        for name, weight in plain["model"].items()
        if not torch.equal(weight, watched["model"][name])
    ] == []
    assert plain["best_val_loss"] == watched["best_val_loss"]
    assert not records_of(tmp_path / "run") and records_of(tmp_path / "watched")


def test_records_come_with_the_log_lines_and_tell_of_the_weights_before_the_step(start, tmp_path):
    assert start("watch=true", "log_interval=5", "grad_clip=0")[0] == 0
    records = read_metrics(tmp_path / "run")
    steps = [r["step"] for r in records if "loss" in r]
    assert steps == [r["step"] for r in records if "watch" in r] == [1, 5, 10, 12]
    for (
        step
    ) in steps:  # the same batch and the same weights: without dropout even the same gradient
        scales = next(r["watch"] for r in records if r["step"] == step and "watch" in r)
        parts = [x for name, values in scales.items() if name.endswith("grad_norm") for x in values]
        whole = next(r["grad_norm"] for r in records if r["step"] == step and "loss" in r)
        assert math.sqrt(sum(x * x for x in parts)) == pytest.approx(whole, rel=1e-4)
    assert records_of(tmp_path / "run")[0]["watch"]["attn_norm_gain_mean"] == [1.0, 1.0]
    assert has_evaluation(records, 12) and plot_losses(tmp_path / "run")


def test_only_the_first_micro_batch_is_looked_at(start, monkeypatch):
    sizes, observe = [], recording.observe
    monkeypatch.setattr(
        recording,
        "observe",
        lambda m, x, y, *rest: (sizes.append((x.shape, y.shape)), observe(m, x, y, *rest))[1],
    )
    start("watch=true", "micro_batch_size=2", "max_iters=2")
    assert sizes == [((2, 32), (2, 32))] * 2


def test_the_plain_model_is_looked_at_not_its_compiled_twin(start, monkeypatch):
    class Twin(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *batch):
            assert not any(module._forward_hooks for module in self.model.modules())
            return self.model(*batch)

    monkeypatch.setattr(torch, "compile", lambda model, **_: Twin(model))
    assert start("watch=true", "compile=true")[0] == 0


def test_a_resumed_run_has_each_record_once(start, tmp_path, monkeypatch):
    knobs = ["watch=true", "log_interval=3", "dropout=0.1"]
    assert start(*knobs, out="whole")[0] == 0

    def die():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        during_step(patch, 12, die)
        with pytest.raises(KeyboardInterrupt):
            start(*knobs)
    assert [r["step"] for r in records_of(tmp_path / "run")] == [
        1,
        3,
        6,
        9,
        12,
    ]  # 12 was seen, but not done
    assert start(*knobs, "resume=yes")[0] == 0  # from step 8
    assert records_of(tmp_path / "run") == records_of(tmp_path / "whole")


def test_nan_is_recorded_as_null_and_still_stops_the_run(start, tmp_path, monkeypatch):
    step = train.train_step

    def damage(run, interrupts):
        results = step(run, interrupts)
        if run.step == 5:
            run.model.blocks[1].ffn.up.weight.data[0, 0] = math.nan
        return results

    monkeypatch.setattr(train, "train_step", damage)
    code, _, err = start("watch=true", "eval_interval=0")
    assert code == 3 and "at step 6: stopped before the update" in err
    lines = (tmp_path / "run" / METRICS_FILE).read_text().splitlines()
    last = [json.loads(line, parse_constant=pytest.fail) for line in lines][-1]
    assert last["step"] == 6 and last["watch"]["blocks_grad_norm"] == [None, None]
    assert None not in last["watch"]["residual_rms"][:2]
    assert last["watch"]["residual_rms"][2] is None


def test_trackers_get_numbers_alone(start, monkeypatch):
    from run import log as metrics

    assert flat_numbers({"step": 3, "loss": 2.0}) == {"step": 3, "loss": 2.0}
    assert flat_numbers({"step": 3, "watch": {"rms": [1.0, None, 5.0]}}) == {
        "step": 3,
        "watch/rms/0": 1.0,
        "watch/rms/2": 5.0,
    }
    sent = []
    monkeypatch.setitem(metrics.TRACKERS, "tensorboard", lambda folder, knobs: tracker_to(sent))
    assert start("watch=true", "tracker=tensorboard", "max_iters=2")[0] == 0
    assert any("watch/residual_rms/2" in record for record in sent)
    assert all(isinstance(value, (int, float)) for record in sent for value in record.values())
