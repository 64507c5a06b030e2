"""dataset=a:0.7,b:0.3: which row comes from where, and what a run makes of it."""

import json

import numpy as np
import pytest
import torch
from conftest import prepare_words

from data.loader import batch, open_dataset
from data.mixture import CYCLE, mix, read_shares, share_rows, sources_of_rows
from data.prepare import prepare
from run.metrics import read_metrics
from weights import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data sets `a` (the bytes below 128) and `b` (those above), one tokenizer;
    and `words`, which has another."""
    folder = tmp_path_factory.mktemp("sources")
    prepare_words(folder)
    for name, text in (("a", "abcdefghij" * 300), ("b", "\u00e4\u00f6\u00fc" * 500)):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        prepare([str(folder / f"{name}.txt")], folder / name, "byte")
    return folder


def mixture(folder, shares):
    sources = [open_dataset(folder / name) for name in shares]
    return mix(",".join(f"{n}:{s}" for n, s in shares.items()), sources, shares)


# Shares


@pytest.mark.parametrize(
    "word, shares",
    [
        ("code:0.7,books:0.3", {"code": 0.7, "books": 0.3}),
        ("a:2,b:1,./c/d:1", {"a": 2, "b": 1, "./c/d": 1}),
        ("code", None),
        ("code:0.7", None),
        ("a,b", None),
        ("./a:b,c.txt", None),
    ],
)
def test_a_mixture_is_told_from_a_single_name(word, shares):
    assert read_shares(word) == shares


@pytest.mark.parametrize(
    "word, said",
    [
        ("a:0.5,a:0.5", "has a twice: give it one share"),
        ("a:0,b:1", "the share of a must be a number above 0, got '0'"),
        ("a:1.2.3,b:1", "the share of a must be a number above 0, got '1.2.3'"),
    ],
)
def test_shares_that_are_none_are_refused(word, said):
    with pytest.raises(ValueError, match=said):
        read_shares(word)


@pytest.mark.parametrize("word", ["code:0.7,books", "code,books", "code:-1,books:2", "a:x,b:1"])
def test_what_is_almost_a_mixture_is_told_how_one_is_written(start, word):
    code, _, err = start(f"dataset={word}")
    assert code == 2 and err.count("\n") == 1
    assert "each of its data sets a share above 0, as in dataset=code:0.7,books:0.3" in err


def test_the_rows_of_a_cycle_are_the_shares():
    assert share_rows({"a": 0.7, "b": 0.3}) == (700, 300)
    assert share_rows({"a": 1, "b": 1, "c": 1}) == (334, 333, 333)
    with pytest.raises(ValueError, match="b would get less than one row of 1,000"):
        share_rows({"a": 1, "b": 1e-4})


# Which row comes from where


def test_every_cycle_has_the_shares_and_each_source_counts_its_own_rows():
    numbers = np.arange(3 * CYCLE)
    which, own = sources_of_rows((700, 300), 5, numbers)
    for cycle in range(3):
        part = which[cycle * CYCLE : (cycle + 1) * CYCLE]
        assert (part == 0).sum() == 700
    assert own[which == 0].tolist() == list(range(2100))  # none twice, none left out
    assert own[which == 1].tolist() == list(range(900))
    assert which[:CYCLE].tolist() != which[CYCLE : 2 * CYCLE].tolist()
    assert which.tolist() != sources_of_rows((700, 300), 6, numbers)[0].tolist()


def test_a_row_depends_on_its_number_and_the_seed_alone():
    numbers = np.array([2999, 3, 1700, 3])
    which, own = sources_of_rows((700, 300), 5, numbers)
    for number, source, place in zip(numbers, which, own, strict=True):
        one = sources_of_rows((700, 300), 5, np.array([number]))
        assert (one[0][0], one[1][0]) == (source, place)


def test_the_rows_of_a_batch_are_windows_of_their_sources(folder):
    data = mixture(folder, {"a": 0.7, "b": 0.3})
    x, y = batch(data, 4, 50, 16, seed=1)
    which, own = sources_of_rows(data.rows_of_cycle, 1, 200 + np.arange(50))
    assert 0 < which.sum() < 50
    assert torch.equal(x[:, 1:], y[:, :-1])
    for row, (source, number) in enumerate(zip(which, own, strict=True)):
        expected = data.sources[source].rows(np.array([number]), 16, 1)
        assert torch.equal(x[row : row + 1], expected[0])
        text = bytes(i for i in x[row].tolist() if i < 256)
        assert all((byte > 127) == bool(source) for byte in text)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_any_number_of_ranks_reads_the_same_batch(folder, world_size):
    data = mixture(folder, {"a": 0.7, "b": 0.3})
    whole = batch(data, 4, 10, 16, seed=2)
    parts = [batch(data, 4, 10, 16, 2, rank, world_size) for rank in range(world_size)]
    for i in (0, 1):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


# A run


def test_a_run_reads_its_sources_and_evaluates_each_of_them(start, tmp_path, folder):
    name = f"{folder}/a:0.75,{folder}/b:0.25"
    code, out, _ = start(f"dataset={name}", "eval_interval=6")
    assert code == 0
    assert "a: 75.0% of the rows" in out and "b: 25.0% of the rows" in out
    evaluated = [r for r in read_metrics(tmp_path / "run") if "val_loss" in r]
    for record in evaluated:
        each = record["val_loss a"], record["val_loss b"]
        assert record["val_loss"] == pytest.approx(0.75 * each[0] + 0.25 * each[1])
    last = evaluated[-1]
    assert f"  a {last['val_loss a']:.4f} | b {last['val_loss b']:.4f}" in out


def test_a_mixture_resumes_exactly_and_says_if_it_is_another_one(start, tmp_path, folder):
    name = f"dataset={folder}/a:0.75,{folder}/b:0.25"
    assert start(name, "max_iters=8", "save_interval=4", out="whole")[0] == 0
    assert start(name, "max_iters=8", "save_interval=3", out="parts")[0] == 0
    (tmp_path / "parts" / "ckpt_00000008.pt").unlink()
    again = ("max_iters=8", "save_interval=4", "resume=yes")
    assert start(name, *again, out="parts")[0] == 0
    whole, parts = (checkpoint.load_newest(tmp_path / out) for out in ("whole", "parts"))
    assert all(torch.equal(w, parts["model"][n]) for n, w in whole["model"].items())
    code, _, err = start(f"dataset={folder}/a:0.5,{folder}/b:0.5", *again, out="parts")
    assert code == 2 and "leave dataset as it was" in err and err.count("\n") == 1


@pytest.mark.parametrize("order", [("a", "talks"), ("talks", "a")])
def test_a_mixture_has_answers_if_any_of_its_sources_has_some(folder, order):
    row = json.dumps({"prompt": "What is it?", "completion": "A word."}) + "\n"
    (folder / "talks.jsonl").write_text(row * 20)
    if not (folder / "talks").exists():
        prepare([str(folder / "talks.jsonl")], folder / "talks", "byte")
    mixed = mixture(folder, dict.fromkeys(order, 1.0)).fingerprint
    assert mixed["answers"] is True  # so an export takes the chat template along
    assert "answers" not in mixture(folder, {"a": 1.0, "b": 1.0}).fingerprint


def test_two_tokenizers_are_refused_with_the_way_out(start, folder):
    code, _, err = start(f"dataset={folder}/a:0.5,{folder}/words:0.5")
    assert code == 2 and err.count("\n") == 1
    assert f"prepare the text of words again with tokenizer={folder}/a" in err


@pytest.mark.parametrize("order", ["{a}:0.5,{text}:0.5", "{text}:0.5,{a}:0.5"])
def test_a_text_in_a_mixture_gets_the_tokenizer_of_its_data_set(
    start, tmp_path, folder, order, monkeypatch
):
    monkeypatch.setattr("run.setup.DATA", tmp_path / "data")
    text = tmp_path / "more.txt"
    text.write_text("a text that has come later " * 200)
    name = f"dataset={order.format(a=folder / 'a', text=text)}"
    assert start(name, "max_iters=2")[0] == 0
    (made,) = (tmp_path / "data").iterdir()
    theirs, own = (json.loads((p / "meta.json").read_text()) for p in (folder / "a", made))
    assert own["tokenizer_sha256"] == theirs["tokenizer_sha256"]


def test_of_two_texts_the_second_gets_the_tokenizer_of_the_first(start, tmp_path, monkeypatch):
    monkeypatch.setattr("run.setup.DATA", tmp_path / "data")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"the words of {name} " * 500)
    assert start(f"dataset={tmp_path}/a.txt:0.5,{tmp_path}/b.txt:0.5", "max_iters=2")[0] == 0


def test_no_text_is_prepared_for_a_mixture_that_lacks_a_data_set(
    start, tmp_path, folder, monkeypatch
):
    monkeypatch.setattr("run.setup.DATA", tmp_path / "data")
    (tmp_path / "c.txt").write_text("a text " * 500)
    code, _, err = start(f"dataset={tmp_path}/c.txt:0.5,gone:0.5")
    assert code == 2 and err.count("\n") == 1 and "name=gone" in err
    assert not (tmp_path / "data").exists()


def test_a_run_of_a_mixture_is_evaluated_on_one_of_its_sources(start, tmp_path, folder, capsys):
    import sample

    assert start(f"dataset={folder}/a:0.75,{folder}/b:0.25", "max_iters=2")[0] == 0
    with pytest.raises(SystemExit):
        sample.main([str(tmp_path / "run"), "eval=val"])
    assert "name one of its data sets with dataset=NAME" in capsys.readouterr().err
    assert sample.main([str(tmp_path / "run"), "eval=val", f"dataset={folder / 'a'}"]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["tokens"]["train"] == sum(
        json.loads((folder / n / "meta.json").read_text())["tokens"]["train"] for n in "ab"
    )
