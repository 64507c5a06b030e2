"""What a model costs, by hand and against the model itself; every variant's parameters are counted in test_model.py."""

import pytest

from config.schema import Config
from cost import flops_per_token, memory_estimate, parameter_count, pays_to_compile
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
    adapters = 2 * (4 * (8 + 8) + 3 * (8 + 10))  # rank 2
    assert flops_per_token(c, lora_rank=2) == 4 * matrices + 6 * adapters + 12 * 1 * 8 * 4


def test_memory_estimate_grows_as_it_should():
    fixed, one = memory_estimate(config(), 1, "float32", "cpu")
    assert fixed == 16 * parameter_count(config())
    assert memory_estimate(config(), 4, "float32", "cpu")[1] == 4 * one
    assert memory_estimate(config(), 1, "bfloat16", "cpu")[1] < one
    assert memory_estimate(config(), 1, "float32", "cpu", checkpointing=True)[1] < one


def test_memory_for_logits_is_bounded_and_a_cpu_keeps_its_scores_in_bfloat16():
    large = config(vocab_size=50_000, block_size=1024)
    few, many = (memory_estimate(large, m, "float32", "cpu")[1] for m in (1, 8))
    assert many < 8 * few - 7 * 2**25 * 4 * 2  # the logits of 671 tokens, whether there are 1,024 or 8,192
    plain, fused = (memory_estimate(large, 2, "bfloat16", device)[1] for device in ("cpu", "cuda"))
    assert plain - fused == 2 * 1024 * large.n_layer * large.n_head * 1024 * 2  # T x T scores in bfloat16
    for dtype, block_size in (("float32", 1024), ("bfloat16", 1025)):
        c = config(block_size=block_size)
        assert memory_estimate(c, 2, dtype, "cpu") == memory_estimate(c, 2, dtype, "cuda")


@pytest.mark.parametrize("device, max_iters, wanted", [("cuda:0", 1, True), ("mps", 10**6, False), ("cpu", 1050, False),
                                                       ("cpu", 1150, True)])
def test_a_cpu_compiles_where_a_run_is_long_enough(device, max_iters, wanted):
    """4 layers of 128 channels save 30 ms of a step of 2,048 tokens, and take 33 s."""
    model = ModelConfig(n_layer=4, n_head=2, n_embd=128, block_size=256)
    run = Config(model=model, batch_size=8, max_iters=max_iters, warmup_iters=0, device=device)
    assert pays_to_compile(run) == wanted
