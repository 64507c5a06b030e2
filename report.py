"""What a comparison found: from finished cells to statistics, tables, plots and report.md. Nothing here trains.

Reading order: Study, what a report is made from; the statistics, pure functions of numbers; the verdicts; the page,
section by section; last the plots. All losses are in nats per token, and a lower one is better.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metrics import plain, read_metrics

SIGNIFICANCE, POWER = 0.05, 0.8
COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")  # Okabe and Ito
Cells = list[dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A finished comparison.

    Its cells are dicts with arm, cell (its folder's name), learning_rate, seed, max_iters, parameters, peak_memory_mb,
    diverged, and val_loss (nats per token) and val_bpb (bits per byte), which are None where they were not finite.
    """

    title: str
    folder: Path  # where report.md is to be; cells/NAME/metrics.jsonl is there
    arms: list[str]  # the first is the reference
    cells: Cells  # at equal steps: every arm x learning rate x seed, the seeds in order
    extra: dict[str, Cells]  # arm -> its cells at equal wall-clock, where it needs other ones
    equal_time: bool  # whether a verdict at equal wall-clock was asked for
    seconds: dict[str, list[float]]  # arm or control -> seconds per step, round by round
    control: dict[str, str]  # arm -> the control without norms that it is held against
    tokens: dict[str, int]  # arm or control -> tokens per step
    facts: dict[str, str]  # how it was made: what -> which


@dataclass(frozen=True)
class Difference:
    """An arm less the reference, paired by seed, in nats per token: below 0 the arm is better."""

    verdict: str  # better, worse, no difference detected; diverged and one seed, where nothing can be tested
    mean: float = math.nan
    low: float = math.nan  # 95% interval over seeds, see interval()
    high: float = math.nan
    p: float = math.nan  # two-sided paired t-test, Holm-adjusted over the arms
    detectable: float = math.nan  # see detectable()


def t_inside(t: float, df: int) -> float:
    """P(|T| < t) of Student's t with `df` degrees of freedom, t >= 0. Abramowitz & Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(df))
    term, total = math.cos(angle) ** (df % 2), 0.0
    for exponent in range(df % 2, df, 2):
        total += term
        term *= math.cos(angle) ** 2 * (exponent + 1) / (exponent + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if df % 2 else math.sin(angle) * total


def t_quantile(p: float, df: int) -> float:
    """The t with P(T < t) = p, for p from 0.5 to below 1, by bisection."""
    low, high = 0.0, 1.0
    while t_inside(high, df) < 2 * p - 1:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, df) < 2 * p - 1 else (low, middle)
    return high


def mean_and_error(differences: list[float]) -> tuple[float, float]:
    """The mean of two or more numbers, and its standard error."""
    return float(np.mean(differences)), float(np.std(differences, ddof=1)) / math.sqrt(len(differences))


def paired_t_test(differences: list[float]) -> float:
    """Two-sided p of the hypothesis that the true mean of the differences, two or more, is 0. Student 1908."""
    mean, error = mean_and_error(differences)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 1 - t_inside(abs(mean) / error, len(differences) - 1)


def interval(differences: list[float]) -> tuple[float, float]:
    """The means that paired_t_test does not reject at 5%. A bootstrap's are too few where seeds are (LOG.md)."""
    mean, error = mean_and_error(differences)
    reach = t_quantile(1 - SIGNIFICANCE / 2, len(differences) - 1) * error
    return mean - reach, mean + reach


def detectable(differences: list[float]) -> float:
    """Smallest true mean that the unadjusted test at 5% finds with 80% power, given the spread seen. Bloom 1995."""
    df = len(differences) - 1
    return (t_quantile(1 - SIGNIFICANCE / 2, df) + t_quantile(POWER, df)) * mean_and_error(differences)[1]


def holm(ps: dict[str, float]) -> dict[str, float]:
    """p values adjusted for there being several. Holm 1979: the smallest times m, the next times m - 1, ..."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=ps.get)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[name]))
        adjusted[name] = largest
    return adjusted


def time_ratio(seconds: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Median over rounds of seconds / reference, so that drift cancels, and its 95% bootstrap interval. Efron 1979."""
    ratios = np.divide(seconds, reference)
    medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.quantile(medians, (SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2))
    return float(np.median(ratios)), float(low), float(high)


