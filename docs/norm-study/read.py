"""What docs/norms.md says of the study beyond its reports, from the files beside this one.

    python docs/norm-study/read.py

prints each of these figures as the page has it, and draws the pictures beside it.
tests/test_study.py checks that the page has them.

Order: the files; how a figure is written; the experiments, in the order of the page; the pictures;
main.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import correlation, mean
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from lab.report import best_cells, by_rate, by_seed, mean_loss_of
from lab.timing import read_timing
from lab.verdict import Estimate, estimate, interval, time_ratio
from run.metrics import save_figure

HERE = Path(__file__).parent
Cells = list[dict[str, Any]]
Facts = Iterator[tuple[str, str]]  # what it is, and how the page has it
Share = tuple[float, float, float]  # of the norms in a step, and its 95% interval

OPTIMIZERS = ("muon", "adamw")
KINDS = ("int8", "int4", "int4g32", "w4a4", "ternary")
FFNS = ("gelu", "swiglu")
STEPS_OF_E2 = (10, 100, 300)
DEPTHS = (2, 4, 8, 16, 32)
PLACES = ("pre", "lns", "post", "deepnorm", "out", "sandwich")
RATES = (1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2)
UNIGRAM = 3.10  # nats per byte: the loss of who knows how often each byte comes, and nothing more
SCALED = ("pre", "out", "sandwich")  # the places that were tried with embed_scale=sqrt, too
LABELS = {  # of what `watch` saw
    "residual_rms": "RMS of\nthe stream",
    "residual_mean_share": "share of the mean\nin the stream",
    "ffn_rms": "RMS of what\ndown reads",
    "ffn_out_sd": "sd of what the\nfeed-forwards write",
    "attn_logit_max": "largest\n|attention logit|",
    "blocks_grad_norm": "gradient norm",
}
LINEAR = ("residual_mean_share",)  # the others are drawn by their logarithm
WIDTHS = (64, 128, 256)


# -- The files -------------------------------------------------------------------------------------


def cells_of(study: str) -> Cells:
    """Every cell of a comparison."""
    with open(HERE / study / "results.jsonl") as file:
        return [json.loads(line) for line in file]


def watch_by_step(study: str) -> dict[str, dict[int, dict[str, list[float]]]]:
    """Cell -> step -> what `watch` saw there, layer by layer."""
    found: dict[str, dict[int, dict[str, list[float]]]] = {}
    with gzip.open(HERE / study / "metrics.jsonl.gz", "rt") as file:
        for record in map(json.loads, file):
            if "watch" in record:
                found.setdefault(record["cell"], {})[record["step"]] = record["watch"]
    return found


def shares_of_norms(study: str) -> dict[str, Share]:
    """Arm -> the share of its norms in a step: what a step without any saves."""
    seconds = read_timing(HERE / study / "timing.json")["seconds"]
    without = seconds.pop("no norm")
    shares = {}
    for arm, times in seconds.items():
        middle, most, least = (1 - ratio for ratio in time_ratio(without, times))
        shares[arm] = middle, least, most
    return shares


# -- How a figure is written -----------------------------------------------------------------------


def losses(cells: Cells, arm: str) -> list[float]:
    """Of the arm at its best rate, seed by seed."""
    own = by_seed(best_cells(cells, arm))
    return [own[seed] for seed in sorted(own)]


def less(cells: Cells, arm: str, reference: str) -> list[float]:
    """The arm's losses less those of the reference, seed by seed."""
    return subtract(losses(cells, arm), losses(cells, reference))


def subtract(values: list[float], others: list[float]) -> list[float]:
    return [a - b for a, b in zip(values, others, strict=True)]


def ranks(values: list[float]) -> list[int]:
    return [sorted(values).index(value) for value in values]


def text_of(found: Estimate, form: str = "+.4f") -> str:
    """The mean and its 95% interval."""
    low, high = interval(found)
    return f"{found.mean:{form}} ({low:{form}} to {high:{form}})"


def signed(values: list[float]) -> str:
    return text_of(estimate(values))


