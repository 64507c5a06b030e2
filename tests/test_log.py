"""One record, all its readers: the line, the file, the tracker, the plot."""

import json
import math
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import largest_file
from tqdm import tqdm

from config.command import Output
from config.schema import Config
from data.loader import open_dataset
from data.prepare import prepare
from model import ModelConfig
from run.log import BAR, Log, clock, open_tracker
from run.machine import flops_per_token
from run.metrics import METRICS_FILE, plot_losses, read_metrics
from run.ranks import ALONE
from run.signals import Interrupts


def run_in(folder, step=0, **knobs):
    """What a log needs of a run: steps of 100 tokens, two bytes each."""
    model = ModelConfig(n_layer=1, n_head=1, n_embd=4, n_hidden=4, block_size=10, vocab_size=7)
    given = dict(device="cpu", dtype="float32", parallel="ddp", compile=False, micro_batch_size=1)
    given |= dict(batch_size=10, max_iters=10, warmup_iters=0, log_interval=2)
    if not (folder / "data").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data.txt").write_text("\u00e4\u00f6\u00fc" * 100, encoding="utf-8")
        prepare([str(folder / "data.txt")], folder / "data", "char")
    return SimpleNamespace(
        config=Config(model=model, out_dir=str(folder), **given | knobs),
        folder=folder,
        data=open_dataset(folder / "data"),
        ranks=ALONE,
        lock=None,
        step=step,
        past=folder if step else None,
        config_before=None,
    )


def log_in(folder, step=0, asked=None):
    """A log without a tracker; signals that it asks for are put into the list `asked`."""
    interrupts = SimpleNamespace(ask_to_stop=lambda number: asked.append(number), came=0)
    return Log(run_in(folder, step), None, interrupts)


def test_a_record_every_interval_with_the_mean_time_of_its_steps(tmp_path, capsys):
    with log_in(tmp_path) as log:
        for step, seconds in enumerate((9.0, 0.1, 0.2, 0.4), 1):
            log.training(step, 2.0, 1e-3, 0.5, seconds)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 4]  # the first step, then each second one
    assert records[-1]["step_ms"] == pytest.approx(300)
    assert records[-1]["tok_per_s"] == pytest.approx(100 / 0.3)
    line = "step 4/10 | loss 2.0000 | lr 1.00e-03 | grad norm 0.50 | 300 ms | 333 tok/s | 0:02 left"
    assert line in capsys.readouterr().out.splitlines()


def test_on_a_gpu_a_line_has_the_share_of_the_rate_of_products(tmp_path, capsys, monkeypatch):
    run = run_in(tmp_path)
    run.config = replace(run.config, device="cuda")
    rate = 10_000 * flops_per_token(run.config.model)  # that of 10,000 tokens a second
    monkeypatch.setattr("run.log.matmul_rate", lambda device, dtype: rate)
    with Log(run, None, SimpleNamespace(ask_to_stop=None, came=0)) as log:
        monkeypatch.setattr(log, "device", "cpu")  # which has the peak memory that is recorded
        log.training(1, 2.0, 1e-3, 0.5, 0.1)
    assert "| 100 ms | 1,000 tok/s | 10% of matmul rate | " in capsys.readouterr().out


def test_bits_per_byte_by_hand(tmp_path, capsys):
    with log_in(tmp_path) as log:
        log.evaluation(2, [4 * math.log(2)])  # 4 bits per token of 2 bytes
    assert read_metrics(tmp_path) == [{"step": 2, "val_loss": 4 * math.log(2), "val_bpb": 2.0}]
    assert "step 2/10 | val loss 2.7726 | 2.0000 bits per byte\n" in capsys.readouterr().out


def train(log, losses):
    """Tells the log of one step for each of {step: loss}."""
    for step, loss in losses.items():
        log.training(step, loss, 1e-3, 0.5, 0.1)


