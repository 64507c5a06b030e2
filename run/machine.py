"""This machine, and what a model costs on it.

Reading order: what `auto` means for device and dtype; what is set once for a device; how fast and
how large the machine is; last what a model costs.
"""

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

from config.command import counted, free_cores
from config.schema import Config
from model import UNFUSED_UP_TO, ModelConfig, parameter_count, rows_at_once
from weights.lora import adapter_count

ROOT = Path(__file__).parent.parent
# The files whose code decides the losses of a run: `code` in versions() is their hash. Of the other
# files that train.py imports, tests/test_machine.py says why they do not.
CODE_THAT_TRAINS = (
    "model.py",
    "norm.py",
    "train.py",
    "run/optim.py",
    "run/setup.py",
    "run/parallel.py",
    "run/evaluate.py",
    "run/machine.py",
    "run/ranks.py",
    "run/taper.py",
    "data/loader.py",
    "data/mixture.py",
    "weights/hf_folder.py",
    "weights/lora.py",
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def choose_device(wanted: str, local_rank: int = 0, local_size: int = 1) -> str:
    """The device that `wanted` names; auto = CUDA, then MPS, then CPU. ValueError if this machine
    does not have it, or has too few of them.

    If `local_size` ranks run on this machine, each has a GPU of its own, or all share the CPU.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = [f"cuda:{i}" for i in range(gpus)]
    if torch.backends.mps.is_available() and local_size == 1:
        present.append("mps")
    present.append("cpu")
    if local_size > 1 and wanted.startswith("cuda:"):
        raise ValueError(
            f"device={wanted} is one for {local_size} ranks: device=cuda gives each its own"
        )
    if local_size > max(1, gpus) and (wanted == "cuda" or (wanted == "auto" and gpus)):
        raise ValueError(
            f"{local_size} ranks on a machine with {gpus} GPUs: start {max(1, gpus)} of them here, "
            f"or set device=cpu"
        )
    if wanted == "auto":
        return present[local_rank] if gpus else present[0]
    device = f"cuda:{local_rank}" if wanted == "cuda" else wanted
    if device not in present:
        raise ValueError(
            f"device={wanted} is not on this machine; it has {', '.join(present)} (or auto)"
        )
    return device


def choose_dtype(wanted: str, device: str) -> str:
    """The dtype of matrix products; auto = bfloat16 if the hardware of `device` can multiply it,
    float16 on an older GPU that can multiply that, else float32. ValueError if `device` does not
    support `wanted`."""
    narrow = "float32"  # the fastest that is native
    if device.startswith("cuda"):  # not torch's own test: it also accepts emulated bfloat16
        capability = torch.cuda.get_device_capability(device)
        native = capability >= (8, 0)
        narrow = "float16" if capability >= (7, 0) else "float32"
    else:
        native = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if wanted == "auto":
        return "bfloat16" if native else narrow
    if wanted == "float16" and not device.startswith("cuda"):
        raise ValueError(
            f"dtype=float16 needs a CUDA device, this is {device}; use dtype=bfloat16 or float32"
        )
    if wanted == "bfloat16" and device.startswith("cuda") and not native:
        raise ValueError(
            "dtype=bfloat16 needs compute capability 8.0 or newer; use dtype=float16 or float32"
        )
    if wanted == "bfloat16" and device == "mps" and torch.__version__ < "2.13":
        # https://github.com/pytorch/pytorch/issues/195910
        raise ValueError(
            f"dtype=bfloat16 on MPS needs torch 2.13 or newer, this is {torch.__version__}, in "
            f"which a token sees up to three that follow it; use dtype=float32"
        )
    return wanted


def choose_threads(wanted: int) -> int:
    """How many threads compute on the CPU; 0 = what OMP_NUM_THREADS says, or else one for each core
    that other programs have left free since this one began. ValueError if there are fewer cores.

    The threads of a step wait for each other hundreds of times. If one of them has no core of its
    own, the others wait for it, and one thread less is faster (docs/LOG.md).
    """
    usual, cores = torch.get_num_threads(), os.cpu_count() or 1
    if wanted > max(usual, cores):
        raise ValueError(
            f"threads={wanted} is more than the {counted(cores, 'core*')} of this machine; "
            f"0 = as many as are free"
        )
    if wanted or "OMP_NUM_THREADS" in os.environ:
        return wanted or usual
    free = free_cores()
    chosen = usual if free >= usual else max(1, round(free))
    if chosen < usual:
        print(
            f"other programs leave {free:.1f} of {cores} cores free: {counted(chosen, 'thread*')}",
            file=sys.stderr,
        )
    return chosen


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """A context in which matrix products are computed in `dtype`. Weights stay float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, dtype))


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step instead of returning it to the system.

    Otherwise every large tensor is mapped, faulted in page by page and unmapped again in each step.
    That took between a seventh and a half of a step's time on a CPU (docs/LOG.md). Other C
    libraries are left as they are.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)  # an older glibc refuses this and keeps 2**25
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def add_in_fixed_order(compiled: bool) -> None:
    """Makes a compiled run on a CPU repeatable bit for bit, and thereby its resume exact.

    In Inductor's code, all threads add to the embedding's gradient at once, in an order that no two
    runs share. PyTorch's own kernel, which it calls with this setting, has a fixed order. Eager
    runs always use that kernel, so for them the setting would change nothing.
    """
    if compiled != torch.are_deterministic_algorithms_enabled():  # the call imports the compiler
        torch.use_deterministic_algorithms(compiled)
    # Else it would also fill each new tensor, to hide the faults of code that reads before it
    # writes. We have none, and it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False


