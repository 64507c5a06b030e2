"""What stands beside ours computes the same as ours, and programs of others are run, read and believed as they should.

Small programs that write what nanoGPT and llama2.c write stand for these.
"""

import os
import stat
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL
from test_bench import SHAPE, rows_of

import bench_beside as beside
from config.schema import Config
from llama2c import read_bin
from model import Decoder, ModelConfig
from run import read_config
from weights import hf_name

TINY = [str(ROOT / "config" / "tiny.py"), *SMALL]


@pytest.mark.parametrize("more", [{}, {"tie_embeddings": True, "n_kv_head": 1}, {"qk_norm": True, "n_hidden": 48}])
def test_the_model_of_transformers_is_ours_under_other_names(more):
    """With our weights it has our loss, so it does the same work."""
    config = ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "n_hidden": 64, "block_size": 16,
                            "vocab_size": 50} | more)
    ours, theirs = Decoder(config), beside.hf_model(config)
    missing = theirs.load_state_dict({hf_name(name): p for name, p in ours.named_parameters()}, strict=False)
    assert missing.unexpected_keys == [] and set(missing.missing_keys) <= {"lm_head.weight"}
    x = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0))
    wanted = ours(x[:, :-1], x[:, 1:])
    assert theirs(input_ids=x, labels=x).loss.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_a_step_of_theirs_trains_on_our_batches_in_our_micro_batches(monkeypatch, data_folder):
    monkeypatch.setattr("run.DATA", data_folder)
    run = beside.fresh_run(read_config([*TINY, "micro_batch_size=2"]))
    asked, losses, batch, make = [], [], beside.batch, beside.hf_model
    monkeypatch.setattr(beside, "batch", lambda *given: asked.append(given) or batch(*given))

    def watched(config):
        model = make(config)
        model.register_forward_hook(lambda module, given, found: losses.append(found.loss.item()))
        return model

    monkeypatch.setattr(beside, "hf_model", watched)
    step = beside.hf_step(run.config)
    assert all(step() > 0 for _ in range(20))
    assert [given[1:] for given in asked] == [(i, 8, 32, run.config.seed) for i in range(20)]
    assert {given[0].folder for given in asked} == {run.data.folder}
    assert len(losses) == 20 * 4 and sum(losses[-8:]) < 0.98 * sum(losses[:8])


def test_transformers_is_timed_without_the_first_token_and_makes_as_many_as_ours(monkeypatch):
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, n_hidden=16, vocab_size=9)
    model = beside.hf_model(config).train()
    made, generate = [], model.generate
    monkeypatch.setattr(beside, "hf_model", lambda shape: model if shape == config else None)
    monkeypatch.setattr(model, "generate", lambda *a, **k: made.append(generate(*a, **k)))
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(beside.time, "perf_counter", lambda: next(times))
    assert beside.hf_rate(Config(model=config, device="cpu"))(3, 5) == 3 * 5 / 50  # 10 seconds for each of five tokens
    assert not model.training and made[0].shape == (3, 1 + 1 + 5)


