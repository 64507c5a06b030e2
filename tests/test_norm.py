"""The norm contract, clause by clause, for every kind. Sizes are small; everything is held against float64."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import norm as norm_module
from model import Decoder, ModelConfig
from norm import EAGER, ELEMENTWISE, FUSED, PARAMETERS, Norm, norm_function, rmsnorm

KINDS = list(EAGER)
IMPLS = ["eager", "fused", "compile"]
PAIRS = [(kind, impl) for kind in KINDS for impl in IMPLS if impl != "fused" or kind in FUSED]
COMMON = ("rmsnorm", "layernorm")  # compiled in every test; the others, which take their time, in two
STATISTICAL = [kind for kind in KINDS if kind not in ELEMENTWISE]
C, EPS = 48, 1e-5
EXACT = dict(atol=1e-12, rtol=1e-12)


def make(kind, impl="eager", eps=EPS, dtype=torch.float32, width=C, p=0.0625):
    """A norm whose parameters are not the initial ones."""
    norm, g = Norm(kind, width, eps, impl, p), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g)
    return norm.to(dtype)


def inputs(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, C, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ulps(value, exact):
    """Largest distance in units in the last place of value's dtype, at the size of the exact value or of 1."""
    spacing = torch.finfo(value.dtype).eps * 2.0 ** torch.floor(torch.log2(exact.abs().clamp_min(1.0)))
    return ((value.double() - exact).abs() / spacing).max().item()


# By hand.

X = torch.tensor([3.0, 4.0, 0.0, 0.0])  # mean 7/4, mean of squares 25/4
BY_HAND = {
    "layernorm": ([2.0, 1.0], [2 * 1.25 / 3.1875**0.5 + 1, 2 * 2.25 / 3.1875**0.5 + 1]),  # variance 51/16
    "layernorm_nobias": ([2.0], [2 * 1.25 / 3.1875**0.5, 2 * 2.25 / 3.1875**0.5]),
    "rmsnorm": ([2.0], [2.4, 3.2]),
    "rmsnorm_noparam": ([], [1.2, 1.6]),
    "rmsnorm1p": ([2.0], [3.6, 4.8]),
    "prmsnorm": ([2.0], [2.0, 8 / 3]),  # the first of the four channels judges: its RMS is 3
    "dyt": ([2.0, 0.5], [2 * math.tanh(1.5), 2 * math.tanh(2.0)]),
    "derf": ([2.0, 1.0, 0.5, -1.0], [2 * math.erf(0.5) + 1, 2 * math.erf(1.0) + 1]),
    "none": ([], [3.0, 4.0])}


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind):
    weights, wanted = BY_HAND[kind]
    norm = Norm(kind, 4, 0.0, p=0.25)
    assert len(weights) == len(PARAMETERS[kind])
    with torch.no_grad():
        for parameter, value in zip(norm.parameters(), weights, strict=True):
            parameter.fill_(value)
    assert torch.allclose(norm(X)[:2], torch.tensor(wanted))


@pytest.mark.parametrize("p, width, k", [(0.0625, 768, 48), (0.0625, 100, 7), (0.5, 3, 2), (1.0, 5, 5)])
def test_prmsnorm_rounds_its_share_of_the_channels_up(p, width, k):
    x = torch.arange(1.0, width + 1)
    wanted = x / x[:k].square().mean().sqrt()
    assert torch.allclose(EAGER["prmsnorm"](x, torch.ones(width), 0.0, p), wanted)


