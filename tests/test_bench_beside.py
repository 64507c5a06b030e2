"""What stands beside ours computes the same as ours, and other programs are run, read and believed
as they should. Small programs that write what nanoGPT writes stand for it.
"""

import os
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL
from test_bench import SHAPE, rows_of

from data.loader import batch
from lab import bench_beside as beside
from lab.measure import fresh_run
from model import Decoder, ModelConfig
from run.setup import read_config
from weights.hf_folder import hf_name

TINY = [str(ROOT / "config" / "tiny.py"), *SMALL]


@pytest.fixture
def config(data_folder):
    """That of a very small run, in micro-batches of 2."""
    knobs = [knob for knob in TINY if not knob.startswith("dataset")]
    return read_config([*knobs, f"dataset={data_folder / 'words'}", "micro_batch_size=2"])


# transformers


@pytest.mark.parametrize(
    "more", [{}, {"tie_embeddings": True, "n_kv_head": 1}, {"qk_norm": True, "n_hidden": 48}]
)
def test_the_model_of_transformers_is_ours_under_other_names(more):
    """With our weights it has our loss, so it does the same work."""
    shape = dict(n_layer=2, n_head=2, n_embd=32, n_hidden=64, block_size=16, vocab_size=50)
    config = ModelConfig(**shape | more)
    ours, theirs = Decoder(config), beside.hf_model(config)
    weights = {hf_name(name): weight for name, weight in ours.named_parameters()}
    missing = theirs.load_state_dict(weights, strict=False)
    assert missing.unexpected_keys == [] and set(missing.missing_keys) <= {"lm_head.weight"}
    x = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0))
    wanted = ours(x[:, :-1], x[:, 1:])
    assert theirs(input_ids=x, labels=x).loss.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_a_step_of_theirs_trains_on_our_batches_in_our_micro_batches(config):
    run = fresh_run(config)
    model, seen, losses = beside.hf_model(run.config.model), [], []

    def note(module, arguments, named, output):
        seen.append(named["input_ids"])
        losses.append(output.loss.item())

    model.register_forward_hook(note, with_kwargs=True)
    step = beside.plain_loop(model, run.data, run.config)
    assert all(step() > 0 for _ in range(20))
    asked = [batch(run.data, i, 8, 32, run.config.seed)[0].split(2) for i in range(20)]
    assert len(seen) == 20 * 4 and all(map(torch.equal, seen, [x for part in asked for x in part]))
    assert sum(losses[-8:]) < 0.98 * sum(losses[:8])


def test_transformers_is_timed_without_the_first_token_and_makes_as_many_as_ours():
    def generate(prompts, max_new_tokens, streamer, **_):
        assert prompts.shape == (3, 1) and max_new_tokens == 1 + 5
        streamer.put("the prompt")
        time.sleep(1.0)
        for _ in range(max_new_tokens):
            streamer.put("a token")
            time.sleep(0.02)
        streamer.end()

    model = beside.hf_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, n_hidden=16, vocab_size=9))
    assert beside.generate_rate(model, 5, 3) > 0 and not model.training
    here = dict(device="cpu", generation_config=SimpleNamespace(), eval=lambda: None)
    slow = SimpleNamespace(generate=generate, **here)
    assert 3 * 5 / 1.0 < beside.generate_rate(slow, 5, 3) <= 3 * 5 / (5 * 0.02)


def test_without_transformers_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="^transformers is not installed: pip install"):
        beside.hf_model(ModelConfig())


