"""Training end to end, in process, on a model that takes milliseconds."""

import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, slow

import train
from data.loader import open_dataset, read_windows
from data.prepare import prepare
from model import Decoder
from run import log, parallel
from run.folder import claim_folder, save_checkpoint
from run.log import Log
from run.machine import choose_dtype
from run.metrics import read_metrics
from run.setup import read_config, set_up
from weights import checkpoint
from weights.lock import Lock

TIMES = ("step_ms", "tok_per_s", "peak_memory_mb")


def final_state(folder):
    """Every tensor of the newest checkpoint by name, and every record without its times."""
    state = checkpoint.load_newest(folder)
    tensors = dict(state["model"]) | {
        f"{n}.{k}": t for n, s in state["optimizer"].items() for k, t in s.items()
    }
    records = [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(folder)]
    return tensors, records


def assert_same_run(a, b):
    (tensors, records), (others, other_records) = final_state(a), final_state(b)
    assert records == other_records
    assert tensors.keys() == others.keys()
    assert [n for n, t in tensors.items() if not torch.equal(t, others[n])] == []


def during_step(monkeypatch, step, act):
    """act() in the middle of optimizer step `step`, counted from 1: when it asks for its batch."""
    batch = train.batch

    def acted(data, at, *rest):
        if at == step - 1:
            act()
        return batch(data, at, *rest)

    monkeypatch.setattr(train, "batch", acted)


def signal_after(monkeypatch, step, number=signal.SIGTERM, times=1):
    """The process gets a signal in the middle of optimizer step `step`."""

    def kill():
        for _ in range(times):
            os.kill(os.getpid(), number)

    during_step(monkeypatch, step, kill)


def reader_leaves(monkeypatch, at):
    """The line that starts with `at` meets a closed pipe."""
    line = Log.line

    def closed(self, text, stream=None):
        if text.startswith(at):
            self.interrupts.ask_to_stop(signal.SIGPIPE)
        line(self, text, stream)

    monkeypatch.setattr(Log, "line", closed)


def loss_times(monkeypatch, factor):
    """The loss of every forward is multiplied by factor(model)."""
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, *a: forward(self, *a) * factor(self))


def gradient_times(monkeypatch, factor, *steps):
    """The gradient of these steps of the process, counted from 1, is `factor` times too large."""
    clip, calls = parallel.clip_gradients, []

    def changed(parameters, most):
        parameters = list(parameters)
        calls.append(1)
        for parameter in parameters if len(calls) in steps else ():
            parameter.grad *= factor
        return clip(parameters, most)

    monkeypatch.setattr(parallel, "clip_gradients", changed)


def compiled_to(monkeypatch, forward):
    """torch.compile makes a module that calls forward(model, x, y)."""

    class Compiled(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            return forward(self.model, x, y)

    monkeypatch.setattr(torch, "compile", lambda model, **_: Compiled(model))


HARD = ["dropout=0.1", "micro_batch_size=2", "eval_interval=3"]


ADAMW, MUON = ["optimizer=adamw"], ["optimizer=muon", "dtype=bfloat16"]


@pytest.mark.parametrize(
    "knobs, cuts",
    [
        (ADAMW, (1, 4)),
        (MUON, (3, 11)),
        (["centred_writers=true"], (7,)),
        slow(ADAMW, range(1, 12)),
        slow(MUON, range(1, 12)),
    ],
)
def test_resume_is_bit_exact(start, tmp_path, monkeypatch, knobs, cuts):
    assert start(*HARD, *knobs, out="whole")[0] == 0
    for cut in cuts:
        with monkeypatch.context() as patch:
            signal_after(patch, cut)
            assert start(*HARD, *knobs, out=f"cut{cut}")[0] == 143
        assert start(*HARD, *knobs, "resume=yes", out=f"cut{cut}")[0] == 0
        assert_same_run(tmp_path / "whole", tmp_path / f"cut{cut}")


def test_dropout_has_other_masks_in_each_step(start, monkeypatch):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda s: (seeds.append(s), seed(s))[1])
    start("dropout=0.1")
    assert len(seeds) == len(set(seeds)) == 12


