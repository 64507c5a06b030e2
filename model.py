"""A LLaMA-style decoder in one file; with norm.py and loss.py beside it, it works alone.

Legend: B batch, T time, C channels (n_embd), H heads, K key/value heads, D head size, F hidden size of the
feed-forward, V vocabulary. Reading order is from the configuration through the leaves to the root.
"""

import math
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loss import head_loss
from norm import ELEMENTWISE, NORM_LEAVES, PARAMETERS, Norm, refusal


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
    head_dim: int = knob(0, "channels of a head; 0 = n_embd / n_head")
    ffn: Literal["swiglu", "geglu", "gelu", "relu2"] = knob(
        "swiglu", "the feed-forward: gated by silu (LLaMA) or gelu, or plain with gelu or squared relu")
    n_hidden: int = knob(0, "hidden size of a gated feed-forward; 0 = LLaMA's rule: 8/3 n_embd, rounded up to 256s. A "
                            "plain one gets 3/2 of it: as many parameters")
    block_size: int = knob(256, "context length in tokens")
    vocab_size: int = knob(0, "entries of the embedding; 0 = as many as the data set's tokenizer has")
    tie_embeddings: bool = knob(False, "one matrix for the embedding and the output head")
    dropout: float = knob(0.0, "dropout probability on embeddings, attention and both branches; LLaMA has none")
    norm: Literal[tuple(PARAMETERS)] = knob("rmsnorm", "kind of every norm; compare.py --list explains them")
    norm_pos: Literal["pre", "post", "sandwich", "out", "deepnorm"] = knob(
        "pre", "where norms stand around attention and feed-forward: before (LLaMA), after the sum (2017), before and "
               "after the branch (Gemma 2), after the branch (OLMo 2), or post with DeepNet's constants")
    qk_norm: bool = knob(False, "the same norm on each head's queries and keys, before RoPE (Qwen 3)")
    norm_eps: float = knob(1e-5, "added inside the root of every norm")
    prms_p: float = knob(0.0625, "prmsnorm: share of the channels that the scale is judged by")
    norm_alpha: float = knob(0.5, "dyt and derf: slope at the start; wider models want less")
    norm_impl: Literal["eager", "fused", "compile", "triton"] = knob(
        "eager", "how norms are computed: plain PyTorch, PyTorch's kernel, the function compiled by itself, or our "
                 "kernel for CUDA")
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
                     for name in ("n_kv_head", "head_dim", "n_hidden", "vocab_size") if getattr(self, name) < 0]
        problems += [f"{name} must be above 0, got {getattr(self, name)}"
                     for name in ("norm_eps", "norm_alpha", "rope_theta", "rope_factor", "rope_original_context")
                     if getattr(self, name) <= 0]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 < self.rope_low_freq < self.rope_high_freq:
            problems.append(f"rope_low_freq must be above 0 and below rope_high_freq, "
                            f"got {self.rope_low_freq} and {self.rope_high_freq}")
        if not 0 < self.prms_p <= 1:
            problems.append(f"prms_p must be in (0, 1], got {self.prms_p}")
        problems = problems or self._head_problems() + self._norm_problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _head_problems(self) -> list[str]:
        if self.head_dim % 2 or self.head_dim > LARGEST["n_embd"]:
            return [f"head_dim must be even for RoPE, which rotates pairs, and at most {LARGEST['n_embd']:,}, got "
                    f"{self.head_dim:,}"]
        if not self.head_dim and self.n_embd % (2 * self.n_head):
            step = 2 * self.n_head
            below, above = self.n_embd // step * step, -(-self.n_embd // step) * step
            return [f"n_embd={self.n_embd} must be a multiple of 2 * n_head={self.n_head} (an even head size for "
                    f"RoPE): nearest are {f'{below} and ' if below else ''}{above}; or set head_dim"]
        if self.n_head % self.kv_heads:
            divisors = [k for k in range(1, self.n_head + 1) if self.n_head % k == 0]
            return [f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}: "
                    f"choose n_kv_head from {', '.join(map(str, divisors))}"]
        if self.ffn in UNGATED and self.n_hidden % 2:
            return [f"n_hidden={self.n_hidden} must be even for ffn={self.ffn}, which gets 3/2 of it"]
        return []

    def _norm_problems(self) -> list[str]:
        problems = [problem] if (problem := refusal(self.norm, self.norm_impl)) else []
        if self.norm == "none" and (self.norm_pos != "pre" or self.qk_norm):
            problems.append("norm=none has nothing to place: leave norm_pos=pre and qk_norm=false")
        if self.norm_pos == "deepnorm" and self.norm in ELEMENTWISE:
            problems.append(f"norm_pos=deepnorm is derived for a norm that resets the scale of the stream, and "
                            f"norm={self.norm} does not: use norm_pos=post or another norm")
        return problems

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden_size(self) -> int:
        gated = self.n_hidden or -(-int(8 * self.n_embd / 3) // 256) * 256
        return gated * 3 // 2 if self.ffn in UNGATED else gated

    def norm_for(self, width: int) -> Norm:
        """One of this model's norms, over `width` channels."""
        return Norm(self.norm, width, self.norm_eps, self.norm_impl, self.prms_p, self.norm_alpha)


UNGATED = ("gelu", "relu2")
SCALED_EMBEDDING = ("dyt", "derf")  # these norms do not bring the stream to a known size
FINAL_NORM = ("pre", "sandwich", "out")  # post and deepnorm end in a norm anyway
SHORT = 1024  # tokens up to which a CPU computes all T x T scores at once, in bfloat16
LARGEST = {"n_layer": 700, "n_head": 10_000, "n_embd": 1_000_000, "block_size": 100_000_000}


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
    """cos and sin for each position, [block_size, D] fp32, in Hugging Face's half-split layout: both halves are for the
    same angles. The first half of sin has its sign turned, for `rotate`."""
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float32), rope_frequencies(config))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pair (x[i], x[i + D/2]) by its position's angle. x [B, heads, T, D], cos and sin [T, D]."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A matrix without bias. Its numbers come from `initialise` or a checkpoint: PyTorch would draw others in vain."""
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, device=torch.get_default_device())


class Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245) and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.heads, self.kv_heads, self.head_size = config.n_head, config.kv_heads, config.head_size
        self.q = linear(config.n_embd, self.heads * self.head_size)
        self.k = linear(config.n_embd, self.kv_heads * self.head_size)
        self.v = linear(config.n_embd, self.kv_heads * self.head_size)
        self.out = linear(self.heads * self.head_size, config.n_embd)
        self.q_norm, self.k_norm = (config.norm_for(self.head_size) if config.qk_norm else nn.Identity()
                                    for _ in range(2))

    def queries_and_keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, C] -> q [B, H, T, D] and k [B, K, T, D], normed if the model does that, and rotated."""
        B, T, _ = x.shape
        q = self.q_norm(self.q(x).view(B, T, self.heads, self.head_size)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(B, T, self.kv_heads, self.head_size)).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any = None) -> Tensor:
        B, T, _ = x.shape
        q, k = self.queries_and_keys(x, cos, sin)
        v = self.v(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)  # [B, K, T, D]
        k, v, mask = cache.extend(self.layer, k, v) if cache else (k, v, None)
        dropout, causal = self.dropout if self.training else 0.0, mask is None and k.shape[2] == T
        if cache and T == 1:
            y = attention_of_one(q, k, v, mask)
        elif causal and q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= SHORT:
            y = plain_attention(q, k, v, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal,
                                               enable_gqa=self.kv_heads != self.heads)
        return self.out(y.transpose(1, 2).flatten(2))  # [B, H, T, D] -> [B, T, H * D] -> [B, T, C]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention as batched products and a softmax: q [B, H, T, D], k and v [B, K, T, D] -> [B, H, T, D].

    For a CPU in bfloat16, where PyTorch's kernel takes two to four times as long (LOG.md) while T x T still fits.
    """
    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1).flatten(0, 1) for x in (k, v))  # [B * H, T, D]
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(future, q.flatten(0, 1), k.mT, alpha=1 / math.sqrt(D))  # [B * H, T, T]
    return (F.dropout(scores.softmax(-1), dropout) @ v).view(B, H, T, D)


