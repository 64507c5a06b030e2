"""bench.py plan: what training on many devices should take, computed from the rate of one and the speed of the links.

Nothing here is measured but, where it is not stated, what this machine's device does alone.

Parallel, as parallel.py does it. ddp: all devices have all weights, and all-reduce their fp32 gradients once a step, in
buckets. fsdp (FSDP2, Zhao et al. 2023, arXiv 2304.11277): for each micro-batch a Block's weights are gathered for
forward and again for backward, in the dtype of its products, embedding and head once, in fp32, and all fp32 gradients
are reduced and scattered. Gains, which are not shared, are so little that they are counted as if they were; adapters
are all-reduced after the last micro-batch.

Collectives are rings: of S bytes on N devices each sends (N-1)/N S in N-1 hops for an all-gather or a reduce-scatter,
and twice that for an all-reduce. NCCL has one ring for each network card of a node, so all cards of a node carry what
goes to the next one: a ring is as fast as a link, or as all cards of a node together if these are slower.

Overlap. Communication runs beside computation, in forward and in backward, and the longer of the two counts. What has
nothing to run beside is added: fsdp's first gathers and last reductions (root and first Block), ddp's last bucket.
Not in it: stragglers, the optimizer's own time and Muon's exchanges, that small micro-batches are less efficient.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from bench_beside import middle, own_options, print_table, values_in_turn, written
from bench_norm import seconds_of
from config.schema import Config
from cost import flops_per_token, memory_estimate, parameter_count
from device import autocast, choose_device, choose_dtype, matmul_rate, total_memory
from lora import adapter_count
from model import Decoder, ModelConfig, knob
from run import read_config

Parallel = Literal["ddp", "fsdp"]
BUCKET = 25 * 2**20  # bytes, PyTorch's default for DDP
NOTES = ("of each device in a step; memory: weights with gradient and moments + activations\n"
         "overlap: in forward and in backward the longer of computation and communication counts; fsdp's first gathers "
         "and last reductions and ddp's last bucket have nothing to hide behind")


@dataclass(frozen=True, kw_only=True)
class PlanBench:
    """The options of `bench.py plan` as they are written; every knob of a run can be set, too."""

    gpus: int = knob(8, "devices in all")
    gpus_per_node: int = knob(8, "devices that share a node's fast links")
    flops: float = knob(0.0, "FLOP/s of a device's matrix products, such as 989e12 (data sheet of an H100 SXM, dense "
                             "bfloat16); then efficiency and memory must be stated too. 0 = measured here")
    efficiency: float = knob(0.0, "share of flops that forward and backward reach on one device; 0 = measured here")
    memory: float = knob(0.0, "GB of a device; 0 = this one's")
    link: float = knob(450.0, "GB/s that a device sends within its node; 450 = NVLink 4, half of the 900 that the data "
                              "sheet of an H100 SXM counts both ways")
    network: float = knob(50.0, "GB/s that each device's share of the network sends to other nodes; 50 = a card of "
                                "400 Gb/s for each, as in a DGX H100")
    latency: float = knob(4.7, "microseconds of a ring's hop; 4.7 = what NCCL's src/graph/tuning.cc reckons with, 3.4 "
                               "by NVLink and 14 by network, where one hop of eight is by network")
    steps: int = knob(3, "timed steps of a short model, where efficiency is measured")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices, all alike, and what joins them. Named like the options, but in FLOP/s, bytes, bytes/s and seconds."""

    gpus: int
    gpus_per_node: int
    flops: float
    efficiency: float
    memory: float
    link: float
    network: float
    latency: float
    device: str = "cuda"  # cpu keeps more for backward

    def __post_init__(self):
        problems = [f"{name} must be 1 or more, got {getattr(self, name)}" for name in ("gpus", "gpus_per_node")
                    if getattr(self, name) < 1]
        problems += [f"{name} must be above 0, got {getattr(self, name):g}" for name in ("flops", "memory", "link",
                     "network") if getattr(self, name) <= 0]
        if not 0 < self.efficiency <= 1:
            problems.append(f"efficiency must be above 0 and at most 1, got {self.efficiency:g}")
        if self.latency < 0:
            problems.append(f"latency must be 0 or more, got {self.latency:g}")
        if not problems and self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            full = self.gpus // self.gpus_per_node * self.gpus_per_node
            problems.append(f"gpus={self.gpus} must be whole nodes of gpus_per_node={self.gpus_per_node}: nearest are "
                            f"{full} and {full + self.gpus_per_node}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a ring through all devices."""
        return self.link if self.gpus <= self.gpus_per_node else min(self.link, self.network * self.gpus_per_node)

    def sent(self, size: float) -> float:
        """Bytes that each device sends to gather, or to reduce and scatter, `size` bytes."""
        return (self.gpus - 1) / self.gpus * size

    def seconds(self, size: float, passes: float) -> float:
        """That `passes` rounds of the ring take, which gather or reduce and scatter `size` bytes together."""
        return self.sent(size) / self.bandwidth + passes * (self.gpus - 1) * self.latency


@dataclass(frozen=True)
class Phase:
    """A stretch of a step, or so many alike: computation, and beside it rounds of the ring (an all-reduce is two)."""

    compute: float  # seconds
    size: float = 0.0  # bytes that the rounds gather or reduce, on all devices together
    passes: float = 0.0
    times: int = 1


@dataclass(frozen=True)
class Plan:
    """What one step should take on each device."""

    micro_batch: int  # sequences; 0 if a device has less than one
    weights: float  # bytes, with gradient and moments
    activations: float  # bytes
    sent: float  # bytes
    compute: float  # seconds
    communication: float  # seconds, hidden behind the computation or not
    seconds: float  # of the whole step; inf if it cannot be done
    tokens_per_second: float  # of all devices
    mfu: float  # model FLOPs utilisation: without what activation checkpointing repeats
    limit: str  # what binds: batch, memory, network or compute

    @property
    def efficiency(self) -> float:
        """Speed for each device, held against one that has as much to do and nobody to talk to."""
        return self.compute / self.seconds


# -- the arithmetic ----------------------------------------------------------------------------------------------------

def plan(config: Config, cluster: Cluster, parallel: Parallel) -> Plan:
    """One step of batch_size sequences, planned. dtype and vocab_size must be known; ValueError if the batch cannot be
    shared out."""
    model, sequences = config.model, sequences_of_each(config, cluster)
    micro, weights, activations = memory_of_each(config, cluster, parallel, sequences)
    tokens = sequences * model.block_size
    forward = tokens * flops_per_token(model) / 3 / (cluster.flops * cluster.efficiency)
    backward = forward * (3 if config.activation_checkpointing else 2)  # with a second forward
    limit = "batch" if not sequences else "memory" if weights + activations > cluster.memory else ""
    if limit:
        return Plan(micro, weights, activations, 0.0, forward + backward, 0.0, math.inf, 0.0, 0.0, limit)
    parts = sequences // micro
    phases = {"ddp": ddp_phases, "fsdp": fsdp_phases}[parallel](config, parts, forward / parts, backward / parts)
    times = [(p.times, p.compute, cluster.seconds(p.size, p.passes)) for p in phases]
    seconds = sum(n * max(compute, communication) for n, compute, communication in times)
    waiting = sum(n * communication for n, compute, communication in times if communication > compute)
    rate = cluster.gpus * tokens / seconds
    return Plan(micro, weights, activations, sum(p.times * cluster.sent(p.size) for p in phases), forward + backward,
                sum(n * communication for n, _, communication in times), seconds, rate,
                rate * flops_per_token(model) / (cluster.gpus * cluster.flops),
                "network" if waiting > seconds / 2 else "compute")


def sequences_of_each(config: Config, cluster: Cluster) -> int:
    """Sequences of a step for each device; 0 if there are fewer than devices."""
    batch, gpus, micro = config.batch_size, cluster.gpus, config.micro_batch_size
    if batch > gpus and batch % gpus:
        raise ValueError(f"batch_size={batch} must be a multiple of gpus={gpus}: nearest are {batch // gpus * gpus} "
                         f"and {(batch // gpus + 1) * gpus}")
    if micro and batch // gpus % micro:
        raise ValueError(f"micro_batch_size={micro} must divide the {batch // gpus} sequences that each of gpus={gpus} "
                         f"has of batch_size={batch}; 0 = the largest that fits")
    return batch // gpus


def memory_of_each(config: Config, cluster: Cluster, parallel: Parallel, sequences: int) -> tuple[int, float, float]:
    """(micro-batch, bytes of weights with gradient and moments, bytes of activations) of a device. An automatic
    micro-batch leaves a fifth of the memory free, as in a run."""
    def need(micro: int) -> tuple[float, float]:
        return memory_estimate(config.model, micro, config.dtype, cluster.device, config.activation_checkpointing,
                               config.lora_rank, cluster.gpus if parallel == "fsdp" else 1)

    fits = [m for m in range(1, sequences + 1) if sequences % m == 0 and sum(need(m)) < 0.8 * cluster.memory]
    micro = config.micro_batch_size or max(fits, default=1)
    return micro if sequences else 0, *need(micro)


def ddp_phases(config: Config, parts: int, forward: float, backward: float) -> list[Phase]:
    """Of a step of so many micro-batches, which take so many seconds each: only the last one's backward has company."""
    model, adapters = config.model, adapter_count(config.model, config.lora_rank)
    gradient = 4 * (adapters or parameter_count(model))
    embedding = 0 if adapters else 4 * model.vocab_size * model.n_embd  # its gradient is the last to come
    last = min(gradient, max(BUCKET, embedding))
    return [Phase(parts * forward + (parts - 1) * backward),
            Phase(backward, 2 * (gradient - last), 2 * math.ceil((gradient - last) / BUCKET)), Phase(0, 2 * last, 2)]


def fsdp_phases(config: Config, parts: int, forward: float, backward: float) -> list[Phase]:
    """The same with weights gathered and gradients scattered in each micro-batch; frozen weights have no gradient."""
    root, block = groups(config.model)
    layers, s, learn = config.model.n_layer, 4 if config.dtype == "float32" else 2, 0 if config.lora_rank else 1
    rest = layers - 1
    return [Phase(0, 4 * root + s * block + learn * 4 * (root + block), 2 + learn * 2, parts),
            Phase(forward, s * rest * block, rest, parts),
            Phase(backward, s * layers * block + learn * 4 * rest * block, layers + learn * rest, parts),
            Phase(0, 2 * 4 * adapter_count(config.model, config.lora_rank), 2)]


def groups(model: ModelConfig) -> tuple[int, int]:
    """Parameters of the root (embedding, head) and of a Block."""
    whole = parameter_count(model)
    block = parameter_count(dataclasses.replace(model, n_layer=model.n_layer + 1)) - whole
    return whole - model.n_layer * block, block


# -- the command -------------------------------------------------------------------------------------------------------

def planning(arguments: list[str]) -> None:
    """Prints the plan of both ways to be parallel, and what it was made of."""
    options, places, knobs = own_options(PlanBench, arguments)
    config = read_config([*places, *written(knobs)])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model,
                                                                   vocab_size=config.model.vocab_size or 32000))
    config, cluster = devices(options, config)
    plans = {parallel: plan(config, cluster, parallel) for parallel in ("ddp", "fsdp")}
    said = {name: "stated" if getattr(options, name) else "measured here" for name in ("flops", "efficiency", "memory")}
    print(f"planned, not measured: {parameter_count(config.model):,} parameters, {config.batch_size:,} x "
          f"{config.model.block_size:,} tokens a step, {config.dtype}"
          f"{', activation checkpointing' if config.activation_checkpointing else ''}\n"
          f"gpus={cluster.gpus}, each of {cluster.flops / 1e12:,.3g} TFLOP/s ({said['flops']}), of which it reaches "
          f"{cluster.efficiency:.1%} ({said['efficiency']}), {cluster.memory / 1e9:,.0f} GB ({said['memory']}); "
          f"{cluster.gpus_per_node} in a node\nlink {options.link:g} GB/s, network {options.network:g} GB/s a device, "
          f"latency {options.latency:g} us; a ring through all: {cluster.bandwidth / 1e9:g} GB/s\n{NOTES}")
    heads = ("", "micro-batch", "memory", "sent", "compute", "communication", "step", "tokens/s", "MFU",
             "of one device", "limit")
    print_table([heads, *(cells(parallel, found, cluster) for parallel, found in plans.items())])


