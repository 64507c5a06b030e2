"""The model against Hugging Face's Llama, and what must hold of any decoder."""

import math

import pytest
import torch

from cost import parameter_count
from generate import KVCache
from model import Decoder, ModelConfig, plain_attention, rope_frequencies, rope_table, rotate
from norm import EAGER

LLAMA3 = dict(rope_scaling="llama3", rope_theta=500000.0, rope_factor=8.0, rope_low_freq=0.5, rope_high_freq=5.0,
              rope_original_context=32)
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}


def config(**knobs):
    return ModelConfig(**(dict(n_layer=2, n_head=4, n_embd=64, n_hidden=96, block_size=64, vocab_size=101) | knobs))


def tokens(batch=2, time=64, vocab=101, seed=0):
    return torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


def hugging_face_twin(model):
    """transformers' Llama with the same weights, and the pairs (our name, their parameter)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling == "llama3":
        rope |= {"rope_type": "llama3", "factor": c.rope_factor, "low_freq_factor": c.rope_low_freq,
                 "high_freq_factor": c.rope_high_freq, "original_max_position_embeddings": c.rope_original_context}
    twin = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.hidden_size, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.kv_heads, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings, rope_parameters=rope))
    theirs = dict(twin.named_parameters())
    pairs = {name: theirs[their_name(name)] for name, _ in model.named_parameters()}
    assert len(pairs) == len(theirs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            pairs[name].copy_(parameter)
    return twin, pairs


def their_name(name):
    for ours, their in (("blocks.", "model.layers."), ("attn_norm.gain", "input_layernorm.weight"),
                        ("ffn_norm.gain", "post_attention_layernorm.weight"), (".attn.out.", ".self_attn.o_proj.")):
        name = name.replace(ours, their)
    for role in ("q", "k", "v"):
        name = name.replace(f".attn.{role}.", f".self_attn.{role}_proj.")
    for role in ("gate", "up", "down"):
        name = name.replace(f".ffn.{role}.", f".mlp.{role}_proj.")
    return {"embed.weight": "model.embed_tokens.weight", "norm.gain": "model.norm.weight",
            "head.weight": "lm_head.weight"}.get(name, name)


def with_random_gains(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.normal_(1.0, 0.3)
            else:
                parameter.mul_(4)  # logits of size 1 and more, so that a difference shows
    return model


@pytest.mark.parametrize("rope", [{}, LLAMA3], ids=["rope", "llama3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("heads", HEADS)
def test_logits_and_gradients_equal_hugging_face(heads, tied, rope):
    torch.manual_seed(0)
    model = with_random_gains(Decoder(config(n_kv_head=HEADS[heads], tie_embeddings=tied, **rope)))
    twin, pairs = hugging_face_twin(model)
    x, y = tokens(), tokens(seed=1)
    ours, theirs = model(x), twin(x).logits
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() <= 1e-5
    model(x, y).backward()
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), y.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, pairs[name].grad, atol=1e-5, rtol=0), name


@pytest.mark.parametrize("head_dim", [8, 24])
def test_heads_may_be_narrower_or_wider_than_a_share_of_the_channels(head_dim):
    model = Decoder(config(n_kv_head=2, head_dim=head_dim)).eval()
    assert model.blocks[0].attn.q.weight.shape == (4 * head_dim, 64)
    assert model.blocks[0].attn.k.weight.shape == (2 * head_dim, 64)
    assert model.blocks[0].attn.out.weight.shape == (64, 4 * head_dim)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())
    assert torch.equal(Decoder(config(head_dim=16))(tokens()), Decoder(config())(tokens()))
    cache, ids = KVCache(model.config, 2, 64, "cpu"), tokens()
    parts = [model.logits(model.features(part, cache)) for part in ids.split(20, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model(ids), atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_plain_attention_is_pytorchs(kv_heads):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=random, dtype=torch.float64, requires_grad=True)
               for heads in (4, kv_heads, kv_heads))
    ours = plain_attention(q, k, v, 0.0)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(ours, theirs, atol=1e-12)
    for mine, wanted in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, theirs)), strict=True):
        assert torch.allclose(mine, wanted, atol=1e-12)
    torch.manual_seed(0)
    assert (plain_attention(q, k, v, 0.5) - ours).abs().max() > 0.1


def test_a_cpu_takes_plain_attention_in_bfloat16_alone_and_the_loss_is_the_same(monkeypatch):
    calls, model, x = [], Decoder(config(n_kv_head=2)), tokens()
    monkeypatch.setattr("model.plain_attention", lambda *qkv: (calls.append(1), plain_attention(*qkv))[1])
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x, x).item()
        monkeypatch.setattr("model.SHORT", 63)
        assert len(calls) == 2 and model(x, x).item() == pytest.approx(plain, rel=1e-3)
    model(x, x), model(x[:, :20])
    assert len(calls) == 2


def test_qk_norm_equals_hugging_faces_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = with_random_gains(Decoder(config(n_kv_head=2, qk_norm=True)))
    c = model.config
    twin = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.hidden_size, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.kv_heads, head_dim=c.head_size, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.block_size, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}))
    theirs = dict(twin.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.replace("attn.q_norm.gain", "self_attn.q_norm.weight")
            theirs.pop(their_name(name.replace("attn.k_norm.gain", "self_attn.k_norm.weight"))).copy_(parameter)
    assert not theirs
    assert (model(tokens()) - twin(tokens()).logits).abs().max() <= 1e-5


# Where the norms stand: each Block against its formula, with parameters that are not the initial ones.

def formula(block, x, cos, sin):
    """The papers' formulas, written out once more. N1 to N4 in the order of the branch they belong to."""
    A, F = (lambda h: block.attn(h, cos, sin)), block.ffn
    N1, N2, N3, N4 = block.attn_norm, block.ffn_norm, block.attn_norm_out, block.ffn_norm_out
    a = 4 ** 0.25  # (2 n_layer)^1/4, two Blocks
    return {"pre": lambda: (h := x + A(N1(x))) + F(N2(h)),
            "post": lambda: N2((h := N1(x + A(x))) + F(h)),
            "out": lambda: (h := x + N1(A(x))) + N2(F(h)),
            "sandwich": lambda: (h := x + N3(A(N1(x)))) + N4(F(N2(h))),
            "deepnorm": lambda: N2(a * (h := N1(a * x + A(x))) + F(h))}[block.norm_pos]()


