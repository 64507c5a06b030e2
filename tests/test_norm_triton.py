"""The Triton kernels against float64: on a CUDA GPU as they are, elsewhere in Triton's interpreter.

The interpreter has to be chosen before Triton is imported. So the tests that need the kernels skip in a process
without a GPU, and one of them starts a second pytest of this file with TRITON_INTERPRET=1.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import norm
import norm_triton
from model import Decoder, ModelConfig
from norm_triton import INTERPRETED, add_rmsnorm, backward_op, forward_op, rmsnorm, triton

DEVICE, EPS = "cpu" if INTERPRETED else "cuda", 1e-5
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
ROOT = Path(__file__).parent.parent
kernels = pytest.mark.skipif(norm_triton.available() is not None, reason=str(norm_triton.available()))
shapes = pytest.mark.parametrize("M", [1, 5, 37])
widths = pytest.mark.parametrize("C", [48, 64, 100])
dtypes = pytest.mark.parametrize("x_dtype, branch_dtype", [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32)])


@pytest.fixture(autouse=True)
def interpreter_computes_like_a_gpu(monkeypatch):
    """Triton's interpreter cuts fp32 down to bf16; a GPU rounds to nearest, ties to even. And the bound of a loop is an
    array [1] there, of which Triton 3.6 makes an int in a way that NumPy deprecates, and from 2.5 on refuses."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut, patch = InterpreterBuilder.create_fp_trunc, interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def to_nearest(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (triton.language.float32, triton.language.bfloat16):
            return cut(self, source, dtype)
        bits = source.data.view(np.uint32)
        return TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", to_nearest)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)


