"""The report of a comparison: report.md and its plots, made of finished cells.

Order: Study, what a report is made of; the selection of cells; the verdicts in words; the page,
section by section; last the plots. Losses are in nats per token, and a lower one is better.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config.command import printable
from data.files import write_atomically
from lab.verdict import (
    FEWEST_SEEDS,
    POWER,
    SIGNIFICANCE,
    Difference,
    Estimate,
    doubt_about_time,
    estimate,
    interaction,
    interval,
    judge,
    log_ratio,
    time_ratio,
)
from run.metrics import plot_label, read_metrics, save_figure

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = "#222222 #0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #8c6d31".split()
CAVEATS = [
    "One size of model, one data set, one length of training: at others the order may differ. "
    "Intervals are over seeds (initial weights and order of the data) and over nothing else.",
    "Intervals of losses and p are Student's, by pairs: an interval is for its arm alone, as is a "
    "test for equality or for an interaction; p is for all of them.",
]
SUFFIXES = (".png", ".pdf")  # of every plot: for a page, and for a paper
QUANTIZED = (
    "The loss of the last checkpoint, in nats per token, with the matrices of the Blocks rounded, "
    "and what this adds to the loss without rounding, paired by seed. Quantisation is simulated, "
    "to the nearest value; embedding, head and norms stay as they are. int8, int4: a scale for "
    "each row of a matrix; int4g32: one for each 32 neighbours in a row; w4a4: int4, and what a "
    "matrix multiplies has 4 bits, too, with a scale for each token; ternary: -s, 0 and s, with s "
    "the mean of |w|. The intervals are not corrected for their number."
)
Cells = list[dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A finished comparison.

    A cell is a dict with arm, cell (the name of its folder), learning_rate, seed, max_iters,
    parameters, peak_memory_mb, diverged, val_loss (nats per token) and val_bpb (bits per byte); the
    last two are None where they were not finite."""

    title: str
    folder: Path  # report.md is written there, and cells/NAME/metrics.jsonl is read
    arms: list[str]  # the first is the reference
    cells: Cells  # at equal steps: every arm x learning rate x seed, the seeds in order
    extra: dict[str, Cells]  # arm -> its cells at equal wall-clock, where it needs cells of its own
    equal_time: bool  # whether a verdict at equal wall-clock was asked for
    seconds: dict[str, list[list[float]]]  # arm or control -> processes x rounds, per step
    control: dict[str, str]  # arm -> the control without norms that it is compared with
    tokens: dict[str, int]  # arm or control -> tokens per step
    facts: dict[str, str]  # how the comparison was made: what -> which
    margin: float  # nats per token within which two arms count as equal; 0 = not asked
    square: list[str]  # the four arms of two knobs with two values each, in order; else []
    # Of simulated quantisation; a cell then also has quantized: kind, or none -> loss, None where
    # it was not finite.
    kinds: list[str] = field(default_factory=list)


# -- The selection of cells ------------------------------------------------------------------------


def by_seed(cells: Cells) -> dict[int, float]:
    """Seed -> final validation loss, infinite where the cell diverged."""
    return {cell["seed"]: math.inf if cell["diverged"] else cell["val_loss"] for cell in cells}


def by_rate(cells: Cells, arm: str) -> dict[float, Cells]:
    """Learning rate, from low to high -> the arm's cells, one per seed."""
    own = [cell for cell in cells if cell["arm"] == arm]
    rates = sorted({cell["learning_rate"] for cell in own})
    return {rate: [cell for cell in own if cell["learning_rate"] == rate] for rate in rates}


def mean_loss_of(cells: Cells) -> float:
    return np.mean(list(by_seed(cells).values()))


def best_cells(cells: Cells, arm: str) -> Cells:
    """The arm's cells at the learning rate with the lowest mean loss, among the rates at which no
    seed diverged; [] if there is none."""
    groups = by_rate(cells, arm).values()
    sound = [group for group in groups if not any(cell["diverged"] for cell in group)]
    return min(sound, key=mean_loss_of, default=[])


