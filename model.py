"""A LLaMA-style decoder in one file. It works alone, with norm.py beside it.

Reading order: the configuration; then the parts, from the small to the large: rotary positions,
attention, feed-forward, Block, Decoder; then how the weights are drawn and counted; and last the
loss, which never holds the logits of all tokens.

The letters in names and in comments about shapes:
    B  batch: sequences at once        T  time: tokens of a sequence
    C  channels (n_embd)               H  heads of the queries
    K  heads of the keys and values    D  channels of a head
    F  channels inside a feed-forward  V  vocabulary
    S  tokens that a cache holds       N  rows of the loss: all tokens, B * T
"""

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from norm import NORM_LEAVES, NORMS, Norm, at_least_fp32, norm_problem

# -- Configuration ---------------------------------------------------------------------------------

LARGEST = {"n_layer": 700, "n_head": 10_000, "n_embd": 1_000_000, "block_size": 100_000_000}
LARGEST_ALPHA = 1_000_000  # of norm_alpha, which is far less in every use; fp32 has an end
UNGATED = ("gelu", "relu2")  # feed-forwards without a gate
FINAL_NORM = ("pre", "lns", "mix", "sandwich", "out", "final")  # else the last Block ends in a norm


def knob(default, help: str):
    """A field of a configuration, with the text that --help prints for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the shape of a Decoder and what it computes."""

    n_layer: int = knob(6, "number of Blocks")
    n_head: int = knob(6, "attention heads in a Block")
    n_kv_head: int = knob(0, "key/value heads; 0 = n_head (MHA), 1 = MQA, between = GQA")
    n_embd: int = knob(384, "channels of the residual stream")
    head_dim: int = knob(0, "channels of a head; 0 = n_embd / n_head")
    ffn: Literal["swiglu", "geglu", "gelu", "relu2"] = knob(
        "swiglu",
        "the feed-forward: gated by silu (LLaMA) or gelu, or without a gate: gelu, or relu squared",
    )
    n_hidden: int = knob(
        0,
        "channels inside a feed-forward with a gate; 0 = LLaMA's rule: 8/3 n_embd, rounded up to a "
        "multiple of 256. Without a gate it gets 3/2 of that, so it has as many parameters",
    )
    block_size: int = knob(256, "context length in tokens")
    vocab_size: int = knob(
        0, "entries of the embedding; 0 = as many as the data set's tokenizer has"
    )
    tie_embeddings: bool = knob(False, "one matrix for the embedding and the output head")
    dropout: float = knob(
        0.0, "dropout probability on embeddings, attention and both branches; LLaMA has none"
    )
    norm: Literal[tuple(NORMS)] = knob(
        "rmsnorm", "kind of every norm; python -m lab.compare --list explains them"
    )
    norm_pos: Literal["pre", "post", "sandwich", "out", "deepnorm", "lns", "mix", "final"] = knob(
        "pre",
        "where norms stand around attention and feed-forward: before them (LLaMA), after the sum "
        "(2017), before and after them (Gemma 2), after them (OLMo 2), post with DeepNet's "
        "constants; lns = pre with LayerNorm Scaling, and so without GPT-2's smaller start of the "
        "matrices that write into the stream; mix = post in the first quarter of the Blocks, then "
        "pre (Mix-LN); final = none in the Blocks, only the last one before the head",
    )
    embed_scale: Literal["none", "sqrt"] = knob(
        "none", "sqrt = the embedding is multiplied by sqrt(n_embd), as in Gemma"
    )
    qk_norm: bool = knob(
        False, "the same norm on each head's queries and keys, before RoPE (Qwen 3)"
    )
    norm_eps: float = knob(1e-5, "added inside the root of every norm")
    prms_p: float = knob(0.0625, "prmsnorm: share of the channels whose size sets the scale")
    norm_alpha: float = knob(0.5, "dyt and derf: slope at the start; wider models want less")
    norm_impl: Literal["eager", "fused", "compile"] = knob(
        "eager",
        "how norms are computed: plain PyTorch, PyTorch's kernel, or each norm compiled by itself",
    )
    rope_theta: float = knob(10000.0, "base of the rotary frequencies; 500000 in Llama 3")
    rope_scaling: Literal["none", "llama3"] = knob(
        "none", "llama3 = stretch the low rotary frequencies as Llama 3.1 does"
    )
    rope_factor: float = knob(8.0, "llama3: how far the low frequencies are stretched")
    rope_low_freq: float = knob(
        1.0, "llama3: a frequency with fewer turns in the original context is stretched in full"
    )
    rope_high_freq: float = knob(
        4.0, "llama3: a frequency with more turns in the original context is left alone"
    )
    rope_original_context: int = knob(8192, "llama3: context length before stretching, in tokens")
    induction_init: bool = knob(
        False,
        "the first two Blocks begin with the attention of a circuit that copies: where a token "
        "comes again, it looks at what followed it before",
    )

    def __post_init__(self):
        problems = self._range_problems()
        if not problems:  # the rules below need numbers in range
            problems = self._shape_problems() + self._norm_problems()
        if not problems and self.induction_init:
            problems = self._induction_problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _range_problems(self) -> list[str]:
        problems = []
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                problems.append(f"{name} must be between 1 and {most:,}, got {value:,}")
        for name in ("n_kv_head", "head_dim", "n_hidden", "vocab_size"):
            value = getattr(self, name)
            if value < 0:
                problems.append(f"{name} must be 0 (automatic) or more, got {value}")
        if self.norm_alpha > LARGEST_ALPHA:
            problems.append(
                f"norm_alpha must be at most {LARGEST_ALPHA:,}, got {self.norm_alpha:g}"
            )
        above_0 = ("norm_eps", "norm_alpha", "rope_theta", "rope_factor", "rope_original_context")
        for name in above_0:
            value = getattr(self, name)
            if value <= 0:
                problems.append(f"{name} must be above 0, got {value}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 < self.rope_low_freq < self.rope_high_freq:
            problems.append(
                f"rope_low_freq must be above 0 and below rope_high_freq, "
                f"got {self.rope_low_freq} and {self.rope_high_freq}"
            )
        if not 0 < self.prms_p <= 1:
            problems.append(f"prms_p must be in (0, 1], got {self.prms_p}")
        return problems

    def _shape_problems(self) -> list[str]:
        """The first reason why heads and feed-forward cannot have these sizes, if there is one."""
        if self.head_dim % 2 or self.head_dim > LARGEST["n_embd"]:
            return [
                f"head_dim must be even, because RoPE rotates pairs, and at most "
                f"{LARGEST['n_embd']:,}, got {self.head_dim:,}"
            ]
        if not self.head_dim and self.n_embd % (2 * self.n_head):
            step = 2 * self.n_head
            below = self.n_embd // step * step
            nearest = f"{below} and {below + step}" if below else f"{step}"
            return [
                f"n_embd={self.n_embd} must be a multiple of 2 * n_head={self.n_head} (an even "
                f"head size for RoPE): nearest are {nearest}; or set head_dim"
            ]
        if self.n_head % self.kv_heads:
            divisors = [str(k) for k in range(1, self.n_head + 1) if self.n_head % k == 0]
            return [
                f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}: "
                f"choose n_kv_head from {', '.join(divisors)}"
            ]
        if self.ffn in UNGATED and self.n_hidden % 2:
            return [
                f"n_hidden={self.n_hidden} must be even for ffn={self.ffn}, which gets 3/2 of it"
            ]
        return []

    def _norm_problems(self) -> list[str]:
        problems = []
        if problem := norm_problem(self.norm, self.norm_impl):
            problems.append(problem)
        if NORMS[self.norm].fades_from and self.norm_pos != "pre":
            problems.append(
                f"norm={self.norm} is for norm_pos=pre, whose last norm stays when those of the "
                f"Blocks are faded out, got norm_pos={self.norm_pos}"
            )
        if self.norm == "none" and (self.norm_pos != "pre" or self.qk_norm):
            problems.append("norm=none has nothing to place: leave norm_pos=pre and qk_norm=false")
        if self.embed_scale == "sqrt" and NORMS[self.norm].scales_embedding:
            problems.append(
                f"embed_scale=sqrt: norm={self.norm} scales the embedding by a learned factor "
                f"already, which begins at sqrt(n_embd): leave embed_scale=none"
            )
        if self.norm_pos == "deepnorm" and not NORMS[self.norm].has_statistics:
            problems.append(
                f"norm_pos=deepnorm is derived for a norm that resets the scale of the stream, and "
                f"norm={self.norm} does not: use norm_pos=post or another norm"
            )
        return problems

    def _induction_problems(self) -> list[str]:
        """The first reason why the circuit of add_induction cannot work here, if there is one."""
        norm = NORMS[self.norm]
        normalised = norm.has_statistics and "p" not in norm.constants and self.norm_pos == "pre"
        if not normalised or self.embed_scale != "none":
            return [
                f"induction_init=true is made for norm_pos=pre, embed_scale=none and a norm that "
                f"resets the scale of all channels, got norm_pos={self.norm_pos}, "
                f"embed_scale={self.embed_scale} and norm={self.norm}: write induction_init=false, "
                f"in a comparison for all arms"
            ]
        if self.n_layer < 2:
            return [
                "induction_init=true needs n_layer=2 or more, got 1: write induction_init=false"
            ]
        with torch.device("cpu"):  # also if the model will be built on meta, which has no numbers
            lowest = rope_frequencies(self).min()
        if lowest >= SLOW:
            return [
                f"induction_init=true needs pairs of channels that RoPE turns by less than {SLOW} "
                f"radians a token, and with rope_theta={self.rope_theta:g} heads of "
                f"{self.head_size} have none: raise rope_theta, or write induction_init=false"
            ]
        return []

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden_size(self) -> int:
        """F, with a gate or without."""
        gated = self.n_hidden or -(-int(8 * self.n_embd / 3) // 256) * 256
        return gated * 3 // 2 if self.ffn in UNGATED else gated

    @property
    def lasting_norm(self) -> str:
        """The kind of the norms that are never faded out: those of the heads, and the last one."""
        return NORMS[self.norm].fades_from or self.norm

    def norm_for(self, width: int, lasting: bool = False) -> Norm:
        """One of this model's norms, over `width` channels."""
        kind = self.lasting_norm if lasting else self.norm
        return Norm(kind, width, self.norm_eps, self.norm_impl, self.prms_p, self.norm_alpha)


# -- Rotary positions (RoPE) -----------------------------------------------------------------------


def rope_frequencies(config: ModelConfig) -> Tensor:
    """The angle by which each pair of channels turns from one position to the next, [D/2] fp32.

    Su et al. 2021, arXiv 2104.09864; llama3: Grattafiori et al. 2024, arXiv 2407.21783.
    """
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponent
    if config.rope_scaling == "none":
        return frequencies
    # The order of the operations is that of transformers, so that no last digit differs.
    low, high = config.rope_low_freq, config.rope_high_freq
    length = 2 * math.pi / frequencies  # tokens in a whole turn
    slow, fast = (config.rope_original_context / turns for turns in (low, high))
    stretched = torch.where(length > slow, frequencies / config.rope_factor, frequencies)
    keep = (config.rope_original_context / length - low) / (high - low)  # the share left alone
    mixed = (1 - keep) * stretched / config.rope_factor + keep * stretched
    return torch.where((length < fast) | (length > slow), stretched, mixed)


def rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles, each [block_size, D] fp32, for `rotate`.

    Channels i and i + D/2 are a pair, as in Hugging Face, so both halves of D have the same angles.
    In sin the sign of the first half is turned already.
    """
    device = torch.get_default_device()
    with torch.device("cpu"):  # on meta, some of this would import PyTorch's compiler: two seconds
        positions = torch.arange(config.block_size, dtype=torch.float32)
        angles = torch.outer(positions, rope_frequencies(config))  # [block_size, D/2]
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cos.to(device), sin.to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) by its position's angle.

    x [B, H or K, T, D], cos and sin [T, D] or [B, 1, T, D]; the result is like x.
    """
    # Not roll(D/2), though it gives the same: Inductor reads its result number by number on a CPU.
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x * cos + swapped * sin).to(x.dtype)


