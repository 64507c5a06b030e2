"""What can be proved of CUDA without a GPU, see docs/cuda.md. It takes minutes: `make cuda`.

Private names of PyTorch are replaced for it, so it is for the version in requirements.txt alone.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from data.prepare import prepare

PINNED = re.search(r"^torch==(.*)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
HERE = Path(__file__).parent / "fake_cuda"


def reason_to_skip() -> str:
    """Why there can be no such GPU here, or ''."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "for Linux on x86-64 alone"
    if version("torch").split("+")[0] != PINNED or torch.backends.cuda.is_built():
        return f"for the CPU wheel of torch {PINNED} alone"
    if not shutil.which("g++"):
        return "needs g++"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "needs Python's headers"
    return ""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "it can run"),
]


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    """guard.cpp, compiled."""
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    folder = Path(torch.__file__).parent
    flags = ["-shared", "-fPIC", "-std=c++20", f"-I{folder}/include", f"-L{folder}/lib"]
    command = ["g++", *flags, "-o", library, HERE / "guard.cpp", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


@pytest.fixture
def ask(guard, tmp_path):
    """ask(module, *arguments): what a check prints in a process of its own, where a temporary
    folder takes what is compiled."""

    def run(module, *arguments):
        paths = os.pathsep.join([str(ROOT), str(HERE.parent), *sys.path])
        places = {"PYTHONPATH": paths, "FAKE_CUDA_GUARD": str(guard)}
        places |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(
            command, env=os.environ | places, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def checks(ask, *wanted):
    return ask("fake_cuda.checks", json.dumps(wanted))


TINY = [str(ROOT / "config" / "tiny.py"), "n_layer=1", "batch_size=4", "micro_batch_size=2"]
CUDA = ["device=cuda", "sample_tokens=0", "save_interval=0"]
ONE_WAIT = {"tolist": 1}


def test_training_compiles_a_forward_and_a_backward_and_waits_once_a_step(
    ask, start, data_folder, tmp_path
):
    """All of train.py, begun on a CPU and resumed on CUDA. An evaluation compiles one graph more,
    however often it comes. Uncompiled, the other ways to train wait as rarely."""
    assert start("n_layer=1", "max_iters=2", "save_interval=2")[0] == 0
    lines = [{"prompt": f"{i}?", "completion": "so " * (i % 9)} for i in range(60)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([str(tmp_path / "talks.jsonl")], tmp_path / "talks", "byte")
    resumed = [str(tmp_path / "run"), *CUDA, "dtype=auto", "compile=auto", "max_iters=8"]
    plain = [*TINY, *CUDA, "compile=false", "max_iters=2", "eval_interval=0", "warmup_iters=1"]
    words, talks = (f"dataset={folder}" for folder in (data_folder / "words", tmp_path / "talks"))
    ways = ([words, "optimizer=muon"], [words, "dropout=0.1"], [talks])
    done, *others = checks(
        ask,
        ["steps", [*resumed, "eval_interval=2"], {}],
        *(
            ["steps", [*plain, *way, f"out_dir={tmp_path / str(i)}"], {}]
            for i, way in enumerate(ways)
        ),
    )
    assert done["code"] == 0
    assert done["waits"] == [ONE_WAIT] * 6
    assert done["graphs"] == [2, 2, 3, 3, 3, 3] and done["graphs_at_end"] == 3
    assert [other["waits"] for other in others] == [[ONE_WAIT] * 2] * 3


SHAPE = {  # with fewer heads of keys, so that the queries which share one are rows of a product
    "n_layer": 1,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 256,
    "block_size": 64,
    "vocab_size": 512,
}


def test_a_compiled_token_is_one_cuda_graph_for_all_texts_of_a_size(ask):
    """Texts of 25 to 29 tokens have one size of cache, 32."""
    (found,) = checks(ask, ["token", [[(5, 20), (9, 20), (6, 22)]], SHAPE])
    assert found["graphs"] == [1, 1, 1]
    assert found["partitions"] == ["partition_0"]
    assert found["outside"] == [] and found["skips"] == 0
    for waits in found["waits"]:
        tokens = waits.pop("tokens")
        assert waits.pop("tolist") == tokens
        assert sum(waits.values()) <= 2  # the prompt on its way to the device


def test_a_rank_compiles_blocks_and_loss_and_sends_what_the_formulas_say(ask, data_folder):
    """DDP: each gradient once a step, in fp32. FSDP, for each micro-batch: a Block's matrices twice
    in bfloat16, embedding and head once in fp32, and every gradient of a matrix in fp32; the norms'
    gradients once a step. The rest, up to a few hundred bytes, is how ranks agree."""
    knobs = ["batch_size=16", "micro_batch_size=1", "dtype=bfloat16", "n_layer=2", "block_size=8"]
    wide = ["n_head=8", "n_embd=768", "n_hidden=2048"]  # DDP's buckets, of 25 MB, end in a Block
    ddp, fsdp = ask("fake_ranks", TINY[0], *knobs, *wide, f"dataset={data_folder / 'words'}")
    sizes = ddp["parameters"]
    assert ddp["graphs"] == fsdp["graphs"] == 2  # all Blocks share one, and the loss has one
    assert ddp["sent"].pop("bucket") == 4 * sizes["whole"]
    matrices = sizes["whole"] - sizes["norms"]
    blocks, micro_batches = matrices - sizes["ends"], 2
    gathered = fsdp["sent"].pop("_allgather_base_")
    assert gathered == micro_batches * (2 * 2 * blocks + 4 * sizes["ends"])
    assert fsdp["sent"].pop("_reduce_scatter_base_") == micro_batches * 4 * matrices
    assert 0 <= fsdp["sent"].pop("allreduce_") - 4 * sizes["norms"] < 300
    assert sum(ddp["sent"].values()) + sum(fsdp["sent"].values()) < 300


CARDS = (24, 40, 80, 141)  # GB


@pytest.mark.parametrize("preset", ["llama_124m", "llama_350m", "llama_1b"])
def test_the_automatic_micro_batch_fills_a_card_and_fits_it(ask, tmp_path, preset):
    """The peak of one and of two layers is simulated and goes on linearly, as a third shows."""
    (tmp_path / "text.txt").write_text("so it goes. " * 20_000)
    prepare([str(tmp_path / "text.txt")], tmp_path / "text", "byte")
    path, text = str(ROOT / "config" / f"{preset}.py"), str(tmp_path / "text")
    layers = {card: [1, 2] for card in CARDS}
    if preset == "llama_124m":
        layers[24] = [1, 2, 3]
    found = checks(ask, *(["peak", [path, card, layers[card], text], {}] for card in CARDS))
    for card, peak in zip(CARDS, found, strict=True):
        print(f"{preset} on {card} GB: micro-batch {peak['micro']}, {peak['whole'] / 1e9:.1f} GB")
        assert 0.6 * card * 1e9 < peak["whole"] < card * 1e9, (card, peak)
    if preset == "llama_124m":
        one, two, three = found[0]["peaks"]
        assert three - two == two - one


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which make cuda installs")
def test_every_kernel_of_a_step_and_of_a_token_becomes_machine_code(ask, data_folder):
    """For compute capability 8.0, 8.9 and 9.0."""
    preset, text = str(ROOT / "config" / "llama_124m.py"), str(data_folder / "words")
    (found,) = checks(ask, ["cubins", [preset, text, SHAPE], {}])
    assert found["errors"] == []
    assert found["cubins"] == 3 * found["kernels"] > 90
