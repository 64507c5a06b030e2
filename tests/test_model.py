"""The model against Hugging Face's Llama, and what must hold of any decoder."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import (
    UNFUSED_UP_TO,
    Decoder,
    ModelConfig,
    initialise,
    parameter_count,
    rope_frequencies,
    rope_table,
    rotate,
    unfused_attention,
)
from norm import EAGER, Norm, fading_norms
from sample import KVCache

LLAMA3 = dict(
    rope_scaling="llama3",
    rope_theta=500000.0,
    rope_factor=8.0,
    rope_low_freq=0.5,
    rope_high_freq=5.0,
    rope_original_context=32,
)
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}


SMALL = dict(n_layer=2, n_head=4, n_embd=64, n_hidden=96, block_size=64, vocab_size=101)


def config(**knobs):
    return ModelConfig(**SMALL | knobs)


def tokens(batch=2, time=64, vocab=101, seed=0):
    return torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


def logits_in_parts(model, ids, lengths):
    """The logits of ids [B, T], read in parts of these lengths with a cache."""
    cache = KVCache(model.config, *ids.shape, "cpu")
    parts = [model.logits(model.features(part, cache)) for part in ids.split(lengths, dim=1)]
    return torch.cat(parts, dim=1)


def hugging_face_twin(model, kind="Llama"):
    """Theirs with the same weights, and their parameters by our names."""
    import transformers

    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": c.rope_factor,
            "low_freq_factor": c.rope_low_freq,
            "high_freq_factor": c.rope_high_freq,
            "original_max_position_embeddings": c.rope_original_context,
        }
    their_config = getattr(transformers, f"{kind}Config")(
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.hidden_size,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_size,
        max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        rope_parameters=rope,
    )
    twin = getattr(transformers, f"{kind}ForCausalLM")(their_config)
    theirs = dict(twin.named_parameters())
    pairs = {name: theirs[their_name(name)] for name, _ in model.named_parameters()}
    assert len(pairs) == len(theirs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            pairs[name].copy_(parameter)
    return twin, pairs


THEIR_NAMES = {
    "blocks.": "model.layers.",
    "attn_norm.gain": "input_layernorm.weight",
    "ffn_norm.gain": "post_attention_layernorm.weight",
    ".attn.out.": ".self_attn.o_proj.",
    ".attn.q_norm.gain": ".self_attn.q_norm.weight",
    ".attn.k_norm.gain": ".self_attn.k_norm.weight",
}
THEIR_NAMES |= {f".attn.{role}.": f".self_attn.{role}_proj." for role in ("q", "k", "v")}
THEIR_NAMES |= {f".ffn.{role}.": f".mlp.{role}_proj." for role in ("gate", "up", "down")}
THEIR_ENDS = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.gain": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def their_name(name):
    for ours, their in THEIR_NAMES.items():
        name = name.replace(ours, their)
    return THEIR_ENDS.get(name, name)


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
    F.cross_entropy(theirs.flatten(0, 1), y.flatten()).backward()
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
    parts = logits_in_parts(model, tokens(), [20, 20, 24])
    assert torch.allclose(parts, model(tokens()), atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_unfused_attention_is_pytorchs(kv_heads):
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 9, 8, generator=random, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    ours = unfused_attention(q, k, v, 0.0)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(ours, theirs, atol=1e-12)
    gradients = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, theirs))
    for mine, wanted in zip(*gradients, strict=True):
        assert torch.allclose(mine, wanted, atol=1e-12)
    torch.manual_seed(0)
    assert (unfused_attention(q, k, v, 0.5) - ours).abs().max() > 0.1


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize(
    "time, dtype, unfused",
    [
        (64, torch.bfloat16, True),
        (UNFUSED_UP_TO + 1, torch.bfloat16, False),
        (64, torch.float32, False),
    ],
)
def test_a_cpu_computes_short_attention_unfused_in_bfloat16_alone(time, dtype, unfused):
    model, x = Decoder(config(n_kv_head=2, block_size=2048)), tokens(1, time)
    with Operations() as seen, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(x, x).item()
    assert ("aten.baddbmm.default" in seen.names) == unfused
    assert loss == pytest.approx(model(x, x).item(), rel=2e-3)


def test_qk_norm_equals_hugging_faces_qwen3():
    model = with_random_gains(Decoder(config(n_kv_head=2, qk_norm=True)))
    twin, _ = hugging_face_twin(model, "Qwen3")
    assert (model(tokens()) - twin(tokens()).logits).abs().max() <= 1e-5


# Where the norms stand: each Block against its formula, with gains that are not the initial ones.


def formula(block, x, cos, sin):
    """The papers' formulas, written out once more, for branches f and g with norms N and M."""
    f, g = (lambda h: block.attn(h, cos, sin)), block.ffn
    N, M, N_out, M_out = block.attn_norm, block.ffn_norm, block.attn_norm_out, block.ffn_norm_out
    a = 4**0.25  # (2 n_layer)^1/4, two Blocks
    return {
        "pre": lambda: (h := x + f(N(x))) + g(M(h)),
        "lns": lambda: (h := x + f(N(x) / 2**0.5)) + g(M(h) / 2**0.5),  # the second Block
        "post": lambda: M((h := N(x + f(x))) + g(h)),
        "out": lambda: (h := x + N(f(x))) + M(g(h)),
        "sandwich": lambda: (h := x + N_out(f(N(x)))) + M_out(g(M(h))),
        "deepnorm": lambda: M(a * (h := N(a * x + f(x))) + g(h)),
        "final": lambda: (h := x + f(x)) + g(h),
    }[block.norm_pos]()