def cells(parallel: str, p: Plan, cluster: Cluster) -> tuple[str, ...]:
    """A row of the table; '-' for what cannot be done."""
    share = (p.weights + p.activations) / cluster.memory
    room = f"{p.micro_batch}", f"{p.weights / 1e9:.1f} + {p.activations / 1e9:.1f} GB, {share:.0%}"
    done = (f"{p.sent / 1e9:,.1f} GB", *(f"{1000 * t:,.0f} ms" for t in (p.compute, p.communication, p.seconds)),
            f"{p.tokens_per_second:,.0f}", f"{p.mfu:.1%}", f"{p.efficiency:.1%}")
    return parallel, *room, *(done if math.isfinite(p.seconds) else "-" * len(done)), p.limit


def devices(options: PlanBench, config: Config) -> tuple[Config, Cluster]:
    """The config with the dtype that the devices would take, and their cluster. What is not stated is measured here,
    unless flops is: then the devices are others, of which nothing else is known either."""
    if options.flops and not (options.efficiency and options.memory):
        raise ValueError(f"flops={options.flops:g} is another device's: state its efficiency and memory too, such as "
                         f"efficiency=0.4 memory=80")
    if options.flops:
        device, dtype = "cuda", "bfloat16" if config.dtype == "auto" else config.dtype
    else:
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
    config = dataclasses.replace(config, dtype=dtype)
    rate = options.flops or matmul_rate(device, dtype)
    known = {name: getattr(options, name) for name in ("gpus", "gpus_per_node")} | {
        "memory": options.memory * 1e9 or total_memory(device), "link": options.link * 1e9,
        "network": options.network * 1e9, "latency": options.latency / 1e6, "flops": rate, "device": device}
    Cluster(efficiency=options.efficiency or 1.0, **known)  # what is wrong is said before anything is timed
    efficiency = options.efficiency or measured_efficiency(config, device, rate, options.steps)
    return config, Cluster(efficiency=efficiency, **known)


