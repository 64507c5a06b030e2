"""What training costs is measured in fresh processes, of which none counts what another had."""

import subprocess
import sys

import pytest
from conftest import ROOT, SMALL
from test_bench import rows_of

import bench_cost
from cost import parameter_count
from model import ModelConfig


def here(data_folder, *left_out):
    """The knobs of a very small run, for a process that is started in another folder."""
    return [knob for knob in SMALL if not knob.startswith(("dataset", "compile", *left_out))] + [
        f"dataset={data_folder / 'words'}"]


def number(cell):
    return float(cell.split()[0].replace(",", ""))


def test_bench_memory_holds_ours_against_transformers(measure, data_folder):
    code, out, err = measure("memory", *here(data_folder), "vocab_size=8000", "steps=1")
    assert code == 0, err
    rows = rows_of(out, "of transformers'")
    assert list(rows) == ["ours", "transformers"] and rows["transformers"][1] == "1.00"
    ours, theirs = (number(rows[name][0]) for name in rows)
    assert float(rows["ours"][1]) == pytest.approx(ours / theirs, rel=0.05)
    model = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_hidden=64, vocab_size=8000, tie_embeddings=True)
    fixed = 16 * parameter_count(model) / 1e6
    assert f"moments: {fixed:,.0f} MB" in out and f"once: {4 * 8 * 32 * 8000 / 1e6:,.0f} MB" in out, out
    assert min(ours, theirs) > fixed and max(ours, theirs) < 500
    assert float(rows["ours"][2]) == pytest.approx(ours / fixed, rel=0.05)


def test_memory_is_that_of_the_process_itself_not_of_the_one_that_started_it():
    ballast = bytearray(1_500_000_000)
    ballast[::4096] = bytes(len(ballast[::4096])).replace(b"\0", b"\1")
    done = subprocess.run([sys.executable, "-c", "import bench_cost as b; print(*b.memory_now('cpu'))"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    now, most = map(float, done.stdout.split())
    assert 5e7 < now <= most < 1e9 and ballast[0] == 1


def test_bench_growth_prints_a_row_for_each_size_and_names_what_does_not_fit(measure, data_folder, monkeypatch):
    monkeypatch.setattr(bench_cost, "GROWTH", {"parameters": [(1, 32, 2), (350, 32, 2)], "context": [(1, 64, 1)]})
    monkeypatch.setattr(bench_cost, "total_memory", lambda device: 4e9)
    monkeypatch.setattr(bench_cost, "memory_now", lambda device: (2e8, 2e8))  # so much of it this process has
    words = here(data_folder, "n_", "block_size", "batch_size")
    code, out, err = measure("growth", *words, "steps=1")
    assert code == 0, err
    tables = out.split("\n\n")[1:]
    assert [table.split()[0] for table in tables] == ["parameters", "context"]
    cells = [table.splitlines()[1].split() for table in tables]
    assert [c[:4] for c in cells] == [["1,049,216", "2", "x", "32"], ["1,049,216", "1", "x", "64"]]
    assert all(c[6] == "1.00" and c[7].endswith("%") and c[9] == "GB" for c in cells)
    assert "not measured: 351" in tables[0] and "3.2 GB are to be had" in tables[0]


def test_the_sizes_are_what_they_are_called():
    for millions in bench_cost.SIZES:
        shape = {k: v for k, v in bench_cost.shape_of(millions, 256, 4).items() if k not in ("optimizer", "batch_size")}
        assert parameter_count(ModelConfig(**shape)) / 1e6 == pytest.approx(millions, rel=0.1)


def test_growth_changes_one_thing_at_a_time():
    assert {shape[1:] for shape in bench_cost.GROWTH["parameters"]} == {(256, 4)}
    assert {(size, T * B) for size, T, B in bench_cost.GROWTH["context"]} == {(15, 8192)}
    assert {shape[:2] for shape in bench_cost.GROWTH["batch"]} == {(15, 256)}


def test_bench_prepare_holds_ours_against_a_plain_loop(measure, data_folder):
    code, out, err = measure("prepare", str(data_folder / "words.txt"), "vocab_size=300", "rounds=2")
    assert code == 0, err
    rows = rows_of(out, "of the loop")
    assert list(rows) == ["prepare.py", "plain loop"] and rows["plain loop"][1] == "1.00"
    assert float(rows["prepare.py"][1]) == pytest.approx(
        number(rows["prepare.py"][0]) / number(rows["plain loop"][0]), abs=0.05)
    assert all(row[2].endswith("%") and row[3].endswith("MB") for row in rows.values()) and "the tokenizer alone" in out


def test_bench_start_prints_the_whole_and_what_is_around_a_step(measure, data_folder, tmp_path):
    knobs = [f"dataset={data_folder / 'words'}", "device=cpu", "dtype=float32"]
    code, out, err = measure("start", *knobs, "steps=1")
    assert code == 0, err
    rows = rows_of(out, "of import torch")
    assert rows["import torch"][1] == "1.00" and number(rows["train.py, one step"][0]) > number(rows["import torch"][0])
    around = rows_of(out, "both of a step")
    assert list(around) == ["small", "small, 12 x 64"]
    for row in around.values():
        step, loader, log = map(number, row[:3])
        assert 0 <= log < step and 0 < loader < step and row[3].endswith("%")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, words", [
    (["memory", "norm=dyt"], "norm=rmsnorm (here it is dyt)"), (["memory", "steps=0"], "must be 1 or more"),
    (["memory", "learing_rate=1"], "did you mean learning_rate"), (["growth", "rounds=x"], "rounds must be a whole"),
    (["growth", "n_heads=2"], "did you mean n_head"), (["prepare", "nothing.txt"], "nothing.txt"),
    (["prepare", "dtype=float32"], "unknown knob 'dtype'"), (["prepare", "a", "b"], "it takes 1 word without '='"),
    (["start", "config/tiny.py"], "it takes no words without '=', got config/tiny.py"),
    (["start", "dataset=nothing_here"], "no such data set")])
def test_bad_input_is_one_line(measure, arguments, words):
    code, _, err = measure(*arguments)
    assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_a_process_that_fails_is_one_line_with_its_last_words(measure, data_folder):
    code, _, err = measure("memory", *here(data_folder, "vocab_size"), "vocab_size=2", "steps=1")
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert "python bench_cost.py ended with 2: error: vocab_size=2 is below the" in err