POSITIONS = ["pre", "post", "sandwich", "out", "deepnorm", "lns", "mix", "final"]


@pytest.mark.parametrize("place", POSITIONS)
def test_a_block_is_the_formula_of_its_norm_pos(place):
    model = with_random_gains(Decoder(config(norm_pos=place)))
    x = torch.randn(2, 64, 64)
    block, angles = model.blocks[1], (model.cos, model.sin)
    assert torch.allclose(block(x, *angles), formula(block, x, *angles), atol=1e-6)
    has_final_norm = "norm.gain" in dict(model.named_parameters())
    assert has_final_norm == (place not in ("post", "deepnorm"))
    norms = [module for module in block.modules() if isinstance(module, Norm)]
    assert len(norms) == {"sandwich": 4, "final": 0}.get(place, 2)


@pytest.mark.parametrize("layers, first", [(2, 1), (4, 1), (5, 2), (8, 2)])
def test_mix_is_post_in_the_first_quarter_of_the_blocks_and_then_pre(layers, first):
    blocks = Decoder(config(n_layer=layers, norm_pos="mix")).blocks
    assert [block.norm_pos for block in blocks] == ["post"] * first + ["pre"] * (layers - first)


def test_lns_divides_each_norm_by_the_root_of_its_layer_and_its_writers_do_not_start_smaller():
    model = Decoder(config(n_layer=8, norm_pos="lns"))
    x, norm = torch.randn(2, 64), model.blocks[0].attn_norm
    for layer, block in enumerate(model.blocks, start=1):
        assert torch.allclose(block.branch_off(x, norm)[1], norm(x) / layer**0.5)
        for weight in (block.attn.out.weight, block.ffn.down.weight):
            assert abs(weight.std().item() / 0.02 - 1) < 0.05


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_is_multiplied_by_the_root_of_the_width(tied):
    plain, scaled = (
        Decoder(config(tie_embeddings=tied, embed_scale=scale)) for scale in ("none", "sqrt")
    )
    block = plain.blocks[0]
    block.forward = lambda x, *_: x * 8  # sqrt(64), before the first Block reads it
    for each in (plain, scaled):
        each.blocks = each.blocks[:1]
    scaled.blocks[0].forward = lambda x, *_: x
    assert torch.equal(plain(tokens()), scaled(tokens()))
    assert parameter_count(scaled.config) == parameter_count(plain.config)


def test_all_norm_positions_share_their_matrices_but_for_those_that_have_their_own_start():
    pre, *others = (
        {n: p for n, p in Decoder(config(norm_pos=place)).named_parameters() if p.ndim > 1}
        for place in POSITIONS
    )
    for place, matrices in zip(POSITIONS[1:], others, strict=True):
        assert matrices.keys() == pre.keys()
        roles = {"deepnorm": ("weight",), "lns": ("out.weight", "down.weight")}.get(place, ())
        own = {name for name in pre if name.startswith("blocks.") and name.endswith(roles)}
        assert {name for name, p in matrices.items() if not torch.equal(p, pre[name])} == own, place


def test_deepnorm_starts_with_its_papers_deviations():
    model = Decoder(config(n_layer=8, n_embd=256, n_hidden=512, n_kv_head=2, norm_pos="deepnorm"))
    b, xavier = 64**-0.25, lambda i, o: math.sqrt(2 / (i + o))
    wanted = {
        "q": xavier(256, 256),
        "k": xavier(256, 128),
        "v": b * xavier(256, 128),
        "out": b * xavier(256, 256),
        "gate": b * xavier(256, 512),
        "up": b * xavier(256, 512),
        "down": b * xavier(512, 256),
    }
    block = model.blocks[3]
    for role, std in wanted.items():
        branch = block.attn if role in ("q", "k", "v", "out") else block.ffn
        found = branch.get_submodule(role).weight.std().item()
        assert abs(found / std - 1) < 0.02, role
    assert block.stream_weight == 2.0