def random(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def weights(C, dtype=F32):
    return (1 + 0.2 * random(C, seed=9)).to(dtype)


def ulps(value, exact):
    """Largest distance in units in the last place of value's dtype, at the size of the exact value or of 1."""
    spacing = torch.finfo(value.dtype).eps * 2.0 ** torch.floor(torch.log2(exact.abs().clamp_min(1.0)))
    return ((value.double() - exact).abs() / spacing).max().item()


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


BOUND = {F32: 8, BF16: 0.51}  # one rounding is half a unit; in fp32 the order of the sums counts too


@kernels
@dtypes
@widths
@shapes
def test_forward_and_backward_are_near_float64(M, C, x_dtype, branch_dtype):
    x, branch = random(M, C, dtype=x_dtype).requires_grad_(), random(M, C, seed=1, dtype=branch_dtype).requires_grad_()
    gain = weights(C).requires_grad_()
    total, normed = add_rmsnorm(x, branch, gain, EPS)
    assert torch.equal(total, x + branch) and total.dtype == normed.dtype == (x + branch).dtype
    d_outputs = [random(M, C, seed=s, dtype=total.dtype) for s in (2, 3)]
    dx, d_branch, d_gain = torch.autograd.grad((total, normed), (x, branch, gain), d_outputs)

    exact_total = (x + branch).detach().double().requires_grad_()
    exact_gain = gain.detach().double().requires_grad_()
    exact = norm.rmsnorm(exact_total, exact_gain, EPS)
    exact_dx, exact_d_gain = torch.autograd.grad(exact, (exact_total, exact_gain), d_outputs[1].double())
    exact_dx += d_outputs[0].double()
    assert ulps(normed, exact.detach()) <= BOUND[normed.dtype]
    assert (dx.dtype, d_branch.dtype, d_gain.dtype) == (x_dtype, branch_dtype, F32)
    assert max(ulps(d, exact_dx) / BOUND[d.dtype] for d in (dx, d_branch)) <= 1
    assert torch.allclose(d_gain.double(), exact_d_gain, rtol=1e-5, atol=1e-5)


@kernels
@pytest.mark.parametrize("dtype", BOUND)
@widths
def test_the_plain_norm_and_16_bit_gains_are_near_float64(C, dtype):
    x, gain = random(5, 7, C, dtype=dtype).requires_grad_(), weights(C, dtype).requires_grad_()
    d_normed = random(5, 7, C, seed=2, dtype=dtype)
    normed = rmsnorm(x, gain, EPS)
    dx, d_gain = torch.autograd.grad(normed, (x, gain), d_normed)
    wide = [t.detach().double().requires_grad_() for t in (x, gain)]
    exact = norm.rmsnorm(*wide, EPS)
    exact_dx, exact_d_gain = torch.autograd.grad(exact, wide, d_normed.double())
    assert normed.shape == dx.shape == x.shape and normed.dtype == dx.dtype == d_gain.dtype == dtype
    assert max(ulps(normed, exact.detach()), ulps(dx, exact_dx)) <= BOUND[dtype]
    assert ulps(d_gain, exact_d_gain) <= (0.51 if dtype == BF16 else 32)  # in fp32 35 rows cancel each other


@kernels
def test_gradient_is_right_in_float64():
    x, branch, gain = (t.double().requires_grad_() for t in (random(3, 4), random(3, 4, seed=1), weights(4)))
    assert torch.autograd.gradcheck(lambda *t: add_rmsnorm(*t, EPS), (x, branch, gain))
    assert torch.autograd.gradcheck(lambda *t: rmsnorm(*t, EPS), (x, gain))


@kernels
def test_the_norm_of_a_16_bit_sum_is_that_of_the_rounded_sum():
    x, branch, gain = random(37, 64, dtype=BF16), random(37, 64, seed=1, dtype=BF16), weights(64)
    assert torch.equal(add_rmsnorm(x, branch, gain, EPS)[1], rmsnorm(x + branch, gain, EPS))


@kernels
def test_the_gradient_of_the_gain_is_summed_in_fp32(monkeypatch):
    monkeypatch.setattr(norm_triton, "backward_programs", lambda *_: 1)
    M, C = 560, 1024  # two rows at a time: in bf16 a sum of ones stops at 256
    x = torch.ones(M, C, device=DEVICE, dtype=BF16)
    for gain in (weights(C).requires_grad_(), weights(C, BF16).requires_grad_()):
        (d_gain,) = torch.autograd.grad(rmsnorm(x, gain, EPS), gain, torch.ones_like(x))
        exact = torch.full_like(d_gain, M / (1 + EPS) ** 0.5)
        assert d_gain.dtype == gain.dtype
        assert torch.allclose(d_gain, exact, rtol=1e-5 if gain.dtype == F32 else 0.004)


@kernels
def test_the_number_of_programs_changes_only_the_rounding_of_the_gain(monkeypatch):
    x, gain, d_normed = random(200, 64).requires_grad_(), weights(64).requires_grad_(), random(200, 64, seed=1)
    results = []
    for programs in (1, 3, 100):  # seven tiles
        monkeypatch.setattr(norm_triton, "backward_programs", lambda *_, n=programs: n)
        results.append(torch.autograd.grad(rmsnorm(x, gain, EPS), (x, gain), d_normed))
    for dx, d_gain in results[1:]:
        assert torch.equal(dx, results[0][0])
        assert torch.allclose(d_gain, results[0][1], rtol=1e-5, atol=1e-5)


@kernels
def test_an_output_that_is_not_used_has_no_part_in_the_gradient():
    x, branch, gain = (t.requires_grad_() for t in (random(5, 48), random(5, 48, seed=1, dtype=BF16), weights(48)))
    outputs, zero, d = add_rmsnorm(x, branch, gain, EPS), torch.zeros_like(x), random(5, 48, seed=2)
    for used, d_outputs in ((0, (d, zero)), (1, (zero, d))):
        alone = torch.autograd.grad(outputs[used], (x, branch, gain), d, retain_graph=True, materialize_grads=True)
        both = torch.autograd.grad(outputs, (x, branch, gain), d_outputs, retain_graph=True)
        assert equal(alone, both)


@kernels
def test_zero_rows_are_no_error():
    x, branch, gain = random(0, 3, 48).requires_grad_(), random(0, 3, 48, dtype=BF16), weights(48).requires_grad_()
    total, normed = add_rmsnorm(x, branch, gain, EPS)
    dx, d_gain = torch.autograd.grad((total, normed), (x, gain), (total, normed))
    assert total.shape == normed.shape == dx.shape == (0, 3, 48)
    assert torch.equal(d_gain, torch.zeros(48, device=DEVICE))


@kernels
def test_strides_do_not_matter():
    x, branch, d = (random(48, 7, seed=s).t().requires_grad_() for s in (0, 1, 2))
    gain = weights(96)[::2].requires_grad_()
    strided = torch.autograd.grad(add_rmsnorm(x, branch, gain, EPS), (x, branch, gain), (d, d[:1].expand(7, 48)))
    x, branch, d, gain = (t.detach().contiguous().requires_grad_() for t in (x, branch, d, gain))
    straight = torch.autograd.grad(add_rmsnorm(x, branch, gain, EPS), (x, branch, gain), (d, d[:1].repeat(7, 1)))
    assert equal(strided, straight)


@kernels
@pytest.mark.filterwarnings("ignore::UserWarning")  # opcheck's own
@pytest.mark.parametrize("dtype", [None, F32, BF16])
def test_the_operators_keep_the_rules_of_pytorch(dtype):
    x, gain = random(2, 5, 48).requires_grad_(), weights(48, dtype or BF16).requires_grad_()
    branch = None if dtype is None else random(2, 5, 48, seed=1, dtype=dtype).requires_grad_()
    torch.library.opcheck(forward_op, (x, branch, gain, EPS))
    assert [t.requires_grad for t in forward_op(x, branch, gain, EPS)] == [True, True, False]
    rstd, d = random(2, 5, seed=2), random(2, 5, 48, seed=3)
    torch.library.opcheck(backward_op, (x.detach(), rstd, gain.detach(), None if branch is None else d, d, dtype))


def block(x, branch, gain):
    """What surrounds the norm in a decoder: both outputs are used."""
    total, normed = add_rmsnorm(x.sin(), branch, gain, EPS)
    return (total + rmsnorm(normed.cos(), gain, EPS)).square()


def value_and_gradients(function, tensors):
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, torch.ones_like(y))]


