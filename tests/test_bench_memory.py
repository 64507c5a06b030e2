"""What training costs is measured in fresh processes, of which none counts what another had."""

import subprocess
import sys

import pytest
from conftest import ROOT, SMALL
from test_bench import rows_of

from model import ModelConfig, parameter_count


def here(data_folder, *more):
    """The knobs of a very small run, for a process that is started in another folder."""
    knobs = [knob for knob in SMALL if not knob.startswith(("dataset", "compile"))]
    return [*knobs, f"dataset={data_folder / 'words'}", "steps=1", *more]


def number(cell):
    return float(cell.split()[0].replace(",", ""))


@pytest.mark.slow
def test_bench_memory_holds_ours_against_transformers(measure, data_folder):
    code, out, err = measure("memory", *here(data_folder, "vocab_size=8000"))
    assert code == 0, err
    rows = rows_of(out, "of transformers'")
    assert list(rows) == ["ours", "transformers"] and rows["transformers"][1] == "1.00"
    ours, theirs = (number(rows[name][0]) for name in rows)
    assert float(rows["ours"][1]) == pytest.approx(ours / theirs, rel=0.05)
    shape = dict(n_layer=2, n_head=2, n_embd=32, n_hidden=64, vocab_size=8000)
    fixed = 16 * parameter_count(ModelConfig(**shape, tie_embeddings=True)) / 1e6
    logits = 4 * 8 * 32 * 8000 / 1e6
    assert f"moments: {fixed:,.0f} MB" in out and f"once: {logits:,.0f} MB" in out, out
    assert min(ours, theirs) > fixed and max(ours, theirs) < 500
    assert float(rows["ours"][2]) == pytest.approx(ours / fixed, rel=0.05)


@pytest.mark.slow
def test_memory_is_that_of_the_process_itself_not_of_the_one_that_started_it():
    ballast = bytearray(700_000_000)
    ballast[::4096] = bytes(len(ballast[::4096])).replace(b"\0", b"\1")
    code = "from lab.bench_memory import memory_now; print(*memory_now('cpu'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    now, most = map(float, done.stdout.split())
    assert 5e7 < now <= most < 7e8 and ballast[0] == 1


def test_a_process_that_fails_is_one_line_with_its_last_words(measure, data_folder):
    code, _, err = measure("memory", *here(data_folder, "vocab_size=2"))
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert "lab.bench_memory ended with 2: error: vocab_size=2 is below the" in err