# -- Attention -------------------------------------------------------------------------------------

UNFUSED_UP_TO = 1024  # tokens; see unfused_attention


class Matrix(nn.Linear):
    """A matrix without a bias and without numbers: `initialise` or a checkpoint fills it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self):
        """nn.Linear would draw numbers here."""


class Attention(nn.Module):
    """Causal attention with rotary positions. H / K query heads share one head of keys and values
    (Ainslie et al. 2023, arXiv 2305.13245).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, D = config.n_embd, config.head_size
        self.layer, self.dropout = layer, config.dropout
        self.heads, self.kv_heads, self.head_size = config.n_head, config.kv_heads, D
        self.q = Matrix(C, self.heads * D)
        self.k = Matrix(C, self.kv_heads * D)
        self.v = Matrix(C, self.kv_heads * D)
        self.out = Matrix(self.heads * D, C)
        self.q_norm = config.norm_for(D, lasting=True) if config.qk_norm else nn.Identity()
        self.k_norm = config.norm_for(D, lasting=True) if config.qk_norm else nn.Identity()

    def queries_and_keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, C] -> q [B, H, T, D] and k [B, K, T, D], after their norm and rotated."""
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.heads, self.head_size)  # [B, T, H, D]
        k = self.k(x).view(B, T, self.kv_heads, self.head_size)  # [B, T, K, D]
        q = self.q_norm(q).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(k).transpose(1, 2)  # [B, K, T, D]
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any = None, mask: Any = None
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]. With a cache (see Decoder.features), x also attends to the
        tokens in the cache. Without one, a mask (see document_mask) may say what each token sees.
        """
        B, T, _ = x.shape
        q, k = self.queries_and_keys(x, cos, sin)
        v = self.v(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)  # [B, K, T, D]
        if cache:
            k, v, mask = cache.extend(self.layer, k, v)  # [B, K, S, D], [B, K, S, D], [T, S]
        dropout = self.dropout if self.training else 0.0
        grouped = self.kv_heads != self.heads
        narrow_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if cache and T == 1:
            y = single_query_attention(q, k, v, mask)
        elif isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
        elif k.shape[2] == T and narrow_on_cpu and 1 < T <= UNFUSED_UP_TO:
            y = unfused_attention(q, k, v, dropout, mask)
        else:
            causal = mask is None and k.shape[2] == T
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).flatten(2))  # [B, H, T, D] -> [B, T, H * D] -> [B, T, C]