@pytest.mark.slow
def test_without_transformers_the_command_says_so_in_one_line(measure, monkeypatch, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, _, err = measure("sample", *SHAPE, "beside=transformers")
    assert code == 2 and err == "error: transformers is not installed: pip install -e '.[hf]'\n"


@pytest.mark.slow
def test_theirs_run_in_a_process_of_their_own_that_answers_call_by_call(config):
    with beside.OwnProcess("step", config) as step:
        assert step.child.pid != os.getpid() and step.child.poll() is None
        assert step() > 0 and step() > 0
    assert step.child.returncode == 0  # it ended with its input


@pytest.mark.slow
def test_a_process_that_fails_is_one_line_with_its_last_words(config):
    with pytest.raises(ValueError, match="nothing_here: no such data set"):
        beside.OwnProcess("step", config, dataset="nothing_here")
    small = replace(config, model=replace(config.model, vocab_size=9))
    with beside.OwnProcess("rate", small) as rate:
        assert rate(2, 1) > 0
        words = "^transformers ended with 1: RuntimeError: .*must be non-negative"
        with pytest.raises(ValueError, match=words):
            rate(2, -1)


# nanoGPT

TRAIN = """import os, sys, torch
from model import GPT, GPTConfig
knobs = dict(a.removeprefix("--").split("=") for a in sys.argv[2:])
assert sys.argv[1] == "config/train_shakespeare_char.py"
assert knobs["device"] == "cpu" and knobs["block_size"] == "64"
vocab = len(set(open("data/shakespeare_char/input.txt").read()))
os.makedirs("out-shakespeare-char", exist_ok=True)
model = GPT(GPTConfig(vocab_size=vocab))
for i in range(4):
    print(f"iter {i}: loss 3.0000, time {i}.50ms, mfu 1.00%")
saved = {"model": model.state_dict(), "model_args": {"vocab_size": vocab}, "iter_num": 4,
         "best_val_loss": torch.tensor(1.0), "optimizer": {}}
torch.save(saved, "out-shakespeare-char/ckpt.pt")
"""
MODEL = """import torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    vocab_size: int
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: 0.00M")
        V = config.vocab_size
        self.table = torch.nn.Parameter(torch.arange(V ** 2.0).sin().view(V, V))
    def get_num_params(self):
        return self.table.numel()
    def forward(self, x, y):
        logits = self.table[x]
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""
PREPARE = """import os, numpy as np
here = os.path.dirname(__file__)
data = open(os.path.join(here, "input.txt")).read()
ids = {c: i for i, c in enumerate(sorted(set(data)))}
cut = int(len(data) * 0.9)
for name, part in (("train", data[:cut]), ("val", data[cut:])):
    np.array([ids[c] for c in part], dtype=np.uint16).tofile(os.path.join(here, name + ".bin"))
"""


@pytest.fixture
def nanogpt_folder(tmp_path):
    """Programs that write what nanoGPT's write, with a model whose loss differs by window."""
    folder = tmp_path / "theirs"
    place = folder / "data" / "shakespeare_char"
    place.mkdir(parents=True)
    (folder / "train.py").write_text(TRAIN)
    (folder / "model.py").write_text(MODEL)
    (place / "prepare.py").write_text(PREPARE)
    (place / "val.bin").write_bytes(b"of another text")
    return folder


OURS = [knob for knob in SMALL if not knob.startswith(("dataset", "block_size", "eval_iters"))]
OURS += ["preset=config/tiny.py", "block_size=64", "eval_iters=0"]


def bytes_in(*folders):
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_bench_nanogpt_prints_both_and_ours_for_as_long(
    measure, nanogpt_folder, data_folder, monkeypatch
):
    windows, evaluate = [], beside.evaluate
    monkeypatch.setattr(
        beside, "evaluate", lambda *a, **k: windows.append(k["block_size"]) or evaluate(*a, **k)
    )
    before = bytes_in(nanogpt_folder, ROOT / "data")
    text = (data_folder / "words.txt").read_text()
    place = [str(nanogpt_folder), str(data_folder / "words.txt")]
    code, out, err = measure("nanogpt", *place, *OURS)
    assert code == 0, err
    rows = rows_of(out, "less nanoGPT's")
    assert list(rows) == ["nanoGPT", "ours", "ours, as long"]
    assert [rows[name][2] for name in ("nanoGPT", "ours")] == ["4", "12"]
    assert rows["nanoGPT"][1] == "1.00"
    letters = sorted(set(text))
    val = torch.tensor([letters.index(c) for c in text[int(0.9 * len(text)) :]])
    n = (len(val) - 1) // 64 * 64
    table = torch.arange(len(letters) ** 2.0).sin().view(len(letters), -1)
    loss = torch.nn.functional.cross_entropy(table[val[:n]], val[1 : n + 1]).item()
    assert rows["nanoGPT"][4:] == [f"{loss:.4f}", "+0.0000"]
    assert windows == [64] * 4  # also of ours with longer windows, and of its two trials
    for name in ("ours", "ours, as long"):
        assert float(rows[name][5]) == pytest.approx(float(rows[name][4]) - loss, abs=2e-4)
    assert bytes_in(nanogpt_folder, ROOT / "data") == before


def test_ours_as_long_has_the_steps_of_the_time_that_is_left():
    theirs = [beside.Training(seconds=100.0, loss=2.0, steps=9, step=0.1, flops=1e9)]
    ours = [beside.Training(seconds=60.0, loss=1.5, steps=12, step=0.5, flops=1e9)]
    assert beside.steps_as_long(ours, theirs) == 12 + 80  # 40 seconds are left
    assert beside.steps_as_long([ours[0]._replace(seconds=900.0)], theirs) == 1


def test_a_text_that_both_do_not_read_alike_is_refused(measure, nanogpt_folder, tmp_path):
    (tmp_path / "text").write_bytes(b"".join(b"%d\r\n" % i for i in range(2000)))
    code, _, err = measure("nanogpt", str(nanogpt_folder), str(tmp_path / "text"), *OURS)
    assert code == 2 and "nanoGPT's validation tokens are not ours" in err and err.count("\n") == 1


def test_a_nanogpt_that_fails_is_one_line(measure, nanogpt_folder, data_folder):
    (nanogpt_folder / "train.py").write_text("raise SystemExit('no such knob')")
    code, _, err = measure("nanogpt", str(nanogpt_folder), str(data_folder / "words.txt"), *OURS)
    assert code == 2 and "train.py ended with 1: no such knob" in err and err.count("\n") == 1


def test_ours_needs_the_windows_of_nanogpt_and_a_preset_that_is_there(
    measure, nanogpt_folder, data_folder
):
    places = [str(nanogpt_folder), str(data_folder / "words.txt")]
    for arguments, words in (
        (["preset=config/tiny.py", "block_size=32"], "block_size must be 64 or more, got 32"),
        (["preset=config/nothing.py"], "nothing.py is neither a file nor"),
    ):
        code, _, err = measure("nanogpt", *places, *arguments)
        assert code == 2 and words in err and err.count("\n") == 1
