"""The scales inside a model while it trains:  python train.py [...] watch=true, then  python compare.py watch RUN

Reading order: observe, one look into the model; what it measures; plot, which draws the records of runs; the command.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config.schema import split_arguments, typed, user_errors
from device import autocast
from metrics import FILE, plain, read_metrics
from model import Decoder
from norm import Norm

USAGE = "python compare.py watch RUN_FOLDER [RUN_FOLDER ...] [out=FILE.png]\n\nout is watch.png in the first folder."
LOGITS_AT_ONCE = 2**24  # of attention, while looking for the largest: 64 MB, whatever the context is
DEPTH_LINES = 12  # steps drawn in a panel by depth, evenly spread; more would hide each other

Scales = dict[str, list[float]]


def observe(model: Decoder, ids: Tensor, targets: Tensor, dtype: str = "float32", loss_scale: float = 1.0) -> Scales:
    """Scales inside `model` on ids and targets [B, T]: one eager forward and backward, with autocast to `dtype`.

    One number per Block in each list, where nothing else is said:
      residual_rms         of the residual stream entering each Block, and leaving the last one (n_layer + 1)
      residual_mean_share  RMS over tokens of the mean over channels, divided by residual_rms (n_layer + 1): what
                           LayerNorm takes away and RMSNorm leaves; between 0 and 1
      ffn_rms              of the feed-forward's inner activation, which `down` reads
      attn_logit_max       largest |q.k| / sqrt(D) of a query and a key that it sees
      NORM_gain_min, NORM_gain_mean, NORM_gain_max  of each kind of norm that has a gain, under its path in the Block:
                           attn_norm, attn.q_norm, ...; of `norm`, the last one, a single number. As stored: rmsnorm1p's
                           are relative to 1
      blocks_grad_norm     of the loss's gradient by all parameters of a Block; embed_grad_norm, norm_grad_norm and
                           head_grad_norm (if not tied) are single numbers. The squares add up to the whole gradient's
    There is no dropout. Weights, gradients, mode and random state of the model stay as they are. `loss_scale` keeps
    float16's gradients from vanishing. Where the GPU's memory is too small, fewer of the sequences are looked at.
    """
    training = model.training
    model.eval()
    model.training = model.activation_checkpointing  # Decoder looks at its own mode only, dropout at that of the leaves
    try:
        while True:
            try:
                return look(model, ids, targets, dtype, loss_scale)
            except torch.cuda.OutOfMemoryError:  # a compiled step keeps less, so it may fit where this does not
                if len(ids) == 1:
                    raise
            ids, targets = ids[:len(ids) // 2], targets[:len(ids) // 2]
            torch.cuda.empty_cache()
    finally:
        model.train(training)


def look(model: Decoder, ids: Tensor, targets: Tensor, dtype: str, loss_scale: float) -> Scales:
    """One forward and one backward that leave no trace: hooks are gone again, and no .grad is written."""
    with recording(model) as seen, autocast(str(ids.device), dtype):
        loss = model(ids, targets)
    gradients = torch.autograd.grad(loss * loss_scale, learned(model))
    scales = seen | gains(model) | gradient_norms(model, gradients, loss_scale)
    return {name: torch.stack(values).tolist() for name, values in scales.items()}


@contextmanager
def recording(model: Decoder) -> Iterator[dict[str, list[Tensor]]]:
    """While it is open, each forward of `model` appends its scales, layer by layer."""
    seen = defaultdict(list)

    @torch.no_grad()
    def stream(module: nn.Module, inputs: tuple, x: Tensor) -> None:
        seen["residual_rms"].append(rms(x))
        seen["residual_mean_share"].append(rms(x.float().mean(-1)) / rms(x))

    @torch.no_grad()
    def attention(module: nn.Module, inputs: tuple, _: Tensor) -> None:
        seen["attn_logit_max"].append(largest_logit(*module.queries_and_keys(*inputs[:3])))

    @torch.no_grad()
    def feed_forward(module: nn.Module, inputs: tuple, _: Tensor) -> None:
        seen["ffn_rms"].append(rms(inputs[0]))

    handles = [module.register_forward_hook(stream) for module in (model.dropout, *model.blocks)]
    handles += [block.attn.register_forward_hook(attention) for block in model.blocks]
    handles += [block.ffn.down.register_forward_hook(feed_forward) for block in model.blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def rms(x: Tensor) -> Tensor:
    """sqrt(mean(x^2)) over everything, a scalar in fp32."""
    return x.float().square().mean().sqrt()


def largest_logit(q: Tensor, k: Tensor) -> Tensor:
    """Largest |q.k| / sqrt(D) of a query and a key not behind it. q [B, H, T, D], k [B, K, T, D] -> a scalar in fp32.

    Some rows of queries at a time, for all [B, H, T, T] logits at once may not fit.
    """
    B, H, T, D = q.shape
    k = k.repeat_interleave(H // k.shape[1], dim=1)  # [B, H, T, D]
    rows, largest = max(1, LOGITS_AT_ONCE // (B * H * T)), []
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, T, rows):
            end = min(start + rows, T)
            logits = q[:, :, start:end].float() @ k[:, :, :end].float().mT  # [B, H, end - start, end]
            largest.append(logits.abs().tril(start).amax())
    return torch.stack(largest).amax() / math.sqrt(D)


def gains(model: Decoder) -> dict[str, list[Tensor]]:
    """Least, mean and largest gain of every norm that has gains, norms of the same role in one list."""
    found = defaultdict(list)
    for path, module in model.named_modules():
        if isinstance(module, Norm) and hasattr(module, "gain"):
            role, gain = re.sub(r"^blocks\.\d+\.", "", path), module.gain.detach()
            for name, value in (("min", gain.amin()), ("mean", gain.mean()), ("max", gain.amax())):
                found[f"{role}_gain_{name}"].append(value)
    return found


def learned(model: Decoder) -> list[nn.Parameter]:
    """All parameters but the frozen ones beside adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient_norms(model: Decoder, gradients: tuple[Tensor, ...], loss_scale: float) -> dict[str, list[Tensor]]:
    """Norm of the gradient of every Block, and of every other part of the model that learns."""
    found, gradient_of = defaultdict(list), dict(zip(learned(model), gradients, strict=True))
    for name, child in model.named_children():
        for part in (child if isinstance(child, nn.ModuleList) else [child]):
            if own := [gradient_of[p] for p in part.parameters() if p in gradient_of]:
                found[f"{name}_grad_norm"].append(torch.nn.utils.get_total_norm(own) / loss_scale)
    return found


