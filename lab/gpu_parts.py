"""The parts of `lab.bench gpu`, and the figures that they yield.

Each is a function that yields a figure as soon as it has it. It works in an empty folder, which is
removed after it. As far as they can, parts start the programs as users do.

Order: the options; a figure; what the parts share; the parts; those of several devices.
"""

import math
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from data.prepare import prepare
from lab.bench_beside import ROOT, last_words, output_of, with_our_modules
from lab.bench_norm import copy_rate
from lab.measure import (
    as_arguments,
    fresh_run,
    seconds_of_start,
    seconds_of_step,
    values_in_turn,
)
from model import head_loss, knob
from norm import IMPLEMENTED, Norm
from run.machine import (
    autocast,
    choose_dtype,
    flops_per_token,
    matmul_rate,
    memory_estimate,
    peak_memory,
    processor,
)
from run.metrics import read_metrics
from run.setup import read_config
from train import train_step, warm_up
from weights.checkpoint import path_of

# name of a card: TFLOP/s of bfloat16 products and TB/s of a copy that a healthy one reaches
CARDS = {"NVIDIA H100 80GB HBM3": (600, 2.6), "NVIDIA H200": (600, 3.8)}
NANOGPTS_LOSS = 1.4697  # the best validation loss that its README has for shakespeare_char
PATIENCE_WITH_LOST = 300  # seconds
COMMON = dict(eval_interval=0, eval_iters=8, save_interval=0, sample_tokens=0, log_interval=1)
COMMON |= dict(warmup_iters=1, out_dir="run")
TINY = dict(n_layer=2, n_head=2, n_kv_head=0, n_embd=32, n_hidden=64, block_size=32, batch_size=8)
TINY |= dict(micro_batch_size=0, vocab_size=0)
TRAIN = [sys.executable, ROOT / "train.py"]


