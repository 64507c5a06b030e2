"""lab.curves draws what runs recorded, by step, tokens or seconds, and says what it cannot draw."""

import json

import numpy as np
import pytest

from lab import curves
from run.metrics import METRICS_FILE, training_seconds


@pytest.fixture
def draw(capsys):
    """draw('out/small', ...) runs lab.curves: (exit code, stdout, stderr)."""

    def run(*arguments):
        try:
            code = curves.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def save_run(folder, records, **config):
    folder.mkdir()
    (folder / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


RECORDS = [
    {"step": 1, "loss": 4.0, "lr": 1e-3, "grad_norm": 2.0, "step_ms": 500.0},
    {"step": 5, "loss": 3.0, "lr": 2e-3, "grad_norm": 1.0, "step_ms": 250.0},
    {"step": 5, "train_loss": 3.25, "val_loss": 3.5, "val_bpb": 1.0},
]


def test_runs_are_drawn_in_one_picture_in_the_format_that_is_asked(start, draw, tmp_path):
    start()
    start("seed=2", "eval_interval=0", out="other")
    one, other = tmp_path / "run", tmp_path / "other"
    assert draw(one) == (0, f"{one / 'curves.png'}\n{one / 'curves.pdf'}\n", "")
    for kind, start_of_file in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (one / f"curves.{kind}").read_bytes().startswith(start_of_file)
    both = tmp_path / "both.pdf"
    assert draw(one, other, "by=seconds", f"out={both}")[0] == 0
    assert both.read_bytes().startswith(b"%PDF") and not both.with_suffix(".png").exists()


@pytest.mark.parametrize(
    "by, wanted", [("step", [1, 5, 5]), ("tokens", [30, 150, 150]), ("seconds", [0.5, 1.5, 1.5])]
)
def test_a_record_stands_where_its_step_ended(tmp_path, by, wanted):
    run = save_run(tmp_path / "run", RECORDS, batch_size=3, block_size=10)
    assert curves.horizontal(run, RECORDS, by).tolist() == wanted
    assert training_seconds(RECORDS) == 1.5


class Axes:
    def __init__(self):
        self.lines = []

    def plot(self, x, y, label=None, **_):
        self.lines.append((list(x), list(y), label))


def test_each_panel_has_the_values_of_its_own_records():
    for key, x, y in (("loss", [1, 5], [4, 3]), ("val_loss", [5], [3.5]), ("lr", [1, 5], [1, 2])):
        axes = Axes()
        curves.draw_run(axes, np.array([1, 5, 5]), RECORDS, key, "run", "C0")
        scale = 1000 if key == "lr" else 1
        assert axes.lines[0][:2] == (x, [v / scale for v in y])
        labels = [label for _, _, label in axes.lines if label]
        assert labels == [f"run: {y[-1] / scale:.4f}"]
        beside = ([5], [3.25], None)  # the mean training loss stands beside the validation loss
        assert (beside in axes.lines) == (key == "val_loss")
    axes = Axes()
    curves.draw_run(axes, np.array([1]), RECORDS[:1], "val_loss", "run", "C0")
    assert axes.lines == []


def test_the_running_mean_is_over_neighbours_on_both_sides():
    assert curves.running_mean(np.array([1.0, 2.0, 6.0])).tolist() == [3.0, 3.0, 3.0]
    line = np.arange(100.0)
    assert np.allclose(curves.running_mean(line)[10:-10], line[10:-10])
    assert curves.running_mean(line)[0] == np.mean(line[:11])
    peak = np.zeros(101)
    peak[50] = 21.0
    assert np.allclose(curves.running_mean(peak)[40:61], 1.0) and not curves.running_mean(peak)[39]


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "name the folder of a run, or several"),
        (["none"], "none has no metrics.jsonl"),
        (["empty"], "empty has no records yet"),
        (["run", "by=epochs"], "by must be step, tokens or seconds"),
        (["run", "by=tokens"], "config.json does not say batch_size and block_size"),
        (["run", "to=x"], "unknown"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(draw, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", RECORDS)
    save_run(tmp_path / "empty", [])
    code, out, err = draw(*words)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))