def ratio_of(seconds: dict[str, list[list[float]]], one: str, other: str) -> str:
    """The time of a step with one arm over that with another, and its 95% interval."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*time_ratio(seconds[one], seconds[other]))


def unsigned(values: list[float], digits: int = 4) -> str:
    """The same where a sentence tells the direction."""
    sign = 1 if mean(values) > 0 else -1
    return text_of(estimate([sign * value for value in values]), f".{digits}f")


# -- The experiments -------------------------------------------------------------------------------


def each_norm_at_its_rate() -> Facts:
    """E1."""
    ahead = {}
    for optimizer in OPTIMIZERS:
        cells = cells_of(f"e1-{optimizer}")
        yield f"rmsnorm, {optimizer}", f"{mean(losses(cells, 'rmsnorm')):.4f}"
        for norm in ("layernorm", "layernorm_nobias", "rmsnorm_noparam"):
            yield f"{norm}, {optimizer}", signed(less(cells, norm, "rmsnorm"))
        bias = less(cells, "layernorm", "layernorm_nobias")
        yield (
            f"layernorm less layernorm_nobias, {optimizer}",
            (unsigned(bias) if optimizer == "muon" else signed(bias)),
        )
        ahead[optimizer] = less(cells, "layernorm", "rmsnorm")
    yield "muon less adamw", unsigned(subtract(ahead["muon"], ahead["adamw"]))


def the_mean() -> Facts:
    """E2: losses, and the share of the mean in the stream after the last Block."""
    first = "rmsnorm, centred_writers=false"
    for optimizer in OPTIMIZERS:
        cells, watch = cells_of(f"e2-{optimizer}"), watch_by_step(f"e2-{optimizer}")
        for norm, centred in product(("rmsnorm", "layernorm_nobias"), ("false", "true")):
            arm = f"{norm}, centred_writers={centred}"
            if arm != first:
                yield f"{arm}, {optimizer}", signed(less(cells, arm, first))
            seen = [watch[cell["cell"]] for cell in best_cells(cells, arm)]
            shares = [
                mean(s[step]["residual_mean_share"][-1] for s in seen) for step in STEPS_OF_E2
            ]
            form = ".2f" if norm == "rmsnorm" else ".3f"
            text = ", ".join(f"{share:{form}}" for share in shares)
            if centred == "true":  # nothing but rounding
                text = f"{max(shares):.0e}".replace("e-0", "e-")
            yield f"its share of the mean, {arm}, {optimizer}", text
    both = less(cells_of("e1-muon"), "layernorm_nobias", "rmsnorm")
    both += less(cells_of("e2-muon"), "layernorm_nobias, centred_writers=false", first)
    yield "layernorm_nobias, with the seeds of E1", signed(both)


def quantised() -> Facts:
    """E3: what rounding adds to the loss, and the kurtosis of what `down` reads."""
    norms = ("rmsnorm", "layernorm", "ssnorm")
    added: dict[tuple[str, str], Cells] = {}
    for optimizer in OPTIMIZERS:
        cells, watch = cells_of(f"e3-{optimizer}"), watch_by_step(f"e3-{optimizer}")
        added[optimizer, "none"] = cells
        for kind in KINDS:
            added[optimizer, kind] = [
                cell | {"val_loss": cell["quantized"][kind] - cell["quantized"]["none"]}
                for cell in cells
            ]
        kurtosis = {name: max(steps[max(steps)]["ffn_kurtosis"]) for name, steps in watch.items()}
        for norm, ffn in product(norms, FFNS):
            arm = f"{norm}, {ffn}"
            row = [f"`{norm}` `{ffn}`", f"{mean(losses(cells, arm)):.4f}"]
            for kind in KINDS:
                form = "+.2f" if kind == "ternary" else "+.4f"
                row.append(f"{mean(losses(added[optimizer, kind], arm)):{form}}")
            row.append(f"{mean(kurtosis[cell['cell']] for cell in best_cells(cells, arm)):.0f}")
            yield f"row, {optimizer}", " | ".join(row)
        for ffn in FFNS:
            own = [cell for cell in added[optimizer, "w4a4"] if ffn in cell["arm"]]
            both = [kurtosis[cell["cell"]] for cell in own], [cell["val_loss"] for cell in own]
            found = correlation(*(ranks(values) for values in both))
            yield f"rank correlation with w4a4, {ffn}, {optimizer}", f"{found:.2f}"

    for optimizer, kind, digits in (
        ("muon", "int4", 4),
        ("muon", "w4a4", 4),
        ("adamw", "int4", 4),
        ("adamw", "w4a4", 4),
        ("adamw", "none", 3),
    ):
        cells = added[optimizer, kind]
        of_norms = [less(cells, f"{norm}, gelu", f"{norm}, swiglu") for norm in norms]
        of_seeds = [mean(of_seed) for of_seed in zip(*of_norms, strict=True)]
        yield f"gelu less swiglu, {kind}, {optimizer}", unsigned(of_seeds, digits)
    for optimizer in OPTIMIZERS:
        apart = less(added[optimizer, "w4a4"], "ssnorm, gelu", "ssnorm, swiglu")
        yield f"the same beside ssnorm, {optimizer}", signed(apart)
    for optimizer, kind, norm, ffn, digits in (
        ("adamw", "w4a4", "ssnorm", "gelu", 4),
        ("muon", "ternary", "ssnorm", "swiglu", 2),
        ("adamw", "none", "layernorm", "swiglu", 3),
    ):
        apart = less(added[optimizer, kind], f"{norm}, {ffn}", f"rmsnorm, {ffn}")
        yield f"{norm} less rmsnorm, {ffn}, {kind}, {optimizer}", unsigned(apart, digits)


def inside_the_feed_forward() -> Facts:
    """What `watch` saw at the end of E3: the smallest and the largest of the Blocks, each of which
    is a mean over seeds."""
    arms = [f"{norm}, {ffn}" for norm, ffn in product(("layernorm", "rmsnorm"), FFNS)]
    for optimizer in OPTIMIZERS:
        cells, watch = cells_of(f"e3-{optimizer}"), watch_by_step(f"e3-{optimizer}")
        for what, key, over, form in (
            ("reads", "ffn_in_mean_rms", "ffn_in_sd", ".2f"),
            ("closed", "ffn_gate_closed", None, ".0%"),
            ("open", "ffn_gate_open", None, ".1%"),
            ("kurtosis", "ffn_kurtosis", None, ".0f"),
            ("writes", "ffn_out_mean", "ffn_out_sd", ".3f"),
        ):
            row = []
            for arm in arms:
                seeds = [watch[cell["cell"]][600] for cell in cells if cell["arm"] == arm]
                values = [np.divide(seed[key], seed[over] if over else 1) for seed in seeds]
                blocks = np.abs(values).mean(0)
                row.append(f"{min(blocks):{form}} to {max(blocks):{form}}")
            yield f"{what}, {optimizer}", " | ".join(row)


def norm_and_feed_forward() -> Facts:
    """The losses of E3 before any rounding, which were not planned to be read."""
    for optimizer in OPTIMIZERS:
        cells = cells_of(f"e3-{optimizer}")
        for norm in ("layernorm", "rmsnorm"):
            pair = [f"{norm}, {ffn}" for ffn in FFNS]
            row = [f"{mean(losses(cells, arm)):.4f}" for arm in pair]
            row.append(signed(less(cells, *reversed(pair))))
            yield f"{norm}, {optimizer}", " | ".join(row)
        apart = [less(cells, f"rmsnorm, {ffn}", f"layernorm, {ffn}") for ffn in FFNS]
        yield f"rmsnorm less layernorm, {optimizer}", " | ".join(signed(each) for each in apart)
        yield f"interaction, {optimizer}", signed(subtract(*reversed(apart)))


def what_the_loss_hides() -> Facts:
    """E7: less in the feed-forward, or a norm too many: losses, and what `watch` saw."""
    cells, watch = cells_of("e7-silent"), watch_by_step("e7-silent")
    arms = ("n_hidden=192, pre", "n_hidden=96, pre", "n_hidden=192, sandwich")
    for arm in arms:
        own = [watch[cell["cell"]] for cell in best_cells(cells, arm)]
        yield f"{arm}, loss", f"{mean(losses(cells, arm)):.3f}"
        if arm != arms[0]:
            yield f"{arm}, less the first", signed(less(cells, arm, arms[0]))
        written = [
            mean(of_seeds) for of_seeds in zip(*(s[300]["ffn_out_sd"] for s in own), strict=True)
        ]
        yield f"{arm}, writes", ", ".join(f"{x:.1f}" for x in written)
        first = [seed[300]["ffn_out_sd"][0] for seed in own]
        yield f"{arm}, the first of them", f"{min(first):.1f} to {max(first):.1f}"
        yield f"{arm}, stream at step 1", f"{mean(seed[1]['residual_rms'][1] for seed in own):.2g}"


def to_the_end() -> Facts:
    """E6."""
    for optimizer in OPTIMIZERS:
        faded = less(cells_of(f"e6-{optimizer}"), "tapernorm", "rmsnorm")
        yield f"tapernorm, {optimizer}", signed(faded)
    yield "final, adamw", signed(less(cells_of("e6-adamw-final"), "final", "pre"))


def warm_up_and_place() -> Facts:
    """E7: the loss of each place with and without warm-up; where `post` learned nothing, what the
    feed-forwards write at the end, from the least to the most over Blocks and seeds."""
    cells = cells_of("e7-place")
    for place, warmup in product(("post", "pre"), (0, 100)):
        rates = by_rate(cells, f"{place}, warmup_iters={warmup}").values()
        row = []
        for own in rates:
            of_seeds = sorted(cell["val_loss"] for cell in own)
            row.append(f"{mean_loss_of(own):.2f} ({of_seeds[0]:.2f} to {of_seeds[-1]:.2f})")
        yield f"{place}, warm-up {warmup}", " | ".join(row)
    cells, watch = cells_of("e7-post"), watch_by_step("e7-post")
    for place in ("post", "pre"):
        own = best_cells(cells, place)
        yield f"{place}, loss", f"{mean_loss_of(own):.2f}"
        written = [x for cell in own for x in watch[cell["cell"]][300]["ffn_out_sd"]]
        yield f"{place}, writes", f"{min(written):.1f} to {max(written):.0f}"


def an_instability() -> Facts:
    """E7: at ten times the best rate, without warm-up."""
    cells, watch = cells_of("e7-rate"), watch_by_step("e7-rate")
    for arm in ("qk_norm=false", "qk_norm=true"):
        yield f"{arm}, loss", f"{mean(losses(cells, arm)):.3f}"
        seen = [watch[cell["cell"]] for cell in best_cells(cells, arm)]
        for what, key, over in (("logit", "attn_logit_max", max), ("stream", "residual_rms", max)):
            most = [max(over(values[key]) for values in steps.values()) for steps in seen]
            yield f"{arm}, {what}", f"{min(most):,.0f} to {max(most):,.0f}"
    yield "qk_norm=true less false", unsigned(less(cells, "qk_norm=true", "qk_norm=false"), 3)


def what_grows_first() -> Facts:
    """E7: the first Block at the first steps, means over seeds."""
    cells, watch = cells_of("e7-first"), watch_by_step("e7-first")
    for key, layer in (("ffn_out_sd", 0), ("residual_rms", 1), ("attn_logit_max", 0)):
        for warmup, rate in ((0, 6e-2), (40, 6e-2), (0, 6e-3)):
            own = by_rate(cells, f"warmup_iters={warmup}")[rate]
            row = [
                mean(watch[cell["cell"]][step][key][layer] for cell in own)
                for step in (2, 4, 8, 28, 60)
            ]
            text = " | ".join(f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in row)
            yield f"{key}, warm-up {warmup}, rate {rate:g}", text


def depth_and_place() -> Facts:
    """E4: the loss at the best rate, and the largest rate at which both seeds learned more than how
    often each byte comes."""
    for scaled, places in (("", PLACES), ("scaled-", SCALED)):
        of_depths = [cells_of(f"e4-{scaled}{depth}") for depth in DEPTHS]
        for place in places:
            row = [f"`{place}`, scaled" if scaled else f"`{place}`"]
            for cells in of_depths:
                largest = max(
                    rate
                    for rate, own in by_rate(cells, place).items()
                    if all(cell["val_loss"] < UNIGRAM - 0.1 for cell in own)
                )
                rate = f"{largest:.1e}".replace("e-0", "e-")
                row.append(f"{mean(losses(cells, place)):.3f} ({rate})")
            yield "loss by depth", " | ".join(row)


def the_others() -> Facts:
    """E8: the mean loss at each rate, and the best less that of `rmsnorm`."""
    cells = cells_of("e8-muon")
    for norm in dict.fromkeys(cell["arm"] for cell in cells):
        best = best_cells(cells, norm)
        row = [
            f"{mean_loss_of(own):.3f}" if np.isfinite(mean_loss_of(own)) else "diverged"
            for own in by_rate(cells, norm).values()
        ]
        away = mean_loss_of(best) - mean_loss_of(best_cells(cells, "rmsnorm"))
        yield f"best of {norm}", f"{away:+.3f}"
        yield "losses by rate", " | ".join([f"`{norm}`", *row])


def cost_by_width() -> Facts:
    """E5: the share of all norms in a step, and what the hypothesis, a + b / width, says of the
    widest from the two narrower ones."""
    shares = [shares_of_norms(f"e5-{width}") for width in WIDTHS]
    for arm in shares[0]:
        of_widths = [of_width[arm] for of_width in shares]
        of_widths.insert(2, predicted_share(*of_widths[:2]))
        row = ["{:.1%} ({:.1%} to {:.1%})".format(*share) for share in of_widths]
        yield "share by width", " | ".join([f"`{arm}`", *row])


def predicted_share(narrow: Share, wide: Share) -> Share:
    """Of a model twice as wide as `wide`, which is twice as wide as `narrow`: the line through both
    shares over 1 / width gives 1.5 wide - 0.5 narrow there. The halves of the two intervals have
    the same factors, and their squares add up."""
    middle = 1.5 * wide[0] - 0.5 * narrow[0]
    reach = np.hypot(1.5 * (wide[2] - wide[1]) / 2, 0.5 * (narrow[2] - narrow[1]) / 2)
    return middle, middle - reach, middle + reach


def one_norm_beside_another() -> Facts:
    """E5: how long a step takes with the first, that with the second being 1, by width."""
    for one, other in (
        ("rmsnorm, eager", "layernorm, eager"),
        ("rmsnorm, fused", "layernorm, fused"),
        ("rmsnorm, compile", "rmsnorm, eager"),
        ("layernorm, compile", "layernorm, eager"),
    ):
        row = [f"`{one}` over `{other}`"]
        for width in WIDTHS:
            seconds = read_timing(HERE / f"e5-{width}" / "timing.json")["seconds"]
            row.append(ratio_of(seconds, one, other))
        yield "ratio by width", " | ".join(row)


def beside_the_paper() -> Facts:
    """E5: time of a step, that with LayerNorm being 1, and the share of RMSNorm in its own step."""
    for how, study, arm in (
        ("separate operations", "e5-paper-false", "{}"),
        ("PyTorch's kernels", "e5-128", "{}, fused"),
        ("compiled model", "e5-paper-true", "{}"),
    ):
        seconds = read_timing(HERE / study / "timing.json")["seconds"]
        for norm in ("rmsnorm", "prmsnorm"):
            if arm.format(norm) in seconds:
                both = arm.format(norm), arm.format("layernorm")
                yield f"{how}, {norm}", ratio_of(seconds, *both)
        share = shares_of_norms(study)[arm.format("rmsnorm")]
        yield f"{how}, share", "{:.1%} ({:.1%} to {:.1%})".format(*share)


# -- The pictures ----------------------------------------------------------------------------------


def draw_depths(figure: Figure) -> None:
    """E4: the mean loss of each place at each depth and rate. The colour is the difference from
    `pre` at its best rate, at the same depth."""
    table, names = [], []
    for scaled, places in (("", PLACES), ("scaled-", SCALED)):
        names += [f"{place}, scaled" if scaled else place for place in places]
        of_depths = [cells_of(f"e4-{scaled}{depth}") for depth in DEPTHS]
        for place in places:
            row = []
            for cells in of_depths:
                groups = by_rate(cells, place)
                row += [mean_loss_of(groups[rate]) for rate in RATES]
            table.append(row)
    loss = np.array(table)
    of_depth = loss.reshape(len(names), len(DEPTHS), len(RATES))
    reference = of_depth[0].min(axis=-1, keepdims=True)  # `pre`
    away = (of_depth - reference).reshape(loss.shape)
    axes = figure.add_subplot()
    image = axes.imshow(away, cmap="RdYlGn_r", vmin=-0.2, vmax=0.2, aspect="auto")
    for (i, j), value in np.ndenumerate(loss):
        best = value == of_depth[i, j // len(RATES)].min()
        weight = "bold" if best else "normal"
        ink = "white" if away[i, j] > 0.15 else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", size=7, weight=weight, color=ink)
    for edge in range(len(RATES), loss.shape[1], len(RATES)):
        axes.axvline(edge - 0.5, color="black", linewidth=1)
    axes.axhline(len(PLACES) - 0.5, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    ticks = [f"{rate:g}" for rate in RATES] * len(DEPTHS)
    axes.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=7)
    axes.set_xlabel("learning rate")
    top = axes.secondary_xaxis("top")
    middles = [(i + 0.5) * len(RATES) - 0.5 for i in range(len(DEPTHS))]
    top.set_xticks(middles, [f"{depth} Blocks" for depth in DEPTHS])
    top.tick_params(length=0)
    label = "nats per byte less the best of `pre`; bold: the best rate"
    figure.colorbar(image, label=label, extend="max")


def draw_widths(figure: Figure) -> None:
    """E5: the shares with their intervals, those of one width side by side; a cross is what was
    predicted of the widest."""
    shares = [shares_of_norms(f"e5-{width}") for width in WIDTHS]
    axes = figure.add_subplot(xlabel="width", ylabel="share of all norms in a step")
    axes.axhline(0, color="black", linewidth=1)
    for i, arm in enumerate(shares[0]):
        middle, low, high = np.transpose([of_width[arm] for of_width in shares])
        places = np.arange(len(WIDTHS)) + 0.1 * (i - 2.5)
        reach = [middle - low, high - middle]
        shown = axes.errorbar(places, middle, reach, fmt="o", capsize=3, markersize=4, label=arm)
        predicted = predicted_share(shares[0][arm], shares[1][arm])[0]
        axes.plot(places[-1], predicted, "x", color=shown[0].get_color())
    axes.set_xticks(range(len(WIDTHS)), [str(width) for width in WIDTHS])
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")


def draw_watched(
    figure: Figure, study: str, arms: dict[str, tuple[str, float]], keys: tuple[str, ...]
) -> None:
    """What `watch` saw in the first seed of these arms and rates: a column for each by its title, a
    row for each quantity, a line for each Block, dark for the lowest."""
    watch, found = watch_by_step(study), cells_of(study)
    first = min(cell["seed"] for cell in found)
    names = {(c["arm"], c["learning_rate"]): c["cell"] for c in found if c["seed"] == first}
    grid = figure.subplots(len(keys), len(arms), sharex=True, sharey="row", squeeze=False)
    for row, key in zip(grid, keys, strict=True):
        row[0].set(ylabel=LABELS[key], yscale="linear" if key in LINEAR else "log")
        for axes, arm in zip(row, arms.values(), strict=True):
            steps = sorted(watch[names[arm]])
            values = np.array([watch[names[arm]][step][key] for step in steps], dtype=float)
            for i, of_block in enumerate(values.T):
                shade = colormaps["plasma"](0.9 * i / max(1, len(values.T) - 1))
                axes.plot(steps, of_block, color=shade, linewidth=1)
            axes.grid(alpha=0.3)
    for axes, title in zip(grid[0], arms, strict=True):
        axes.set_title(title, fontsize="medium")
    for axes in grid[-1]:
        axes.set_xlabel("step")


def draw_the_two_norms(figure: Figure) -> None:
    """E3 under Muon."""
    arms = {norm: (f"{norm}, swiglu", 2.4e-2) for norm in ("rmsnorm", "layernorm")}
    keys = ("residual_rms", "residual_mean_share", "ffn_rms", "attn_logit_max", "blocks_grad_norm")
    draw_watched(figure, "e3-muon", arms, keys)


def draw_the_two_places(figure: Figure) -> None:
    """E7, where `post` learned nothing."""
    arms = {place: (place, 4.8e-2) for place in ("post", "pre")}
    draw_watched(figure, "e7-post", arms, ("ffn_out_sd", "blocks_grad_norm"))


def draw_an_instability(figure: Figure) -> None:
    """E7."""
    arms = {f"qk_norm={on}": (f"qk_norm={on}", 6e-2) for on in ("false", "true")}
    keys = ("attn_logit_max", "residual_rms", "blocks_grad_norm")
    draw_watched(figure, "e7-rate", arms, keys)


SECTIONS = {
    "E1": each_norm_at_its_rate,
    "E2": the_mean,
    "E3": quantised,
    "E3, watched": inside_the_feed_forward,
    "E3, float32": norm_and_feed_forward,
    "E7, place": warm_up_and_place,
    "E7, rate": an_instability,
    "E7, first": what_grows_first,
    "E7, silent": what_the_loss_hides,
    "E6": to_the_end,
    "E4": depth_and_place,
    "E8": the_others,
    "E5": cost_by_width,
    "E5, ratios": one_norm_beside_another,
    "E5, paper": beside_the_paper,
}


PICTURES = {  # name of the file, its size in inches, what draws it
    "depth.png": ((12, 4.5), draw_depths),
    "width.png": ((9, 4.5), draw_widths),
    "rmsnorm-and-layernorm.png": ((8, 9), draw_the_two_norms),
    "pre-and-post.png": ((8, 4.5), draw_the_two_places),
    "instability.png": ((8, 6), draw_an_instability),
}


def main() -> int:
    for experiment, section in SECTIONS.items():
        for what, text in section():
            print(f"{experiment}, {what}: {text}")
    for name, (size, draw) in PICTURES.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        save_figure(figure, HERE / name, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