def test_without_transformers_one_line_says_how_to_get_it(measure, monkeypatch, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for what in ([*TINY, "steps=1"], SHAPE):
        code, _, err = measure("train" if what is not SHAPE else "sample", *what, "beside=transformers")
        assert code == 2 and err == "error: transformers is not installed: pip install -e '.[hf]'\n"


def test_theirs_run_in_a_process_of_their_own_that_answers_call_by_call(monkeypatch, data_folder):
    config = read_config([*TINY, "micro_batch_size=8"])
    with beside.OwnProcess("step", config, dataset=data_folder / "words") as step:
        assert step.child.pid != os.getpid() and step.child.poll() is None
        assert step() > 0 and step() > 0
    assert step.child.returncode == 0  # it ended with its input


def test_a_process_that_fails_is_one_line_with_its_last_words(data_folder):
    config = read_config([*TINY, "micro_batch_size=8"])
    with pytest.raises(ValueError, match="nothing_here: no such data set"):
        beside.OwnProcess("step", config, dataset="nothing_here")
    with beside.OwnProcess("rate", replace(config, model=replace(config.model, vocab_size=9))) as rate:
        assert rate(1, 2) > 0
        with pytest.raises(ValueError, match="^transformers ended with 1: RuntimeError: .*must be non-negative"):
            rate(-1, 2)


def program(path, text):
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


RUN = """import shutil, sys
model, tokenizer = sys.argv[1], sys.argv[3]
assert sys.argv[2:3] + sys.argv[4:] == ["-z", "-n", "4", "-t", "1", "-p", "1", "-s", "1"], sys.argv
shutil.copy(model, "seen.bin"), shutil.copy(tokenizer, "tokenizer.bin")
sys.stdout.buffer.write(b"\\xff\\xfe\\n")
sys.stderr.buffer.write(b"\\x80achieved tok/s: 123.500000\\n")
"""


def test_bench_sample_gives_llama2c_the_same_weights_and_reads_its_speed(measure, tmp_path):
    path = program(tmp_path / "run", RUN)
    code, out, err = measure("sample", *SHAPE, "quantize=none", "dtypes=float32", "batches=1,2", "tokens=3", "steps=2",
                             "llama2c=run", "norm_eps=1e-5")
    assert code == 0, err
    assert out.count("llama2.c") == 1  # one sample is all that it can make at once
    assert rows_of(out, "of the limit")["llama2.c"][:2] == ["1", "124 (124-124)"]
    config, weights = read_bin(tmp_path / "seen.bin")
    assert (config.n_layer, config.n_embd, config.vocab_size, config.tie_embeddings) == (2, 32, 48, False)
    ours = Decoder(config).state_dict()
    assert all(torch.equal(weights[name], ours[name]) for name in ours)
    pieces = (tmp_path / "tokenizer.bin").read_bytes()
    assert len(pieces) == 4 + 48 * 9 and path.exists()


@pytest.mark.parametrize("text, words", [
    ("", "run does not say how fast it was"), ("import sys; sys.exit('no memory')", "ended with 1: no memory")])
def test_a_run_that_fails_is_one_line(measure, tmp_path, text, words):
    program(tmp_path / "run", text)
    code, _, err = measure("sample", *SHAPE, "tokens=3", "llama2c=run", "norm_eps=1e-5")
    assert code == 2 and words in err and err.count("\n") == 1


def test_what_llama2c_cannot_compute_is_one_line(measure, tmp_path):
    program(tmp_path / "run", RUN)
    code, _, err = measure("sample", *SHAPE, "ffn=gelu", "llama2c=run")
    assert code == 2 and "llama2.c computes only ffn=swiglu" in err


TRAIN = """import os, sys, torch
from model import GPT, GPTConfig
knobs = dict(a.removeprefix("--").split("=") for a in sys.argv[2:])
assert sys.argv[1] == "config/train_shakespeare_char.py" and knobs["device"] == "cpu" and knobs["block_size"] == "64"
vocab = len(set(open("data/shakespeare_char/input.txt").read()))
os.makedirs("out-shakespeare-char", exist_ok=True)
model = GPT(GPTConfig(vocab_size=vocab))
for i in range(4):
    print(f"iter {i}: loss 3.0000, time {i}.50ms, mfu 1.00%")
torch.save({"model": model.state_dict(), "model_args": {"vocab_size": vocab}, "iter_num": 4,
            "best_val_loss": torch.tensor(1.0), "optimizer": {}}, "out-shakespeare-char/ckpt.pt")
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
        self.table = torch.nn.Parameter(torch.arange(config.vocab_size ** 2.0).sin().view(config.vocab_size, -1))
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
    """Programs that write what nanoGPT's write, and a model whose loss is another in each window."""
    folder = tmp_path / "theirs"
    place = folder / "data" / "shakespeare_char"
    place.mkdir(parents=True)
    for path, text in ((folder / "train.py", TRAIN), (folder / "model.py", MODEL), (place / "prepare.py", PREPARE)):
        path.write_text(text)
    (place / "val.bin").write_bytes(b"of another text")
    return folder


OURS = ["preset=config/tiny.py", *(knob for knob in SMALL if not knob.startswith(("dataset", "block_size",
                                                                                             "eval_iters"))),
        "block_size=64", "eval_iters=0"]


def test_bench_nanogpt_prints_both_and_ours_for_as_long(measure, nanogpt_folder, data_folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in [*nanogpt_folder.rglob("*"), *(ROOT / "data").iterdir()]}
    text = data_folder / "words.txt"
    code, out, err = measure("nanogpt", str(nanogpt_folder), str(text), *OURS)
    assert code == 0, err
    rows = rows_of(out, "less nanoGPT's")
    assert list(rows) == ["nanoGPT", "ours", "ours, as long"]
    assert [rows[name][2] for name in ("nanoGPT", "ours")] == ["4", "12"] and rows["nanoGPT"][1] == "1.00"
    letters = sorted(set(text.read_text()))
    val = torch.tensor([letters.index(c) for c in text.read_text()[int(0.9 * text.stat().st_size):]])
    n = (len(val) - 1) // 64 * 64
    table = torch.arange(len(letters) ** 2.0).sin().view(len(letters), -1)
    loss = torch.nn.functional.cross_entropy(table[val[:n]], val[1:n + 1]).item()
    assert rows["nanoGPT"][4:] == [f"{loss:.4f}", "+0.0000"]
    for name in ("ours", "ours, as long"):
        assert float(rows[name][5]) == pytest.approx(float(rows[name][4]) - loss, abs=2e-4)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert {p for p in nanogpt_folder.rglob("*")} | set((ROOT / "data").iterdir()) == before.keys()


def test_ours_as_long_has_the_steps_of_the_time_that_is_left(measure, nanogpt_folder, data_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(beside, "run_nanogpt", lambda theirs: beside.Training(100.0, 2.0, 9, 0.1, 1e9))
    monkeypatch.setattr(beside, "run_ours", lambda preset, knobs, data, **more: asked.append(more) or beside.Training(
        60.0, 1.5, 12, 0.5, 1e9))
    assert measure("nanogpt", str(nanogpt_folder), str(data_folder / "words.txt"), *OURS)[0] == 0
    assert asked == [{}, {"max_iters": 12 + 80}]  # the 40 seconds that are left, at half a second for a step


def test_a_text_that_both_do_not_read_alike_is_refused(measure, nanogpt_folder, tmp_path):
    (tmp_path / "text").write_bytes(b"a line\r\nand another\r\n" * 500)
    code, _, err = measure("nanogpt", str(nanogpt_folder), str(tmp_path / "text"), *OURS)
    assert code == 2 and "nanoGPT's validation tokens are not ours" in err and err.count("\n") == 1


def test_a_nanogpt_that_fails_is_one_line(measure, nanogpt_folder, data_folder):
    (nanogpt_folder / "train.py").write_text("raise SystemExit('no such knob')")
    code, _, err = measure("nanogpt", str(nanogpt_folder), str(data_folder / "words.txt"), *OURS)
    assert code == 2 and "train.py ended with 1: no such knob" in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments, words", [
    ([], "name a checkout of nanoGPT and a text"), (["nowhere", "nothing"], "name a checkout of nanoGPT"),
    (["a", "b", "c"], "it takes 2 words without '=', got a b c"), (["rounds=0"], "must be 1 or more"),
    (["preset=config/nothing.py"], "name a checkout")])
def test_bad_input_is_one_line(measure, arguments, words):
    code, _, err = measure("nanogpt", *arguments)
    assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_ours_needs_the_windows_of_nanogpt_and_a_preset_that_is_there(measure, nanogpt_folder, data_folder):
    places = [str(nanogpt_folder), str(data_folder / "words.txt")]
    for arguments, words in ((["preset=config/small.py"], "block_size must be 64, got 256"),
                             (["preset=config/nothing.py"], "nothing.py is neither a file nor")):
        code, _, err = measure("nanogpt", *places, *arguments)
        assert code == 2 and words in err and err.count("\n") == 1


def test_median_and_quartiles():
    assert beside.spread([1.0]) == "1 (1-1)"
    assert beside.spread([0.001, 0.002, 0.003, 0.004, 0.005], 1000, 1) == "3.0 (2.0-4.0)"


def test_what_is_compared_is_called_in_turn():
    calls = []
    found = beside.values_in_turn({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, 2)
    assert calls == ["b", "a", "a", "b"] and found == {"a": [2, 3], "b": [1, 4]}
