"""What a model costs, computed without building it: parameters, operations, memory; and what fits this machine."""

import dataclasses

from config.schema import Config
from device import matmul_rate, total_memory
from lora import adapter_count
from model import FINAL_NORM, SCALED_EMBEDDING, UNGATED, ModelConfig
from norm import PARAMETERS, SCALARS


def parameter_count(config: ModelConfig) -> int:
    """Parameters of Decoder(config), computed without building it."""
    C, D, V = config.n_embd, config.head_size, config.vocab_size

    def norm(width: int) -> int:
        return sum(1 if name in SCALARS else width for name in PARAMETERS[config.norm])

    attention = C * D * 2 * (config.n_head + config.kv_heads) + 2 * norm(D) * config.qk_norm
    feed_forward = (2 if config.ffn in UNGATED else 3) * C * config.hidden_size
    block = attention + feed_forward + norm(C) * (4 if config.norm_pos == "sandwich" else 2)
    ends = norm(C) * (config.norm_pos in FINAL_NORM) + (config.norm in SCALED_EMBEDDING)
    return config.n_layer * block + ends + V * C * (1 if config.tie_embeddings else 2)


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations per trained token, forward and backward: PaLM's count (arXiv 2204.02311, appendix B).

    6 per weight of a matrix product (the embedding is a look-up, not a product) and 12 n_layer H D T for attention,
    of which a causal kernel does half.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.n_embd
    matrices = parameter_count(config) - lookup
    return 6 * matrices + 12 * config.n_layer * config.n_head * config.head_size * config.block_size


def memory_estimate(config: ModelConfig, micro_batch: int, dtype: str, checkpointing: bool = False,
                    lora_rank: int = 0) -> tuple[float, float]:
    """Bytes that training needs, about: (weights + gradient + two moments in fp32, activations of one micro-batch).

    Counted from what each operation keeps for backward; a compiled or fused one keeps less. With adapters, gradient and
    moments are theirs alone.
    """
    s = 4 if dtype == "float32" else 2
    C, F = config.n_embd, config.hidden_size
    block = 4 * 8 * C + s * (8 * C + 4 * F)  # fp32: residual stream and norms; s: inputs of matrix products
    per_token = block * (1 if checkpointing else config.n_layer) + 4 * C * config.n_layer * checkpointing
    logits = config.vocab_size * (s + 3 * 4)  # as computed, in fp32, log-softmax and its gradient
    whole, adapters = parameter_count(config), adapter_count(config, lora_rank)
    fixed = 4.0 * whole + 16.0 * adapters if lora_rank else 16.0 * whole
    return fixed, float(micro_batch * config.block_size * (per_token + logits))


def fit_to_machine(config: Config) -> Config:
    """The micro-batch and whether to compile, where they are automatic; refuses a model far beyond the memory."""
    fixed, one = memory_estimate(config.model, 1, config.dtype, config.activation_checkpointing, config.lora_rank)
    room = total_memory(config.device)
    if fixed + one > 1.5 * room:
        raise ValueError(f"{parameter_count(config.model) / 1e9:.1f} billion parameters need about "
                         f"{(fixed + one) / 1e9:,.0f} GB to train, {config.device} has {room / 1e9:,.0f} GB: lower "
                         f"n_embd, n_layer, block_size or vocab_size")
    fits = [m for m in range(1, config.batch_size + 1) if config.batch_size % m == 0 and fixed + m * one < 0.8 * room]
    return dataclasses.replace(config, micro_batch_size=config.micro_batch_size or max(fits, default=1),
                               compile=pays_to_compile(config) if config.compile == "auto" else config.compile)


def pays_to_compile(config: Config) -> bool:
    """On CUDA always. On a CPU it saves a seventh of a step but takes most of a minute, so only where a run is long."""
    if config.device.startswith("cuda"):
        return True
    work = flops_per_token(config.model) * config.batch_size * config.model.block_size * config.max_iters
    return config.device == "cpu" and work / matmul_rate("cpu", config.dtype) > 150