def watched(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The steps [S] at which a run was watched, and per quantity its values [S, n]; null is NaN.

    ValueError if there are none.
    """
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} has no {FILE}: name the folder of a run that was trained with watch=true")
    records = [record for record in read_metrics(folder) if "watch" in record]
    if not records:
        raise ValueError(f"{folder} was not watched: train it with watch=true")
    values = {name: np.array([record["watch"][name] for record in records], dtype=float)
              for name in records[0]["watch"]}
    return np.array([record["step"] for record in records]), values


PANELS = (  # of each run, from top to bottom: label and scale of the vertical axis
    ("residual stream: RMS", "log"), ("residual: |mean| / RMS", "linear"), ("gain: mean, min to max", "linear"),
    ("feed-forward inside: RMS", "linear"), ("largest |attention logit|", "linear"), ("gradient norm", "log"))


def plot(folders: list[Path], file: Path) -> None:
    """Draws what was watched in these runs, one column per run; the panels of a row have one scale.

    ValueError if a run was not watched or matplotlib is missing.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ValueError("this picture needs matplotlib: pip install matplotlib") from error
    runs = [watched(folder) for folder in folders]
    by_step = ScalarMappable(Normalize(0, max(steps[-1] for steps, _ in runs)), "viridis")
    # from 1 to at least 2: a bar needs two ends
    by_layer = ScalarMappable(Normalize(1, max(2, *(values["ffn_rms"].shape[1] for _, values in runs))), "plasma")
    figure = Figure(figsize=(2 + 4 * len(runs), 2.3 * len(PANELS)), layout="constrained")
    grid = figure.subplots(len(PANELS), len(runs), sharey="row", squeeze=False)
    for column, folder, (steps, values) in zip(grid.T, folders, runs, strict=True):
        column[0].set_title(fill(plain(folder.resolve().name), 30), fontsize="medium")
        draw_by_depth(column[0], steps, values["residual_rms"], by_step)
        draw_by_depth(column[1], steps, values["residual_mean_share"], by_step)
        draw_gains(column[2], steps[-1], values)
        draw_by_step(column[3], steps, values["ffn_rms"], by_layer)
        draw_by_step(column[4], steps, values["attn_logit_max"], by_layer)
        draw_by_step(column[5], steps, values["blocks_grad_norm"], by_layer)
        draw_other_gradients(column[5], steps, values)
    for row, (label, scale) in zip(grid, PANELS, strict=True):
        row[0].set(ylabel=label, yscale=scale)
    figure.colorbar(by_step, ax=grid[:2], label="step", aspect=30)
    figure.colorbar(by_layer, ax=grid[3:], label="Block", aspect=45, ticks=MaxNLocator(integer=True))
    figure.savefig(file, dpi=120)


def draw_by_depth(axes: Any, steps: np.ndarray, values: np.ndarray, colours: Any) -> None:
    """A line per step, values [S, depths]."""
    for i in np.unique(np.linspace(0, len(steps) - 1, DEPTH_LINES).round().astype(int)):
        axes.plot(values[i], ".-", color=colours.to_rgba(steps[i]), linewidth=1)
    axes.set_xlabel("Blocks passed")
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.3)


