"""The statistics against values known by hand or from tables, and the page that is made of them."""

import json
import math
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from pytest import approx

from lab.report import (
    Study,
    best_cells,
    draw_plots,
    forest_rows,
    plot_differences,
    plot_quantized,
    sentence,
    verdicts,
    verdicts_text,
    write_report,
)
from lab.verdict import (
    Difference,
    Estimate,
    detectable,
    doubt_about_time,
    equivalence_test,
    estimate,
    holm,
    interaction,
    interval,
    judge,
    log_ratio,
    paired_t_test,
    sum_of,
    t_inside,
    t_quantile,
    time_ratio,
)

# Student's own example of 1908: t = 4.0621, p = 0.002833
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


def test_quantiles_of_students_t_are_those_of_any_table():
    for p, by_df in {
        0.975: {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042},
        0.8: {1: 1.376, 4: 0.941, 9: 0.883},
        0.995: {5: 4.032},
        0.5: {7: 0.0},
    }.items():
        for df, t in by_df.items():
            assert t_quantile(p, df) == approx(t, abs=6e-4)


def test_student_t_has_its_closed_forms():
    assert t_inside(1, df=1) == approx(0.5)  # Cauchy: 2/pi arctan t
    assert t_inside(math.sqrt(2), df=2) == approx(math.sqrt(1 / 2))  # t / sqrt(2 + t^2)
    assert t_inside(1, df=3) == approx(2 / math.pi * (math.pi / 6 + math.sqrt(3) / 4))
    assert t_inside(2, df=4) == approx(math.sqrt(1 / 2) * 1.25)
    assert t_inside(1.959964, df=100_000) == approx(0.95, abs=1e-5)  # nearly normal
    assert t_inside(0, df=5) == 0


def test_paired_t_test_gives_students_own_example_and_is_certain_without_spread():
    assert paired_t_test(estimate(SLEEP)) == approx(0.002833, abs=1e-6)
    assert paired_t_test(estimate([-d for d in SLEEP])) == paired_t_test(estimate(SLEEP))
    assert paired_t_test(estimate([1.0, 3.0])) == approx(
        1 - 2 / math.pi * math.atan(2)
    )  # t = 2, df = 1
    assert (
        paired_t_test(estimate([0.0, 0.0, 0.0])) == 1
        and paired_t_test(estimate([0.5, 0.5, 0.5])) == 0
    )


def test_detectable_difference_by_hand():
    by_hand = (2.7764 + 0.9410) * math.sqrt(2.5) / math.sqrt(5)
    assert detectable(estimate([1.0, 2, 3, 4, 5])) == approx(by_hand, abs=1e-3)
    assert detectable(estimate([2.0, 4, 6, 8, 10])) == approx(
        2 * detectable(estimate([1.0, 2, 3, 4, 5]))
    )


def test_detectable_difference_is_found_four_times_in_five():
    """The formula takes the non-central t for a shifted one, which is a little cautious."""
    draws = np.random.default_rng(1).standard_normal((2000, 5)) + (2.7764 + 0.9410) / math.sqrt(5)
    assert np.mean([paired_t_test(estimate(row)) < 0.05 for row in draws]) == approx(0.8, abs=0.05)


def test_interval_gives_students_own_example_and_agrees_with_the_test():
    assert interval(estimate(SLEEP)) == approx((0.7001, 2.4599), abs=1e-4)
    assert interval(estimate([3.0, 3, 3])) == (3, 3)
    assert interval(estimate([-1.0, 1.0])) == approx((-12.706, 12.706), abs=1e-3)
    edge = SLEEP - np.array(interval(estimate(SLEEP))[0])  # so that 0 is just inside
    assert paired_t_test(estimate(edge)) == approx(0.05)