def document_mask(positions: Tensor, flex: bool = False) -> Any:
    """Which keys each query sees: those of its own document up to itself. [B, 1, T, T] bool, or the
    same for flex_attention, whose kernels skip what no query of a block sees.

    positions [B, T] int64 count the tokens of a document from its beginning, or from that of the
    window if the document has begun before.
    """
    B, T = positions.shape
    place = torch.arange(T, device=positions.device)
    first = place - positions  # [B, T]: where in the window the document of a token begins
    if flex:

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key >= first[b, query])

        return create_block_mask(sees, B, None, T, T, device=positions.device)
    seen = (place <= place.unsqueeze(1)) & (place >= first.unsqueeze(2))  # [B, T, T]
    return seen.unsqueeze(1)


def unfused_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None
) -> Tensor:
    """Attention as two matrix products and a softmax, which keeps all T x T scores; causal, or as
    the mask [B, 1, T, T] says.

    q [B, H, T, D], k and v [B, K, T, D] -> [B, H, T, D]. On a CPU in bfloat16 PyTorch's own kernel
    takes two to four times as long (docs/LOG.md), so this is used while T x T scores still fit.
    """
    B, H, T, D = q.shape
    shared = H // k.shape[1]
    k = k.repeat_interleave(shared, dim=1).flatten(0, 1)  # [B * H, T, D]
    v = v.repeat_interleave(shared, dim=1).flatten(0, 1)  # [B * H, T, D]
    hidden = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    if mask is not None:
        hidden = torch.where(mask, q.new_zeros(()), -math.inf).expand(B, H, T, T).flatten(0, 1)
    scores = torch.baddbmm(hidden, q.flatten(0, 1), k.mT, alpha=1 / math.sqrt(D))  # [B * H, T, T]
    return (F.dropout(scores.softmax(-1), dropout) @ v).view(B, H, T, D)