def steadiest_cells(cells: Cells, arm: str) -> Cells:
    """The arm's cells at the rate at which the fewest seeds diverged: of an arm that has no best
    cells. Of two such rates it is the lower one; [] without cells."""
    groups = by_rate(cells, arm).values()
    return min(groups, key=lambda group: sum(cell["diverged"] for cell in group), default=[])


# -- The verdicts ----------------------------------------------------------------------------------


def verdicts(study: Study) -> tuple[dict[str, Difference], dict[str, Difference]]:
    """(at equal steps, at equal wall-clock), by arm. The second has only the arms with cells of
    their own at equal wall-clock."""
    reference, *others = study.arms
    base = by_seed(best_cells(study.cells, reference))
    if not base:
        return judge({}, {arm: {} for arm in others}), {}
    at_steps = {arm: by_seed(best_cells(study.cells, arm)) for arm in others}
    at_time = {arm: by_seed(cells) for arm, cells in study.extra.items()}
    doubts = {arm: doubt_of(study, arm) for arm in study.extra}
    return judge(base, at_steps, study.margin), judge(base, at_time, study.margin, doubts)


def doubt_of(study: Study, arm: str) -> Estimate:
    """What the uncertain time ratio adds to the loss of an arm at equal wall-clock."""
    both = best_cells(study.cells, arm), study.extra[arm]
    steps = tuple(cells[0]["max_iters"] for cells in both)
    losses = tuple(mean_loss_of(cells) for cells in both)
    return doubt_about_time(
        log_ratio(study.seconds[arm], study.seconds[study.arms[0]]), steps, losses
    )


def verdicts_text(study: Study) -> str:
    """Both verdicts, a paragraph each."""
    reference, *others = study.arms
    if not others:
        return only_arm_sentence(study)
    at_steps, at_time = verdicts(study)
    steps = [sentence(arm, reference, at_steps[arm], study.margin) for arm in others]
    steps += interaction_lines(study)
    clock = ["not asked for (equal_time=false)."]
    if study.equal_time:
        clock = [wall_clock_sentence(study, arm, at_steps[arm], at_time.get(arm)) for arm in others]
    return (
        f"{few_seeds_line(study)}**At equal steps**, {which_rate(study)}:\n\n{bullets(steps)}\n\n"
        f"**At equal wall-clock**:\n\n{bullets(clock)}"
    )


def few_seeds_line(study: Study) -> str:
    """A paragraph that warns of too few seeds, or ''."""
    seeds = len({cell["seed"] for cell in study.cells})
    if seeds >= FEWEST_SEEDS:
        return ""
    return (
        f"**{seeds} {'seed' if seeds == 1 else 'seeds'}: too few to rely on.** A difference may be "
        f"large and yet not be detected: take at least {FEWEST_SEEDS} seeds.\n\n"
    )


def which_rate(study: Study) -> str:
    """At which learning rate the losses are compared."""
    rates = {cell["learning_rate"] for cell in study.cells}
    if len(rates) > 1:
        return "each arm at its best learning rate"
    return f"at learning rate {rates.pop():g}, the only one tried"


def only_arm_sentence(study: Study) -> str:
    (arm,) = study.arms
    start = f"**One arm, `{arm}`**: nothing to compare it with. "
    cells = best_cells(study.cells, arm)
    if not cells:
        return f"{start}It diverged at every learning rate tried."
    rate, loss = cells[0]["learning_rate"], mean_loss_of(cells)
    if len(by_rate(study.cells, arm)) == 1:
        return f"{start}At learning rate {rate:g}, the only one tried: {loss:.4f} nats per token."
    return f"{start}Its best learning rate is {rate:g}: {loss:.4f} nats per token."


