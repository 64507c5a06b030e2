import json
import os
import re
import zlib

import numpy as np
import pytest
import torch

import data.loader as loader
from data import PART_TOKENS, checksum
from data.loader import batch, open_dataset, read_windows, val_starts
from data.loader import train_starts as starts_of
from text.tokenizer import ByteTokenizer, tokenizer_sha256


def write(folder, train=range(100), val=range(40), kind="uint16", **changes):
    """A small data set of ids of this kind; `changes` replace fields of meta.json."""
    folder.mkdir(exist_ok=True)
    ByteTokenizer().save(folder)
    ids = {"train": np.array(train, dtype=kind), "val": np.array(val, dtype=kind)}
    counts = {split: len(ids[split]) for split in ids}
    checksums = {split: [] for split in ids}
    for split in ids:
        ids[split].tofile(folder / f"{split}.bin")
        for at in range(0, counts[split], PART_TOKENS):
            checksums[split].append(zlib.crc32(ids[split][at : at + PART_TOKENS]))
    meta = {
        "format_version": 1,
        "dtype": kind,
        "vocab_size": 257,
        "bos_id": 256,
        "tokens": counts,
        "bytes": {split: 3 * counts[split] for split in counts},
        "tokenizer": "byte",
        "source": "test",
        "tokenizer_sha256": tokenizer_sha256(folder),
        "content_sha256": "00",
        "crc32": checksums,
    } | changes
    (folder / "meta.json").write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "d")


@pytest.fixture
def dataset(folder):
    return open_dataset(folder)


def refused(folder, match, kind=ValueError):
    """open_dataset must raise this kind of error, in one line."""
    with pytest.raises(kind, match=match) as raised:
        open_dataset(folder)
    assert "\n" not in str(raised.value)


# Opening


def test_a_good_data_set_opens_read_only(dataset):
    assert dataset.train.tolist() == list(range(100)) and dataset.val.tolist() == list(range(40))
    assert dataset.bytes_per_token("val") == 3.0
    assert dataset.fingerprint == {
        "name": "d",
        "dtype": "uint16",
        "vocab_size": 257,
        "tokens": {"train": 100, "val": 40},
        "content_sha256": "00",
        "tokenizer_sha256": tokenizer_sha256(dataset.folder),
    }
    with pytest.raises(ValueError):
        dataset.train[0] = 1


def test_uint32_ids_are_read_whole(tmp_path):
    folder = write(tmp_path / "d", train=[70000, 1, 2], kind="uint32", vocab_size=70001)
    assert open_dataset(folder).train.tolist() == [70000, 1, 2]


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path):
    refused(tmp_path / "python", r"python data/prepare.py python", FileNotFoundError)
    refused(tmp_path / "a b", "prepare.py YOUR-TEXT name='a b'$", FileNotFoundError)


def test_a_text_in_place_of_a_data_set_is_told_how_to_make_one_of_it(tmp_path):
    folder = tmp_path / "my texts"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    for text in (folder, folder / "a.txt"):
        command = f"python data/prepare.py '{text}' name=NAME"
        message = f"{text}: no such data set; make it with: {command}"
        refused(text, re.escape(message), FileNotFoundError)


