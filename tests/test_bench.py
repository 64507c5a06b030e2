"""lab.bench train times train.py's own step and leaves nothing behind; lab.bench sample times what
sample.py does; and what the measurements of lab/ share.
"""

import os
import re
import signal
import threading

import pytest
import torch
from conftest import ROOT, SMALL

from lab import bench
from lab import measure as shared
from model import Decoder, ModelConfig
from sample import compiled_next_ids
from weights.quantize import quantize_int8

TINY = [str(ROOT / "config" / "tiny.py"), *SMALL]
SHAPE = (
    "n_layer=2 n_embd=32 n_hidden=64 n_head=2 vocab_size=48 tie_embeddings=false device=cpu"
).split()


def rows_of(out, head):
    """name -> cells of the lines below that with `head` in it; cells are two spaces apart."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if head in line)
    assert len({len(line) for line in lines[start : start + 2]}) == 1  # aligned
    table = (re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 :])
    return {cells[0]: cells[1:] for cells in table if len(cells) > 2}


# train


def test_bench_train_prints_a_line_for_eager_and_one_for_compiled(measure, tmp_path):
    # One block, because two are compiled in other tests, which take their time.
    code, out, _ = measure("train", TINY[0], *SMALL[1:], "n_layer=1", "steps=4")
    assert code == 0
    rows = rows_of(out, "of matmul rate")
    assert rows.keys() == {"eager", "compiled"}
    assert all(row[0].endswith(" s") and row[-1].endswith("%") for row in rows.values())
    assert rows["eager"][-2] == "1.00" and "of eager" in out
    assert "matrix products:" in out and "commit" in out and "peak memory" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_bench_train_holds_each_way_against_transformers_eager_and_compiled(measure):
    code, out, _ = measure("train", *TINY, "steps=2", "beside=transformers")
    assert code == 0 and "of transformers  of transformers compiled" in out
    rows = rows_of(out, "of matmul rate")
    speeds = {name: float(row[2].replace(",", "")) for name, row in rows.items()}
    assert speeds.keys() == {"eager", "compiled", "transformers", "transformers compiled"}
    for name, row in rows.items():
        for ratio, theirs in zip(row[3:5], ("transformers", "transformers compiled"), strict=True):
            assert float(ratio) == pytest.approx(speeds[name] / speeds[theirs], abs=0.01, rel=0.01)


def test_without_a_compiler_nothing_compiled_is_claimed(measure, monkeypatch):
    def compiled(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand much more")

    # The machines that run the tests have a compiler.
    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    code, out, _ = measure("train", *TINY, "steps=1")
    assert code == 0
    assert rows_of(out, "of matmul rate").keys() == {"eager", "eager (no compiler)"}
    norms = "norm shapes=4x8 kinds=rmsnorm dtypes=float32 steps=1 device=cpu".split()
    code, out, _ = measure(*norms)
    assert code == 0 and "without compile: no C++ compiler\n" in out
    assert "eager" in out and "fused" in out
    code, _, err = measure(*norms, "impls=compile")
    assert code == 2 and err == "error: impls=compile: no C++ compiler\n"


# sample


@pytest.mark.parametrize("more", [[], pytest.param(["transformers"], marks=pytest.mark.slow)])
def test_bench_sample_prints_a_line_for_each_way_and_batch(measure, more):
    options = "dtypes=float32,bfloat16 batches=1,3 tokens=2 steps=2".split()
    options += [f"beside={name}" for name in more]
    code, out, _ = measure("sample", *TINY[:1], *SHAPE, *options)
    assert code == 0
    lines = [line for line in out.splitlines() if " GB/s" in line and "reading" not in line]
    rows = [re.split(r"\s{2,}", line) for line in lines]
    ways = ["float32", "float32 int8", "bfloat16", "bfloat16 int8", *more]
    assert [row[:2] for row in rows] == [[way, batch] for batch in ("1", "3") for way in ways]
    assert all(row[-1].endswith("%") for row in rows) and rows[0][3] == rows[len(ways)][3] == "1.00"
    assert [row[4] for row in rows[:2]] == ["0 MB", "0 MB"]
    assert "reading 256 MB: " in out and "commit" in out


def test_more_compiled_ways_than_the_compiler_usually_allows_are_measured(measure):
    options = "tokens=1 steps=1 compile=true dtypes=float32 batches=1".split()
    compiled_next_ids.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        code, out, err = measure("sample", *SHAPE, *options)
    compiled_next_ids.cache_clear()
    assert code == 0 and out.count(" compiled ") == 2, err


def test_what_is_read_for_a_token_is_the_matrices_once_for_all_samples(capsys):
    ways = {"ours": bench.Way(lambda batch: 25.0 * batch, 10**9)}
    ways["theirs"] = bench.Way(lambda batch: 50.0, 10**9)
    bench.report_sampling(4, ways, 3, limit=50e9)
    rows = rows_of(capsys.readouterr().out, "of the limit")
    assert rows["ours"] == ["4", "100 (100-100)", "1.00", "1,000 MB", "25.0 GB/s", "50%"]
    assert rows["theirs"][2] == "0.50" and rows["theirs"][-1] == "25%"


SHAPES = dict(n_layer=1, n_head=2, n_embd=32, n_hidden=64, vocab_size=48)
BLOCK = 4 * 32 * 32 + 3 * 32 * 64  # elements of the matrices of one Block


def test_each_way_is_made_of_the_same_weights_which_stay():
    """sample.py packs or rounds the weights in place, so each way needs a copy of its own."""
    base = Decoder(ModelConfig(**SHAPES, tie_embeddings=False))
    before = [weight.clone() for weight in base.parameters()]
    options = bench.SampleBench(dtypes="float32,bfloat16")
    found = bench.our_ways(base, bench.ways_to_sample(options, "cpu"), tokens=1)
    assert list(found) == ["float32", "float32 int8", "bfloat16", "bfloat16 int8"]
    assert all(map(torch.equal, base.parameters(), before)) and len(before) > 4
    assert found["float32 int8"].size == found["bfloat16 int8"].size == BLOCK + 48 * 32
    assert all(way.rate(2) > 0 for way in found.values())


def test_the_bytes_of_the_matrices_are_those_read_for_a_token():
    tied, untied = (Decoder(ModelConfig(**SHAPES, tie_embeddings=tied)) for tied in (True, False))
    assert bench.matrix_bytes(tied) == bench.matrix_bytes(untied) == 4 * (BLOCK + 48 * 32)
    assert bench.matrix_bytes(quantize_int8(tied)) == BLOCK + 48 * 32


# All benches


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("trian", "lab.bench measures train, sample, norm, nanogpt, memory, gpu, got 'trian'"),
        ("train steps=0", "steps must be 1 or more"),
        ("train steps=x", "steps must be a whole number"),
        ("train learing_rate=1", "did you mean learning_rate"),
        ("train beside=transformer", "beside must be none or transformers"),
        ("train beside=transformers norm=layernorm", "norm=rmsnorm (here it is layernorm)"),
        (
            "train beside=transformers norm_pos=post ffn=gelu induction_init=false",
            "norm_pos=pre (here it is post), ffn=swiglu",
        ),
        ("train beside=transformers dtype=float16", "what Llama has: no dtype=float16"),
        ("sample beside=transformers dropout=0.1", "dropout=0.0 (here it is 0.1)"),
        ("train a.py b.py", "one preset at most, got a.py b.py"),
        ("sample steps=0", "steps must be 1 or more"),
        ("sample batches=1,x", "batches must be a whole number"),
        ("sample batches=1,0", "batches must be 1 or more"),
        ("sample tokens=0", "must be 1 or more"),
        ("sample quantize=int4", "quantize must be none or int8"),
        ("sample dtypes=float16 device=cpu", "needs a CUDA device"),
        ("sample n_head=7", "n_embd=192 must be"),
        ("sample n_layer=700 n_embd=9216 n_head=72", "billion parameters need about"),
        ("norm steps=0", "steps must be 1 or more"),
        ("norm step=2", "did you mean steps?"),
        ("norm config/tiny.py", "takes only key=value, got config/tiny.py"),
        ("norm shapes=8", "ROWSxWIDTH, such as 16384x768, got '8'"),
        ("norm shapes=8x0", "got '8x0'"),
        ("norm dtypes=int8", "dtypes must be float32, bfloat16 or float16, got 'int8'"),
        ("norm dtypes=float16 device=cpu", "needs a CUDA device"),
        ("norm kinds=none", "kinds must be layernorm, "),
        ("norm impls=quack", "impls must be eager, "),
        ("norm impls=eager,liger device=cpu", "liger: it needs a CUDA device, this is cpu"),
        ("norm kinds=dyt impls=fused", "impls=fused has nothing of kinds=dyt"),
        ("norm device=cdua", "device=cdua is not on this machine"),
        ("nanogpt", "name a checkout of nanoGPT and a text"),
        ("nanogpt nowhere nothing", "name a checkout of nanoGPT"),
        ("nanogpt a b c", "name a checkout of nanoGPT"),
        ("nanogpt rounds=0", "must be 1 or more"),
        ("nanogpt preset=config/nothing.py", "name a checkout"),
        ("memory norm=dyt induction_init=false", "norm=rmsnorm (here it is dyt)"),
        ("memory steps=0", "must be 1 or more"),
        ("memory learing_rate=1", "did you mean learning_rate"),
        ("memory rounds=x", "rounds must be a whole"),
        ("memory n_heads=2", "did you mean n_head"),
        ("gpu tiny", "takes only key=value, got tiny"),
        ("gpu part=rates", "did you mean parts?"),
        ("gpu parts=rates,124", "parts must be rates, 124m, "),
        ("gpu device=cuda:99", "device=cuda:99 is not on this machine"),
        ("gpu dataset=nowhere", "dataset=nowhere: "),
        ("gpu nanogpt=nowhere", "nowhere has no bench.py: name a checkout"),
        ("gpu text=nowhere", "text=nowhere is no file: name nanoGPT's input.txt"),
    ],
)
def test_bad_input_is_one_line(measure, arguments, words):
    code, _, err = measure(*arguments.split())
    assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_help_lists_the_options_of_all(measure):
    for arguments in (["--help"], ["norm", "-h"]):
        code, out, _ = measure(*arguments)
        words = ("shapes=auto", "learning_rate=", "batches=1,4", "rounds=1", *bench.BENCHES)
        assert code == 0 and all(word in out for word in words) and "python -m lab.bench" in out


def test_alone_it_measures_everything_that_it_can_and_names_the_rest(measure, monkeypatch):
    lines = [
        ["train", *TINY, "steps=1", "norm=layernorm", "beside=transformers"],
        ["nanogpt"],
        ["sample", *SHAPE, "tokens=1", "beside=nothing"],
        ["norm", "shapes=4x8", "kinds=rmsnorm", "impls=eager", "steps=1"],
    ]
    # The real list takes half an hour.
    monkeypatch.setattr(bench, "EVERYTHING", [" ".join(line) for line in lines])
    code, out, _ = measure()
    assert code == 0
    parts = out.split("\n$ python -m lab.bench ")[1:]
    assert [part.split()[0] for part in parts] == ["train", "train", "nanogpt", "sample", "norm"]
    assert "not measured: transformers is compared" in parts[0] and "compiled " in parts[1]
    assert "not measured: name a checkout of nanoGPT and a text: python -m lab.bench" in parts[2]
    assert "not measured: command line: beside must be none or transformers" in parts[3]
    assert "GB/s" in parts[4]


def test_everything_is_what_the_benches_take():
    lines = [line.split() for line in bench.EVERYTHING]
    assert {line[0] for line in lines} == bench.BENCHES.keys() - {"gpu"}
    for what, *rest in lines:
        _, places, knobs = shared.read_options(bench.BENCHES[what][1], rest)
        assert places == [] and bench.read_config(shared.as_arguments(knobs))


def test_ctrl_c_while_measuring_ends_with_130(measure):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    endless = ("shapes=8x8", "dtypes=float32", "impls=eager", "steps=1000000000", "device=cpu")
    assert measure("norm", *endless)[0] == 130


# What the measurements share


def test_what_is_compared_is_called_in_turn():
    calls = []
    two = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert shared.values_in_turn(two, 3) == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert calls == list("abbaab")


def test_median_and_quartiles():
    assert shared.spread([1.0]) == "1 (1-1)"
    assert shared.spread([0.001, 0.002, 0.003, 0.004, 0.005], 1000, 1) == "3.0 (2.0-4.0)"