def interaction_lines(study: Study) -> list[str]:
    """What two knobs do beside each other, where each of exactly two has two values; else []."""
    if not study.square:
        return []
    a, b, c, d = (f"`{arm}`" for arm in study.square)
    what = f"**Interaction**, ({a} less {b}) less ({c} less {d}):"
    found = interaction_of(study)
    if found.verdict == "diverged":
        return [f"{what} cannot be judged: one of them diverged."]
    mean = f"{found.mean:+.4f} nats per token"
    if math.isnan(found.p):
        return [f"{what} {mean}; with **one seed** no test is possible."]
    detected = "**detected**" if found.p < SIGNIFICANCE else "none detected"
    equality = equality_text(found, study.margin)
    return [f"{what} {detected} ({mean}, {numbers_text(found)}).{equality}"]


def interaction_of(study: Study) -> Difference:
    return interaction(
        [by_seed(best_cells(study.cells, arm)) for arm in study.square], study.margin
    )


def numbers_text(d: Difference) -> str:
    return f"95% CI {d.low:+.4f} to {d.high:+.4f}, p {p_text(d.p)}"


def equality_text(d: Difference, margin: float) -> str:
    """A sentence after a space, or '' if equality was not asked for."""
    if math.isnan(d.p_equal):
        return ""
    is_equal = d.p_equal < SIGNIFICANCE
    start = "**Equal within" if is_equal else "Not shown to be equal within"
    return f" {start} {margin:g} nats{'**' * is_equal} (p {p_text(d.p_equal)})."


def sentence(arm: str, reference: str, d: Difference, margin: float = 0.0) -> str:
    """A verdict in words."""
    if d.verdict == "diverged":
        return f"`{arm}` **cannot be judged** against `{reference}`: one of them diverged."
    if d.verdict == "one seed":
        return (
            f"`{arm}` ends {d.mean:+.4f} nats per token from `{reference}`; with **one seed** no "
            f"test is possible."
        )
    numbers, equality = numbers_text(d), equality_text(d, margin)
    if d.verdict in ("better", "worse"):
        return (
            f"`{arm}` is **{d.verdict}** than `{reference}` by {abs(d.mean):.4f} nats per token "
            f"({numbers}).{equality}"
        )
    if d.verdict == "not after correction":
        return (
            f"`{arm}` is {'better' if d.mean < 0 else 'worse'} than `{reference}` by "
            f"{abs(d.mean):.4f} nats per token if it is tested alone, but **not after correction** "
            f"for {d.comparisons} comparisons ({numbers}).{equality}"
        )
    return (
        f"**No difference detected** between `{arm}` and `{reference}` ({d.mean:+.4f} nats per "
        f"token, {numbers}); a true difference of {d.detectable:.4f} would have been found four "
        f"times in five.{equality}"
    )


def wall_clock_sentence(
    study: Study, arm: str, at_steps: Difference, at_time: Difference | None
) -> str:
    """`at_time` is None if the arm has no cells of its own at equal wall-clock."""
    reference = study.arms[0]
    ratio, low, high = time_ratio(study.seconds[arm], study.seconds[reference])
    takes = (
        f"`{arm}` takes {ratio:.3f} times `{reference}`'s time per step "
        f"(95% CI {low:.3f} to {high:.3f})"
    )
    if at_time is not None:
        steps = study.extra[arm][0]["max_iters"]
        verdict = sentence(arm, reference, at_time, study.margin)
        return f"{takes} and so gets {steps:,} steps. {verdict}"
    if at_steps.verdict == "diverged":
        return f"{takes}, and cannot be judged: one of them diverged."
    why = "no difference in speed detected" if low <= 1 <= high else "worth less than one step"
    return f"{takes}, {why}: the verdict at equal steps holds."


# -- The page --------------------------------------------------------------------------------------