def test_interval_has_the_truth_in_95_of_100_studies_of_five_seeds():
    """A percentile bootstrap has it in 84."""
    studies = [
        interval(estimate(row)) for row in np.random.default_rng(1).standard_normal((2000, 5))
    ]
    assert np.mean([low <= 0 <= high for low, high in studies]) == approx(0.95, abs=0.015)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.7, "b": 0.6}) == {"b": 1, "a": 1}
    assert holm({"a": 0.02}) == {"a": 0.02} and holm({}) == {}


def test_equality_is_shown_where_a_90_percent_interval_is_within_the_margin():
    e = estimate(SLEEP)  # mean 1.58, t(0.95, df 9) = 1.8331
    edge = 1.58 + 1.8331 * e.error
    assert equivalence_test(e, edge) == approx(0.05, abs=1e-5)
    assert equivalence_test(e, 1.58) == approx(0.5) and equivalence_test(e, 1.0) > 0.5
    mirrored = estimate([-d for d in SLEEP])
    assert equivalence_test(mirrored, edge) == equivalence_test(e, edge)
    same = estimate([0.5, 0.5])
    assert (equivalence_test(same, 0.6), equivalence_test(same, 0.4)) == (0, 1)


def test_arms_at_the_margin_are_called_equal_in_5_of_100_studies():
    draws = 0.01 + 0.004 * np.random.default_rng(1).standard_normal((4000, 6))
    wrong = np.mean([equivalence_test(estimate(row), 0.01) < 0.05 for row in draws])
    assert wrong == approx(0.05, abs=0.015)


def test_the_error_of_a_sum_is_welchs():
    a, b = Estimate(1.0, 3.0, 4), Estimate(0.5, 4.0, 8)
    assert sum_of(a, b) == Estimate(1.5, 5.0, 11)  # 25^2 / (9^2 / 4 + 16^2 / 8) = 11.96
    assert sum_of(a, Estimate(0.0, 0.0, 2)) == a
    assert sum_of(Estimate(1.0, 2.0, 5), Estimate(0.0, 2.0, 5)).df == 10


def test_time_ratio_is_of_pairs_so_drift_cancels():
    reference = [[1.0, 2, 4], [8, 16, 32]]
    assert time_ratio([[1.5 * t for t in own] for own in reference], reference) == approx(
        (1.5,) * 3
    )
    outlier = [[9.0, *[1] * 9]] * 2
    assert time_ratio(outlier, [[1] * 10] * 2) == (1, 1, 1)  # a median does not see one outlier
    # Ratios 1 and 4: the mean logarithm is log 2, and so is its error.
    ratio = math.log(2)
    assert log_ratio([[1.0], [4]], [[1], [1]]) == Estimate(approx(ratio), approx(ratio), 1)
    found = time_ratio([[1.0], [4]], [[1], [1]])
    assert found == approx((2, 2 * 2**-12.7062, 2 * 2**12.7062), rel=1e-3)


def test_the_interval_of_a_ratio_is_over_processes_and_not_over_their_rounds():
    """Within a process all rounds agree; the processes do not."""
    draws = np.random.default_rng(1).standard_normal((1000, 5, 1))
    times = np.exp(0.01 * draws) * np.ones(30)
    found = [time_ratio(list(row), [[1.0] * 30] * 5) for row in times]
    assert np.mean([low <= 1 <= high for _, low, high in found]) == approx(0.95, abs=0.02)


def test_an_uncertain_ratio_widens_the_interval_at_equal_wall_clock():
    # 100 nats in 1000 steps less: 0.1 per step; 500 steps times an error of 0.002 is one step.
    doubt = doubt_about_time(Estimate(math.log(2), 0.002, 4), (1500, 500), (3.0, 103.0))
    assert (doubt.mean, doubt.error, doubt.df) == (0, approx(0.1), 4)
    arm = {"arm": shifted(0.1, 0.05, 0.15, 0.12, 0.08)}
    sure, unsure = (judge(BASE, arm, doubts=doubts)["arm"] for doubts in (None, {"arm": doubt}))
    assert unsure.mean == sure.mean and unsure.low < 0 < sure.low and unsure.p > sure.p
    assert (sure.verdict, unsure.verdict) == ("worse", "no difference detected")