@pytest.mark.parametrize("name", ["meta.json", "train.bin", "val.bin", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, name, FileNotFoundError)


WRONG = [("vocab_size", value) for value in (0, -5, float("nan"), "257", None, True, 1e3)]
WRONG += [("dtype", "float16"), ("dtype", ["uint16"]), ("tokenizer", {}), ("content_sha256", 7)]
WRONG += [("tokens", value) for value in (140, {"train": 100}, {"train": 100, "val": -1})]
WRONG += [("bytes", {"train": 0, "val": 3}), ("bos_id", 257), ("bos_id", "x")]
WRONG += [("bytes", {"train": 10**400, "val": 3}), ("xz_bits_per_byte", "\x1b]0;x")]
WRONG += [("xz_bits_per_byte", 10**400), ("vocab_size", 10**400)]
WRONG += [("val_overlap", value) for value in (-0.1, 1.1, float("nan"), "0.5", True)]
WRONG += [("lost_bytes", value) for value in (3, {"train": 1}, {"train": 1, "val": -1})]
WRONG += [("xz_bits_per_byte", value) for value in ("2", 10**20, -1, float("nan"))]
WRONG += [("bytes", {"train": 10**400, "val": 3}), ("lost_bytes", {"train": 10**400, "val": 3})]
WRONG += [("format_version", 2), ("format_version", "1"), ("tokenizer_sha256", None)]


@pytest.mark.parametrize("field, value", WRONG)
def test_a_wrong_field_of_meta_is_named(tmp_path, field, value):
    refused(write(tmp_path / "d", **{field: value}), f"meta.json: {field} is ")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null"])
def test_meta_that_is_not_a_json_object_is_refused(folder, content):
    (folder / "meta.json").write_bytes(content)
    refused(folder, "meta.json: not ")


def test_a_flipped_bit_in_meta_json_is_found(folder):
    path = folder / "meta.json"
    path.write_text(path.read_text().replace('"bytes": {"train": 300', '"bytes": {"train": 100'))
    refused(folder, "meta.json: its checksum says that it was changed or damaged")


def test_a_meta_json_without_end_is_not_read(folder):
    os.truncate(folder / "meta.json", 2**30)
    refused(folder, "larger than 67,108,864 bytes")


@pytest.mark.parametrize("name", ["meta.json", "train.bin"])
def test_only_regular_files_are_opened(folder, name):
    path = folder / name
    path.unlink()
    os.mkfifo(path)
    refused(folder, f"{name}: not a regular file", OSError)
    path.unlink()
    path.mkdir()
    refused(folder, f"{name}: not a regular file", OSError)
    path.rmdir()
    path.symlink_to(folder / "nowhere")
    refused(folder, f"{name}: no such file", FileNotFoundError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(folder):
    (folder / "train.bin").chmod(0)
    refused(folder, "train.bin: permission denied", PermissionError)


@pytest.mark.parametrize("size", [0, 198, 199, 400])
def test_a_file_of_another_size_is_refused(folder, size):
    (folder / "train.bin").write_bytes(bytes(size))
    refused(folder, f"{size} bytes, not the 200 .*truncated" if size else "train.bin: empty")


def test_uint32_data_called_uint16_is_refused(tmp_path):
    folder = write(tmp_path / "d", kind="uint32", dtype="uint16")
    refused(folder, "400 bytes, not the 200")


def test_an_id_outside_the_vocabulary_is_found_with_its_place(tmp_path):
    val = write(tmp_path / "d", val=[1, 2, 300, 4])
    refused(val, "val.bin: id 300 at byte 4 is not below vocab_size=257")
    train = write(tmp_path / "d", train=[1] * (PART_TOKENS + 5) + [257])
    refused(train, f"id 257 at byte {2 * (PART_TOKENS + 5)} ")


def test_a_large_file_is_scanned_in_spread_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "FULL_SCAN", 2 * PART_TOKENS)  # a file of 400 MB takes too long
    refused(write(tmp_path / "d", train=[300] + [1] * (3 * PART_TOKENS)), "id 300")
    refused(write(tmp_path / "d", train=[1] * (3 * PART_TOKENS) + [300]), "id 300")
    in_between = [1] * PART_TOKENS + [300] + [1] * (2 * PART_TOKENS)
    open_dataset(write(tmp_path / "d", train=in_between))


@pytest.mark.parametrize("kind, size", [("uint16", 2), ("uint32", 4)])
def test_a_changed_token_is_found(tmp_path, kind, size):
    folder = write(tmp_path / "d", train=[7] * (2 * PART_TOKENS + 5), kind=kind)
    for token in (0, PART_TOKENS - 1, PART_TOKENS, 2 * PART_TOKENS + 4):
        tokens = np.memmap(folder / "train.bin", dtype=kind, mode="r+")
        tokens[token] = 6
        begin = token // PART_TOKENS * PART_TOKENS * size
        refused(folder, f"train.bin: the .* from byte {begin:,} on are not what was prepared")
        tokens[token] = 7
    assert len(open_dataset(folder).train) == 2 * PART_TOKENS + 5


def test_as_many_checksums_as_parts(tmp_path):
    folder = write(tmp_path / "d", crc32={"train": [], "val": []})
    refused(folder, "has 1 parts, meta.json 0 checksums")


def test_another_tokenizer_than_the_datas_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"kind": "char", "chars": "ab"}')
    refused(folder, "tokenizer file is not the one")


# While it is read


def append(path):
    with open(path, "ab") as file:
        file.write(b"00")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "change",
    [
        append,
        lambda path: os.truncate(path, 10),
        lambda path: path.write_bytes(path.read_bytes()[::-1]),
    ],
    ids=["grown", "shrunk", "rewritten"],
)
def test_a_file_that_changes_while_it_is_read_is_noticed(dataset, split, change):
    dataset.check_unchanged()
    change(dataset.folder / f"{split}.bin")
    with pytest.raises(OSError, match=f"{split}.bin was changed while it was being read"):
        dataset.check_unchanged()


def test_a_change_whose_time_was_set_back_is_noticed(dataset):
    path = dataset.folder / "train.bin"
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OSError, match="train.bin was changed while it was being read"):
        dataset.check_unchanged()


def test_a_file_in_the_place_of_the_whole_folder_is_no_change(dataset):
    dataset.folder.rename(dataset.folder.with_name("moved"))
    dataset.folder.touch()
    dataset.check_unchanged()


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_read_while_a_file_changes_is_never_given_out(dataset, split, monkeypatch):
    def changing(*arguments):
        append(dataset.folder / f"{split}.bin")
        return read_windows(*arguments)

    monkeypatch.setattr("data.loader.read_windows", changing)
    with pytest.raises(OSError, match=f"{split}.bin was changed while it was being read"):
        dataset.windows(split, np.array([0]), 8)


def test_a_file_that_is_only_touched_has_not_changed(dataset):
    path = dataset.folder / "train.bin"
    for time in (1, 2):
        os.utime(path, (time, time))
        dataset.check_unchanged()
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(OSError, match="train.bin was changed while it was being read"):
        dataset.check_unchanged()


