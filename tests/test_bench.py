"""bench train times train.py's own step and leaves nothing behind; bench sample times what sample.py does."""

import pytest
from conftest import ROOT, SMALL

import bench
import train
from model import Decoder, ModelConfig
from quantize import quantize_int8


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


def test_bench_sample_prints_a_line_for_each_way_and_batch(measure):
    shape = ("n_layer=2", "n_embd=32", "n_hidden=64", "n_head=2", "vocab_size=48", "tie_embeddings=false")
    code, out, _ = measure("sample", str(ROOT / "config" / "tiny.py"), *shape, "device=cpu", "dtypes=float32,bfloat16",
                           "batches=1,3", "tokens=2", "steps=2")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if " GB/s" in line and "copies" not in line]
    ways = [["float32"], ["float32", "int8"], ["bfloat16"], ["bfloat16", "int8"]]
    assert [row[:-7] for row in rows] == [way for _ in (1, 3) for way in ways]
    assert [row[-7] for row in rows] == ["1"] * 4 + ["3"] * 4
    assert "copies read and write" in out and "commit" in out


def test_the_bytes_of_the_matrices_are_those_read_for_a_token():
    shape = dict(n_layer=1, n_head=2, n_embd=32, n_hidden=64, vocab_size=48)
    tied, untied = (Decoder(ModelConfig(**shape, tie_embeddings=tied)) for tied in (True, False))
    block = 4 * 32 * 32 + 3 * 32 * 64
    assert bench.matrix_bytes(tied) == bench.matrix_bytes(untied) == 4 * (block + 48 * 32)
    assert bench.matrix_bytes(quantize_int8(tied)) == block + 48 * 32


@pytest.mark.parametrize("arguments, words", [
    (["trian"], "bench.py measures train, sample, norm, got 'trian'"),
    (["train", "steps=0"], "steps must be 1 or more"), (["train", "steps=x"], "steps must be a whole number"),
    (["train", "learing_rate=1"], "did you mean learning_rate"),
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
    for arguments in ([], ["--help"], ["norm", "-h"]):
        code, out, _ = measure(*arguments)
        assert code == 0 and all(word in out for word in ("shapes=auto", "learning_rate=", "batches=1,4"))


def test_ctrl_c_while_measuring_ends_with_130(measure, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bench_norm.measure_norms", interrupt)
    assert measure("norm", "impls=eager", "device=cpu")[0] == 130
