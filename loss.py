"""The loss of a decoder's last layer, without holding the logits of all tokens where these are many.

A batch has vocab_size logits for each token, in fp32: often the largest tensor of a training step, and a plain
cross-entropy keeps two or three of its size for backward. Here they exist for some rows at a time.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from norm import widen

IGNORED = -100  # as a target: a row that does not count
LOGITS = 2**25  # computed at once: 128 MB in fp32
PARTS = 8  # pieces at most, since each is compiled


def head_loss(x: Tensor, targets: Tensor, logits: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Mean cross-entropy, nats, in fp32, of logits(x) = x @ weight.T [N, V] against targets [N] int64.

    x [N, C], weight [V, C]; targets that are IGNORED do not count. Without gradients logits() alone is used, so that
    the head may be any function of x.
    """
    rows = rows_at_once(len(x), len(weight))
    if torch.is_grad_enabled() and x.requires_grad:
        return HeadLoss.apply(x, weight, targets, rows)
    sums = [F.cross_entropy(widen(logits(some)), wanted, ignore_index=IGNORED, reduction="sum")
            for some, wanted in zip(x.split(rows), targets.split(rows), strict=True)]
    return torch.stack(sums).sum() / (targets != IGNORED).sum()


def rows_at_once(rows: int, vocab: int) -> int:
    """Of so many rows, how many have their logits computed at once, at most."""
    return -(-max(LOGITS, rows * vocab // PARTS) // vocab)


class HeadLoss(torch.autograd.Function):
    """The gradient is computed in forward, while the logits of some rows are at hand, so they are neither kept nor
    computed twice; as in Liger Kernel (Hsu et al. 2024, arXiv 2410.10989).

    Products are in autocast's dtype, sums in fp32. In float16 errors divided by the number of rows would vanish, and
    sums of whole ones overflow: products see them times a power of two near 1,000 / rows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        factor = 2.0 ** (10 - rows.bit_length())
        with torch.autocast(kind, enabled=False):
            narrow, matrix = x.to(dtype), weight.to(dtype)
            dx, dweight = [], widen(torch.zeros_like(weight)) if ctx.needs_input_grad[1] else None
            total = widen(x.new_zeros(()))
            for some, wanted in zip(narrow.split(rows), targets.split(rows), strict=True):
                loss, error = loss_and_error(widen(some @ matrix.T), wanted, factor)
                total, error = total + loss, error.to(dtype)
                dx.append(error @ matrix)
                if dweight is not None:
                    dweight += error.T @ some
        count = (targets != IGNORED).sum()
        ctx.save_for_backward(torch.cat(dx), dweight, count * factor)
        ctx.dtype = x.dtype
        return total / count

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        dx, dweight, divisor = ctx.saved_tensors
        scale = dloss / divisor
        return dx.to(ctx.dtype) * scale, None if dweight is None else dweight * scale, None, None


def loss_and_error(logits: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies of logits [R, V], which are overwritten, and `factor` times its gradient by them:
    softmax less the one-hot target."""
    counts = (targets != IGNORED).unsqueeze(1)
    place = torch.where(counts, targets.unsqueeze(1), 0)
    logits.sub_(logits.amax(1, keepdim=True))  # so that no exponential overflows
    wanted, each = logits.gather(1, place), counts * factor
    total = logits.exp_().sum(1, keepdim=True)
    loss, error = ((total.log() - wanted) * counts).sum(), logits.mul_(each / total)
    if torch.compiler.is_compiling() and logits.is_cuda:
        return loss, fusible_subtract(error, place, each)
    return loss, error.scatter_add_(1, place, -each.to(error.dtype))


def fusible_subtract(x: Tensor, place: Tensor, less: Tensor) -> Tensor:
    """x [R, V] less `less` [R, 1] at `place` [R, 1], the same bits as a scatter's, by element-wise operations alone.

    A scatter must find its target in memory, so Inductor would write the error in fp32 and read it again to round it:
    8 bytes for each logit more than the 4 that this costs. Not compiled, it would be these passes that cost more.
    """
    return torch.where(torch.arange(x.shape[1], device=x.device) == place, x - less, x)
