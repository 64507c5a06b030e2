"""The norm contract, clause by clause. Sizes are small; every implementation is held against float64."""

import pytest
import torch
import torch.nn.functional as F

from model import Decoder, ModelConfig
from norm import EAGER, FUSED, Norm, layernorm, norm_function, rmsnorm

KINDS, IMPLS = ["rmsnorm", "layernorm"], ["eager", "fused", "compile"]
C, EPS = 48, 1e-5


def parameters(kind, dtype=torch.float32):
    """A gain near one and, for LayerNorm, a bias near zero."""
    g = torch.Generator().manual_seed(1)
    gain = 1 + 0.2 * torch.randn(C, generator=g)
    bias = 0.2 * torch.randn(C, generator=g)
    return [t.to(dtype) for t in ([gain] if kind == "rmsnorm" else [gain, bias])]


def inputs(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, C, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ulps(value, exact):
    """Largest distance in units in the last place of value's dtype, at the size of the exact value or of 1."""
    spacing = torch.finfo(value.dtype).eps * 2.0 ** torch.floor(torch.log2(exact.abs().clamp_min(1.0)))
    return ((value.double() - exact).abs() / spacing).max().item()


def test_rmsnorm_by_hand():
    x = torch.tensor([3.0, 4.0])  # mean of squares 12.5
    assert torch.allclose(rmsnorm(x, torch.tensor([1.0, 2.0]), 0.0), torch.tensor([3.0, 8.0]) / 12.5**0.5)


def test_layernorm_by_hand():
    x = torch.tensor([1.0, 3.0])  # mean 2, biased variance 1
    y = layernorm(x, torch.tensor([2.0, 2.0]), torch.tensor([0.0, 1.0]), 0.0)
    assert torch.allclose(y, torch.tensor([-2.0, 3.0]))


def test_eps_stands_inside_the_root():
    x = torch.full((4,), 1e-3)
    assert torch.allclose(rmsnorm(x, torch.ones(4), 1e-6), torch.full((4,), 2**-0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_eager_equals_pytorch(kind):
    x, weights = inputs(5, 7), parameters(kind)
    reference = F.rms_norm(x, (C,), *weights, EPS) if kind == "rmsnorm" else F.layer_norm(x, (C,), *weights, EPS)
    assert torch.allclose(EAGER[kind](x, *weights, EPS), reference, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_right_in_float64(kind):
    x = inputs(3, dtype=torch.float64).requires_grad_()
    weights = [w.requires_grad_() for w in parameters(kind, torch.float64)]
    assert torch.autograd.gradcheck(lambda x, *w: EAGER[kind](x, *w, EPS), (x, *weights))


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_the_input_changes_nothing(kind):
    x, weights = inputs(5, dtype=torch.float64), parameters(kind, torch.float64)
    for c in (1e-3, 7.0, 1e4):
        assert torch.allclose(EAGER[kind](c * x, *weights, 0.0), EAGER[kind](x, *weights, 0.0))


def test_shifting_the_input_changes_rmsnorm_but_not_layernorm():
    x = inputs(5, dtype=torch.float64)
    shifted = {kind: EAGER[kind](x + 3, *parameters(kind, torch.float64), 0.0) for kind in KINDS}
    still = {kind: EAGER[kind](x, *parameters(kind, torch.float64), 0.0) for kind in KINDS}
    assert torch.allclose(shifted["layernorm"], still["layernorm"])
    assert not torch.allclose(shifted["rmsnorm"], still["rmsnorm"], atol=0.1)


def test_rmsnorm_equals_layernorm_on_centred_input():
    x = inputs(5, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    gain, bias = torch.ones(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    assert torch.allclose(rmsnorm(x, gain, EPS), layernorm(x, gain, bias, EPS))


# One rounding is half a unit. In bfloat16 the fused kernels also round the gain (and LayerNorm's bias).
BOUND = {torch.float32: {"eager": 4, "fused": 4, "compile": 4},
         torch.bfloat16: {"eager": 0.51, "fused": 1.5, "compile": 0.51}}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_implementation_is_near_float64(kind, impl, dtype):
    x, weights = inputs(64, dtype=dtype), parameters(kind)
    exact = EAGER[kind](x.double(), *(w.double() for w in weights), EPS)
    value = norm_function(kind, impl)(x, *weights, EPS)
    assert value.dtype == dtype
    assert ulps(value, exact) <= BOUND[dtype][impl]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_implementation_has_the_gradient_of_float64(kind, impl):
    def gradients(function, dtype):
        tensors = [t.to(dtype).requires_grad_() for t in (inputs(64), *parameters(kind))]
        (function(*tensors, EPS) * inputs(64, seed=2).to(dtype)).sum().backward()
        return [t.grad.double() for t in tensors]

    for value, exact in zip(gradients(norm_function(kind, impl), torch.float32), gradients(EAGER[kind], torch.float64),
                            strict=True):
        assert torch.allclose(value, exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_dtype_is_the_inputs_under_autocast_too(kind, impl, dtype):
    norm = Norm(kind, C, EPS, impl)
    x = inputs(4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    assert inside.dtype == dtype
    assert torch.equal(inside, norm(x))  # and not one bit of it changes


def test_autocast_is_off_inside():
    norm, inside = Norm("rmsnorm", C, EPS), []
    norm.function = lambda *arguments: inside.append(torch.is_autocast_enabled("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        norm(inputs(2))
    assert inside == [False]


def test_gain_is_multiplied_before_the_one_cast():
    x, gain = inputs(64, dtype=torch.bfloat16), parameters("rmsnorm")[0]
    cast_first = (rmsnorm(x, torch.ones(C), EPS) * gain).to(torch.bfloat16)  # LLaMA's order: rounds twice
    assert not torch.equal(rmsnorm(x, gain, EPS), cast_first)


def test_fused_is_the_kernel_of_pytorch():
    assert FUSED.keys() == EAGER.keys()
    x = inputs(4, dtype=torch.bfloat16).requires_grad_()
    y = norm_function("layernorm", "fused")(x, *parameters("layernorm"), EPS)
    assert "NativeLayerNorm" in type(y.grad_fn).__name__


@pytest.mark.parametrize("impl", IMPLS)
def test_the_norm_and_its_implementation_leave_all_other_weights_alone(impl):
    shape = dict(vocab_size=11, n_layer=2, n_embd=32, n_head=2)
    models = {kind: Decoder(ModelConfig(**shape, norm=kind, norm_impl=impl), seed=3) for kind in KINDS}
    weights = {kind: {n: p for n, p in m.named_parameters() if not n.endswith(("gain", "bias"))}
               for kind, m in models.items()}
    assert weights["rmsnorm"].keys() == weights["layernorm"].keys()
    assert all(torch.equal(p, weights["layernorm"][n]) for n, p in weights["rmsnorm"].items())
    assert all((p == 1).all() for n, p in models["rmsnorm"].named_parameters() if n.endswith("gain"))


def test_norm_initialisation_draws_no_random_numbers():
    before = torch.get_rng_state()
    Norm("layernorm", C, EPS)
    assert torch.equal(before, torch.get_rng_state())


def test_compiled_norm_compiles_once_for_all_layers():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Decoder(ModelConfig(vocab_size=11, n_layer=4, n_embd=32, n_head=2, norm_impl="compile", block_size=8))
    for _ in range(2):
        model(torch.zeros(2, 8, dtype=torch.long)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="rmsnorm, layernorm"):
        Norm("rms", C, EPS)
