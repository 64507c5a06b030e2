"""A GPU that is not there: this makes PyTorch's CPU wheel believe in one CUDA device.

Its tensors are fake: they have shapes and sizes, but no numbers, so steps of any size run. Inductor
compiles to the last line of the code that it would run on the device, and only the kernels are not
started. `gpu` notes what happens meanwhile: the code, the kernels, the memory, the waits.

Private names of PyTorch are replaced here, so all of it fits one version (see test_fake_cuda.py),
and the process that does it can do nothing else.
"""

import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import torch
import torch._dynamo.device_interface
import torch._inductor.async_compile
import torch._inductor.compile_fx
import torch._inductor.config
import torch._inductor.fx_passes.fuse_attention
import torch._inductor.fx_passes.misc_patterns
import torch._inductor.fx_passes.pad_mm
import torch._inductor.graph
import torch._inductor.runtime.triton_heuristics
import torch._inductor.scheduler
import torch._inductor.utils
import torch._subclasses.fake_tensor
import torch.nn.functional as F
import torch.utils._triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda:0")
WAITS_BY_TAG = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
SMALLEST_BLOCK = 512  # bytes; PyTorch's allocator rounds up to a multiple of it


class Memory:
    """The bytes that the device would hold: of every storage that is alive, rounded up."""

    def __init__(self):
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference, size = self.alive.get(storage._cdata, (None, 0))
        if reference is not None and not reference.expired():
            return
        self.now -= size
        size = -(-storage.nbytes() // SMALLEST_BLOCK) * SMALLEST_BLOCK
        self.alive[storage._cdata] = StorageWeakRef(storage), size
        self.now += size
        if self.now > self.peak:
            self.peak = max(self.peak, self.look())

    def look(self) -> int:
        """What is alive now. It is looked for only when it matters, because that takes long."""
        for key in [key for key, (storage, _) in self.alive.items() if storage.expired()]:
            self.now -= self.alive.pop(key)[1]
        return self.now

    def forget_peak(self) -> None:
        self.peak = self.look()


class GPU(FakeTensorMode):
    """The mode in which everything happens: what touches the device is pretended, and what the CPU
    does alone is done, so data, counts and random numbers on the CPU are true ones."""

    avoid_device_init = True  # else a copy of a constant to the device would be a true one

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.memory, self.waits = Memory(), Counter()
        self.codes: list[str] = []  # of each graph that Inductor compiled
        self.kernels: dict[str, str] = {}  # name -> Triton's source
        self.capability, self.total_memory = (9, 0), 80 * 10**9

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type != "cuda" and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            return func(*args, **kwargs)
        if not any(isinstance(t, FakeTensor) for t in inputs) and func._can_decompose():
            with self:  # in inference mode `to` comes whole, and would be done for a constant
                return func.decompose(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.wait(func, inputs)
            return torch.ones((), dtype=args[0].dtype).item()
        output = super().__torch_dispatch__(func, types, args, kwargs)
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, FakeTensor)]
        if WAITS_BY_TAG & set(func.tags):
            self.wait(func, inputs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.note_copy(func, inputs[-1], made[0], args, kwargs)
        for tensor in made:
            if tensor.device.type == "cuda":
                self.memory.note(tensor)
        return output

    def note_copy(self, func, source: Tensor, target: Tensor, args, kwargs) -> None:
        """A copy from one kind of device to the other waits, unless it is from pinned memory."""
        asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if source.device.type == target.device.type or (asynchronous and is_pinned(source)):
            return
        if source.numel() and source.ndim:  # a scalar of the CPU becomes an argument of a kernel
            self.wait(func, [source, target])

    def wait(self, func, tensors: list[Tensor]) -> None:
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self.waits[str(func)] += 1


gpu = GPU()


def is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "in_pinned_memory", False)


def pinned(tensor: Tensor) -> Tensor:
    """Stands for Tensor.pin_memory, for which there is no allocator here."""
    copy = tensor.clone()
    copy.in_pinned_memory = True
    return copy


def ones_as_list(tensor: Tensor) -> list:
    """Stands for FakeTensor.tolist, which would wait for each number by itself."""
    gpu.wait("tolist", [tensor])
    return torch.ones(tensor.shape, dtype=tensor.dtype).numpy().tolist()


def attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Stands for F.scaled_dot_product_attention, which takes the unfused one in a wheel without
    CUDA. On CUDA it takes these: FlashAttention, or, if there is a mask, the efficient one.
    """
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    bias = bias.expand(*q.shape[:3], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    keep = torch.is_grad_enabled()
    return efficient(q, k, v, bias, keep, dropout_p, is_causal, scale=scale)[0]


def moved(module: nn.Module, device: str) -> nn.Module:
    """Stands for Module.to, which cannot put a fake parameter in the place of a true one."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                data = parameter.detach().to(device)
                child._parameters[name] = nn.Parameter(data, parameter.requires_grad)
        for name, buffer in child._buffers.items():
            child._buffers[name] = buffer.to(device)
    return module


class Generator(torch.Generator):
    """One of the CPU, whatever device it is asked for: one of CUDA has no code here."""

    def __new__(cls, device=None):
        return super().__new__(cls)