def judge(reference: dict[int, float], arms: dict[str, dict[int, float]]) -> dict[str, Difference]:
    """Each arm against the reference. Losses by seed; infinite ones, or none at all, mean that the arm diverged."""
    differences = {arm: [losses[seed] - reference[seed] for seed in losses] for arm, losses in arms.items()}
    sound = {arm: d for arm, d in differences.items() if d and np.isfinite(d).all()}
    adjusted = holm({arm: paired_t_test(d) for arm, d in sound.items() if len(d) > 1})
    found = {}
    for arm in arms:
        if arm not in sound:
            found[arm] = Difference("diverged")
        elif arm not in adjusted:
            found[arm] = Difference("one seed", sound[arm][0])
        else:
            mean, clear = float(np.mean(sound[arm])), adjusted[arm] < SIGNIFICANCE
            verdict = ("better" if mean < 0 else "worse") if clear else "no difference detected"
            found[arm] = Difference(verdict, mean, *interval(sound[arm]), adjusted[arm], detectable(sound[arm]))
    return found


def by_seed(cells: Cells) -> dict[int, float]:
    """Seed -> final validation loss, infinite where the cell diverged."""
    return {cell["seed"]: math.inf if cell["diverged"] else cell["val_loss"] for cell in cells}


def by_rate(cells: Cells, arm: str) -> dict[float, Cells]:
    """Learning rate, from low to high -> the arm's cells, one per seed."""
    own = [cell for cell in cells if cell["arm"] == arm]
    return {rate: [cell for cell in own if cell["learning_rate"] == rate]
            for rate in sorted({cell["learning_rate"] for cell in own})}


def best_cells(cells: Cells, arm: str) -> Cells:
    """Those at the learning rate with the lowest mean loss; rates at which a seed diverged do not count. May be []."""
    sound = [some for some in by_rate(cells, arm).values() if not any(cell["diverged"] for cell in some)]
    return min(sound, key=lambda some: np.mean(list(by_seed(some).values())), default=[])


def verdicts(study: Study) -> tuple[dict[str, Difference], dict[str, Difference]]:
    """(at equal steps, at equal wall-clock) by arm. The second has only arms that needed cells of their own for it."""
    base, *others = (by_seed(best_cells(study.cells, arm)) for arm in study.arms)
    at_steps = dict(zip(study.arms[1:], others, strict=True))
    if not base:
        return judge({}, dict.fromkeys(at_steps, {})), {}
    return judge(base, at_steps), judge(base, {arm: by_seed(cells) for arm, cells in study.extra.items()})


def summary(study: Study) -> str:
    """Both verdicts, a paragraph each."""
    reference, *others = study.arms
    at_steps, at_time = verdicts(study)
    if not others:
        cells = best_cells(study.cells, reference)
        return (f"**One arm, `{reference}`**: nothing to compare it with. " + (
            f"Its best learning rate is {cells[0]['learning_rate']:g}: {np.mean(list(by_seed(cells).values())):.4f} "
            f"nats per token." if cells else "It diverged at every learning rate tried."))
    steps = [sentence(arm, reference, at_steps[arm]) for arm in others]
    clock = [wall_clock_sentence(study, arm, at_steps[arm], at_time.get(arm)) for arm in others]
    return (f"**At equal steps**, each arm at its best learning rate:\n\n{bullets(steps)}\n\n**At equal wall-clock**:"
            f"\n\n{bullets(clock if study.equal_time else ['not asked for (equal_time=false).'])}")