@pytest.mark.parametrize("kind", STATISTICAL)
def test_eps_stands_inside_the_root(kind):
    x = torch.tensor([1e-3, -1e-3] * 2)  # mean of squares = variance = 1e-6
    norm = Norm(kind, 4, 1e-6)
    assert torch.allclose(norm(x).abs(), torch.full((4,), 2**-0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_norm_has_the_constants_of_its_paper(kind):
    norm = Norm(kind, C, EPS, alpha=0.25)
    for name, parameter in norm.named_parameters():
        assert (parameter == (0.25 if name == "alpha" else PARAMETERS[kind][name])).all()
        assert parameter.numel() == (1 if name in ("alpha", "shift") else C)


# The paper's invariances, table 1: W a weight matrix before the norm, x a data set. (Zhang & Sennrich 2019.)

INVARIANT_TO = {  # W re-scaled, W re-centred, data re-scaled, data re-centred, one case re-scaled
    **{kind: (True, True, True, False, True) for kind in ("layernorm", "layernorm_nobias")},
    **{kind: (True, False, True, False, True) for kind in ("rmsnorm", "rmsnorm_noparam", "rmsnorm1p", "prmsnorm")},
    **{kind: (False,) * 5 for kind in ("dyt", "derf", "none")}}


@pytest.mark.parametrize("kind", KINDS)
def test_invariances_are_those_of_the_papers_table(kind):
    norm = make(kind, eps=0.0, dtype=torch.float64)
    x, W = inputs(6, dtype=torch.float64), inputs(C, seed=1, dtype=torch.float64)  # W [C in, C out]
    one_case = torch.ones(6, 1, dtype=torch.float64)
    one_case[2] = 7.0
    changed = (x @ (3 * W), x @ (W + inputs(1, seed=2, dtype=torch.float64).T),  # each neuron gets the same offset
               (3 * x) @ W, (x + 0.5) @ W, (one_case * x) @ W)
    still = norm(x @ W)
    assert tuple(torch.allclose(norm(a), still, **EXACT) for a in changed) == INVARIANT_TO[kind]


@pytest.mark.parametrize("kind", STATISTICAL)
@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_gradient_of_the_weight_shrinks_as_the_weight_grows_and_ignores_the_datas_scale(kind, scale):
    """Section 4 of the paper: an implicit learning-rate adaptation."""
    norm, x = make(kind, eps=0.0, dtype=torch.float64), inputs(6, dtype=torch.float64)

    def gradient(weight_scale, data_scale):
        W = (weight_scale * inputs(C, seed=1, dtype=torch.float64)).requires_grad_()
        (norm(data_scale * x @ W) * inputs(6, seed=2, dtype=torch.float64)).sum().backward()
        return W.grad

    assert torch.allclose(gradient(scale, 1.0), gradient(1.0, 1.0) / scale)
    assert torch.allclose(gradient(1.0, scale), gradient(1.0, 1.0))


@pytest.mark.parametrize("kind", ["layernorm", "layernorm_nobias", "rmsnorm", "rmsnorm_noparam"])
def test_shifting_all_channels_is_seen_by_rmsnorm_but_not_by_layernorm(kind):
    norm, x = make(kind, dtype=torch.float64), inputs(5, dtype=torch.float64)
    assert torch.allclose(norm(x + 3), norm(x), atol=1e-9) == kind.startswith("layernorm")


# One norm is another.

def test_rmsnorm_equals_layernorm_on_centred_input():
    x = inputs(5, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    gain = make("rmsnorm", dtype=torch.float64).gain
    assert torch.allclose(rmsnorm(x, gain, EPS), EAGER["layernorm"](x, gain, torch.zeros(C), EPS), **EXACT)


def test_rmsnorm1p_with_zeros_is_rmsnorm_with_ones_is_rmsnorm_without_a_gain():
    x = inputs(5)
    values = [Norm(kind, C, EPS)(x) for kind in ("rmsnorm1p", "rmsnorm", "rmsnorm_noparam")]
    assert torch.equal(values[0], values[1]) and torch.equal(values[1], values[2])


def test_prmsnorm_of_all_channels_is_rmsnorm():
    x = inputs(5)
    assert torch.equal(make("prmsnorm", p=1.0)(x), make("rmsnorm")(x))


def test_layernorm_without_its_bias_is_layernorm_with_zeros():
    x, gain = inputs(5), make("rmsnorm").gain
    assert torch.equal(EAGER["layernorm"](x, gain, torch.zeros(C), EPS), EAGER["layernorm_nobias"](x, gain, EPS))


@pytest.mark.parametrize("kind", [k for k in FUSED if k != "none"])
def test_eager_equals_pytorch(kind):
    x, norm = inputs(5, 7), make(kind)
    gain = 1 + norm.gain if kind == "rmsnorm1p" else getattr(norm, "gain", None)
    reference = (F.layer_norm(x, (C,), gain, getattr(norm, "bias", None), EPS) if kind.startswith("layernorm")
                 else F.rms_norm(x, (C,), gain, EPS))
    assert torch.allclose(norm(x), reference, atol=1e-6, rtol=1e-6)


# Precision.

@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_right_in_float64(kind):
    norm = make(kind, dtype=torch.float64)
    tensors = [inputs(3, dtype=torch.float64).requires_grad_(), *norm.parameters()]
    assert torch.autograd.gradcheck(lambda x, *w: norm.function(x, *w, *norm.constants), tensors)


# One rounding is half a unit. In bfloat16 the fused kernels also round the gain (and LayerNorm's bias). Inductor's erf
# on a CPU is a polynomial that is off by four units.
BOUND = {torch.float32: {"eager": 4, "fused": 4, "compile": 5},
         torch.bfloat16: {"eager": 0.51, "fused": 1.5, "compile": 0.51}}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("kind, impl", PAIRS)
def test_every_implementation_is_near_float64(kind, impl, dtype):
    x = inputs(64, dtype=dtype)
    value = make(kind, impl)(x)
    assert value.dtype == dtype
    assert ulps(value, make(kind).double()(x.double())) <= BOUND[dtype][impl]


@pytest.mark.parametrize("kind, impl", PAIRS)
def test_every_implementation_has_the_gradient_of_float64(kind, impl):
    def gradients(norm, dtype):
        x = inputs(64, dtype=dtype).requires_grad_()
        (norm(x) * inputs(64, seed=2).to(dtype)).sum().backward()
        return [t.grad.double() for t in (x, *norm.parameters())]

    exact = gradients(make(kind).double(), torch.float64)
    for value, reference in zip(gradients(make(kind, impl), torch.float32), exact, strict=True):
        assert torch.allclose(value, reference, atol=1e-5 * reference.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("kind, impl", [pair for pair in PAIRS if pair[1] != "compile" or pair[0] in COMMON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_dtype_is_the_inputs_under_autocast_too(kind, impl, dtype):
    norm, x = make(kind, impl), inputs(4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    assert inside.dtype == dtype
    assert torch.equal(inside, norm(x))  # and not one bit of it changes


def test_a_large_rmsnorm_may_be_of_one_row_without_a_batch(monkeypatch):
    monkeypatch.setattr(norm_module, "LARGE", 0)
    x = inputs().requires_grad_()
    make("rmsnorm", "compile")(x).sum().backward()
    ours, x.grad = x.grad, None
    make("rmsnorm")(x).sum().backward()
    assert torch.allclose(ours, x.grad, atol=1e-5)


def test_a_second_derivative_of_a_large_rmsnorm_is_refused(monkeypatch):
    """It would leave out what goes through the kept sums of squares."""
    monkeypatch.setattr(norm_module, "LARGE", 0)
    x = inputs(3, 48).requires_grad_()
    slope, = torch.autograd.grad(make("rmsnorm", "compile")(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [48, 47])
def test_gradient_of_a_large_rmsnorm_goes_through_rows_side_by_side(rows, dtype, monkeypatch):
    """144 rows are eighteen times eight; 141 have no common divisor with eight and go one by one."""
    monkeypatch.setattr(norm_module, "LARGE", 141 * C * dtype.itemsize)

    def gradients(norm, dtype):
        x = inputs(3, rows).to(dtype).requires_grad_()
        y = norm(x)
        (y * inputs(3, rows, seed=2).to(dtype)).sum().backward()
        return type(y.grad_fn).__name__, [t.detach().double() for t in (y, x.grad, norm.gain.grad)]

    (ours, values), (_, exact) = gradients(make("rmsnorm", "compile"), dtype), gradients(make("rmsnorm"), dtype)
    assert ours == "LargeRMSNormBackward"
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for value, reference in zip(values, exact, strict=True):
        assert torch.allclose(value, reference, atol=tolerance * reference.abs().max().item(), rtol=tolerance)


def test_autocast_is_off_inside():
    norm, inside = Norm("rmsnorm", C, EPS), []
    norm.function = lambda *arguments: inside.append(torch.is_autocast_enabled("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        norm(inputs(2))
    assert inside == [False]


def test_gain_is_multiplied_before_the_one_cast():
    x, gain = inputs(64, dtype=torch.bfloat16), make("rmsnorm").gain
    cast_first = (rmsnorm(x, torch.ones(C), EPS) * gain).to(torch.bfloat16)  # LLaMA's order: rounds twice
    assert not torch.equal(rmsnorm(x, gain, EPS), cast_first)


@pytest.mark.parametrize("impl", IMPLS)
def test_rmsnorm1p_keeps_gains_that_bfloat16_would_lose(impl):
    norm, x = Norm("rmsnorm1p", C, EPS, impl), inputs(64)
    torch.nn.init.constant_(norm.gain, 1e-3)  # 1.001 is 1 in bfloat16
    assert torch.allclose(norm(x), 1.001 * Norm("rmsnorm_noparam", C, EPS)(x), rtol=1e-5)


def test_fused_is_the_kernel_of_pytorch():
    x = inputs(4, dtype=torch.bfloat16).requires_grad_()
    for kind in ("layernorm", "layernorm_nobias"):
        assert "NativeLayerNorm" in type(make(kind, "fused")(x).grad_fn).__name__


# In a model.

SHAPE = dict(vocab_size=11, n_layer=2, n_embd=32, n_head=2, block_size=8)


@pytest.mark.parametrize("kind, impl", PAIRS)
def test_the_norm_and_its_implementation_leave_all_other_weights_alone(kind, impl):
    reference = dict(Decoder(ModelConfig(**SHAPE, norm="none"), seed=3).named_parameters())
    assert all(p.ndim == 2 for p in reference.values())
    norms = ["norm", *(f"blocks.{layer}.{branch}_norm" for layer in (0, 1) for branch in ("attn", "ffn"))]
    wanted = reference | {f"{norm}.{leaf}": torch.tensor(start) for norm in norms
                          for leaf, start in PARAMETERS[kind].items()}
    if kind in ("dyt", "derf"):  # their authors' scale of the embedding besides
        wanted["embed_scale.gain"] = torch.tensor(math.sqrt(SHAPE["n_embd"]))
    weights = dict(Decoder(ModelConfig(**SHAPE, norm=kind, norm_impl=impl), seed=3).named_parameters())
    assert weights.keys() == wanted.keys()
    assert [name for name, p in weights.items() if not torch.equal(p, wanted[name].expand(p.shape))] == []


@pytest.mark.parametrize("kind", KINDS)
def test_norm_initialisation_draws_no_random_numbers(kind):
    before = torch.get_rng_state()
    Norm(kind, C, EPS)
    assert torch.equal(before, torch.get_rng_state())


def test_compiled_norm_compiles_once_for_all_layers():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Decoder(ModelConfig(**SHAPE | {"n_layer": 4}, norm_impl="compile"))
    for _ in range(2):
        model(torch.zeros(2, 8, dtype=torch.long)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", sorted(EAGER.keys() - FUSED.keys()))
def test_a_kernel_that_pytorch_has_not_is_refused(kind):
    with pytest.raises(ValueError, match=f"fused has no kernel for norm={kind}.*norm_impl=compile or eager"):
        ModelConfig(norm=kind, norm_impl="fused")


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="layernorm, .*, rmsnorm, .*, none, got 'rms'"):
        norm_function("rms", "eager")


@pytest.mark.parametrize("kind, before, after", [
    ("dyt", '{"gain": 1.0, "alpha": 0.5}', '{"alpha": 0.5, "gain": 1.0}'),
    ("rmsnorm1p", '"rmsnorm1p": {"gain": 0.0}, ', ""),
    ("rmsnorm1p", '"rmsnorm1p": rmsnorm1p, ', ""), ("derf", '"alpha", "shift")  # last', '"alpha")  # last'),
    ("layernorm", '{"gain": 1.0, "bias": 0.0}', '{"gain": 1.0}'), ("rmsnorm_noparam", '"rmsnorm_noparam": {}',
                                                                   '"rmsnorm_noparam": {"gain": 1.0}'),
    ("none", '    """x: no norm at all; the control that tells what a norm costs and whether it is needed."""\n', "")])
def test_a_norm_that_is_not_entered_everywhere_alike_is_named_at_import(kind, before, after):
    source = inspect.getsource(norm_module)
    assert before in source
    with pytest.raises(AssertionError, match=f"norm {kind}: EAGER, PARAMETERS"):
        exec(source.replace(before, after), {"__name__": "copy"})