POSITIONS = ["pre", "post", "sandwich", "out", "deepnorm"]


@pytest.mark.parametrize("place", POSITIONS)
def test_a_block_is_the_formula_of_its_norm_pos(place):
    model = with_random_gains(Decoder(config(norm_pos=place)))
    x = torch.randn(2, 64, 64)
    block = model.blocks[1]
    assert torch.allclose(block(x, model.cos, model.sin), formula(block, x, model.cos, model.sin), atol=1e-6)
    has_final_norm = {name for name, _ in model.named_parameters() if name == "norm.gain"}
    assert bool(has_final_norm) == (place in ("pre", "sandwich", "out"))


def test_all_norm_positions_share_their_matrices_but_deepnorm_only_those_outside_its_blocks():
    pre, *others = ({n: p for n, p in Decoder(config(norm_pos=place)).named_parameters() if p.ndim > 1}
                    for place in POSITIONS)
    for place, matrices in zip(POSITIONS[1:], others, strict=True):
        assert matrices.keys() == pre.keys()
        own = {name for name in pre if name.startswith("blocks.")} if place == "deepnorm" else set()
        assert {name for name, p in matrices.items() if not torch.equal(p, pre[name])} == own, place


def test_deepnorm_starts_with_its_papers_deviations():
    model = Decoder(config(n_layer=8, n_embd=256, n_hidden=512, n_kv_head=2, norm_pos="deepnorm"))
    b, xavier = 64 ** -0.25, lambda i, o: math.sqrt(2 / (i + o))
    wanted = {"q": xavier(256, 256), "k": xavier(256, 128), "v": b * xavier(256, 128), "out": b * xavier(256, 256),
              "gate": b * xavier(256, 512), "up": b * xavier(256, 512), "down": b * xavier(512, 256)}
    for role, std in wanted.items():
        matrix = model.blocks[3].get_submodule(f"{'attn' if role in 'q k v out' else 'ffn'}.{role}").weight
        assert abs(matrix.std().item() / std - 1) < 0.02, role
    assert model.blocks[3].stream_weight == 2.0


# The feed-forward.