def single_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one new token to all keys of a cache, in the keys' dtype.

    q [B, H, 1, D], k and v [B, K, S, D] -> [B, H, 1, D]. The query heads that share a key head
    become the rows of one product, so the keys are not copied for each of them.
    """
    B, H, _, D = q.shape
    own_dtype = q.dtype == k.dtype
    with nullcontext() if own_dtype else torch.autocast(q.device.type, enabled=False):
        rows = q.to(k.dtype).reshape(B, k.shape[1], -1, D)  # [B, K, H / K, D]
        if torch.compiler.is_compiling() and q.device.type == "cpu":
            # As sums, which the compiler joins with what stands around them in one loop.
            scores = (rows.unsqueeze(3) * k.unsqueeze(2)).sum(-1) / math.sqrt(D)  # [B, K, H / K, S]
            shares = scores.masked_fill(~mask, -math.inf).softmax(-1).unsqueeze(-1)
            return (shares * v.unsqueeze(2)).sum(3).view(B, H, 1, D)
        y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
        return y.reshape(B, H, 1, D)  # not view: with a mask CUDA gives y another order in memory


# -- Feed-forward ----------------------------------------------------------------------------------


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,  # LLaMA's; Shazeer 2020, arXiv 2002.05202, as geglu
    "geglu": F.gelu,
    "gelu": F.gelu,
    "relu2": squared_relu,  # Primer's; So et al. 2021, arXiv 2109.08668
}


class FeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)), or without a gate down(activation(up(x)))."""

    def __init__(self, kind: str, width: int, hidden: int):
        super().__init__()
        self.activation = ACTIVATIONS[kind]
        self.gate = None if kind in UNGATED else Matrix(width, hidden)
        self.up = Matrix(width, hidden)
        self.down = Matrix(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


# -- Block -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two branches, attention and feed-forward, each added to the residual stream x.

    norm_pos says where the norms N stand around a branch f:
      pre       x + f(N(x))         Xiong et al. 2020, arXiv 2002.04745; LLaMA
      lns       x + f(N(x) / b)     b = sqrt(number of the Block, from 1): LayerNorm Scaling, Sun et
                                    al. 2025, arXiv 2502.05795
      post      N(x + f(x))         Vaswani et al. 2017, arXiv 1706.03762
      deepnorm  N(a x + f(x))       a = (2 n_layer)^1/4; Wang et al. 2022, arXiv 2203.00555
      out       x + N(f(x))         OLMo 2, arXiv 2501.00656
      sandwich  x + N'(f(N(x)))     Gemma 2, arXiv 2408.00118
      mix       post in the first quarter of the Blocks (rounded up), then pre; Mix-LN, Li et al.
                2024, arXiv 2412.13795
      final     x + f(x)            The Decoder's last norm alone sets the scale; Kanavalau et al.
                                    2026, arXiv 2602.10408, who fade the norms of the Blocks away
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm_pos = config.norm_pos
        if config.norm_pos == "mix":
            self.norm_pos = "post" if 4 * layer < config.n_layer else "pre"
        self.norm_weight = (layer + 1) ** -0.5  # of lns
        self.stream_weight = (2 * config.n_layer) ** 0.25 if config.norm_pos == "deepnorm" else 1
        normed = config.norm_pos != "final"
        self.attn_norm = config.norm_for(config.n_embd) if normed else nn.Identity()
        self.attn = Attention(config, layer)
        self.ffn_norm = config.norm_for(config.n_embd) if normed else nn.Identity()
        self.ffn = FeedForward(config.ffn, config.n_embd, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.attn_norm_out = self.ffn_norm_out = None
        if config.norm_pos == "sandwich":
            self.attn_norm_out = config.norm_for(config.n_embd)
            self.ffn_norm_out = config.norm_for(config.n_embd)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any = None, mask: Any = None
    ) -> Tensor:
        """The residual stream before this Block -> after it, both [B, T, C]."""
        stream, h = self.branch_off(x, self.attn_norm)
        y = self.attn(h, cos, sin, cache, mask)
        x = self.join(stream, y, self.attn_norm, self.attn_norm_out)
        stream, h = self.branch_off(x, self.ffn_norm)
        y = self.ffn(h)
        return self.join(stream, y, self.ffn_norm, self.ffn_norm_out)

    def branch_off(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """x -> what stays in the residual stream, and what the branch reads; all [B, T, C]."""
        if self.norm_pos in ("pre", "sandwich"):
            return x, norm(x)
        if self.norm_pos == "lns":
            return x, norm(x) * self.norm_weight
        if self.norm_pos in ("out", "final"):
            return x, x
        return self.stream_weight * x, x

    def join(self, stream: Tensor, y: Tensor, norm: Norm, norm_out: Norm | None) -> Tensor:
        """The residual stream with the output y of a branch added; all [B, T, C]."""
        y = self.dropout(y)
        if self.norm_pos in ("pre", "lns", "final"):
            return stream + y
        if self.norm_pos == "sandwich":
            return stream + norm_out(y)
        if self.norm_pos == "out":
            return stream + norm(y)
        if self.norm_pos in ("post", "deepnorm"):
            return norm(stream + y)
        raise ValueError(f"norm_pos={self.norm_pos!r} is not one that a Block knows")


# -- Decoder ---------------------------------------------------------------------------------------


class Scale(nn.Module):
    """One factor for the whole embedding: learned, because DyT and Derf do not bring the residual
    stream to a known size, or fixed, as in Gemma (arXiv 2403.08295).
    """

    def __init__(self, start: float, learned: bool):
        super().__init__()
        self.start, self.learned = start, learned
        self.gain = nn.Parameter(torch.empty(1)) if learned else start
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.learned:
            nn.init.constant_(self.gain, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Decoder(nn.Module):
    """From token ids to the logits of the next token. Touvron et al. 2023, arXiv 2302.13971.

    `initialise` draws the weights from `seed`. With seed=None they are left without numbers, for
    those of a checkpoint. `activation_checkpointing` saves memory: a Block's forward is computed a
    second time during backward. `stream_dtype`, if it is set, is the dtype of the residual stream
    and of its gradient: bfloat16 saves memory, too, if autocast makes the products as narrow.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0):
        super().__init__()
        C, V = config.n_embd, config.vocab_size
        if V < 1:
            raise ValueError(
                "vocab_size is still 0 (automatic): set it to the tokenizer's before building a "
                "model"
            )
        self.config = config
        self.activation_checkpointing = False
        self.stream_dtype = None
        # nn.Embedding(V, C) would draw numbers, and `initialise` or a checkpoint brings its own.
        self.embed = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)
        learned = NORMS[config.norm].scales_embedding
        scaled = learned or config.embed_scale == "sqrt"
        self.embed_scale = Scale(math.sqrt(C), learned) if scaled else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        has_last = config.norm_pos in FINAL_NORM
        self.norm = config.norm_for(C, lasting=True) if has_last else nn.Identity()
        self.head = None if config.tie_embeddings else Matrix(C, V)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if seed is not None:
            initialise(self, seed)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """ids [B, T] -> logits [B, T, V]. With targets [B, T], instead the mean cross-entropy in
        nats per token, fp32. For positions see `features`.

        The loss is part of forward, so a compiled or wrapped model is called once.
        """
        x = self.features(ids, positions=positions)
        return self.logits(x) if targets is None else self.loss(x, targets)

    def features(self, ids: Tensor, cache: Any = None, positions: Tensor | None = None) -> Tensor:
        """ids [B, T] -> what the head reads, [B, T, C].

        With a cache (sample.KVCache) ids are the tokens that follow those in the cache, and the
        cache is extended by them. Else `positions` [B, T], if given, are those of the tokens in
        their documents, and no token sees another document (see document_mask).
        """
        T, mask = ids.shape[1], None
        place = cache.positions(T) if cache else slice(T)
        cos, sin = self.cos[place], self.sin[place]  # [T, D]
        if len(cos) < T:
            raise ValueError(
                f"{place.stop} tokens are more than block_size={self.config.block_size}"
            )
        if positions is not None:
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
            # Not compiled, flex_attention would hold all scores; and it knows no dropout.
            flex = torch.compiler.is_compiling() and ids.is_cuda and not self.config.dropout
            mask = document_mask(positions, flex)
        x = self.dropout(self.embed_scale(self.embed(ids)))  # [B, T, C]
        if self.stream_dtype is not None:
            x = x.to(self.stream_dtype)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, None, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache, mask)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Features [..., C] -> logits [..., V]."""
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Features [B, T, C] and targets [B, T] -> the mean cross-entropy, nats per token, fp32."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return head_loss(x.flatten(0, 1), targets.flatten(), self.logits, weight)


# -- The weights at the start, and their number ----------------------------------------------------


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Draws every matrix of the model; norms keep the constants that they start from."""
    for parameter, drawn in initial_weights(model, seed):
        parameter.copy_(drawn)


def initial_weights(model: Decoder, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each matrix of the model, one after the other, with the numbers it starts from (fp32, CPU).

    Each matrix has a random generator of its own, seeded by its name. So the same seed gives a
    matrix the same numbers, whatever else is in the model. ValueError for a parameter whose role
    is not known.
    """
    deviations = initial_deviations(model.config)
    for name, parameter in model.named_parameters():
        role, leaf = name.split(".")[-2:]
        if leaf in NORM_LEAVES:
            continue
        if role not in deviations:
            raise ValueError(
                f"no initialisation is known for the parameter {name}: give its role one in "
                f"initial_deviations()"
            )
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        numbers = torch.empty(parameter.shape)
        numbers.normal_(0.0, deviations[role], generator=generator)
        if model.config.induction_init:
            add_induction(model.config, name, numbers)
        yield parameter, numbers


# Of add_induction. The pairs that RoPE turns fast tell neighbours apart, and by those that hardly
# turn a token is found again far away. All strengths but LOOKS_BACK are the better of two that were
# tried (docs/LOG.md).
FAST, SLOW = 0.1, 0.01  # radians per token
CONSTANT, LOOKS_BACK, MATCHES, CARRIES = 2.0, 10.0, 1.5, 0.8


def add_induction(config: ModelConfig, name: str, weight: Tensor) -> None:
    """Writes one matrix's share of an induction circuit over the numbers drawn for it, in place.

    Head h of the first Block looks h + 1 tokens back, and head 0 writes what it sees there into
    channels of its own. Head 0 of the second Block looks for a place where the token before was the
    same as the present one, and writes what stands there into the stream, where a tied head reads
    it as the next token (Elhage et al. 2021; Olsson et al. 2022, arXiv 2209.11895). It finds little
    before training has made the embedding larger than it is drawn.

    A model learns such a circuit by itself, but late: a query can prefer a distance only if the
    stream has a constant part, which a drawn embedding lacks. So here its channel 0 is constant.

    `name` is the parameter's, `weight` [outputs, inputs] or, of the embedding, [V, C].
    """
    C, D = config.n_embd, config.head_size
    frequencies = rope_frequencies(config)  # [D/2], radians per token
    count = min(D, (C - 1) // 2)
    channel = torch.arange(count)
    token, before = 1 + channel, 1 + count + channel  # channels of the residual stream
    slow = (frequencies < SLOW).repeat(2).nonzero().flatten()[:count]  # channels of a head
    # Where the stream is all constant, its channel 0 is sqrt(C), and each pair adds LOOKS_BACK to
    # the score of the right distance.
    fast = (frequencies > FAST) * math.sqrt(LOOKS_BACK * math.sqrt(D) / C)
    match name:
        case "embed.weight":
            weight[:, 0] = CONSTANT
        case "blocks.0.attn.q.weight":
            for head, rows in enumerate(weight.split(D)):
                angles = frequencies * (head + 1)  # by which a key so far back is turned less
                rows[:, 0] = torch.cat((fast * angles.cos(), -fast * angles.sin()))
        case "blocks.0.attn.k.weight":
            for rows in weight.split(D):
                rows[:, 0] = torch.cat((fast, 0 * fast))
        case "blocks.1.attn.q.weight":
            weight[slow, token[: len(slow)]] = MATCHES
        case "blocks.1.attn.k.weight":
            weight[slow, before[: len(slow)]] = MATCHES
        case "blocks.0.attn.v.weight" | "blocks.1.attn.v.weight":
            weight[channel, token] = CARRIES
        case "blocks.0.attn.out.weight":
            weight[before, channel] = CARRIES
        case "blocks.1.attn.out.weight":
            weight[token, channel] = CARRIES


def initial_deviations(config: ModelConfig) -> dict[str, float]:
    """The standard deviation from which a matrix is drawn, by its role.

    Matrices that write into the residual stream (out, down) shrink with depth, as in GPT-2, but not
    with lns, whose authors found that the two do not go together. Embedding and head are so small
    that the first loss is ln(V), tied or not. deepnorm has its paper's own: Xavier's deviations,
    and in v, out and the feed-forward (8 n_layer)^-1/4 of them.
    """
    C, L = config.n_embd, config.n_layer
    std = dict.fromkeys(("embed", "head"), min(0.02, 0.25 / math.sqrt(C)))
    if config.norm_pos != "deepnorm":
        std |= dict.fromkeys(("q", "k", "v", "gate", "up"), 0.02)
        depth = 1 if config.norm_pos == "lns" else 2 * L
        std |= dict.fromkeys(("out", "down"), 0.02 / math.sqrt(depth))
        return std
    all_heads = config.n_head * config.head_size
    all_kv_heads = config.kv_heads * config.head_size
    small = (8 * L) ** -0.25
    std["q"] = math.sqrt(2 / (C + all_heads))
    std["k"] = math.sqrt(2 / (C + all_kv_heads))
    std["v"] = small * math.sqrt(2 / (C + all_kv_heads))
    std["out"] = small * math.sqrt(2 / (C + all_heads))
    std |= dict.fromkeys(("gate", "up", "down"), small * math.sqrt(2 / (C + config.hidden_size)))
    return std


def parameter_count(config: ModelConfig) -> int:
    """How many parameters Decoder(config) has, without building it."""
    C, D, V = config.n_embd, config.head_size, config.vocab_size
    norm, lasting = NORMS[config.norm], NORMS[config.lasting_norm]
    attention = C * D * 2 * (config.n_head + config.kv_heads)  # q, k, v, out
    if config.qk_norm:
        attention += 2 * lasting.size(D)
    feed_forward = C * config.hidden_size * (2 if config.ffn in UNGATED else 3)
    norms = norm.size(C) * {"sandwich": 4, "final": 0}.get(config.norm_pos, 2)
    count = config.n_layer * (attention + feed_forward + norms)
    count += V * C * (1 if config.tie_embeddings else 2)  # embed, head
    if config.norm_pos in FINAL_NORM:
        count += lasting.size(C)
    if norm.scales_embedding:
        count += 1
    return count


# -- The loss --------------------------------------------------------------------------------------
# The logits, V numbers in fp32 for each token, are often the largest tensor of a training step, and
# a plain cross-entropy keeps two or three tensors of that size for backward. Here the rows (tokens)
# are worked on piece by piece, and only the logits of one piece exist at a time.

IGNORED = -100  # the target of a row that does not count
LOGITS_PER_PIECE = 2**25  # 128 MB in fp32
LOGITS_ON_CUDA = 2**28  # 1 GB: only thousands of rows keep a GPU busy
TILE = 128  # rows of a product that a GPU works on together
MOST_PIECES = 8  # because each piece is compiled; with very many rows the pieces are larger instead


def head_loss(
    x: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], weight: Tensor
) -> Tensor:
    """Mean cross-entropy of the logits head(x) = x @ weight.T against the targets: nats, fp32.

    x [N, C], weight [V, C], targets [N] int64; rows whose target is IGNORED do not count. Without
    gradients only head(x) is used, not the weight, so the head may be any function (int8, say).
    """
    rows = rows_at_once(len(x), len(weight), x.is_cuda)
    if torch.is_grad_enabled() and x.requires_grad:
        return HeadLoss.apply(x, weight, targets, rows)
    sums = []
    for some_x, some_targets in zip(x.split(rows), targets.split(rows), strict=True):
        logits = at_least_fp32(head(some_x))
        sums.append(F.cross_entropy(logits, some_targets, ignore_index=IGNORED, reduction="sum"))
    return torch.stack(sums).sum() / counted_rows(targets)


def counted_rows(targets: Tensor) -> Tensor:
    """How many of the targets [N] count; at least 1, so that the loss of none is 0."""
    return (targets != IGNORED).sum().clamp(min=1)


def rows_at_once(rows: int, vocab: int, on_cuda: bool = False) -> int:
    """How many of the rows are one piece, at most."""
    logits = max(LOGITS_ON_CUDA if on_cuda else LOGITS_PER_PIECE, rows * vocab // MOST_PIECES)
    most = -(-logits // vocab)
    return -(-most // TILE) * TILE if on_cuda else most


class HeadLoss(torch.autograd.Function):
    """The mean cross-entropy of x @ weight.T, worked on in pieces of R rows.

    forward also computes the gradient, while the logits of a piece are at hand, so they are neither
    kept nor computed a second time; as in Liger Kernel (Hsu et al. 2024, arXiv 2410.10989).

    Products are in autocast's dtype, sums in fp32. In float16 the gradient of a mean over all rows
    would round to zero, and the gradient of a sum would overflow in the products. So the products
    see the gradient of the sum times `factor`, a power of two near 1,000 / R.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        factor = 2.0 ** (10 - rows.bit_length())
        weight_learns = ctx.needs_input_grad[1]
        with torch.autocast(kind, enabled=False):
            narrow_x, narrow_weight = x.to(dtype), weight.to(dtype)
            total = at_least_fp32(x.new_zeros(()))
            dx = []
            dweight = at_least_fp32(torch.zeros_like(weight)) if weight_learns else None  # [V, C]
            for some_x, some_targets in zip(narrow_x.split(rows), targets.split(rows), strict=True):
                logits = at_least_fp32(some_x @ narrow_weight.T)  # [R, V]
                loss, error = loss_and_error(logits, some_targets, factor)
                total, error = total + loss, error.to(dtype)
                dx.append(times_long_matrix(error, narrow_weight))  # [R, C]
                if weight_learns:
                    dweight += error.T @ some_x
        count = counted_rows(targets)
        ctx.save_for_backward(torch.cat(dx), dweight, count * factor)
        ctx.dtype = x.dtype
        return total / count

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        dx, dweight, divisor = ctx.saved_tensors
        scale = dloss / divisor
        return dx.to(ctx.dtype) * scale, None if dweight is None else dweight * scale, None, None


def times_long_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, V] @ weight [V, C].

    On MPS it is the sum of several products: the GPUs of Apple's M1 and M2 get one wrong that adds
    up 32,767 numbers or more (https://github.com/pytorch/pytorch/issues/195163).
    """
    if not x.is_mps:
        return x @ weight
    return sum(map(torch.mm, x.split(2**14, dim=1), weight.split(2**14)))


def loss_and_error(logits: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies of logits [R, V] and targets [R], and `factor` times its
    gradient by the logits [R, V]: softmax minus the one-hot target.

    The logits are overwritten.
    """
    counts = (targets != IGNORED).unsqueeze(1)  # [R, 1]
    target = torch.where(counts, targets.unsqueeze(1), 0)  # [R, 1]
    logits.sub_(logits.amax(1, keepdim=True))  # so that no exponential overflows
    wanted, each = logits.gather(1, target), counts * factor  # [R, 1]
    total = logits.exp_().sum(1, keepdim=True)  # [R, 1]
    loss, error = ((total.log() - wanted) * counts).sum(), logits.mul_(each / total)
    if torch.compiler.is_compiling():
        return loss, subtract_at(error, target, each)
    return loss, error.scatter_add_(1, target, -each.to(error.dtype))


def subtract_at(x: Tensor, place: Tensor, less: Tensor) -> Tensor:
    """x [R, V] minus `less` [R, 1] in the column `place` [R, 1] of each row: the same bits as a
    scatter gives, but by element-wise operations alone.

    A scatter needs its target in memory, so Inductor would write the error in fp32 and read it
    again to round it: 8 bytes more for each logit. Without a compiler the scatter is cheaper.
    """
    columns = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    return torch.where(columns == place.int(), x - less, x)