BASE = {1: 3.0, 2: 3.1, 3: 2.9, 4: 3.05, 5: 2.95}
NOISE = (-0.1, 0.1, -0.05, 0.06, 0)


def shifted(*by):
    return {seed: loss + d for (seed, loss), d in zip(BASE.items(), by, strict=True)}


def test_judgement_of_arms():
    good = shifted(-0.10, -0.11, -0.09, -0.10, -0.10)
    bad = shifted(0.10, 0.11, 0.09, 0.10, 0.10)
    clear = judge(BASE, {"good": good, "bad": bad, "same": BASE, "noisy": shifted(*NOISE)})
    nothing = "no difference detected"
    assert [d.verdict for d in clear.values()] == ["better", "worse", nothing, nothing]
    lost = judge(BASE, {"lost": {1: 3.0, 2: math.inf}, "gone": {}})
    assert {d.verdict for d in lost.values()} == {"diverged"}
    d, same = clear["good"], clear["same"]
    assert d.mean == approx(-0.1) and d.low < -0.1 < d.high < 0
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_seeds_are_paired_whatever_their_order():
    backwards = dict(reversed(shifted(0.1, 0.1, 0.1, 0.1, 0.1).items()))
    found = judge(BASE, {"arm": backwards})["arm"]
    assert found.mean == approx(0.1) and found.high - found.low < 1e-9


def test_two_seeds_prove_little_and_one_seed_nothing():
    found = judge({1: 3.0, 2: 3.0}, {"arm": {1: 3.1, 2: 3.2}})["arm"]
    assert found.low < 0 and found.p > 0.05 and found.verdict == "no difference detected"
    found = judge({7: 3.0}, {"arm": {7: 3.5}})["arm"]
    assert (found.verdict, found.mean) == ("one seed", 0.5) and math.isnan(found.p)
    assert "no test is possible" in sentence("arm", "base", found)


def test_what_convinces_of_one_arm_is_not_enough_among_many():
    arm = {"arm": shifted(0.1, 0.05, 0.15, 0.12, 0.02)}
    assert judge(BASE, arm)["arm"].verdict == "worse"
    others = {f"other {i}": shifted(-0.1, 0.1, 0.05, -0.06, 0.01) for i in range(9)}
    found = judge(BASE, arm | others)["arm"]
    assert found.low > 0 and found.p > 0.05 and found.verdict == "not after correction"
    text = sentence("a", "b", found)
    assert text.startswith(
        "`a` is worse than `b` by 0.0880 nats per token if it is tested alone, but "
    )
    assert "**not after correction** for 10 comparisons (95% CI +" in text


def test_equality_is_a_verdict_of_its_own():
    near = judge(BASE, {"a": shifted(0.002, 0.003, 0.004, 0.003, 0.002)}, margin=0.01)["a"]
    text = sentence("a", "b", near, 0.01)
    assert near.verdict == "worse" and "**Equal within 0.01 nats** (p < 0.001)." in text
    far = judge(BASE, {"a": shifted(*NOISE)}, margin=0.01)["a"]
    text = sentence("a", "b", far, 0.01)
    assert text.startswith("**No difference") and "Not shown to be equal within 0.01 nats" in text
    assert "qual" not in sentence("a", "b", judge(BASE, {"a": shifted(*NOISE)})["a"])


def test_an_interaction_is_the_difference_of_two_differences_by_seed():
    a, b, c = shifted(1, 2, 3, 4, 5), BASE, shifted(0.1, 0.2, 0.1, 0.2, 0.1)
    found = interaction([a, b, c, b])
    values = [1 - 0.1, 2 - 0.2, 3 - 0.1, 4 - 0.2, 5 - 0.1]
    assert found.mean == approx(np.mean(values)) and found.verdict == "worse"
    assert (found.low, found.high) == approx(interval(estimate(values)))
    assert interaction([b, a, b, c]).mean == approx(-found.mean)
    assert interaction([a, b, a, b]).mean == 0
    for lost in ({}, BASE | {3: math.inf}):
        for i in range(4):
            assert interaction([*[a] * i, lost, *[a] * (3 - i)]).verdict == "diverged"


