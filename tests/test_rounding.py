"""Simulated quantisation: each rounding against numbers known by hand, and what it leaves alone."""

import copy

import pytest
import torch
from test_quantize import IDS, random, small

from weights.rounding import KINDS, round_to_grid, round_to_ternary, simulate_quantization


def test_a_row_is_rounded_to_multiples_of_its_own_scale():
    """With 4 bits the largest |element| is 7 steps: 0.5 and 10 here."""
    x = torch.tensor([[3.5, -0.2, 0.3, -1.3], [-70.0, 4.0, 6.0, 34.0]])
    wanted = torch.tensor([[3.5, 0.0, 0.5, -1.5], [-70.0, 0.0, 10.0, 30.0]])
    assert torch.equal(round_to_grid(x, bits=4), wanted)


def test_a_group_has_a_scale_of_its_own_and_the_last_one_may_be_shorter():
    x = torch.tensor([7.0, 3.4, 0.07, 0.034, -0.7])
    wanted = torch.tensor([7.0, 3.0, 0.07, 0.03, -0.7])
    assert torch.allclose(round_to_grid(x, bits=4, group=2), wanted)
    assert torch.allclose(round_to_grid(x, bits=4), torch.tensor([7.0, 3.0, 0, 0, -1]))


@pytest.mark.parametrize("bits, values", [(8, 255), (4, 15), (2, 3)])
def test_bits_give_a_symmetric_grid_and_nothing_moves_by_more_than_half_a_step(bits, values):
    x = torch.linspace(-3, 3, 1001)
    rounded, step = round_to_grid(x, bits), 3 / (2 ** (bits - 1) - 1)
    assert len(rounded.unique()) == values and torch.equal(rounded, -rounded.flip(0))
    assert (rounded - x).abs().max() <= step / 2 * 1.0001


def test_ternary_weights_are_0_or_the_mean_size_of_the_matrix():
    weight = torch.tensor([[0.5, -0.4, 3.0], [-1.1, 0.0, -1.0]])  # the mean of |w| is 1
    wanted = torch.tensor([[0.0, 0.0, 1.0], [-1.0, 0.0, -1.0]])
    assert torch.equal(round_to_ternary(weight), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    assert not KINDS[kind](torch.zeros(3, 40)).any()


def on_the_grid(model, levels):
    """Makes every matrix of the Blocks whole numbers from -levels to levels, with the largest in
    each 32 neighbours, times a power of two."""
    with torch.no_grad():
        for block in model.blocks:
            for i, module in enumerate(m for m in block.modules() if hasattr(m, "in_features")):
                whole = (random(*module.weight.shape, seed=i) * levels).round()
                whole = whole.clamp(-levels, levels)
                whole[:, ::16] = levels
                module.weight.copy_(whole * 2.0**-6 / levels.bit_length())
    return model


@pytest.mark.parametrize("kind, levels", [("int8", 127), ("int4", 7), ("int4g32", 7)])
def test_a_model_whose_weights_are_multiples_of_the_scale_loses_nothing(kind, levels):
    model = on_the_grid(small(), levels)
    wanted = model(IDS, IDS)
    rounded = simulate_quantization(copy.deepcopy(model), kind)
    assert torch.allclose(rounded(IDS, IDS), wanted, atol=0, rtol=1e-6)
    assert simulate_quantization(small(), kind)(IDS, IDS) != small()(IDS, IDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_matrices_of_the_blocks_are_rounded_and_nothing_else(kind, tied):
    model = small(tie_embeddings=tied, norm="layernorm")
    before = {name: p.clone() for name, p in model.named_parameters()}
    simulate_quantization(model, kind)
    for name, parameter in model.named_parameters():
        matrix = name.startswith("blocks.") and parameter.ndim == 2
        wanted = KINDS[kind](before[name]) if matrix else before[name]
        assert torch.equal(parameter, wanted), name
        assert torch.equal(wanted, before[name]) != matrix, name


def test_w4a4_rounds_what_each_matrix_of_the_blocks_multiplies_token_by_token():
    model, seen = simulate_quantization(small(), "w4a4"), []
    for module in (model.blocks[0].attn.q, model.blocks[1].ffn.down):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(IDS)
    for x in seen:
        assert torch.allclose(x, round_to_grid(x, bits=4)) and x.shape[:2] == IDS.shape
        assert x.flatten(0, 1)[0].unique().numel() <= 15
    assert not torch.equal(logits, simulate_quantization(small(), "int4")(IDS))


def test_a_kind_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="must be one of int8, int4, .*, got 'int3'"):
        simulate_quantization(small(), "int3")
