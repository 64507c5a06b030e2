"""What the tests share: a small text, a data set made of it, and a way to train on it."""

import contextlib
import gc
import io
import os
import random
import resource
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
import torch._dynamo  # tests that compile need it; here, so that the garbage collector skips it

import train
from data.prepare import prepare
from lab import bench
from run.log import Tracker
from run.metrics import plot_losses

torch.set_num_threads(1)  # the models here are so small that threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start

ROOT = Path(__file__).parent.parent
SMALL = [
    "n_layer=2",
    "n_head=2",
    "n_embd=32",
    "n_hidden=64",
    "block_size=32",
    "batch_size=8",
    "max_iters=12",
    "warmup_iters=2",
    "eval_interval=5",
    "eval_iters=4",
    "save_interval=4",
    "log_interval=1",
    "sample_tokens=0",
    "device=cpu",
    "dtype=float32",
    "compile=false",
    "dataset=words",
]


def slow(*values):
    """A row of a parametrized test that only `make test-all` tries: other rows show the same."""
    return pytest.param(*values, marks=pytest.mark.slow)


def prepare_words(folder, name="words", seed=0):
    """Makes the data set folder/name: made-up prose, one token per character."""
    pick = random.Random(seed)
    text = " ".join(
        pick.choice("the cat sat on a mat and saw the rat run to its hole".split())
        for _ in range(5000)
    )
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    prepare([str(folder / f"{name}.txt")], folder / name, tokenizer="char")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A folder with the data set `words`."""
    folder = tmp_path_factory.mktemp("data")
    prepare_words(folder)
    return folder


def pytest_collection_finish(session):
    """What has been imported stays to the end, so the garbage collector need not look at it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """No run draws its loss.png, which would take longer than a run of a model as small as here."""
    monkeypatch.setattr(train, "plot_losses", lambda folder: None)


@pytest.fixture
def drawn(undrawn, monkeypatch):
    """Runs draw their loss.png after all."""
    monkeypatch.setattr(train, "plot_losses", plot_losses)


@contextlib.contextmanager
def largest_file(size):
    """No file of this process grows beyond `size` bytes meanwhile: a write ends there, and the next
    one fails, as on a full disk. Not for a whole test, whose own output may be a file.
    """
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def launch_here(command, threads):
    """Stands for compare.launch: train.py in this process, and done when it returns."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            code = train.main(command)
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(
        stdout=io.BytesIO(out.getvalue().encode()),
        wait=lambda: code,
        send_signal=lambda number: None,
        terminate=lambda: None,
    )


def tracker_to(sent):
    """A tracker whose records end in the list `sent`."""
    return Tracker(sent.append, finish=lambda: None)


@pytest.fixture(scope="session")
def letters():
    """The bytes of a SentencePiece model that knows a few letters and no bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a bad cab", "a dab"]),
        model_writer=model,
        model_type="char",
        vocab_size=10,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def start(tmp_path, data_folder, capsys):
    """start('key=value', ...) trains a very small model in tmp_path/run: (exit code, stdout,
    stderr).
    """

    def run(*arguments, out="run"):
        words = [f"out_dir={tmp_path / out}", f"dataset={data_folder / 'words'}"]
        knobs = {a.split("=")[0]: a for a in [*SMALL, *words, *arguments]}  # later ones win
        try:
            code = train.main([str(ROOT / "config" / "tiny.py"), *knobs.values()])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def no_code(monkeypatch):
    """torch.compile finds its graphs, but makes no code of them, which would take a minute in all:
    for tests that are not about what compiled code computes.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.fixture
def measure(monkeypatch, tmp_path, data_folder, capsys, no_code):
    """measure('train', ...) runs lab.bench in an empty folder: (exit code, stdout, stderr)."""
    assert not torch._dynamo.config.disable  # it reads the variable once, before it is set
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setattr("run.setup.DATA", data_folder)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            code = bench.main(list(arguments))
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