def draw_by_step(axes: Any, steps: np.ndarray, values: np.ndarray, colours: Any) -> None:
    """A line per Block, values [S, n_layer]."""
    for layer, line in enumerate(values.T, 1):
        axes.plot(steps, line, ".-", color=colours.to_rgba(layer), linewidth=1, markersize=3)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def draw_gains(axes: Any, step: int, values: dict[str, np.ndarray]) -> None:
    """The last gains of each kind of norm by depth; those of the last norm of all behind the last Block."""
    roles = [name.removesuffix("_gain_mean") for name in values if name.endswith("_gain_mean")]
    depth = values["ffn_rms"].shape[1]
    for i, role in enumerate(roles):
        least, mean, most = (values[f"{role}_gain_{part}"][-1] for part in ("min", "mean", "max"))
        where = np.array([depth + 1]) if role == "norm" else np.arange(1, depth + 1)
        axes.errorbar(where + 0.06 * (i - len(roles) / 2), mean, (mean - least, most - mean), fmt=".-", linewidth=1,
                      capsize=2, label=role)  # side by side, not on top of each other
    if roles:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize="x-small", frameon=False)
    else:
        axes.text(0.5, 0.5, "these norms have no gain", transform=axes.transAxes, ha="center")
    axes.set_xlabel(f"Block, then the last norm (at step {step})")
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.3)


def draw_other_gradients(axes: Any, steps: np.ndarray, values: dict[str, np.ndarray]) -> None:
    """What is no Block, in grey: embedding, last norm, head."""
    styles = iter(("--", ":", "-.", "-"))
    for name in sorted(name for name in values if name.endswith("_grad_norm") and name != "blocks_grad_norm"):
        axes.plot(steps, values[name][:, 0], next(styles), color="grey", linewidth=1,
                  label=name.removesuffix("_grad_norm"))
    axes.legend(loc="upper right", fontsize="x-small", framealpha=0.5)


def main(argv: list[str]) -> int:
    """`watch RUN ... [out=FILE.png]`. Returns the exit code: 0, or 2 for the user's error."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    with user_errors():
        places, pairs = split_arguments(argv)
        wanted = typed(pairs, {"out": (str, None)}, "command line")
        if not places:
            raise ValueError("name the folder of a run, or of several: python compare.py watch out/small")
        file = Path(wanted.get("out", Path(places[0]) / "watch.png"))
        plot([Path(place) for place in places], file)
    print(file)
    return 0
