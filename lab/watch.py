"""python -m lab.watch: draws what runs with watch=true recorded of the scales inside their model.

Order: main; plot, one column for each run; what a panel shows.
"""

import sys
from pathlib import Path
from textwrap import fill
from typing import Any

if not __package__:  # started as a file, so Python would not find the imports below
    hint = "run it as a module, from the root of the repository: python -m lab.watch"
    print(f"error: {hint}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":  # before the imports that take seconds
    from config.command import start

    start()

import numpy as np

from config.command import run_command, split_arguments, user_errors
from config.schema import parse_knobs
from run.metrics import METRICS_FILE, plot_label, read_metrics, save_figure

USAGE = """\
Draw what runs with watch=true recorded of the scales inside their model, each in a column:

python -m lab.watch RUN_FOLDER [RUN_FOLDER ...] [out=FILE.png]

Without out=, the picture is watch.png in the first folder."""

DEPTH_LINES = 12  # steps drawn in a panel by depth, evenly spread; more lines would hide each other
ALWAYS = (  # of these, what every run with watch=true has
    "residual_rms residual_mean_share ffn_in_mean ffn_in_sd ffn_gate_closed ffn_gate_open ffn_rms "
    "ffn_kurtosis ffn_out_mean ffn_out_sd ffn_out_negative attn_logit_max blocks_grad_norm"
).split()
PANELS = (  # of each run, from top to bottom: label and scale of the vertical axis
    ("residual stream: RMS", "log"),
    ("residual: |mean| / RMS", "linear"),
    ("norms: mean,\nmin to max", "linear"),
    ("feed-forward reads:\nmean / sd", "linear"),
    ("its activation: share\nclosed, open (dotted)", "linear"),
    ("what down reads:\nRMS", "linear"),
    ("what down reads:\nexcess kurtosis", "symlog"),
    ("feed-forward writes:\nmean / sd", "linear"),
    ("feed-forward writes:\nshare below 0", "linear"),
    ("largest |attention logit|", "linear"),
    ("gradient norm", "log"),
)
MARKERS = {"gain": ".", "bias": "x"}  # of a norm's parameters; those with one element have "v"


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 2 for the user's error."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    with user_errors():
        places, pairs = split_arguments(argv)
        options = parse_knobs(pairs, {"out": (str, None)}, "command line")
        if not places:
            raise ValueError("name the folder of a run, or several: python -m lab.watch out/small")
        file = Path(options.get("out", Path(places[0]) / "watch.png"))
        plot([Path(place) for place in places], file)
    print(file)
    return 0


def watched(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The steps [S] at which a run was watched, and for each quantity its values [S, n], where NaN
    stands for null. ValueError if there are none."""
    if not (folder / METRICS_FILE).is_file():
        raise ValueError(
            f"{folder} has no {METRICS_FILE}: name the folder of a run that was trained with "
            f"watch=true"
        )
    records = [record for record in read_metrics(folder) if "watch" in record]
    if not records:
        raise ValueError(f"{folder} was not watched: train it with watch=true")
    shapes = [{name: len(each) for name, each in record["watch"].items()} for record in records]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"{folder / METRICS_FILE} does not say the same quantities at each step: it is damaged"
        )
    values = {
        name: np.array([record["watch"][name] for record in records], dtype=float)
        for name in records[0]["watch"]
    }
    return np.array([record["step"] for record in records]), values


def drawable(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What `watched` gives. ValueError if a quantity is missing that the picture needs."""
    steps, values = watched(folder)
    if missing := [name for name in ALWAYS if name not in values]:
        raise ValueError(
            f"{folder / METRICS_FILE} lacks {missing[0]}: it is damaged, or from an older version, "
            f"so train the run again with watch=true"
        )
    return steps, values


def plot(folders: list[Path], file: Path) -> None:
    """Draws what was watched in these runs, one column per run; the panels of a row share a scale.

    ValueError if a run was not watched or matplotlib is missing."""
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ValueError("this picture needs matplotlib: pip install matplotlib") from error
    runs = [drawable(folder) for folder in folders]
    last_step = max(steps[-1] for steps, _ in runs)
    n_layer = max(values["ffn_rms"].shape[1] for _, values in runs)
    by_step = ScalarMappable(Normalize(0, last_step), "viridis")
    by_layer = ScalarMappable(Normalize(1, max(2, n_layer)), "plasma")  # a colour bar has two ends
    figure = Figure(figsize=(2 + 4 * len(runs), 2 * len(PANELS)), layout="constrained")
    grid = figure.subplots(len(PANELS), len(runs), sharey="row", squeeze=False)
    for column, folder, (steps, values) in zip(grid.T, folders, runs, strict=True):
        column[0].set_title(fill(plot_label(folder.resolve().name), 30), fontsize="medium")
        draw_by_depth(column[0], steps, values["residual_rms"], by_step)
        draw_by_depth(column[1], steps, values["residual_mean_share"], by_step)
        draw_norms(column[2], steps[-1], values)
        draw_feed_forward(column[3:9], steps, values, by_layer)
        draw_by_step(column[9], steps, values["attn_logit_max"], by_layer)
        draw_by_step(column[10], steps, values["blocks_grad_norm"], by_layer)
        draw_other_gradients(column[10], steps, values)
        column[10].set_xlabel("step")  # the panels above have the same horizontal axis
        column[10].tick_params(labelbottom=True)
    for row, (label, scale) in zip(grid, PANELS, strict=True):
        row[0].set(ylabel=label, yscale=scale)
    whole = MaxNLocator(integer=True)
    figure.colorbar(by_step, ax=grid[:2], label="step", aspect=30)
    figure.colorbar(by_layer, ax=grid[3:], label="Block", aspect=45, ticks=whole)
    save_figure(figure, file, dpi=120)


def draw_by_depth(axes: Any, steps: np.ndarray, values: np.ndarray, colours: Any) -> None:
    """A line per step, of values [S, depths]."""
    for i in np.unique(np.linspace(0, len(steps) - 1, DEPTH_LINES).round().astype(int)):
        axes.plot(values[i], ".-", color=colours.to_rgba(steps[i]), linewidth=1)
    axes.set_xlabel("Blocks passed")
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.3)


def draw_by_step(
    axes: Any, steps: np.ndarray, values: np.ndarray, colours: Any, style: str = ".-"
) -> None:
    """A line per Block, of values [S, n_layer]."""
    for layer, line in enumerate(values.T, 1):
        axes.plot(steps, line, style, color=colours.to_rgba(layer), linewidth=1, markersize=3)
    axes.tick_params(labelbottom=False)
    axes.grid(alpha=0.3)


def draw_feed_forward(
    panels: np.ndarray, steps: np.ndarray, values: dict[str, np.ndarray], colours: Any
) -> None:
    """What the feed-forwards read, hold inside and write, in the order of the computation."""
    reads, gates, inside, outliers, writes, negative = panels
    with np.errstate(invalid="ignore"):  # 0 / 0, where a feed-forward writes nothing but zeros
        drift = [values[f"ffn_{end}_mean"] / values[f"ffn_{end}_sd"] for end in ("in", "out")]
    draw_by_step(reads, steps, drift[0], colours)
    draw_by_step(gates, steps, values["ffn_gate_closed"], colours)
    draw_by_step(gates, steps, values["ffn_gate_open"], colours, ".:")
    draw_by_step(inside, steps, values["ffn_rms"], colours)
    draw_by_step(outliers, steps, values["ffn_kurtosis"], colours)
    draw_by_step(writes, steps, drift[1], colours)
    draw_by_step(negative, steps, values["ffn_out_negative"], colours)


def draw_norms(axes: Any, step: int, values: dict[str, np.ndarray]) -> None:
    """The learned values of the norms at the last step by depth: a colour for each kind of norm, a
    marker for each parameter. The model's last norm stands behind the last Block."""
    drawn = [name.removesuffix("_min") for name in values if name.endswith("_min")]
    roles = list(dict.fromkeys(name.rpartition("_")[0] for name in drawn))
    n_layer = values["ffn_rms"].shape[1]
    for name in drawn:
        role, _, parameter = name.rpartition("_")
        i = roles.index(role)
        least, mean, most = (values[f"{name}_{part}"][-1] for part in ("min", "mean", "max"))
        depth = np.array([n_layer + 1]) if role == "norm" else np.arange(1, n_layer + 1)
        beside = depth + 0.06 * (i - len(roles) / 2)  # so that no kind hides another one
        style = dict(
            fmt=MARKERS.get(parameter, "v") + "-", color=f"C{i}", label=f"{role} {parameter}"
        )
        reach = (mean - least, most - mean)
        axes.errorbar(beside, mean, reach, linewidth=1, capsize=2, markersize=4, **style)
    if roles:
        above = dict(loc="lower center", bbox_to_anchor=(0.5, 1))
        axes.legend(**above, ncols=3, fontsize="x-small", frameon=False)
    else:
        axes.text(0.5, 0.5, "these norms learn nothing", transform=axes.transAxes, ha="center")
    axes.set_xlabel(f"Block, then the last norm (at step {step})")
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.3)


def draw_other_gradients(axes: Any, steps: np.ndarray, values: dict[str, np.ndarray]) -> None:
    """In grey, the gradients of what is not a Block: embedding, last norm, head."""
    styles = iter(("--", ":", "-.", "-"))
    for name in sorted(values):
        part = name.removesuffix("_grad_norm")
        if part not in (name, "blocks"):
            line = values[name][:, 0]
            axes.plot(steps, line, next(styles), color="grey", linewidth=1, label=part)
    axes.legend(loc="upper right", fontsize="x-small", framealpha=0.5)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