@dataclass(frozen=True, kw_only=True)
class GpuBench:
    """The options of `lab.bench gpu`."""

    parts: str = knob("all", "some of them, such as rates,sample")
    device: str = knob("auto", "auto (CUDA, then MPS, then CPU), cpu, mps, cuda or cuda:N")
    dataset: str = knob("python", "what the models are trained on, as for train.py")
    nanogpt: str = knob("", "a checkout of nanoGPT: its own bench.py, too")
    text: str = knob("", "nanoGPT's Shakespeare (input.txt): the loss of its character model, too")

    @property
    def on_card(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def norm_impls(self) -> tuple[str, ...]:
        """All implementations of norms; on a CPU the compiler would take longer than the rest."""
        return ("eager", "fused", "compile") if self.on_card else ("eager", "fused")

    def wanted(self, **bounds: Any) -> dict[str, Any]:
        """Bounds of a figure that say something of a card alone: elsewhere there are none."""
        return bounds if self.on_card else {}


@dataclass(frozen=True)
class Figure:
    """A measured value and what it should lie between; or a `note` that says why there is none."""

    name: str = ""
    value: float = math.nan
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    source: str = ""  # how `low` and `high` are known
    note: str = ""
    part: str = ""  # filled in by lab/bench_gpu.py


# -- What the parts share --------------------------------------------------------------------------


def words_of_train(options: GpuBench, preset: str, **knobs: Any) -> list[str]:
    """The words of train.py for a short run of the preset: on a card as it is, elsewhere tiny."""
    own = COMMON | {"dataset": options.dataset, "device": options.device} | knobs
    tiny = {} if options.on_card else TINY
    return [str(ROOT / "config" / f"{preset}.py"), *as_arguments(own | tiny)]


def steps_of(folder: str) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each step of a run."""
    return [record for record in read_metrics(Path(folder)) if "loss" in record]


def loss_gap(ours: list[dict], theirs: list[dict]) -> float:
    """The largest difference of two runs' training losses at one step."""
    pairs = zip(ours, theirs, strict=True)
    return max(abs(one["loss"] - other["loss"]) for one, other in pairs)


# -- The parts -------------------------------------------------------------------------------------


def card_rates(options: GpuBench) -> Iterator[Figure]:
    """The two rates with which all others are compared."""
    device, dtype = options.device, choose_dtype("auto", options.device)
    products, copies = CARDS.get(processor(device), (-math.inf, -math.inf))
    rate = matmul_rate(device, dtype) / 1e12
    yield Figure(f"products in {dtype}", rate, "TFLOP/s", products, source="wanted")
    rate = copy_rate(device, 2**30 if options.on_card else 2**26) / 1e12
    yield Figure("copies, read plus written", rate, "TB/s", copies, source="wanted")


def train_preset(preset: str, batch_size: int, share: float, options: GpuBench) -> Iterator[Figure]:
    """Eight steps, on a card compiled and with the automatic micro-batch. `share` of the rate of
    products is wanted, in percent. Nothing is saved: a checkpoint of llama_1b has 15 GB."""
    words = words_of_train(options, preset, batch_size=batch_size, max_iters=8)
    run = fresh_run(read_config(words))
    warm_up(run)
    losses, seconds = [], []
    for _ in range(8):
        start = time.perf_counter()
        losses.append(train_step(run)[0])
        seconds.append(time.perf_counter() - start)
    config, peak = run.config, peak_memory(run.config.device) / 1e9
    chance = math.log(config.model.vocab_size)
    yield Figure("loss at step 1", losses[0], "nats", chance - 0.1, chance + 0.1, "ln V")
    yield Figure("fall of the loss", losses[0] - losses[-1], "nats", 0.01, source="wanted")
    rate = config.batch_size * config.model.block_size / median(seconds[2:])
    yield Figure("speed, compiled" if config.compile else "speed, eager", rate, "tokens/s")
    used = 100 * rate * flops_per_token(config.model) / matmul_rate(config.device, config.dtype)
    yield Figure("of products", used, "%", **options.wanted(low=share, source="wanted"))
    micro = config.micro_batch_size
    computed = sum(memory_estimate(config, micro)) / 1e9
    bounds = {"low": 0.85 * computed, "high": computed, "source": "simulated"}  # 0.89 to 0.92
    yield Figure(f"peak, micro-batch {micro}", peak, "GB", **options.wanted(**bounds))


def exactness(options: GpuBench) -> Iterator[Figure]:
    """Every norm, and the loss, against float64 on the same device."""
    N, C, V = (4096, 768, 50304) if options.on_card else (256, 48, 4096)
    x = torch.randn(N, C, device=options.device)
    kinds = [(kind, impl) for impl in options.norm_impls for kind in IMPLEMENTED[impl]]
    for dtype, most in ((torch.float32, 8), (torch.bfloat16, 2)):
        errors, gradients = {}, {}
        for kind, impl in kinds:
            name = f"{kind} {impl}"
            errors[name], gradients[name] = norm_errors(kind, impl, x.to(dtype))
        told = f"norms in {str(dtype)[6:]}"
        yield worst_of(errors, told, "ulp", most)
        if dtype == torch.float32:  # PyTorch sums those of its own kernels in bfloat16, too
            yield worst_of(gradients, f"gradients of {told}", "of their length", 1e-5)
    weight, targets = torch.randn(V, C, device=options.device), torch.arange(N, device=x.device)
    weight *= 0.02
    loss = {"eager": head_loss}
    if options.on_card:
        loss["compiled"] = torch.compile(head_loss, dynamic=False)
    for name, function in loss.items():
        of_loss, of_gradient = loss_error(function, x, weight, targets)
        yield Figure(f"loss, {name}", of_loss, "nats", high=1e-3, source="more than a CPU has")
        name = f"its gradients, {name}"
        yield Figure(name, of_gradient, "of their length", high=0.01, source="more than a CPU has")


def worst_of(errors: dict[str, float], name: str, unit: str, most: float) -> Figure:
    """The largest error, with whose it is. NaN is larger than all."""
    worst = max(errors, key=lambda norm: (math.isnan(errors[norm]), errors[norm]))
    told = f"{name}, worst: {worst}"
    return Figure(told, errors[worst], unit, high=most, source="more than a CPU has")


def norm_errors(kind: str, impl: str, x: Tensor) -> tuple[float, float]:
    """How far a norm of x is from float64: (the largest error in units in the last place, at the
    size of the exact value, or of 1 if that is larger; that of the gradients as a share of their
    length)."""
    ours, exact = (Norm(kind, x.shape[-1], 1e-5, way).to(x.device) for way in (impl, "eager"))
    for parameter in ours.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # else a gain is 1, and a bias 0
    exact.load_state_dict(ours.state_dict())
    x, d = x.clone().requires_grad_(), torch.randn_like(x)
    y, wanted = ours(x), exact.double()(x.double())
    size = 2.0 ** torch.floor(torch.log2(wanted.abs().clamp_min(1.0)))
    error = ((y - wanted).abs() / size).max().item() / torch.finfo(x.dtype).eps
    found = torch.autograd.grad(y, (x, *ours.parameters()), d)
    right = torch.autograd.grad(wanted, (x, *exact.parameters()), d.double())
    return error, largest_gap(found, right)


def largest_gap(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest distance of one from the other, as a share of the length of the right one."""
    pairs = zip(found, right, strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def loss_error(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, targets: Tensor
) -> tuple[float, float]:
    """How far head_loss in bfloat16 is from float64: (nats, share of the gradients' length)."""
    x, weight = (tensor.clone().requires_grad_() for tensor in (x, weight))
    with autocast(str(x.device), "bfloat16"):
        ours = function(x, targets, None, weight)
    exact = F.cross_entropy(x.bfloat16().double() @ weight.bfloat16().double().T, targets)
    found, right = (torch.autograd.grad(loss, (x, weight)) for loss in (ours, exact))
    return abs(ours.item() - exact.item()), largest_gap(found, right)


def sample_speed(options: GpuBench) -> Iterator[Figure]:
    """One text in bfloat16, compiled on a card, of a model with random weights."""
    command = [sys.executable, "-m", "lab.bench", "sample", ROOT / "config" / "llama_1b.py"]
    knobs = {"dtypes": "bfloat16", "quantize": "none", "batches": 1, "device": options.device}
    knobs |= {"compile": options.on_card, "tokens": 64, "steps": 3}
    tiny = {} if options.on_card else TINY
    lines = output_of([*command, *as_arguments(knobs | tiny)]).decode().splitlines()
    name = "bfloat16 compiled" if options.on_card else "bfloat16"
    cells = next(re.split(r"\s{2,}", line) for line in lines if line.startswith(f"{name}  "))
    rate, share = float(cells[2].split()[0].replace(",", "")), float(cells[-1].rstrip("%"))
    yield Figure(name, rate, "tokens/s")
    yield Figure("of reading", share, "%", **options.wanted(low=70, source="wanted"))


def out_of_memory(options: GpuBench) -> Iterator[Figure]:
    """A micro-batch that no card holds is made smaller until it fits."""
    knobs = dict(batch_size=512, micro_batch_size=512, compile=False, max_iters=2)
    said = output_of([*TRAIN, *words_of_train(options, "llama_124m", **knobs)])
    tries = len(re.findall(rb"(?m)^out of GPU memory .* trying", said))
    yield Figure("smaller ones tried", tries, "", 1, source="wanted")
    yield Figure("steps done", steps_of("run")[-1]["step"], "", 2, 2, "wanted")


def resumed(options: GpuBench) -> Iterator[Figure]:
    """The second half of a run, once more from the checkpoint in its middle."""
    knobs = dict(batch_size=64, max_iters=8, save_interval=4, keep=9, compile=False)
    output_of([*TRAIN, *words_of_train(options, "llama_124m", **knobs)])
    before = steps_of("run")
    path_of(Path("run"), 8).unlink()
    output_of([*TRAIN, "run"])
    most = 0.01 if options.on_card else 0.0  # a GPU adds in another order each time
    gap = loss_gap(steps_of("run"), before)
    yield Figure("losses apart", gap, "nats", high=most, source="wanted")


def norm_share(options: GpuBench) -> Iterator[Figure]:
    """Steps that are not compiled with each norm, by each implementation of it."""
    kinds, impls = ("rmsnorm", "layernorm"), options.norm_impls
    arms = {(kind, impl): dict(norm=kind, norm_impl=impl) for kind, impl in product(kinds, impls)}
    seconds = seconds_of_arms(options, arms | {"none": dict(norm="none")}, batch_size=16)
    for impl in impls:
        ours, theirs = (seconds[kind, impl] for kind in kinds)
        yield Figure(f"a step with rmsnorm, of one with layernorm, {impl}", ours / theirs)
        share = 100 * (1 - seconds["none"] / ours)
        yield Figure(f"rmsnorm's share of a step, {impl}", share, "%")


def muon_share(options: GpuBench) -> Iterator[Figure]:
    """What a step with Muon takes longer than one with AdamW."""
    arms = {name: dict(optimizer=name) for name in ("adamw", "muon")}
    seconds = seconds_of_arms(options, arms, batch_size=256)
    share = 100 * (1 - seconds["adamw"] / seconds["muon"])
    yield Figure("of a step", share, "%", **options.wanted(high=5, source="wanted"))


def seconds_of_arms(
    options: GpuBench, arms: dict[Any, dict[str, Any]], **knobs: Any
) -> dict[Any, float]:
    """Seconds of an eager step of llama_124m with each arm's knobs, medians of steps in turn."""
    runs = {}
    for arm, own in arms.items():
        words = words_of_train(options, "llama_124m", compile=False, **knobs, **own)
        runs[arm] = fresh_run(read_config(words))
        seconds_of_start(runs[arm])
    calls = {arm: partial(seconds_of_step, run) for arm, run in runs.items()}
    return {arm: median(times) for arm, times in values_in_turn(calls, 4).items()}


def nanogpt_speed(options: GpuBench) -> Iterator[Figure]:
    """A compiled step of nanoGPT's model of 124M by its own bench.py, on random tokens."""
    flags = ["--real_data=False", "--batch_size=16", f"--device={options.device}"]
    said = output_of([sys.executable, "bench.py", *flags], Path(options.nanogpt)).decode()
    milliseconds = float(re.search(r"time per iteration: ([0-9.]+)ms", said)[1])
    yield Figure("speed of its 124M", 16 * 1024 * 1000 / milliseconds, "tokens/s")


def shakespeare_loss(options: GpuBench) -> Iterator[Figure]:
    """The whole training of the preset on nanoGPT's text."""
    prepare([options.text], Path("text"), "char")
    knobs = dict(max_iters=4)
    if options.on_card:
        knobs = dict(max_iters=5000, warmup_iters=100, eval_interval=250)
    knobs |= dict(dataset=Path("text").resolve(), eval_iters=0, log_interval=100)
    start = time.perf_counter()
    output_of([*TRAIN, *words_of_train(options, "shakespeare_char", **knobs)])
    seconds = time.perf_counter() - start
    loss = min(r["val_loss"] for r in read_metrics(Path("run")) if "val_loss" in r)
    bounds = options.wanted(high=NANOGPTS_LOSS, source="nanoGPT's")
    yield Figure("best validation loss", loss, "nats", **bounds)
    yield Figure("the whole process", seconds, "s")


# -- Several devices -------------------------------------------------------------------------------


def device_count(options: GpuBench) -> int:
    return torch.cuda.device_count() if options.on_card else 2


def ranks_speed(options: GpuBench) -> Iterator[Figure]:
    """torchrun's ranks on all devices beside one."""
    count, device = device_count(options), options.device.partition(":")[0]
    knobs = dict(batch_size=32 * count, max_iters=8, device=device)
    output_of([*TRAIN, *words_of_train(options, "llama_124m", **knobs)])
    alone = steps_of("run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={count}", ROOT / "train.py"]
    for kind in ("ddp", "fsdp"):
        words = words_of_train(options, "llama_124m", parallel=kind, out_dir=kind, **knobs)
        output_of([*launcher, *words])
        together = steps_of(kind)
        rate, one = (median(r["tok_per_s"] for r in run[2:]) for run in (together, alone))
        yield Figure(f"{kind} on {count}", rate, "tokens/s")
        yield Figure(f"{kind} on {count}, of one", rate / one, "times")
        gap = loss_gap(together, alone)
        yield Figure(f"{kind}, losses apart", gap, "nats", high=0.01, source="wanted")


def lost_rank(options: GpuBench) -> Iterator[Figure]:
    """Kills the last of several ranks, which no launcher watches: the others must end by
    themselves, as they must if another machine dies."""
    with open("errors.txt", "wb") as errors:
        *others, last = start_ranks(options, errors)
    while len(steps_of("run")) < 3:
        if any(rank.poll() is not None for rank in (*others, last)):
            raise ValueError(f"a rank ended: {last_words(Path('errors.txt').read_bytes())}")
        time.sleep(0.1)
    last.kill()
    start = time.perf_counter()
    for rank in others:
        rank.wait()
    seconds = time.perf_counter() - start
    yield Figure("until the others left", seconds, "s", high=PATIENCE_WITH_LOST, source="wanted")
    said = Path("errors.txt").read_text(errors="replace").count("error: another rank has gone")
    yield Figure("lines that tell of it", said, "", 1, 1, "wanted")


def start_ranks(options: GpuBench, errors: BinaryIO) -> list[subprocess.Popen]:
    """Endless runs of train.py on all devices, each with a launcher's variables."""
    count, device = device_count(options), options.device.partition(":")[0]
    knobs = dict(batch_size=8 * count, max_iters=1_000_000, compile=False, device=device)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    same = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    ranks = []
    for rank in range(count):
        own = same | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        env = with_our_modules() | {name: str(value) for name, value in own.items()}
        words, null = words_of_train(options, "llama_124m", **knobs), subprocess.DEVNULL
        ranks.append(subprocess.Popen([*TRAIN, *words], env=env, stdout=null, stderr=errors))
    return ranks