def sentence(arm: str, reference: str, d: Difference) -> str:
    """A verdict in words."""
    interval = f"95% CI {d.low:+.4f} to {d.high:+.4f}, p {p_text(d.p)}"
    if d.verdict in ("better", "worse"):
        return f"`{arm}` is **{d.verdict}** than `{reference}` by {abs(d.mean):.4f} nats per token ({interval})."
    if d.verdict == "diverged":
        return f"`{arm}` **cannot be judged** against `{reference}`: one of them diverged."
    if d.verdict == "one seed":
        return f"`{arm}` ends {d.mean:+.4f} nats per token from `{reference}`; with **one seed** no test is possible."
    return (f"**No difference detected** between `{arm}` and `{reference}` ({d.mean:+.4f} nats per token, {interval}); "
            f"a true difference of {d.detectable:.4f} would have been found four times in five.")


def wall_clock_sentence(study: Study, arm: str, at_steps: Difference, d: Difference | None) -> str:
    """`d` is None if the arm has no cells of its own for this verdict."""
    reference = study.arms[0]
    ratio, low, high = time_ratio(study.seconds[arm], study.seconds[reference])
    takes = f"`{arm}` takes {ratio:.3f} times `{reference}`'s time per step (95% CI {low:.3f} to {high:.3f})"
    if d is not None:
        return f"{takes} and so gets {study.extra[arm][0]['max_iters']:,} steps. {sentence(arm, reference, d)}"
    if at_steps.verdict == "diverged":
        return f"{takes}, and cannot be judged: one of them diverged."
    why = "the same speed within noise" if low <= 1 <= high else "worth less than one step"
    return f"{takes}, {why}: the verdict at equal steps holds."