def test_an_evaluation_tells_the_mean_training_loss_since_the_one_before(tmp_path, capsys):
    with log_in(tmp_path) as log:
        train(log, {1: 3.0, 2: 2.0, 3: 1.0})
        log.evaluation(3, [2.5])
        train(log, {4: 0.5, 5: 0.25})
        log.evaluation(5, [2.25])
    means = [r["train_loss"] for r in read_metrics(tmp_path) if "val_loss" in r]
    assert means == [2.0, 0.375]  # although step 3 and 5 have no records of their own
    assert "step 5/10 | train loss 0.3750 | val loss 2.2500 | " in capsys.readouterr().out


@pytest.mark.parametrize(
    "recorded, resumed_at, mean",
    [
        ({1: 3.0, 2: 2.0}, 2, 2.0),  # all that is missing comes now
        ({1: 3.0, 2: 9.0, 3: 9.0}, 1, 2.0),  # the steps after the checkpoint are done again
        ({1: 3.0}, 2, None),  # step 2 was done, but not recorded
        ({1: 3.0, 4: 9.0}, 2, None),
    ],
)
def test_after_a_resume_the_mean_training_loss_is_that_of_all_steps_or_is_left_out(
    tmp_path, recorded, resumed_at, mean
):
    text = "".join(json.dumps({"step": s, "loss": loss}) + "\n" for s, loss in recorded.items())
    (tmp_path / METRICS_FILE).write_text(text)
    with log_in(tmp_path, resumed_at) as log:
        train(log, {s: 4.0 - s for s in range(resumed_at + 1, 4)})
        log.evaluation(3, [2.5])
        train(log, {4: 1.5})
        log.evaluation(4, [2.5])
    evaluations = [r for r in read_metrics(tmp_path) if "val_loss" in r]
    assert [r.get("train_loss") for r in evaluations] == [mean, 1.5]


def test_the_steps_before_the_evaluation_that_a_resumed_run_knows_do_not_count(tmp_path):
    records = [{"step": 1, "loss": 9.0}, {"step": 1, "val_loss": 9.0}, {"step": 2, "loss": 3.0}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    with log_in(tmp_path, 2) as log:
        train(log, {3: 1.0})
        log.evaluation(3, [2.5])
    assert read_metrics(tmp_path)[-1]["train_loss"] == 2.0


def test_the_line_of_an_evaluation_fits_80_columns(tmp_path, capsys):
    run = run_in(tmp_path)
    run.config = replace(run.config, max_iters=20000)
    with Log(run, None, SimpleNamespace(came=0)) as log:
        log.losses = dict.fromkeys(range(1, 20001), 10.25)
        log.evaluation(20000, [9.75])
    line = capsys.readouterr().out.splitlines()[-1]
    assert "train loss 10.2500 | val loss 9.7500 | 7." in line and len(line) <= 80


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path):
    whole = "".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (1, 2, 3, 4))
    (tmp_path / METRICS_FILE).write_text(whole + '{"step": 5, "lo')  # a kill cut the last line
    for step, kept in ((3, [1, 2, 3]), (0, [])):
        with log_in(tmp_path, step):
            assert [r["step"] for r in read_metrics(tmp_path)] == kept


@pytest.mark.parametrize("room", [0, 5])
def test_a_full_disk_under_the_log_is_told_and_leaves_no_half_line(tmp_path, capsys, room):
    with log_in(tmp_path) as log:
        log.evaluation(1, [2.0])
        before = (tmp_path / METRICS_FILE).read_bytes()
        with largest_file(len(before) + room):
            log.evaluation(2, [2.0])
    assert "warning: metrics.jsonl failed, this record is not in it" in capsys.readouterr().err
    assert (tmp_path / METRICS_FILE).read_bytes() == before


