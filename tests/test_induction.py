"""induction_init: what the circuit does as soon as the embedding has grown; where it is refused."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import Decoder, ModelConfig

HALF = 64  # tokens of a text that is written twice


def config(**knobs):
    shape = dict(n_layer=2, n_head=2, n_embd=128, n_hidden=64, block_size=2 * HALF, vocab_size=500)
    return ModelConfig(**shape | {"induction_init": True} | knobs)


def grown(model):
    """The model, with an embedding as large as training makes it; its constant channel stays."""
    rows = torch.randn(model.embed.weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embed.weight[:, 1:] = 0.3 * rows[:, 1:]
    return model


def twice(vocab=500, seed=0):
    text = torch.randint(vocab, (4, HALF), generator=torch.Generator().manual_seed(seed))
    return torch.cat((text, text), dim=1)


@torch.no_grad()
def attention(model, layer, ids):
    """What each head of a Block looks at, [B, H, T, T]."""
    x = model.embed(ids)
    for block in model.blocks[:layer]:
        x = block(x, model.cos, model.sin)
    block = model.blocks[layer]
    q, k = block.attn.queries_and_keys(block.attn_norm(x), model.cos, model.sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def share(weights, back):
    """Of each head, the mean weight on the token so many places back, [H]."""
    return weights.diagonal(-back, dim1=2, dim2=3).mean((0, 2))


SHAPES = [
    {},
    {"n_head": 4, "n_kv_head": 2, "head_dim": 64},
    {"n_head": 4, "n_kv_head": 1, "head_dim": 64},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_head_of_the_first_block_looks_one_token_further_back(shape):
    for model in (Decoder(config(**shape)), grown(Decoder(config(**shape)))):
        weights = attention(model, 0, twice())
        for head in range(model.config.n_head):
            assert share(weights, back=head + 1)[head] > 0.6
    plain = attention(Decoder(config(**shape, induction_init=False)), 0, twice())
    assert share(plain, back=1).max() < 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_second_block_finds_what_followed_the_same_token_before(shape):
    weights = attention(grown(Decoder(config(**shape))), 1, twice())
    found = weights.diagonal(1 - HALF, dim1=2, dim2=3)[:, 0, 1:].mean()
    assert found > 0.3  # of 64 to 127 tokens
    plain = attention(grown(Decoder(config(**shape, induction_init=False))), 1, twice())
    assert plain.diagonal(1 - HALF, dim1=2, dim2=3)[:, 0, 1:].mean() < 0.03


@torch.no_grad()
def second_half(model):
    """How much less the second half of a text that is written twice costs, nats per token."""
    ids = twice()
    losses = F.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:], reduction="none")
    return (losses[:, : HALF - 1].mean() - losses[:, HALF:].mean()).item()


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "rmsnorm1p", "ssnorm", "tapernorm"])
def test_with_a_grown_embedding_alone_a_text_written_twice_is_copied(norm):
    assert second_half(grown(Decoder(config(norm=norm, tie_embeddings=True)))) > 4
    plain = config(norm=norm, tie_embeddings=True, induction_init=False)
    assert abs(second_half(grown(Decoder(plain)))) < 0.3


def test_all_other_numbers_are_those_drawn_without_it():
    with_it = dict(Decoder(config(n_layer=3)).named_parameters())
    without = dict(Decoder(config(n_layer=3, induction_init=False)).named_parameters())
    shares = {name: (w != without[name]).float().mean().item() for name, w in with_it.items()}
    parts = [f"blocks.{i}.attn.{part}.weight" for i in (0, 1) for part in ("q", "k", "v", "out")]
    assert {name for name, share in shares.items() if share} == {"embed.weight", *parts}
    assert max(shares.values()) <= 1 / 128  # one column, or one number in each row


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"n_layer": 1}, "needs n_layer=2 or more, got 1: write induction_init=false"),
        ({"rope_theta": 10.0}, "with rope_theta=10 heads of 64 have none: raise rope_theta, or"),
        ({"norm_pos": "post"}, "got norm_pos=post, embed_scale=none and norm=rmsnorm"),
        ({"norm": "prmsnorm"}, "and norm=prmsnorm: write induction_init=false"),
        ({"norm": "dyt"}, "and norm=dyt: write induction_init=false"),
        ({"embed_scale": "sqrt"}, "embed_scale=sqrt and norm=rmsnorm"),
    ],
)
def test_models_in_which_the_circuit_would_not_work_are_refused(knobs, words):
    with pytest.raises(ValueError, match=words):
        config(**knobs)


def test_the_knob_is_checked_where_tensors_have_no_numbers():
    with torch.device("meta"):
        Decoder(config(), seed=None)
        with pytest.raises(ValueError, match="raise rope_theta"):
            config(rope_theta=10.0)
