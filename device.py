"""This machine: which device and dtype `auto` means here, how fast it multiplies, how much memory it has."""

import ast
import ctypes
import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

TRAINS = ("model", "norm", "norm_triton", "loss", "optim", "train", "run", "parallel", "evaluate", "data/loader")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def choose_device(wanted: str, local_rank: int = 0, local_size: int = 1) -> str:
    """The device that `wanted` names, checked; auto = CUDA, then MPS, then CPU. Of `local_size` processes on this
    machine each has a GPU of its own, or they share the CPU."""
    present = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    gpus = len(present)
    present += ["mps"] if torch.backends.mps.is_available() and local_size == 1 else []
    present += ["cpu"]
    if local_size > 1 and wanted.startswith("cuda:"):
        raise ValueError(f"device={wanted} is one for {local_size} ranks: device=cuda gives each its own")
    if local_size > max(1, gpus) and (wanted == "cuda" or wanted == "auto" and gpus):
        raise ValueError(f"{local_size} ranks on a machine with {gpus} GPUs: start {max(1, gpus)} of them here, or set "
                         f"device=cpu")
    if wanted == "auto":
        return present[local_rank] if gpus else present[0]
    device = f"cuda:{local_rank}" if wanted == "cuda" else wanted
    if device not in present:
        raise ValueError(f"device={wanted} is not on this machine; it has {', '.join(present)} (or auto)")
    return device


def choose_dtype(wanted: str, device: str) -> str:
    """The dtype of matrix products on `device`; auto = bfloat16 where the hardware multiplies it natively."""
    if device.startswith("cuda"):  # torch counts emulated bfloat16 as supported, so ask for the hardware
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if wanted == "auto":
        return "bfloat16" if native else "float32"
    if wanted == "float16" and not device.startswith("cuda"):
        raise ValueError(f"dtype=float16 needs a CUDA device, this is {device}; use dtype=bfloat16 or float32")
    if wanted == "bfloat16" and device.startswith("cuda") and not native:
        raise ValueError("dtype=bfloat16 needs compute capability 8.0 or newer; use dtype=float16 or float32")
    return wanted


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """Matrix products in `dtype`, weights stay float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, dtype))


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed for the next step instead of giving it back to the system.

    Every large tensor would otherwise be mapped, faulted in page by page and unmapped again in each step; on a CPU
    that was measured at a seventh to half of the time (LOG.md). Nothing to do with other C libraries.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((M_MMAP_THRESHOLD, 2**25), (M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, value)  # an older glibc refuses the larger threshold and keeps the smaller


def without_cudnn_attention(device: str) -> None:
    """From here on PyTorch leaves cuDNN out when it chooses a kernel for attention, as it must while texts grow.

    On Hopper and Blackwell it comes first, and plans anew for every length of the keys: 0.4 s on a B200, for each token
    (https://github.com/modelscope/FunASR/issues/3704). There it also gave wrong texts where few heads have keys
    (https://github.com/pytorch/pytorch/issues/193893). Training has one shape, and is faster with it.
    """
    if device.startswith("cuda"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def to_device(tensor: Tensor, device: str) -> Tensor:
    if device.startswith("cuda"):  # from pinned memory the copy runs beside the computation
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def synchronize(device: str) -> None:
    """Waits until the device has done all that was asked of it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


@cache
def matmul_rate(device: str, dtype: str, seconds: float = 0.3) -> float:
    """FLOP/s of large square matrix products on this device, measured once: the ceiling that a step is held against."""
    size = 8192 if device.startswith("cuda") else 1024
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    a @ a  # warm up
    synchronize(device)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(4):
            a @ a
        synchronize(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    return best


@cache
def copy_rate(device: str, size: int = 2**28) -> float:
    """Bytes/s, read plus written, of copies of `size` bytes on this device: the ceiling of what only moves memory.

    The best of five, measured once. The size counts: a small block stays in a cache, which is faster than memory.
    """
    source = torch.ones(size, device=device, dtype=torch.uint8)  # untouched zeros may all be one page, in the cache
    target, seconds = source.clone(), []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):  # so that waiting for a CUDA device weighs little
            target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 4 * 2 * size / min(seconds)


def processor(device: str) -> str:
    """The name of the GPU, or of the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    linux = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", linux.read_text() if linux.exists() else "")
    return name[1] if name else platform.processor() or platform.machine()


@cache
def versions() -> dict[str, str | None]:
    """What a result depends on: the versions of Python and PyTorch; of this program its commit, where it is a git
    checkout, "-dirty" if that was changed, and a hash of the code that trains, in which comments do not count."""
    here = Path(__file__).parent
    try:
        git = subprocess.run(["git", "describe", "--match=", "--always", "--abbrev=40", "--dirty"], cwd=here,
                             capture_output=True, text=True, timeout=5)
        commit = git.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    trees = [ast.dump(ast.parse((here / f"{name}.py").read_bytes())) for name in TRAINS]
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit,
            "code": hashlib.sha256("".join(trees).encode()).hexdigest()[:16]}


def total_memory(device: str) -> float:
    """Bytes of memory that a program on the device can have."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    if sys.platform == "win32":
        return float("inf")  # no portable way to ask; nothing is refused there
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    container = Path("/sys/fs/cgroup/memory.max")
    if container.is_file() and (text := container.read_text().strip()).isdecimal():
        limits.append(int(text))
    return min(limits)


def peak_memory(device: str) -> float:
    """Bytes at the highest point so far: of tensors on CUDA, else of the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return float("nan")
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
