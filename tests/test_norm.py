"""The contract of norm.py, clause by clause, for every norm, in comparison with float64."""

import inspect
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, slow

from model import Decoder, ModelConfig
from norm import EAGER, FUSED, IMPLEMENTED, NORMS, Norm, norm_function, rmsnorm

KINDS = list(NORMS)
PAIRS = [(kind, impl) for kind in KINDS for impl in IMPLEMENTED if kind in IMPLEMENTED[impl]]
STATISTICAL = [kind for kind in KINDS if NORMS[kind].has_statistics]
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
    """The largest error in units in the last place of value's dtype, at the size of the exact
    value, or of 1 if that is larger.
    """
    size = 2.0 ** torch.floor(torch.log2(exact.abs().clamp_min(1.0)))
    spacing = torch.finfo(value.dtype).eps * size
    return ((value.double() - exact).abs() / spacing).max().item()


# By hand.

X = torch.tensor([3.0, 4.0, 0.0, 0.0])  # mean 7/4, mean of squares 25/4
STD = 3.1875**0.5  # variance 51/16
BY_HAND = {  # kind -> (parameters, the first two results)
    "layernorm": ([2.0, 1.0], [2 * 1.25 / STD + 1, 2 * 2.25 / STD + 1]),
    "layernorm_nobias": ([2.0], [2 * 1.25 / STD, 2 * 2.25 / STD]),
    "rmsnorm": ([2.0], [2.4, 3.2]),
    "rmsnorm_noparam": ([], [1.2, 1.6]),
    "rmsnorm1p": ([2.0], [3.6, 4.8]),
    "ssnorm": ([2.0], [2.4, 3.2]),
    "prmsnorm": ([2.0], [2.0, 8 / 3]),  # the first of the four channels judges: its RMS is 3
    "dyt": ([2.0, 0.5], [2 * math.tanh(1.5), 2 * math.tanh(2.0)]),
    "derf": ([2.0, 1.0, 0.5, -1.0], [2 * math.erf(0.5) + 1, 2 * math.erf(1.0) + 1]),
    "tapernorm": ([2.0, -1.0], [2.4, 3.2]),  # as RMSNorm, until it fades: test_taper.py
    "none": ([], [3.0, 4.0]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind):
    weights, wanted = BY_HAND[kind]
    norm = Norm(kind, 4, 0.0, p=0.25)
    assert len(weights) == len(NORMS[kind].start)
    with torch.no_grad():
        for parameter, value in zip(norm.parameters(), weights, strict=True):
            parameter.fill_(value)
    assert torch.allclose(norm(X)[:2], torch.tensor(wanted))


@pytest.mark.parametrize(
    "p, width, k", [(0.0625, 768, 48), (0.0625, 100, 7), (0.5, 3, 2), (1.0, 5, 5)]
)
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
        assert (parameter == (0.25 if name == "alpha" else NORMS[kind].start[name])).all()
        one = name in ("alpha", "shift", "log_scale") or kind == "ssnorm"
        assert parameter.numel() == (1 if one else C)


# The invariances of table 1 in Zhang & Sennrich 2019: W is a matrix before the norm, x the data.
# W re-scaled, W re-centred, data re-scaled, data re-centred, one case re-scaled:

INVARIANT_TO = dict.fromkeys(("layernorm", "layernorm_nobias"), (True, True, True, False, True))
INVARIANT_TO |= dict.fromkeys(
    ("rmsnorm", "rmsnorm_noparam", "rmsnorm1p", "ssnorm", "prmsnorm", "tapernorm"),
    (True, False, True, False, True),
)
INVARIANT_TO |= dict.fromkeys(("dyt", "derf", "none"), (False,) * 5)


@pytest.mark.parametrize("kind", KINDS)
def test_invariances_are_those_of_the_papers_table(kind):
    norm = make(kind, eps=0.0, dtype=torch.float64)
    x, W = inputs(6, dtype=torch.float64), inputs(C, seed=1, dtype=torch.float64)  # W [C in, C out]
    one_case = torch.ones(6, 1, dtype=torch.float64)
    one_case[2] = 7.0
    changed = (
        x @ (3 * W),
        x @ (W + inputs(1, seed=2, dtype=torch.float64).T),  # each neuron gets the same offset
        (3 * x) @ W,
        (x + 0.5) @ W,
        (one_case * x) @ W,
    )
    still = norm(x @ W)
    assert tuple(torch.allclose(norm(a), still, **EXACT) for a in changed) == INVARIANT_TO[kind]


@pytest.mark.parametrize("kind", STATISTICAL)
@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_gradient_of_the_weight_shrinks_as_the_weight_grows_and_ignores_the_datas_scale(
    kind, scale
):
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
    gain, layernorm = make("rmsnorm", dtype=torch.float64).gain, EAGER["layernorm"]
    assert torch.allclose(rmsnorm(x, gain, EPS), layernorm(x, gain, torch.zeros(C), EPS), **EXACT)


def test_norms_that_differ_in_a_parameter_are_the_same_at_its_neutral_value():
    x, gain = inputs(5), make("rmsnorm").gain
    zeros, ones, with_gain = torch.zeros(C), torch.ones(C), rmsnorm(x, gain, EPS)
    without_gain = EAGER["rmsnorm_noparam"](x, EPS)
    assert torch.equal(EAGER["rmsnorm1p"](x, zeros, EPS), without_gain)
    assert torch.equal(rmsnorm(x, ones, EPS), without_gain)
    assert torch.equal(EAGER["prmsnorm"](x, gain, EPS, 1.0), with_gain)
    assert torch.equal(EAGER["ssnorm"](x, ones[:1], EPS), without_gain)
    without_bias = EAGER["layernorm_nobias"](x, gain, EPS)
    assert torch.equal(EAGER["layernorm"](x, gain, zeros, EPS), without_bias)


@pytest.mark.parametrize("kind", [k for k in FUSED if k != "none"])
def test_eager_equals_pytorch(kind):
    x, norm = inputs(5, 7), make(kind)
    gain = 1 + norm.gain if kind == "rmsnorm1p" else getattr(norm, "gain", None)
    gain = gain.expand(C) if kind == "ssnorm" else gain
    reference = (
        F.layer_norm(x, (C,), gain, getattr(norm, "bias", None), EPS)
        if kind.startswith("layernorm")
        else F.rms_norm(x, (C,), gain, EPS)
    )
    assert torch.allclose(norm(x), reference, atol=1e-6, rtol=1e-6)


# Precision.


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_right_in_float64(kind):
    norm = make(kind, dtype=torch.float64)
    tensors = [inputs(3, dtype=torch.float64).requires_grad_(), *norm.parameters()]
    constants = norm.constants.values()
    torch.autograd.gradcheck(lambda x, *w: norm.function(x, *w, *constants), tensors)


# One rounding is half a unit. In bfloat16 fused RMSNorm also rounds the gain. Inductor's erf on a
# CPU is a polynomial that is off by four units.
BOUND = {
    torch.float32: {"eager": 4, "fused": 4, "compile": 5},
    torch.bfloat16: {"eager": 0.51, "fused": 1.5, "compile": 0.51},
}


# Compiling takes its time: `make test` compiles one norm, and only for two tests.
UNCOMPILED = [slow(*pair) if pair[1] == "compile" else pair for pair in PAIRS]
QUICK_PAIRS = [
    slow(*pair) if pair[1] == "compile" and pair[0] != "rmsnorm" else pair for pair in PAIRS
]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("kind, impl", QUICK_PAIRS)
def test_every_implementation_is_near_float64(kind, impl, dtype):
    x = inputs(64, dtype=dtype)
    value = make(kind, impl)(x)
    assert value.dtype == dtype
    assert ulps(value, make(kind).double()(x.double())) <= BOUND[dtype][impl]


@pytest.mark.parametrize("kind, impl", QUICK_PAIRS)
def test_every_implementation_has_the_gradient_of_float64(kind, impl):
    def gradients(norm, dtype):
        x = inputs(64, dtype=dtype).requires_grad_()
        (norm(x) * inputs(64, seed=2).to(dtype)).sum().backward()
        return [t.grad.double() for t in (x, *norm.parameters())]

    exact = gradients(make(kind).double(), torch.float64)
    for value, reference in zip(gradients(make(kind, impl), torch.float32), exact, strict=True):
        assert torch.allclose(value, reference, atol=1e-5 * reference.abs().max().item(), rtol=1e-5)


def rows_gradients(norm, dtype):
    """The gradients of a norm's parameters on 2,048 rows in `dtype`, as float64."""
    x, dy = inputs(2048, dtype=torch.bfloat16), inputs(2048, seed=2, dtype=torch.bfloat16)
    norm(x.to(dtype)).backward(dy.to(dtype))
    return [parameter.grad.double() for parameter in norm.parameters()]


LEARNING = [slow(*p) if p[1] == "compile" else p for p in PAIRS if NORMS[p[0]].start]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, impl", LEARNING)
def test_gradients_of_the_parameters_are_summed_over_many_rows_without_loss(kind, impl, dtype):
    exact = rows_gradients(make(kind).double(), torch.float64)
    for value, reference in zip(rows_gradients(make(kind, impl), dtype), exact, strict=True):
        assert (value - reference).norm() <= 0.01 * reference.norm()


OVERFLOWING = [(kind, "eager") for kind in STATISTICAL] + [slow("rmsnorm", "compile")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, impl", OVERFLOWING)
def test_a_row_whose_squares_overflow_becomes_nan_and_no_other_row_does(kind, impl, dtype):
    x = inputs(3, dtype=dtype)
    x[1] *= 1e25
    rows = make(kind, impl)(x)
    assert rows[1].isnan().all() and rows[::2].isfinite().all()


@pytest.mark.parametrize("kind, impl", UNCOMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_dtype_is_the_inputs_under_autocast_too(kind, impl, dtype):
    norm, x = make(kind, impl), inputs(4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    assert inside.dtype == dtype
    assert torch.equal(inside, norm(x))  # and not one bit of it changes


def test_autocast_is_off_inside():
    norm, inside = Norm("rmsnorm", C, EPS), []
    norm.function = lambda x, **named: inside.append(torch.is_autocast_enabled("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        norm(inputs(2))
    assert inside == [False]


def test_gain_is_multiplied_before_the_one_cast():
    x, gain = inputs(64, dtype=torch.bfloat16), make("rmsnorm").gain
    cast_first = rmsnorm(x, torch.ones(C), EPS) * gain  # LLaMA's order: rounds twice
    assert not torch.equal(rmsnorm(x, gain, EPS), cast_first.to(torch.bfloat16))


@pytest.mark.parametrize("impl", ["eager", "fused", slow("compile")])
def test_rmsnorm1p_keeps_gains_that_bfloat16_would_lose(impl):
    norm, x = Norm("rmsnorm1p", C, EPS, impl), inputs(64)
    torch.nn.init.constant_(norm.gain, 1e-3)  # 1.001 is 1 in bfloat16
    assert torch.allclose(norm(x), 1.001 * Norm("rmsnorm_noparam", C, EPS)(x), rtol=1e-5)


def test_fused_is_the_kernel_of_pytorch():
    x = inputs(4).requires_grad_()
    for kind in ("layernorm", "layernorm_nobias"):
        assert "NativeLayerNorm" in type(make(kind, "fused")(x).grad_fn).__name__


# In a model.

SHAPE = dict(vocab_size=11, n_layer=2, n_embd=32, n_head=2, block_size=8)


@pytest.mark.parametrize("kind, impl", PAIRS)
def test_the_norm_and_its_implementation_leave_all_other_weights_alone(kind, impl):
    def weights(**knobs):
        return dict(Decoder(ModelConfig(**SHAPE, **knobs), seed=3).named_parameters())

    wanted = weights(norm="none")
    assert all(p.ndim == 2 for p in wanted.values())
    norms = [f"blocks.{i}.{branch}_norm" for i in (0, 1) for branch in ("attn", "ffn")]
    for norm in (*norms, "norm"):
        lasting = NORMS[kind].fades_from if norm == "norm" else ""
        for leaf, start in NORMS[lasting or kind].start.items():
            wanted[f"{norm}.{leaf}"] = torch.tensor(start)
    if kind in ("dyt", "derf"):  # their authors also scale the embedding
        wanted["embed_scale.gain"] = torch.tensor(math.sqrt(SHAPE["n_embd"]))
    found = weights(norm=kind, norm_impl=impl)
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name].expand(parameter.shape)), name


@pytest.mark.parametrize("kind", KINDS)
def test_norm_initialisation_draws_no_random_numbers(kind):
    before = torch.get_rng_state()
    Norm(kind, C, EPS)
    assert torch.equal(before, torch.get_rng_state())


def test_compiled_norm_compiles_once_for_all_layers(no_code):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Decoder(ModelConfig(**SHAPE | {"n_layer": 4}, norm_impl="compile"))
    for _ in range(2):
        model(torch.zeros(2, 8, dtype=torch.long)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", sorted(EAGER.keys() - FUSED.keys()))
def test_a_kernel_that_pytorch_has_not_is_refused(kind):
    told = f"fused has no kernel for norm={kind}.*norm_impl=compile or eager"
    with pytest.raises(ValueError, match=told):
        ModelConfig(norm=kind, norm_impl="fused")


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="layernorm, .*, rmsnorm, .*, none, got 'rms'"):
        norm_function("rms", "eager")


@pytest.mark.parametrize("kind", KINDS)
def test_the_entry_of_a_norm_is_what_its_functions_take_and_says_what_it_is(kind):
    entry = NORMS[kind]
    for function in {entry.eager, entry.fused or entry.eager}:
        arguments = [*inspect.signature(function).parameters]
        gate = ["gate"] if entry.fades_from else []
        assert arguments == ["x", *entry.start, *entry.constants, *gate]
    assert "weight" not in entry.start
    assert entry.words == entry.eager.__doc__.splitlines()[0]
    assert entry.words.endswith(".")


# A new norm, as somebody would add it who has read docs/contributing.md.

FUNCTIONS = """
def absnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = at_least_fp32(x)
    return (wide / (wide.abs().mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


def rootnorm(x: Tensor, exponent: Tensor, eps: float) -> Tensor:
    wide = at_least_fp32(x)
    return (wide / (wide.square().mean(-1, keepdim=True) + eps) ** exponent).to(x.dtype)


"""
ENTRIES = """\
NORMS = {
    "absnorm": NormEntry("x / (mean|x| + eps) * gain: by size.", absnorm, channels={"gain": 1.0}),
    "rootnorm": NormEntry(
        "x / (mean(x^2) + eps)^exponent: learns it.", rootnorm, scalars={"exponent": 0.5}
    ),
"""
USE = """
import shutil
import sys
from pathlib import Path
import sample, train
from exchange import hf
from lab import compare
from run.metrics import read_metrics
from weights import checkpoint

for call in (lambda: train.main(["--help"]), lambda: compare.main(["--list"])):
    assert call() == 0
for kind, leaf in (("absnorm", "gain"), ("rootnorm", "exponent")):
    knobs = [*sys.argv[1:], f"norm={kind}", "qk_norm=true", "watch=true", "optimizer=muon"]
    assert train.main([*knobs, f"out_dir={kind}"]) == 0
    (whole := Path(kind)).rename(part := Path(f"{kind}-part"))
    shutil.copytree(part, whole)
    checkpoint.path_of(part, 4).unlink()
    assert train.main([str(part)]) == 0
    a, b = (checkpoint.load_newest(out)["model"] for out in (whole, part))
    assert all((a[name] == b[name]).all() for name in a)
    assert (a[f"blocks.0.attn.q_norm.{leaf}"] != a[f"blocks.1.attn.q_norm.{leaf}"]).any()
    assert f"attn.q_norm_{leaf}_mean" in str(read_metrics(whole))
    assert sample.main([str(whole), "prompt=the", "max_new_tokens=4", "device=cpu"]) == 0
    try:
        assert hf.main(["export", str(whole), "hf"]) == 2
    except SystemExit as stop:
        assert stop.code == 2
"""


def test_a_function_and_an_entry_are_all_that_a_new_norm_needs(tmp_path, data_folder):
    table, text = "NORMS = {\n", (ROOT / "norm.py").read_text(encoding="utf-8")
    here = "# -- fused:"
    assert text.count(table) == text.count(here) == 1
    text = text.replace(here, FUNCTIONS + here).replace(table, ENTRIES)
    (tmp_path / "norm.py").write_text(text, encoding="utf-8")
    (tmp_path / "use.py").write_text(USE, encoding="utf-8")
    own = ["max_iters=4", "save_interval=2", "keep=9", f"dataset={data_folder / 'words'}"]
    knobs = {knob.partition("=")[0]: knob for knob in (*SMALL, *own)}.values()
    done = subprocess.run(
        [sys.executable, "use.py", str(ROOT / "config" / "tiny.py"), *knobs],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "(absnorm | rootnorm | layernorm |" in " ".join(done.stdout.split())  # of --help
    assert "rootnorm          x / (mean(x^2) + eps)^exponent: learns it." in done.stdout
    for kind in ("absnorm", "rootnorm"):
        assert f"no Llama computes what this model does: norm={kind}" in done.stderr
