"""bench train times train.py's own step and leaves nothing behind; bench sample times what sample.py does."""

import os
import re
import signal
from functools import partial

import pytest
import torch
from conftest import ROOT, SMALL

import bench
import train
from generate import compiled_step
from model import Decoder, ModelConfig
from quantize import quantize_int8

SHAPE = ("n_layer=2", "n_embd=32", "n_hidden=64", "n_head=2", "vocab_size=48", "tie_embeddings=false", "device=cpu")


def rows_of(out, head):
    """name -> cells of the lines below the one that has `head` in it; cells are two spaces apart."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if head in line)
    assert len({len(line) for line in lines[start:start + 2]}) == 1  # aligned
    table = (re.split(r"\s{2,}", line.strip()) for line in lines[start + 1:])
    return {cells[0]: cells[1:] for cells in table if len(cells) > 2}


def test_bench_train_prints_a_line_for_eager_and_one_for_compiled(measure, monkeypatch, tmp_path):
    timed = []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda run: (timed.append(run.config.compile), step(run))[1])
    one_block = [*SMALL[1:], "n_layer=1"]  # two are compiled in other tests, and take their time
    code, out, _ = measure("train", str(ROOT / "config" / "tiny.py"), *one_block, "steps=4")
    assert code == 0
    assert timed == [False, True] + [True, False, False, True] * 2  # A B B A
    rows = rows_of(out, "of matmul rate")
    assert rows.keys() == {"eager", "compiled"} and all(row[-1].endswith("%") for row in rows.values())
    assert rows["eager"][-2] == "1.00" and "of eager" in out
    assert "matrix products:" in out and "commit" in out and "peak memory" in out
    assert list(tmp_path.iterdir()) == []


def test_bench_train_holds_each_way_against_transformers_eager_and_compiled(measure):
    code, out, _ = measure("train", str(ROOT / "config" / "tiny.py"), *SMALL, "steps=2", "beside=transformers")
    assert code == 0 and "of transformers  of transformers compiled" in out
    rows = rows_of(out, "of matmul rate")
    speeds = {name: float(row[2].replace(",", "")) for name, row in rows.items()}
    assert speeds.keys() == {"eager", "compiled", "transformers", "transformers compiled"}
    for name, row in rows.items():
        for ratio, theirs in zip(row[3:5], ("transformers", "transformers compiled"), strict=True):
            assert float(ratio) == pytest.approx(speeds[name] / speeds[theirs], abs=0.01, rel=0.01)


def test_without_a_compiler_nothing_compiled_is_claimed(measure, monkeypatch):
    def broken(*_, **__):
        raise bench.torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand much more")

    monkeypatch.setattr(bench.torch, "compile", lambda *_, **__: broken)
    code, out, _ = measure("train", str(ROOT / "config" / "tiny.py"), *SMALL, "steps=1", "beside=transformers")
    assert code == 0 and "not measured: transformers compiled: no C++ compiler\n" in out
    assert rows_of(out, "of matmul rate").keys() == {"eager", "eager (no compiler)", "transformers"}


def test_bench_sample_prints_a_line_for_each_way_and_batch(measure):
    code, out, _ = measure("sample", str(ROOT / "config" / "tiny.py"), *SHAPE, "dtypes=float32,bfloat16",
                           "batches=1,3", "tokens=2", "steps=2", "beside=transformers")
    assert code == 0
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines() if " GB/s" in line and "reading" not in line]
    ways = ["float32", "float32 int8", "bfloat16", "bfloat16 int8", "transformers"]
    assert [row[:2] for row in rows] == [[way, batch] for batch in ("1", "3") for way in ways]
    assert all(row[-1].endswith("%") for row in rows) and rows[0][3] == rows[5][3] == "1.00"
    assert [row[4] for row in rows[:2]] == ["0 MB", "0 MB"]
    assert "reading 256 MB: " in out and "commit" in out


def test_more_compiled_ways_than_the_compiler_usually_allows_are_measured(measure, monkeypatch):
    monkeypatch.setattr(bench.torch, "compile", partial(bench.torch.compile, backend="eager"))
    compiled_step.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        code, out, err = measure("sample", *SHAPE, "tokens=1", "steps=1", "compile=true", "dtypes=float32", "batches=1")
    compiled_step.cache_clear()
    assert code == 0 and out.count(" compiled ") == 2, err


def test_what_is_read_for_a_token_is_the_matrices_once_for_all_samples(capsys):
    bench.report_sampling(4, {"ours": (lambda: 100.0, 10**9), "theirs": (lambda: 50.0, 10**9)}, 3, limit=50e9)
    rows = rows_of(capsys.readouterr().out, "of the limit")
    assert rows["ours"] == ["4", "100 (100-100)", "1.00", "1,000 MB", "25.0 GB/s", "50%"]
    assert rows["theirs"][2] == "0.50" and rows["theirs"][-1] == "25%"


def test_each_way_is_made_of_the_same_weights_which_stay(measure, monkeypatch):
    """for_inference packs or rounds in place, so it must not be given what another way is made of."""
    seen = []

    def spoil(model, way):
        seen.append((way.dtype, way.quantize, model.head.weight.clone()))
        model.head.weight.data.zero_()

    monkeypatch.setattr(bench, "for_inference", spoil)
    assert measure("sample", *SHAPE, "tokens=1", "steps=1", "batches=1", "dtypes=float32,bfloat16")[0] == 0
    assert [s[:2] for s in seen] == [("float32", "none"), ("float32", "int8"), ("bfloat16", "none")]
    assert all((s[2] == seen[0][2]).all() and s[2].any() for s in seen)


def test_the_bytes_of_the_matrices_are_those_read_for_a_token():
    shape = dict(n_layer=1, n_head=2, n_embd=32, n_hidden=64, vocab_size=48)
    tied, untied = (Decoder(ModelConfig(**shape, tie_embeddings=tied)) for tied in (True, False))
    block = 4 * 32 * 32 + 3 * 32 * 64
    assert bench.matrix_bytes(tied) == bench.matrix_bytes(untied) == 4 * (block + 48 * 32)
    assert bench.matrix_bytes(quantize_int8(tied)) == block + 48 * 32


@pytest.mark.parametrize("arguments, words", [
    (["trian"], "bench.py measures train, sample, norm, nanogpt, memory, growth, prepare, start, plan, got 'trian'"),
    (["train", "steps=0"], "steps must be 1 or more"), (["train", "steps=x"], "steps must be a whole number"),
    (["train", "learing_rate=1"], "did you mean learning_rate"),
    (["train", "beside=transformer"], "beside must be none or transformers"),
    (["train", "beside=transformers", "norm=layernorm"], "norm=rmsnorm (here it is layernorm)"),
    (["train", "beside=transformers", "norm_pos=post", "ffn=gelu"], "norm_pos=pre (here it is post), ffn=swiglu"),
    (["sample", "beside=transformers", "dropout=0.1"], "dropout=0.0 (here it is 0.1)"),
    (["train", "a.py", "b.py"], "it takes 1 word without '=', got a.py b.py"),
    (["sample", "steps=0"], "steps must be 1 or more"), (["sample", "batches=1,x"], "batches must be a whole number"),
    (["sample", "tokens=0"], "must be 1 or more"), (["sample", "quantize=int4"], "quantize must be none or int8"),
    (["sample", "dtypes=float16", "device=cpu"], "needs a CUDA device"), (["sample", "n_head=7"], "n_embd=128 must be"),
    (["norm", "steps=0"], "steps must be 1 or more"), (["norm", "step=2"], "did you mean steps?"),
    (["norm", "config/tiny.py"], "takes only key=value, got config/tiny.py"),
    (["norm", "shapes=8"], "ROWSxWIDTH, such as 16384x768, got '8'"), (["norm", "shapes=8x0"], "got '8x0'"),
    (["norm", "dtypes=int8"], "dtypes must be float32, bfloat16 or float16, got 'int8'"),
    (["norm", "dtypes=float16", "device=cpu"], "needs a CUDA device"),
    (["norm", "kinds=none"], "kinds must be layernorm, "), (["norm", "impls=quack"], "impls must be eager, "),
    (["norm", "impls=eager,triton", "device=cpu"], "impls=triton: it needs a CUDA device, this is cpu"),
    (["norm", "kinds=dyt", "impls=fused"], "impls=fused has nothing of kinds=dyt"),
    (["norm", "device=cdua"], "device=cdua is not on this machine")])
def test_bad_input_is_one_line(measure, arguments, words):
    code, _, err = measure(*arguments)
    assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_help_lists_the_options_of_all(measure):
    for arguments in (["--help"], ["norm", "-h"]):
        code, out, _ = measure(*arguments)
        assert code == 0 and all(word in out for word in ("shapes=auto", "learning_rate=", "batches=1,4", "llama2c=''",
                                                          "vocab_size=32000", "rounds=1", *bench.BENCHES))


def test_alone_it_measures_everything_that_it_can_and_names_the_rest(measure, monkeypatch):
    tiny = [str(ROOT / "config" / "tiny.py"), *SMALL]
    monkeypatch.setattr(bench, "EVERYTHING", [
        ["train", *tiny, "steps=1", "norm=layernorm", "beside=transformers"], ["nanogpt"],
        ["sample", *SHAPE, "tokens=1", "llama2c=run"],
        ["norm", "shapes=4x8", "kinds=rmsnorm", "impls=eager", "steps=1"]])
    code, out, _ = measure()
    assert code == 0
    parts = out.split("\n$ python bench.py ")[1:]
    assert [part.split()[0] for part in parts] == ["train", "train", "nanogpt", "sample", "norm"]
    assert "not measured: transformers is compared" in parts[0] and "compiled " in parts[1]
    assert "not measured: name a checkout of nanoGPT and a text: python bench.py nanogpt FOLDER TEXT\n" in parts[2]
    assert "not measured: llama2c=run is not a file" in parts[3] and "GB/s" in parts[4]


def test_everything_is_what_the_benches_take():
    """All of the command lines that stand for everything are understood, but for two programs of others."""
    assert {line[0] for line in bench.EVERYTHING} == bench.BENCHES.keys()
    for what, *rest in bench.EVERYTHING:
        options, places, knobs = bench.own_options(bench.BENCHES[what][1], rest)
        assert places == [] and bench.read_config(bench.written(knobs))


def test_ctrl_c_while_measuring_ends_with_130(measure, monkeypatch):
    monkeypatch.setattr("bench_norm.measure_norms", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert measure("norm", "impls=eager", "device=cpu")[0] == 130
