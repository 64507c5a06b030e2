"""What a model costs, by hand and against the model itself; every variant's parameters are counted in test_model.py."""

import pytest

from cost import flops_per_token, memory_estimate, parameter_count
from model import Decoder, ModelConfig


def config(**knobs):
    return ModelConfig(**(dict(n_layer=2, n_head=4, n_embd=64, n_hidden=96, block_size=64, vocab_size=101) | knobs))


@pytest.mark.parametrize("knobs", [{}, {"tie_embeddings": True}, {"norm": "layernorm"}, {"n_kv_head": 1},
                                   {"n_hidden": 0}])
def test_parameter_count_is_that_of_the_model(knobs):
    c = config(**knobs)
    assert parameter_count(c) == sum(p.numel() for p in Decoder(c).parameters())


def test_flops_by_hand():
    c = config(n_layer=1, n_embd=8, n_head=2, n_hidden=10, vocab_size=7, block_size=4, tie_embeddings=True)
    matrices = 4 * 8 * 8 + 3 * 8 * 10 + 7 * 8 + 3 * 8  # attention, feed-forward, head, gains
    assert flops_per_token(c) == 6 * matrices + 12 * 1 * 8 * 4


def test_memory_estimate_grows_as_it_should():
    fixed, one = memory_estimate(config(), 1, "float32")
    assert fixed == 16 * parameter_count(config())
    assert memory_estimate(config(), 4, "float32")[1] == 4 * one
    assert memory_estimate(config(), 1, "bfloat16")[1] < one
    assert memory_estimate(config(), 1, "float32", checkpointing=True)[1] < one