@pytest.mark.parametrize("kind, act", [("swiglu", torch.nn.functional.silu), ("geglu", torch.nn.functional.gelu),
                                       ("gelu", torch.nn.functional.gelu), ("relu2", lambda x: x.relu() ** 2)])
def test_feed_forward_is_its_formula_and_each_kind_has_as_many_parameters(kind, act):
    ffn = Decoder(config(ffn=kind)).blocks[0].ffn
    x = torch.randn(5, 64)
    inner = act(ffn.up(x)) if kind in ("gelu", "relu2") else act(ffn.gate(x)) * ffn.up(x)
    assert torch.allclose(ffn(x), ffn.down(inner))
    assert sum(p.numel() for p in ffn.parameters()) == 3 * 64 * 96


# What every variant must do.

VARIANTS = [{"norm": kind} for kind in EAGER] + [{"norm_pos": place} for place in POSITIONS]
VARIANTS += [{"ffn": kind} for kind in ("geglu", "gelu", "relu2")]
VARIANTS += [{"qk_norm": True}, {"qk_norm": True, "norm": "layernorm"}, {"qk_norm": True, "norm": "dyt"},
             {"norm": "layernorm", "norm_pos": "deepnorm"}, {"norm": "derf", "norm_pos": "sandwich"}]
each_variant = pytest.mark.parametrize("knobs", VARIANTS, ids=lambda knobs: "-".join(map(str, knobs.values())))


@each_variant
def test_every_variant_counts_its_parameters_and_runs_with_a_cache(knobs):
    c = config(**knobs)
    model, x = Decoder(c).eval(), tokens(3, 20)
    assert parameter_count(c) == sum(p.numel() for p in model.parameters())
    cache = KVCache(c, 3, 20, "cpu")
    parts = [model.logits(model.features(x[:, a:b], cache)) for a, b in ((0, 7), (7, 8), (8, 20))]
    assert torch.allclose(torch.cat(parts, dim=1), model(x), atol=1e-5)