def write_report(study: Study) -> str:
    """Writes report.md and its plots; returns the verdicts in words."""
    drawn = draw_plots(study)
    picture = {
        name: f"\n\n![{name.replace('_', ' ')}]({name}.png)" if name in drawn else ""
        for name in PLOTS
    }
    sections = {
        "Quality at equal steps": equal_steps_section(study) + picture["differences"],
        "Quality at equal wall-clock": equal_time_section(study),
        "Loss of every seed": seeds_section(study) + picture["loss_curves"],
        "Speed": speed_section(study) + picture["step_time"],
        "Loss versus learning rate": rates_section(study) + picture["learning_rate"],
        "Quality when quantised": quantized_section(study) + picture["quantized"],
        "How it was made": bullets([f"{what}: {which}" for what, which in study.facts.items()]),
        "What to keep in mind": bullets(rate_notes(study) + CAVEATS),
    }
    verdict = verdicts_text(study)
    page = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items() if body)
    text = f"# {study.title}\n\n{verdict}\n\n{page}\n"
    page = printable(text).encode()
    write_atomically(study.folder / "report.md", lambda file: file.write(page))
    return printable(verdict)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """The first column is aligned to the left, the others to the right."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quality_table(study: Study, cells_of: dict[str, Cells], found: dict[str, Difference]) -> str:
    """A row for each arm of `cells_of`; its cells are those of one learning rate, one per seed."""
    reference, margin = study.arms[0], study.margin
    head = ["arm", "learning rate", "steps", "val loss, mean", "sd over seeds", "bits per byte"]
    head += [f"less `{reference}`", "95% CI", "p (Holm)", "detectable"]
    head += [f"equal within {margin:g}"] * (margin > 0) + ["verdict"]
    rows = []
    for arm, cells in cells_of.items():
        losses = list(by_seed(cells).values())
        if not losses or not np.isfinite(losses).all():
            rows.append([f"`{arm}`", *["-"] * (len(head) - 2), "diverged"])
            continue
        rate, steps = f"{cells[0]['learning_rate']:g}", f"{cells[0]['max_iters']:,}"
        deviation = f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "-"
        measured = [cell["val_bpb"] for cell in cells]
        # They are left out if the tokenizer loses text.
        bits = "-" if None in measured else f"{np.mean(measured):.4f}"
        d = found.get(arm, Difference("reference"))
        rows.append(
            [f"`{arm}`", rate, steps, f"{np.mean(losses):.4f}", deviation, bits]
            + difference_columns(d, margin)
        )
    return markdown_table(head, rows)


def difference_columns(d: Difference, margin: float) -> list[str]:
    """Mean, interval, p, detectable, equality if there is a margin, and verdict; '-' for what could
    not be computed."""
    mean = "-" if math.isnan(d.mean) else f"{d.mean:+.4f}"
    if math.isnan(d.p):
        return [mean, "-", "-", "-", *["-"] * (margin > 0), d.verdict]
    is_equal = "yes" if d.p_equal < SIGNIFICANCE else "not shown"
    equality = [f"{is_equal}, p {p_text(d.p_equal)}"] * (margin > 0)
    interval, p = f"{d.low:+.4f} to {d.high:+.4f}", p_text(d.p).removeprefix("= ")
    return [mean, interval, p, f"{d.detectable:.4f}", *equality, d.verdict]


def equal_steps_section(study: Study) -> str:
    cells = {arm: best_cells(study.cells, arm) for arm in study.arms}
    equality = (
        f" Equal within {study.margin:g}: whether two one-sided tests at 5%, by pairs, show that "
        f"the true difference is smaller; the margin was fixed before the first result."
    )
    return quality_table(study, cells, verdicts(study)[0]) + (
        f"\n\nFinal validation loss in nats per token, {which_rate(study)}. The "
        f"reference's sd over seeds is the noise floor; pairing by seed takes away what the arms "
        f"share of it. Detectable: the smallest true difference that these seeds find with "
        f"{POWER:.0%} power.{equality if study.margin else ''}"
    )


def equal_time_section(study: Study) -> str:
    if not study.extra:
        return "No arm needed cells of its own: see the verdict on top."
    cells = {study.arms[0]: best_cells(study.cells, study.arms[0])} | study.extra
    return quality_table(study, cells, verdicts(study)[1]) + (
        "\n\nAs many steps as fit into the time that the reference trains for; the schedule is as "
        "long as they are. Arms of the same speed are not repeated here. Intervals and p allow for "
        "the uncertain time ratio, too."
    )


def seeds_section(study: Study) -> str:
    """A row for each seed, a column for each arm, and for each arm at equal wall-clock."""
    best = {arm: best_cells(study.cells, arm) for arm in study.arms}
    columns = {
        f"`{arm}`": cells or steadiest_cells(study.cells, arm) for arm, cells in best.items()
    }
    columns |= {f"`{arm}`, {c[0]['max_iters']:,} steps": c for arm, c in study.extra.items()}
    losses = {name: by_seed(cells) for name, cells in columns.items()}
    rows = []
    for seed in sorted({cell["seed"] for cell in study.cells}):
        own = [by.get(seed, math.inf) for by in losses.values()]
        rows.append([str(seed), *(f"{x:.4f}" if math.isfinite(x) else "diverged" for x in own)])
    rate = which_rate(study)
    if not all(best.values()):
        rate += "; one that diverged at every rate, at the rate where most of its seeds did not"
    return markdown_table(["seed", *columns], rows) + (
        f"\n\nFinal validation loss in nats per token, {rate}. Every cell is in results.jsonl."
    )


def quantized_section(study: Study) -> str:
    """For each kind and arm: what rounding adds to its loss, and how much more than to the loss of
    the reference. '' if no kind was asked for."""
    if not study.kinds:
        return ""
    head = ["quantised", "arm", "val loss, mean", "added", "95% CI"]
    head += [f"added, less `{study.arms[0]}`", "95% CI"]
    rows = []
    for kind in study.kinds:
        reference = added_by_seed(study, study.arms[0], kind)
        for arm in study.arms:
            added = added_by_seed(study, arm, kind)
            if not added:
                rows.append([kind, f"`{arm}`", "not finite", *["-"] * 4])
                continue
            losses = [cell["quantized"][kind] for cell in best_cells(study.cells, arm)]
            less = [added[seed] - reference[seed] for seed in added if seed in reference]
            columns = ["-", "-"] if arm == study.arms[0] else mean_and_interval(less)
            own = mean_and_interval(list(added.values()))
            rows.append([kind, f"`{arm}`", f"{np.mean(losses):.4f}", *own, *columns])
    return f"{markdown_table(head, rows)}\n\n{QUANTIZED}"


def added_by_seed(study: Study, arm: str, kind: str) -> dict[int, float]:
    """Seed -> what this kind of rounding adds to the loss of the arm's cells at its best learning
    rate; {} if the arm has none, or if a loss is not finite."""
    both = {
        c["seed"]: (c["quantized"][kind], c["quantized"]["none"])
        for c in best_cells(study.cells, arm)
    }
    if any(loss is None for pair in both.values() for loss in pair):
        return {}
    return {seed: rounded - loss for seed, (rounded, loss) in both.items()}


def mean_and_interval(values: list[float]) -> list[str]:
    """Two columns of a table; '-' for what so few values cannot give."""
    mean = f"{np.mean(values):+.4f}" if values else "-"
    if len(values) < 2:
        return [mean, "-"]
    return [mean, "{:+.4f} to {:+.4f}".format(*interval(estimate(values)))]


def speed_section(study: Study) -> str:
    """Every arm, then the controls."""
    head = ["arm", "parameters", "ms per step, median", "quartiles", "tokens/s"]
    head += ["time / reference (95% CI)", "share of the norms (95% CI)", "peak memory, MB"]
    rows, reference = [], study.arms[0]
    for name, seconds in study.seconds.items():
        low, median, high = 1000 * np.quantile(np.ravel(seconds), (0.25, 0.5, 0.75))
        tokens = 1000 * study.tokens[name] / median
        ratio, share, parameters, memory = "1", "-", "-", "-"
        if name != reference:
            ratio = "{:.3f} ({:.3f} to {:.3f})".format(
                *time_ratio(seconds, study.seconds[reference])
            )
        if name in study.control:
            control = study.seconds[study.control[name]]
            middle, most, least = (1 - r for r in time_ratio(control, seconds))
            share = f"{middle:.1%} ({least:.1%} to {most:.1%})"
        if cells := [cell for cell in study.cells if cell["arm"] == name]:
            parameters = f"{cells[0]['parameters']:,}"
            memory = f"{max(cell['peak_memory_mb'] for cell in cells):,.0f}"
        times = [f"{median:.2f}", f"{low:.2f} to {high:.2f}", f"{tokens:,.0f}"]
        rows.append([f"`{name}`", parameters, *times, ratio, share, memory])
    return markdown_table(head, rows) + (
        "\n\nWhole training steps, all arms in turn, forwards and backwards: a machine whose speed "
        f"drifts drifts for all. Intervals are Student's over {len(study.seconds[reference])} "
        "processes, each of which gives the median of its rounds: rounds of one process are not "
        "independent. The share of the norms is what a step without any saves; that control is for "
        "timing only. Peak memory is that of a cell: its tensors on CUDA, else the whole process."
    )


def rates_section(study: Study) -> str:
    rates = sorted({cell["learning_rate"] for cell in study.cells})
    rows = []
    for arm in study.arms:
        best, texts, diverged_at = best_cells(study.cells, arm), [], "-"
        for rate, cells in by_rate(study.cells, arm).items():
            text = f"{mean_loss_of(cells):.4f}"
            if lost := sum(cell["diverged"] for cell in cells):
                text = f"{lost} of {len(cells)} diverged"
                diverged_at = f"{rate:g}" if diverged_at == "-" else diverged_at
            texts.append(f"**{text}**" if cells == best and len(rates) > 1 else text)
        rows.append([f"`{arm}`", *texts, diverged_at])
    head = ["arm", *(f"{rate:g}" for rate in rates), "diverges from"]
    return markdown_table(head, rows) + (
        f"\n\nMean final validation loss in nats per token by learning rate"
        f"{', the best of an arm in bold' if len(rates) > 1 else ''}. Diverged: NaN, Inf or a "
        f"final validation loss above the first training loss.{differences_by_rate(study, rates)}"
    )


def differences_by_rate(study: Study, rates: list[float]) -> str:
    """A table of the paired differences at each learning rate, if there is more to it than the
    verdicts say; else ''."""
    reference, *others = study.arms
    if len(rates) == 1 or not others:
        return ""
    groups = {arm: by_rate(study.cells, arm) for arm in study.arms}
    rows = [[f"`{arm}`"] for arm in others]
    for rate in rates:
        losses = {arm: by_seed(groups[arm][rate]) for arm in study.arms}
        found = judge(losses.pop(reference), losses)
        for row, d in zip(rows, found.values(), strict=True):
            mean, interval, *_ = difference_columns(d, 0)
            row.append(mean if interval == "-" else f"{mean} ({interval})")
    table = markdown_table([f"less `{reference}`", *(f"{rate:g}" for rate in rates)], rows)
    return (
        f"\n\n{table}\n\nPaired differences at each learning rate, the same for both arms. Each "
        f"95% interval is for itself: of twenty, one may miss by chance."
    )


def rate_notes(study: Study) -> list[str]:
    """What the choice of learning rates leaves open, and a line for each arm whose best one is the
    lowest or the highest that was tried."""
    rates = sorted({cell["learning_rate"] for cell in study.cells})
    if len(rates) == 1:
        return ["One learning rate was tried: an arm that is worse at it may be better at another."]
    notes = [
        "The best learning rate was chosen on the same seeds and the same validation text that are "
        "reported."
    ]
    for arm in study.arms:
        best = best_cells(study.cells, arm)
        if best and best[0]["learning_rate"] in (rates[0], rates[-1]):
            notes.append(
                f"`{arm}` is best at {best[0]['learning_rate']:g}, at an end of the sweep: a wider "
                f"one may favour it more."
            )
    return notes


# -- The plots -------------------------------------------------------------------------------------


def draw_plots(study: Study) -> list[str]:
    """Draws the plots and returns their names. Where matplotlib is not installed, there are none,
    and a line says so."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError:
        print("the report has no plots, for matplotlib is not installed: pip install -e '.[plot]'")
        return []
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(study.arms)}
    one_rate = len(by_rate(study.cells, study.arms[0])) == 1
    empty = {"learning_rate": one_rate, "differences": not forest_rows(study)}
    empty["quantized"] = not study.kinds
    drawn = [name for name in PLOTS if not empty.get(name)]
    for name in drawn:
        figure = Figure(figsize=(10, 4), layout="constrained")
        PLOTS[name](study, figure, colours)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
        for suffix in SUFFIXES:
            save_figure(figure, study.folder / f"{name}{suffix}")
    return drawn


