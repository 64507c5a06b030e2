"""evaluate.py: the loss is that of training to the digit, its units are right, and other data is
refused.
"""

import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import sample
from data import checksum
from data.loader import open_dataset
from data.prepare import prepare
from model import Decoder, ModelConfig
from run import evaluate
from run.evaluate import Evaluation, bytes_per_predicted_token, mean_loss, open_known_dataset
from run.metrics import read_metrics
from run.setup import find_dataset
from text.tokenizer import load_tokenizer
from weights.hf_folder import hf_name


@pytest.fixture(autouse=True)
def data(data_folder, monkeypatch):
    """The folder of the data set `words`."""
    for module in ("run.setup", "run.evaluate"):
        monkeypatch.setattr(f"{module}.DATA", data_folder)
    return data_folder / "words"


def model_for(data, **knobs) -> Decoder:
    shape = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "n_hidden": 24,
        "block_size": 32,
        "vocab_size": open_dataset(data).meta["vocab_size"],
    }
    return Decoder(ModelConfig(**(shape | knobs)))


def hf_folder(folder, model, data):
    """The model as Hugging Face has it, with the tokenizer of the data set."""
    config = model.config
    folder.mkdir()
    shutil.copy(data / "tokenizer.json", folder)
    save_file(
        {hf_name(name): p.detach() for name, p in model.named_parameters()},
        folder / "model.safetensors",
    )
    about = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False,
        "rope_theta": config.rope_theta,
    }
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def printed(capsys, *argv) -> str:
    assert sample.main([str(word) for word in argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit:
        sample.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert (
        exit.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    ), err
    return err


# --- the loss


@pytest.mark.parametrize("batch", [1, 4, 7, 50])
def test_the_mean_is_over_every_window_once_whatever_the_batch(data, batch):
    model, opened = model_for(data), open_dataset(data)
    tokens = opened.val
    starts = np.arange(0, 7 * 32, 32)
    with torch.no_grad():
        losses = [
            F.cross_entropy(
                model(torch.tensor(tokens[s : s + 32].astype(int))[None])[0].double(),
                torch.tensor(tokens[s + 1 : s + 33].astype(int)),
            )
            for s in starts
        ]
    loss = mean_loss(model, opened, "val", starts, 32, batch, "cpu", "float32")
    assert loss == pytest.approx(float(sum(losses) / 7), rel=1e-6)


def test_it_stops_between_batches_after_a_signal(data):
    model, answers = model_for(data), iter([False, False, True])
    interrupts = SimpleNamespace(agreed=lambda: next(answers))
    opened, starts = open_dataset(data), np.arange(0, 320, 32)
    assert mean_loss(model, opened, "val", starts, 32, 2, "cpu", "float32", interrupts) is None
    assert next(answers, "used up") == "used up"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sample_prints_the_loss_that_training_logged(start, tmp_path, capsys, dtype):
    assert (
        start(f"dtype={dtype}", "micro_batch_size=4", "eval_iters=6", "tie_embeddings=true")[0] == 0
    )
    (last,) = [r for r in read_metrics(tmp_path / "run") if r.get("val_loss") and r["step"] == 12]
    out = printed(
        capsys, tmp_path / "run", "eval=val", "eval_iters=6", "micro_batch_size=4", f"dtype={dtype}"
    )
    assert f"val loss      {last['val_loss']:.6f} nats per token\n" in out
    assert f"perplexity    {math.exp(last['val_loss']):.4f}\n" in out
    assert f"bits per byte {last['val_bpb']:.6f}\n" in out
    assert "tokens        192 in 6 windows of 32\n" in out
    assert out.endswith(f" tokens/s (cpu, {dtype})\n")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_changes_the_perplexity_of_a_trained_model_by_less_than_half_a_percent(
    start, tmp_path, capsys, dtype
):
    assert start("learning_rate=2e-2", "max_iters=40", "eval_interval=0", "save_interval=0")[0] == 0
    arguments = (tmp_path / "run", "eval=val", f"dtype={dtype}")
    plain, rounded = (
        math.exp(float(re.search(r"val loss +([\d.]+)", printed(capsys, *arguments, *more))[1]))
        for more in ((), ("quantize=int8",))
    )
    assert plain < 14 and rounded != plain
    assert abs(rounded / plain - 1) < 0.005


def test_a_model_that_knows_nothing_needs_the_bits_of_its_vocabulary(data):
    model = model_for(data, vocab_size=32)
    model.head.weight.data.zero_()
    result = evaluate.evaluate(model, open_dataset(data), "train", "cpu", "float32", windows=5)
    assert result.loss == pytest.approx(math.log(32)) and result.perplexity == pytest.approx(32)
    assert result.bits_per_byte == pytest.approx(5)  # all of the characters are one byte
    assert (result.windows, result.block_size) == (5, 32)


def test_bits_per_byte_count_the_bytes_and_a_huge_loss_has_no_perplexity():
    result = Evaluation("val", loss=1.0, bytes_per_token=4.0, windows=3, block_size=10, seconds=2.0)
    withheld = replace(result, bytes_per_token=None, withheld="the tokenizer has lost 5% of it")
    assert withheld.bits_per_byte is None
    assert "bits per byte withheld: the tokenizer has lost 5% of it\n" in str(withheld)
    assert result.bits_per_byte == pytest.approx(1 / math.log(2) / 4)
    assert str(result).splitlines() == [
        "val loss      1.000000 nats per token",
        "perplexity    2.7183",
        "bits per byte 0.360674",
        "tokens        30 in 3 windows of 10",
        "time          2.00 s, 15 tokens/s",
    ]
    assert replace(result, loss=1e6).perplexity == math.inf


def test_bits_per_byte_count_the_bytes_of_the_tokens_that_are_predicted(tmp_path):
    """And not the mean over the split, of which the first half has one byte per token here."""
    (tmp_path / "t.txt").write_text("ab" * (99 + 5) + "\u00e4\u00f6" * 3, encoding="utf-8")
    prepare([str(tmp_path / "t.txt")], tmp_path / "set", tokenizer="char")
    words, model = open_dataset(tmp_path / "set"), model_for(tmp_path / "set")
    assert len(words.val) == 16 and words.bytes_per_token("val") == 22 / 16
    for windows, length, per_token in ((1, 3, 1), (0, 7, 19 / 14), (3, 3, 12 / 9)):
        result = evaluate.evaluate(
            model, words, "val", "cpu", "float32", windows=windows, block_size=length
        )
        assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / per_token)


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_all_windows_together_have_the_bytes_of_the_text(tmp_path, dummy_prefix):
    """The space that Llama's tokenizer puts before each document is not in the text."""
    (tmp_path / "docs").mkdir()
    for i in range(40):
        (tmp_path / "docs" / f"{i}.txt").write_text(" b\u00e4d cab"[i % 2 :] * i + "a")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b\u00e4d cab", "a dab"]),
        model_writer=model,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "their.model").write_bytes(model.getvalue())
    prepare([str(tmp_path / "docs")], tmp_path / "set", tokenizer=str(tmp_path / "their.model"))
    words = open_dataset(tmp_path / "set")
    assert load_tokenizer(words.folder).dummy_prefix == dummy_prefix and words.meta["bos_id"] == 1
    for split in ("train", "val"):
        size = words.meta["tokens"][split] - 1  # all but the first token, which is bos
        found, _ = bytes_per_predicted_token(words, split, np.array([0]), size)
        assert found * size == pytest.approx(words.meta["bytes"][split])


