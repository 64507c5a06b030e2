"""Reads metrics.jsonl, which run/log.py writes, a JSON object per line; draws it as loss.png."""

import json
from pathlib import Path
from typing import Any

from config.command import one_line, warn

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, in order. A line that is damaged, or that a kill cut short, is left out
    with a warning that names it."""
    path, records = folder / METRICS_FILE, []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            warn(f"{path}:{number} is damaged and left out")
    return records


def has_evaluation(records: list[dict[str, Any]], step: int) -> bool:
    return any(r["step"] == step and "val_loss" in r for r in records)


def plot_label(name: str) -> str:
    """A name that matplotlib shows as it is. Between two dollars it would see a formula."""
    return one_line(name).replace("$", r"\$")


def plot_losses(folder: Path) -> Path | None:
    """Draws the losses of metrics.jsonl over the steps, as loss.png. Returns its path, or None if
    there are no records or matplotlib is missing."""
    try:
        # pyplot is not used, because it has global state and wants a display.
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = read_metrics(folder)
    if not records:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    title = plot_label(folder.name)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=title)
    for key, style, label in (("loss", "-", "training"), ("val_loss", "o-", "validation")):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            steps, losses = zip(*points, strict=True)
            label = f"{label}: {losses[-1]:.3f}"
            axes.plot(steps, losses, style, linewidth=1, markersize=4, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)
    return folder / "loss.png"
