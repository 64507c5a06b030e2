"""RMSNorm, alone or fused with the residual addition before it, as Triton kernels for CUDA: forward and backward.

The contract is norm.rmsnorm's: statistics and gain in fp32 (float64 stays float64), one cast at the end. What the
fusion saves is memory traffic, the only thing that a norm costs: the sum is normalised while it is still in registers,
and backward reads each tensor once for both of its gradients. Written after Zhang & Sennrich 2019, arXiv 1910.07467.

Legend: M rows (all leading dimensions together), C channels, ROWS x BLOCK the tile that a program holds in registers
(BLOCK is C rounded up to a power of two). The kernels are custom operators, so torch.compile keeps them as they are in
one graph. With TRITON_INTERPRET=1 in the environment Triton interprets them on the CPU: slow, but it needs no GPU.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # as beside PyTorch's CPU wheels: this file can be imported, `available` says why it is no use
    triton = constexpr = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
LARGEST_WIDTH = 16384  # channels; a wider row of fp32 does not fit into the registers of one program
jit = triton.jit if triton else lambda function: function


def available() -> str | None:
    """None where the kernels can run, else one sentence for the user that says why not and what to do."""
    instead = "use norm_impl=compile, which fuses the same way"
    if triton is None:
        return f"norm_impl=triton needs the package triton, which is not installed: {instead}"
    if not INTERPRETED and not torch.cuda.is_available():
        return f"norm_impl=triton needs a CUDA GPU, and there is none here: {instead}"
    return None


def add_rmsnorm(x: Tensor, branch: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(total, normed): total = x + branch, normed = rmsnorm(total, gain, eps), both [..., C] in the sum's dtype.

    x and branch [..., C] have one shape, but may differ in dtype (an fp32 residual stream and a bf16 branch); gain [C].
    Raises ValueError for shapes and devices that do not fit, and for more than LARGEST_WIDTH channels.
    """
    check(x, gain)
    if branch.shape != x.shape or branch.device != x.device:
        raise ValueError(f"the branch must be like x, {list(x.shape)} on {x.device}, got {list(branch.shape)} on "
                         f"{branch.device}")
    total, normed, _ = forward_op(x, branch, gain, eps)
    return total, normed


def rmsnorm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """norm.rmsnorm by the same kernel: x [..., C], gain [C] -> [..., C] in x's dtype. Raises like add_rmsnorm."""
    check(x, gain)
    return forward_op(x, None, gain, eps)[1]


def check(x: Tensor, gain: Tensor) -> None:
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(available() or f"norm_impl=triton computes on a CUDA GPU, but x is on {x.device}")
    if gain.shape != x.shape[-1:] or gain.device != x.device:
        raise ValueError(f"gain must be {list(x.shape[-1:])} on {x.device}, got {list(gain.shape)} on {gain.device}")
    if not 1 <= gain.numel() <= LARGEST_WIDTH:
        raise ValueError(f"norm_impl=triton takes 1 to {LARGEST_WIDTH} channels, got {gain.numel()}: "
                         "use norm_impl=compile")


@jit
def forward_kernel(x_ptr, branch_ptr, gain_ptr, total_ptr, normed_ptr, rstd_ptr, M, eps,
                   C: constexpr, ROWS: constexpr, BLOCK: constexpr):
    """One tile of rows: total = x + branch where there is one, rstd = 1 / rms(total), normed = total * rstd * gain."""
    wide = rstd_ptr.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]  # M * C may exceed 2^31
    gain = tl.load(gain_ptr + columns, mask=columns < C, other=0.0).to(wide)
    total = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(wide)
    if branch_ptr is not None:
        total += tl.load(branch_ptr + offsets, mask=inside, other=0.0).to(wide)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, rounded, mask=inside)
        total = rounded.to(wide)  # the norm of what was stored: backward reads nothing else
    rstd = tl.rsqrt(tl.sum(total * total, axis=1) / C + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    normed = total * rstd[:, None] * gain[None, :]
    tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@jit
def backward_kernel(total_ptr, rstd_ptr, gain_ptr, d_total_ptr, d_normed_ptr, dx_ptr, d_branch_ptr, partial_ptr, M,
                    C: constexpr, ROWS: constexpr, BLOCK: constexpr):
    """Each program takes every n-th tile: dx, and its share of dgain, a row [C] of `partial`.

    dx = (d_unit - unit * mean(d_unit * unit)) * rstd + d_total, where unit = total * rstd is what the gain multiplies.
    """
    wide = rstd_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + columns, mask=columns < C, other=0.0).to(wide)
    d_gain = tl.zeros((ROWS, BLOCK), dtype=wide)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (columns < C)[None, :]
        offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        unit = tl.load(total_ptr + offsets, mask=inside, other=0.0).to(wide) * rstd
        d_normed = tl.load(d_normed_ptr + offsets, mask=inside, other=0.0).to(wide)
        d_gain += d_normed * unit
        d_unit = d_normed * gain[None, :]
        dx = (d_unit - unit * (tl.sum(d_unit * unit, axis=1) / C)[:, None]) * rstd
        if d_total_ptr is not None:
            dx += tl.load(d_total_ptr + offsets, mask=inside, other=0.0).to(wide)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if d_branch_ptr is not None:
            tl.store(d_branch_ptr + offsets, dx.to(d_branch_ptr.dtype.element_ty), mask=inside)
    share = partial_ptr + tl.program_id(0).to(tl.int64) * C + columns
    tl.store(share, tl.sum(d_gain, axis=0), mask=columns < C)