# The feed-forward.


@pytest.mark.parametrize(
    "kind, act",
    [
        ("swiglu", F.silu),
        ("geglu", F.gelu),
        ("gelu", F.gelu),
        ("relu2", lambda x: x.relu() ** 2),
    ],
)
def test_feed_forward_is_its_formula_and_each_kind_has_as_many_parameters(kind, act):
    ffn = Decoder(config(ffn=kind)).blocks[0].ffn
    x = torch.randn(5, 64)
    inner = act(ffn.up(x)) if kind in ("gelu", "relu2") else act(ffn.gate(x)) * ffn.up(x)
    assert torch.allclose(ffn(x), ffn.down(inner))
    assert sum(p.numel() for p in ffn.parameters()) == 3 * 64 * 96


# What every variant must do.

VARIANTS = [{"norm": kind} for kind in EAGER] + [{"norm_pos": place} for place in POSITIONS]
VARIANTS += [{"ffn": kind} for kind in ("geglu", "gelu", "relu2")]
VARIANTS += [
    {"qk_norm": True},
    {"qk_norm": True, "norm": "layernorm"},
    {"qk_norm": True, "norm": "ssnorm"},
    {"embed_scale": "sqrt", "norm_pos": "sandwich"},
    {"qk_norm": True, "norm": "dyt"},
    {"norm": "layernorm", "norm_pos": "deepnorm"},
    {"norm": "derf", "norm_pos": "sandwich"},
]
each_variant = pytest.mark.parametrize(
    "knobs", VARIANTS, ids=lambda knobs: "-".join(map(str, knobs.values()))
)


@each_variant
def test_every_variant_counts_its_parameters_and_runs_with_a_cache(knobs):
    c = config(**knobs)
    model, x = Decoder(c).eval(), tokens(3, 20)
    assert parameter_count(c) == sum(p.numel() for p in model.parameters())
    assert torch.allclose(logits_in_parts(model, x, [7, 1, 12]), model(x), atol=1e-5)


def loss_of_overfitting(model, steps):
    """The loss after so many steps on one batch, which is ln 101 = 4.6 at the start."""
    x = tokens(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@each_variant
def test_every_variant_learns_and_every_parameter_has_a_gradient(knobs):
    model = Decoder(config(**knobs))
    for norm in fading_norms(model):
        norm.gate.fill_(0.5)  # with 1 it is RMSNorm, and its other parameter does nothing
    assert loss_of_overfitting(model, 25) < 2.5  # without norms it learns slowly
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_llama3_scaling_stretches_the_low_frequencies_only():
    plain, scaled = (
        rope_frequencies(config(**LLAMA3 | knobs)) for knobs in ({"rope_scaling": "none"}, {})
    )
    assert scaled[0] == plain[0] == 1
    assert scaled[-1] == plain[-1] / 8


def test_llama3_frequencies_are_those_of_transformers_to_the_last_digit():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    pick = random.Random(0)
    for _ in range(400):
        low = pick.uniform(0.1, 4)
        ours = ModelConfig(
            n_head=1,
            n_embd=pick.choice((16, 48, 64, 128)),
            rope_scaling="llama3",
            rope_theta=pick.choice((1e4, 5e5, pick.uniform(100, 1e6))),
            rope_factor=pick.choice((8.0, 32.0, pick.uniform(1, 64))),
            rope_low_freq=low,
            rope_high_freq=low + pick.uniform(0.1, 8),
            rope_original_context=pick.randrange(16, 20_000),
        )
        rope = {
            "rope_type": "llama3",
            "rope_theta": ours.rope_theta,
            "factor": ours.rope_factor,
            "low_freq_factor": ours.rope_low_freq,
            "high_freq_factor": ours.rope_high_freq,
            "original_max_position_embeddings": ours.rope_original_context,
        }
        theirs = LlamaConfig(
            hidden_size=ours.n_embd,
            num_attention_heads=1,
            max_position_embeddings=2**20,
            rope_parameters=rope,
        )
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs)
        assert torch.equal(rope_frequencies(ours), frequencies), ours


def test_rope_depends_on_distance_alone():
    cos, sin = rope_table(config())
    q, k = torch.randn(2, 1, 1, 16)

    def score(i, j):
        return rotate(q, cos[[i]], sin[[i]]).flatten() @ rotate(k, cos[[j]], sin[[j]]).flatten()

    assert torch.allclose(score(3, 1), score(40, 38), atol=1e-5)
    assert not torch.allclose(score(3, 1), score(40, 37), atol=1e-3)


