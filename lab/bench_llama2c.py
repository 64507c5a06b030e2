"""llama2.c beside ours: its two C programs, built as its README says for speed, in turn with our
ways to make tokens. `lab.bench sample` calls this for llama2c=FOLDER.
"""

import os
import re
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lab.bench_beside import last_words, output_of
from model import ModelConfig

BUILD = "gcc -Ofast -fopenmp -march=native".split()  # its `make runomp`
FIELDS = ("n_embd", "hidden_size", "n_layer", "n_head", "kv_heads", "vocab_size", "block_size")
LARGEST_VOCABULARY = 32_000  # that of its tokenizer.bin
HEADER_OF_INT8 = 256  # bytes


def llama2c_rates(
    folder: Path, config: ModelConfig, work: Path
) -> dict[str, Callable[[int, int], float]]:
    """Functions (tokens, 1) -> tokens/s: of `run` in float32, and of `runq`, whose matrices are
    int8, for random weights of this shape. Both are built and fed in the folder `work`.

    ValueError if `folder` is no checkout of llama2.c or cannot have this shape.
    """
    tokenizer = folder / "tokenizer.bin"
    sources = {"run": folder / "run.c", "runq": folder / "runq.c"}
    for path in (tokenizer, *sources.values()):
        if not path.is_file():
            raise ValueError(f"llama2c={folder} has no {path.name}: name a checkout of llama2.c")
    if not config.tie_embeddings or config.vocab_size > LARGEST_VOCABULARY or config.head_dim:
        raise ValueError(
            f"llama2.c is compared with tie_embeddings=true, head_dim=0 and a vocab_size of at "
            f"most {LARGEST_VOCABULARY:,}"
        )
    rates = {}
    writers = {"run": write_float32, "runq": write_int8}
    for name, write in writers.items():
        program, model = work / name, work / f"{name}.bin"
        try:
            output_of([*BUILD, sources[name], "-lm", "-o", program])
        except (OSError, ValueError) as error:
            raise ValueError(f"llama2.c's {name} could not be built: {error}") from error
        with open(model, "wb") as file:
            write(file, config)
        rates[name] = partial(rate_of, program, model, tokenizer)
    return rates


def rate_of(program: Path, model: Path, tokenizer: Path, tokens: int, samples: int) -> float:
    """Tokens/s as the program prints it. Like ours, it does not time the first token, and draws the
    others at temperature 1 from the whole vocabulary. With samples=1 alone: it makes one text."""
    if samples != 1:
        raise ValueError(f"llama2.c makes one text at once, not {samples}")
    options = {"-z": tokenizer, "-t": 1, "-p": 1, "-n": tokens + 1}
    words = [str(word) for option in options.items() for word in option]
    # What is set for our own programs must not reach it: by itself it takes a thread for each core.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run([program, model, *words], capture_output=True, env=env)
    said = re.search(rb"achieved tok/s: ([0-9.]+)", done.stderr)
    if not said:  # it prints none if the very first token ends the text: one time in V
        raise ValueError(f"llama2.c's {program.name} gave no speed: {last_words(done.stderr)}")
    return float(said[1])


def numbers_of(config: ModelConfig) -> bytes:
    return struct.pack("<7i", *(getattr(config, name) for name in FIELDS))


def matrices_of(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(how many, rows, columns) of each kind of a Block's matrices, in llama2.c's order."""
    C, F, L = config.n_embd, config.hidden_size, config.n_layer
    K = config.kv_heads * config.head_size
    attention = [(L, C, C), (L, K, C), (L, K, C), (L, C, C)]  # q, k, v, out
    return [*attention, (L, F, C), (L, C, F), (L, F, C)]  # gate, down, up


def random_matrix(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns).normal_(0, 0.02)


def write_float32(file: BinaryIO, config: ModelConfig) -> None:
    """Random weights as a .bin of version 0, which `run` reads."""
    norms = torch.ones(config.n_layer, config.n_embd).numpy()
    *attention, gate, down, up = matrices_of(config)
    file.write(numbers_of(config))
    file.write(random_matrix(config.vocab_size, config.n_embd).numpy())
    for group in (attention, [gate, down, up]):
        file.write(norms)
        for count, rows, columns in group:
            for _ in range(count):
                file.write(random_matrix(rows, columns).numpy())
    file.write(norms[0])
    file.write(bytes(4 * config.block_size * config.head_size))  # RoPE's table, which it skips


def write_int8(file: BinaryIO, config: ModelConfig) -> None:
    """Random weights as a .bin of version 2, which `runq` reads."""
    group = next(size for size in (64, 32, 16, 8, 4, 2) if config.n_embd % size == 0)
    header = b"24ka" + struct.pack("<i", 2) + numbers_of(config) + struct.pack("<Bi", 1, group)
    file.write(header.ljust(HEADER_OF_INT8, b"\0"))
    file.write(torch.ones(2 * config.n_layer + 1, config.n_embd).numpy())
    for count, rows, columns in [(1, config.vocab_size, config.n_embd), *matrices_of(config)]:
        for _ in range(count):
            matrix = random_matrix(rows, columns).view(-1, group)
            scale = matrix.abs().amax(1, keepdim=True) / 127
            file.write((matrix / scale).round().to(torch.int8).numpy())
            file.write(scale.numpy())
