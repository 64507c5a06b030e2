"""What docs/norms.md says of the study beyond its reports, from the files beside this one.

    python docs/norm-study/read.py

prints each of these figures as the page has it.
tests/test_study.py checks that the page has them.

Order: the files; how a figure is written; the experiments, in the order of the page; main.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import correlation, mean
from typing import Any

from lab.report import best_cells, by_seed
from lab.verdict import Estimate, estimate, interval

HERE = Path(__file__).parent
Cells = list[dict[str, Any]]
Facts = Iterator[tuple[str, str]]  # what it is, and how the page has it

OPTIMIZERS = ("muon", "adamw")
KINDS = ("int8", "int4", "int4g32", "w4a4", "ternary")
STEPS_OF_E2 = (10, 100, 300)


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


def quantised() -> Facts:
    """E3: what rounding adds to the loss, and the kurtosis of what `down` reads."""
    norms, ffns = ("rmsnorm", "layernorm", "ssnorm"), ("gelu", "swiglu")
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
        for norm, ffn in product(norms, ffns):
            arm = f"{norm}, {ffn}"
            row = [f"`{norm}` `{ffn}`", f"{mean(losses(cells, arm)):.4f}"]
            for kind in KINDS:
                form = "+.2f" if kind == "ternary" else "+.4f"
                row.append(f"{mean(losses(added[optimizer, kind], arm)):{form}}")
            row.append(f"{mean(kurtosis[cell['cell']] for cell in best_cells(cells, arm)):.0f}")
            yield f"row, {optimizer}", " | ".join(row)
        for ffn in ffns:
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
    for optimizer, kind, norm, ffn, digits in (
        ("adamw", "w4a4", "ssnorm", "gelu", 4),
        ("muon", "ternary", "ssnorm", "swiglu", 2),
        ("adamw", "none", "layernorm", "swiglu", 3),
    ):
        apart = less(added[optimizer, kind], f"{norm}, {ffn}", f"rmsnorm, {ffn}")
        yield f"{norm} less rmsnorm, {ffn}, {kind}, {optimizer}", unsigned(apart, digits)


def to_the_end() -> Facts:
    """E6."""
    for optimizer in OPTIMIZERS:
        faded = less(cells_of(f"e6-{optimizer}"), "tapernorm", "rmsnorm")
        yield f"tapernorm, {optimizer}", signed(faded)
    yield "final, adamw", signed(less(cells_of("e6-adamw-final"), "final", "pre"))


SECTIONS = {
    "E1": each_norm_at_its_rate,
    "E2": the_mean,
    "E3": quantised,
    "E6": to_the_end,
}


def main() -> int:
    for experiment, section in SECTIONS.items():
        for what, text in section():
            print(f"{experiment}, {what}: {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
