"""A model's matrices in other forms for inference: rounded once to the dtype of the products, laid
out for a CPU, or as int8 with a scale for each output.

Reading order: what is done to a whole model; then the three kinds of layers, Int8Linear,
PackedLinear and SummedLinear.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Decoder

# Rows of x up to which torch's int8 kernel is the fastest way: every few rows it reads all weights
# again.
KERNEL_ROWS = 8
# Rows of x that compiled code on CUDA multiplies by int8 weights as sums (computed, not measured):
# each weight then takes a load of 2 bytes of x for each row, and caches give about 8 bytes in the
# time in which memory gives the weight. Compiling also takes longer with every row.
SUMMED_ROWS = 4
# Rows of x for which packed matrices are laid out: those of a few samples at once.
PACKED_ROWS = 4
# Whether compiled code on this CPU multiplies a row by int8 weights faster as a sum than by torch's
# kernel. With AVX2 it does not: there it loads eight weights by way of memory (docs/LOG.md).
SUMS_INT8 = torch.backends.cpu.get_cpu_capability() == "AVX512"
# Rows of a matrix from which compiled code works on four parts of it at once.
LONG_MATRIX = 2048
# Weights that a CPU converts at once: they are still in its cache when they are multiplied.
CONVERTED_AT_ONCE = 2**20


def replace_matrices(model: Decoder, make: Callable[[Tensor], nn.Module]) -> Decoder:
    """Puts make(weight) in the place of every linear layer, one after the other. A head that is
    tied to the embedding becomes a layer of its own.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, make(child.weight))
    if model.head is None:
        model.head = make(model.embed.weight)
    return model


def quantize_int8(model: Decoder) -> Decoder:
    """Every matrix of the Blocks and the head to int8, in place. Embedding and norms stay as they
    are, also if the embedding is tied to the head.
    """
    return replace_matrices(model, Int8Linear)


def round_matrices(model: Decoder, dtype: torch.dtype) -> Decoder:
    """The same matrices to `dtype`, in place. Autocast rounds them so in each call, so under
    autocast no bit changes. In inference mode autocast does not keep what it has rounded, and each
    new token would cost a pass over all weights in fp32.
    """
    return replace_matrices(model, lambda weight: linear_layer(weight.detach().to(dtype)))


def can_pack_matrices(dtype: torch.dtype) -> bool:
    """Whether PyTorch packs matrices on this CPU: it does with oneDNN on x86, in bfloat16 only
    where the hardware has it.
    """
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    has_dtype = dtype == torch.float32 or torch.cpu._is_avx512_bf16_supported()
    return x86 and has_dtype and torch.backends.mkldnn.is_available()


def pack_matrices(model: Decoder, dtype: torch.dtype, smallest: int) -> Decoder:
    """The same matrices in `dtype`, in place, packed for a CPU for which can_pack_matrices(dtype).
    In float32, matrices of fewer than `smallest` weights stay as they are: they are read from the
    cache, where MKL is faster (docs/LOG.md).
    """

    def pack(weight: Tensor) -> nn.Module:
        if dtype == torch.float32 and weight.numel() < smallest:
            return linear_layer(weight.detach())
        return PackedLinear(weight, dtype)

    return replace_matrices(model, pack)


def sum_matrices(model: Decoder, dtype: torch.dtype) -> Decoder:
    """The same matrices in `dtype`, in place, for compiled code on a CPU: see SummedLinear."""
    return replace_matrices(model, lambda weight: SummedLinear(weight.detach().to(dtype)))


def linear_layer(weight: Tensor) -> nn.Linear:
    """A linear layer with this weight itself, not with a copy."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Int8Linear(nn.Module):
    """x [..., in] -> x W^T [..., out], with W [out, in] as int8 times one scale for each output.

    Weights are rounded symmetrically. The products are in the dtype of x, or in that of autocast;
    but on a CPU those of few rows, as in sampling, are in bfloat16 whatever the dtype, since only
    this kernel is fast. That moves a product less than the rounding of the weights does. Compiled
    code multiplies few rows in fp32 on CUDA, and one row with AVX-512. Where there are more rows,
    converting W costs a little; and eager code on CUDA converts it for each token, so there int8
    saves memory alone.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        largest = weight.detach().abs().amax(1, keepdim=True)  # [out, 1]
        # The kernel wants the scale in bfloat16. That moves it by at most 1/256, so the largest
        # weight still becomes a multiple of at most 127.
        scale = (largest / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        self.register_buffer("weight", (weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.flatten())

    def forward(self, x: Tensor) -> Tensor:
        device, width = x.device.type, x.shape[-1]
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        rows = x.reshape(-1, width)  # [B T, in]
        if SUMS_INT8 and is_compiled_row(rows):
            y = (product_of_row(rows, self.weight) * self.scale).to(x.dtype)
        elif device == "cpu" and width % 16 == 0 and len(rows) <= KERNEL_ROWS:
            # The kernel reads 16 inputs at a time, and past the end of a row of another width.
            y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale)
            y = y.to(x.dtype)
        elif device == "cuda" and len(rows) <= SUMMED_ROWS and torch.compiler.is_compiling():
            y = (sums_of_rows(rows, self.weight) * self.scale).to(x.dtype)
        else:
            parts = [self.weight]
            if device == "cpu":
                parts = self.weight.split(max(1, CONVERTED_AT_ONCE // width))
            y = torch.cat([F.linear(rows, part.to(x.dtype)) for part in parts], dim=-1) * self.scale
        return y.view(*x.shape[:-1], -1)


class PackedLinear(nn.Module):
    """x [..., in] -> x W^T [..., out] on a CPU, with W in the order of memory that oneDNN reads
    fastest for few rows of x. The products are those of nn.Linear in `dtype`, summed in another
    order.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        weight = weight.detach().to(dtype).contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        self.register_buffer("weight", packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class SummedLinear(nn.Module):
    """x [..., in] -> x W^T [..., out] like nn.Linear. But one row of x is multiplied in fp32 as a
    sum for each row of W, if the code is compiled and runs on a CPU.

    The compiler turns such sums into loops that read W about as fast as the memory allows. The
    libraries' products of one row take up to three times as long.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return product_of_row(x, self.weight) if is_compiled_row(x) else F.linear(x, self.weight)


def is_compiled_row(x: Tensor) -> bool:
    """Whether x [..., in] is a single row, in code that is being compiled for a CPU."""
    one_row = x.numel() == x.shape[-1]
    return torch.compiler.is_compiling() and x.device.type == "cpu" and one_row


def sums_of_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [N, in] times weight [out, in] in fp32, as sums: [N, out] fp32.

    For CUDA, the compiler makes one kernel of these N sums, which reads int8 weights once and
    converts them on the way. PyTorch has an int8 kernel for CUDA, too (_weight_int8pack_mm). By its
    sources of mid-2026, one thread adds up a whole row of W there, and neighbours read far apart.
    """
    return torch.stack([(weight.float() * row.float()).sum(-1) for row in rows])


def product_of_row(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], a single row, times weight [out, in] in fp32: [..., out] fp32."""
    row = x.flatten().float()
    # A long matrix as four parts: the compiler makes one loop of them, in which four sums go on
    # at once, since a processor can start the next addition long before the last one is done.
    parts = weight.chunk(4) if len(weight) >= LONG_MATRIX else [weight]
    sums = [(part.float() * row).sum(-1) for part in parts]
    return torch.cat(sums).view(*x.shape[:-1], -1)
