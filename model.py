"""A LLaMA-style decoder in one file; with norm.py beside it, it works alone.

Legend: B batch, T time, C channels (n_embd), H heads, K key/value heads, D head size (C / H), F hidden size of the
feed-forward, V vocabulary, S cache size. Reading order is from the configuration through the leaves to the root.
"""

import math
import zlib
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from norm import Norm


def knob(default, help: str):
    """A field of a configuration with the text that --help prints for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the shape and the function of a Decoder."""

    n_layer: int = knob(6, "number of Blocks")
    n_head: int = knob(6, "attention heads in a Block")
    n_kv_head: int = knob(0, "key/value heads; 0 = n_head (MHA), 1 = MQA, between = GQA")
    n_embd: int = knob(384, "channels of the residual stream")
    n_hidden: int = knob(0, "hidden size of the feed-forward; 0 = LLaMA's rule: 8/3 n_embd, rounded up to 256s")
    block_size: int = knob(256, "context length in tokens")
    vocab_size: int = knob(0, "entries of the embedding; 0 = as many as the data set's tokenizer has")
    tie_embeddings: bool = knob(False, "one matrix for the embedding and the output head")
    dropout: float = knob(0.0, "dropout probability on embeddings, attention and both branches; LLaMA has none")
    norm: Literal["rmsnorm", "layernorm"] = knob("rmsnorm", "kind of every norm")
    norm_eps: float = knob(1e-5, "added inside the root of every norm")
    norm_impl: Literal["eager", "fused", "compile"] = knob("eager", "how norms are computed: plain PyTorch, "
                                                           "PyTorch's kernel, or the function compiled by itself")
    rope_theta: float = knob(10000.0, "base of the rotary frequencies; 500000 in Llama 3")
    rope_scaling: Literal["none", "llama3"] = knob("none", "Llama 3.1's stretching of the low rotary frequencies")
    rope_factor: float = knob(8.0, "llama3: how far the low frequencies are stretched")
    rope_low_freq: float = knob(1.0, "llama3: below this many turns per original context, stretch in full")
    rope_high_freq: float = knob(4.0, "llama3: above this many turns per original context, leave alone")
    rope_original_context: int = knob(8192, "llama3: context length before stretching, in tokens")

    def __post_init__(self):
        problems = [f"{name} must be between 1 and {most:,}, got {getattr(self, name):,}"
                    for name, most in LARGEST.items() if not 1 <= getattr(self, name) <= most]
        problems += [f"{name} must be 0 (automatic) or more, got {getattr(self, name)}"
                     for name in ("n_kv_head", "n_hidden", "vocab_size") if getattr(self, name) < 0]
        problems += [f"{name} must be above 0, got {getattr(self, name)}"
                     for name in ("norm_eps", "rope_theta", "rope_factor", "rope_original_context")
                     if getattr(self, name) <= 0]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 < self.rope_low_freq < self.rope_high_freq:
            problems.append(f"rope_low_freq must be above 0 and below rope_high_freq, "
                            f"got {self.rope_low_freq} and {self.rope_high_freq}")
        if not problems:
            problems = self._head_problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _head_problems(self) -> list[str]:
        if self.n_embd % (2 * self.n_head):  # an even head size: RoPE rotates pairs
            step = 2 * self.n_head
            below, above = self.n_embd // step * step, -(-self.n_embd // step) * step
            return [f"n_embd={self.n_embd} must be a multiple of 2 * n_head={self.n_head} (an even head size for "
                    f"RoPE): nearest are {f'{below} and ' if below else ''}{above}"]
        if self.n_head % self.kv_heads:
            divisors = [k for k in range(1, self.n_head + 1) if self.n_head % k == 0]
            return [f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}: "
                    f"choose n_kv_head from {', '.join(map(str, divisors))}"]
        return []

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden_size(self) -> int:
        return self.n_hidden or -(-int(8 * self.n_embd / 3) // 256) * 256


LARGEST = {"n_layer": 10_000, "n_head": 10_000, "n_embd": 1_000_000, "block_size": 100_000_000}


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each rotated pair, [D/2] fp32.

    Su et al. 2021, arXiv 2104.09864; llama3: Grattafiori et al. 2024, arXiv 2407.21783.
    """
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponent
    if config.rope_scaling == "none":
        return frequencies
    turns = config.rope_original_context * frequencies / (2 * math.pi)
    keep = (turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq)
    keep = keep.clamp(0, 1)  # 0 = stretched in full, 1 = left alone, between = blended
    return keep * frequencies + (1 - keep) * frequencies / config.rope_factor


def rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin for each position, [block_size, D] fp32, in Hugging Face's half-split layout (halves repeat)."""
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float32), rope_frequencies(config))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pair (x[i], x[i + D/2]) by its position's angle. x [B, heads, T, D], cos and sin [T, D]."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class KVCache:
    """Preallocated keys and values of one batch of sequences: `length` tokens are filled, of at most `size`."""

    def __init__(self, config: ModelConfig, batch: int, size: int, device, dtype=torch.float32):
        shape = (config.n_layer, batch, config.kv_heads, size, config.head_size)  # [L, B, K, S, D]
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v [B, K, T, D] behind what is filled; returns views of all of that layer, [B, K, length + T, D].

        `length` itself moves once per forward, after the last layer.
        """
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245) and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.heads, self.kv_heads, self.head_size = config.n_head, config.kv_heads, config.head_size
        self.q = nn.Linear(config.n_embd, self.heads * self.head_size, bias=False)
        self.k = nn.Linear(config.n_embd, self.kv_heads * self.head_size, bias=False)
        self.v = nn.Linear(config.n_embd, self.kv_heads * self.head_size, bias=False)
        self.out = nn.Linear(self.heads * self.head_size, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.heads, self.head_size).transpose(1, 2)  # [B, H, T, D]
        k = self.k(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)  # [B, K, T, D]
        v = self.v(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
            past = k.shape[2] - T
            if past and T > 1:  # token t of the new ones sees the past and the new ones up to itself
                mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and k.shape[2] == T, enable_gqa=self.kv_heads != self.heads)
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # [B, H, T, D] -> [B, T, H * D]


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm: the residual stream is never normalised, only what attention and feed-forward read from it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = Norm(config.norm, config.n_embd, config.norm_eps, config.norm_impl)
        self.attn = Attention(config, layer)
        self.ffn_norm = Norm(config.norm, config.n_embd, config.norm_eps, config.norm_impl)
        self.ffn = FeedForward(config.n_embd, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), cos, sin, cache))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Decoder(nn.Module):
    """Token ids to next-token logits. Touvron et al. 2023, arXiv 2302.13971.

    The weights are drawn by `initialise`; `activation_checkpointing` trades a second forward for memory.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size is still 0 (automatic): set it to the tokenizer's before building a model")
        self.config = config
        self.activation_checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = Norm(config.norm, config.n_embd, config.norm_eps, config.norm_impl)
        self.head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        initialise(self, seed)

    def forward(self, ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """ids [B, T] -> logits [B, T, V]; with targets [B, T] instead the mean cross-entropy, nats per token in fp32.

        With a cache, ids are the tokens that follow those in it, and it is extended by them. The loss is part of
        forward so that a compiled or wrapped model is one call.
        """
        start, T = (cache.length if cache else 0), ids.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens are more than block_size={self.config.block_size}")
        cos, sin = self.cos[start:start + T], self.sin[start:start + T]
        x = self.dropout(self.embed(ids))  # [B, T, C]
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length += T
        logits = F.linear(self.norm(x), self.embed.weight if self.head is None else self.head.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def initialise(model: Decoder, seed: int) -> None:
    """Draws every matrix by its role; a parameter without a known role is an error.

    Each has a generator of its own, seeded by its name: the same seed gives the same weight whatever else is in the
    model. Norms keep their ones and zeros. Matrices that write into the residual stream shrink with depth (GPT-2).
    Embedding and head are small enough that the first loss is ln(V), tied or not.
    """
    C, L = model.config.n_embd, model.config.n_layer
    inner = 0.02
    std = dict.fromkeys(("q", "k", "v", "gate", "up"), inner)
    std |= dict.fromkeys(("out", "down"), inner / math.sqrt(2 * L))
    std |= dict.fromkeys(("embed", "head"), min(inner, 0.25 / math.sqrt(C)))
    for name, parameter in model.named_parameters():
        role, leaf = name.split(".")[-2:]
        if leaf in ("gain", "bias"):
            continue
        if role not in std:
            raise ValueError(f"no initialisation is known for the parameter {name}: give its role one in initialise()")
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        with torch.no_grad():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std[role], generator=generator))


