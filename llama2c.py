"""llama2.c's files, in and out: its float32 checkpoint (.bin, version 0) and its tokenizer.bin.

Neither has a magic number, so both are held against their own size. The layout is that of run.c, export.py and
tokenizer.py in github.com/karpathy/llama2.c at 350e04f. Its RoPE turns the rows 2i and 2i + 1 of a head of q and k as
a pair, ours turns i and i + D/2, so these rows change places on the way; no number is changed.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from checkpoint import write_atomically
from data.tokenizer import SPACE, SentencePieceTokenizer, Tokenizer, read_capped
from model import ModelConfig, rope_table

HEADER = struct.Struct("<7i")
FIELDS = ("n_embd", "n_hidden", "n_layer", "n_head", "n_kv_head", "vocab_size", "block_size")
LATER = b"24ka"  # how a file of version 1 or 2 starts
FIXED = {"norm": "rmsnorm", "norm_pos": "pre", "qk_norm": False, "norm_eps": 1e-5, "ffn": "swiglu",
         "rope_theta": 10000.0, "rope_scaling": "none"}  # what run.c computes, whatever a file says
ROTATED = ("attn.q.weight", "attn.k.weight")
ENTRY = struct.Struct("<fI")  # of tokenizer.bin: score and length, then the piece
SPECIAL = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))  # SentencePiece's names of ids 0 to 258
SPECIAL_PIECES = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(name.encode() for name in SPECIAL[3:])]  # and llama2.c's
SPECIAL_BYTES = [b"", b"", b"", *(bytes([byte]) for byte in range(256))]  # and what they are in a text
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # SentencePiece's types of pieces
INSTEAD = "leave format=llama2c out, to export for transformers and llama.cpp"


def layout(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each tensor in the order of a .bin; "" stands for RoPE's cos and sin, which run.c skips."""
    C, F = config.n_embd, config.hidden_size
    K = config.kv_heads * config.head_size
    blocks = {"attn_norm.gain": (C,), "attn.q.weight": (C, C), "attn.k.weight": (K, C), "attn.v.weight": (K, C),
              "attn.out.weight": (C, C), "ffn_norm.gain": (C,), "ffn.gate.weight": (F, C), "ffn.down.weight": (C, F),
              "ffn.up.weight": (F, C)}
    yield "embed.weight", (config.vocab_size, C)
    for part, shape in blocks.items():
        for layer in range(config.n_layer):
            yield f"blocks.{layer}.{part}", shape
    yield "norm.gain", (C,)
    yield "", (2, config.block_size, config.head_size // 2)
    if not config.tie_embeddings:
        yield "head.weight", (config.vocab_size, C)


def exchange(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Row a * inner + b of each head becomes its row b * outer + a. [heads * outer * inner, C] -> the same shape."""
    return rows.unflatten(0, (-1, outer, inner)).transpose(1, 2).flatten(0, 2)


def read_bin(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of a .bin of version 0: its configuration, and its fp32 weights with our names and our RoPE.

    ValueError if it is not such a file, found by its header and size before memory is asked for, or holds NaN or Inf.
    """
    path = Path(path)
    if not path.is_file():  # opening a FIFO would wait for ever
        raise FileNotFoundError(f"{path}: no such file; name a .bin of llama2.c")
    weights = {}
    with open(path, "rb") as file:
        config = read_header(path, file.read(HEADER.size))
        for name, shape in layout(config):
            count = math.prod(shape)
            if not name:
                file.seek(4 * count, 1)
                continue
            weight = torch.from_numpy(np.fromfile(file, "<f4", count).reshape(shape))
            if not torch.isfinite(weight).all():
                raise ValueError(f"{path}: {name} holds NaN or Inf: the file is damaged")
            weights[name] = exchange(weight, config.head_size // 2, 2) if name.endswith(ROTATED) else weight
    return config, weights


def read_header(path: Path, header: bytes) -> ModelConfig:
    """The configuration that the first bytes of a .bin give, if the file has the size that they ask for."""
    if header[:4] == LATER:
        raise ValueError(f"{path} is a llama2.c file of version {int.from_bytes(header[4:8], 'little')}, wanted is "
                         f"version 0: write it with llama2.c's export.py --version 0")
    try:
        if len(header) < HEADER.size:
            raise ValueError(f"it has {len(header)} bytes")
        numbers = dict(zip(FIELDS, HEADER.unpack(header), strict=True))
        tied = numbers["vocab_size"] > 0
        numbers["vocab_size"] = abs(numbers["vocab_size"])
        if min(numbers.values()) < 1:
            raise ValueError(", ".join(f"{name}={number}" for name, number in numbers.items()))
        config = ModelConfig(**numbers, tie_embeddings=tied)
    except ValueError as error:
        raise ValueError(f"{path} is no llama2.c file of version 0, by its header: {error}") from None
    wanted, size = HEADER.size + 4 * sum(math.prod(shape) for _, shape in layout(config)), path.stat().st_size
    if size != wanted:
        raise ValueError(f"{path} has {size:,} bytes where its header asks for {wanted:,}: it is "
                         f"{'cut short' if size < wanted else 'too long'}, or no llama2.c file of version 0")
    return config


def write_bin(path: str | Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Writes fp32 `weights` (our names and RoPE, rmsnorm's gains plain) as a .bin of version 0, atomically.

    ValueError if run.c would compute something else than this model, or if a weight is missing, surplus, wrongly
    shaped or not finite.
    """
    refuse_what_run_c_cannot(config)
    parts = dict(layout(config))
    for name in sorted(parts.keys() - {""} ^ weights.keys()):
        raise ValueError(f"the weights {'lack' if name in parts else 'have a surplus'} {name}")
    for name, weight in weights.items():
        if weight.shape != parts[name]:
            raise ValueError(f"{name} must be {list(parts[name])}, got {list(weight.shape)}")
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name} holds NaN or Inf: not exported")
    numbers = {name: getattr(config, name) for name in FIELDS}
    numbers |= {"n_hidden": config.hidden_size, "n_kv_head": config.kv_heads}
    numbers["vocab_size"] *= 1 if config.tie_embeddings else -1

    def write(file: BinaryIO) -> None:
        file.write(HEADER.pack(*numbers.values()))
        for name in parts:
            weight = weights[name] if name else torch.stack(rope_table(config))[..., config.head_size // 2:]
            weight = exchange(weight, 2, config.head_size // 2) if name.endswith(ROTATED) else weight
            file.write(weight.contiguous().numpy().astype("<f4", copy=False))

    write_atomically(Path(path), write)


def refuse_what_run_c_cannot(config: ModelConfig) -> None:
    other = [f"{name}={wanted} (here it is {getattr(config, name)})" for name, wanted in FIXED.items()
             if getattr(config, name) != wanted]
    if config.head_size * config.n_head != config.n_embd:
        other.append(f"head_dim = n_embd / n_head (here it is {config.head_dim})")
    cache = config.n_layer * config.block_size * config.kv_heads * config.head_size
    if max(cache, config.vocab_size * config.n_embd) >= 2**31:
        other.append("what 32-bit indices reach (here embedding or key-value cache are larger)")
    if other:
        raise ValueError(f"llama2.c computes only {', '.join(other)}: {INSTEAD}")


def read_tokenizer_bin(path: str | Path, vocab_size: int) -> SentencePieceTokenizer:
    """A tokenizer.bin as a SentencePiece model that cuts text as run.c does, with a space before it.

    ValueError if the file is damaged, or is not that of a model with `vocab_size` ids.
    """
    content = read_capped(Path(path))
    try:
        entries = list(split_entries(content))
        problem = problem_of(entries)
        if not problem and len(entries) != vocab_size:
            problem = f"it has {len(entries):,} pieces, the model has {vocab_size:,}"
        if problem:
            raise ValueError(problem)
        return SentencePieceTokenizer(model_proto(entries))
    except ValueError as error:
        raise ValueError(f"{path} is not this model's tokenizer.bin of llama2.c: {error}") from None


def split_entries(content: bytes) -> Iterator[tuple[float, bytes]]:
    """(score, piece) of each id in the content of a tokenizer.bin, which begins with the length of the longest."""
    longest, at = int.from_bytes(content[:4], "little"), 4
    while at < len(content):
        score, length = ENTRY.unpack(content[at:at + ENTRY.size].ljust(ENTRY.size, b"\0"))
        start, at = at + ENTRY.size, at + ENTRY.size + length
        if not 1 <= length <= longest or at > len(content):
            raise ValueError(f"at byte {start:,} of {len(content):,} should be a piece of {length:,} bytes, where the "
                             f"longest has {longest:,}")
        yield score, content[start:at]


def problem_of(entries: Sequence[tuple[float, bytes]]) -> str:
    """In words, what run.c or SentencePiece could not bear in a vocabulary; nothing if it is sound."""
    pieces = [piece for _, piece in entries]
    if pieces[:len(SPECIAL)] != SPECIAL_PIECES:
        return "ids 0 to 258 must be <unk>, <s>, </s> and the 256 bytes"
    if not all(math.isfinite(score) for score, _ in entries):
        return "a score is NaN or Inf"
    try:
        names = [piece.decode() for piece in pieces[len(SPECIAL):]]
    except UnicodeDecodeError:
        return "a piece is not UTF-8"
    if not all(name and "\0" not in name and SPACE not in name for name in names):
        return "a piece is empty, or holds NUL or U+2581"
    if len({*SPECIAL, *names}) < len(entries):
        return "two pieces are the same"
    return "" if " " in names else "no piece is a single space, which run.c puts before every prompt"


def model_proto(entries: Sequence[tuple[float, bytes]]) -> bytes:
    """SentencePiece's model, a protobuf ModelProto, of a vocabulary in which problem_of() finds nothing."""
    names = [*SPECIAL, *(piece.decode().replace(" ", SPACE) for _, piece in entries[len(SPECIAL):])]
    kinds = [UNKNOWN, CONTROL, CONTROL] + 256 * [BYTE] + (len(names) - len(SPECIAL)) * [NORMAL]
    pieces = [field(1, field(1, name.encode()) + field(2, score) + field(3, kind))
              for name, (score, _), kind in zip(names, entries, kinds, strict=True)]
    trainer = field(3, 2) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2)  # BPE, byte fallback, unk bos eos
    normalizer = field(1, b"identity") + field(3, 1) + field(4, 0)  # a dummy prefix, and all white space is kept
    return b"".join(pieces) + field(2, trainer) + field(3, normalizer)


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message: an int as varint, a float as fixed32, bytes after their length."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(number: int) -> bytes:
    """7 bits in each byte, the lowest first; all but the last have their high bit set."""
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def tokenizer_bin(tokenizer: Tokenizer) -> bytes:
    """The content of tokenizer.bin for a tokenizer. ValueError if run.c would not cut text as it does.

    But run.c puts a space before every prompt, and tokenizer.bin cannot tell it not to. Where tokenizer.dummy_prefix
    is False (ours), it takes for a prompt the ids that the tokenizer has for a space and the prompt.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise ValueError(f"llama2.c has SentencePiece tokenizers only, this one is {tokenizer.kind}: {INSTEAD}")
    model = tokenizer.first
    pieces = [*SPECIAL_PIECES, *tokenizer.pieces[len(SPECIAL):]]
    entries = [(model.get_score(i), piece) for i, piece in enumerate(pieces[:tokenizer.vocab_size])]
    problem = problem_of(entries)
    if tokenizer.pieces[:len(SPECIAL)] != SPECIAL_BYTES or (model.bos_id(), model.eos_id()) != (1, 2):
        problem = "ids 0 to 258 must be unknown, bos, eos and the 256 bytes"
    if not problem and not cut_alike(tokenizer, SentencePieceTokenizer(model_proto(entries))):
        problem = "it is not plain BPE, but unigram, or normalises, or has pieces that come before all merges"
    if problem:
        raise ValueError(f"llama2.c cannot use this tokenizer ({problem}): {INSTEAD}")
    return struct.pack("<I", max(map(len, pieces))) + b"".join(
        ENTRY.pack(score, len(piece)) + piece for score, piece in entries)


def cut_alike(one: SentencePieceTokenizer, other: SentencePieceTokenizer) -> bool:
    """Whether both give the same ids for a text that holds each piece, and what is often normalised away."""
    text = "a  b \u212b \ufb01 \uff21 \U0001f600 " + b"".join(one.pieces[len(SPECIAL):]).decode()
    return one.encode(text, start=False) == other.encode(text, start=False)
