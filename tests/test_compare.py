"""Comparisons from the command line to the report. Cells are trained in this process, except where
the processes are the point.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, launch_here, slow

import train
from lab import compare, timing
from lab.measure import as_arguments
from norm import NORMS as ENTRIES
from run.metrics import read_metrics
from weights import checkpoint
from weights.lock import Lock

elsewhere = timing.time_elsewhere  # which other tests replace
TINY = str(ROOT / "config" / "tiny.py")
KNOBS = dict(knob.split("=") for knob in SMALL)
KNOBS |= {"n_layer": "1", "max_iters": "4", "eval_interval": "0"}
del KNOBS["sample_tokens"]  # a cell prints no sample
NORMS = "norm=rmsnorm,layernorm"
BOTH = (NORMS, "equal_time=false")


def command_line(*arguments, base=KNOBS, preset=TINY):
    """The preset, then the knobs of base, then the arguments, of which later ones win."""
    places = [a for a in arguments if "=" not in a]
    pairs = dict(a.split("=", 1) for a in arguments if "=" in a)
    return [preset, *places, *as_arguments(base | pairs)]


def plan(*arguments):
    return compare.read_plan(command_line(*arguments))


def results(folder):
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rewrite_results(folder, change):
    """change(record) in place, for each line of results.jsonl."""
    records = results(folder)
    for record in records:
        change(record)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "results.jsonl").write_text(text)


def timed_at_once(command_lines, steps):
    """Stands for timing.time_elsewhere: each step of each arm took a hundredth of a second."""
    sizes = dict.fromkeys(command_lines, 8)
    return {"seconds": {arm: [0.01] * steps for arm in sizes}, "micro_batch_size": sizes}


@pytest.fixture
def timed_here(compared, monkeypatch):
    """Comparisons time steps after all, in this process."""
    monkeypatch.setattr(timing, "time_elsewhere", timing.time_arms)


@pytest.fixture
def compared(tmp_path, monkeypatch, data_folder, capsys):
    """compared('norm=rmsnorm,layernorm', ...) compares in tmp_path/lab: (exit code, stdout,
    stderr). compared.cells has the knobs of every cell started, compared.threads their threads."""

    def launch(command, threads):
        run.cells.append(dict(argument.split("=", 1) for argument in command[1:]))
        run.threads.append(threads)
        return launch_here(command, threads)

    def run(*arguments, **more):
        run.cells, run.threads = [], []
        try:
            here = f"out_dir={run.folder}"
            code = compare.main(command_line("steps=2", "processes=2", here, *arguments, **more))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    run.folder = tmp_path / "lab"
    # A comparison takes a data set by its name alone.
    monkeypatch.setattr("run.setup.DATA", data_folder)
    # A process for each cell would take seconds.
    monkeypatch.setattr(compare, "launch", launch)
    monkeypatch.setattr(timing, "time_elsewhere", timed_at_once)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # no plots, which take seconds too
    return run


# The plan


def test_the_grid_is_walked_forwards_and_backwards(compared):
    cells = compare.grid(plan(NORMS, "learning_rate=1e-3,2e-3", "seeds=3", "seed=5"))
    there = list(itertools.product(("rmsnorm", "layernorm"), (1e-3, 2e-3)))
    assert [(c.arm, c.config.learning_rate, c.config.seed) for c in cells] == [
        *((*a, 5) for a in there),
        *((*a, 6) for a in there[::-1]),
        *((*a, 7) for a in there),
    ]
    assert len({c.name for c in cells}) == 12


def test_arms_are_all_combinations_but_of_the_learning_rate():
    lists = (NORMS, "learning_rate=1e-3,2e-3", "dropout=0,0.1", "tie_embeddings=true,false")
    arms = plan(*lists).arms
    assert len(arms) == 8 and list(arms)[0] == "rmsnorm, dropout=0, tie_embeddings=true"
    knobs = {"norm": "layernorm", "dropout": "0.1", "tie_embeddings": "true"}
    assert arms["layernorm, dropout=0.1, tie_embeddings=true"] == knobs
    assert list(plan("learning_rate=1e-3,2e-3").arms) == ["tiny"]


def test_what_is_not_said_is_the_preset_and_five_seeds():
    with pytest.raises(ValueError, match="max_iters=0 would give each cell as many steps as its"):
        compare.read_plan([])  # config/small.py trains for some minutes
    found = compare.read_plan(["max_iters=100"])
    assert str(found.folder) == "out/compare-small"
    assert found.options.seeds == 5 and found.rates == ["0.006"]
    assert str(compare.read_plan([TINY]).folder) == "out/compare-tiny"


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(plan(NORMS, "out_dir=~/cmp").folder) == "/home/me/cmp"


@pytest.mark.parametrize("name, place", [("run-0.1", "run-0.1"), ("run", ".")])
def test_comparisons_that_begin_from_runs_have_a_folder_each(tmp_path, monkeypatch, name, place):
    (tmp_path / name).mkdir()
    config = compare.read_config([TINY]).flat() | {"data": {}}
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path / name if place == "." else tmp_path)
    assert str(compare.read_plan([place]).folder) == f"out/compare-{name}"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("watch", "one preset at most, got"),
        ("norm=rmsnorm,batchnorm", "norm must be "),
        ("norm=rmsnorm,", "norm must be "),
        ("norm=rmsnorm,rmsnorm", "norm=rmsnorm,rmsnorm has a value twice"),
        ("learning_rate=1e-3,0.001", "has a value twice"),
        ("learning_rate=1e-3,fast", "learning_rate must be a number, got 'fast'"),
        ("learing_rate=1,2", "did you mean learning_rate?"),
        ("seed=1,2", "seed=1,2 cannot be a list: it is the first seed, seeds=N says how many"),
        ("out_dir=a,b", "out_dir=a,b cannot be a list"),
        ("resume=auto", "which always goes on where it was stopped: leave it out"),
        ("branch=out/x", "branch is not for a comparison, whose cells begin at their first step"),
        ("keep=1", "keep is not for a comparison, whose weights are deleted"),
        ("seeds=-1", "seeds must be 0 or more"),
        ("steps=1", "steps must be 2 or more"),
        ("processes=1", "processes must be 2 or more"),
        ("margin=-0.01", "margin must be 0 or more"),
        ("jobs=x", "jobs must be a whole number"),
        ("equal_time=maybe", "equal_time must be true or false"),
        ("quantize=int8,int3", "quantize must be int8, int4, int4g32, w4a4 or ternary, got 'int3'"),
        ("quantize=int8 seeds=0", "quantize evaluates trained cells, and seeds=0 trains none"),
        ("n_head=1,3", "n_head=3, learning_rate=0.001, seed=1337: n_embd=32 must be a multiple"),
        ("norm=rmsnorm,none norm_pos=post", "none, learning_rate=0.001, seed=1337: norm=none has "),
        ("warmup_iters=2,5", "seed=1337: warmup_iters=5 must not be above"),
        ("vocab_size=0,10", "vocab_size=10: vocab_size=10 is below the 16 tokens"),
        ("dataset=gone", "no such data set"),
        ("dataset=a,b", "a,b: no such data set"),
        ("dataset=data/words", "dataset=data/words may change between two cells"),
        ("device=cuda:9", "is not on this machine"),
    ],
)
def test_a_bad_comparison_is_one_line_and_nothing_is_made(compared, tmp_path, arguments, words):
    code, out, err = compared(*arguments.split())
    assert code == 2 and compared.cells == [] and list(tmp_path.iterdir()) == []
    assert err.startswith("error: ") and words in err and err.count("\n") == 1 and out == ""


def test_list_tells_every_norm_in_a_line(capsys):
    assert compare.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ENTRIES)
    assert any(line.startswith("rmsnorm ") and "re-scales only" in line for line in lines)


def test_help_has_the_options_and_every_knob(capsys):
    assert compare.main(["--help"]) == 0
    out = capsys.readouterr().out
    names = ("seeds", "jobs", "steps", "processes", "margin", "equal_time", "quantize", "norm")
    names += ("learning_rate",)
    assert all(f"  {name}=" in out for name in names) and "python -m lab.compare" in out


# Cells


def test_a_comparison_trains_times_and_judges(compared):
    code, out, err = compared(*BOTH, "learning_rate=1e-3,1e-2", "seeds=2")
    assert code == 0 and err == ""
    pairs = list(itertools.product(("rmsnorm", "layernorm"), ("1e-3", "1e-2")))
    order = [(*pair, "1337") for pair in pairs] + [(*pair, "1338") for pair in pairs[::-1]]
    assert [(c["norm"], c["learning_rate"], c["seed"]) for c in compared.cells] == order
    own = {"norm", "learning_rate", "seed", "out_dir", "resume", "sample_tokens"}
    for cell in compared.cells:
        assert KNOBS.items() <= cell.items() and cell["resume"] == "auto"
        assert cell.keys() == KNOBS.keys() | own
    assert out.count("nats per token\n") == 8
    assert "rmsnorm, learning rate 0.001, seed 1337: val loss" in out
    text = (compared.folder / "report.md").read_text()
    warning = "**2 seeds: too few to rely on.** A difference may be large and yet not be detected"
    assert text.startswith(f"# Comparison of norm on words\n\n{warning}") and warning in out
    assert "**At equal steps**, each arm at its best learning rate:" in text
    assert "**At equal wall-clock**" in text and "- command: `python -m lab.compare " in text
    assert "arms 2 x learning rates 2 x seeds 2 from 1337" in text and "1 at once" in text
    assert out.endswith(f"{compared.folder / 'report.md'}\n")


def test_the_report_tells_how_to_make_the_first_cell_again(compared, capsys):
    compared(*BOTH, "seeds=1")
    text = (compared.folder / "report.md").read_text()
    command = text.split("the first cell's: `")[1].split("`")[0]
    again = [*shlex.split(command)[2:], f"out_dir={compared.folder / 'again'}"]
    assert train.main([word for word in again if word != "out_dir=out/again"]) == 0
    last = read_metrics(compared.folder / "again")[-1]
    assert last["val_loss"] == results(compared.folder)[0]["val_loss"]


def test_a_finished_cell_keeps_its_curves_but_not_its_weights(compared):
    compared("seeds=1", "eval_interval=2", "log_interval=3")
    (cell,), (folder,) = results(compared.folder), (compared.folder / "cells").iterdir()
    kept = {"config.json", "log.txt", "metrics.jsonl", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == kept
    records = read_metrics(folder)
    assert (cell["cell"], cell["steps"], cell["diverged"]) == (folder.name, 4, False)
    assert (cell["val_loss"], cell["val_bpb"]) == (records[-1]["val_loss"], records[-1]["val_bpb"])
    steps = [record for record in records if "loss" in record]
    assert cell["peak_memory_mb"] == max(record["peak_memory_mb"] for record in steps)
    one, three, four = (record["step_ms"] for record in steps)  # means since the record before
    assert cell["train_seconds"] == pytest.approx((one + 2 * three + four) / 1000)
    assert cell["parameters"] > 0 and cell["threads"] >= 1
    assert cell["versions"]["torch"] == torch.__version__
    assert "step 4/4" in (folder / "log.txt").read_text()


def test_cells_are_evaluated_as_they_are_and_rounded_before_their_weights_are_deleted(compared):
    assert compared(*BOTH, "seeds=1", "quantize=int8,ternary")[0] == 0
    for cell in results(compared.folder):
        losses = cell["quantized"]
        assert list(losses) == ["none", "int8", "ternary"]
        assert losses["none"] == cell["val_loss"]  # the same windows, dtype and kernel
        assert 0 < abs(losses["int8"] - losses["none"]) < abs(losses["ternary"] - losses["none"])
    text = (compared.folder / "report.md").read_text()
    assert "## Quality when quantised" in text and "| ternary | `layernorm` |" in text
    assert compared(*BOTH, "seeds=1", "quantize=int8")[0] == 0 and compared.cells == []
    before = (compared.folder / "report.md").read_text()
    code, _, err = compared(*BOTH, "seeds=1", "quantize=int8,int4")
    assert code == 2 and "was finished without quantize=int4, and its weights are deleted" in err
    assert err.count("\n") == 1 and (compared.folder / "report.md").read_text() == before


def test_a_loss_that_rounding_makes_infinite_is_a_result(compared, monkeypatch):
    def ruin(model, kind):
        model.head.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(compare, "simulate_quantization", ruin)
    assert compared("equal_time=false", "seeds=1", "quantize=int4")[0] == 0
    assert results(compared.folder)[0]["quantized"]["int4"] is None
    assert "| int4 | `tiny` | not finite |" in (compared.folder / "report.md").read_text()


def test_finished_cells_are_never_trained_again(compared, monkeypatch):
    compared(*BOTH, "seeds=2")
    first = results(compared.folder)
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)  # where there could be a bar
        code, _, err = compared(*BOTH, "seeds=2")
    assert code == 0 and compared.cells == [] and "cell" not in err
    assert compared(*BOTH, "seeds=3", "log_interval=2")[0] == 0
    new = [("rmsnorm", "1339"), ("layernorm", "1339")]
    assert [(c["norm"], c["seed"]) for c in compared.cells] == new
    assert results(compared.folder)[:4] == first


# Plans

PLAN = (*BOTH, "learning_rate=1e-3,1e-2", "seeds=2", "margin=0.01")


@pytest.fixture(scope="module")
def planned(tmp_path_factory, data_folder):
    """The folder of a finished comparison with the PLAN."""
    folder = tmp_path_factory.mktemp("planned") / "lab"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("run.setup.DATA", data_folder)
        patch.setattr(compare, "launch", launch_here)
        patch.setattr(timing, "time_elsewhere", timed_at_once)
        patch.setitem(sys.modules, "matplotlib.figure", None)
        words = command_line(*PLAN, "steps=2", "processes=2", f"out_dir={folder}")
        assert compare.main(words) == 0
    return folder


def other_plan(*arguments):
    """The arguments of the PLAN, of which these win."""
    pairs = dict(argument.split("=", 1) for argument in (*PLAN, *arguments))
    return as_arguments(pairs)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("norm=rmsnorm,dyt", "the arm layernorm (norm=layernorm)"),
        ("max_iters=5", "the arm rmsnorm (max_iters=4)"),
        ("learning_rate=1e-3", "learning_rate=0.01"),
        ("seeds=1", "seeds=2 from 1337"),
        ("seed=1338", "seeds=2 from 1337"),
        ("margin=0", "margin=0.01, which was fixed before its results"),
        ("margin=0.02", "margin=0.01, which was fixed before its results"),
        ("norm=dyt,derf seeds=0", "the arm rmsnorm (norm=rmsnorm)"),
    ],
)
def test_another_plan_does_not_replace_a_report(compared, planned, argument, words):
    shutil.copytree(planned, compared.folder)
    before = {path.name: path.read_bytes() for path in compared.folder.glob("*.*")}
    code, _, err = compared(*other_plan(*argument.split()))
    assert code == 2 and err.count("\n") == 1 and not compared.cells
    assert (
        f"error: out_dir={compared.folder} has the results of a plan with {words}: ask for" in err
    )
    assert {path.name: path.read_bytes() for path in compared.folder.glob("*.*")} == before


@pytest.mark.parametrize(
    "argument, cells",
    [
        ("norm=layernorm,rmsnorm,dyt", 4),
        ("ffn=swiglu,gelu", 8),
        ("jobs=2 steps=3 log_interval=2", 0),
    ],
)
def test_a_plan_may_grow(compared, planned, argument, cells):
    shutil.copytree(planned, compared.folder)
    code, _, err = compared(*other_plan(*argument.split()))
    assert code == 0 and len(compared.cells) == cells, err


def test_seeds_that_were_added_after_a_report_are_told(compared, planned):
    shutil.copytree(planned, compared.folder)
    text = (compared.folder / "report.md").read_text()
    assert "- plan: seeds: 2, a margin of 0.01; both were fixed before the first report" in text
    for _ in range(2):
        assert compared(*other_plan("seed=1336", "seeds=3"))[0] == 0
        text = (compared.folder / "report.md").read_text()
        assert "seeds were added after a report: 2, then 3. Intervals and p do not" in text


def test_a_plan_without_results_may_be_replaced(compared, planned):
    compared.folder.mkdir()
    shutil.copy(planned / "plan.json", compared.folder)
    assert compared("seeds=1")[0] == 0
    assert "seeds: 1, no margin" in (compared.folder / "report.md").read_text()


@pytest.mark.parametrize(
    "change", [{"seeds": []}, {"arms": {"a": 1}}, {"margin": "x"}, {"arms": 1}]
)
def test_a_damaged_plan_is_one_line(compared, planned, change):
    shutil.copytree(planned, compared.folder)
    path = compared.folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    code, _, err = compared(*PLAN)
    assert (
        code == 2 and err == f"error: {path} is damaged: bring it back, or name another out_dir\n"
    )


def test_the_plan_is_written_before_the_first_cell_is_trained(compared, monkeypatch):
    there, launch = [], compare.launch

    def look(*arguments):
        there.append((compared.folder / "plan.json").exists())
        return launch(*arguments)

    monkeypatch.setattr(compare, "launch", look)
    assert compared("seeds=1", "margin=0.01")[0] == 0 and there == [True]


def test_two_knobs_with_two_values_each_are_tested_for_their_interaction(compared):
    code, out, _ = compared(NORMS, "ffn=gelu,swiglu", "seeds=2", "equal_time=false", "margin=9")
    assert code == 0
    arms = ["rmsnorm, gelu", "rmsnorm, swiglu", "layernorm, gelu", "layernorm, swiglu"]
    a, b, c, d = arms
    (line,) = (line for line in out.splitlines() if line.startswith("- **Interaction**"))
    assert line.startswith(f"- **Interaction**, (`{a}` less `{b}`) less (`{c}` less `{d}`): ")
    loss = {(r["arm"], r["seed"]): r["val_loss"] for r in results(compared.folder)}
    mean = [(loss[arm, 1337] + loss[arm, 1338]) / 2 for arm in arms]
    assert f"({mean[0] - mean[1] - mean[2] + mean[3]:+.4f} nats per token, 95% CI" in line
    assert "equal within 9 nats" in line.lower()


@pytest.mark.parametrize(
    "lists", ["ffn=gelu,swiglu,geglu,relu2", NORMS, "dropout=0", f"{NORMS} ffn=gelu,geglu,swiglu"]
)
def test_other_arms_have_no_interaction(lists):
    assert compare.square_of(plan(*lists.split()).arms) == []


def test_a_cell_of_other_code_or_data_is_another_cell(compared):
    compared("equal_time=false", "seeds=1")
    for what in ("code", "content_sha256", "tokenizer_sha256"):
        rewrite_results(
            compared.folder, lambda record, w=what: record["knobs"].update({w: "other"})
        )
        assert compared("equal_time=false", "seeds=1")[0] == 0 and len(compared.cells) == 1


def test_a_cell_that_begins_from_other_weights_is_another_cell(compared, tmp_path):
    begin = f"init_from={tmp_path / 'base'}"
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        assert train.main(command_line(f"out_dir={tmp_path / 'base'}", f"seed={seed}")) == 0
        compare.content_of.cache_clear()  # a process reads the weights once
        for new in (1, 0):
            assert compared("equal_time=false", begin, "seeds=1")[0] == 0
            assert len(compared.cells) == new


def test_cells_of_a_machine_with_another_device_are_not_continued_here(compared):
    compared(*BOTH, "seeds=1")
    rewrite_results(compared.folder, lambda record: record.update(device="cuda:7"))
    code, _, err = compared(*BOTH, "seeds=2")
    wanted = f"error: {compared.folder / 'results.jsonl'} has cells of another machine"
    assert code == 2 and err.startswith(wanted) and err.count("\n") == 1 and "cuda:7" in err
    assert compared.cells == []


def test_a_line_that_a_kill_cut_short_is_cut_off_and_its_cell_trained_again(compared):
    compared(*BOTH, "seeds=1")
    path = compared.folder / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert compared(*BOTH, "seeds=1")[0] == 0
    assert [c["norm"] for c in compared.cells] == ["layernorm"]
    assert [r["arm"] for r in results(compared.folder)] == ["rmsnorm", "layernorm"]
    path.write_text("x" + path.read_text())
    code, _, err = compared(*BOTH, "seeds=1")
    assert code == 2 and f"{path} is damaged" in err and err.count("\n") == 1


NO_RECORDS = {
    "number": "5",
    "null": "null",
    "list": "[]",
    "deep": "[" * 10**5,
    "deep knobs": '{"knobs": ' + "[" * 10**5,
    "long number": '{"seed": ' + "9" * 10_000 + "}",
    "empty": "{}",
}
WRONG = {
    "val_loss": "\x1b[2J",
    "val_bpb": "2",
    "learning_rate": 10**400,
    "diverged": 0,
    "versions": {"torch": [1]},
    "knobs": [],
    "cell": "../../outside",
    "compile": "auto",
    "threads": True,
    "quantized": {"none": 2.0, "int8": "2"},
}


UNEQUAL = [("learning_rate", 0), ("learning_rate", 0.5), ("seed", 7), ("max_iters", 9)]
BOUNDS = [("learning_rate", -1.0), ("parameters", -1), ("train_seconds", -1.0), ("threads", -1)]
NAMES = [("cell", name) for name in ("", ".", "..", "../x-00000000", "x\0-00000000", "x")]


@pytest.mark.parametrize("name, value", [*UNEQUAL, *BOUNDS, *NAMES])
def test_a_result_that_cannot_be_of_its_knobs_is_one_line(tmp_path, name, value):
    record = json.loads((ROOT / "docs/small-norms/results.jsonl").read_text().splitlines()[0])
    if (name, value) in BOUNDS and name in record["knobs"]:
        record["knobs"][name] = value
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(record | {name: value}) + "\n")
    with pytest.raises(ValueError, match="damaged .line 1.: delete the bad line"):
        compare.read_results(path)


@pytest.mark.parametrize("change", [{"val_loss": 3.5}, {"val_loss": None, "diverged": True}])
def test_two_results_for_one_cell_are_refused(tmp_path, change):
    record = json.loads((ROOT / "docs/small-norms/results.jsonl").read_text().splitlines()[0])
    path = tmp_path / "results.jsonl"
    for second, refused in ((record | change, True), (record | {"arm": "same"}, False)):
        path.write_text("".join(json.dumps(one) + "\n" for one in (record, second)))
        if refused:
            with pytest.raises(ValueError, match="two results for one cell, rmsnorm-lr.* line 2"):
                compare.read_results(path)
        else:
            assert len(compare.read_results(path)[1]) == 1


def test_arms_that_are_one_run_are_trained_once(compared):
    code, out, _ = compared("log_interval=1,2", "seeds=1", "equal_time=false")
    assert code == 0 and len(compared.cells) == len(results(compared.folder)) == 1


@pytest.mark.parametrize("name", ["timing.json", "step_time.png"])
def test_a_folder_in_the_place_of_a_file_is_told_before_a_cell_is_trained(compared, name):
    (compared.folder / "cells").mkdir(parents=True)
    (compared.folder / name).mkdir()
    code, _, err = compared("seeds=1")
    assert code == 2 and not compared.cells and err.count("\n") == 1
    assert f"{compared.folder / name} is a folder, and the comparison writes a file of" in err


def test_results_that_are_not_ours_are_one_line(compared):
    sound = (ROOT / "docs" / "small-norms" / "results.jsonl").read_text().splitlines()[0]
    record, path = json.loads(sound), compared.folder / "results.jsonl"
    compared("seeds=1")  # so that there is a plan
    lines = NO_RECORDS | {name: json.dumps(record | {name: value}) for name, value in WRONG.items()}
    for name, line in lines.items():
        path.write_text(f"{sound}\n{line}\n")
        with pytest.raises(ValueError, match="damaged .line 2.: delete the bad line") as error:
            compare.read_results(path)
        assert str(error.value).count("\n") == 0, name
    path.unlink()
    os.mkfifo(path)
    code, _, err = compared("seeds=1")
    assert code == 2 and "results.jsonl is not a regular file" in err and err.count("\n") == 1
    path.unlink()


def test_a_timing_that_is_not_ours_is_one_line(tmp_path):
    sound = {"seconds": {"a": [[1.0], [2.0]]}, "micro_batch_size": {"a": 1}, "cells": {"a": {}}}
    sound |= {"steps": 1, "processes": 2}
    path = tmp_path / "timing.json"
    path.write_text(json.dumps(sound))
    assert timing.read_timing(path) == sound
    wrong = [{"seconds": 5}, {"steps": []}, {"cells": None}, {"micro_batch_size": {"a": "x"}}]
    wrong += [{"seconds": {"a": bad}} for bad in ([[1.0]], [["x"], [1.0]], [[0], [1]], [1, 2])]
    for change in wrong:
        path.write_text(json.dumps(sound | change))
        with pytest.raises(ValueError, match="timing.json is damaged: delete it"):
            timing.read_timing(path)
    path.write_text(json.dumps({"seconds": {"a": [1.0]}, "steps": 1, "cells": {"a": {}}}))
    with pytest.raises(ValueError, match="of an older lab.compare, which timed all steps in one"):
        timing.read_timing(path)


def test_nothing_is_written_through_a_link_in_the_folder_of_a_comparison(compared, tmp_path):
    compared("seeds=1")
    bad = "\x1b]52;c;eA==\x07<script>|`"
    rewrite_results(compared.folder, lambda record: record["versions"].update(commit=bad))
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("results.jsonl", "report.md", "timing.json"):
        content = (compared.folder / name).read_bytes() + b"cut short" * (name[2] == "s")
        (outside / name).write_bytes(content)
        (compared.folder / name).unlink()
        (compared.folder / name).symlink_to(outside / name)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    assert compared("norm=none,dyt", "learing_rate=1")[0] == 2  # refused
    assert compared("seeds=2", "steps=3")[0] == 0
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    assert not any(path.is_symlink() for path in compared.folder.iterdir())
    assert [record["seed"] for record in results(compared.folder)] == [1337, 1338]
    report = (compared.folder / "report.md").read_text()  # which is made of what others wrote
    assert not set(report) & set("\x1b\x07") and "<script" not in report and "?script" in report


def test_a_comparison_replaces_no_foreign_files_and_writes_into_no_linked_cell(compared, tmp_path):
    compared.folder.mkdir()
    (compared.folder / "report.md").write_text("mine")
    code, _, err = compared("seeds=1")
    assert code == 2 and "has a report.md but no plan.json" in err and err.count("\n") == 1
    assert [path.name for path in compared.folder.iterdir()] == ["report.md"]
    (compared.folder / "report.md").unlink()
    (cell,) = compare.grid(plan("seeds=1"))
    (compared.folder / "cells").mkdir()
    (tmp_path / "outside").mkdir()
    (compared.folder / "cells" / cell.name).symlink_to(tmp_path / "outside")
    code, _, err = compared("seeds=1")
    assert code == 1 and "is a link, and nothing is written through one" in err
    assert not list((tmp_path / "outside").iterdir())


def test_a_comparison_whose_folder_another_one_has_taken_ends(compared, monkeypatch):
    launch = compare.launch

    def taken(*arguments):
        (compared.folder / ".lock").unlink()
        return launch(*arguments)

    monkeypatch.setattr(compare, "launch", taken)
    code, _, err = compared("seeds=2")
    assert code == 1 and "lab is not this process's any more" in err
    assert not results(compared.folder) and len(compared.cells) == 1


def test_a_cut_comparison_goes_on_in_the_middle_of_a_cell(compared):
    """As after a kill at step 3 of the first cell, which had saved at step 2."""
    cell = compare.grid(plan(NORMS, "seeds=1", "save_interval=2"))[0]
    folder = compared.folder / "cells" / cell.name
    assert train.main([TINY, *as_arguments(cell.knobs | {"out_dir": str(folder)})]) == 0
    checkpoint.path_of(folder, 4).unlink()
    assert compared(*BOTH, "seeds=1", "save_interval=2")[0] == 0
    assert len(results(compared.folder)) == 2
    log = (folder / "log.txt").read_text()
    assert "from step 2" in log and "step 3/4" in log and "step 2/4" not in log


def test_divergence_is_a_result(compared):
    rates = "learning_rate=1e-3,30,1e38"  # 30 ends above the first loss, 1e38 in NaN
    wild = (*BOTH, rates, "seeds=1", "warmup_iters=0", "grad_clip=0", "optimizer=adamw")
    code, out, _ = compared(*wild)
    assert code == 0 and out.count("diverged") >= 4
    found = {(r["arm"], r["learning_rate"]): r for r in results(compared.folder)}
    assert len(found) == 6
    for (_, rate), record in found.items():
        assert record["diverged"] == (rate > 1)
        assert (record["val_loss"] is None) == (rate == 1e38)
    assert "| 1 of 1 diverged | 30 |" in (compared.folder / "report.md").read_text()
    assert compared(*wild)[0] == 0 and compared.cells == []


def test_nan_before_the_first_record_is_divergence(compared, tmp_path):
    compared("seeds=1")
    (folder,) = (compared.folder / "cells").iterdir()
    (folder / "metrics.jsonl").write_text("")
    record = compare.result_of(compare.grid(plan("seeds=1"))[0], folder, train.NOT_FINITE)
    assert record["val_loss"] is None and record["diverged"] and record["steps"] == 0


def test_arms_that_are_the_same_do_not_differ(compared):
    code, out, _ = compared("activation_checkpointing=false,true", "seeds=2", "equal_time=false")
    same = "`activation_checkpointing=true` and `activation_checkpointing=false`"
    assert code == 0
    assert f"**No difference detected** between {same} (+0.0000 nats per token" in out


def test_a_cell_that_fails_stops_all_and_shows_its_log(compared):
    first = compare.grid(plan(NORMS, "seeds=1"))[0]
    with Lock(compared.folder / "cells" / first.name):
        code, _, err = compared(*BOTH, "seeds=1")
    assert code == 1 and results(compared.folder) == [] and len(compared.cells) == 1
    assert "is in use by process" in err and "ended with exit code 2" in err
    assert err.endswith("finished cells are kept, and the same command goes on from here\n")


def test_what_is_automatic_is_chosen_once_for_all_cells(compared):
    automatic = (*BOTH, "dtype=auto", "compile=auto", "device=auto")
    compared(*automatic, "seeds=1")
    (dtype, other) = {(c["dtype"], c["compile"]) for c in compared.cells}.pop()
    assert dtype in ("float32", "bfloat16") and other == "false"
    # As on a machine that would choose the other one now.
    before = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    rewrite_results(compared.folder, lambda record: record.update(dtype=before))
    compared(*automatic, "seeds=2")
    assert [(c["dtype"], c["seed"]) for c in compared.cells] == [(before, "1338")] * 2


def test_jobs_share_the_threads(compared):
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        compared("seeds=2", "jobs=2")
        assert compared.threads == [2, 2]
        assert [r["threads"] for r in results(compared.folder)] == [2, 2]
        compared("seeds=3", "jobs=1")
        assert compared.threads == [None]
    finally:
        torch.set_num_threads(threads)


def test_two_comparisons_never_write_into_one_folder(compared):
    with Lock(compared.folder):
        code, _, err = compared(NORMS, "seeds=1")
    assert code == 2 and "lab is in use by process" in err and not compared.cells


def test_ways_to_fine_tune_can_be_compared(compared, tmp_path):
    base = tmp_path / "base"
    assert train.main(command_line(f"out_dir={base}")) == 0
    preset = tmp_path / "tune.py"
    preset.write_text(f"init_from = {str(base)!r}\n")
    shape = ("n_layer", "n_head", "n_embd", "n_hidden", "block_size")
    fine = {name: text for name, text in KNOBS.items() if name not in shape}
    code, out, err = compared("lora_rank=0,2", "seeds=1", base=fine, preset=str(preset))
    assert code == 0, err
    assert {cell.get("lora_rank") for cell in compared.cells} == {"0", "2"} and "no norm" not in out


# Timing


def fake_clock(monkeypatch, **seconds):
    """The timed steps of an arm take in turn as long as is said for its norm; returns the norms in
    the order in which they are timed."""
    timed, clock = [], {name: itertools.cycle(times) for name, times in seconds.items()}

    def seconds_of_step(run):
        timed.append(run.config.model.norm)
        return next(clock[run.config.model.norm])

    # Real times differ from call to call, and the verdicts would differ with them.
    monkeypatch.setattr(timing, "seconds_of_step", seconds_of_step)
    return timed


def test_without_seeds_the_arms_are_only_timed(compared, timed_here):
    code, out, _ = compared(NORMS, "seeds=0")
    assert code == 0 and not compared.cells and "report.md" not in out
    arms = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| `")]
    assert arms == ["`rmsnorm`", "`layernorm`", "`no norm`"]
    assert not (compared.folder / "report.md").exists()


def test_steps_are_timed_in_turn_and_kept(compared, timed_here, monkeypatch):
    timed = fake_clock(monkeypatch, rmsnorm=[0.02], layernorm=[0.02], none=[0.015])
    compared(NORMS, "seeds=1", "steps=4")
    order = ["rmsnorm", "layernorm", "none"]
    # In each of two processes four rounds that do not count, and four that do.
    assert timed == (order + order[::-1]) * 4 * 2
    text = (compared.folder / "report.md").read_text()
    assert "| 25.0% (25.0% to 25.0%) |" in text and "| `no norm` | - | 15.00 |" in text
    compared(NORMS, "seeds=2", "steps=4")
    assert len(timed) == 48
    compared(NORMS, "seeds=2", "steps=5")
    assert len(timed) == 48 + 54
    compared(NORMS, "seeds=2", "steps=5", "processes=3")
    assert len(timed) == 48 + 54 + 81


def test_all_arms_are_timed_compiled_however_many(compared, no_code):
    from torch._dynamo.utils import counters

    before = counters["frames"]["ok"]
    out_dir = f"out_dir={compared.folder}"
    lab = compare.Lab(plan(NORMS, "compile=true", "steps=2", out_dir), "")
    with torch._dynamo.config.patch(recompile_limit=1):
        found = timing.time_arms(lab.command_lines(), 2)["seconds"]
    assert len(found) == counters["frames"]["ok"] - before == 3  # with the control


def test_each_arm_has_the_control_of_its_other_knobs(compared):
    lists = (NORMS, "qk_norm=true,false", "dropout=0,0.1")
    lab = compare.Lab(plan(*lists, "norm_impl=fused", "min_lr=1e-4"), "")
    assert set(lab.timed) - set(lab.plan.arms) == {"no norm, dropout=0", "no norm, dropout=0.1"}
    assert lab.control["layernorm, qk_norm=true, dropout=0.1"] == "no norm, dropout=0.1"
    model = lab.timed["no norm, dropout=0.1"].config.model
    assert (model.norm, model.dropout, model.qk_norm) == ("none", 0.1, False)


def test_a_slower_arm_gets_fewer_steps_at_equal_wall_clock(compared, timed_here, monkeypatch):
    fake_clock(monkeypatch, rmsnorm=[0.03], layernorm=[0.06], none=[0.03])
    arguments = (NORMS, "learning_rate=1e-3,1e-2", "seeds=2", "warmup_iters=3")
    code, out, _ = compared(*arguments)
    assert code == 0 and len(compared.cells) == 10
    losses = {1e-3: 0.0, 1e-2: 0.0}
    for record in results(compared.folder)[:8]:
        if record["arm"] == "layernorm":
            losses[record["learning_rate"]] += record["val_loss"]
    best = min(losses, key=losses.get)
    for cell, seed in zip(compared.cells[8:], ("1337", "1338"), strict=True):
        assert (cell["norm"], float(cell["learning_rate"]), cell["seed"]) == (
            "layernorm",
            best,
            seed,
        )
        assert (cell["max_iters"], cell["warmup_iters"]) == ("2", "2")
    slower = "takes 2.000 times `rmsnorm`'s time per step (95% CI 2.000 to 2.000)"
    assert f"{slower} and so gets 2 steps" in out
    assert compared(*arguments)[0] == 0 and compared.cells == []


def test_norms_fade_at_the_same_shares_of_a_shorter_cell(compared, timed_here, monkeypatch):
    fake_clock(monkeypatch, rmsnorm=[0.03], tapernorm=[0.06], none=[0.03])
    fade = ("norm=rmsnorm,tapernorm", "taper_start=2", "taper_end=4")
    assert compared(*fade, "seeds=1")[0] == 0
    found = [
        (cell["max_iters"], cell["taper_start"], cell["taper_end"]) for cell in compared.cells[1:]
    ]
    assert found == [("4", "2", "4"), ("2", "1", "2")]


def test_an_arm_of_the_same_speed_has_no_cells_of_its_own(compared, timed_here, monkeypatch):
    # It takes as long in one process of eight rounds, and twice as long in the other one.
    fake_clock(monkeypatch, rmsnorm=[0.03], layernorm=[0.03] * 8 + [0.06] * 8, none=[0.03])
    _, out, _ = compared(NORMS, "seeds=1", "steps=4")
    assert len(compared.cells) == 2
    assert "no difference in speed detected: the verdict at equal steps holds" in out


def test_a_signal_while_steps_are_timed_ends_at_once(compared, timed_here, monkeypatch):
    # Timing is too short to hit it from outside.
    monkeypatch.setattr(timing, "warm_up", lambda run: os.kill(os.getpid(), signal.SIGINT))
    assert compared(*BOTH, "seeds=1")[0] == 130 and not (compared.folder / "timing.json").exists()


def test_steps_are_timed_in_another_process(tmp_path, data_folder, monkeypatch):
    words = command_line(f"dataset={data_folder / 'words'}", f"out_dir={tmp_path / 'run'}")
    monkeypatch.chdir(tmp_path)
    found = timing.time_elsewhere({"one": words}, 2)
    assert len(found["seconds"]["one"]) == 2 and all(t > 0 for t in found["seconds"]["one"])
    assert found["micro_batch_size"] == {"one": 8} and not list(tmp_path.iterdir())


def test_a_process_that_cannot_time_the_steps_ends_the_comparison(compared, monkeypatch):
    def fails(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "false")
            return elsewhere(*arguments)

    monkeypatch.setattr(timing, "time_elsewhere", fails)
    code, _, err = compared("seeds=1")
    assert code == 1 and "error: the process that times the steps ended with exit code 1" in err
    assert len(results(compared.folder)) == 1 and not (compared.folder / "timing.json").exists()


# The plans of docs/norm-study/plan.md

STUDY = ROOT / "docs" / "norm-study" / "plan.md"


def commands_of(shell):
    """The words of every command for python in a shell script, in which nothing is run."""
    print_words = 'python() { printf "%s\\n" "$*"; }\n'
    done = subprocess.run(["bash", "-euc", print_words + shell], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.skipif(os.name != "posix", reason="a shell reads the page")
def test_the_planned_commands_are_those_of_the_program(monkeypatch):
    monkeypatch.chdir(ROOT)
    words, *blocks = re.findall(r"^```sh\n(.*?)^```", STUDY.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 8
    for block in blocks:
        unit, counts = re.match(r"# (cells|arms): ([\d ]+)\n", block).groups()
        found = []
        for program, module, *arguments in commands_of(words + block):
            assert (program, module) == ("-m", "lab.compare")
            asked = compare.read_plan(arguments)
            found.append(len(compare.grid(asked) if unit == "cells" else asked.arms))
        assert found == [int(count) for count in counts.split()]


# Processes

ENDLESS = KNOBS | {"max_iters": "1000000", "save_interval": "0"}


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(os.name != "posix", reason="signals of a terminal")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), slow(signal.SIGKILL, -9)])
def test_when_a_comparison_is_stopped_or_killed_its_cell_saves(tmp_path, data_folder, number, code):
    out = tmp_path / "lab"
    words = command_line(*BOTH, "seeds=1", f"out_dir={out}", base=ENDLESS)
    command = [sys.executable, "-m", "lab.compare", *words]
    there = os.environ | {"ROOTLLAMA_DATA": str(data_folder)}
    process = subprocess.Popen(command, cwd=ROOT, env=there, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: any(read_metrics(folder) for folder in out.glob("cells/*")))
        process.send_signal(number)  # to it alone: the cell is in a session of its own
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code
    (cell,) = out.glob("cells/*")
    wait_for(lambda: checkpoint.all_in(cell) and not (cell / ".lock").exists())
    assert checkpoint.load_newest(cell)["step"] > 0
    if number == signal.SIGINT:
        hint = "finished cells are kept, and the same command goes on from here"
        assert err == f"stopped\n{hint}\n"
        assert "SIGINT: saved at step" in (cell / "log.txt").read_text()
