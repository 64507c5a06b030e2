"""What a model costs, computed without building it: parameters, operations, memory; and what fits this machine."""

import dataclasses

from config.schema import Config
from device import total_memory
from lora import adapter_count
from loss import rows_at_once
from model import FINAL_NORM, SCALED_EMBEDDING, SHORT, UNGATED, ModelConfig
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


def flops_per_token(config: ModelConfig, lora_rank: int = 0) -> float:
    """Floating-point operations per trained token, forward and backward: PaLM's count (arXiv 2204.02311, appendix B).

    6 per weight of a matrix product (the embedding is a look-up, not a product) and 12 n_layer H D T for attention,
    of which a causal kernel does half. Weights beside which adapters learn need 4: they have no gradient.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.n_embd
    matrices = parameter_count(config) - lookup
    products = 4 * matrices + 6 * adapter_count(config, lora_rank) if lora_rank else 6 * matrices
    return products + 12 * config.n_layer * config.n_head * config.head_size * config.block_size


def memory_estimate(config: ModelConfig, micro_batch: int, dtype: str, device: str, checkpointing: bool = False,
                    lora_rank: int = 0, shards: int = 1) -> tuple[float, float]:
    """Bytes that training needs, about: (weights + gradient + two moments in fp32, activations of one micro-batch).

    Counted from what each operation keeps for backward; a compiled or fused one keeps less. With adapters, gradient and
    moments are theirs alone. Of `shards` devices that share the weights each has its part, and whole, with their
    gradient, those of two Blocks (one at work, one on its way), of the embedding and of the head.
    """
    s = 4 if dtype == "float32" else 2
    C, F, T, V = config.n_embd, config.hidden_size, config.block_size, config.vocab_size
    block = 4 * 8 * C + s * (8 * C + 4 * F)  # fp32: residual stream and norms; s: inputs of matrix products
    if device == "cpu" and dtype == "bfloat16" and T <= SHORT:
        block += s * config.n_head * T  # what plain attention keeps
    per_token = block * (1 if checkpointing else config.n_layer) + 4 * C * config.n_layer * checkpointing
    tokens = micro_batch * T
    rows = min(tokens, rows_at_once(tokens, V))
    logits = rows * V * (4 + 2 * s)  # of some rows: as computed, in fp32, and their errors
    whole, adapters = parameter_count(config), adapter_count(config, lora_rank)
    fixed = (4.0 * whole + 16.0 * adapters if lora_rank else 16.0 * whole) / shards
    if shards > 1:
        ends = V * C * (1 if config.tie_embeddings else 2)
        gradient = 0 if lora_rank else 4
        fixed += (4 + gradient) * ends + (s + gradient) * 2 * (whole - ends) / config.n_layer
    return fixed, float(tokens * per_token + logits)


def fit_to_machine(config: Config, ranks: int = 1, local_ranks: int = 1) -> Config:
    """How ranks share the model, the micro-batch and whether to compile, where they are automatic; refuses a model far
    beyond the memory, and a batch that the ranks cannot share."""
    if config.batch_size % (ranks * max(1, config.micro_batch_size)):
        raise ValueError(batch_problem(config, ranks))
    room = total_memory(config.device) / (local_ranks if config.device == "cpu" else 1)

    def need(micro_batch: int, shards: int) -> float:
        return sum(memory_estimate(config.model, micro_batch, config.dtype, config.device,
                                   config.activation_checkpointing, config.lora_rank, shards))

    if config.parallel == "auto":
        config = dataclasses.replace(config, parallel="ddp" if ranks == 1 or need(1, 1) < 0.8 * room else "fsdp")
    shards = ranks if config.parallel == "fsdp" else 1
    if need(1, shards) > 1.5 * room:
        raise ValueError(f"{parameter_count(config.model) / 1e9:.1f} billion parameters need about "
                         f"{need(1, shards) / 1e9:,.0f} GB to train, {config.device} has {room / 1e9:,.0f} GB: "
                         f"lower n_embd, n_layer, block_size or vocab_size, or have more devices share it")
    if config.sharded == "auto":  # weights and moments in fp32, and as much again while they become a file
        large = 2 * 12 * parameter_count(config.model) > total_memory("cpu")
        config = dataclasses.replace(config, sharded=shards > 1 and large)
    share = config.batch_size // ranks
    fits = [m for m in range(1, share + 1) if share % m == 0 and need(m, shards) < 0.8 * room]
    return dataclasses.replace(config, micro_batch_size=config.micro_batch_size or max(fits, default=1),
                               compile=pays_to_compile(config) if config.compile == "auto" else config.compile)


def batch_problem(config: Config, ranks: int) -> str:
    """Why the ranks cannot share the batch, and which near one they could."""
    unit = ranks * max(1, config.micro_batch_size)
    below, above = config.batch_size // unit * unit, -(-config.batch_size // unit) * unit
    micro = f" times micro_batch_size={config.micro_batch_size} (0 = automatic)" if config.micro_batch_size else ""
    return (f"batch_size={config.batch_size} must be a multiple of the {ranks} ranks that share it{micro}: nearest "
            f"{f'are {below} and {above}' if below else f'is {above}'}; or start fewer ranks")


def pays_to_compile(config: Config) -> bool:
    """On CUDA always. On a CPU where the run saves more time than compiling takes: about 2.5 us of a step for each
    token and layer, and 9 ns for each channel of it, against 25 s and 2 s for each layer (on 2 cores, LOG.md)."""
    if config.device.startswith("cuda"):
        return True
    model = config.model
    saved = (2.5e-6 + 9e-9 * model.n_embd) * config.batch_size * model.block_size * model.n_layer * config.max_iters
    return config.device == "cpu" and saved > 25 + 2 * model.n_layer
