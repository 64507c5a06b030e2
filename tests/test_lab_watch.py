"""lab.watch draws what runs with watch=true recorded, and says what it cannot draw."""

import json
import math
import sys

import pytest

from lab import watch
from run.metrics import METRICS_FILE


@pytest.fixture
def draw(capsys):
    """draw('out/small', ...) runs lab.watch: (exit code, stdout, stderr)."""

    def run(*arguments):
        try:
            code = watch.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_one_run_is_in_its_folder_and_that_of_several_where_it_is_asked(
    start, draw, tmp_path
):
    start("watch=true", "max_iters=1", "warmup_iters=0", "norm=rmsnorm_noparam")
    start("watch=true", "max_iters=2", "n_layer=1", "qk_norm=true", out="other")
    one, other, both = tmp_path / "run", tmp_path / "other", tmp_path / "both.png"
    assert draw(one) == (0, f"{one / 'watch.png'}\n", "") and is_picture(one / "watch.png")
    # A name that matplotlib would take for a formula, and one that it cannot write.
    odd = one.rename(tmp_path / "$x_{$"), other.rename(tmp_path / "\udcff")
    assert draw(*odd, f"out={both}")[0] == 0
    assert is_picture(both) and not (odd[1] / "watch.png").exists()


def test_what_was_watched_is_read_back_by_step_and_layer_and_null_is_nan(tmp_path):
    records = [
        {"step": 1, "watch": {"rms": [1.0, 2.0]}},
        {"step": 1, "loss": 3.0},
        {"step": 5, "watch": {"rms": [None, 4.0]}},
    ]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    steps, values = watch.watched(tmp_path)
    assert steps.tolist() == [1, 5] and values["rms"][0].tolist() == [1, 2]
    assert math.isnan(values["rms"][1, 0]) and values["rms"][1, 1] == 4


def test_a_run_that_ended_with_nan_is_drawn(draw, tmp_path):
    names = (*watch.ALWAYS, "embed_grad_norm")
    record = {"step": 1, "watch": {name: [1.0, None] for name in names}}
    (tmp_path / METRICS_FILE).write_text(json.dumps(record) + "\n")
    assert draw(tmp_path)[0] == 0 and is_picture(tmp_path / "watch.png")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name the folder of a run"),
        (["{0}/missing"], "missing has no metrics.jsonl"),
        (["{0}"], "was not watched: train it with watch=true"),
        (["{0}", "uot=x.png"], "did you mean out?"),
    ],
)
def test_a_mistake_is_one_line(draw, tmp_path, arguments, words):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 2.0}\n')
    code, _, err = draw(*(argument.format(tmp_path) for argument in arguments))
    assert code == 2 and words in err and err.count("\n") == 1


def test_matplotlib_that_is_missing_is_named(draw, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = draw(tmp_path)
    assert code == 2 and "pip install matplotlib" in err


def test_a_scale_that_is_missing_is_named(draw, tmp_path):
    record = {"step": 1, "watch": {name: [1.0] for name in watch.ALWAYS if name != "ffn_in_mean"}}
    (tmp_path / METRICS_FILE).write_text(json.dumps(record) + "\n")
    code, _, err = draw(tmp_path)
    assert code == 2 and "lacks ffn_in_mean" in err and err.count("\n") == 1


def test_help_needs_no_run(draw):
    code, out, _ = draw("--help")
    assert code == 0 and "out=FILE.png" in out