def test_a_sentence_names_the_direction_or_what_would_have_been_seen():
    found = Difference("better", -0.02, -0.03, -0.01, 0.002, 0.01)
    assert "`a` is **better** than `b` by 0.0200 nats per token" in sentence("a", "b", found)
    text = sentence("a", "b", judge(BASE, {"a": shifted(*NOISE)})["a"])
    assert text.startswith("**No difference detected** between `a` and `b`")
    assert f"a true difference of {detectable(estimate(NOISE)):.4f} would have been found" in text


# The page


def cell(arm, rate, seed, val_loss, steps=100):
    return {
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "val_loss": val_loss,
        "diverged": val_loss is None,
        "val_bpb": val_loss and val_loss / 4,
        "max_iters": steps,
        "parameters": 1000,
        "peak_memory_mb": 50.0 + seed,
        "cell": f"{arm}-{rate}-{seed}-{steps}",
    }


@pytest.fixture
def study(tmp_path):
    """study(field=...): rms is best at 2e-3 and loses a seed at 4e-3; layer is 0.1 worse, and
    slower by a quarter."""
    cells = []
    for seed, loss in BASE.items():
        for rate, more in ((1e-3, 0.2), (2e-3, 0), (4e-3, 0.3)):
            lost = (rate, seed) == (4e-3, 2)
            cells.append(cell("rms", rate, seed, None if lost else loss + more))
            cells.append(cell("layer", rate, seed, loss + more + 0.1 + seed / 1e4))
    slow = [cell("layer", 2e-3, seed, loss + 0.2 + seed / 1e4, 80) for seed, loss in BASE.items()]
    records = [{"step": s, "loss": 4 - s / 100} for s in (1, 10, 20)]
    records.append({"step": 20, "val_loss": 3.5})
    for one in cells + slow:
        file = tmp_path / "cells" / one["cell"] / "metrics.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in records))
    parts = dict(
        title="norms",
        folder=tmp_path,
        arms=["rms", "layer"],
        cells=cells,
        extra={"layer": slow},
        equal_time=True,
        control={"rms": "no norm", "layer": "no norm"},
        facts={"command": "`compare`"},
        seconds={
            "rms": [[0.010, 0.0112, 0.010]] * 2,
            "layer": [[0.0125, 0.014, 0.0125]] * 2,
            "no norm": [[0.009, 0.01008, 0.009]] * 2,
        },
        tokens={"rms": 500, "layer": 500, "no norm": 500},
        margin=0.0,
        square=[],
    )
    return lambda **changed: Study(**parts | changed)


