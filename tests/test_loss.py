"""The loss and its gradient are those of plain cross-entropy, however many rows are worked on at once."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import loss
from loss import HeadLoss, head_loss

N, C, V = 50, 16, 33


def inputs(dtype=torch.float32, ignored=()):
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in ((N, C), (V, C)))
    targets = torch.randint(V, (N,), generator=random)
    targets[list(ignored)] = -100
    return x, weight, targets


def pieces(monkeypatch, rows):
    """Works on so many rows at once."""
    monkeypatch.setattr(loss, "LOGITS", rows * V)
    monkeypatch.setattr(loss, "PARTS", 10**9)


def plain(x, weight, targets):
    return F.cross_entropy((x @ weight.T).to(torch.promote_types(x.dtype, torch.float32)), targets)


@pytest.mark.parametrize("ignored", [(), (0, 7, 49)], ids=["all count", "three do not"])
@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_loss_and_gradients_are_those_of_plain_cross_entropy(monkeypatch, rows, ignored):
    pieces(monkeypatch, rows)
    x, weight, targets = inputs(torch.float64, ignored)
    ours, theirs = 3 * head_loss(x, targets, lambda x: x @ weight.T, weight), 3 * plain(x, weight, targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-14)
    for mine, wanted in zip(torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(theirs, (x, weight)),
                            strict=True):
        assert torch.allclose(mine, wanted, atol=1e-15, rtol=1e-12)


def test_logits_whose_exponentials_overflow_give_the_same_loss_and_gradients():
    x, weight, targets = inputs()
    x = (1000 * x.detach()).requires_grad_()
    ours, theirs = head_loss(x, targets, None, weight), plain(x, weight, targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for mine, wanted in zip(torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(theirs, (x, weight)),
                            strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("ignored", [(), (0, 7, 49)])
def test_without_gradients_any_head_will_do_and_the_loss_is_the_same(monkeypatch, ignored):
    pieces(monkeypatch, 7)
    x, weight, targets = inputs(torch.float64, ignored)
    with torch.no_grad():
        loss = head_loss(x, targets, lambda x: 2 * (x @ weight.T), weight)
    assert loss.item() == pytest.approx(plain(2 * x, weight, targets).item(), rel=1e-14)


def test_the_gradient_is_that_of_small_differences():
    x, weight, targets = inputs(torch.float64, (3,))
    x, weight = (t.detach()[:9].requires_grad_() for t in (x, weight))
    targets = targets[:9].clamp(max=8)
    assert torch.autograd.gradcheck(lambda x, weight: HeadLoss.apply(x, weight, targets, 4), (x, weight))


def test_under_autocast_sums_stay_in_float32(monkeypatch):
    pieces(monkeypatch, 1)
    x, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        ours = head_loss(x, targets, lambda x: x @ weight.T, weight)
    assert ours.dtype == torch.float32
    dx, dweight = torch.autograd.grad(ours, (x, weight))
    wanted = torch.autograd.grad(plain(x.bfloat16().float(), weight.bfloat16().float(), targets), (x, weight))
    assert dx.dtype == dweight.dtype == torch.float32
    for mine, exact in zip((dx, dweight), wanted, strict=True):
        assert (mine - exact).norm() < 5e-3 * exact.norm()


def test_errors_of_many_rows_neither_vanish_nor_overflow_in_float16():
    """One by one, 1 / N of an error is below the smallest number of float16 here, and their sum above the largest."""
    x, weight, targets = torch.zeros(2**17, 1), torch.zeros(4, 1, requires_grad=True), torch.zeros(2**17).long()
    x = x.half().fill_(1).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        dweight, = torch.autograd.grad(head_loss(x, targets, lambda x: x @ weight.T, weight), weight)
    assert torch.allclose(dweight.flatten(), torch.tensor([-0.75, 0.25, 0.25, 0.25]), atol=1e-3)


class Watch(TorchDispatchMode):
    """The shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        self.shapes += [tuple(result.shape)] if isinstance(result, torch.Tensor) else []
        return result


def test_frozen_weights_get_no_gradient_and_cost_none():
    x, weight, targets = inputs()
    weight.requires_grad_(False)
    with Watch() as watch:
        head_loss(x, targets, lambda x: x @ weight.T, weight).backward()
    assert x.grad is not None and weight.grad is None and (V, C) not in watch.shapes


def test_the_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    """The largest tensor of a step has the logits of some rows, not of all."""
    pieces(monkeypatch, 5)
    x, weight, targets = inputs()
    with Watch() as watch:
        head_loss(x, targets, lambda x: x @ weight.T, weight).backward()
        with torch.no_grad():
            head_loss(x, targets, lambda x: x @ weight.T, weight)
    assert max(map(math.prod, watch.shapes)) == N * C and (5, V) in watch.shapes
    with Watch() as watch:
        plain(x, weight, targets)
    assert (N, V) in watch.shapes


def test_rows_are_few_enough_for_memory_and_pieces_few_enough_for_a_compiler():
    def pieces_of(tokens, vocab):
        rows = loss.rows_at_once(tokens, vocab)
        return -(-tokens // rows), rows * vocab

    assert pieces_of(2048, 4096)[0] == 1
    assert pieces_of(4096, 32000) == (4, math.ceil(2**25 / 32000) * 32000)
    assert pieces_of(2**16, 128000)[0] == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_compiled_for_cuda_is_the_same_bits(monkeypatch, dtype):
    pieces(monkeypatch, 7)
    x, weight, targets = inputs(dtype, (0, 7, 49))
    found = head_loss(x, targets, None, weight)
    wanted = [found, *torch.autograd.grad(found, (x, weight))]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)  # which would keep the rest from being one kernel
    found = head_loss(x, targets, None, weight)
    for mine, theirs in zip([found, *torch.autograd.grad(found, (x, weight))], wanted, strict=True):
        assert torch.equal(mine, theirs)


def test_under_autocast_the_gradient_of_x_is_rounded_once_before_it_is_divided_by_the_rows():
    x, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(x, targets, None, weight)
    times_rows = torch.autograd.grad(loss, x)[0] * len(x)
    torch.testing.assert_close(times_rows.bfloat16().float(), times_rows, rtol=1e-6, atol=0)