def tile(C: int) -> dict[str, int]:
    """The constants of a launch: narrow rows share a program, which has 16 numbers per thread and up to 512 threads.
    Products and sums fuse, as so far by default; Triton 3.9 warns where that is not said, and 3.10 changes it."""
    block = triton.next_power_of_2(C)
    rows = max(1, 2048 // block)
    return dict(C=C, ROWS=rows, BLOCK=block, num_warps=min(16, rows * block // 512), enable_fp_fusion=True)


def backward_programs(device: torch.device, num_warps: int) -> int:
    """Programs that run at once, 16 warps on each multiprocessor: more would only mean more partial sums of dgain."""
    if device.type != "cuda":
        return 2  # interpreted: few, so that each has several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count * 16 // num_warps


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


@torch.library.custom_op("rootllama::add_rmsnorm", mutates_args=())
def forward_op(x: Tensor, branch: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(total, normed, rstd): total is empty without a branch; rstd [...] is for backward."""
    total, normed, rstd = forward_shapes(x, branch, gain, eps)
    M, constants = rstd.numel(), tile(gain.numel())
    if M:
        with torch.cuda.device_of(x):  # Triton launches on the current device, on PyTorch's current stream
            forward_kernel[(triton.cdiv(M, constants["ROWS"]),)](
                *contiguous(x, branch, gain), total, normed, rstd, M, eps, **constants)
    return total, normed, rstd


@forward_op.register_fake
def forward_shapes(x, branch, gain, eps):
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    total = x.new_empty(0 if branch is None else x.shape, dtype=dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.promote_types(dtype, torch.float32))
    return total, x.new_empty(x.shape, dtype=dtype), rstd


@torch.library.custom_op("rootllama::add_rmsnorm_backward", mutates_args=())
def backward_op(total: Tensor, rstd: Tensor, gain: Tensor, d_total: Tensor | None, d_normed: Tensor,
                narrow: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, d_branch, dgain): d_branch is dx once more in the dtype `narrow`, and empty without one."""
    dx, d_branch, _ = backward_shapes(total, rstd, gain, d_total, d_normed, narrow)
    M, constants = rstd.numel(), tile(gain.numel())
    programs = min(triton.cdiv(M, constants["ROWS"]), backward_programs(total.device, constants["num_warps"]))
    partial = rstd.new_empty(programs, gain.numel())
    if M:
        with torch.cuda.device_of(total):
            backward_kernel[(programs,)](*contiguous(total, rstd, gain, d_total, d_normed), dx,
                                         None if narrow is None else d_branch, partial, M, **constants)
    return dx, d_branch, partial.sum(0).to(gain.dtype)


@backward_op.register_fake
def backward_shapes(total, rstd, gain, d_total, d_normed, narrow):
    d_branch = total.new_empty(0 if narrow is None else total.shape, dtype=narrow)
    return total.new_empty(total.shape), d_branch, gain.new_empty(gain.shape)


def save(ctx, inputs, output):
    x, branch, gain, _ = inputs
    total, _, rstd = output
    ctx.alone = branch is None
    ctx.narrow = None if branch is None or branch.dtype == total.dtype else branch.dtype
    ctx.save_for_backward(x if branch is None else total, rstd, gain)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # a gradient that is None is one tensor less to read


def differentiate(ctx, d_total, d_normed, _):
    """Gradients of x, branch, gain and eps. Autograd casts one that is wider than its input."""
    dx = d_branch = None if ctx.alone else d_total
    d_gain = None
    if d_normed is not None:
        dx, d_branch, d_gain = backward_op(*ctx.saved_tensors, dx, d_normed, ctx.narrow)
    return dx, None if ctx.alone else d_branch if ctx.narrow else dx, d_gain, None


forward_op.register_autograd(differentiate, setup_context=save)