def test_a_file_that_was_replaced_or_removed_is_still_there_for_the_reader(tmp_path, dataset):
    before = batch(dataset, 3, 2, 8, seed=1)
    write(tmp_path / "other", train=[5] * 9)
    os.replace(tmp_path / "other" / "train.bin", dataset.folder / "train.bin")
    (dataset.folder / "val.bin").unlink()
    dataset.check_unchanged()
    after = batch(dataset, 3, 2, 8, seed=1)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


# Batches


def train_starts(n_tokens, block_size, batch_size, seed, step):
    """Where the windows of a step's batch start."""
    return starts_of(n_tokens, block_size, seed, step * batch_size + np.arange(batch_size))


@pytest.mark.parametrize("n_tokens, block", [(1000, 7), (64, 8), (17, 8), (9, 8), (101, 10)])
def test_an_epoch_takes_every_window_once_and_leaves_out_less_than_two_blocks(n_tokens, block):
    windows = max(1, n_tokens // block - 1)
    assert n_tokens - windows * block < 2 * block + 1
    for epoch in range(5):
        steps = range(epoch * windows, (epoch + 1) * windows)
        starts = np.sort(np.concatenate([train_starts(n_tokens, block, 1, 3, s) for s in steps]))
        assert len(set(starts.tolist())) == windows
        assert set(np.diff(starts).tolist()) <= {block}
        assert starts[0] >= 0 and starts[-1] + block + 1 <= n_tokens


def test_window_borders_move_so_that_every_token_is_predicted_in_time():
    starts = np.concatenate([train_starts(101, 10, 9, 0, step) for step in range(300)])
    predicted = {int(start) + 1 + i for start in starts for i in range(10)}
    assert predicted == set(range(1, 101))
    assert len(set((starts % 10).tolist())) == 10


def test_the_order_is_shuffled_and_differs_by_seed_and_epoch():
    orders = {
        tuple(train_starts(5000, 10, 499, seed, epoch) // 10) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4
    assert all(np.any(np.diff(order) < 0) for order in orders)


def test_the_batches_of_a_seed_never_change():
    """A stored example: a change here would change the data order of every run that is resumed."""
    assert train_starts(1000, 10, 8, 1337, 5).tolist() == [63, 423, 653, 143, 983, 853, 413, 773]


def test_a_batch_depends_on_its_arguments_only():
    first = train_starts(1000, 7, 16, 5, 40)
    for step in range(30):  # other epochs push the first one out of the cache
        train_starts(900, 7, 64, step, step)
    assert np.array_equal(first, train_starts(1000, 7, 16, 5, 40))
    one_by_one = [train_starts(1000, 7, 1, 5, 640 + i)[0] for i in range(16)]
    assert first.tolist() == one_by_one


def test_reading_batches_leaves_the_global_generators_alone(dataset):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batch(dataset, 3, 4, 8, seed=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_y_is_x_one_token_later(dataset):
    x, y = batch(dataset, 2, 6, 8, seed=1)
    assert x.shape == y.shape == (6, 8) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1)  # the tokens are 0, 1, 2, ...
    assert torch.equal(x[:, 0], torch.from_numpy(train_starts(100, 8, 6, 1, 2)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_ranks_parts_are_the_global_batch(dataset, world_size):
    whole = batch(dataset, 4, 6, 8, seed=2)
    parts = [batch(dataset, 4, 6, 8, 2, rank, world_size) for rank in range(world_size)]
    for i in (0, 1):  # x, y
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


def test_a_batch_that_the_ranks_cannot_share_is_refused(dataset):
    with pytest.raises(ValueError, match="batch_size=6 must be a multiple of the 4 devices"):
        batch(dataset, 0, 6, 8, 0, 0, 4)


def test_val_windows_do_not_overlap_and_cover_the_split():
    assert val_starts(41, 10, 0).tolist() == [0, 10, 20, 30]
    assert val_starts(40, 10, 0).tolist() == [0, 10, 20]
    assert val_starts(41, 10, 99).tolist() == [0, 10, 20, 30]
    assert val_starts(11, 10, 0).tolist() == [0]


def test_few_val_windows_are_spread_over_the_split():
    assert val_starts(1001, 10, 4).tolist() == [0, 250, 500, 750]
    assert len(set(val_starts(1001, 10, 37).tolist())) == 37


@pytest.mark.parametrize(
    "starts", [lambda n: train_starts(n, 8, 4, 0, 0), lambda n: val_starts(n, 8, 0)]
)
def test_a_split_shorter_than_one_window_is_refused(starts):
    match = r"has 8 tokens, needs at least block_size \+ 1 = 9; lower block_size"
    with pytest.raises(ValueError, match=match):
        starts(8)
    assert set(starts(9).tolist()) == {0}


def test_windows_are_read_where_they_start():
    x, y = read_windows(np.arange(50, dtype="uint16"), np.array([40, 0]), 9)
    assert x[0].tolist() == list(range(40, 49)) and y[0, -1] == 49 and x[1, 0] == 0
