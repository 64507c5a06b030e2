"""int8 matrices are as near as they can be, both ways to multiply by them agree, and rounding once changes no bit."""

import copy

import pytest
import torch
from torch.nn import Linear

import quantize
from generate import generate
from model import Decoder, ModelConfig
from quantize import Int8Linear, PackedLinear, can_pack, fold_norms, pack_matrices, quantize_int8, round_matrices
from sample import SampleOptions, for_inference


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(**knobs) -> Decoder:
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 48, "n_hidden": 64, "block_size": 32,
             "vocab_size": 40}
    model = Decoder(ModelConfig(**(shape | knobs)))
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.ndim == 2):
            parameter.copy_(random(*parameter.shape, seed=i) * 0.2)
    return model.eval()


IDS = torch.arange(20).view(2, 10)


# --- Int8Linear


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 16, 24, 100, 128])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
def test_products_are_those_of_the_rounded_weights(monkeypatch, dtype, width, rows):
    monkeypatch.setattr(quantize, "BLOCK", 300)  # so that the matrix is converted in several parts
    layer, x = Int8Linear(random(37, width)), random(rows, width, seed=1).to(dtype)
    y = layer(x.view(1, rows, width))
    wanted = x.double() @ (layer.weight.double() * layer.scale.double()[:, None]).T
    assert y.shape == (1, rows, 37) and y.dtype == dtype
    error = (y[0].double() - wanted).abs().max() / wanted.abs().max()
    assert error < (0.01 if dtype == torch.bfloat16 else 1e-6)


def test_few_rows_in_bfloat16_go_to_the_kernel():
    layer, x = Int8Linear(random(64, 256)), random(9, 256, seed=1).bfloat16()
    kernel = torch.ops.aten._weight_int8pack_mm
    assert torch.equal(layer(x[:8]), kernel(x[:8], layer.weight, layer.scale))
    assert not torch.equal(layer(x), kernel(x, layer.weight, layer.scale))  # which rounds once, the other way twice


def test_under_autocast_the_output_has_its_dtype():
    layer = Int8Linear(random(8, 16))
    for rows in (1, 20):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(random(rows, 16)).dtype == torch.bfloat16
        assert layer(random(rows, 16)).dtype == torch.float32


# --- models


@pytest.mark.parametrize("knobs", [{}, {"tie_embeddings": True}, {"ffn": "gelu", "norm": "layernorm"}],
                         ids=["untied", "tied", "gelu"])
def test_every_matrix_but_the_embedding_is_quantized(knobs):
    model = small(**knobs)
    others = {name: p for name, p in model.named_parameters() if p.ndim == 1 or name == "embed.weight"}
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
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
                linear = torch.nn.Linear(*child.weight.shape[::-1], bias=False)
                linear.weight.data = child.weight * child.scale.float()[:, None]
                setattr(parent, name, linear)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_model_is_a_model_of_the_rounded_matrices(tied):
    model = quantize_int8(small(tie_embeddings=tied))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), dequantized(copy.deepcopy(model))(IDS), atol=1e-4, rtol=1e-4)


def test_a_quantized_model_gives_the_same_with_and_without_a_cache():
    model, seen = quantize_int8(small()), []
    logits = model.logits
    model.logits = lambda x: (seen.append(logits(x)[0]), logits(x))[1]
    ids = [3] + [new[0] for new in generate(model, [3], 20, seed=2)]
    model.logits = logits
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(seen), model(torch.tensor([ids[:20]]))[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("knobs", [{}, {"tie_embeddings": True}, {"qk_norm": True}, {"norm": "dyt"},
                                   {"norm_pos": "post"}], ids=lambda knobs: next(iter(knobs), "llama"))
def test_matrices_rounded_once_change_no_bit_under_autocast(knobs):
    model = small(**knobs)
    rounded = round_matrices(copy.deepcopy(model), torch.bfloat16)
    assert rounded.head.weight.dtype == rounded.blocks[1].ffn.down.weight.dtype == torch.bfloat16
    assert rounded.embed.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(IDS), rounded(IDS))
        assert torch.equal(model(IDS, IDS.flip(1)), rounded(IDS, IDS.flip(1)))
        assert list(generate(model, [1], 20, num_samples=2)) == list(generate(rounded, [1], 20, num_samples=2))


# --- fold_norms


@pytest.mark.parametrize("knobs", [{}, {"norm": "rmsnorm1p"}, {"tie_embeddings": True}, {"ffn": "gelu"},
                                   {"qk_norm": True}, {"norm_impl": "fused"}])
