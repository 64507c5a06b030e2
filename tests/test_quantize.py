"""int8 matrices are as near as they can be, both ways to multiply by them agree, and rounding once
changes no bit.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Linear
from torch.utils._python_dispatch import TorchDispatchMode

from model import Decoder, ModelConfig
from sample import SampleOptions, generate, prepare_for_inference
from weights import quantize
from weights.quantize import (
    CONVERTED_AT_ONCE,
    LONG_MATRIX,
    Int8Linear,
    PackedLinear,
    SummedLinear,
    can_pack_matrices,
    pack_matrices,
    quantize_int8,
    round_matrices,
    sums_of_rows,
)


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(**knobs) -> Decoder:
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=48, n_hidden=64, block_size=32)
    model = Decoder(ModelConfig(**shape | {"vocab_size": 40} | knobs))
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.ndim == 2):
            parameter.copy_(random(*parameter.shape, seed=i) * 0.2)
    return model.eval()


IDS = torch.arange(20).view(2, 10)


class NamesOfCalls(TorchDispatchMode):
    """Collects the names of the operations that PyTorch calls."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


# Int8Linear


def test_each_weight_moves_by_at_most_half_a_step_of_its_row():
    weight = random(400, 64) * torch.logspace(-6, 6, 400)[:, None]
    layer = Int8Linear(weight)
    step = layer.scale.float()[:, None]
    assert layer.weight.dtype == torch.int8 and layer.scale.dtype == torch.bfloat16
    assert ((layer.weight * step - weight).abs() <= 0.5001 * step).all()
    assert (layer.weight.abs().amax(1) >= 126).all() and layer.weight.min() >= -127


def test_rows_of_zeros_and_of_the_smallest_numbers_stay_finite():
    weight = torch.zeros(3, 16)
    weight[1], weight[2] = 1e-45, 3e38
    layer = Int8Linear(weight)
    for dtype in (torch.float32, torch.bfloat16):
        assert layer(torch.full((1, 16), 1e-3, dtype=dtype)).isfinite().all()
    assert not layer.weight[:2].any()


def assert_products_of_the_rounded_weights(layer, rows, dtype):
    outputs, width = layer.weight.shape
    x = random(rows, width, seed=1).to(dtype)
    y = layer(x.view(1, rows, width))
    wanted = x.double() @ (layer.weight.double() * layer.scale.double()[:, None]).T
    assert y.shape == (1, rows, outputs) and y.dtype == dtype
    error = (y[0].double() - wanted).abs().max() / wanted.abs().max()
    by_kernel = rows <= 8 and width % 16 == 0
    assert error < (0.01 if by_kernel or dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 16, 24, 100, 128])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
def test_products_are_those_of_the_rounded_weights(dtype, width, rows):
    assert_products_of_the_rounded_weights(Int8Linear(random(37, width)), rows, dtype)