@pytest.fixture
def undrawn_report(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def page(study):
    return (study.folder / "report.md").read_text()


def test_best_rate_has_the_lowest_mean_and_no_diverged_seed(study):
    assert {c["learning_rate"] for c in best_cells(study().cells, "rms")} == {2e-3}
    sound = [cell("a", 1e-3, 1, 3.0), cell("a", 1e-3, 2, 3.0)]
    lucky = [cell("a", 2e-3, 1, 1.0), cell("a", 2e-3, 2, None)]
    assert best_cells(sound + lucky, "a") == sound and best_cells(lucky, "a") == []


def test_both_verdicts_are_given_and_not_mixed(study):
    steps, wall_clock = verdicts(study())
    assert (steps["layer"].mean, wall_clock["layer"].mean) == approx((0.1003, 0.2003))
    at_steps, at_time = verdicts_text(study()).split("**At equal wall-clock**")
    assert at_steps.startswith("**At equal steps**")
    worse = "`layer` is **worse** than `rms` by 0.1003 nats per token"
    assert f"{worse} (95% CI +0.1001 to +0.1005, p < 0.001)" in at_steps
    slower = "takes 1.250 times `rms`'s time per step (95% CI 1.250 to 1.250)"
    assert f"{slower} and so gets 80 steps" in at_time
    assert "**worse** than `rms` by 0.2003" in at_time


def test_a_ratio_that_differs_by_process_widens_the_verdict_at_equal_wall_clock(study):
    processes = [[0.012], [0.013], [0.0125]]
    unsure = study(seconds=study().seconds | {"rms": [[0.01]] * 3, "layer": processes})
    sure, wide = verdicts(study())[1]["layer"], verdicts(unsure)[1]["layer"]
    assert wide.mean == sure.mean == approx(0.2003)
    # The arm loses 0.1 nats in 20 steps, and gets 80: 0.4 nats times the error of the log ratio.
    error = 0.4 * log_ratio(processes, [[0.01]] * 3).error
    assert wide.high - wide.mean == approx(t_quantile(0.975, 2) * error, rel=1e-3)


def test_at_the_same_speed_the_verdict_at_equal_steps_holds(study):
    alike = {"rms": [[1.0]] * 3, "layer": [[1.01], [0.99], [1.0]]}
    text = verdicts_text(study(extra={}, seconds=alike))
    assert "no difference in speed detected: the verdict at equal steps holds" in text
    assert "worth less than one step" in verdicts_text(study(extra={}))
    assert "not asked for" in verdicts_text(study(extra={}, equal_time=False))


def test_a_reference_that_diverged_everywhere_leaves_nothing_to_say(study):
    lost = {"diverged": True, "val_loss": None}
    cells = [c | lost if c["arm"] == "rms" else c for c in study().cells]
    text = write_report(study(cells=cells, extra={}))
    assert text.count("cannot be judged") == 2 and "| `rms` | - |" in page(study())


def test_an_arm_that_diverged_at_every_rate_shows_the_seeds_that_did_not(study, undrawn_report):
    found = [
        cell("layer", 2e-3, 1, None),
        cell("layer", 2e-3, 2, 3.5),
        cell("layer", 1e-3, 1, None),
    ]
    found += [cell("layer", 1e-3, 2, None), cell("rms", 1e-3, 1, 3.0), cell("rms", 1e-3, 2, 3.1)]
    found += [cell("rms", 2e-3, seed, 4.0) for seed in (1, 2)]
    write_report(study(arms=["rms", "layer"], cells=found, extra={}))
    table = page(study()).partition("## Loss of every seed")[2]
    assert "| 1 | 3.0000 | diverged |\n| 2 | 3.1000 | 3.5000 |" in table
    assert "at the rate where most of its seeds did not" in table
    write_report(study())
    assert "at the rate where most of its seeds did not" not in page(study())


def row_of(arm, text):
    return next(line for line in text.splitlines() if line.startswith(f"| `{arm}` | 0.002 |"))


def test_bits_per_byte_that_were_withheld_are_a_dash(study, undrawn_report):
    write_report(study())
    assert "| 0.7500 | - |" in row_of("rms", page(study()))
    write_report(study(cells=[c | {"val_bpb": None} for c in study().cells]))
    assert "| - | - |" in row_of("rms", page(study()))


def test_one_arm_is_a_sweep(study, undrawn_report):
    one = study(arms=["rms"], extra={})
    assert "Its best learning rate is 0.002: 3.0000 nats per token" in write_report(one)


ROWS = """
| `rms` | 0.002 | 100 | 3.0000 | 0.0791 | 0.7500 | - | - | - | - | reference |
| `layer` | 0.002 | 100 | 3.1003 | 0.0790 | 0.7751 | +0.1003 | +0.1001 to +0.1005 | < 0.001 | 0.0003 | worse |
| `layer` | 0.002 | 80 | 3.2003 | 0.0790 | 0.8001 | +0.2003 | +0.2001 to +0.2005 | < 0.001 | 0.0003 | worse |
| `rms` | 1,000 | 10.00 | 10.00 to 10.90 | 50,000 | 1 | 10.0% (10.0% to 10.0%) | 55 |
| `layer` | 1,000 | 12.50 | 12.50 to 13.62 | 40,000 | 1.250 (1.250 to 1.250) | 28.0% (28.0% to 28.0%) | 55 |
| `no norm` | - | 9.00 | 9.00 to 9.81 | 55,556 | 0.900 (0.900 to 0.900) | - | - |
| 1 | 3.0000 | 3.1001 | 3.2001 |
| 5 | 2.9500 | 3.0505 | 3.1505 |
| less `rms` | 0.001 | 0.002 | 0.004 |
| `layer` | +0.1003 (+0.1001 to +0.1005) | +0.1003 (+0.1001 to +0.1005) | - |
| `rms` | 3.2000 | **3.0000** | 1 of 5 diverged | 0.004 |
| `layer` | 3.3003 | **3.1003** | 3.4003 | - |
"""  # noqa: E501


def test_the_report_has_every_table_and_plot(study):
    assert write_report(study()) == verdicts_text(study())
    text = page(study())
    assert text.startswith("# norms\n\n**At equal steps**") and verdicts_text(study()) in text
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [
        "Quality at equal steps",
        "Quality at equal wall-clock",
        "Loss of every seed",
        "Speed",
        "Loss versus learning rate",
        "How it was made",
        "What to keep in mind",
    ]
    assert set(ROWS.split("\n")) <= set(text.splitlines())
    assert "- command: `compare`" in text
    for name in ("differences", "loss_curves", "learning_rate", "step_time"):
        assert f"]({name}.png)" in text
        assert (study().folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        drawing = (study().folder / f"{name}.pdf").read_bytes()
        assert drawing.startswith(b"%PDF") and b"Type3" not in drawing


def test_the_words_say_no_more_than_one_rate_can(study, undrawn_report):
    swept = write_report(study()) + page(study())
    assert "at its best learning rate" in swept and "the only one" not in swept
    assert "The best learning rate was chosen on the same seeds" in swept
    cells = [c for c in study().cells if c["learning_rate"] == 2e-3]
    one = write_report(study(cells=cells)) + page(study())
    assert "**At equal steps**, at learning rate 0.002, the only one tried:" in one
    assert "best" not in one and "| less `rms` | 0.002" not in one and "**3.0000**" not in one
    assert "One learning rate was tried: an arm that is worse at it may be better" in one
    alone = write_report(study(arms=["rms"], extra={}, cells=cells))
    assert "At learning rate 0.002, the only one tried: 3.0000 nats per token" in alone


def test_fewer_than_four_seeds_are_warned_of(study):
    for seeds, word in ((1, "1 seed:"), (3, "3 seeds:"), (4, "")):
        cells = [c for c in study().cells if c["seed"] <= seeds]
        text = verdicts_text(study(cells=cells, extra={}))
        assert text.startswith(f"**{word} too few to rely on.**" if word else "**At equal steps**")


def test_the_margin_has_a_column_and_a_sentence(study, undrawn_report):
    text = write_report(study(margin=0.2))
    assert text.count("**Equal within 0.2 nats** (p < 0.001).") == 1
    assert text.count("Not shown to be equal within 0.2 nats") == 1  # in equal time
    assert "| detectable | equal within 0.2 | verdict |" in page(study())
    assert "| 0.0003 | yes, p < 0.001 | worse |" in page(study())
    write_report(study())
    assert "equal within" not in page(study())


def test_a_forest_plot_has_a_row_for_each_interval(study):
    assert [name for _, name, _ in forest_rows(study())] == ["layer", "layer, equal wall-clock"]
    square = study(square=["rms", "layer", "layer", "rms"], extra={})
    assert [name for _, name, _ in forest_rows(square)] == ["layer", "interaction"]
    assert forest_rows(study(arms=["rms"], extra={})) == []
    few = [c for c in study().cells if c["seed"] == 1]
    assert forest_rows(study(cells=few, extra={})) == []


def test_the_margin_is_a_band_in_the_forest_plot(study):
    for margin, bands in ((0.0, []), (0.3, [(-0.3, 0.3)])):
        figure = Figure()
        plot_differences(study(margin=margin), figure, {"layer": "#0072b2"})
        (axes,) = figure.axes
        found = [(round(p.get_x(), 9), round(p.get_x() + p.get_width(), 9)) for p in axes.patches]
        assert found == bands


ROUNDED = """
| int4 | `rms` | 3.1000 | +0.1000 | +0.0804 to +0.1196 | - | - |
| int4 | `layer` | 3.4003 | +0.3000 | +0.3000 to +0.3000 | +0.2000 | +0.1804 to +0.2196 |
| w4a4 | `rms` | not finite | - | - | - | - |
| w4a4 | `layer` | 3.4003 | +0.3000 | +0.3000 to +0.3000 | - | - |
"""


def rounded(study):
    """int4 adds 0.08, 0.09 ... 0.12 to the seeds of rms and 0.3 to those of layer; w4a4 adds as
    much to layer, and makes rms NaN."""

    def with_rounding(cell):
        loss, rms = cell["val_loss"], cell["arm"] == "rms"
        if loss is None:
            return cell
        int4 = loss + (0.07 + 0.01 * cell["seed"] if rms else 0.3)
        losses = {"none": loss, "int4": int4, "w4a4": None if rms else int4}
        return cell | {"quantized": losses}

    return study(cells=[with_rounding(cell) for cell in study().cells], kinds=["int4", "w4a4"])


def test_what_rounding_adds_is_paired_with_the_loss_of_the_same_cell(study, undrawn_report):
    """To rms it adds 0.1 on average, with a standard error of 0.1 sqrt(0.0005), of which an
    interval reaches 2.776 to either side."""
    write_report(rounded(study))
    assert set(ROUNDED.split("\n")) <= set(page(study()).splitlines())


def test_what_rounding_adds_to_every_seed_is_drawn_above_the_name_of_its_kind(study, monkeypatch):
    monkeypatch.setattr("lab.report.save_figure", lambda figure, path: None)
    assert "quantized" in draw_plots(rounded(study)) and "quantized" not in draw_plots(study())
    figure = Figure()
    plot_quantized(rounded(study), figure, {"rms": "#0072b2", "layer": "#d55e00"})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["int4", "w4a4"]
    drawn = [
        (round(line.get_xdata()[0]), np.sort(line.get_ydata()).round(9).tolist())
        for line in axes.lines
        if line.get_marker() == "."
    ]
    assert drawn == [(0, [0.08, 0.09, 0.1, 0.11, 0.12]), (0, [0.3] * 5), (1, [0.3] * 5)]


def test_a_best_rate_at_an_end_of_the_sweep_is_told(study, undrawn_report):
    write_report(study(cells=[c for c in study().cells if c["learning_rate"] < 4e-3]))
    assert "`rms` is best at 0.002, at an end of the sweep" in page(study())
    write_report(study())
    assert "at an end of the sweep" not in page(study())


def test_without_matplotlib_the_report_has_no_plots_and_says_so(study, undrawn_report, capsys):
    write_report(study())
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert "](" not in page(study()) and not list(study().folder.glob("*.png"))


def test_a_report_cannot_command_a_terminal(study, undrawn_report):
    bad = "norms \x1b]52;c;eA==\x07\u202e"
    write_report(study(title=bad, facts={"command": bad}))
    assert page(study()).startswith("# norms ]52;c;eA==\n")
    assert not set(page(study())) & set("\x1b\x07\u202e")


def test_an_arm_between_dollars_is_drawn_to_the_letter(study):
    cells = [c | {"arm": "$x_{$"} if c["arm"] == "rms" else c for c in study().cells]
    seconds = {"$x_{$": [[0.01], [0.02]], "layer": [[0.01], [0.02]]}
    named = study(arms=["$x_{$", "layer"], cells=cells, seconds=seconds)
    assert draw_plots(named) == ["differences", "loss_curves", "step_time", "learning_rate"]