def disable_cudnn_attention(device: str) -> None:
    """Forbids PyTorch to use cuDNN's attention from here on. Sampling calls this.

    On Hopper and Blackwell, cuDNN is PyTorch's first choice. It makes a new plan for every number
    of keys, and sampling adds a key with each token. That took 0.4 s per token on a B200
    (https://github.com/modelscope/FunASR/issues/3704), and with few key/value heads cuDNN gave
    wrong texts (https://github.com/pytorch/pytorch/issues/193893). In training all sequences have
    one length, and cuDNN is faster.
    """
    if device.startswith("cuda"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def to_device(tensor: Tensor, device: str) -> Tensor:
    if device.startswith("cuda"):  # a copy from pinned memory runs beside the computation
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def synchronize(device: str) -> None:
    """Waits until the device has finished all its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


@cache
def matmul_rate(device: str, dtype: str) -> float:
    """measure_matmul_rate, measured once."""
    return measure_matmul_rate(device, dtype)


def measure_matmul_rate(device: str, dtype: str, seconds: float = 0.3) -> float:
    """FLOP/s of large square matrix products on this device, the best of those that fit into so
    many seconds. A training step is compared with this speed."""
    size = 8192 if device.startswith("cuda") else 1024
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    start = time.perf_counter()
    a @ a  # warm up
    synchronize(device)
    first = time.perf_counter() - start
    if device == "cpu" and first > seconds:  # bfloat16 on a processor that only imitates it
        return 2 * size**3 / first
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(4):
            a @ a
        synchronize(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
    return best


def processor(device: str) -> str:
    """The name of the GPU, or of the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    linux = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", linux.read_text() if linux.exists() else "")
    return name[1] if name else platform.processor() or platform.machine()


@cache
def versions() -> dict[str, str | None]:
    """What a result depends on: Python, PyTorch, the commit of this program and its `code`.

    The commit is None outside a git checkout, and ends in "-dirty" if files were changed. `code` is
    the code_hash of the files in CODE_THAT_TRAINS.
    """
    describe = ["git", "describe", "--match=", "--always", "--abbrev=40", "--dirty"]
    try:
        git = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, timeout=5)
        commit = git.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "code": code_hash([(ROOT / name).read_bytes() for name in CODE_THAT_TRAINS]),
    }


def code_hash(sources: list[bytes]) -> str:
    """16 hexadecimal digits that tell whether Python files compute the same, given their contents.

    Comments do not count, docstrings do. Neither do the files' names and order: who moves a file
    must change where others import it from, and a result stays valid. So of an import from a file
    of ours only what is imported counts.
    """
    files = []
    for source in sources:
        tree, places = ast.parse(source), PlacesOfFiles()
        files.append([ast.dump(places.visit(tree)), *sorted(places.names)])
    return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()[:16]


class PlacesOfFiles(ast.NodeTransformer):
    """Takes out of a syntax tree what says where files of ours are, and keeps the names that it
    imports from them."""

    def __init__(self):
        self.names: list[str] = []

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        room = node.module.partition(".")[0]
        if not ((ROOT / room).is_dir() or (ROOT / f"{room}.py").is_file()):
            return node
        self.names += map(ast.unparse, node.names)
        return None

    def visit_Assign(self, node: ast.Assign) -> ast.Assign | None:
        return None if ast.unparse(node.targets[0]) == "CODE_THAT_TRAINS" else node


