"""What can be known of Apple's GPUs (MPS) on a machine without one: that nothing here asks of them
what they lack or get wrong. docs/platforms.md says what that leaves open.

The tensors are on torch's device "meta", which stands for MPS here: they have no numbers, so
nothing is computed, but every operator is looked at.
"""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchgen
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config.schema import Config
from model import ACTIVATIONS, Decoder, ModelConfig, times_long_matrix
from norm import IMPLEMENTED, Norm
from run.machine import choose_dtype
from run.optim import Optimizers
from run.parallel import clip_gradients
from run.ranks import ALONE
from run.setup import resolve
from sample import KVCache, next_ids
from weights.quantize import quantize_int8

TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
SUMMED = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # which argument's last side is summed over
# What a call becomes on MPS alone, where the device "meta" takes it apart.
ONLY_ON_MPS = (
    "_fused_adamw_ _fused_rms_norm native_layer_norm native_layer_norm_backward "
    "_scaled_dot_product_attention_math_for_mps"
).split()


def with_kernel():
    """The operators that run on MPS, by the table that the installed torch was made from: they have
    a kernel for it, or are made of others on every device.
    """
    devices, delegates = {}, {}
    for entry in TABLE.read_text(encoding="utf-8").split("\n- func: ")[1:]:
        name = entry.partition("(")[0]
        devices[name] = " ".join(re.findall(r"^    ([\w, ]+):", entry, re.M)) or "Composite"
        delegate = re.search(r"^  structured_delegate: (\S+)", entry, re.M)
        delegates[name] = delegate[1] if delegate else name
    return {name for name in devices if re.search(r"\bMPS\b|Composite", devices[delegates[name]])}


class LikeMPS(TorchDispatchMode):
    """Raises on an operator without a kernel, on float64, and on a product that M1 and M2 get
    wrong (model.times_long_matrix).
    """

    known = with_kernel()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        here = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if any(tensor.is_meta for tensor in here):
            name = str(function).removeprefix("aten.").removesuffix(".default")
            assert name in self.known, f"{name} has no kernel on MPS"
            assert not any(t.is_meta and t.dtype == torch.float64 for t in here), f"{name}: float64"
            longest = args[SUMMED[name]].shape[-1] if name in SUMMED else 0
            assert longest < 32_767, f"{name} adds up {longest} numbers"
        return result


@pytest.fixture
def like_mps(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_mps", property(lambda tensor: tensor.is_meta))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with LikeMPS():
        yield


def a_model(**knobs):
    shape = dict(n_layer=1, n_head=4, n_embd=32, n_hidden=64, block_size=16, vocab_size=40_000)
    with torch.device("meta"):
        return Decoder(ModelConfig(**shape | knobs), seed=None)


def some_ids(rows=2, length=16):
    return torch.zeros(rows, length, dtype=torch.int64, device="meta")


def test_the_operators_that_only_mps_gets_have_a_kernel():
    assert set(ONLY_ON_MPS) <= LikeMPS.known
    assert "mm" in LikeMPS.known and "heaviside" not in LikeMPS.known


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda: some_ids().heaviside(some_ids()), "heaviside has no kernel on MPS"),
        (lambda: torch.ones(2, device="meta").double(), "float64"),
        (lambda: some_ids(2, 40_000).float() @ some_ids(40_000, 2).float(), "adds up 40000"),
    ],
)
def test_the_imitation_refuses_what_mps_lacks(like_mps, wrong, told):
    with pytest.raises(AssertionError, match=told):
        wrong()


@pytest.mark.parametrize("norm_impl", ["eager", "fused"])
def test_every_norm_asks_of_mps_what_it_has(like_mps, norm_impl):
    for kind in IMPLEMENTED[norm_impl]:
        norm = Norm(kind, 32, 1e-5, norm_impl).to("meta")
        norm(torch.ones(2, 16, 32, device="meta", requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    "optimizer, dropout, knobs",
    [
        ("adamw", 0.0, {"tie_embeddings": False, "n_kv_head": 2, "qk_norm": True}),
        ("muon", 0.1, {"norm_pos": "sandwich"}),
    ],
)
def test_a_step_and_an_evaluation_ask_of_mps_what_it_has(like_mps, optimizer, dropout, knobs):
    model = a_model(dropout=dropout, **knobs)
    positions = some_ids() if dropout else None  # of tokens in documents
    model(some_ids(), some_ids(), positions).backward()
    rules = dict(optimizer=optimizer, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95)
    optimizers = Optimizers(model, **rules)
    clip_gradients(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        model.eval()(some_ids(), some_ids(), positions)


def test_every_feed_forward_asks_of_mps_what_it_has(like_mps):
    for activation in ACTIVATIONS.values():
        activation(torch.ones(2, 16, device="meta", requires_grad=True)).sum().backward()


@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_sampling_asks_of_mps_what_it_has(like_mps, int8):
    model = a_model(n_kv_head=2, tie_embeddings=False).eval()
    if int8:
        quantize_int8(model)
    cache = KVCache(model.config, 4, 16, "meta")
    seen = torch.zeros(4, 40_000, dtype=torch.bool, device="meta")
    uniform = torch.rand(4, 1, device="meta")
    unread = some_ids(1, 3)
    for drawing in ((0.8, 50, 0.9, 0.05), (0,), (0.8, 50, 0.9, 0.05)):
        new = next_ids(model, unread, cache, uniform, seen, 1.2, 39_000, *drawing)
        if len(unread) < 4:
            cache.repeat()
        unread = new[:-1, None].clone()
        seen.scatter_(1, unread, True)


def resolved(**knobs):
    """The config of a run on MPS."""
    model = ModelConfig(n_layer=1, n_head=1, n_embd=16, block_size=1024)
    data = SimpleNamespace(fingerprint={"vocab_size": 256})
    return resolve(Config(model=model, batch_size=64, **knobs), "mps", data, None, ALONE)


def test_a_micro_batch_is_small_enough_for_the_gradients_of_an_m1():
    assert resolved().micro_batch_size == 16  # of the divisors of 64; 32 have 32,768 tokens
    with pytest.raises(ValueError, match="=32 times block_size=1024 is more than the 32,766"):
        resolved(micro_batch_size=32)


def test_a_long_product_in_parts_is_the_product(monkeypatch):
    x, weight = torch.randn(3, 40_000), torch.randn(40_000, 2)
    whole = times_long_matrix(x, weight)
    monkeypatch.setattr(torch.Tensor, "is_mps", True)
    assert not torch.equal(times_long_matrix(x, weight), whole)  # another order
    torch.testing.assert_close(times_long_matrix(x, weight), whole, atol=1e-3, rtol=1e-4)


def test_bfloat16_needs_a_torch_in_which_no_token_sees_the_next(monkeypatch):
    assert choose_dtype("auto", "mps") == "float32"
    assert choose_dtype("bfloat16", "mps") == "bfloat16"
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    with pytest.raises(ValueError, match="needs torch 2.13 or newer, this is 2.12.1"):
        choose_dtype("bfloat16", "mps")
