"""The benchmark times train.py's own step and leaves nothing behind."""

import pytest
from conftest import ROOT, SMALL

import bench
import train


@pytest.fixture
def measure(monkeypatch, tmp_path, data_folder, capsys):
    monkeypatch.setattr(train, "DATA", data_folder)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            code = bench.main(list(arguments))
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_bench_train_prints_a_line_for_eager_and_one_for_compiled(measure, monkeypatch, tmp_path):
    timed = []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda run: (timed.append(run.config.compile), step(run))[1])
    code, out, _ = measure("train", str(ROOT / "config" / "tiny.py"), *SMALL, "steps=4")
    assert code == 0
    assert timed == [False, True] + [True, False, False, True] * 2  # A B B A
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("eager", "compiled"))}
    assert rows.keys() == {"eager", "compiled"} and all(row.endswith("%") for row in rows.values())
    assert "matrix products:" in out and "commit" in out and "peak memory" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, words", [
    (["trian"], "bench.py measures train, got 'trian'"), (["train", "steps=0"], "steps must be 1 or more"),
    (["train", "steps=x"], "steps must be a whole number"),
    (["train", "learing_rate=1"], "did you mean learning_rate")])
def test_bad_input_is_one_line(measure, arguments, words):
    code, _, err = measure(*arguments)
    assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1