def measured_efficiency(config: Config, device: str, rate: float, steps: int) -> float:
    """Share of `rate` that forward and backward reach here, put together from models of one Block and of two, on random
    tokens: a GPU gets up to 16,384 of them, a CPU one sequence. No data set is needed, and no room for the whole."""
    model = config.model
    sequences = max(1, 2**14 // model.block_size) if device.startswith("cuda") else 1
    calls = {layers: timed_model(config, dataclasses.replace(model, n_layer=layers), device, sequences)
             for layers in range(1, min(2, model.n_layer) + 1)}
    for call in calls.values():
        call()  # compiles, and warms up
    seconds = {layers: middle(times) for layers, times in values_in_turn(calls, steps).items()}
    whole = seconds[1] + (model.n_layer - 1) * max(0.0, seconds.get(2, seconds[1]) - seconds[1])
    return min(1.0, sequences * model.block_size * flops_per_token(model) / whole / rate)


def timed_model(config: Config, model_config: ModelConfig, device: str, sequences: int) -> Callable[[], float]:
    """A function that does forward and backward once, and returns the seconds."""
    model = Decoder(model_config).to(device).train()
    forward = torch.compile(model) if config.compile is not False and device.startswith("cuda") else model
    ids = torch.randint(model_config.vocab_size, (sequences, model_config.block_size), device=device)

    def both() -> None:
        with autocast(device, config.dtype):
            loss = forward(ids, ids)
        loss.backward()
        model.zero_grad()

    return partial(seconds_of, both, device, None)