def test_folded_norms_give_the_same_logits(knobs):
    model = small(**knobs)
    with torch.no_grad():
        for i, gain in enumerate(p for p in model.parameters() if p.ndim == 1):
            gain.add_(random(*gain.shape, seed=i) * 0.3)
    wanted, gains = model(IDS), sum(n.endswith("gain") for n, _ in model.named_parameters())
    folded = fold_norms(model)
    left = {n for n, _ in folded.named_parameters() if n.endswith("gain")}
    assert gains >= 5 and all(n == "norm.gain" or "q_norm" in n or "k_norm" in n for n in left)
    assert ("norm.gain" in left) == bool(knobs.get("tie_embeddings"))
    assert torch.allclose(folded(IDS), wanted, atol=1e-5)


@pytest.mark.parametrize("knobs", [{"norm": "layernorm"}, {"norm": "dyt"}, {"norm_pos": "out"}, {"norm_pos": "post"}])
def test_norms_that_no_matrix_follows_are_not_folded(knobs):
    with pytest.raises(ValueError, match="only rmsnorm and rmsnorm1p with norm_pos=pre can be folded"):
        fold_norms(small(**knobs))


# --- packed for oneDNN


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
@pytest.mark.parametrize("shape", [(37, 24), (64, 100), (300, 16)])
def test_packed_products_are_those_of_the_matrix(shape, rows, dtype, error):
    weight, x = random(*shape), random(2, rows, shape[1], seed=1)
    y = PackedLinear(weight, dtype)(x)
    wanted = x.to(dtype).double() @ weight.to(dtype).double().T
    assert y.dtype == dtype and y.shape == (2, rows, shape[0])
    assert (y - wanted).abs().max() < error * wanted.abs().max()


@pytest.mark.parametrize("name, wanted", [("AMD EPYC", [Linear, PackedLinear, PackedLinear]),
                                          ("Intel(R) Xeon(R) Processor", [Linear, Linear, PackedLinear])])
def test_fewer_matrices_are_packed_on_intels_processors(monkeypatch, name, wanted):
    monkeypatch.setattr(quantize, "processor", lambda device: name)
    model = Decoder(ModelConfig(n_layer=1, n_head=1, n_embd=64, n_hidden=2048, vocab_size=2**16))
    pack_matrices(model, torch.float32)
    assert [type(m) for m in (model.blocks[0].attn.q, model.blocks[0].ffn.up, model.head)] == wanted


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_gives_the_same_logits(monkeypatch, tied):
    for name in ("SMALL", "SMALL_ON_INTEL"):
        monkeypatch.setattr(quantize, name, 48 * 48)  # k and v are smaller
    model = small(tie_embeddings=tied)
    wanted = model(IDS)
    packed = pack_matrices(copy.deepcopy(model), torch.float32)
    kinds = {name: type(module) for name, module in packed.named_modules()}
    assert {kinds["blocks.0.attn.q"], kinds["blocks.1.ffn.down"]} == {PackedLinear}
    assert kinds["blocks.0.attn.k"] == kinds["head"] == torch.nn.Linear
    with torch.no_grad():
        assert torch.allclose(packed(IDS), wanted, atol=1e-5)
        assert torch.allclose(packed(IDS, IDS), model(IDS, IDS), atol=1e-5)
        half = pack_matrices(copy.deepcopy(model), torch.bfloat16)
        assert not any(isinstance(m, torch.nn.Linear) for m in half.modules())
        with torch.autocast("cpu", torch.bfloat16):
            assert (half(IDS) - model(IDS)).abs().max() < 0.03 * wanted.abs().max()


def test_packing_is_for_x86_with_onednn_and_bfloat16_for_hardware_that_has_it(monkeypatch):
    assert can_pack(torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert can_pack(torch.float32) and not can_pack(torch.bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not can_pack(torch.float32)


def test_on_cuda_matrices_are_rounded_and_attention_is_not_planned(monkeypatch):
    planned = []
    monkeypatch.setattr("sample.without_cudnn_attention", planned.append)
    model = small()
    for_inference(model, SampleOptions(device="cuda", dtype="bfloat16"))
    assert planned == ["cuda"] and model.head.weight.dtype == torch.bfloat16


def test_what_is_to_be_compiled_is_not_packed_where_a_compiler_could_not_look_into_it():
    model = small()
    for_inference(model, SampleOptions(device="cpu", dtype="bfloat16", compile=True))
    assert all(type(block.attn.q) is torch.nn.Linear for block in model.blocks)


@pytest.mark.parametrize("dtype, wanted", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_cpu_that_cannot_pack_rounds(monkeypatch, dtype, wanted):
    monkeypatch.setattr("sample.can_pack", lambda dtype: False)
    model = small()
    for_inference(model, SampleOptions(device="cpu", dtype=dtype))
    assert type(model.head) is torch.nn.Linear and model.head.weight.dtype == wanted
