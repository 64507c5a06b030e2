"""The schedule at the points that define it, the groups, and the optimizers' state by name."""

import math

import pytest
import torch

from config.schema import Config
from model import Decoder, ModelConfig
from norm import EAGER
from run.optim import (
    SPIKE_LEAST,
    SPIKE_WINDOW,
    AdamW,
    Muon,
    Optimizers,
    group_of,
    orthogonalise,
    spike_threshold,
    with_norm,
)
from train import learning_rate_at


def rate_at(step, schedule, **knobs):
    given = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110, decay_fraction=0.2)
    return learning_rate_at(step, Config(lr_schedule=schedule, **given | knobs))


def build(optimizer="adamw", tied=False, norm="layernorm"):
    model = Decoder(
        ModelConfig(
            vocab_size=11,
            n_layer=2,
            n_embd=16,
            n_head=2,
            n_hidden=24,
            block_size=8,
            tie_embeddings=tied,
            norm=norm,
        )
    )
    return model, Optimizers(
        model, optimizer=optimizer, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95
    )


def step(model, optimizers, lr=1e-2, seed=0):
    x = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(x, x).backward()
    optimizers.set_lr(lr)
    for optimizer in optimizers:
        optimizer.step()
    optimizers.zero_grad()


@pytest.mark.parametrize(
    "schedule, points",
    [
        ("cosine", {0: 1 / 11, 9: 10 / 11, 10: 1.0, 60: 0.55, 110: 0.1}),
        ("linear", {0: 1 / 11, 10: 1.0, 35: 0.775, 60: 0.55, 110: 0.1}),
        ("wsd", {0: 1 / 11, 10: 1.0, 88: 1.0, 99: 0.55, 110: 0.1}),
        ("constant", {0: 1 / 11, 10: 1.0, 109: 1.0}),
    ],
)
def test_schedules_at_the_points_that_define_them(schedule, points):
    for at, wanted in points.items():
        assert rate_at(at, schedule) == pytest.approx(wanted), at


def test_wsd_that_decays_all_the_way_is_linear():
    for step in range(110):
        assert rate_at(step, "wsd", decay_fraction=1.0) == rate_at(step, "linear")


@pytest.mark.parametrize("kind", EAGER)
def test_what_belongs_to_a_norm_is_never_decayed_nor_given_to_muon(kind):
    model, optimizers = build("muon", norm=kind)
    muon, adamw = optimizers
    gains = {
        optimizers.names[p]
        for g in adamw.param_groups
        if g["weight_decay"] == 0
        for p in g["params"]
    }
    assert gains == {name for name, p in model.named_parameters() if p.ndim == 1} | {"embed.weight"}
    assert all(p.ndim == 2 for g in muon.param_groups for p in g["params"])
    step(model, optimizers)


def test_names_that_nobody_knows_are_not_taken_for_others():
    with pytest.raises(KeyError, match="sqrt"):
        rate_at(50, "sqrt")
    with pytest.raises(ValueError, match="optimizer=lion is not built here"):
        build("lion")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_step_moves_every_parameter(optimizer, tied):
    model, optimizers = build(optimizer, tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizers)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_gains_biases_and_the_embedding_are_not_decayed():
    model, optimizers = build()
    decay = {p: g["weight_decay"] for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        plain = name.startswith("embed") or name.endswith(("gain", "bias"))
        assert decay[parameter] == (0.0 if plain else 0.1), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["rmsnorm", "rmsnorm1p", "ssnorm", "derf"])
