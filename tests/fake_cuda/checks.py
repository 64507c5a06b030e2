"""What tests/test_fake_cuda.py asks of the GPU: python -m fake_cuda.checks CHECKS

Each check prints on its last line, as JSON, what it found. To judge is the tests' part.
"""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters

import model
import sample
import train
from fake_cuda.gpu import DEVICE, always, gpu
from run.ranks import ALONE
from run.setup import build, open_data, read_config, resolve

CAPABILITIES = ((8, 0), (8, 9), (9, 0))
NEW = {"weights": None, "saved": None, "base": {}}  # what a run begins with that has no checkpoint
model.initialise = always(None)  # the numbers, which fake tensors do not keep, would take long


def steps(*arguments: str) -> dict:
    """train.py from the first line to the last. Fake tensors cannot be saved, so nothing is."""
    torch._dynamo.reset()
    gpu.codes.clear()
    train_step, waits, graphs = train.train_step, [], []

    def watched(*rest):
        before = gpu.waits.copy()
        done = train_step(*rest)
        waits.append(dict(gpu.waits - before))
        graphs.append(len(gpu.codes))
        return done

    nothing_saved = {"save_checkpoint": always(True), "save_if_best": always(None)}
    with patch.multiple(train, train_step=watched, **nothing_saved):
        code = train.main(list(arguments))
    return {"code": code, "waits": waits, "graphs": graphs, "graphs_at_end": len(gpu.codes)}


def token(texts: list[tuple[int, int]], **shape) -> dict:
    """generate, compiled, for prompts and continuations of so many tokens."""
    torch._inductor.compile_fx.cudagraphify = lambda code, **kwargs: code  # there is no graph
    decoder = model.Decoder(model.ModelConfig(**shape)).to("cuda:0")
    graphs, waits, before = [], [], len(gpu.codes)
    with torch.autocast("cuda", torch.bfloat16):
        for prompt, new in texts:
            gpu.waits.clear()
            made = list(sample.generate(decoder, [1] * prompt, new, compile=True, top_k=5))
            graphs.append(len(gpu.codes) - before)
            waits.append(dict(gpu.waits) | {"tokens": len(made)})
    code = gpu.codes[before]
    return {
        "graphs": graphs,
        "waits": waits,
        "partitions": re.findall(r"^def (partition_\d+)\(", code, re.M),
        "outside": calls_outside_partitions(code),
        "skips": counters["inductor"]["cudagraph_skips"],
    }


def calls_outside_partitions(code: str) -> list[str]:
    """The lines of a graph's code that start kernels outside of its partitions."""
    runner = code[code.index("class Runner") :]
    return [line.strip() for line in runner.splitlines() if re.search(r"\.run\(|_kernels\.", line)]


def peak(preset: str, gigabytes: int, layers: list[int], dataset: str) -> dict:
    """The micro-batch that is chosen for a card of that size, and the peak of training with it, in
    bytes: of so many layers, and, because all layers are alike, of the preset's number.
    """
    gpu.total_memory = gigabytes * 10**9
    wanted = read_config([preset, f"dataset={dataset}", "device=cuda"])
    data = open_data(wanted)
    chosen = resolve(wanted, "cuda:0", data, None, ALONE)
    peaks = [peak_of_layers(chosen, n, data) for n in layers]
    depth = chosen.model.n_layer
    (n, low), (m, high) = list(zip(layers, peaks, strict=True))[-2:]
    whole = high + (high - low) / (m - n) * (depth - m)
    return {"micro": chosen.micro_batch_size, "peaks": peaks, "whole": whole}


def peak_of_layers(config, layers: int, data) -> int:
    """The most bytes in two steps of two micro-batches, after the warm-up."""
    torch._dynamo.reset()
    config = replace(
        config,
        batch_size=2 * config.micro_batch_size,
        model=replace(config.model, n_layer=layers),
    )
    run = build(config, data, NEW, ALONE)
    train.warm_up(run)
    gpu.memory.forget_peak()
    for _ in range(2):
        train.train_step(run)
    return gpu.memory.peak


def cubins(preset: str, dataset: str, shape: dict) -> dict:
    """Compiles every kernel of a step and of a token to machine code, with Triton and ptxas: how
    many of them, and the errors.
    """
    chosen = replace(read_config([preset, "device=cuda"]), device="cuda:0", dtype="bfloat16")
    chosen = replace(chosen, compile=True, micro_batch_size=8)
    peak_of_layers(chosen, 1, open_data(replace(chosen, dataset=dataset)))
    token([[5, 3]], **shape)
    use_triton()
    done, errors = 0, []
    for name, source in gpu.kernels.items():
        for capability in CAPABILITIES:
            try:
                done += bool(compile_kernel(name, source, capability))
            except Exception as error:  # whatever Triton and ptxas raise
                errors.append(f"{name} for {capability}: {error!r:.200}")
    return {"kernels": len(gpu.kernels), "cubins": done, "errors": errors}


def use_triton() -> None:
    """Triton asks its driver, which there is none of, for the device of the kernel it compiles."""
    import triton
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=always(target),
            get_current_device=always(0),
            get_current_stream=always(0),
            get_active_torch_device=always(DEVICE),
            get_device_interface=always(torch.cuda),
            is_active=always(True),
        )
    )
    torch._inductor.config.use_static_cuda_launcher = False  # which would load the code
    triton_helpers.set_driver_to_gpu = always(None)  # each source calls it


def compile_kernel(name: str, source: str, capability: tuple[int, int]) -> bytes:
    """The machine code of a kernel. Its source names the device it is for."""
    major, minor = capability
    source, found = re.subn(r"cc=\d+, major=\d+", f"cc={major}{minor}, major={major}", source)
    if found != 1:
        raise ValueError(f"{found} devices instead of 1 in the source of {name}")
    kernel = getattr(torch._inductor.codecache.PyCodeCache.load(source), name)
    return kernel._precompile_config(kernel.configs[0]).kernel.asm["cubin"]


if __name__ == "__main__":
    with gpu:
        print(
            json.dumps(
                [globals()[name](*words, **knobs) for name, words, knobs in json.loads(sys.argv[1])]
            )
        )