@pytest.fixture
def lossy(tmp_path, letters):
    """A data set whose tokenizer knows no digits, and a function that takes the measure of it away,
    which older data sets do not have.
    """
    (tmp_path / "letters.model").write_bytes(letters)
    (tmp_path / "t.txt").write_text("a bad 7 cab " * 100)
    prepare([str(tmp_path / "t.txt")], tmp_path / "set", str(tmp_path / "letters.model"))

    def forget():
        path = tmp_path / "set" / "meta.json"
        meta = {k: v for k, v in json.loads(path.read_text()).items() if k != "lost_bytes"}
        path.write_text(json.dumps(meta | {"checksum": checksum(meta)}))

    return SimpleNamespace(folder=tmp_path / "set", forget=forget)


def test_bits_per_byte_of_a_text_that_the_tokenizer_loses_are_withheld(
    start, tmp_path, capsys, lossy
):
    code, out, _ = start(f"dataset={lossy.folder}", "max_iters=5", "eval_iters=2")
    lost = open_dataset(lossy.folder).lost_share("val")
    share = f"the tokenizer has lost {100 * lost:.3g}% of the val"
    assert code == 0 and out.count(f"warning: bits per byte are withheld: {share} text\n") == 1
    assert "| val loss" in out and "bits per byte |" not in out
    (record,) = [r for r in read_metrics(tmp_path / "run") if "val_loss" in r]
    assert "val_bpb" not in record
    asked = (tmp_path / "run", "eval=val", f"dataset={lossy.folder}")
    assert f"bits per byte withheld: {share} text\n" in printed(capsys, *asked)
    fingerprint = open_dataset(lossy.folder).fingerprint
    lossy.forget()
    assert open_dataset(lossy.folder).fingerprint == fingerprint
    reason = "the tokenizer does not know all characters of the val text"
    assert f"bits per byte withheld: {reason}\n" in printed(capsys, *asked)


def test_windows_are_as_long_as_asked_and_never_too_long_by_themselves(data, monkeypatch):
    model, words = model_for(data), open_dataset(data)
    shapes = []
    model.register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(inputs[0].shape))
    )
    for knobs, wanted in (({}, (3, 32)), ({"block_size": 10}, (3, 10)), ({"batch": 2}, (2, 32))):
        shapes.clear()
        evaluate.evaluate(model, words, "val", "cpu", "float32", windows=3, **knobs)
        assert set(shapes) == {wanted}
    monkeypatch.setattr(evaluate, "LONGEST_WINDOW", 20)
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 2 * 20 * model.config.vocab_size)
    shapes.clear()
    evaluate.evaluate(model, words, "val", "cpu", "float32", windows=3)
    assert set(shapes) == {(2, 20)}
    with pytest.raises(
        ValueError, match="block_size=33 is more than the 32 tokens of this model's context"
    ):
        evaluate.evaluate(model, words, "val", "cpu", "float32", block_size=33)


