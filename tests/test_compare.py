"""Comparisons from the command line to the report; cells run in this process, but where a process is the point."""

import functools
import itertools
import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from conftest import ROOT, SMALL, launch_here

import checkpoint
import compare
import norm
import report
import train
from data.prepare import prepare
from device import choose_dtype
from lock import Lock

TINY = str(ROOT / "config" / "tiny.py")
KNOBS = {a.split("=")[0]: a.split("=")[1] for a in SMALL} | {"max_iters": "4", "eval_interval": "0"}


def knobs(*arguments, **more):
    """A command line of KNOBS, then `more`, then `arguments`: the later ones win."""
    return [TINY, *compare.arguments(KNOBS | more | dict(a.split("=", 1) for a in arguments))]


@pytest.fixture
def compared(tmp_path, monkeypatch, data_folder, capsys):
    """compared('norm=rmsnorm,layernorm', ...) compares in tmp_path/lab: (exit code, stdout, stderr).

    compared.cells has the knobs of every cell started, as a dict.
    """
    monkeypatch.setattr("run.DATA", data_folder)
    monkeypatch.setattr(train, "plot_losses", lambda folder: None)
    monkeypatch.setattr(report, "draw", lambda study: [])

    def launch(command, threads):
        run.cells.append(dict(argument.split("=", 1) for argument in command[1:]))
        return launch_here(command, threads)

    def run(*arguments):
        run.cells.clear()
        try:
            code = compare.main(knobs("steps=2", f"out_dir={tmp_path / 'lab'}", *arguments))
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    monkeypatch.setattr(compare, "launch", launch)
    run.cells, run.folder = [], tmp_path / "lab"
    return run


def results(folder):
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plan(*arguments):
    return compare.read_plan(knobs(*arguments))


BOTH = ("norm=rmsnorm,layernorm", "equal_time=false")