def attention_of_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What one new token reads from all keys, in their dtype: q [B, H, 1, D], k and v [B, K, S, D] -> [B, H, 1, D].

    Heads that share keys are rows of one product, so that no key is copied for each of them.
    """
    B, H, _, D = q.shape
    with torch.autocast(q.device.type, enabled=False) if q.dtype != k.dtype else nullcontext():
        rows = q.to(k.dtype).reshape(B, k.shape[1], -1, D)  # [B, K, H / K, D]
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).view(B, H, 1, D)


class FeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)), or plain down(activation(up(x))). Shazeer 2020, arXiv 2002.05202.

    swiglu is LLaMA's; relu2 is Primer's squared ReLU (So et al. 2021, arXiv 2109.08668).
    """

    def __init__(self, kind: str, width: int, hidden: int):
        super().__init__()
        self.activation = ACTIVATIONS[kind]
        self.gate = None if kind in UNGATED else linear(width, hidden)
        self.up = linear(width, hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}


class Block(nn.Module):
    """Attention, then feed-forward, each joined to the residual stream with a norm where norm_pos says.

    pre leaves the stream alone and normalises what a branch reads (Xiong et al. 2020, arXiv 2002.04745); post
    normalises the stream after each sum (Vaswani et al. 2017, arXiv 1706.03762); deepnorm is post with the stream
    weighted by (2 n_layer)^1/4 (Wang et al. 2022, arXiv 2203.00555); out normalises what a branch writes (OLMo 2,
    arXiv 2501.00656); sandwich what it reads and what it writes (Gemma 2, arXiv 2408.00118).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm_pos = config.norm_pos
        self.stream_weight = (2 * config.n_layer) ** 0.25 if config.norm_pos == "deepnorm" else 1
        self.fuse_sum = (config.norm_impl, config.norm, config.norm_pos) == ("triton", "rmsnorm", "pre")
        self.attn_norm = config.norm_for(config.n_embd)
        self.attn = Attention(config, layer)
        self.ffn_norm = config.norm_for(config.n_embd)
        self.ffn = FeedForward(config.ffn, config.n_embd, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.attn_norm_out, self.ffn_norm_out = (
            config.norm_for(config.n_embd) if config.norm_pos == "sandwich" else None for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any = None) -> Tensor:
        if self.fuse_sum:
            x, h = self.ffn_norm.of_sum(x, self.dropout(self.attn(self.attn_norm(x), cos, sin, cache)))
            return x + self.dropout(self.ffn(h))
        x = self.join(x, lambda h: self.attn(h, cos, sin, cache), self.attn_norm, self.attn_norm_out)
        return self.join(x, self.ffn, self.ffn_norm, self.ffn_norm_out)

    def join(self, x: Tensor, branch: Callable[[Tensor], Tensor], norm: Norm, norm_out: Norm | None) -> Tensor:
        """The residual stream [B, T, C] after one branch."""
        if self.norm_pos == "pre":
            return x + self.dropout(branch(norm(x)))
        if self.norm_pos == "sandwich":
            return x + norm_out(self.dropout(branch(norm(x))))
        if self.norm_pos == "out":
            return x + norm(self.dropout(branch(x)))
        assert self.norm_pos in ("post", "deepnorm"), self.norm_pos
        return norm(self.stream_weight * x + self.dropout(branch(x)))


class Scale(nn.Module):
    """One learned factor for the whole embedding. DyT needs it: it does not bring the stream to a known size."""

    def __init__(self, start: float):
        super().__init__()
        self.start, self.gain = start, nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gain, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Decoder(nn.Module):
    """Token ids to next-token logits. Touvron et al. 2023, arXiv 2302.13971.

    The weights are drawn by `initialise`, or left undrawn (seed None) for a checkpoint's; `activation_checkpointing`
    trades a second forward for memory.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size is still 0 (automatic): set it to the tokenizer's before building a model")
        self.config = config
        self.activation_checkpointing = False
        self.embed = nn.utils.skip_init(nn.Embedding, config.vocab_size, config.n_embd,
                                        device=torch.get_default_device())
        self.embed_scale = Scale(math.sqrt(config.n_embd)) if config.norm in SCALED_EMBEDDING else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = config.norm_for(config.n_embd) if config.norm_pos in FINAL_NORM else nn.Identity()
        self.head = None if config.tie_embeddings else linear(config.n_embd, config.vocab_size)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if seed is not None:
            initialise(self, seed)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """ids [B, T] -> logits [B, T, V]; with targets [B, T] instead the mean cross-entropy, nats per token in fp32.

        The loss is part of forward so that a compiled or wrapped model is one call.
        """
        x = self.features(ids)
        if targets is None:
            return self.logits(x)
        weight = self.embed.weight if self.head is None else self.head.weight
        return head_loss(x.flatten(0, 1), targets.flatten(), self.logits, weight)

    def features(self, ids: Tensor, cache: Any = None) -> Tensor:
        """ids [B, T] -> what the head reads, [B, T, C].

        With a cache (generate.KVCache) ids are the tokens that follow those in it, and it is extended by them.
        """
        T = ids.shape[1]
        positions = cache.positions(T) if cache else slice(T)
        cos, sin = self.cos[positions], self.sin[positions]
        if len(cos) < T:
            raise ValueError(f"{positions.stop} tokens are more than block_size={self.config.block_size}")
        x = self.dropout(self.embed_scale(self.embed(ids)))  # [B, T, C]
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Features [..., C] -> logits [..., V]."""
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)


@torch.no_grad()
def initialise(model: Decoder, seed: int, put: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
    """Draws every matrix by its role and puts it, put(parameter, drawn); a parameter without a known role is an error.

    Each has a generator of its own, seeded by its name: the same seed gives the same weight whatever else is in the
    model. Norms keep their constants. Matrices that write into the residual stream shrink with depth (GPT-2); deepnorm
    has deviations of its own. Embedding and head are small enough that the first loss is ln(V), tied or not.
    """
    config = model.config
    C, L = config.n_embd, config.n_layer
    std = dict.fromkeys(("q", "k", "v", "gate", "up"), 0.02) | dict.fromkeys(("out", "down"), 0.02 / math.sqrt(2 * L))
    std |= dict.fromkeys(("embed", "head"), min(0.02, 0.25 / math.sqrt(C)))
    if config.norm_pos == "deepnorm":  # Xavier's, times (8 n_layer)^-1/4 in all that makes a branch large
        H, K, F = config.n_head * config.head_size, config.kv_heads * config.head_size, config.hidden_size
        small = (8 * L) ** -0.25
        std |= {"q": math.sqrt(2 / (C + H)), "k": math.sqrt(2 / (C + K)), "v": small * math.sqrt(2 / (C + K)),
                "out": small * math.sqrt(2 / (C + H))}
        std |= dict.fromkeys(("gate", "up", "down"), small * math.sqrt(2 / (C + F)))
    for name, parameter in model.named_parameters():
        role, leaf = name.split(".")[-2:]
        if leaf in NORM_LEAVES:
            continue
        if role not in std:
            raise ValueError(f"no initialisation is known for the parameter {name}: give its role one in initialise()")
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        put(parameter, torch.empty(parameter.shape).normal_(0.0, std[role], generator=generator))