def test_gain_decay_takes_a_share_of_the_gains_and_of_nothing_else_that_a_norm_learns(
    kind, optimizer
):
    model, rules = build(norm=kind)[0], dict(weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95)
    optimizers = Optimizers(model, optimizer=optimizer, gain_decay=0.5, **rules)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 1}
    with torch.no_grad():
        model.norm.gain.fill_(3.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that nothing else moves it
    optimizers.set_lr(0.1)
    for each in optimizers:
        each.step()
    start = {"rmsnorm1p": 0.0}.get(kind, 1.0)  # zero, where rmsnorm1p multiplies by one, is kept
    assert torch.allclose(model.norm.gain, torch.tensor(0.95 * 3.0))
    assert torch.allclose(model.blocks[0].attn_norm.gain, torch.tensor(0.95 * start))
    for name, parameter in model.named_parameters():
        if name in before and (not name.endswith("gain") or "embed_scale" in name):
            assert torch.equal(parameter, before[name]), name


def test_embedding_and_head_learn_at_a_multiple_of_the_rate():
    model = build()[0]
    optimizers = Optimizers(
        model, optimizer="muon", weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95, embed_lr=4.0
    )
    optimizers.set_lr(0.5)
    rates = {p: g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert rates[parameter] == (2.0 if name.startswith(("embed", "head")) else 0.5), name


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model, optimizers = build("muon")
    muon, adamw = optimizers
    names = {p: n for n, p in model.named_parameters()}
    assert isinstance(muon, Muon) and isinstance(adamw, AdamW)
    for parameter in (p for g in muon.param_groups for p in g["params"]):
        assert names[parameter].startswith("blocks.") and parameter.ndim == 2


def test_muon_moves_a_matrix_as_far_as_adamw_would():
    model, optimizers = build("muon")
    before = model.blocks[0].ffn.up.weight.detach().clone()
    step(model, optimizers, lr=1e-2)
    moved = (model.blocks[0].ffn.up.weight - before * (1 - 1e-2 * 0.1)).square().mean().sqrt()
    assert (
        0.1e-2 < moved < 0.4e-2
    )  # 0.2 x the learning rate: the size of AdamW's steps in mid-training


SHAPES = [(16, 16), (32, 16), (16, 32), (32, 16), (24, 8)]


def muon_steps(make, shapes, steps=3):
    """The matrices after some steps with random gradients, which are those of a matrix's place in
    SHAPES.
    """

    def random(*seed, shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(hash(seed)))

    matrices = [torch.nn.Parameter(random(i, shape=SHAPES[i])) for i in shapes]
    optimizer = make(matrices)
    for step in range(steps):
        for i, p in zip(shapes, matrices, strict=True):
            p.grad = random(i, step + 1, shape=SHAPES[i])
        optimizer.step()
    return [p.detach() for p in matrices]


def our_muon(matrices):
    optimizer = Muon([{"params": matrices, "weight_decay": 0.1}], momentum=0.9)
    optimizer.param_groups[0]["lr"] = 0.02
    return optimizer


def test_muon_moves_as_pytorchs(monkeypatch):
    """PyTorch's computes in bfloat16, so about to its precision; ours in float32 here."""
    monkeypatch.setattr("run.optim.choose_dtype", lambda *_: "float32")
    ours = muon_steps(our_muon, range(5))
    theirs = muon_steps(
        lambda p: torch.optim.Muon(
            p, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        range(5),
    )
    for i, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
        start = muon_steps(our_muon, range(5), steps=0)[i]
        assert (mine - wanted).norm() < 0.03 * (wanted - start).norm(), SHAPES[i]


def test_a_matrix_moves_the_same_alone_and_with_others_of_its_shape(monkeypatch):
    together = muon_steps(our_muon, range(5))
    for i, matrix in enumerate(together):
        assert torch.allclose(muon_steps(our_muon, [i])[0], matrix, atol=1e-4), SHAPES[i]
    monkeypatch.setattr("run.optim.ELEMENTS_AT_ONCE", 2 * 32 * 16)  # two of three at once
    for some, matrix in zip(muon_steps(our_muon, range(5)), together, strict=True):
        assert torch.allclose(some, matrix, atol=1e-4)


def test_orthogonal_matrices_have_singular_values_near_one_and_the_same_vectors():
    x = torch.randn(3, 20, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x / x.norm(dim=(1, 2), keepdim=True), full_matrices=False)
    after = u.mT @ orthogonalise(u @ (s.unsqueeze(-1) * v)) @ v.mT
    values = after.diagonal(dim1=1, dim2=2)
    assert (after - torch.diag_embed(values)).abs().max() < 1e-12
    assert 0.6 < values.min() and values.max() < 1.3


def test_a_matrix_without_a_gradient_stays():
    matrices = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    matrices[0].grad = torch.eye(4)
    our_muon(matrices).step()
    assert matrices[0][0, 0] != 1 and torch.equal(matrices[1].detach(), torch.ones(4, 4))


@pytest.mark.parametrize("scaled", [False, True])
def test_adamw_moves_as_pytorchs_bit_for_bit(scaled):
    """With a GradScaler, too, which leaves out a step whose gradient overflowed."""
    (model, optimizers), (twin, other) = build(), build()
    optimizers.set_lr(1e-2)
    groups = [{**group, "lr": 1e-2} for group in other.all[0].param_groups]
    pytorchs = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for trained, optimizer in ((model, optimizers.all[0]), (twin, pytorchs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for seed in range(4):
            x = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(seed))
            scaler.scale(trained(x, x)).backward()
            if scaled and seed == 2:
                trained.embed.weight.grad[3, 4] = math.inf
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            trained.zero_grad()
    assert not torch.equal(model.embed.weight, build()[0].embed.weight)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


def test_an_unknown_parameter_is_refused_by_name():
    with pytest.raises(ValueError, match="extra.weight"):
        group_of("extra.weight", torch.zeros(2, 2))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_survives_a_round_trip_by_name(optimizer):
    model, optimizers = build(optimizer)
    step(model, optimizers)
    twin, others = build(optimizer)
    twin.load_state_dict(model.state_dict())
    others.load_state_dict(optimizers.state_dict())
    for seed in (1, 2):
        step(model, optimizers, seed=seed)
        step(twin, others, seed=seed)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_state_of_the_wrong_shape_or_name_is_refused():
    model, optimizers = build()
    step(model, optimizers)
    state = optimizers.state_dict()
    wrong = {name: dict(per) for name, per in state.items()}
    wrong["embed.weight"]["exp_avg"] = torch.zeros(3, 16)
    with pytest.raises(
        ValueError, match=r"exp_avg of embed.weight is \[3, 16\], but \[11, 16\] is wanted"
    ):
        build()[1].load_state_dict(wrong)
    with pytest.raises(ValueError, match="missing .*unknown"):
        build()[1].load_state_dict({("x" if n == "norm.gain" else n): s for n, s in state.items()})
    for key in ("step", "exp_avg", "exp_avg_sq"):
        less = {name: {k: t for k, t in per.items() if k != key} for name, per in state.items()}
        with pytest.raises(ValueError, match=f"does not fit the model: it lacks {key} of "):
            build()[1].load_state_dict(less)
    with pytest.raises(ValueError, match="it has a surplus exp_avg of blocks"):
        build("muon")[1].load_state_dict(state)
    wrong["embed.weight"]["exp_avg"] = torch.zeros(())
    with pytest.raises(ValueError, match=r"exp_avg of embed.weight is \[\], but"):
        build()[1].load_state_dict(wrong)


def test_a_spike_is_so_many_standard_deviations_above_the_recent_mean():
    recent = [1.0, 3.0] * (SPIKE_LEAST // 2)  # mean 2, standard deviation 1
    assert [spike_threshold(recent, limit) for limit in (6, 2)] == pytest.approx([8, 4])


def test_nothing_is_a_spike_without_the_rule_or_without_a_past():
    assert (
        spike_threshold([1.0, 3.0] * 64, 0)
        == spike_threshold([1.0] * (SPIKE_LEAST - 1), 6)
        == math.inf
    )
    assert spike_threshold([1.0] * SPIKE_LEAST, 6) == 1


def test_spikes_do_not_hide_the_next_but_a_new_level_is_accepted():
    recent, skipped = [1.0, 3.0] * 64, 0
    for _ in range(100):
        skipped += 1000.0 > (threshold := spike_threshold(recent, 6))
        recent = with_norm(recent, 1000.0, threshold)
    assert 20 < skipped < 60 and len(recent) == SPIKE_WINDOW


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_room_for_moments_is_what_the_first_step_adds(optimizer):
    model, optimizers = build(optimizer)
    room = sum(t.numel() for t in optimizers.reserve_moments())
    step(model, optimizers)
    state = [t for per in optimizers.state_dict().values() for t in per.values() if t.ndim]
    assert room == sum(t.numel() for t in state) and optimizers.reserve_moments() == []