@kernels
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_keeps_one_graph_and_every_value(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager" if INTERPRETED else "inductor")
    for M in (5, 8):
        tensors = [t.requires_grad_() for t in (random(M, 48), random(M, 48, seed=1, dtype=BF16), weights(48))]
        for value, expected in zip(value_and_gradients(compiled, tensors), value_and_gradients(block, tensors),
                                   strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@kernels
def test_activation_checkpointing_changes_nothing():
    tensors = [t.requires_grad_() for t in (random(5, 48), random(5, 48, seed=1), weights(48))]
    again = value_and_gradients(lambda *t: checkpoint(block, *t, use_reentrant=False), tensors)
    assert equal(again, value_and_gradients(block, tensors))


@kernels
def test_autocast_changes_nothing():
    x, branch, gain = random(5, 48), random(5, 48, seed=1, dtype=BF16), weights(48)
    with torch.autocast(DEVICE, BF16):
        inside = add_rmsnorm(x, branch, gain, EPS)
    assert equal(inside, add_rmsnorm(x, branch, gain, EPS))


@kernels
@pytest.mark.parametrize("call, message", [
    (lambda: add_rmsnorm(random(2, 48), random(3, 48), weights(48), EPS), r"must be like x, \[2, 48\].*\[3, 48\]"),
    (lambda: rmsnorm(random(2, 48), weights(24), EPS), r"gain must be \[48\]"),
    (lambda: rmsnorm(random(1, 16385), weights(16385), EPS), "1 to 16384 channels, got 16385: use norm_impl=compile"),
])
def test_what_the_kernels_cannot_do_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter computes on the CPU")
def test_a_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="norm_impl=triton"):
        rmsnorm(torch.ones(2, 48), torch.ones(48), EPS)


def test_available_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(norm_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(norm_triton, "triton", object())
    assert norm_triton.available() == ("norm_impl=triton needs a CUDA GPU, and there is none here: use "
                                       "norm_impl=compile, which fuses the same way")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert norm_triton.available() is None


@pytest.mark.skipif(INTERPRETED, reason="as in a process that interprets nothing")
def test_without_triton_the_file_can_be_imported_and_says_so():
    program = "import sys; sys.modules['triton'] = None; import norm_triton; print(norm_triton.available())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("norm_impl=triton needs the package triton"), done.stderr


@pytest.mark.skipif(triton is None or INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize("C", [100, 768, 8192])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(capability, C, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = norm_triton.tile(C)
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    for kernel in (norm_triton.forward_kernel, norm_triton.backward_kernel):
        for absent in (set(), {"branch_ptr", "d_total_ptr", "d_branch_ptr"}):
            types = {"M": "i32", "eps": "fp32", "branch_ptr": "*bf16", "d_branch_ptr": "*bf16"}
            given = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in constants and n not in absent}
            constexprs = constants | dict.fromkeys(absent & set(kernel.arg_names))
            source = ASTSource(kernel, given | dict.fromkeys(constexprs, "constexpr"), constexprs)
            assert "cubin" in triton.compile(source, GPUTarget("cuda", capability, 32), options).asm


@kernels
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_computes_the_same_with_the_kernel(tied):
    def loss_and_gradients(impl):
        model = Decoder(ModelConfig(n_layer=2, n_head=2, n_embd=32, n_hidden=48, block_size=8, vocab_size=11,
                                    tie_embeddings=tied, norm_impl=impl), seed=1).to(DEVICE)
        ids = torch.arange(16, device=DEVICE).view(2, 8) % 11
        loss = model(ids, ids.roll(1, 1))
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters()}

    (loss, gradients), (wanted, references) = loss_and_gradients("triton"), loss_and_gradients("eager")
    assert torch.allclose(loss, wanted, rtol=1e-6)
    for name, reference in references.items():
        assert torch.allclose(gradients[name], reference, atol=1e-6, rtol=1e-4), name


@kernels
def test_a_blocks_sum_goes_through_the_kernel(monkeypatch):
    calls, original = [], norm_triton.add_rmsnorm
    monkeypatch.setattr(norm_triton, "add_rmsnorm", lambda *a: calls.append(1) or original(*a))
    model = Decoder(ModelConfig(n_layer=3, n_head=2, n_embd=32, block_size=8, vocab_size=11, norm_impl="triton"))
    model.to(DEVICE)(torch.zeros(1, 4, dtype=torch.long, device=DEVICE))
    assert len(calls) == 3


@pytest.mark.skipif(norm_triton.available() is None, reason="it can run here")
def test_without_a_gpu_a_model_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="norm_impl=triton needs .*use norm_impl=compile"):
        Decoder(ModelConfig(vocab_size=11, norm_impl="triton"))


def test_only_rmsnorm_has_a_kernel():
    with pytest.raises(ValueError, match="norm_impl=triton has no kernel for norm=layernorm, only for rmsnorm, none"):
        ModelConfig(norm="layernorm", norm_impl="triton")


@pytest.mark.skipif(triton is None, reason="triton is not installed")
@pytest.mark.skipif(norm_triton.available() is None, reason="the tests above run here themselves")
def test_everything_above_holds_in_the_interpreter_of_triton():
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_norm_triton.py"],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