def parameter_count(config: ModelConfig) -> int:
    """Parameters of Decoder(config), computed without building it."""
    C, D, V = config.n_embd, config.head_size, config.vocab_size
    attention = C * D * 2 * (config.n_head + config.kv_heads)
    norm = C * (2 if config.norm == "layernorm" else 1)
    block = attention + 3 * C * config.hidden_size + 2 * norm
    return config.n_layer * block + norm + V * C * (1 if config.tie_embeddings else 2)


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations per trained token, forward and backward: PaLM's count (arXiv 2204.02311, appendix B).

    6 per weight of a matrix product (the embedding is a look-up, not a product) and 12 n_layer C T for attention,
    of which a causal kernel does half.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.n_embd
    matrices = parameter_count(config) - lookup
    return 6 * matrices + 12 * config.n_layer * config.n_embd * config.block_size


def memory_estimate(config: ModelConfig, micro_batch: int, dtype: str,
                    checkpointing: bool = False) -> tuple[float, float]:
    """Bytes that training needs, about: (weights + gradient + two moments in fp32, activations of one micro-batch).

    Counted from what each operation keeps for backward; a compiled or fused one keeps less.
    """
    s = 4 if dtype == "float32" else 2
    C, F = config.n_embd, config.hidden_size
    block = 4 * 8 * C + s * (8 * C + 4 * F)  # fp32: residual stream and norms; s: inputs of matrix products
    per_token = block * (1 if checkpointing else config.n_layer) + 4 * C * config.n_layer * checkpointing
    logits = config.vocab_size * (s + 3 * 4)  # as computed, in fp32, log-softmax and its gradient
    return 16.0 * parameter_count(config), float(micro_batch * config.block_size * (per_token + logits))