def test_a_full_disk_at_a_resume_is_told_and_the_records_are_right_when_there_is_room(
    tmp_path, capsys
):
    before = "".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (1, 2, 3, 4))
    (tmp_path / METRICS_FILE).write_text(before)
    run = run_in(tmp_path, step=3)  # which makes the data
    with largest_file(5):
        log = Log(run, None, Interrupts())
    assert (tmp_path / METRICS_FILE).read_text() == before
    assert "warning: metrics.jsonl failed" in capsys.readouterr().err
    with log:
        log.evaluation(4, [2.0])
        log.evaluation(5, [2.0])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def at_steps(*steps):
    return [{"step": step, "loss": 1.0} for step in steps]


@pytest.mark.parametrize(
    "records, step, said",
    [
        ([], 1, "ends at step 0, and the run goes on from 1"),
        ([], 9, "ends at step 0, and the run goes on from 9"),
        (at_steps(1, 2, 4), 7, "ends at step 4, and the run goes on from 7"),
        ([*at_steps(1, 2, 4), {"step": 6, "val_loss": 1.0}], 7, "ends at step 4"),
        (at_steps(1, 2, 4, 6, 8), 10, "ends at step 8, and the run goes on from 10"),
        (at_steps(4, 6), 7, "has no record of step 1: its beginning is missing"),
        (at_steps(1, 2, 4, 6), 7, ""),
        (at_steps(1), 1, ""),
        ([], 0, ""),
    ],
)
def test_records_that_must_be_there_and_are_not_are_told(tmp_path, capsys, records, step, said):
    """A record is due at step 1 and at each second one."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / METRICS_FILE).write_text(text)
    with log_in(tmp_path, step):
        pass
    err = capsys.readouterr().err
    assert (said in err and err.count("\n") == 1) if said else not err


def test_a_checkpoint_that_is_a_link_to_nowhere_does_not_stop_a_run(tmp_path):
    (tmp_path / "ckpt_00000001.pt").symlink_to("nowhere")
    with log_in(tmp_path):
        pass


def test_records_whose_file_has_vanished_are_written_again(tmp_path):
    with log_in(tmp_path) as log:
        log.evaluation(1, [2.0])
        (tmp_path / METRICS_FILE).unlink()
        log.evaluation(2, [1.5])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


DAMAGED = {
    "cut": b'{"step": 2, "lo\n',
    "binary": b"\xff\xfe\n",
    "list": b"[1, 2]\n",
    "no step": b'{"loss": 1}\n',
    "deep": b"[" * 10**5 + b"\n",
    "no end": b'{"step": 2}',
    "text": b'{"step": 2, "loss": "\\u001b[2J"}\n',
    "huge": b'{"step": 2, "loss": 1' + b"0" * 400 + b"}\n",
    "infinite": b'{"step": 2, "val_loss": Infinity}\n',
    "above float32": b'{"step": 2, "loss": -1e308}\n',
    "negative": b'{"step": -2, "loss": 1}\n',
    "list of a value": b'{"step": 2, "loss": [1]}\n',
    "watched": b'{"step": 2, "watch": {"rms": ["x"]}}\n',
    "watch is a number": b'{"step": 2, "watch": 5}\n',
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_named_and_left_out(tmp_path, capsys, line):
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1}\n' + line)
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert "metrics.jsonl:2 is damaged and left out" in capsys.readouterr().err


def test_records_that_stand_there_twice_are_left_out(tmp_path, capsys):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
    (tmp_path / METRICS_FILE).write_text("".join(lines * 2))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 3]
    said = "metrics.jsonl:4 is at an earlier step than the line before it and left out (and 1 more)"
    assert said in capsys.readouterr().err


def test_records_are_not_appended_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    for link in (os.link, os.symlink):
        with log_in(tmp_path / "run") as log:
            (tmp_path / "mine").write_text("mine")
            (tmp_path / "run" / METRICS_FILE).unlink()
            link(tmp_path / "mine", tmp_path / "run" / METRICS_FILE)
            log.evaluation(2, [1.5])
        assert (tmp_path / "mine").read_text() == "mine"
        assert [record["step"] for record in read_metrics(tmp_path / "run")] == [2]


def test_a_link_to_nothing_takes_no_room(tmp_path):
    (tmp_path / "ckpt_00000004.pt").symlink_to(tmp_path / "gone")
    with log_in(tmp_path):
        pass


def test_a_line_cannot_command_a_terminal(tmp_path, capsys):
    with log_in(tmp_path) as log:
        log.line("data \x1b]52;c;eA==\x07words\u202e")
    assert "data ]52;c;eA==words\n" in capsys.readouterr().out


def test_a_reader_that_left_asks_the_run_to_stop(tmp_path):
    read, write = os.pipe()
    os.close(read)
    asked = []
    with Output(os.fdopen(write, "wb")) as pipe, log_in(tmp_path, asked=asked) as log:
        log.line("more than nobody reads", pipe)
    assert asked == [13]


def test_a_bar_takes_the_place_of_the_lines_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # there is no terminal
    with log_in(tmp_path) as log:
        before = capsys.readouterr().out
        log.training(1, 2.0, 1e-3, 0.5, 0.1)
    printed = capsys.readouterr()
    assert "10 x 10 = 100 tokens" in before
    assert printed.out == "" and "loss 2.0000, 1,000 tok/s]" in printed.err


def test_a_bar_shows_progress_in_80_columns():
    said = "loss 12.3456, 123,456 tok/s"
    line = tqdm.format_meter(9000, 20000, 3600, ncols=80, bar_format=BAR, postfix=said)
    before, bar, after = line.split("|")
    assert len(line) == 80 and len(bar) >= 15 and after.endswith(f" left, {said}]")


def test_clock():
    assert [clock(s) for s in (0, 59.6, 93, 7265)] == ["0:00", "1:00", "1:33", "2:01:05"]


@pytest.mark.parametrize("name, key", [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_is_the_same_run_for_a_tracker(tmp_path, monkeypatch, name, key):
    begun, told, fake = [], [], type(sys)(name)
    fake.init = lambda **knobs: begun.append(knobs)
    fake.log = lambda record, step: told.append((record, step))
    fake.finish = lambda: told.append("finish")
    monkeypatch.setitem(sys.modules, name, fake)
    for folder in ("one/run", "one/run", "other/run"):
        tracker = open_tracker(run_in(tmp_path / folder, tracker=name, seed=1))
        tracker.send({"step": 3, "loss": 2.0})
        tracker.finish()
    first, again, other = begun
    assert first == again and first["resume"] == "allow" and first["name"].startswith("run")
    assert first["config"]["seed"] == 1 and other[key] != first[key]
    assert told == [({"loss": 2.0}, 3), "finish"] * 3


def test_a_tracker_that_does_not_start_leaves_no_id(tmp_path, monkeypatch):
    fake = type(sys)("trackio")
    monkeypatch.setitem(sys.modules, "trackio", fake)  # which has no init
    with pytest.raises(ValueError, match="tracker=trackio could not be started: "):
        open_tracker(run_in(tmp_path, tracker="trackio"))
    assert not (tmp_path / "trackio.id").exists()


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    sent = []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name, value, step):
            sent.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            sent.append("closed")

    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    tracker = open_tracker(run_in(tmp_path, tracker="tensorboard"))
    tracker.send({"step": 3, "loss": 2.0})
    tracker.finish()
    assert sent == [("step", 3, 3), ("loss", 2.0, 3), "closed"]


def test_the_plot_is_a_picture_and_needs_matplotlib(tmp_path, monkeypatch):
    assert plot_losses(tmp_path) is None
    lines = '{"step": 1, "loss": 2.0}\n{"step": 2, "val_loss": 1.0}\n'
    (tmp_path / METRICS_FILE).write_text(lines)
    assert plot_losses(tmp_path).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_losses(tmp_path) is None


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ["$x_{$", "\udcff", "$", "a\nb"])
def test_the_plot_of_a_run_with_an_odd_name_is_a_picture(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / METRICS_FILE).write_text('{"step": 1, "loss": 2.0}\n')
    assert plot_losses(tmp_path / name).read_bytes().startswith(b"\x89PNG")