# --- the command


def test_a_hugging_face_folder_is_evaluated_on_the_data_that_is_named(data, tmp_path, capsys):
    model = model_for(data)
    folder = hf_folder(tmp_path / "hf", model, data)
    loss = evaluate.evaluate(model, open_dataset(data), "val", "cpu", "float32").loss
    out = printed(capsys, folder, "eval=val", "dataset=words", "dtype=float32")
    assert f"val loss      {loss:.6f} nats" in out
    assert printed(capsys, folder, "eval=train", "dataset=words", "eval_iters=2").startswith(
        "train loss    "
    )
    assert "does not say what it was trained on: name a prepared data set" in refused(
        capsys, folder, "eval=val"
    )


def test_data_of_another_tokenizer_are_refused(start, tmp_path, data, capsys):
    prepare([str(data.parent / "words.txt")], tmp_path / "bytes", tokenizer="byte")
    start("eval_interval=0")  # it also takes away what prepare has printed
    run = tmp_path / "run"
    error = refused(capsys, run, "eval=val", f"dataset={tmp_path / 'bytes'}")
    assert f"was not made with the tokenizer of {run}: python data/prepare.py TEXT" in error
    assert f"TEXT tokenizer={run} name=NAME" in error
    assert "no such data set; make it with" in refused(capsys, run, "eval=val", "dataset=missing")
    text = data.parent / "words.txt"
    error = refused(capsys, run, "eval=val", f"dataset={text}")
    assert f"prepare.py {text} tokenizer={run} name=NAME, then dataset=NAME" in error
    for name in ("..", "a/b", "/etc"):
        assert refused(capsys, run, "eval=val", f"dataset={name}").startswith("error: ")


def test_a_data_set_can_be_named_by_its_path(start, tmp_path, data, capsys):
    start("eval_interval=0")
    elsewhere = shutil.copytree(data, tmp_path / "elsewhere")
    assert "perplexity" in printed(capsys, tmp_path / "run", "eval=val", f"dataset={elsewhere}")


def test_dropout_is_off(data):
    model = Decoder(
        ModelConfig(
            n_layer=1, n_head=2, n_embd=16, n_hidden=16, block_size=16, vocab_size=99, dropout=0.5
        )
    )
    first, second = (
        evaluate.evaluate(model.train(), open_dataset(data), "val", "cpu", "float32")
        for _ in range(2)
    )
    assert first.loss == second.loss


@pytest.mark.parametrize("name", ["../words", "..", 7, ["words"], {"a": 1}])
def test_a_checkpoint_cannot_name_a_folder_elsewhere(data, name):
    known = {"name": name, "tokenizer_sha256": open_dataset(data).meta["tokenizer_sha256"]}
    with pytest.raises(ValueError, match="which is no name of a data set"):
        open_known_dataset("", known, data)


def test_a_data_set_is_named_as_for_training(data, tmp_path, monkeypatch):
    """By the name of a folder here, before one under data/; by a path, also from the home folder;
    or, without a name, by what it holds.
    """
    known = open_dataset(data).fingerprint
    shutil.copytree(data, tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = {"here": "here", "./here": "here", "~/here": tmp_path / "here", "words": data}
    for name, folder in names.items():
        assert (
            open_known_dataset(name, known, data).folder == Path(folder) == find_dataset(name, None)
        )
    monkeypatch.setattr("run.setup.DATA", tmp_path)
    assert open_known_dataset("", known, data).folder == tmp_path / "here"


def test_data_that_have_changed_since_are_only_used_when_they_are_named(data):
    known = open_dataset(data).fingerprint
    assert open_known_dataset("", known, data).folder == data
    known["content_sha256"] = "0" * 64
    with pytest.raises(
        ValueError, match="is not the data any more .*: dataset=words evaluates on it all the same"
    ):
        open_known_dataset("", known, data)
    assert open_known_dataset("words", known, data).folder == data
    with pytest.raises(ValueError, match="the data set gone .* is not under .*: name where"):
        open_known_dataset("", known | {"name": "gone"}, data)


def test_a_loss_that_is_not_finite_ends_the_command_with_one_line(data, tmp_path, capsys):
    model = model_for(data)
    model.head.weight.data.fill_(3e38)  # finite, as weights that can be read always are
    folder = hf_folder(tmp_path / "hf", model, data)
    assert sample.main([str(folder), "eval=val", "dataset=words", "dtype=float32"]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: the loss is ") and err.count("\n") == 1


def test_a_split_shorter_than_a_window_is_refused(data, tmp_path, capsys):
    folder = hf_folder(tmp_path / "hf", model_for(data, block_size=2000), data)
    assert "needs at least block_size + 1 = 2001" in refused(
        capsys, folder, "eval=val", "dataset=words"
    )
    assert "windows of 100\n" in printed(
        capsys, folder, "eval=val", "dataset=words", "block_size=100", "eval_iters=1"
    )