def forest_rows(study: Study) -> list[tuple[str, str, Difference]]:
    """(arm, what is drawn, difference) of every difference that has an interval."""
    at_steps, at_time = verdicts(study)
    rows = []
    for arm in study.arms[1:]:
        rows.append((arm, arm, at_steps[arm]))
        if arm in at_time:
            rows.append((arm, f"{arm}, equal wall-clock", at_time[arm]))
    if study.square:
        rows.append(("", "interaction", interaction_of(study)))
    return [row for row in rows if not math.isnan(row[2].p)]


def plot_differences(study: Study, figure: Any, colours: dict[str, str]) -> None:
    """A forest plot: differences from the reference with 95% intervals, the margin as a band."""
    axes = figure.add_subplot(xlabel="nats per token less the reference's, 95% interval")
    band = f"; grey: within {study.margin:g}" if study.margin else ""
    axes.set_title(f"reference: {plot_label(study.arms[0])}; to the left is better{band}")
    axes.axvline(0, color="#222222", linewidth=1)
    if study.margin:
        axes.axvspan(-study.margin, study.margin, color="#bbbbbb", alpha=0.4, linewidth=0)
    rows = forest_rows(study)
    for i, (arm, _, d) in enumerate(rows):
        reach = [[d.mean - d.low], [d.high - d.mean]]
        axes.errorbar(d.mean, i, xerr=reach, fmt="o", capsize=3, color=colours.get(arm, "#222222"))
    axes.set_yticks(range(len(rows)), [plot_label(name) for _, name, _ in rows])
    axes.invert_yaxis()
    axes.margins(y=0.2)