def number(value: float, form: str = ".4f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quality_table(reference: str, cells_of: dict[str, Cells], found: dict[str, Difference]) -> str:
    """A line for each arm of `cells_of`; its cells are those of one learning rate, one per seed."""
    head = ["arm", "learning rate", "steps", "val loss, mean", "sd over seeds", "bits per byte", f"less `{reference}`",
            "95% CI", "p (Holm)", "detectable", "verdict"]
    rows = []
    for arm, cells in cells_of.items():
        d, losses = found.get(arm, Difference("reference")), list(by_seed(cells).values())
        if not np.isfinite(losses or [math.inf]).all():
            rows.append([f"`{arm}`", *["-"] * 9, "diverged"])
            continue
        tested, rate = math.isfinite(d.p), f"{cells[0]['learning_rate']:g}"
        rows.append([f"`{arm}`", rate, f"{cells[0]['max_iters']:,}", f"{np.mean(losses):.4f}",
                     number(np.std(losses, ddof=1)) if len(losses) > 1 else "-",
                     f"{np.mean([cell['val_bpb'] for cell in cells]):.4f}", number(d.mean, "+.4f"),
                     f"{d.low:+.4f} to {d.high:+.4f}" if tested else "-",
                     p_text(d.p).removeprefix("= ") if tested else "-", number(d.detectable), d.verdict])
    return table(head, rows)


def equal_steps_section(study: Study) -> str:
    cells = {arm: best_cells(study.cells, arm) for arm in study.arms}
    return quality_table(study.arms[0], cells, verdicts(study)[0]) + (
        f"\n\nFinal validation loss in nats per token, each arm at its best learning rate. The reference's sd over "
        f"seeds is the noise floor; pairing by seed takes away what the arms share of it. Detectable: the smallest "
        f"true difference that these seeds find with {POWER:.0%} power.")


def equal_time_section(study: Study) -> str:
    if not study.extra:
        return "No arm needed cells of its own: see the verdict on top."
    cells = {study.arms[0]: best_cells(study.cells, study.arms[0])} | study.extra
    return quality_table(study.arms[0], cells, verdicts(study)[1]) + (
        "\n\nAs many steps as fit into the time that the reference trains for; the schedule is as long as they are. "
        "Arms of the same speed are not repeated here.")


def speed_section(study: Study) -> str:
    """Every arm, then the controls."""
    rows, reference = [], study.seconds[study.arms[0]]
    for name, seconds in study.seconds.items():
        low, median, high = 1000 * np.quantile(seconds, (0.25, 0.5, 0.75))
        share, cells = "-", [cell for cell in study.cells if cell["arm"] == name]
        ratio = "{:.3f} ({:.3f} to {:.3f})".format(*time_ratio(seconds, reference)) if rows else "1"
        if name in study.control:
            middle, most, least = (1 - r for r in time_ratio(study.seconds[study.control[name]], seconds))
            share = f"{middle:.1%} ({least:.1%} to {most:.1%})"
        rows.append([f"`{name}`", f"{cells[0]['parameters']:,}" if cells else "-", f"{median:.2f}",
                     f"{low:.2f} to {high:.2f}", f"{1000 * study.tokens[name] / median:,.0f}",
                     ratio, share, f"{max(cell['peak_memory_mb'] for cell in cells):,.0f}" if cells else "-"])
    return table(["arm", "parameters", "ms per step, median", "quartiles", "tokens/s", "time / reference (95% CI)",
                  "share of the norms (95% CI)", "peak memory, MB"], rows) + (
        "\n\nWhole training steps, all arms in turn, forwards and backwards: a machine whose speed drifts drifts for "
        "all. The share of the norms is what a step without any saves; that control is for timing only. Peak memory is "
        "that of a cell: its tensors on CUDA, else the whole process.")


def rates_section(study: Study) -> str:
    rates, rows = sorted({cell["learning_rate"] for cell in study.cells}), []
    for arm in study.arms:
        best, texts, bad = best_cells(study.cells, arm), [], []
        for rate, cells in by_rate(study.cells, arm).items():
            mean, lost = np.mean(list(by_seed(cells).values())), sum(cell["diverged"] for cell in cells)
            bad += [f"{rate:g}"] if lost else []
            text = f"{lost} of {len(cells)} diverged" if lost else f"{mean:.4f}"
            texts.append(f"**{text}**" if cells == best else text)
        rows.append([f"`{arm}`", *texts, bad[0] if bad else "-"])
    return table(["arm", *(f"{rate:g}" for rate in rates), "diverges from"], rows) + (
        "\n\nMean final validation loss in nats per token by learning rate, an arm's best in bold. Diverged: NaN, Inf "
        "or a final validation loss above the first training loss.")


CAVEATS = ["The best learning rate was chosen on the same seeds and the same validation text that are reported.",
           "One size of model, one data set, one length of training: at others the order may differ.",
           "Intervals of losses and p are Student's, by pairs: an interval is for its arm alone, p is for all of them."]


def edge_notes(study: Study) -> list[str]:
    rates = sorted({cell["learning_rate"] for cell in study.cells})
    best = {arm: cells[0]["learning_rate"] for arm in study.arms if (cells := best_cells(study.cells, arm))}
    return [f"`{arm}` is best at {rate:g}, at an end of the sweep: a wider one may favour it more."
            for arm, rate in best.items() if len(rates) > 1 and rate in (rates[0], rates[-1])]


def write_report(study: Study) -> str:
    """Writes report.md and its plots; returns the verdicts."""
    drawn = draw(study)
    picture = {name: f"\n\n![{name.replace('_', ' ')}]({name}.png)" if name in drawn else "" for name in PLOTS}
    sections = {
        "Quality at equal steps": equal_steps_section(study) + picture["loss_curves"],
        "Quality at equal wall-clock": equal_time_section(study),
        "Speed": speed_section(study) + picture["step_time"],
        "Loss versus learning rate": rates_section(study) + picture["learning_rate"],
        "How it was made": bullets([f"{what}: {which}" for what, which in study.facts.items()]),
        "What to keep in mind": bullets(edge_notes(study) + CAVEATS)}
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())
    (study.folder / "report.md").write_text(f"# {study.title}\n\n{summary(study)}\n\n{text}\n", encoding="utf-8")
    return summary(study)