def test_without_seeds_the_arms_are_only_timed(compared):
    code, out, err = compared("norm=rmsnorm,layernorm", "seeds=0")
    assert code == 0 and not compared.cells and "report.md" not in out
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| `")] == [
        "`rmsnorm`", "`layernorm`", "`no norm`"]
    assert not (compared.folder / "report.md").exists()


def test_the_grid_is_walked_forwards_and_backwards():
    cells = compare.grid(plan("norm=rmsnorm,layernorm", "learning_rate=1e-3,2e-3", "seeds=3", "seed=5"))
    there = [("rmsnorm", 1e-3), ("rmsnorm", 2e-3), ("layernorm", 1e-3), ("layernorm", 2e-3)]
    assert [(c.arm, c.config.learning_rate, c.config.seed) for c in cells] == [
        *((*a, 5) for a in there), *((*a, 6) for a in there[::-1]), *((*a, 7) for a in there)]
    assert len({c.name for c in cells}) == 12


def test_arms_are_all_combinations_but_of_the_learning_rate():
    arms = plan("norm=rmsnorm,layernorm", "learning_rate=1e-3,2e-3", "dropout=0,0.1", "tie_embeddings=true,false").arms
    assert len(arms) == 8 and list(arms)[0] == "rmsnorm, dropout=0, tie_embeddings=true"
    assert arms["layernorm, dropout=0.1, tie_embeddings=true"] == {
        "norm": "layernorm", "dropout": "0.1", "tie_embeddings": "true"}
    assert list(plan("learning_rate=1e-3,2e-3").arms) == ["tiny"]


def test_what_is_not_said_is_the_preset_and_five_seeds():
    found = compare.read_plan([])
    assert str(found.folder) == "out/compare-small" and found.seeds == 5 and found.rates == ["0.006"]
    assert str(compare.read_plan([TINY]).folder) == "out/compare-tiny"


@pytest.mark.parametrize("name, place", [("run-0.1", "run-0.1"), ("run-0.2", "run-0.2"), ("run", ".")])
def test_comparisons_that_begin_from_runs_have_a_folder_each(tmp_path, monkeypatch, name, place):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(compare.read_config([TINY]).flat() | {"data": {}}))
    monkeypatch.chdir(tmp_path / name if place == "." else tmp_path)
    assert str(compare.read_plan([place]).folder) == f"out/compare-{name}"


@pytest.mark.parametrize("arguments, words", [
    (["norm=rmsnorm,batchnorm"], "norm must be "), (["norm=rmsnorm,"], "norm must be "),
    (["norm=rmsnorm,rmsnorm"], "norm=rmsnorm,rmsnorm has a value twice"),
    (["learning_rate=1e-3,1e-3"], "has a value twice"), (["learning_rate=1e-3,0.001"], "has a value twice"),
    (["learning_rate=1e-3,fast"], "learning_rate must be a number, got 'fast'"),
    (["learing_rate=1,2"], "did you mean learning_rate?"),
    (["seed=1,2"], "seed=1,2 cannot be a list: it is the first seed, seeds=N says how many"),
    (["out_dir=a,b"], "out_dir=a,b cannot be a list"), (["resume=auto"], "leave it out"),
    (["seeds=-1"], "seeds must be 0 or more"), (["steps=1"], "steps must be 2 or more"),
    (["jobs=x"], "jobs must be a whole number"), (["equal_time=maybe"], "equal_time must be true or false"),
    (["n_head=1,3"], "n_head=3, learning_rate=0.001, seed=1337: n_embd=32 must be a multiple"),
    (["norm=rmsnorm,none", "norm_pos=post"], "none, learning_rate=0.001, seed=1337: norm=none has nothing to place"),
    (["warmup_iters=2,5"], "warmup_iters=5, learning_rate=0.001, seed=1337: warmup_iters=5 must not be above"),
    (["vocab_size=0,10"], "vocab_size=10: vocab_size=10 is below the 16 tokens"),
    (["dataset=gone"], "no such data set"),
    (["dataset=a,b"], "a,b: no such data set"),
    (["device=cuda:9"], "is not on this machine"),
])
def test_a_bad_comparison_is_one_line_and_nothing_is_made(compared, tmp_path, arguments, words):
    code, out, err = compared(*arguments)
    assert code == 2 and compared.cells == [] and list(tmp_path.iterdir()) == []
    assert err.startswith("error: ") and words in err and err.count("\n") == 1 and out == ""


def test_a_comparison_trains_times_and_judges(compared):
    code, out, err = compared(*BOTH, "learning_rate=1e-3,1e-2", "seeds=2")
    assert code == 0 and err == ""
    assert [(c["norm"], c["learning_rate"], c["seed"]) for c in compared.cells] == [
        ("rmsnorm", "1e-3", "1337"), ("rmsnorm", "1e-2", "1337"), ("layernorm", "1e-3", "1337"),
        ("layernorm", "1e-2", "1337"), ("layernorm", "1e-2", "1338"), ("layernorm", "1e-3", "1338"),
        ("rmsnorm", "1e-2", "1338"), ("rmsnorm", "1e-3", "1338")]
    assert all(KNOBS.items() <= cell.items() and cell["resume"] == "auto" for cell in compared.cells)
    assert all(cell.keys() == KNOBS.keys() | {"norm", "learning_rate", "seed", "out_dir", "resume"}
               for cell in compared.cells)
    assert out.count("nats per token\n") == 8 and "rmsnorm, learning rate 0.001, seed 1337: val loss" in out
    text = (compared.folder / "report.md").read_text()
    assert text.startswith("# Comparison of norm on words\n\n**At equal steps**") and "**At equal wall-clock**" in text
    assert "arms 2 x learning rates 2 x seeds 2 from 1337" in text and "1 at once" in text
    assert out.endswith(f"{compared.folder / 'report.md'}\n")


def test_a_finished_cell_keeps_its_curves_but_not_its_weights(compared):
    compared("seeds=1", "eval_interval=2", "log_interval=3")
    (cell,), (folder,) = results(compared.folder), (compared.folder / "cells").iterdir()
    assert {p.name for p in folder.iterdir()} == {"config.json", "log.txt", "metrics.jsonl", "tokenizer.json"}
    records = train.read_metrics(folder)
    assert (cell["cell"], cell["steps"], cell["diverged"]) == (folder.name, 4, False)
    assert (cell["val_loss"], cell["val_bpb"]) == (records[-1]["val_loss"], records[-1]["val_bpb"])
    assert cell["peak_memory_mb"] == max(r["peak_memory_mb"] for r in records if "loss" in r)
    one, three, four = (r["step_ms"] for r in records if "loss" in r)  # each is a mean since the record before
    assert cell["train_seconds"] == pytest.approx((one + 2 * three + four) / 1000)
    assert cell["parameters"] > 0 and cell["versions"]["torch"] == torch.__version__ and cell["threads"] >= 1
    assert "step 4/4" in (folder / "log.txt").read_text()


def test_finished_cells_are_never_trained_again(compared):
    compared(*BOTH, "seeds=2")
    first = results(compared.folder)
    assert compared(*BOTH, "seeds=2")[0] == 0 and compared.cells == []
    assert compared(*BOTH, "seeds=3", "log_interval=2")[0] == 0
    assert [(c["norm"], c["seed"]) for c in compared.cells] == [("rmsnorm", "1339"), ("layernorm", "1339")]
    compared(*BOTH, "seeds=1", "weight_decay=0")  # other knobs are other cells
    assert len(compared.cells) == 2 and len({r["cell"] for r in results(compared.folder)}) == 8
    assert results(compared.folder)[:4] == first


def test_a_cell_of_other_code_is_another_cell(compared, monkeypatch):
    compared(*BOTH, "seeds=1")
    monkeypatch.setattr(compare, "versions", lambda: {"code": "other"})
    assert compared(*BOTH, "seeds=1")[0] == 0 and len(compared.cells) == 2


def test_a_line_that_a_kill_cut_short_is_cut_off_and_its_cell_trained_again(compared):
    compared(*BOTH, "seeds=1")
    whole = (compared.folder / "results.jsonl").read_bytes()
    (compared.folder / "results.jsonl").write_bytes(whole[:-20])
    assert compared(*BOTH, "seeds=1")[0] == 0
    assert [c["norm"] for c in compared.cells] == ["layernorm"]
    assert [r["arm"] for r in results(compared.folder)] == ["rmsnorm", "layernorm"]


def test_a_damaged_line_is_named(compared):
    compared(*BOTH, "seeds=1")
    path = compared.folder / "results.jsonl"
    path.write_text("x" + path.read_text())
    code, _, err = compared(*BOTH, "seeds=1")
    assert code == 2 and f"{path} is damaged" in err and err.count("\n") == 1


def test_a_cut_comparison_goes_on_in_the_middle_of_a_cell(compared, monkeypatch):
    launch, batch = compare.launch, train.batch

    def interrupted(data, at, *rest):
        if at == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(data, at, *rest)

    def both_get_it(command, threads):
        process = launch(command, threads)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    with monkeypatch.context() as patch:
        patch.setattr(train, "batch", interrupted)
        patch.setattr(compare, "launch", both_get_it)
        code, _, err = compared(*BOTH, "seeds=1")
    assert code == 143 and len(compared.cells) == 1 and err.endswith("the same command goes on from here\n")
    assert compared(*BOTH, "seeds=1")[0] == 0
    assert len(compared.cells) == 2
    log = next((compared.folder / "cells").glob("rmsnorm-*/log.txt")).read_text()
    assert "from step 3" in log and "step 4/4" in log


def test_a_signal_while_steps_are_timed_ends_at_once(compared, monkeypatch):
    monkeypatch.setattr(compare, "first_step", lambda run: os.kill(os.getpid(), signal.SIGINT))
    assert compared(*BOTH, "seeds=1")[0] == 130 and not (compared.folder / "timing.json").exists()
    monkeypatch.undo()


def test_divergence_is_a_result(compared):
    code, out, _ = compared(*BOTH, "learning_rate=1e-3,1e9", "seeds=1", "warmup_iters=0", "grad_clip=0")
    assert code == 0 and out.count("diverged") >= 2
    lost = [r for r in results(compared.folder) if r["learning_rate"] == 1e9]
    assert all(r["diverged"] for r in lost) and len(lost) == 2
    assert "| 1 of 1 diverged | 1e+09 |" in (compared.folder / "report.md").read_text()
    assert compared(*BOTH, "learning_rate=1e-3,1e9", "seeds=1", "warmup_iters=0", "grad_clip=0")[0] == 0
    assert compared.cells == []


def test_ending_above_the_first_loss_is_divergence(compared, monkeypatch):
    monkeypatch.setattr(train, "validation_loss", lambda run, interrupts: 99.0)
    assert compared(*BOTH, "seeds=1")[0] == 0
    assert [(r["val_loss"], r["diverged"]) for r in results(compared.folder)] == [(99.0, True)] * 2


def test_nan_is_divergence_and_the_lines_stay_json(compared, monkeypatch):
    clip = train.clip_gradients
    monkeypatch.setattr(train, "clip_gradients", lambda *a: clip(*a) * float("nan"))
    monkeypatch.setattr(compare.Lab, "time_arms", lambda self: {
        "seconds": {name: [1.0, 1.0] for name in self.timed}, "micro_batch_size": {}})
    assert compared(*BOTH, "seeds=1")[0] == 0
    first = results(compared.folder)[0]
    assert first["val_loss"] is None and first["diverged"] and first["steps"] == 0


def test_arms_that_are_the_same_do_not_differ(compared):
    code, out, _ = compared("activation_checkpointing=false,true", "seeds=3", "equal_time=false")
    assert code == 0
    assert ("**No difference detected** between `activation_checkpointing=true` and `activation_checkpointing=false` "
            "(+0.0000 nats per token") in out


def test_a_cell_that_fails_stops_all_and_shows_its_log(compared, tmp_path, monkeypatch):
    """In processes of their own, which do not see the data set of the tests."""
    monkeypatch.undo()
    monkeypatch.setattr("run.DATA", tmp_path / "data")
    prepare([str(ROOT / "LICENSE")], tmp_path / "data" / "words", tokenizer="char")
    code, out, err = compared(*BOTH, "block_size=8", "seeds=1")
    assert code == 1 and results(compared.folder) == []
    assert "no such data set" in err and "ended with exit code 2" in err and "Traceback" not in err
    assert len(list((compared.folder / "cells").iterdir())) == 1


def fake_clock(monkeypatch, **seconds):
    """The timed steps of an arm take in turn as long as is said for its norm; returns the norms as they were timed."""
    timed, clock = [], {name: itertools.cycle(times) for name, times in seconds.items()}
    monkeypatch.setattr(compare, "timed_step", lambda run: (timed.append(run.config.model.norm), (
        0, 0, 0, next(clock[run.config.model.norm])))[1])
    return timed


def test_steps_are_timed_in_turn_and_kept(compared, monkeypatch):
    timed = fake_clock(monkeypatch, rmsnorm=[0.02], layernorm=[0.02], none=[0.015])
    compared("norm=rmsnorm,layernorm", "seeds=1", "steps=3")
    order = ["rmsnorm", "layernorm", "none"]
    assert timed == (order + order[::-1]) * 3  # three rounds to warm up, three that count
    text = (compared.folder / "report.md").read_text()
    assert "| 25.0% (25.0% to 25.0%) |" in text and "| `no norm` | - | 15.00 |" in text
    compared("norm=rmsnorm,layernorm", "seeds=2", "steps=3")
    assert len(timed) == 18
    compared("norm=rmsnorm,layernorm", "seeds=1", "steps=4")
    assert len(timed) == 18 + 21


def test_all_arms_are_timed_compiled_however_many(compared, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    before = counters["frames"]["ok"]
    eight = "norm=" + ",".join(list(norm.EAGER)[:8])  # and the control: torch gives up after eight by itself
    lab = compare.Lab(plan(eight, "compile=true", "n_layer=1", "steps=2", f"out_dir={compared.folder}"), "")
    compared.folder.mkdir()
    assert len(lab.time_arms()["seconds"]) == counters["frames"]["ok"] - before == 9


def test_each_arm_has_the_control_of_its_other_knobs(compared):
    lab = compare.Lab(plan("norm=rmsnorm,layernorm", "qk_norm=true,false", "dropout=0,0.1", "norm_impl=fused",
                           "min_lr=1e-4"), "")
    assert set(lab.timed) - set(lab.plan.arms) == {"no norm, dropout=0", "no norm, dropout=0.1"}
    assert lab.control["layernorm, qk_norm=true, dropout=0.1"] == "no norm, dropout=0.1"
    model = lab.timed["no norm, dropout=0.1"].config.model
    assert (model.norm, model.dropout, model.qk_norm) == ("none", 0.1, False)


def test_a_slower_arm_gets_fewer_steps_at_equal_wall_clock(compared, monkeypatch):
    fake_clock(monkeypatch, rmsnorm=[0.03], layernorm=[0.06], none=[0.03])
    code, out, _ = compared("norm=rmsnorm,layernorm", "learning_rate=1e-3,1e-2", "seeds=2", "warmup_iters=3")
    best = min((1e-3, 1e-2), key=lambda rate: sum(
        r["val_loss"] for r in results(compared.folder)[:8] if (r["arm"], r["learning_rate"]) == ("layernorm", rate)))
    assert code == 0 and len(compared.cells) == 10
    assert [(c["norm"], float(c["learning_rate"]), c["seed"], c["max_iters"], c["warmup_iters"])
            for c in compared.cells[8:]] == [("layernorm", best, seed, "2", "2") for seed in ("1337", "1338")]
    assert "takes 2.000 times `rmsnorm`'s time per step (95% CI 2.000 to 2.000) and so gets 2 steps" in out
    assert compared("norm=rmsnorm,layernorm", "learning_rate=1e-3,1e-2", "seeds=2", "warmup_iters=3")[0] == 0
    assert compared.cells == []


def test_an_arm_of_the_same_speed_has_no_cells_of_its_own(compared, monkeypatch):
    fake_clock(monkeypatch, rmsnorm=[0.03], layernorm=[0.03, 0.06], none=[0.03])  # 1.5 times, or the same
    _, out, _ = compared("norm=rmsnorm,layernorm", "seeds=1", "steps=4")
    assert len(compared.cells) == 2 and "the same speed within noise: the verdict at equal steps holds" in out


def test_what_is_automatic_is_chosen_once_for_all_cells(compared, monkeypatch):
    arguments = (*BOTH, "dtype=auto", "compile=auto", "device=auto")
    choose = choose_dtype
    monkeypatch.setattr("run.choose_dtype", lambda wanted, device: choose(
        "float32" if wanted == "auto" else wanted, device))
    compared(*arguments, "seeds=1")
    assert [(c["dtype"], c["compile"]) for c in compared.cells] == [("float32", "false")] * 2
    monkeypatch.setattr("run.choose_dtype", lambda wanted, device: "bfloat16" if wanted == "auto" else wanted)
    compared(*arguments, "seeds=2")  # on a machine that would choose otherwise
    assert [(c["dtype"], c["seed"]) for c in compared.cells] == [("float32", "1338")] * 2


def test_jobs_share_the_threads(compared, monkeypatch):
    threads, launch = [], compare.launch
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(compare, "launch", lambda command, n: (threads.append(n), launch(command, n))[1])
    compared("seeds=3", "jobs=3")
    assert threads == [2, 2, 2] and [r["threads"] for r in results(compared.folder)] == [2, 2, 2]
    compared("seeds=4", "jobs=1")
    assert threads[3:] == [None]


def test_list_tells_every_norm_in_a_line(capsys):
    assert compare.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(norm.EAGER)
    assert any(line.startswith("rmsnorm ") and "re-scales only" in line for line in lines)


def test_help_has_the_options_and_every_knob(capsys):
    assert compare.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {word}=" in out for word in ("seeds", "jobs", "steps", "equal_time", "norm", "learning_rate"))


def test_watch_is_passed_on(monkeypatch):
    monkeypatch.setattr(compare.watch, "main", lambda argv: argv)
    assert compare.main(["watch", "out/a", "out/b"]) == ["out/a", "out/b"]


@pytest.fixture
def house(tmp_path, monkeypatch, data_folder):
    """Cells are processes of their own, of a copy of the program that has the tests' data set."""
    shutil.copytree(ROOT, tmp_path / "house", ignore=lambda folder, names: {
        n for n in names if not n.endswith(".py") and not (folder == str(ROOT) and n in ("config", "data"))})
    shutil.copytree(data_folder / "words", tmp_path / "house" / "data" / "words")
    monkeypatch.setattr("run.DATA", data_folder)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "house" / "train.py"))


ENDLESS = {"max_iters": "1000000", "save_interval": "0"}


@pytest.mark.skipif(os.name != "posix", reason="signals of a terminal")
def test_ctrl_c_reaches_the_cells_which_save(house, tmp_path, capsys):
    def press():
        while not any(train.read_metrics(folder) for folder in tmp_path.glob("lab/cells/*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    assert compare.main(knobs(*BOTH, "seeds=1", f"out_dir={tmp_path / 'lab'}", **ENDLESS)) == 130
    assert capsys.readouterr().err == "stopped\nfinished cells are kept, and the same command goes on from here\n"
    (cell,) = tmp_path.glob("lab/cells/*")
    assert checkpoint.load_newest(cell)["step"] > 0 and "SIGINT: saved at step" in (cell / "log.txt").read_text()


def test_a_cell_saves_and_ends_when_nobody_reads_it_any_more(house, tmp_path):
    process = compare.launch(knobs(f"out_dir={tmp_path / 'run'}", **ENDLESS), 1)
    assert os.getsid(process.pid) == process.pid  # the Ctrl-C of a terminal does not reach it a second time
    while not next(process.stdout).startswith(b"step 1/"):
        pass
    process.stdout.close()  # as when we are killed
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert checkpoint.load_newest(tmp_path / "run")["step"] > 0


def test_two_comparisons_never_write_into_one_folder(compared, tmp_path):
    with Lock(tmp_path / "lab"):
        code, _, err = compared("norm=rmsnorm,layernorm", "seeds=1")
    assert code == 2 and "lab is in use by process" in err and not compared.cells


def test_ways_to_fine_tune_can_be_compared(compared, tmp_path, monkeypatch, data_folder):
    base = tmp_path / "base"
    assert train.main(knobs(out_dir=str(base))) == 0
    preset = tmp_path / "tune.py"
    preset.write_text(f"init_from = {str(base)!r}\n")
    fine = {name: text for name, text in KNOBS.items() if not name.startswith("n_") and name != "block_size"}
    monkeypatch.setattr("test_compare.TINY", str(preset))
    monkeypatch.setattr("test_compare.KNOBS", fine)
    code, out, error = compared("lora_rank=0,2", "seeds=1")
    assert code == 0, error
    assert {cell.get("lora_rank") for cell in compared.cells} == {"0", "2"}
    assert "no norm" not in out