def test_a_matrix_that_is_converted_in_several_parts_gives_the_same_products():
    layer = Int8Linear(random(2 * CONVERTED_AT_ONCE // 1000 + 5, 1000))
    assert_products_of_the_rounded_weights(layer, 2, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_go_to_the_kernel_in_every_dtype(dtype):
    layer, x = Int8Linear(random(64, 256)), random(9, 256, seed=1).to(dtype)

    def kernel(x):
        product = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), layer.weight, layer.scale)
        return product.to(dtype)

    assert torch.equal(layer(x[:8]), kernel(x[:8]))
    # The kernel rounds once to bfloat16, the other way twice or not at all.
    assert not torch.equal(layer(x), kernel(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_products_as_sums_are_those_of_the_rounded_weights_in_fp32(rows, dtype):
    layer, x = Int8Linear(random(37, 100)), random(rows, 100, seed=1).to(dtype)
    y = sums_of_rows(x, layer.weight)
    wanted = x.double() @ layer.weight.double().T
    assert y.dtype == torch.float32 and y.shape == (rows, 37)
    assert (y - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_on_cuda_few_rows_are_sums_in_compiled_code_alone(monkeypatch):
    """Fake tensors have devices and dtypes, but no numbers, so there need be no GPU."""
    products = {}
    with FakeTensorMode():
        layer = Int8Linear(torch.empty(64, 256, device="cuda"))
        for compiling in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda c=compiling: c)
            for rows in (1, 4, 5):
                x = torch.empty(rows, 1, 256, device="cuda", dtype=torch.bfloat16)
                with NamesOfCalls() as called:
                    y = layer(x)
                assert y.shape == (rows, 1, 64) and y.dtype == torch.bfloat16
                products[compiling, rows] = "mm" in called.names
    assert [rows for rows in products if not products[rows]] == [(True, 1), (True, 4)]


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_one_row_is_a_sum_in_compiled_code_where_that_is_fast(monkeypatch, sums, dtype):
    monkeypatch.setattr(quantize, "SUMS_INT8", sums)
    torch._dynamo.reset()
    layer, kernel = Int8Linear(random(37, 64)), torch.ops.aten._weight_int8pack_mm
    calls = {}

    def watch(graph, inputs):
        calls[rows] = any(node.target is kernel for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(layer, backend=watch, dynamic=False)
    for rows in (1, 2):
        x = random(rows, 1, 64, seed=1).to(dtype)
        y = compiled(x)
        wanted = x.double() @ (layer.weight.double() * layer.scale.double()[:, None]).T
        error = (y.double() - wanted).abs().max() / wanted.abs().max()
        assert y.shape == (rows, 1, 37) and y.dtype == dtype
        assert error < (1e-6 if sums and rows == 1 and dtype == torch.float32 else 0.01)
    assert calls == {1: not sums, 2: True}


def test_under_autocast_the_output_has_its_dtype():
    layer = Int8Linear(random(8, 16))
    for rows in (1, 20):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(random(rows, 16)).dtype == torch.bfloat16
        assert layer(random(rows, 16)).dtype == torch.float32


# Models


@pytest.mark.parametrize(
    "knobs",
    [{}, {"tie_embeddings": True}, {"ffn": "gelu", "norm": "layernorm"}],
    ids=["untied", "tied", "gelu"],
)
def test_every_matrix_but_the_embedding_is_quantized(knobs):
    model = small(**knobs)
    parameters = dict(model.named_parameters())
    others = {n: p for n, p in parameters.items() if p.ndim == 1 or n == "embed.weight"}
    matrices = [m.weight for m in model.modules() if isinstance(m, Linear)]
    matrices += [model.embed.weight] if model.head is None else []
    quantized = quantize_int8(model)
    assert quantized is model and dict(model.named_parameters()).keys() == others.keys()
    assert all(p is others[name] for name, p in model.named_parameters())
    layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
    assert sorted(tuple(m.weight.shape) for m in layers) == sorted(tuple(w.shape) for w in matrices)


def dequantized(model: Decoder) -> Decoder:
    """The same function of ordinary matrices."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Int8Linear):
                linear = Linear(*child.weight.shape[::-1], bias=False)
                linear.weight.data = child.weight * child.scale.float()[:, None]
                parent.add_module(name, linear)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_model_is_a_model_of_the_rounded_matrices(tied):
    model = quantize_int8(small(tie_embeddings=tied))
    with torch.no_grad():
        wanted = dequantized(copy.deepcopy(model))(IDS)
        torch.testing.assert_close(model(IDS), wanted, atol=1e-4, rtol=1e-4)


def test_a_quantized_model_gives_the_same_with_and_without_a_cache():
    # Widths that the kernel does not take, so few rows are multiplied in float32, as many are.
    model, seen = quantize_int8(small(n_embd=40, n_hidden=72)), []
    logits = model.logits
    model.logits = lambda x: (seen.append(logits(x)[0]), logits(x))[1]
    ids = [3] + [new[0] for new in generate(model, [3], 20, seed=2)]
    model.logits = logits
    with torch.no_grad():
        wanted = model(torch.tensor([ids[:20]]))[0]
        torch.testing.assert_close(torch.stack(seen), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "knobs",
    [{}, {"tie_embeddings": True}, {"qk_norm": True}, {"norm": "dyt"}, {"norm_pos": "post"}],
    ids=lambda knobs: next(iter(knobs), "llama"),
)
def test_matrices_rounded_once_change_no_bit_under_autocast(knobs):
    model = small(**knobs)
    rounded = round_matrices(copy.deepcopy(model), torch.bfloat16)
    assert rounded.head.weight.dtype == rounded.blocks[1].ffn.down.weight.dtype == torch.bfloat16
    assert rounded.embed.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(IDS), rounded(IDS))
        assert torch.equal(model(IDS, IDS.flip(1)), rounded(IDS, IDS.flip(1)))
        ids = [list(generate(m, [1], 20, num_samples=2)) for m in (model, rounded)]
        assert ids[0] == ids[1]


# Packed for oneDNN


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
@pytest.mark.parametrize("shape", [(37, 24), (64, 100), (300, 16)])
def test_packed_products_are_those_of_the_matrix(shape, rows, dtype, error):
    if not can_pack_matrices(dtype):
        pytest.skip(f"this processor packs no matrices in {dtype}")
    weight, x = random(*shape), random(2, rows, shape[1], seed=1)
    y = PackedLinear(weight, dtype)(x)
    wanted = x.to(dtype).double() @ weight.to(dtype).double().T
    assert y.dtype == dtype and y.shape == (2, rows, shape[0])
    assert (y - wanted).abs().max() < error * wanted.abs().max()


def test_small_matrices_are_not_packed():
    model = Decoder(ModelConfig(n_layer=1, n_head=1, n_embd=64, n_hidden=2048, vocab_size=2**16))
    pack_matrices(model, torch.float32, smallest=2**22)
    kinds = [type(m) for m in (model.blocks[0].attn.q, model.blocks[0].ffn.up, model.head)]
    assert kinds == [Linear, Linear, PackedLinear]


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_gives_the_same_logits(tied):
    model = small(tie_embeddings=tied)
    wanted = model(IDS)
    packed = pack_matrices(copy.deepcopy(model), torch.float32, smallest=48 * 48)
    kinds = {name: type(module) for name, module in packed.named_modules()}
    assert {kinds["blocks.0.attn.q"], kinds["blocks.1.ffn.down"]} == {PackedLinear}
    assert kinds["blocks.0.attn.k"] == kinds["head"] == Linear
    with torch.no_grad():
        assert torch.allclose(packed(IDS), wanted, atol=1e-5)
        assert torch.allclose(packed(IDS, IDS), model(IDS, IDS), atol=1e-5)
        if not can_pack_matrices(torch.bfloat16):
            return
        half = pack_matrices(copy.deepcopy(model), torch.bfloat16, smallest=48 * 48)
        assert not any(isinstance(m, Linear) for m in half.modules())
        with torch.autocast("cpu", torch.bfloat16):
            assert (half(IDS) - model(IDS)).abs().max() < 0.03 * wanted.abs().max()


def prepared(**options):
    """A small model as sample.py prepares it."""
    model = small()
    prepare_for_inference(model, SampleOptions(**options))
    return model


def test_packing_is_for_x86_with_onednn_and_bfloat16_for_hardware_that_has_it(monkeypatch):
    """Elsewhere matrices are rounded. What the machine can do is set here: it has one CPU only."""
    assert can_pack_matrices(torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert can_pack_matrices(torch.float32) and not can_pack_matrices(torch.bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    for dtype in (torch.float32, torch.bfloat16):
        assert not can_pack_matrices(dtype)
        head = prepared(device="cpu", dtype=str(dtype).removeprefix("torch.")).head
        assert isinstance(head, Linear) and head.weight.dtype == dtype


def test_on_cuda_matrices_are_rounded_and_attention_is_not_planned():
    try:
        model = prepared(device="cuda", dtype="bfloat16")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert type(model.head) is Linear and model.head.weight.dtype == torch.bfloat16


# Sums for compiled code


@pytest.mark.parametrize("outputs", [37, LONG_MATRIX + 5])
@pytest.mark.parametrize("shape", [(1, 1, 24), (24,), (2, 1, 24), (1, 3, 24)])
def test_one_row_is_multiplied_as_sums_in_compiled_code_alone(outputs, shape):
    weight, x = random(outputs, 24), random(*shape, seed=1)
    wanted, one_row = x.double() @ weight.double().T, x.numel() == 24
    products = []

    def watch(graph, inputs):
        products.append(sum(node.target is F.linear for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    layer = SummedLinear(weight)
    for function in (layer, torch.compile(layer, backend=watch, dynamic=False)):
        y = function(x)
        assert y.shape == (*shape[:-1], outputs) and y.dtype == torch.float32
        assert (y - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert products == [0 if one_row else 1]


def test_code_that_is_not_compiled_leaves_a_row_to_the_library(monkeypatch):
    layer, x = SummedLinear(random(37, 24)), random(1, 24, seed=1)
    monkeypatch.setattr(quantize, "product_of_row", None)
    assert torch.equal(layer(x), F.linear(x, layer.weight))


def test_sums_of_a_matrix_in_bfloat16_are_in_float32():
    torch._dynamo.reset()
    layer, x = SummedLinear(random(37, 24).bfloat16()), random(1, 24, seed=1).bfloat16()
    y = torch.compile(layer, backend="eager")(x)
    wanted = x.double() @ layer.weight.double().T
    assert y.dtype == torch.float32 and (y - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_to_be_compiled_is_not_packed_where_a_compiler_could_not_look_into_it(dtype):
    model = prepared(device="cpu", dtype=dtype, compile=True)
    matrices = [block.attn.q for block in model.blocks] + [model.head]
    assert all(type(matrix) is SummedLinear for matrix in matrices)
    assert model.head.weight.dtype == getattr(torch, dtype)
