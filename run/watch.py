"""How large the numbers inside a model are while it trains. train.py records these scales with
watch=true, and lab/watch.py draws them.

Reading order: observe_next_batch, which training calls; observe, which says what each scale is; how
the scales are measured.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from data.loader import batch
from model import Decoder
from norm import Norm
from run.machine import autocast, to_device
from run.setup import Run

# About how many attention logits are computed at once to find the largest: 64 MB.
LOGITS_AT_ONCE = 2**24
# An activation is z times a share that grows from 0 to 1: sigmoid(z) in silu, the normal
# distribution's P(Z < z) in gelu. Below minus this z the share is under 0.1, above it over 0.9,
# which is where a gate counts as saturated (Karpathy et al. 2015, arXiv 1506.02078). In relu2 it
# jumps at 0.
SATURATED = {"swiglu": math.log(9), "geglu": 1.2816, "gelu": 1.2816, "relu2": 0.0}

Scales = dict[str, list[float]]


def observe_next_batch(run: Run) -> Scales:
    """The scales on the next step's first micro-batch (main's). The run stays as it is."""
    config = run.config
    T = config.model.block_size
    windows = batch(run.data, run.step, config.batch_size, T, config.seed)
    x, y, *positions = (
        to_device(tensor[: config.micro_batch_size], config.device) for tensor in windows
    )
    return observe(run.model, x, y, config.dtype, run.scaler.get_scale(), *positions)


def observe(
    model: Decoder,
    ids: Tensor,
    targets: Tensor,
    dtype: str = "float32",
    loss_scale: float = 1.0,
    positions: Tensor | None = None,
) -> Scales:
    """Scales inside `model` on ids and targets [B, T] (and positions, see Decoder.features), from
    one eager forward and backward, with autocast to `dtype`. Each is a list, with one number for
    each Block unless this table says something else:

    residual_rms         RMS of the residual stream before each Block and after the last one
                         (n_layer + 1 numbers)
    residual_mean_share  RMS over tokens of the mean over channels, divided by residual_rms, so
                         between 0 and 1 (n_layer + 1 numbers). LayerNorm removes this mean, RMSNorm
                         leaves it
    ffn_in_mean, ffn_in_sd
                         mean and standard deviation of what the feed-forward reads, over tokens and
                         channels; a mean keeps its sign
    ffn_in_mean_rms      RMS over tokens of the mean over channels of the same: it shows means of
                         tokens that cancel in ffn_in_mean
    ffn_gate_closed, ffn_gate_open
                         share of the values z that enter the activation where it is nearly 0 and
                         nearly z: see SATURATED
    ffn_rms              RMS of what the feed-forward's matrix `down` reads
    ffn_kurtosis         excess kurtosis of the same over tokens and channels: the mean of
                         ((x - mean) / sd)^4, less the 3 of a normal distribution. It is large if a
                         few outliers stand out, and these decide how well few bits can hold x
    ffn_out_mean, ffn_out_sd, ffn_out_negative
                         mean and standard deviation of what the feed-forward writes, and the share
                         of it that is below 0
    attn_logit_max       largest |q.k| / sqrt(D) of a query and a key that the query may see
    NORM_PARAMETER_min, NORM_PARAMETER_mean, NORM_PARAMETER_max, NORM_PARAMETER_sd
                         of each parameter of each norm. NORM is the norm's path in the Block, such
                         as attn_norm or attn.q_norm; `norm` is the model's last norm, with one
                         number. PARAMETER is gain, bias, alpha, shift or log_scale, as it is
                         stored, so the gains of rmsnorm1p are relative to 1
    blocks_grad_norm     norm of the gradient of all parameters of a Block
    embed_grad_norm, embed_scale_grad_norm, norm_grad_norm, head_grad_norm
                         the same for the other parts that the model has and trains, one number
                         each. The squares of all these norms add up to that of the whole gradient

    Dropout is off. Weights, gradients, mode and random state of the model stay as they are.
    `loss_scale` keeps float16 gradients from vanishing. If the GPU's memory is too small for all
    sequences, only half of them are used, or a quarter, and so on.
    """
    training = model.training
    model.eval()
    # This keeps activation checkpointing on, if it is, because it follows the Decoder's own mode.
    # Dropout stays off: it follows the mode of its own module.
    model.training = model.activation_checkpointing
    try:
        while True:
            try:
                return measure_once(model, ids, targets, dtype, loss_scale, positions)
            except torch.cuda.OutOfMemoryError:  # this needs more memory than a compiled step
                if len(ids) == 1:
                    raise
            half = len(ids) // 2
            ids, targets = ids[:half], targets[:half]
            positions = None if positions is None else positions[:half]
            torch.cuda.empty_cache()
    finally:
        model.train(training)


def measure_once(
    model: Decoder,
    ids: Tensor,
    targets: Tensor,
    dtype: str,
    loss_scale: float,
    positions: Tensor | None,
) -> Scales:
    """One forward and one backward that leave no trace: the hooks are removed again, and no .grad
    is written."""
    with recording(model) as seen, autocast(str(ids.device), dtype):
        loss = model(ids, targets, positions)
    gradients = torch.autograd.grad(loss * loss_scale, trained_parameters(model))
    scales = seen | norm_parameters(model) | gradient_norms(model, gradients, loss_scale)
    return {name: torch.stack(values).tolist() for name, values in scales.items()}


@contextmanager
def recording(model: Decoder) -> Iterator[dict[str, list[Tensor]]]:
    """A context in which a forward of `model` appends its scales, layer by layer, to a dict."""
    seen = defaultdict(list)

    @torch.no_grad()
    def stream(module: nn.Module, inputs: tuple, x: Tensor) -> None:
        seen["residual_rms"].append(rms(x))
        seen["residual_mean_share"].append(rms(x.float().mean(-1)) / rms(x))

    @torch.no_grad()
    def attention(module: nn.Module, inputs: tuple, _: Tensor) -> None:
        x, cos, sin, _, mask = inputs
        seen["attn_logit_max"].append(largest_logit(*module.queries_and_keys(x, cos, sin), mask))

    @torch.no_grad()
    def feed_forward(module: nn.Module, inputs: tuple, y: Tensor) -> None:
        x, y = inputs[0].float(), y.float()
        seen["ffn_in_mean"].append(x.mean())
        seen["ffn_in_sd"].append(x.std(correction=0))
        seen["ffn_in_mean_rms"].append(rms(x.mean(-1)))
        seen["ffn_out_mean"].append(y.mean())
        seen["ffn_out_sd"].append(y.std(correction=0))
        seen["ffn_out_negative"].append((y < 0).float().mean())

    @torch.no_grad()
    def activation(module: nn.Module, inputs: tuple, z: Tensor) -> None:
        bound = SATURATED[model.config.ffn]
        seen["ffn_gate_closed"].append((z < -bound).float().mean())
        seen["ffn_gate_open"].append((z > bound).float().mean())

    @torch.no_grad()
    def down(module: nn.Module, inputs: tuple, _: Tensor) -> None:
        seen["ffn_rms"].append(rms(inputs[0]))
        seen["ffn_kurtosis"].append(excess_kurtosis(inputs[0]))

    handles = [module.register_forward_hook(stream) for module in (model.dropout, *model.blocks)]
    for block in model.blocks:
        ffn = block.ffn
        enters = ffn.up if ffn.gate is None else ffn.gate
        hooks = {block.attn: attention, ffn: feed_forward, enters: activation, ffn.down: down}
        handles += [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def rms(x: Tensor) -> Tensor:
    """sqrt(mean(x^2)) over all of x, a scalar in fp32."""
    return x.float().square().mean().sqrt()


def excess_kurtosis(x: Tensor) -> Tensor:
    """mean(((x - mean) / sd)^4) - 3 over all of x, a scalar in fp32; NaN if all of x is equal."""
    x = x.float()
    centred = x - x.mean()
    return (centred / rms(centred)).pow(4).mean() - 3


def largest_logit(
    q: Tensor, k: Tensor, mask: Tensor | None = None, at_once: int = LOGITS_AT_ONCE
) -> Tensor:
    """Largest |q.k| / sqrt(D) of a query and a key that the query may see, a scalar in fp32.

    q [B, H, T, D], k [B, K, T, D]. The mask [B, 1, T, T] bool says which keys a query may see; None
    = all up to itself. About `at_once` logits are computed at a time, because all of them,
    [B, H, T, T], may not fit the memory.
    """
    B, H, T, D = q.shape
    k = k.repeat_interleave(H // k.shape[1], dim=1)  # [B, H, T, D]
    rows, largest = max(1, at_once // (B * H * T)), []
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, T, rows):
            end = min(start + rows, T)
            # [B, H, end - start, end]
            logits = q[:, :, start:end].float() @ k[:, :, :end].float().mT
            seen = logits.abs().tril(start)
            largest.append((seen if mask is None else seen * mask[:, :, start:end, :end]).amax())
    return torch.stack(largest).amax() / math.sqrt(D)


def norm_parameters(model: Decoder) -> dict[str, list[Tensor]]:
    """Smallest, mean and largest element, and standard deviation, of every parameter of every norm.
    Norms with the same role in their Block share a list."""
    found = defaultdict(list)
    for path, module in model.named_modules():
        if isinstance(module, Norm):
            role = re.sub(r"^blocks\.\d+\.", "", path)
            for name, x in module.named_parameters():
                x = x.detach()
                parts = {"min": x.amin(), "mean": x.mean(), "max": x.amax()}
                for part, value in (parts | {"sd": x.std(correction=0)}).items():
                    found[f"{role}_{name}_{part}"].append(value)
    return found


def trained_parameters(model: Decoder) -> list[nn.Parameter]:
    """All parameters that are not frozen. If adapters are trained, all others are frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient_norms(
    model: Decoder, gradients: tuple[Tensor, ...], loss_scale: float
) -> dict[str, list[Tensor]]:
    """Norm of the gradient of every Block, and of every other part of the model that learns."""
    found, gradient_of = (
        defaultdict(list),
        dict(zip(trained_parameters(model), gradients, strict=True)),
    )
    for name, child in model.named_children():
        for part in child if isinstance(child, nn.ModuleList) else [child]:
            if own := [gradient_of[p] for p in part.parameters() if p in gradient_of]:
                found[f"{name}_grad_norm"].append(torch.nn.utils.get_total_norm(own) / loss_scale)
    return found
