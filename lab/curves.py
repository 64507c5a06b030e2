"""python -m lab.curves: draws the losses, learning rates and gradient norms of runs side by side.

Order: main; draw_curves; one line of a panel.
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, so Python would not find the imports below
    hint = "run it as a module, from the root of the repository: python -m lab.curves"
    print(f"error: {hint}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":  # before the imports that take seconds
    from config.command import start

    start()

import numpy as np

from config.command import run_command, split_arguments, user_errors
from config.preset import load_json
from config.schema import parse_choice, parse_knobs
from run.metrics import METRICS_FILE, plot_label, read_metrics, save_figure, seconds_at_each

USAGE = """\
Draw the losses, learning rates and gradient norms of runs in one picture, a colour for each run:

python -m lab.curves RUN_FOLDER [RUN_FOLDER ...] [by=step|tokens|seconds] [out=FILE.png|FILE.pdf]

by= is what the horizontal axis shows; seconds are those of the optimizer's steps alone. Without
out=, the picture is curves.png in the first folder, and curves.pdf for a paper."""

BY = ("step", "tokens", "seconds")
PANELS = (  # from top to bottom: key of a record, label and scale of the vertical axis
    ("loss", "training loss (nats per token)", "linear"),
    ("val_loss", "validation loss (dashed: training)", "linear"),
    ("lr", "learning rate", "linear"),
    ("grad_norm", "gradient norm", "log"),
)
SMOOTHED = "loss"  # beside it, its running mean is drawn: a batch is a small sample
REACH = 10  # records on either side of a running mean


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 2 for the user's error."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    with user_errors():
        places, pairs = split_arguments(argv)
        options = parse_knobs(pairs, {"out": (str, None), "by": (str, None)}, "command line")
        if not places:
            raise ValueError("name the folder of a run, or several: python -m lab.curves out/small")
        by = parse_choice("by", options.get("by", "step"), BY)
        here = [Path(places[0]) / f"curves{suffix}" for suffix in (".png", ".pdf")]
        files = [Path(options["out"])] if "out" in options else here
        draw_curves([Path(place) for place in places], by, files)
    print(*files, sep="\n")
    return 0


def draw_curves(folders: list[Path], by: str, files: list[Path]) -> None:
    """Draws these runs, one panel below the other, into each of the files. ValueError if one has no
    records, or if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError as error:
        raise ValueError("this picture needs matplotlib: pip install matplotlib") from error
    runs = [(folder, records_of(folder)) for folder in folders]
    figure = Figure(figsize=(8, 2.6 * len(PANELS)), layout="constrained")
    panels = figure.subplots(len(PANELS), sharex=True)
    for i, (folder, records) in enumerate(runs):
        at = horizontal(folder, records, by)
        name = plot_label(folder.resolve().name)
        for axes, (key, _, _) in zip(panels, PANELS, strict=True):
            draw_run(axes, at, records, key, name, f"C{i % 10}")
    for axes, (_, label, scale) in zip(panels, PANELS, strict=True):
        axes.set(ylabel=label, yscale=scale)
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize="small")  # each run with its last validation loss
    panels[-1].set_xlabel("seconds of training" if by == "seconds" else by)
    for file in files:
        save_figure(figure, file)


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The records of steps and evaluations. ValueError if there are none."""
    if not (folder / METRICS_FILE).is_file():
        raise ValueError(f"{folder} has no {METRICS_FILE}: name the folder of a run")
    records = [r for r in read_metrics(folder) if "loss" in r or "val_loss" in r]
    if not records:
        raise ValueError(f"{folder} has no records yet: wait for its first line")
    return records


def horizontal(folder: Path, records: list[dict[str, Any]], by: str) -> np.ndarray:
    """Where each record stands, [R]: after how many steps, tokens, or seconds of training."""
    steps = np.array([record["step"] for record in records], dtype=float)
    if by == "step":
        return steps
    if by == "tokens":
        config = load_json(folder / "config.json")
        sizes = [config.get(name) for name in ("batch_size", "block_size")]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"{folder / 'config.json'} does not say batch_size and block_size")
        return steps * sizes[0] * sizes[1]
    return np.array(seconds_at_each(records))


def draw_run(
    axes: Any, at: np.ndarray, records: list[dict[str, Any]], key: str, name: str, colour: str
) -> None:
    """One run in one panel. Beside its validation loss stands the mean training loss since the
    evaluation before: where one falls and the other rises, the run overfits."""
    where, values = points(at, records, key)
    if not len(values):
        return
    label = f"{name}: {values[-1]:.4f}"
    if key == SMOOTHED:
        axes.plot(where, values, linewidth=0.5, alpha=0.4, color=colour)
        axes.plot(where, running_mean(values), linewidth=1.2, color=colour, label=label)
        return
    marker = "o" if key == "val_loss" else ""
    axes.plot(where, values, marker=marker, markersize=3, linewidth=1, color=colour, label=label)
    if key == "val_loss":
        axes.plot(*points(at, records, "train_loss"), linestyle="--", linewidth=1, color=colour)


def points(
    at: np.ndarray, records: list[dict[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Where the records that have this key stand, and its values."""
    has = np.array([key in record for record in records])
    return at[has], np.array([r[key] for r in records if key in r], dtype=float)


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of each of values [R] and of its neighbours, up to REACH on either side."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    i = np.arange(len(values))
    first, behind = np.maximum(i - REACH, 0), np.minimum(i + REACH + 1, len(values))
    return (sums[behind] - sums[first]) / (behind - first)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