def test_loss_at_init_is_log_vocab():
    for tied in (False, True):
        for width in (64, 768):
            c = config(vocab_size=4096, tie_embeddings=tied, n_embd=width, n_hidden=0)
            loss = Decoder(c)(tokens(4, vocab=4096), tokens(4, vocab=4096, seed=1))
            assert abs(loss.item() - math.log(4096)) < 0.05, (tied, width)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_one_batch_can_be_overfitted(norm):
    assert loss_of_overfitting(Decoder(config(norm=norm)), 50) < 0.05


def test_future_tokens_do_not_change_past_logits():
    model, x = Decoder(config()), tokens()
    changed = x.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 101
    assert torch.equal(model(x)[:, :40], model(changed)[:, :40])
    assert not torch.allclose(model(x)[:, 40:], model(changed)[:, 40:])


@pytest.mark.parametrize("heads", HEADS)
def test_cached_logits_equal_uncached_logits(heads):
    model, x = with_random_gains(Decoder(config(n_kv_head=HEADS[heads]))).eval(), tokens(3, 20)
    parts = logits_in_parts(model, x, [7, 1, 7, 5])  # the prompt, one token, several
    assert torch.allclose(parts, model(x), atol=1e-5)


def test_activation_checkpointing_changes_memory_and_nothing_else():
    grads = []
    for on in (False, True):
        model = Decoder(config(dropout=0.1))
        model.activation_checkpointing = on
        torch.manual_seed(5)
        model(tokens(), tokens(seed=1)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("place", POSITIONS)
def test_the_stream_and_its_gradient_can_be_narrow_from_the_first_block_to_the_last(place):
    model = with_random_gains(Decoder(config(norm_pos=place, dropout=0.1)))
    types, losses = [], []

    def look(block, inputs, output):
        types.append((inputs[0].dtype, output.dtype))
        output.register_hook(lambda gradient: types.append((gradient.dtype, gradient.dtype)))

    for block in model.blocks:
        block.register_forward_hook(look)
    for model.stream_dtype in (None, torch.bfloat16):
        types.clear()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(tokens(), tokens(seed=1)))
        losses[-1].backward()
        assert len(types) == 2 * len(model.blocks)
        assert set(types) == {(model.stream_dtype or torch.float32,) * 2}
    assert losses[0] != losses[1] and torch.allclose(*losses, rtol=5e-3)
    assert losses[1].dtype == model.embed.weight.grad.dtype == torch.float32


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
@pytest.mark.parametrize("place", POSITIONS)
def test_dropout_acts_on_each_branch_wherever_the_norms_stand(place, branch):
    model = Decoder(config(dropout=0.5, norm_pos=place))
    block, x = model.blocks[0], torch.randn(2, 64, 64)
    block.attn.eval()  # without the dropout that attention has inside
    other = {"attn": block.ffn.down, "ffn": block.attn.out}[branch]
    torch.nn.init.zeros_(other.weight)  # so only `branch` has something that dropout can take out
    assert not torch.equal(block(x, model.cos, model.sin), block(x, model.cos, model.sin))
    block.eval()
    assert torch.equal(block(x, model.cos, model.sin), block(x, model.cos, model.sin))


def test_hidden_size_follows_llama():
    assert config(n_embd=4096, n_head=32, n_hidden=0).hidden_size == 11008  # Llama 7B
    assert config(n_embd=5120, n_head=40, n_hidden=0).hidden_size == 13824  # Llama 13B


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"n_embd": 60, "n_head": 7}, "nearest are 56 and 70"),
        ({"n_embd": 12, "n_head": 4}, "nearest are 8 and 16"),  # head size 3 is odd
        ({"n_kv_head": 3}, "choose n_kv_head from 1, 2, 4"),
        ({"n_layer": 0}, "n_layer must be between 1 and"),
        ({"block_size": 10**9}, "block_size must be between 1 and"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"n_hidden": -1}, "n_hidden must be 0"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
        ({"rope_low_freq": 9.0}, "below rope_high_freq"),
    ],
)
def test_impossible_shapes_are_refused_with_the_numbers(knobs, words):
    with pytest.raises(ValueError, match=words):
        config(**knobs)


def test_a_parameter_without_a_role_is_refused():
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

    counter, model = CompileCounterWithBackend("aot_eager"), Decoder(config(n_layer=1))
    forward = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    for seed in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(tokens(seed=seed), tokens(seed=seed + 1))
            assert loss.item() == pytest.approx(
                model(tokens(seed=seed), tokens(seed=seed + 1)).item(), rel=1e-3
            )
            loss.backward()
        with torch.no_grad():
            forward(tokens(seed=seed), tokens(seed=seed + 1))
    assert counter.frame_count == 2