def total_memory(device: str) -> float:
    """Bytes of memory that a program can have on the device."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    if sys.platform == "win32":
        return float("inf")  # Python has no portable way to ask, so nothing is refused there
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    container = Path("/sys/fs/cgroup/memory.max")
    if container.is_file() and (text := container.read_text().strip()).isdecimal():
        limits.append(int(text))
    return min(limits)


def most_tokens(device: str) -> float:
    """How many tokens a micro-batch may have on the device, whatever its memory.

    The gradient of a weight adds up one number for each token, and the GPUs of Apple's M1 and M2
    get a product wrong that adds up 32,767 or more
    (https://github.com/pytorch/pytorch/issues/177116).
    """
    return 32_766 if device == "mps" else float("inf")


def peak_memory(device: str) -> float:
    """The most bytes in use so far: of tensors on CUDA, else of the process. 0 on Windows, where no
    function of Python knows it."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0.0
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# What a model costs, computed without building it.


def flops_per_token(config: ModelConfig, lora_rank: int = 0) -> float:
    """Floating-point operations per trained token, forward and backward, counted as in PaLM (arXiv
    2204.02311, appendix B).

    Each weight of a matrix product counts 6 (the embedding is a look-up, not a product). Attention
    counts 12 n_layer H D T, of which a causal kernel does half. If only adapters are trained, each
    of their weights counts 6, and a frozen weight 4, because it needs no gradient.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.n_embd
    weights = parameter_count(config) - lookup
    products = 6 * weights
    if lora_rank:
        products = 4 * weights + 6 * adapter_count(config, lora_rank)
    return products + 12 * config.n_layer * config.n_head * config.head_size * config.block_size


def memory_estimate(config: Config, micro_batch: int, shards: int = 1) -> tuple[float, float]:
    """About how many bytes training needs on a device: (for weights, gradient and two moments in
    fp32; for the activations of one micro-batch).

    The activations are what each operation keeps for backward. Compiled code keeps less, and on
    CUDA that is taken for granted unless compile=false; there the estimate is 9 to 12% above the
    twelve peaks that were simulated (docs/cuda.md). With adapters, only the adapters have a
    gradient and moments. If `shards` devices share the weights, each has its part of everything.
    Besides that, it holds whole weights and gradients of the embedding, the head and two Blocks
    (one computes while the next is being gathered).
    """
    model = config.model
    C, F, T, V = model.n_embd, model.hidden_size, model.block_size, model.vocab_size
    s = 4 if config.dtype == "float32" else 2  # bytes of a number in a matrix product
    r = getattr(torch, config.stream_dtype).itemsize  # of one in the residual stream
    on_cuda = config.device.startswith("cuda")
    compiled = on_cuda and config.compile is not False

    if compiled:
        block = 2 * r * C + s * (8 * C + 3 * F)  # residual stream, inputs of the matrix products
    else:
        block = 2 * r * C + 4 * 6 * C + s * (8 * C + 4 * F)  # the norms keep theirs, too
    if config.device == "cpu" and config.dtype == "bfloat16" and T <= UNFUSED_UP_TO:
        block += s * model.n_head * T  # the scores, which model.unfused_attention keeps
    per_token = block * model.n_layer
    if config.activation_checkpointing:
        per_token = block + r * C * model.n_layer
    tokens = micro_batch * T
    rows = min(tokens, rows_at_once(tokens, V, on_cuda))
    if compiled:  # the gradient of the head is kept for each piece, and summed at the end
        pieces = -(-tokens // rows)
        head = 4 * rows * V + (4 + (2 + pieces) * s) * V * C
    else:
        head = rows * V * (4 + 2 * s)  # logits as computed; in fp32; their gradient

    whole, adapters = parameter_count(model), adapter_count(model, config.lora_rank)
    fixed = 4.0 * whole + 16.0 * adapters if config.lora_rank else 16.0 * whole
    if on_cuda and s == 2 and shards == 1:
        fixed += 2 * whole  # autocast's copy of the weights
    if shards > 1:
        ends = V * C * (1 if model.tie_embeddings else 2)
        two_blocks = 2 * (whole - ends) / model.n_layer
        gradient = 0 if config.lora_rank else 4
        fixed = fixed / shards + (4 + gradient) * ends + (s + gradient) * two_blocks
    return fixed, float(tokens * per_token + head)


def pays_to_compile(config: Config) -> bool:
    """Whether torch.compile saves this run more time than it takes: on CUDA always, on MPS never.

    On a CPU, for each token and layer, a compiled step saves about 2.5 us plus 9 ns per channel.
    Compiling takes 25 s plus 2 s per layer (2 cores, docs/LOG.md).
    """
    model, tokens = config.model, config.batch_size * config.model.block_size * config.max_iters
    if not config.max_iters:  # not fixed yet; a step that is not compiled reaches a third
        rate = matmul_rate(config.device, config.dtype) / 3
        tokens = 60 * config.minutes * rate / flops_per_token(model, config.lora_rank)
    saved = (2.5e-6 + 9e-9 * model.n_embd) * tokens * model.n_layer
    return config.device.startswith("cuda") or (
        config.device == "cpu" and saved > 25 + 2 * model.n_layer
    )
