"""Reads metrics.jsonl, which run/log.py writes, a JSON object per line; draws it as loss.png."""

import json
from pathlib import Path
from typing import Any

from config.command import one_line, warn
from data.files import write_atomically

METRICS_FILE = "metrics.jsonl"
LARGEST_NUMBER = 1e40  # losses are float32, which ends before 1e39; a plot needs finite differences
MAY_BE_INFINITE = ("grad_norm",)  # in float16


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, in order of their steps. A line that is damaged, that a kill cut short,
    or that is at an earlier step than the line before it, is left out with a warning."""
    path, records, left_out = folder / METRICS_FILE, [], []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            record = None
        if not is_record(record):
            left_out.append(f"{number} is damaged")
        elif records and record["step"] < records[-1]["step"]:
            left_out.append(f"{number} is at an earlier step than the line before it")
        else:
            records.append(record)
    if left_out:
        others = f" (and {len(left_out) - 1:,} more)" if left_out[1:] else ""
        warn(f"{path}:{left_out[0]} and left out{others}")
    return records


def is_record(record: Any) -> bool:
    """Whether a line of metrics.jsonl can be from run/log.py: numbers by name, and what
    run/watch.py measured."""
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return False
    watch = record.get("watch", {})
    lists = watch.values() if isinstance(watch, dict) else [None]
    return all(is_number(value, name) for name, value in record.items() if name != "watch") and all(
        isinstance(values, list) and all(v is None or is_number(v) for v in values)
        for values in lists
    )


def is_number(value: Any, name: str = "") -> bool:
    if type(value) is int:
        return abs(value) < 2**63  # float() of a larger one may fail
    return type(value) is float and (abs(value) < LARGEST_NUMBER or name in MAY_BE_INFINITE)


def training_seconds(records: list[dict[str, Any]]) -> float:
    """How long the optimizer steps took, without evaluating and saving."""
    return seconds_at_each(records)[-1] if records else 0.0


def seconds_at_each(records: list[dict[str, Any]]) -> list[float]:
    """How long the optimizer steps had taken up to each record."""
    seconds, before, at = 0.0, 0, []
    for record in records:
        if "step_ms" in record:  # a mean since the record of training before it
            seconds += (record["step"] - before) * record["step_ms"] / 1000
            before = record["step"]
        at.append(seconds)
    return at


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
    save_figure(figure, folder / "loss.png")
    return folder / "loss.png"


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Saves a figure of matplotlib in the format that the path's suffix names, or as a PNG."""
    from matplotlib import rc_context  # only who has a figure has matplotlib

    kind = path.suffix[1:] or "png"
    with rc_context({"pdf.fonttype": 42}):  # TrueType; journals refuse Type 3, the default
        write_atomically(path, lambda file: figure.savefig(file, dpi=dpi, format=kind))
