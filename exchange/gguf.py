"""A GGUF file of a model, which llama.cpp, llama-server and ollama load. USAGE shows the command.

GGUF is the format of llama.cpp: one file holds the settings, the vocabulary and the weights. The
package `gguf`, by the same people, writes it. A model is refused if llama.cpp would compute
something else than we do.

Reading order: the command; the settings; the weights. The vocabulary is in gguf_vocabulary.py.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a file: the imports below would not be found
    command = "python -m exchange.gguf"
    print(f"error: run it as a module, from the repository's root: {command}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":  # before the imports that take seconds
    from config.command import start

    start()

import numpy as np
from torch import Tensor

from config.command import run_command, shell_path, split_arguments, user_errors
from config.help import help_text
from config.schema import knobs_of, parse_knobs
from data.files import new_folder, sync
from exchange.gguf_vocabulary import gguf_vocabulary
from exchange.hf import check_llama_can_be, describe_model, llama_tensors
from model import ModelConfig, knob, rope_frequencies
from text.chat import template_learned, turn_ends_learned
from weights.hf_folder import hf_name
from weights.open import Weights, open_weights

try:
    import gguf
except ImportError:
    gguf = None

USAGE = "python -m exchange.gguf out/small small.gguf   a run becomes a file for llama.cpp"
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # the numbers of llama.cpp's enum llama_ftype
LARGEST = {"f32": math.inf, "f16": 65504.0, "q8_0": 127 * 65504.0}  # the scales of q8_0 are float16
Q8_BLOCK = 32  # numbers of a row that share a scale


@dataclass(frozen=True, kw_only=True)
class GGUFOptions:
    """What is written, and how its matrices are stored."""

    checkpoint: str = knob("latest", "latest, best or a step")
    dtype: Literal["f32", "f16", "q8_0"] = knob(
        "f32", "of the matrices; q8_0 = 8-bit numbers and a scale for each 32 of them"
    )


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done; the user's errors leave with 2."""
    if {"-h", "--help"} & set(argv):
        print(USAGE, help_text("knobs:", GGUFOptions), sep="\n\n")
        return 0
    with user_errors():
        words, pairs = split_arguments(argv)
        knobs = parse_knobs(pairs, knobs_of(GGUFOptions), "command line")
        if len(words) != 2:
            raise ValueError(
                f"got {' '.join(words) or 'no model'}: write python -m exchange.gguf RUN FILE.gguf"
            )
        export_gguf(Path(words[0]), Path(words[1]), GGUFOptions(**knobs))
    return 0


def export_gguf(place: Path, out: Path, options: GGUFOptions) -> None:
    """Writes the whole file `out` of the model in `place`, or, if that fails, nothing. ValueError
    or OSError says why.
    """
    if gguf is None:
        raise ValueError("writing GGUF needs the package gguf: pip install -e '.[gguf]'")
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already: name another file, or remove it")
    weights = open_weights(place, options.checkpoint)
    config = replace(weights.config, block_size=weights.context)
    check_llama_cpp_can_be(config)
    tokenizer = weights.tokenizer()
    turn_ends = turn_ends_learned(tokenizer, weights.data)
    settings = gguf_settings(config)
    settings |= gguf_vocabulary(tokenizer, config.vocab_size, turn_ends)
    if template := template_learned(tokenizer, weights.data):
        settings["chat_template"] = template
    settings |= {
        "name": weights.folder.resolve().name,
        "file_type": FILE_TYPES[options.dtype],
        "quantization_version": gguf.GGML_QUANT_VERSION,
    }
    writer = gguf.GGUFWriter(None, "qwen3" if config.qk_norm else "llama")
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in gguf_tensors(weights):
        writer.add_tensor(name, *stored_as(name, tensor, options.dtype))
    with new_folder(out) as folder:
        write_gguf(writer, folder / out.name)
        os.rename(folder / out.name, out)
    size = out.stat().st_size / 1e6
    print(
        f"{out}: {describe_model(config)}, {options.dtype}, {size:,.1f} MB\n"
        f"serve    llama-server -m {shell_path(out)}"
    )


def write_gguf(writer: Any, path: Path) -> None:
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    sync(path)


# Settings


def check_llama_cpp_can_be(config: ModelConfig) -> None:
    """ValueError if llama.cpp's Llama (or, with qk_norm, its Qwen 3) computes something else."""
    check_llama_can_be(config)
    if config.qk_norm and config.rope_scaling != "none":
        raise ValueError(
            f"rope_scaling={config.rope_scaling} with qk_norm=true: llama.cpp's Qwen 3 does not "
            f"scale RoPE so, and its Llama has no norms on queries and keys; python -m exchange.hf "
            f"export writes this model for transformers"
        )


def gguf_settings(config: ModelConfig) -> dict[str, Any]:
    """The name of each setting, as GGUFWriter's method add_NAME has it, and its value."""
    return {
        "context_length": config.block_size,
        "vocab_size": config.vocab_size,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.hidden_size,
        "head_count": config.n_head,
        "head_count_kv": config.kv_heads,
        "key_length": config.head_size,
        "value_length": config.head_size,
        "layer_norm_rms_eps": config.norm_eps,
        "rope_dimension_count": config.head_size,
        "rope_freq_base": config.rope_theta,
    }


# Weights


def gguf_tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name and the fp32 tensor of each weight. A tied head is left out, as there."""
    config = weights.config
    kind = gguf.MODEL_ARCH.QWEN3 if config.qk_norm else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(kind, config.n_layer)
    for name, tensor in llama_tensors(weights).items():
        if not config.qk_norm and name.endswith((".attn.q.weight", ".attn.k.weight")):
            tensor = interleave_pairs(tensor, config.head_size)
        yield names.get_name(hf_name(name), (".weight",)), tensor
    if config.rope_scaling != "none":  # llama.cpp divides the plain frequencies by these
        plain = rope_frequencies(replace(config, rope_scaling="none"))
        yield "rope_freqs.weight", plain / rope_frequencies(config)


def interleave_pairs(tensor: Tensor, head_size: int) -> Tensor:
    """The rows of a query or key matrix [heads * D, C] in the order of llama.cpp's Llama: RoPE
    rotates channels 2i and 2i + 1 there, and i and i + D/2 here. Its Qwen 3 has our order.
    """
    halves = tensor.view(-1, 2, head_size // 2, tensor.shape[1])
    return halves.transpose(1, 2).reshape(tensor.shape)


def stored_as(name: str, tensor: Tensor, dtype: str) -> tuple[np.ndarray, Any, Any]:
    """A tensor as GGUFWriter.add_tensor takes it: the array, no other shape, the kind of q8_0.
    Vectors, which are norms and RoPE's factors, stay fp32, as llama.cpp wants.
    """
    if tensor.dim() == 1 or dtype == "f32":
        return tensor.numpy(), None, None
    if not tensor.abs().max() <= LARGEST[dtype]:
        raise ValueError(f"{name} does not fit into {dtype}: use dtype=f32")
    if dtype == "f16":
        return tensor.half().numpy(), None, None
    if tensor.shape[1] % Q8_BLOCK:
        raise ValueError(
            f"{name} has {tensor.shape[1]} numbers in a row, and q8_0 stores them by "
            f"{Q8_BLOCK}: use dtype=f16 or f32"
        )
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.quantize(tensor.numpy(), kind), None, kind


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