@each_variant
def test_every_variant_learns_and_every_parameter_has_a_gradient(knobs):
    model, x = Decoder(config(**knobs)), tokens(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert loss.item() < (2.5 if knobs.get("norm") == "none" else 0.5)  # ln 101 = 4.6; without norms it is slow


def test_llama3_scaling_stretches_the_low_frequencies_only():
    plain, scaled = (rope_frequencies(config(**LLAMA3 | knobs)) for knobs in ({"rope_scaling": "none"}, {}))
    assert scaled[0] == plain[0] == 1
    assert scaled[-1] == plain[-1] / 8


def test_rope_depends_on_distance_alone():
    cos, sin = rope_table(config())
    q, k = torch.randn(2, 1, 1, 16)

    def score(i, j):
        return (rotate(q, cos[i:i + 1], sin[i:i + 1]) * rotate(k, cos[j:j + 1], sin[j:j + 1])).sum()

    assert torch.allclose(score(3, 1), score(40, 38), atol=1e-5)
    assert not torch.allclose(score(3, 1), score(40, 37), atol=1e-3)


def test_loss_at_init_is_log_vocab():
    for tied in (False, True):
        for width in (64, 768):
            c = config(vocab_size=4096, tie_embeddings=tied, n_embd=width, n_hidden=0)
            loss = Decoder(c)(tokens(4, vocab=4096), tokens(4, vocab=4096, seed=1))
            assert abs(loss.item() - math.log(4096)) < 0.05, (tied, width)


def test_one_batch_can_be_overfitted():
    for norm in ("rmsnorm", "layernorm"):
        model = Decoder(config(norm=norm))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        x = tokens(4, 33)
        for _ in range(80):
            loss = model(x[:, :-1], x[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.05, norm


def test_future_tokens_do_not_change_past_logits():
    model, x = Decoder(config()), tokens()
    changed = x.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 101
    assert torch.equal(model(x)[:, :40], model(changed)[:, :40])
    assert not torch.allclose(model(x)[:, 40:], model(changed)[:, 40:])


@pytest.mark.parametrize("heads", HEADS)
def test_cached_logits_equal_uncached_logits(heads):
    model, x = with_random_gains(Decoder(config(n_kv_head=HEADS[heads]))).eval(), tokens(3, 20)
    cache = KVCache(model.config, 3, 20, "cpu")
    parts = [model.logits(model.features(x[:, a:b], cache))  # prefill, step, chunks
             for a, b in ((0, 7), (7, 8), (8, 15), (15, 20))]
    assert torch.allclose(torch.cat(parts, dim=1), model(x), atol=1e-5)


def test_activation_checkpointing_changes_memory_and_nothing_else():
    grads = []
    for on in (False, True):
        model = Decoder(config(dropout=0.1))
        model.activation_checkpointing = on
        torch.manual_seed(5)
        model(tokens(), tokens(seed=1)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_acts_on_embedding_and_attention_in_training_only():
    model, x = Decoder(config(dropout=0.5)), tokens()
    embedded = torch.randn(2, 64, 64)
    attention, without_blocks = model.blocks[0].attn, Decoder(config(dropout=0.5))
    without_blocks.blocks = torch.nn.ModuleList()
    for part, inputs in ((attention, (embedded, model.cos, model.sin)), (without_blocks, (x,))):
        assert not torch.equal(part(*inputs), part(*inputs))
        part.eval()
        assert torch.equal(part(*inputs), part(*inputs))


@pytest.mark.parametrize("branch", ["attn", "ffn"])
@pytest.mark.parametrize("place", [*POSITIONS, "pre, by one kernel"])
def test_dropout_acts_on_each_branch_wherever_the_norms_stand(place, branch):
    model = Decoder(config(dropout=0.5, norm_pos=place.partition(",")[0]))
    block, x = model.blocks[0], torch.randn(2, 64, 64)
    if place not in POSITIONS:  # what norm_impl=triton does on CUDA
        block.fuse_sum, block.ffn_norm.of_sum = True, lambda x, branch: (x + branch, block.ffn_norm(x + branch))
    block.attn.eval()  # without the dropout that attention has inside
    other = {"attn": block.ffn.down, "ffn": block.attn.out}[branch]
    torch.nn.init.zeros_(other.weight)  # so only `branch` has something that dropout can take out
    assert not torch.equal(block(x, model.cos, model.sin), block(x, model.cos, model.sin))
    block.eval()
    assert torch.equal(block(x, model.cos, model.sin), block(x, model.cos, model.sin))


def test_hidden_size_follows_llama():
    assert config(n_embd=4096, n_head=32, n_hidden=0).hidden_size == 11008  # Llama 7B
    assert config(n_embd=5120, n_head=40, n_hidden=0).hidden_size == 13824  # Llama 13B


@pytest.mark.parametrize("knobs, words", [
    ({"n_embd": 60, "n_head": 7}, "nearest are 56 and 70"),
    ({"n_embd": 12, "n_head": 4}, "nearest are 8 and 16"),  # head size 3 is odd
    ({"n_kv_head": 3}, "choose n_kv_head from 1, 2, 4"),
    ({"n_layer": 0}, "n_layer must be between 1 and"),
    ({"block_size": 10**9}, "block_size must be between 1 and"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ({"n_hidden": -1}, "n_hidden must be 0"),
    ({"norm_eps": 0.0}, "norm_eps must be above 0"),
    ({"rope_low_freq": 9.0}, "below rope_high_freq"),
])
def test_impossible_shapes_are_refused_with_the_numbers(knobs, words):
    with pytest.raises(ValueError, match=words):
        config(**knobs)


def test_a_parameter_without_a_role_is_refused():
    from model import initialise

    model = Decoder(config())
    model.blocks[0].attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="blocks.0.attn.extra.weight"):
        initialise(model, 0)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="65 tokens are more than block_size=64"):
        Decoder(config())(tokens(1, 65))


def test_weights_depend_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    a = Decoder(config(), seed=1)
    torch.manual_seed(2)
    b, c = Decoder(config(), seed=1), Decoder(config(), seed=2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_a_step_and_an_evaluation_compile_as_one_graph_each_and_only_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, model = CompileCounterWithBackend("aot_eager"), Decoder(config())
    forward = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    for seed in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(tokens(seed=seed), tokens(seed=seed + 1))
            assert loss.item() == pytest.approx(model(tokens(seed=seed), tokens(seed=seed + 1)).item(), rel=1e-3)
            loss.backward()
        with torch.no_grad():
            forward(tokens(seed=seed), tokens(seed=seed + 1))
    assert counter.frame_count == 2