def loss_curve(folder: Path, cells: Cells, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [N], losses [seeds, N]) at the steps of which all cells have a record. Training
    losses, key='loss', are smoothed by a running mean."""
    records = [
        {r["step"]: r[key] for r in read_metrics(folder / "cells" / cell["cell"]) if key in r}
        for cell in cells
    ]
    steps = sorted(set.intersection(*map(set, records)))
    if not steps:
        return np.empty(0), np.empty((len(cells), 0))
    width = max(1, len(steps) // 25) if key == "loss" else 1
    window = np.ones(width) / width
    losses = [np.convolve([own[step] for step in steps], window, "valid") for own in records]
    return np.array(steps[width - 1 :]), np.array(losses)


def plot_loss_curves(study: Study, figure: Any, colours: dict[str, str]) -> None:
    """On the left the losses; on the right the training loss of each arm less the reference's, on
    the same batches."""
    left, right = figure.subplots(1, 2)
    left.set(xlabel="step", ylabel="loss (nats per token)")
    left.set_title("lines: training, points: validation")
    right.set(xlabel="step", ylabel="nats per token", title="training loss minus the reference's")

    def draw_line(axes: Any, arm: str, x: np.ndarray, y: np.ndarray) -> None:
        axes.plot(x, y.mean(0), color=colours[arm], linewidth=1.2, label=plot_label(arm))
        axes.fill_between(x, y.min(0), y.max(0), color=colours[arm], alpha=0.15, linewidth=0)

    base = None
    for arm in study.arms:
        cells = best_cells(study.cells, arm)
        if not cells:
            continue
        points, values = loss_curve(study.folder, cells, "val_loss")
        left.plot(points, values.mean(0), "o", color=colours[arm], markersize=4)
        steps, losses = loss_curve(study.folder, cells, "loss")
        draw_line(left, arm, steps, losses)
        if arm == study.arms[0]:
            base = (steps, losses)
        if base is not None:
            common, here, there = np.intersect1d(steps, base[0], return_indices=True)
            draw_line(right, arm, common, losses[:, here] - base[1][:, there])
    lines, names = left.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right upper", title="mean, and\nrange over seeds")


def plot_learning_rates(study: Study, figure: Any, colours: dict[str, str]) -> None:
    """Mean and range over seeds by learning rate; where a seed diverged, a cross at the top."""
    axes = figure.add_subplot(xscale="log", xlabel="learning rate")
    axes.set_ylabel("final validation loss (nats per token)")
    for i, arm in enumerate(study.arms):
        groups = by_rate(study.cells, arm)
        losses = {rate: np.array(list(by_seed(cells).values())) for rate, cells in groups.items()}
        # Each arm is moved a little to the side, so that no arm hides another one.
        aside = (max(losses) / min(losses)) ** (0.006 * (i - len(study.arms) / 2))
        sound = {rate * aside: y for rate, y in losses.items() if np.isfinite(y).all()}
        means = [y.mean() for y in sound.values()]
        reach = [[y.mean() - y.min() for y in sound.values()]]
        reach += [[y.max() - y.mean() for y in sound.values()]]
        style = dict(color=colours[arm], marker="o", markersize=4, linewidth=1.2, capsize=3)
        axes.errorbar(list(sound), means, reach, label=plot_label(arm), **style)
        lost = [rate * aside for rate, y in losses.items() if not np.isfinite(y).all()]
        top = axes.get_xaxis_transform()
        axes.plot(lost, [0.98] * len(lost), "x", color=colours[arm], transform=top)
    axes.set_xticks(list(losses), [f"{rate:g}" for rate in losses], minor=False)
    axes.set_xticks([], minor=True)
    title = "mean, and range\nover seeds;\nx: a seed diverged"
    figure.legend(loc="outside right upper", title=title)


def plot_step_times(study: Study, figure: Any, colours: dict[str, str]) -> None:
    """Median step time with quartiles, the reference on top and the controls below."""
    axes = figure.add_subplot(xlabel="time per training step (ms): median and quartiles")
    for name, seconds in study.seconds.items():
        low, median, high = 1000 * np.quantile(np.ravel(seconds), (0.25, 0.5, 0.75))
        colour, reach = colours.get(name, "#bbbbbb"), [[median - low], [high - median]]
        bar = dict(xerr=reach, color=colour, alpha=0.8, height=0.6, capsize=3)
        axes.barh(plot_label(name), median, **bar)
        axes.text(high, plot_label(name), f"  {median:.2f}", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.1)


def plot_quantized(study: Study, figure: Any, colours: dict[str, str]) -> None:
    """What each kind of rounding adds to the loss of each arm, by seed, and the mean of these."""
    axes = figure.add_subplot(ylabel="nats per token that rounding adds")
    axes.set_yscale("symlog", linthresh=1e-3)  # some kinds add a thousand times as much as others
    axes.axhline(0, color="#222222", linewidth=1)
    for i, arm in enumerate(study.arms):
        aside = 0.6 * ((i + 0.5) / len(study.arms) - 0.5)
        for x, kind in enumerate(study.kinds):
            y = list(added_by_seed(study, arm, kind).values())
            if y:
                axes.plot([x + aside] * len(y), y, ".", color=colours[arm], alpha=0.4)
                axes.plot(x + aside, np.mean(y), "D", color=colours[arm], markersize=5)
        axes.plot([], [], "D", color=colours[arm], label=plot_label(arm))
    axes.set_xticks(range(len(study.kinds)), study.kinds)
    figure.legend(loc="outside right upper", title="mean, and\nevery seed")


PLOTS = {
    "differences": plot_differences,
    "loss_curves": plot_loss_curves,
    "step_time": plot_step_times,
    "learning_rate": plot_learning_rates,
    "quantized": plot_quantized,
}
WRITTEN = ("report.md", *(name + suffix for name in PLOTS for suffix in SUFFIXES))