def draw(study: Study) -> list[str]:
    """The names of the plots drawn; none where matplotlib is not installed, which is said."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError:
        print("the report has no plots, for matplotlib is not installed: pip install -e '.[plot]'")
        return []
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(study.arms)}
    one_rate = len(by_rate(study.cells, study.arms[0])) == 1
    drawn = [name for name in PLOTS if not (one_rate and name == "learning_rate")]
    for name in drawn:
        figure = Figure(figsize=(10, 4), layout="constrained")
        PLOTS[name](study, figure, colours)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
        figure.savefig(study.folder / f"{name}.png", dpi=150)
    return drawn


def curve(folder: Path, cells: Cells, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [N], losses [seeds, N]) at the steps that all cells have a record of; training loss as a running mean."""
    records = [{r["step"]: r[key] for r in read_metrics(folder / "cells" / cell["cell"]) if key in r} for cell in cells]
    steps = sorted(set.intersection(*map(set, records)))
    width = max(1, len(steps) // 25) if key == "loss" else 1
    return np.array(steps[width - 1:]), np.array(
        [np.convolve([record[step] for step in steps], np.ones(width) / width, "valid") for record in records])


def loss_curves(study: Study, figure: Any, colours: dict[str, str]) -> None:
    """Left the losses; right how far each arm's training loss is from the reference's, on the same batches."""
    left, right = figure.subplots(1, 2)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="lines: training, points: validation")
    right.set(xlabel="step", ylabel="nats per token", title="training loss less the reference's")
    base = None
    for arm in study.arms:
        if not (cells := best_cells(study.cells, arm)):
            continue
        points, values = curve(study.folder, cells, "val_loss")
        left.plot(points, values.mean(0), "o", color=colours[arm], markersize=4)
        steps, losses = curve(study.folder, cells, "loss")
        base = (steps, losses) if arm == study.arms[0] else base
        common, here, there = np.intersect1d(steps, base[0] if base else [], return_indices=True)
        pairs = [(left, steps, losses)] + ([(right, common, losses[:, here] - base[1][:, there])] if base else [])
        for axes, x, y in pairs:
            axes.plot(x, y.mean(0), color=colours[arm], linewidth=1.2, label=plain(arm))
            axes.fill_between(x, y.min(0), y.max(0), color=colours[arm], alpha=0.15, linewidth=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", title="mean, and\nrange over seeds")


def rate_plot(study: Study, figure: Any, colours: dict[str, str]) -> None:
    """Mean and range over seeds by learning rate; where a seed diverged, a cross at the top."""
    axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel="final validation loss (nats per token)")
    for i, arm in enumerate(study.arms):
        losses = {rate: np.array(list(by_seed(cells).values())) for rate, cells in by_rate(study.cells, arm).items()}
        beside = (max(losses) / min(losses)) ** (0.006 * (i - len(study.arms) / 2))  # not on top of each other
        sound = {rate * beside: y for rate, y in losses.items() if np.isfinite(y).all()}
        reach = np.array([[y.mean() - y.min(), y.max() - y.mean()] for y in sound.values()]).reshape(-1, 2).T
        axes.errorbar(list(sound), [y.mean() for y in sound.values()], reach, color=colours[arm], marker="o",
                      markersize=4, linewidth=1.2, capsize=3, label=plain(arm))
        lost = [rate * beside for rate, y in losses.items() if not np.isfinite(y).all()]
        axes.plot(lost, [0.98] * len(lost), "x", color=colours[arm], transform=axes.get_xaxis_transform())
    axes.set_xticks(list(losses), [f"{rate:g}" for rate in losses], minor=False)
    axes.set_xticks([], minor=True)
    figure.legend(loc="outside right upper", title="mean, and range\nover seeds;\nx: a seed diverged")


def time_plot(study: Study, figure: Any, colours: dict[str, str]) -> None:
    """Median step time with quartiles, the reference on top and controls below."""
    axes = figure.add_subplot(xlabel="time per training step (ms): median and quartiles")
    for name, seconds in study.seconds.items():
        low, median, high = 1000 * np.quantile(seconds, (0.25, 0.5, 0.75))
        axes.barh(plain(name), median, xerr=[[median - low], [high - median]], color=colours.get(name, "#bbbbbb"),
                  alpha=0.8, height=0.6, capsize=3)
        axes.text(high, name, f"  {median:.2f}", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.1)


PLOTS = {"loss_curves": loss_curves, "step_time": time_plot, "learning_rate": rate_plot}