class Kernel:
    """Stands for a compiled kernel of Triton."""

    def __init__(self, name: str, source: str):
        gpu.kernels[name] = source

    def run(self, *args, **kwargs) -> None:
        """It would write into memory that Inductor's code has made for it."""


def properties(device=None) -> SimpleNamespace:
    """What the device says of itself: an H100's, but for `capability` and `total_memory`."""
    major, minor = gpu.capability
    return SimpleNamespace(
        name="a GPU that is not there",
        major=major,
        minor=minor,
        total_memory=gpu.total_memory,
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
        uuid="",
    )


def always(value):
    return lambda *args, **kwargs: value


def pretend_device() -> None:
    """What a program asks torch.cuda, and what Dynamo and Inductor ask behind it."""
    stream = SimpleNamespace(
        cuda_stream=0, stream_id=0, device_index=0, device_type=1, device=DEVICE
    )
    public = {
        "is_available": always(True),
        "is_initialized": always(True),
        "device_count": always(1),
        "current_device": always(0),
        "current_stream": always(stream),
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_name": lambda device=None: properties().name,
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "max_memory_allocated": lambda device=None: gpu.memory.peak,
        "memory_allocated": lambda device=None: gpu.memory.look(),
    }
    silent = (
        "synchronize set_device set_rng_state manual_seed manual_seed_all empty_cache _lazy_init"
    )
    for name, value in (public | dict.fromkeys(silent.split(), always(None))).items():
        setattr(torch.cuda, name, value)
    torch.cuda._exchange_device = always(0)  # of _DeviceGuard, which generated code uses
    torch.cuda._maybe_exchange_device = always(0)  # another function: Dynamo tells them apart
    torch.version.cuda = "13.0"  # else Inductor takes the device for none that can be compiled for
    torch._C._cuda_getCurrentRawStream = always(0)  # generated code asks for it
    torch._C._cuda_cudaCachingAllocator_is_enabled = always(True)  # else there are no CUDA graphs
    torch._subclasses.fake_tensor.init_gpu_context = always(None)  # would make a true tensor
    interface = torch._dynamo.device_interface.CudaInterface
    asked = {
        "is_available": always(True),
        "is_triton_capable": always(True),
        "raise_if_triton_unavailable": always(None),
        "current_device": always(0),
        "current_stream": always(stream),
        "get_raw_stream": always(0),
        "get_device_properties": properties,
        "get_compute_capability": lambda device=None: 10 * gpu.capability[0] + gpu.capability[1],
        "exchange_device": always(0),
        "maybe_exchange_device": always(0),
        "set_device": always(None),
        "synchronize": always(None),
        "memory_allocated": always(0),
    }
    for name, value in asked.items():
        setattr(interface, name, staticmethod(value))
    interface.Worker.current_device = staticmethod(always(0))
    interface.Worker.get_device_properties = staticmethod(properties)


def without_modes(function):
    """torch.load is for the CPU, but in a mode of fake tensors it would leave the numbers out."""

    def wrapped(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return wrapped


def pretend_tensors() -> None:
    """What a program does with tensors that the mode alone cannot pretend."""
    FakeTensor.tolist = ones_as_list
    Tensor.pin_memory = pinned
    nn.Module.to = moved
    F.scaled_dot_product_attention = attention
    torch.Generator = Generator
    torch.load = without_modes(torch.load)


def pretend_compiler() -> None:
    """Inductor must write code for the device, and must not look for it."""
    torch._inductor.scheduler.has_triton = always(True)  # code is written for it, not compiled
    torch.utils._triton.triton_hash_with_backend = always("")  # would ask the device
    torch._inductor.async_compile.AsyncCompile.triton = (
        lambda self, name, source, device_str="cuda": Kernel(name, source)
    )
    if not torch.utils._triton.has_triton_package():  # generated code imports it, kernels or not
        utils = torch._inductor.utils  # which would look for its version
        newest = always(utils.TritonAttrsDescriptorVersion.V4_DICT)
        utils.get_triton_attrs_descriptor_version = newest
        sys.modules["triton"] = ModuleType("triton")
        sys.modules["triton.language"] = sys.modules["triton"].language = ModuleType("language")
    torch._inductor.graph.GraphLowering.save_output_code = gpu.codes.append
    # Generated code makes its buffers and views by these two, which know no fake tensors.
    torch._C._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device=DEVICE
    )
    torch._C._dynamo.guards._reinterpret_tensor = lambda x, size, stride, offset=0: x.as_strided(
        size, stride, x.storage_offset() + offset
    )
    # These trace patterns on the device, with tensors that are not fake. None of our graphs has one
    # of them: attention is fused already.
    torch._inductor.fx_passes.fuse_attention._sfdp_init = always(None)
    torch._inductor.fx_passes.misc_patterns._misc_patterns_init = always(None)
    torch._inductor.fx_passes.pad_mm._pad_mm_init = always(None)
    torch._inductor.config.shape_padding = False  # would measure products on the device
    torch._inductor.config.joint_graph_constant_folding = False  # would compute on the device
    torch._inductor.config.force_disable_caches = True  # so that all is compiled here and now


pretend_device()
pretend_tensors()
pretend_compiler()