def test_resume_after_a_kill_redoes_what_was_not_saved(start, tmp_path, monkeypatch):
    knobs = [
        "dropout=0.1",
        "micro_batch_size=2",
        "eval_interval=4",
    ]  # step 8: evaluated, then saved
    assert start(*knobs, out="whole")[0] == 0

    def die():
        raise KeyboardInterrupt  # from nowhere: neither saved nor logged any more

    with monkeypatch.context() as patch:
        during_step(patch, 11, die)
        with pytest.raises(KeyboardInterrupt):
            start(*knobs)
    assert checkpoint.load_newest(tmp_path / "run")["step"] == 8
    assert start(*knobs, "resume=auto")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_runs_folder_is_all_that_going_on_takes(start, tmp_path, monkeypatch):
    """Knobs of the model, of training and of the machine, which nobody repeats."""
    knobs = (
        *HARD,
        "norm=layernorm",
        "dtype=bfloat16",
        "learning_rate=3e-3",
        "seed=7",
        "batch_size=6",
        "micro_batch_size=2",
        "grad_clip=0.3",
    )
    start(*knobs, out="whole")
    with monkeypatch.context() as patch:
        signal_after(patch, 6)
        assert start(*knobs)[0] == 143
    (tmp_path / "run").rename(tmp_path / "moved")
    assert train.main([str(tmp_path / "moved")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "moved")
    assert train.main([str(tmp_path / "moved"), f"out_dir={tmp_path / 'again'}"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "again")
    with pytest.raises(SystemExit, match="2"):  # there is a run by now, which nobody named
        train.main([str(tmp_path / "moved"), f"out_dir={tmp_path / 'again'}", "max_iters=30"])


def test_a_signal_during_evaluation_loses_nothing(start, tmp_path, monkeypatch):
    knobs = (*HARD, "micro_batch_size=1", "max_iters=5")
    assert start(*knobs, out="whole")[0] == 0
    calls = []

    def interrupt(model):
        calls.append(1) if not model.training else None
        if len(calls) == 2 and not model.training:
            os.kill(os.getpid(), signal.SIGINT)
        return 1

    with monkeypatch.context() as patch:
        loss_times(patch, interrupt)
        assert start(*knobs)[0] == 130
    assert len(calls) == 2
    assert start(*knobs, "resume=yes")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_with_its_code(start, tmp_path, monkeypatch, number, code):
    handlers = signal.getsignal(number)
    signal_after(monkeypatch, 6, number)
    result, out, _ = start()
    assert result == code
    assert f"saved at step 6; train.py {tmp_path / 'run'} goes on from here" in out
    assert checkpoint.load_newest(tmp_path / "run")["step"] == 6
    assert signal.getsignal(number) == handlers


def test_the_second_signal_quits_at_once(start, tmp_path, monkeypatch):
    signal_after(monkeypatch, 6, times=2)
    assert start()[0] == 143
    assert checkpoint.load_newest(tmp_path / "run")["step"] == 4


@pytest.mark.parametrize(
    "knobs",
    [
        ["optimizer=muon", "norm=layernorm"],
        ["dtype=bfloat16", "activation_checkpointing=true", "tie_embeddings=true"],
        ["norm_impl=fused", "n_kv_head=1"],
    ],
)
def test_training_learns(start, tmp_path, knobs):
    alone = ("eval_interval=0", "save_interval=0")
    assert start("max_iters=40", "learning_rate=1e-2", *alone, *knobs)[0] == 0
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert abs(losses[0] - math.log(16)) < 0.06
    assert losses[-1] < 2.3


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
def test_compiled_training_is_the_same_training_and_the_same_bits_each_time(
    start, tmp_path, two_threads
):
    knobs = ("n_layer=1", "batch_size=32", "micro_batch_size=32", "eval_interval=0")
    start(*knobs)
    assert start(*knobs, "compile=true", out="compiled")[0] == 0
    eager, compiled = final_state(tmp_path / "run"), final_state(tmp_path / "compiled")
    losses = [[r["loss"] for r in records if "loss" in r] for _, records in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert start(*knobs, "compile=true", out="again")[0] == 0
    assert_same_run(tmp_path / "compiled", tmp_path / "again")


def test_without_compile_no_part_of_the_compiler_is_imported(data_folder, tmp_path):
    """It would take a third of a second, at the start of each training and each sample."""
    code = (
        "import sys, train; assert train.main(sys.argv[1:]) == 0\n"
        "print('imported:', *{'sympy', 'torch._dynamo', 'torch._inductor'} & sys.modules.keys())"
    )
    words = [*SMALL, f"dataset={data_folder / 'words'}", f"out_dir={tmp_path / 'run'}"]
    words += ["optimizer=muon", "sample_tokens=3"]
    words = {word.partition("=")[0]: word for word in words}.values()
    printed = subprocess.check_output([sys.executable, "-c", code, *words], cwd=ROOT).decode()
    assert printed.splitlines()[-1] == "imported:"


def test_a_compiled_run_is_the_same_run(start, tmp_path, no_code):
    knobs = ("n_layer=1", "max_iters=4", "save_interval=2")
    start(*knobs)
    code, out, _ = start(*knobs, "compile=true", out="compiled")
    assert code == 0 and ", compiled" in out and out.count("compiled in ") == 1
    assert_same_run(tmp_path / "run", tmp_path / "compiled")  # no _orig_mod


def test_what_a_run_leaves_behind(start, drawn, tmp_path):
    code, out, err = start()
    run = tmp_path / "run"
    assert code == 0 and err == ""
    assert {p.name for p in run.iterdir()} == {
        "ckpt_00000008.pt",
        "ckpt_00000012.pt",
        "best.pt",
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "loss.png",
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(run)
    assert {"step", "loss", "lr", "grad_norm", "step_ms", "tok_per_s", "peak_memory_mb"} == records[
        0
    ].keys()
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    evaluations = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [5, 10, 12]
    assert evaluations[0]["val_bpb"] == pytest.approx(
        evaluations[0]["val_loss"] / math.log(2)
    )  # one byte per token
    config = json.loads((run / "config.json").read_text())
    assert (config["vocab_size"], config["micro_batch_size"]) == (16, 8)
    assert config["versions"]["torch"] == torch.__version__
    for words in (
        "parameters",
        "validation tokens",
        "tokens per parameter",
        "GB",
        "not compiled",
        "| loss ",
        "| val loss ",
        "bits per byte",
        "tok/s",
        "left",
    ):
        assert words in out, words


def test_best_is_the_checkpoint_with_the_lowest_validation_loss_before_a_resume_or_after(
    start, tmp_path
):
    bad = ["learning_rate=0.3", "eval_interval=1", "min_lr=0.3", "grad_clip=0"]  # on purpose
    for more in (["max_iters=15"], ["max_iters=16", "resume=yes"]):
        assert start(*bad, *more)[0] == 0
        evaluations = {
            r["step"]: r["val_loss"] for r in read_metrics(tmp_path / "run") if "val_loss" in r
        }
        best = checkpoint.load_named(tmp_path / "run", "best")
        assert best["best_val_loss"] == min(evaluations.values()) == evaluations[best["step"]]
        assert best["step"] < max(evaluations) and best["optimizer"] == {}


def test_bits_per_byte_are_of_the_validation_text(start, tmp_path):
    (tmp_path / "text").write_text(
        "ab" * 900 + "\u00e4\u00f6" * 50, encoding="utf-8"
    )  # bytes: 1800, then 200
    prepare([str(tmp_path / "text")], tmp_path / "data", tokenizer="char")
    assert start(f"dataset={tmp_path / 'data'}", "max_iters=1", "warmup_iters=0")[0] == 0
    evaluation = read_metrics(tmp_path / "run")[-1]
    assert evaluation["val_bpb"] == pytest.approx(
        evaluation["val_loss"] / math.log(2) / 2
    )  # two bytes per token


def test_evaluation_is_the_mean_over_all_windows(start, tmp_path, data_folder):
    start(
        "eval_iters=0", "micro_batch_size=8", "dropout=0.5"
    )  # the last micro-batch of windows is not full
    state = checkpoint.load_newest(tmp_path / "run")
    model = checkpoint.build_model(checkpoint.model_config(state), state["model"], "cpu").eval()
    data = open_dataset(data_folder / "words")
    starts = train.val_starts(len(data.val), 32, 0)
    assert len(starts) % 8
    with torch.no_grad():
        losses = [
            model(*read_windows(data.val, starts[i : i + 1], 32)).item() for i in range(len(starts))
        ]
    assert read_metrics(tmp_path / "run")[-1]["val_loss"] == pytest.approx(
        sum(losses) / len(losses), abs=1e-5
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(start, tmp_path, monkeypatch, bad):
    steps = []
    loss_times(
        monkeypatch,
        lambda model: bad if steps.append(model.training) or steps.count(True) == 6 else 1,
    )
    code, _, err = start()
    assert code == 3
    assert "at step 6: stopped before the update" in err and "ckpt_00000004.pt" in err
    assert [step for step, _ in checkpoint.all_in(tmp_path / "run")] == [4]


def test_a_gradient_that_is_not_finite_stops_too(start, monkeypatch):
    gradient_times(monkeypatch, float("nan"), 1)
    code, _, err = start()
    assert code == 3 and "at step 1: stopped" in err and "none yet" in err


def test_gradients_are_clipped(start, tmp_path):
    start("grad_clip=1e-9", "weight_decay=0", "optimizer=muon", "muon_momentum=0")
    start("grad_clip=0", "weight_decay=0", "optimizer=muon", "muon_momentum=0", out="free")
    states = [checkpoint.load_newest(tmp_path / name)["optimizer"] for name in ("run", "free")]
    norms = [s["head.weight"]["exp_avg"].norm() for s in states]
    assert norms[0] < 1e-8 < 1e-3 < norms[1]


def test_a_fresh_run_never_overwrites_another(start, tmp_path):
    start("max_iters=4")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    code, _, err = start("max_iters=6")
    assert code == 2 and "already holds a run (ckpt_00000004.pt)" in err
    assert f": train.py {tmp_path / 'run'} goes on with it, another out_dir begins another" in err
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_a_best_checkpoint_alone_is_a_run_too(start, tmp_path):
    start("max_iters=4")
    (tmp_path / "run" / "ckpt_00000004.pt").unlink()
    code, _, err = start("max_iters=4")
    assert code == 2 and "already holds a run (best.pt)" in err


def test_a_signal_during_the_last_evaluation_does_not_lose_it(start, tmp_path, monkeypatch):
    start(out="whole")
    with monkeypatch.context() as patch:
        signal_after(patch, 12)
        assert start()[0] == 143
    assert start("resume=auto")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_reader_that_left_with_ctrl_c_does_not_count_as_a_second_signal(
    start, tmp_path, monkeypatch
):
    reader_leaves(monkeypatch, at="step 6/")
    signal_after(monkeypatch, 6, signal.SIGINT)
    assert start()[0] == 130
    assert checkpoint.load_newest(tmp_path / "run")["step"] == 6


def test_a_validation_loss_that_is_not_finite_is_not_success(start, monkeypatch):
    loss_times(monkeypatch, lambda model: 1 if model.training else float("nan"))
    assert start()[0] == 3


def test_a_sample_prompt_the_vocabulary_lacks_is_told_and_left_out(start, monkeypatch):
    planned = []
    monkeypatch.setattr("sample.disable_cudnn_attention", planned.append)
    code, out, _ = start(
        "sample_prompt=class X#", "sample_tokens=3", "max_iters=2", "eval_interval=0"
    )
    assert code == 0
    assert "starts from nothing, not with sample_prompt" in out
    assert "--- sample ---\n" in out
    code, out, _ = start(
        "sample_prompt=the cat", "sample_tokens=3", "max_iters=2", "eval_interval=0", out="other"
    )
    assert code == 0 and "--- sample ---\nthe cat" in out
    assert planned == ["cpu"] * 2  # before the sample, and only then


def test_samples_come_while_it_trains_and_change_nothing(start, tmp_path, monkeypatch):
    start("max_iters=9", out="without")
    knobs = ("max_iters=9", "sample_tokens=5", "sample_interval=3", "sample_prompt=the")
    code, out, err = start(*knobs, "save_interval=2")
    lines = out.splitlines()
    shown = [i for i, line in enumerate(lines) if line == "--- sample ---"]
    assert code == 0 and err == "" and len(shown) == 3  # after steps 3 and 6, and at the end
    for i, step in zip(shown, (3, 6), strict=False):
        assert any(line.startswith(f"step {step}/9 | loss") for line in lines[:i])
        assert any(line.startswith(f"step {step + 1}/9 | loss") for line in lines[i:])
        assert lines[i + 1].startswith("the")
    assert_same_run(tmp_path / "without", tmp_path / "run")
    monkeypatch.setattr(train, "sample_of", lambda run: 1 / 0)
    code, _, err = start(*knobs, out="other")
    assert code == 0 and err.count("warning: the sample could not be made (ZeroDivision") == 3
    code, _, err = start("sample_interval=3", "sample_tokens=0", out="none")
    assert code == 2 and "sample_interval=3 has no effect without sample_tokens above 0" in err


def test_an_automatic_dtype_is_checked_again_on_a_resume_and_can_be_named(start, monkeypatch):
    start("dtype=bfloat16", "max_iters=4")
    choose = choose_dtype

    def older(wanted, device):
        if wanted == "bfloat16":
            raise ValueError("dtype=bfloat16 needs a newer device")
        return choose(wanted, device)

    monkeypatch.setattr("run.setup.choose_dtype", older)
    code, _, err = start("dtype=auto", "resume=yes", "max_iters=8")
    assert code == 2 and "needs a newer device" in err
    assert start("dtype=float32", "resume=yes", "max_iters=8")[0] == 0


def test_resume_yes_needs_a_run_and_auto_does_not(start, tmp_path):
    code, _, err = start("resume=yes")
    assert code == 2 and "there is no checkpoint in" in err and not (tmp_path / "run").exists()
    assert start("resume=auto")[0] == 0


def test_a_finished_run_has_nothing_to_do(start, tmp_path):
    start()
    before = (tmp_path / "run" / "ckpt_00000012.pt").stat().st_mtime_ns
    code, out, _ = start("resume=yes")
    assert code == 0 and "already at step 12 of 12" in out
    assert start("resume=yes", "max_iters=6")[0] == 0
    assert (tmp_path / "run" / "ckpt_00000012.pt").stat().st_mtime_ns == before


def test_a_resume_with_another_model_is_refused_and_one_with_another_rate_is_told(start):
    start("max_iters=4")
    code, _, err = start("resume=yes", "n_layer=3", "seed=5", "max_iters=8")
    assert code == 2
    assert "n_layer: checkpoint=2, now=3" in err
    assert "seed: checkpoint=1337, now=5" in err
    code, out, _ = start("resume=yes", "max_iters=8", "learning_rate=1e-4")
    assert code == 0
    assert "resuming with learning_rate: checkpoint=0.001, now=0.0001" in out
    assert "resuming with max_iters: checkpoint=4, now=8" in out


def test_a_resume_that_lifts_the_learning_rate_says_so(start, monkeypatch):
    start()  # 12 steps, the first two of which are the warm-up
    _, out, _ = start("max_iters=24", "resume=yes")
    assert out.count("learning rate rises") == 1
    assert "rises from 2.45e-05 to 5.71e-04 at step 13, because its schedule has changed" in out
    with monkeypatch.context() as patch:
        signal_after(patch, 1)
        start(out="cut")
    assert "rises" not in start("resume=yes", out="cut")[1]  # but for the warm-up, as planned
    assert "rises" not in start("resume=yes", "max_iters=24", "learning_rate=1e-5", out="cut")[1]


def test_a_resume_on_changed_data_is_refused(start, data_folder, tmp_path):
    start("max_iters=4")
    (tmp_path / "words.txt").write_text((data_folder / "words.txt").read_text()[:-1] + "h")
    prepare([str(tmp_path / "words.txt")], tmp_path / "words", tokenizer="char")
    code, _, err = start("resume=yes", "max_iters=8", f"dataset={tmp_path / 'words'}")
    assert code == 2 and "this is not the run of the checkpoint: " in err
    assert f"{tmp_path / 'words'} does not hold the data any more with which" in err


def test_a_resume_with_another_kind_of_data_says_so_and_not_that_a_tokenizer_is_in_the_way(
    start, data_folder, tmp_path
):
    start("max_iters=4")
    prepare([str(data_folder / "words.txt")], tmp_path / "other", vocab_size=300)
    code, _, err = start("resume=yes", "max_iters=8", f"dataset={tmp_path / 'other'}")
    words = f"{tmp_path / 'other'} does not hold the data of words, with which"
    assert code == 2 and words in err and "delete" not in err


def test_a_resume_from_a_damaged_newest_takes_the_one_before(start, tmp_path):
    start(out="whole")
    start()
    newest = tmp_path / "run" / "ckpt_00000012.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    code, _, err = start("resume=yes")
    assert code == 0 and "damaged" in err and "going on from the one before" in err
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_save_that_fails_does_not_stop_the_training_but_the_last_one_counts(start, monkeypatch):
    save = torch.save

    def full_disk(fails):
        def write(state, file):
            if state["step"] in fails:
                raise RuntimeError("unexpected pos")
            save(state, file)

        monkeypatch.setattr(torch, "save", write)

    full_disk(fails=(4, 5))
    code, _, err = start()
    assert code == 0 and "could not be saved (unexpected pos); training goes on" in err
    full_disk(fails=(12,))
    code, _, err = start(out="other")
    *_, last = err.splitlines()
    assert code == 1 and "Traceback" not in err
    reason = r"^error: .*ckpt_00000012.pt could not be saved \(unexpected pos\)"
    assert re.search(reason + r". Last good .*00000008.pt", last)


def broken_compiler(*_):
    raise torch._dynamo.exc.BackendCompilerFailed(
        lambda: None, RuntimeError("no C++ compiler"), None
    )


def test_a_compiler_that_is_missing_means_eager_with_a_line(start, tmp_path, monkeypatch):
    compiled_to(monkeypatch, broken_compiler)
    code, out, _ = start("compile=true")
    assert code == 0 and "torch.compile does not work here, going on without" in out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compile"] is False


def small_card(model, x, y):
    if len(x) > 2:
        raise torch.cuda.OutOfMemoryError("out of memory")
    return model(x, y)


def test_too_little_gpu_memory_halves_the_micro_batch(start, tmp_path, monkeypatch):
    compiled_to(monkeypatch, small_card)
    code, out, _ = start("compile=true", "eval_interval=0", "max_iters=4")
    assert code == 0 and "out of GPU memory with micro_batch_size=8: trying 4" in out
    assert out.index("trying 2") < out.index("in micro-batches of 2")  # told before it is used
    for config in (
        checkpoint.load_newest(tmp_path / "run")["config"],
        json.loads((tmp_path / "run" / "config.json").read_text()),
    ):
        assert config["micro_batch_size"] == 2
    code, out, _ = start("compile=true", "resume=yes", "max_iters=6", "micro_batch_size=8")
    assert code == 0 and "trying 2" in out


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_warm_up_fills_the_memory_as_the_second_step_does(start, monkeypatch, optimizer):
    """Weights, moments and activations, counted by what is alive in the middle of a forward."""
    alive = {}
    gc.freeze()  # what other tests have left behind is not looked at, of which there is much

    def count(model, x, y):
        gc.collect()
        matrices = [
            t
            for t in gc.get_objects()
            if type(t) in (torch.Tensor, torch.nn.Parameter) and t.ndim == 2
        ]
        alive.setdefault(len(alive), sum(t.numel() for t in matrices))
        return model(x, y)

    compiled_to(monkeypatch, count)
    code, _, _ = start("compile=true", "eval_interval=0", "max_iters=3", f"optimizer={optimizer}")
    gc.unfreeze()
    warm_up, first, second, _ = (alive[i] for i in range(4))
    assert code == 0 and warm_up == second > first


def test_the_warm_up_changes_nothing(start, tmp_path, monkeypatch):
    knobs = ["dropout=0.1", "optimizer=muon"]
    start(*knobs, out="without")
    compiled_to(monkeypatch, lambda model, x, y: model(x, y))  # so there is one, but nothing else
    _, out, _ = start(*knobs, "compile=true")
    assert "compiled in" in out
    assert_same_run(tmp_path / "without", tmp_path / "run")


def test_too_little_gpu_memory_in_an_update_is_not_mended(start, monkeypatch):
    tries = []

    def full(self):
        tries.append(self)
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr("run.optim.AdamW.step", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        start()
    assert len(tries) == 1


def test_what_a_resume_has_read_is_not_written_again(start, tmp_path):
    start("max_iters=8")
    path = tmp_path / "run" / "ckpt_00000008.pt"
    before = path.stat().st_mtime_ns
    start("resume=yes", "eval_interval=0", "save_interval=2", "keep=9")
    assert path.stat().st_mtime_ns == before and path.with_name("ckpt_00000010.pt").exists()


def test_a_finished_run_keeps_what_it_says_of_itself(start, tmp_path):
    start()
    before = (tmp_path / "run" / "config.json").read_bytes()
    code, out, _ = start("resume=yes", "learning_rate=0.5")
    assert code == 0
    assert "nothing to do" in out
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_the_best_of_other_windows_is_not_compared_with(start, tmp_path):
    start("max_iters=8", "eval_interval=4", "learning_rate=1e-2")
    start(
        "max_iters=12",
        "eval_interval=4",
        "eval_iters=2",
        "learning_rate=1",
        "warmup_iters=0",
        "resume=yes",
    )
    # It is worse, but the only one over these windows.
    assert checkpoint.load_named(tmp_path / "run", "best")["step"] == 12


def test_a_best_checkpoint_whose_run_cannot_go_on_is_not_written_over(start, tmp_path):
    folder = tmp_path / "run"
    start()
    for _, path in checkpoint.all_in(folder):
        path.unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, err = start("resume=auto")
    assert code == 2
    assert (
        f"has best.pt but no checkpoint to go on from any more: name another out_dir; "
        f"init_from={folder}/"
    ) in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    code, *_ = start("resume=auto", "save_interval=20")  # as after a kill before the first save
    assert code == 0


def test_automatic_choices_stay_what_they_were_on_a_resume(start, tmp_path):
    start("micro_batch_size=4", "dtype=bfloat16", "max_iters=4")
    start("micro_batch_size=0", "dtype=auto", "compile=auto", "max_iters=8", "resume=yes")
    config = checkpoint.load_newest(tmp_path / "run")["config"]
    chosen = [config[name] for name in ("micro_batch_size", "dtype", "compile")]
    assert chosen == [4, "bfloat16", False]


def test_a_choice_of_ones_own_counts_on_a_resume(start, tmp_path, no_code):
    small = ("n_layer=1", "eval_interval=0")
    start("compile=true", "max_iters=4", *small)
    _, out, _ = start("compile=false", "max_iters=8", *small, "resume=yes")  # False is equal to 0
    assert "resuming with compile: checkpoint=True, now=False" in out
    assert checkpoint.load_newest(tmp_path / "run")["config"]["compile"] is False


def test_a_reader_that_leaves_ends_the_run_with_everything_saved(start, tmp_path, monkeypatch):
    reader_leaves(monkeypatch, at="step 6/")
    assert start()[0] == 128 + signal.SIGPIPE
    assert checkpoint.load_newest(tmp_path / "run")["step"] == 6


def test_a_tracker_that_fails_does_not_stop_the_training(start, tmp_path, monkeypatch):
    sent = []

    def server(folder, knobs):
        def send(record):
            sent.append(record)
            if len(sent) == 3:
                raise ConnectionError("server is down")

        return log.Tracker(send, finish=pytest.fail)  # of what has failed

    monkeypatch.setitem(log.TRACKERS, "wandb", server)
    code, _, err = start("tracker=wandb")
    assert code == 0 and "tracker failed and is left alone" in err and len(sent) == 3
    assert len(read_metrics(tmp_path / "run")) == 15


def test_a_tracker_gets_all_records_before_the_run_ends_and_may_fail_then(start, monkeypatch):
    told = []

    def finish():
        told.append("finish")
        raise ConnectionError("server is down")

    tracker = log.Tracker(lambda record: told.append(record["step"]), finish)
    monkeypatch.setitem(log.TRACKERS, "wandb", lambda folder, knobs: tracker)
    code, _, err = start("tracker=wandb", "max_iters=2", "warmup_iters=0")
    assert code == 0 and told == [1, 2, 2, "finish"]
    assert "tracker failed and is left alone from here on: server is down" in err


def test_a_tracker_that_is_not_installed_is_named(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = start("tracker=wandb")
    assert code == 2 and "pip install wandb" in err and not (tmp_path / "run").exists()


def test_a_padded_vocabulary_is_allowed_and_a_short_one_refused(start):
    assert start("vocab_size=32")[0] == 0
    code, _, err = start("vocab_size=10", out="other")
    assert code == 2 and "vocab_size=10 is below the 16 tokens of " in err


def test_the_python_data_set_is_prepared_when_it_is_missing(
    start, tmp_path, monkeypatch, data_folder
):
    import shutil

    asked = []

    def prepare(sources, out):
        asked.append(sources)
        shutil.copytree(data_folder / "words", out)

    monkeypatch.setattr("run.setup.prepare", prepare)
    monkeypatch.setattr("run.setup.DATA", tmp_path / "empty")
    assert start("dataset=python")[0] == 0 and asked == [["python"]]
    assert start("dataset=python", "resume=auto")[0] == 0 and len(asked) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["dataset=missing"], "no such data set; make it with: python data/prepare.py"),  # row 13
        (["block_size=100000"], "tokens, needs at least block_size + 1"),  # 17
        (["n_embd=1000000", "n_head=2", "n_layer=700"], "billion parameters need about"),  # 10
        (["device=cdua"], "device=cdua is not on this machine; it has cpu"),  # 52
        (["device=cuda:7"], "is not on this machine"),
        (["dtype=float16"], "dtype=float16 needs a CUDA device"),  # 53
        (["stream_dtype=bfloat16", "dtype=float32"], "set dtype=bfloat16, or leave stream_dtype"),
        (["out_dir=/proc/nothing/here"], "/proc/nothing"),  # 30
        (["out_dir={file}"], "is a file: name a folder"),
        (["learing_rate=1"], "did you mean learning_rate?"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(start, tmp_path, arguments, words):
    (tmp_path / "file").touch()
    code, out, err = start(*(a.format(file=tmp_path / "file") for a in arguments))
    assert code == 2
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folders_above_out_dir_that_a_refused_command_made_are_removed(start, tmp_path):
    assert start("dataset=missing", out="deep/er/run")[0] == 2
    assert not (tmp_path / "deep").exists()


def test_what_comes_after_the_last_save_does_not_change_the_exit_code(
    start, drawn, tmp_path, monkeypatch
):
    def damage():
        (tmp_path / "run" / "loss.png").mkdir()
        replaced_by_a_folder(tmp_path / "run" / "tokenizer.json")
        (tmp_path / "run" / "tokenizer.json" / "mine").touch()  # so it cannot be made again

    during_step(monkeypatch, 12, damage)
    code, out, err = start("sample_tokens=3")
    assert code == 0 and "--- sample ---" not in out
    assert err.count("; the run does not need it\n") == 2
    assert "warning: loss.png could not be made" in err
    assert "warning: the sample could not be made" in err


def test_another_tokenizer_in_out_dir_is_refused_before_training(start, tmp_path):
    start("max_iters=4")
    (tmp_path / "run" / "tokenizer.model").write_text("another")
    code, _, err = start("resume=yes")
    assert code == 2 and "tokenizer.model is not the tokenizer of" in err
    assert "move it away, or name another out_dir" in err and err.count("\n") == 1


def test_norms_that_are_compiled_by_themselves_are_announced(start, no_code):
    code, out, _ = start("norm_impl=compile", "n_layer=1", "max_iters=2")
    assert code == 0 and out.index("compiling the model, which takes a while") < out.index("step 1")
    assert "compiled in " in out


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="float16 with a GradScaler needs a CUDA device"
)
def test_float16_resumes_with_its_scaler(start, tmp_path, monkeypatch):
    knobs = ["device=cuda", "dtype=float16"]
    start(*knobs, out="whole")
    with monkeypatch.context() as patch:
        signal_after(patch, 7)
        start(*knobs)
    assert checkpoint.load_newest(tmp_path / "run")["scaler"]["scale"] > 1
    start(*knobs, "resume=yes")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


LONG = [  # 32 steps without a spike come first
    "n_layer=1",
    "max_iters=40",
    "eval_interval=0",
    "save_interval=10",
    "keep=9",
    "warmup_iters=0",
    "grad_clip=0",
]


def test_a_spike_is_left_out_where_that_is_wanted(start, tmp_path, monkeypatch):
    gradient_times(monkeypatch, 1e3, 5, 50)
    code, _, err = start(*LONG, "max_iters=51", "skip_spikes=6", "save_interval=1")
    assert code == 0 and err.count("update skipped") == 1 and "step 50: gradient norm" in err
    weights = [
        checkpoint.load_named(tmp_path / "run", f"{s}")["model"]["embed.weight"]
        for s in (49, 50, 51)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_a_run_without_spikes_is_the_same_with_the_rule(start, tmp_path):
    start(*LONG)
    _, _, err = start(*LONG, "skip_spikes=6", out="ruled")
    assert err == ""
    assert_same_run(tmp_path / "run", tmp_path / "ruled")


def test_a_resumed_run_knows_a_spike_by_the_norms_before_it(start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        gradient_times(patch, 1e3, 37)
        start(*LONG, "skip_spikes=6", out="whole")
    with monkeypatch.context() as patch:
        signal_after(patch, 34)
        start(*LONG, "skip_spikes=6")
    gradient_times(monkeypatch, 1e3, 3)
    assert "step 37: gradient norm" in start(*LONG, "skip_spikes=6", "resume=yes")[2]
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_folder_that_vanished_is_made_again(start, tmp_path, monkeypatch):
    start(out="whole")
    during_step(monkeypatch, 7, lambda: shutil.rmtree(tmp_path / "run"))
    code, _, err = start()
    assert code == 0 and f"warning: {tmp_path / 'run'} has vanished and is made again" in err
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert {"config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_of_the_run_that_was_deleted_is_made_again_with_the_next_save(
    start, tmp_path, monkeypatch, name
):
    file = tmp_path / "run" / name
    before = []
    during_step(monkeypatch, 7, lambda: (before.append(file.read_bytes()), file.unlink()))
    code, _, err = start()
    assert code == 0 and err.count("has vanished and is made again") == 1
    assert file.read_bytes() == before[0]


@pytest.fixture
def claimed(tmp_path, data_folder):
    """A run that has claimed its folder, before its first step."""
    words = [f"out_dir={tmp_path / 'run'}", f"dataset={data_folder / 'words'}"]
    run = set_up(read_config([str(ROOT / "config" / "tiny.py"), *SMALL[:-1], *words]))
    with Lock(run.folder) as lock:
        claim_folder(run, lock)
        yield run


def replaced_by_a_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_text("{}"),
        lambda file: file.write_bytes(file.read_bytes() + b" "),
        replaced_by_a_folder,
        lambda file: (file.unlink(), os.mkfifo(file)),
        lambda file: (file.unlink(), file.symlink_to("nowhere")),
    ],
    ids=["changed", "longer", "a folder", "a FIFO", "a link"],
)
def test_a_file_of_the_run_that_was_changed_is_made_again_with_the_next_save(
    claimed, capsys, name, spoil
):
    file = claimed.folder / name
    before = file.read_bytes()
    spoil(file)
    assert save_checkpoint(claimed, required=True)
    said = f"warning: {file} is not as this run wrote it and is made again\n"
    assert capsys.readouterr().err == said
    assert file.read_bytes() == before
    assert save_checkpoint(claimed, required=True) and not capsys.readouterr().err


def test_what_is_in_the_place_of_a_file_of_the_run_is_named_and_not_lost(claimed, capsys):
    file = claimed.folder / "tokenizer.json"
    replaced_by_a_folder(file)
    (file / "mine").touch()
    assert save_checkpoint(claimed, required=True) and (file / "mine").exists()
    assert f"warning: {file} could not be written again: " in capsys.readouterr().err
    assert checkpoint.load_newest(claimed.folder)["step"] == 0


def test_a_tokenizer_that_is_gone_everywhere_is_made_again(
    start, tmp_path, monkeypatch, data_folder
):
    words, run = tmp_path / "data" / "words", tmp_path / "run"
    shutil.copytree(data_folder / "words", words)

    def delete():
        (words / "tokenizer.json").unlink()
        (run / "tokenizer.json").unlink()

    during_step(monkeypatch, 7, delete)
    code, _, err = start(f"dataset={words}")
    assert code == 0 and f"{run / 'tokenizer.json'} has vanished and is made again" in err
    before = (data_folder / "words" / "tokenizer.json").read_bytes()
    assert (run / "tokenizer.json").read_bytes() == before


def another_run(folder):
    """What another process leaves that has trained there."""
    with Lock(folder):
        (folder / "config.json").write_text("another run's")
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("how", ["moved", "removed", "lock removed"])
def test_a_run_whose_folder_another_one_has_taken_ends(start, tmp_path, monkeypatch, how):
    run, there = tmp_path / "run", {}

    def take():
        if how == "moved":
            run.rename(tmp_path / "old")
        elif how == "removed":
            shutil.rmtree(run)
        else:
            (run / ".lock").unlink()
        there["after"] = another_run(run)

    during_step(monkeypatch, 7, take)
    code, _, err = start()
    assert code == 1 and err.count("\n") == 1
    assert err.startswith(f"error: {run} is not this process's any more")
    assert {path.name for path in run.iterdir()} == there["after"]
    assert (run / "config.json").read_text() == "another run's"


def test_foreign_files_are_neither_replaced_nor_removed(start, drawn, tmp_path):
    run = tmp_path / "run"
    for name in ("config.json", "metrics.jsonl", "tokenizer.json", "loss.png"):
        run.mkdir()
        for file in (name, ".mine.json.tmp", ".config.json.tmp"):
            (run / file).write_text('{"mine": 1}')
        code, _, err = start()
        assert code == 2 and err.count("\n") == 1
        assert f"has a {name}, which is not of a run and would be replaced: name another" in err
        left = {path.name: path.read_text() for path in run.iterdir()}
        assert left == dict.fromkeys((name, ".mine.json.tmp", ".config.json.tmp"), '{"mine": 1}')
        shutil.rmtree(run)


def test_nothing_is_written_through_a_link_in_the_folder_of_a_run(start, drawn, tmp_path):
    start("max_iters=4", "keep=1")
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    names = ["config.json", "tokenizer.json", "loss.png", "metrics.jsonl", ".metrics.jsonl.tmp"]
    names += [".ckpt_00000008.pt.tmp", "ckpt_00000008.pt", "best.pt"]
    for i, name in enumerate(names):
        content = (run / name).read_bytes() if (run / name).exists() else b""
        (outside / name).write_bytes(content)
        (run / name).unlink(missing_ok=True)
        if i % 2:
            os.link(outside / name, run / name)
        else:
            (run / name).symlink_to(outside / name)
    (run / "ckpt_00000008.pt").unlink()  # it would be resumed
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    code, _, err = start("resume=yes", "max_iters=8")
    assert code == 0 and err == ""
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    assert [path.name for path in run.iterdir() if path.is_symlink()] == []
    assert read_metrics(run)[-1]["step"] == 8


def test_a_damaged_checkpoint_takes_no_place_of_a_sound_one(start, tmp_path):
    start("max_iters=8", "save_interval=2", "keep=2")
    damaged = tmp_path / "run" / "ckpt_00000008.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    start("max_iters=9", "save_interval=3", "keep=2", "resume=yes")
    assert [step for step, _ in checkpoint.all_in(tmp_path / "run")] == [6, 9]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_does_not_go_on_without_the_state_of_its_optimizer(start, tmp_path, sharded):
    run, knob = tmp_path / "run", f"sharded={str(sharded).lower()}"
    assert start("max_iters=5", knob)[0] == 0
    for _, path in checkpoint.all_in(run):
        shutil.rmtree(path) if sharded else path.unlink()
    (best,) = run.glob("best*")
    copied = best.rename(run / ("ckpt_00000005" + best.suffix))
    code, _, err = start("max_iters=8", "resume=yes", knob)
    assert code == 2 and err.startswith(f"error: {copied} has no optimizer state")
    assert err.count("\n") == 1


def test_metrics_that_are_missing_at_a_resume_are_told(start, tmp_path):
    start("max_iters=8", "eval_interval=2")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    code, _, err = start("max_iters=12", "eval_interval=2", "resume=yes")
    assert code == 0 and "metrics.jsonl ends at step 0, and the run goes on from 8" in err


def test_data_that_change_while_they_are_read_end_the_run(
    start, tmp_path, monkeypatch, data_folder
):
    words = tmp_path / "data" / "words"
    shutil.copytree(data_folder / "words", words)
    during_step(monkeypatch, 5, lambda: os.utime(words / "train.bin", (1, 1)))  # is no change
    zeros = bytes((words / "train.bin").stat().st_size)
    during_step(monkeypatch, 7, lambda: (words / "train.bin").write_bytes(zeros))
    code, out, err = start(f"dataset={words}")
    assert "step 6/12" in out and "step 7/12" not in out
    text = r"error: .*train.bin was changed while .* Last good .*00000004.pt.\n"
    assert code == 1 and re.fullmatch(text, err)


@pytest.fixture
def begun_with_text(start, tmp_path, monkeypatch, data_folder):
    """A run of four steps in tmp_path/run, begun in tmp_path with dataset=d/p.txt; and the same run
    of twelve steps, uncut.
    """
    monkeypatch.setattr("run.setup.DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "elsewhere").mkdir()
    text = tmp_path / "d" / "p.txt"
    text.write_text((data_folder / "words.txt").read_text()[:9000])
    knobs = ["dataset=d/p.txt", "vocab_size=512", "eval_interval=0", "save_interval=0"]
    assert start(*knobs, out="whole")[0] == 0
    signal_after(monkeypatch, 4)
    assert start(*knobs)[0] == 143
    return text


@pytest.mark.parametrize("what", ["the same", "elsewhere", "gone", "edited", "not UTF-8"])
def test_a_run_that_was_begun_with_a_text_goes_on_with_the_data_of_then(
    begun_with_text, tmp_path, monkeypatch, capsys, what
):
    changes = {
        "elsewhere": lambda: monkeypatch.chdir(tmp_path / "elsewhere"),
        "gone": begun_with_text.unlink,
        "edited": lambda: begun_with_text.write_text("another text " * 900),
        "not UTF-8": lambda: begun_with_text.write_bytes(b"caf\xe9 " * 900),
    }
    changes.get(what, lambda: None)()
    assert train.main([str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    (made,) = (tmp_path / "data").iterdir()
    state = {"the same": "", "elsewhere": "is not here", "gone": "is not here"}
    words = f"going on with {made}, the data that this run was begun with"
    expected = f"d/p.txt {state.get(what, 'has changed since')}: {words}\n"
    assert (expected in capsys.readouterr().out) == (what != "the same")


def test_an_edited_text_whose_data_are_gone_is_told_and_not_prepared_in_their_place(
    begun_with_text, tmp_path, capsys
):
    (made,) = (tmp_path / "data").iterdir()
    shutil.rmtree(made)
    before = begun_with_text.read_text()
    begun_with_text.write_text("another text " * 900)
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert f"d/p.txt has changed since this run was begun, and {made}, made of it then" in err
    assert list((tmp_path / "data").iterdir()) == []
    begun_with_text.write_text(before)
    assert train.main([str(tmp_path / "run")]) == 0


def test_data_under_another_name_are_found_and_another_text_is_refused(
    begun_with_text, tmp_path, capsys
):
    (made,) = (tmp_path / "data").iterdir()
    made.rename(tmp_path / "data" / "moved")
    (tmp_path / "other.txt").write_text("another text " * 900)
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "run"), "dataset=./other.txt"])
    err = capsys.readouterr().err
    assert "error: this is not the run of the checkpoint: " in err
    assert f"does not hold the data of {made.name}, with which" in err
    begun_with_text.unlink()
    assert train.main([str(tmp_path / "run")]) == 0
    assert f"going on with {tmp_path / 'data' / 'moved'}, the data" in capsys.readouterr().out


def test_a_signal_that_ends_the_compiler_is_not_taken_for_a_broken_one(
    start, tmp_path, monkeypatch, no_code
):
    start("compile=true", "max_iters=4", out="whole")

    def killed(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        broken_compiler(*arguments)

    with monkeypatch.context() as patch:
        compiled_to(patch, killed)
        code, out, _ = start("compile=true", "max_iters=4")
    assert code == 130 and "does not work here" not in out and not (tmp_path / "run").exists()
    assert start("compile=true", "max_iters=4", "resume=auto")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_leaves_nothing(start, tmp_path, monkeypatch, number):
    handlers = signal.getsignal(number)
    monkeypatch.setattr("run.setup.resolve", lambda *_: os.kill(os.getpid(), number))
    assert start()[0] == 128 + number
    assert not (tmp_path / "run").exists() and signal.getsignal(number) == handlers


def test_a_closed_terminal_saves_however_often_it_is_told(start, tmp_path, monkeypatch):
    signal_after(monkeypatch, 6, signal.SIGHUP, times=2)
    code, out, _ = start()
    assert code == 129 and "SIGHUP: saved at step 6" in out


def test_a_signal_in_a_long_step_waits_only_for_its_micro_batch(start, tmp_path, monkeypatch):
    knobs = ("micro_batch_size=1", "dropout=0.1", "save_interval=0", "max_iters=4")
    start(*knobs, out="whole")
    calls = []

    def interrupt(model):
        calls.append(1)
        if len(calls) == 2 * 8 + 3:  # in the third of eight micro-batches of step 3
            os.kill(os.getpid(), signal.SIGTERM)
        return 1

    with monkeypatch.context() as patch:
        loss_times(patch, interrupt)
        code, out, _ = start(*knobs)
    assert code == 143 and "SIGTERM: saved at step 2" in out and len(calls) == 2 * 8 + 3
    assert start(*knobs, "resume=yes")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_an_ignored_signal_stays_ignored(start, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        signal_after(monkeypatch, 6, signal.SIGHUP)
        assert start()[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_runs_never_write_into_one_folder(start, tmp_path):
    with Lock(tmp_path / "run"):
        code, _, err = start()
    assert code == 2 and re.fullmatch(r"error: .*run is in use by process \d+ on .*\n", err)


def test_too_little_disk_for_the_checkpoints_is_told_before_the_first_step(start, monkeypatch):
    assert "warning" not in start("max_iters=2")[1]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**5))
    warning = r"warning: the checkpoints of this run need up to 0.001 GB, the disk of .* has 0.000"
    assert re.search(warning, start("max_iters=2", out="other")[1])


def says(monkeypatch, make):
    """The tokens of every sample are those that make() yields."""
    monkeypatch.setattr("sample.generate", lambda *_, **__: ([i] for i in make()))


def test_a_signal_while_the_sample_is_made_ends_at_once_and_leaves_the_run(
    start, tmp_path, monkeypatch
):
    says(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT) or [0])
    assert start("sample_tokens=3")[0] == 130
    assert checkpoint.load_newest(tmp_path / "run")["step"] == 12


def test_the_sample_at_the_end_stops_where_its_text_ends(start, tmp_path, monkeypatch, data_folder):
    prepare([str(data_folder / "words.txt")], tmp_path / "bytes", tokenizer="byte")
    says(monkeypatch, lambda: [ord("Q"), 256, ord("Z")])  # 256 begins and ends a text
    code, out, _ = start(f"dataset={tmp_path / 'bytes'}", "sample_tokens=3", "sample_prompt=x")
    assert code == 0 and out.endswith("--- sample ---\nxQ\n")


@pytest.fixture
def beside(start, monkeypatch):
    """A run takes its device for one that still computes when the CPU goes on."""

    def set_up_there(config, ranks):
        run = set_up(config, ranks)
        run.config = replace(run.config, device="cpu:0")
        return run

    set_up = train.set_up
    monkeypatch.setattr(train, "set_up", set_up_there)


def test_the_next_windows_are_read_while_the_device_computes(start, beside, monkeypatch):
    told, read = [], train.batch

    def note(data, step, *rest):
        told.append(f"read {step}")
        return read(data, step, *rest)

    monkeypatch.setattr(train, "batch", note)
    monkeypatch.setattr(train, "check_finite", lambda *_: told.append("waited"))
    assert start("max_iters=3")[0] == 0
    warm_up, *steps = told
    assert warm_up == "read 0"
    assert steps == ["read 0", "read 1", "waited", "read 2", "waited", "waited"]


def test_windows_read_ahead_are_those_of_their_step_alone(claimed):
    """The first steps of a run with a budget of minutes are undone, and done again."""
    zero = train.windows_of(claimed, 0)
    claimed.config = replace(claimed.config, device="cpu:0")
    claimed.step = 4
    train.read_ahead(claimed)
    assert train.windows_of(claimed, 5) is claimed.ahead[1]
    assert all(map(torch.equal, train.windows_of(claimed, 0), zero))


def test_reading_ahead_changes_nothing_and_its_failure_is_that_of_the_next_step(
    start, request, tmp_path, monkeypatch
):
    reads, read = [], train.batch

    def fail_at_7(data, step, *rest):
        reads.append(step)
        if step == 7 and reads.count(7) <= fails:
            raise OSError("the disk is gone")
        return read(data, step, *rest)

    assert start(out="plain")[0] == 0
    request.getfixturevalue("beside")
    monkeypatch.setattr(train, "batch", fail_at_7)
    for fails in (0, 1):
        assert start(out=f"ahead{fails}")[0] == 0
        assert_same_run(tmp_path / "plain", tmp_path / f"ahead{fails}")
        assert reads.count(7) == 1 + fails
        reads.clear()
    fails = 2
    code, _, err = start(out="cut")
    assert code == 1 and "the disk is gone" in err and reads.count(7) == 2
    assert read_metrics(tmp_path / "cut")[-1]["step"] == 7  # the step before was done


WITHOUT_COMPILER = """
import sys
sys.modules["matplotlib"] = None  # no plot, which takes a second
import sample, train
folder, *words = sys.argv[1:]
assert train.main([*words, f"out_dir={folder}"]) == 0
assert sample.main([folder, "compile=false", "device=cpu", "max_new_tokens=5"]) == 0
print(sorted(name for name in sys.modules if name.startswith("torch._dynamo")))
"""


def test_what_is_not_compiled_does_not_wait_for_the_import_of_the_compiler(data_folder, tmp_path):
    """It takes two seconds."""
    words = [*SMALL[:-1], f"dataset={data_folder / 'words'}", "optimizer=muon"]
    code = [sys.executable, "-c", WITHOUT_COMPILER, str(tmp_path / "run"), "config/tiny.py"]
    done = subprocess.run([*code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n[]\n")
