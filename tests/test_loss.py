"""The loss and its gradient are those of plain cross-entropy, however many rows are one piece."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import HeadLoss, head_loss, loss_and_error, rows_at_once

N, C, V = 50, 16, 33
SOME_IGNORED = pytest.mark.parametrize("ignored", [(), (0, 7, 49)], ids=["all count", "three not"])


def inputs(dtype=torch.float32, ignored=()):
    """x [N, C], weight [V, C], targets [N]."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn((N, C), generator=random).to(dtype).requires_grad_()
    weight = torch.randn((V, C), generator=random).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=random)
    targets[list(ignored)] = -100
    return x, weight, targets


@pytest.fixture
def set_rows(monkeypatch):
    """set_rows(7) makes pieces of 7 rows: a piece of the true size would take minutes."""

    def use(rows):
        monkeypatch.setattr("model.rows_at_once", lambda *_: rows)

    return use


def plain_loss(x, weight, targets):
    return F.cross_entropy((x @ weight.T).to(torch.promote_types(x.dtype, torch.float32)), targets)


def assert_same_gradients(ours, theirs, tensors, **tolerance):
    pairs = (torch.autograd.grad(loss, tensors) for loss in (ours, theirs))
    for mine, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, wanted, **tolerance)


@SOME_IGNORED
@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_loss_and_gradients_are_those_of_plain_cross_entropy(set_rows, rows, ignored):
    set_rows(rows)
    x, weight, targets = inputs(torch.float64, ignored)
    ours, theirs = 3 * head_loss(x, targets, None, weight), 3 * plain_loss(x, weight, targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-14)
    assert_same_gradients(ours, theirs, (x, weight), atol=1e-15, rtol=1e-12)


def test_logits_whose_exponentials_overflow_give_the_same_loss_and_gradients():
    x, weight, targets = inputs()
    x = (1000 * x.detach()).requires_grad_()
    ours, theirs = head_loss(x, targets, None, weight), plain_loss(x, weight, targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert_same_gradients(ours, theirs, (x, weight))


@SOME_IGNORED
def test_without_gradients_any_head_will_do_and_the_loss_is_the_same(set_rows, ignored):
    set_rows(7)
    x, weight, targets = inputs(torch.float64, ignored)
    with torch.no_grad():
        loss = head_loss(x, targets, lambda x: 2 * (x @ weight.T), weight)
    assert loss.item() == pytest.approx(plain_loss(2 * x, weight, targets).item(), rel=1e-14)


def test_the_gradient_is_that_of_small_differences():
    x, weight, targets = inputs(torch.float64, (3,))
    x, weight = (t.detach()[:9].requires_grad_() for t in (x, weight))
    targets = targets[:9].clamp(max=8)
    torch.autograd.gradcheck(lambda x, weight: HeadLoss.apply(x, weight, targets, 4), (x, weight))


def test_under_autocast_sums_stay_in_float32(set_rows):
    set_rows(1)
    x, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        ours = head_loss(x, targets, None, weight)
    assert ours.dtype == torch.float32
    found = torch.autograd.grad(ours, (x, weight))
    rounded = plain_loss(x.bfloat16().float(), weight.bfloat16().float(), targets)
    for mine, exact in zip(found, torch.autograd.grad(rounded, (x, weight)), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - exact).norm() < 5e-3 * exact.norm()


def test_under_autocast_the_gradient_of_x_is_rounded_once_before_it_is_divided_by_the_rows():
    x, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(x, targets, None, weight)
    times_rows = torch.autograd.grad(loss, x)[0] * len(x)
    torch.testing.assert_close(times_rows.bfloat16().float(), times_rows, rtol=1e-6, atol=0)


def test_errors_of_many_rows_neither_vanish_nor_overflow_in_float16():
    """For each row, 1 / N of its error is below the smallest number of float16 here, and the sum of
    all errors is above the largest.
    """
    x = torch.ones(2**17, 1, dtype=torch.float16, requires_grad=True)
    weight, targets = torch.zeros(4, 1, requires_grad=True), torch.zeros(2**17).long()
    with torch.autocast("cpu", torch.float16):
        loss = head_loss(x, targets, None, weight)
    (dweight,) = torch.autograd.grad(loss, weight)
    assert torch.allclose(dweight.flatten(), torch.tensor([-0.75, 0.25, 0.25, 0.25]), atol=1e-3)


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        self.seen += [tuple(result.shape)] if isinstance(result, torch.Tensor) else []
        return result


def test_frozen_weights_get_no_gradient_and_cost_none():
    x, weight, targets = inputs()
    weight.requires_grad_(False)
    with Shapes() as shapes:
        head_loss(x, targets, None, weight).backward()
    assert x.grad is not None and weight.grad is None and (V, C) not in shapes.seen


def test_the_logits_of_all_tokens_never_exist_at_once(set_rows):
    set_rows(5)
    x, weight, targets = inputs()
    with Shapes() as shapes:
        head_loss(x, targets, None, weight).backward()
        with torch.no_grad():
            head_loss(x, targets, lambda x: x @ weight.T, weight)
    assert max(map(math.prod, shapes.seen)) == N * C and (5, V) in shapes.seen
    with Shapes() as shapes:
        plain_loss(x, weight, targets)
    assert (N, V) in shapes.seen


def test_rows_are_few_enough_for_memory_and_pieces_few_enough_for_a_compiler():
    assert rows_at_once(2048, 4096) >= 2048  # one piece
    assert rows_at_once(4096, 32000) == math.ceil(2**25 / 32000)
    assert rows_at_once(2**16, 128000) == 2**16 // 8
    assert rows_at_once(4096, 32000, on_cuda=True) == 66 * 128  # the next above 2^28 / 32000
    assert rows_at_once(2**19, 32000, on_cuda=True) == 2**19 // 8


class WithoutScatter(torch.Tensor):
    """A tensor that cannot scatter."""

    scatter_add_ = None


@SOME_IGNORED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_compiled_is_the_same_bits_without_a_scatter(monkeypatch, dtype, ignored):
    _, _, targets = inputs(ignored=ignored)
    logits = torch.randn((N, V), generator=torch.Generator().manual_seed(0), dtype=dtype)
    wanted = loss_and_error(logits.clone(), targets, 0.25)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = loss_and_error(logits.clone().as_subclass(WithoutScatter), targets, 0.25)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
