"""The share of the validation text that stands in the training text."""

import json
import random
from functools import partial

import numpy as np
import pytest

from data.loader import open_dataset
from data.overlap import WINDOW, overlap_of
from data.prepare import prepare, spread_text
from text.tokenizer import ByteTokenizer


def noise(size, seed=0):
    return bytes(random.Random(seed).choices(b"abcdefghijklmnop \n", k=size))


@pytest.mark.parametrize("at", [0, 1, 63, 64, 4999, 10_000 - 10 * WINDOW])
def test_windows_are_found_at_any_place_and_across_blocks(at):
    train = noise(10_000)
    blocks = [train[:at], train[at : at + 70], train[at + 70 : at + 71], train[at + 71 :]]
    seen, new = train[at : at + 10 * WINDOW], noise(30 * WINDOW, seed=1)
    assert overlap_of([seen + new], blocks) == 0.25
    assert overlap_of([new, seen, b"the rest is no window"], blocks) == 0.25


def test_a_window_counts_as_often_as_it_stands_in_the_validation_text():
    line = b"x" * WINDOW
    assert overlap_of([line * 3 + noise(WINDOW)], [line]) == 0.75


def test_a_window_of_which_a_byte_differs_is_not_found():
    train = noise(1000)
    window = train[500 : 500 + WINDOW]
    for at in (0, 31, 63):
        assert overlap_of([window[:at] + b"!" + window[at + 1 :]], [train]) == 0
    assert overlap_of([train], []) == overlap_of([train], [b"", b"short"]) == 0


def test_only_what_has_the_same_bytes_is_found_if_hashes_are_the_same(monkeypatch):
    monkeypatch.setattr("data.overlap.MULTIPLIER", 0)  # a hash is the last byte
    train = noise(5000)
    assert overlap_of([noise(5000, seed=1)], [train]) == 0


def test_a_text_shorter_than_a_window_has_no_share():
    assert overlap_of([], [b"text"]) is None
    assert overlap_of([noise(WINDOW - 1)], [noise(1000)]) is None


def prepared(tmp_path, train, val, tokenizer="byte"):
    (tmp_path / "a.txt").write_bytes(train + val)
    assert int((len(train) + len(val)) * 0.9) == len(train)
    return prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer)["val_overlap"]


@pytest.mark.parametrize(
    "share, told, warned", [(0.005, False, False), (0.05, True, False), (0.5, True, True)]
)
@pytest.mark.parametrize("tokenizer", ["byte", "sentencepiece"])
def test_a_preparation_tells_the_share(tmp_path, capsys, tokenizer, share, told, warned):
    windows = 200
    train = noise(9 * windows * WINDOW)
    seen = int(share * windows) * WINDOW
    val = train[1234 : 1234 + seen] + noise(windows * WINDOW - seen, seed=1)
    found = prepared(tmp_path, train, val, tokenizer)
    assert found == pytest.approx(share, rel=0.01)  # what a part has behind its windows is lost
    assert open_dataset(tmp_path / "out").meta["val_overlap"] == found
    out, err = capsys.readouterr()
    told_words = f"{found:.1%} of the val text stands in the train text, too\n"
    assert (told_words in out) == told
    assert err.startswith(f"warning: {found:.1%} of the val text") if warned else err == ""


def test_of_long_texts_parts_are_measured_that_are_spread_evenly(tmp_path, capsys, monkeypatch):
    train = noise(9000)
    monkeypatch.setattr("data.prepare.SEARCHED", 4000)
    prepared(tmp_path, train, train[:1000])
    assert " of the train text that were searched, too\n" in capsys.readouterr().out
    progress = {"dtype": "uint16", "bytes": {"train": len(train), "val": 1000}}
    parts = partial(spread_text, tmp_path / "out", ByteTokenizer(), progress, "train")
    found = list(parts(1000, 10))
    assert len(found) == 100 and max(map(len, found)) == 10
    places = [train.index(part) for part in found]
    assert np.diff(places).min() >= 89 and np.diff(places).max() <= 101
    assert b"".join(parts(len(train), 70)) == b"".join(parts(10**9, 64)) == train


def test_what_a_tokenizer_from_elsewhere_loses_is_not_measured(tmp_path, letters):
    (tmp_path / "letters.model").write_bytes(letters)
    model = str(tmp_path / "letters.model")
    assert prepared(tmp_path, b"a bad\n" * 90, b"a bad\n" * 10, model) is None


@pytest.mark.parametrize("value", [None, "gone"])
def test_a_data_set_without_a_share_opens(tmp_path, value):
    from data import checksum

    prepared(tmp_path, b"a bad\n" * 90, b"a bad\n" * 10)
    path = tmp_path / "out" / "meta.json"
    meta = json.loads(path.read_text()) | {"val_overlap": None}
    if value == "gone":
        del meta["val_overlap"]
    path.write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    assert open_dataset(tmp_path / "out").meta.get("val_overlap") is None
