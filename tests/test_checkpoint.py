"""A checkpoint is whole or it is not there; what is not sound is never loaded."""

import contextlib
import math
import os
import re
import struct
import threading
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config.command import user_errors
from data.files import write_atomically
from model import LARGEST, Decoder, ModelConfig
from weights import checkpoint
from weights.checkpoint import (
    all_in,
    compare_with_run,
    load,
    load_named,
    load_newest,
    path_of,
    prune,
    save,
)

MODEL = ModelConfig(vocab_size=11, n_layer=1, n_embd=8, n_head=2, n_hidden=8, block_size=8)
HEAD = {"format": checkpoint.FORMAT, "format_version": checkpoint.VERSION}


def state(step=1, **changes):
    model = Decoder(MODEL, seed=step)
    return {
        "step": step,
        "model": {name: p.detach() for name, p in model.named_parameters()},
        "optimizer": {"norm.gain": {"exp_avg": torch.ones(8)}},
        "scaler": {},
        "config": vars(MODEL) | {"seed": 1},
        "data": {"name": "x"},
        "best_val_loss": 2.5,
        "grad_norms": [1.5],
        "base": {},
    } | changes


def steps_in(folder):
    return [step for step, _ in all_in(folder)]


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints, at steps 9, 10 and 100: the order of numbers, not of text."""
    for step in (9, 10, 100):
        save(path_of(tmp_path, step), state(step))
    return tmp_path


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def rebuilt(state):
    return checkpoint.build_model(checkpoint.model_config(state), state["model"], "cpu")


# Saving


def test_what_was_saved_is_loaded(folder):
    loaded, wanted = load(path_of(folder, 10)), state(10)
    for name in ("step", "config", "data", "best_val_loss", "scaler", "grad_norms", "base"):
        assert loaded[name] == wanted[name]
    assert all(torch.equal(t, wanted["model"][n]) for n, t in loaded["model"].items())
    assert torch.equal(loaded["optimizer"]["norm.gain"]["exp_avg"], torch.ones(8))
    assert not list(folder.glob(".*"))
    model = rebuilt(loaded)
    assert model.config == MODEL
    assert torch.equal(model.embed.weight, Decoder(MODEL, seed=10).embed.weight)


def test_the_deepest_model_with_the_most_norms_can_be_saved(tmp_path):
    """Its names fill LARGEST_PICKLE by so much a Block, and a little more where there are many."""
    sizes = []
    for layers in (8, 12):
        config = replace(MODEL, n_layer=layers, norm="derf", norm_pos="sandwich", qk_norm=True)
        tensors = {name: p.detach() for name, p in Decoder(config).named_parameters()}
        adamw = {
            name: {key: p.clone() for key in ("step", "exp_avg", "exp_avg_sq")}
            for name, p in tensors.items()
        }
        torch.save({"model": tensors, "optimizer": adamw}, tmp_path / "x.pt")
        with zipfile.ZipFile(tmp_path / "x.pt") as archive:
            sizes.append(archive.getinfo("x/data.pkl").file_size)
    assert (sizes[1] - sizes[0]) / 4 * 1.05 * LARGEST["n_layer"] < checkpoint.LARGEST_PICKLE


def test_non_finite_weights_are_never_saved(tmp_path):
    bad = state()
    bad["model"]["norm.gain"][3] = float("inf")
    with pytest.raises(FloatingPointError, match="norm.gain"):
        save(path_of(tmp_path, 1), bad)
    assert not list(tmp_path.iterdir())


def watch_disk(monkeypatch, fails=None):
    """Records the calls of os.fsync and os.replace in order; the one named `fails` raises. Without
    this, only a crash of the machine would show that they are called.
    """
    calls = []

    def watched(name, real):
        def call(first, *rest):
            if name == fails:
                raise OSError(28, "No space left on device")
            of_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{first}")
            calls.append("fsync folder" if of_folder else name)
            return real(first, *rest)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    return calls


@pytest.mark.parametrize("fails", ["write", "fsync", "check", "replace"])
def test_a_failed_save_leaves_the_old_file_and_no_other(folder, monkeypatch, fails):
    path = path_of(folder, 100)
    before = path.read_bytes()
    watch_disk(monkeypatch, fails)

    def write(file):
        file.write(b"new")
        if fails == "write":
            raise OSError(28, "No space left on device")

    def check(temporary):
        assert temporary.read_bytes() == b"new"
        if fails == "check":
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, write, check)
    assert path.read_bytes() == before
    assert len(list(folder.iterdir())) == 3


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = watch_disk(monkeypatch)
    write_atomically(tmp_path / "x", lambda f: f.write(b"1"), lambda path: calls.append("check"))
    assert calls == ["fsync", "check", "replace", "fsync folder"]


# What is not sound


def test_every_flipped_bit_in_a_tensor_is_found(folder):
    path = path_of(folder, 100)
    with zipfile.ZipFile(path) as archive:
        data = [i for i in archive.infolist() if "/data/" in i.filename and i.file_size > 64]
    assert len(data) > 5
    for entry in data:
        at = entry.header_offset + 30 + 64 + entry.file_size // 2
        flip_bit(path, at)
        with pytest.raises(ValueError, match="damaged|checksum"):
            load(path)
        flip_bit(path, at)
    assert load(path)["step"] == 100


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"hello\n", "not a checkpoint of this program"),
        (b"\x89PNG\r\n\x1a\n", "not a checkpoint"),
        (b"PK\x03\x04 and no more", "damaged or cut short"),
        (b"\x80\x04\x95\x00", "not a checkpoint"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, words):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        load(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


class Touch:
    """What a malicious pickle would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_malicious_pickle_does_not_run(tmp_path):
    torch.save({"format": checkpoint.FORMAT, "x": Touch(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this program"):
        load(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "old, new, more",
    [
        ("data.pkl", "data.pkl", b""),
        ("data.pkl", "DATA.PKL", b""),
        ("version", "../version", b""),
        ("archive/data/0", "other/data/0", b""),
        ("data.pkl", "data.pkl", b" " * 2**23),
    ],
    ids=["same", "case", "path", "prefix", "large"],
)
def test_a_zip_file_that_torch_would_not_write_is_refused(folder, request, old, new, more):
    path = path_of(folder, 9)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            found = name.endswith(old)
            archive.writestr(name.replace(old, new), content + (more if found else b""))
    if request.node.callspec.id == "same":
        assert load(path)["step"] == 9
    else:
        with pytest.raises(ValueError, match="not a checkpoint of this program"):
            load(path)


def test_compressed_repeated_and_appended_content_is_refused(folder):
    with zipfile.ZipFile(path_of(folder, 9), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"0" * 10**6)
    with (
        zipfile.ZipFile(path_of(folder, 10), "a") as archive,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        archive.writestr("archive/version", b"3")
    with open(path_of(folder, 100), "ab") as file:
        file.write(b"more")
    for step in (9, 10, 100):
        with pytest.raises(ValueError, match="damaged or not a checkpoint of this program"):
            load(path_of(folder, step))


# Two readers of zip files


END_64, LOCATOR, END = "<4sQ2H2I4Q", "<4sIQI", "<4s4H2IH"


def pieces(content):
    """(the entries, the directory, how many there are) of a zip file."""
    *_, count, length, start, _ = struct.unpack(END, content[-22:])
    return content[:start], content[start : start + length], count


def end_64(count, length, start):
    return struct.pack(END_64, b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)


def moved(directory, distance):
    """A directory whose entries all stand further on in the file."""
    result = bytearray(directory)
    for at in (found.start() for found in re.finditer(b"PK\1\2", directory)):
        place = struct.unpack_from("<I", result, at + 42)[0]
        struct.pack_into("<I", result, at + 42, place + distance)
    return bytes(result)


def two_archives(shown, hidden):
    """zipfile reads the end in 64 bits that stands before the locator, PyTorch the one that the
    locator points to."""
    entries, directory, count = pieces(hidden)
    pointed_to = len(entries) + len(directory)
    before = entries + directory + end_64(count, len(directory), len(entries))
    entries, directory, count = pieces(shown)
    start = len(before) + len(entries)
    return b"".join(
        (
            before + entries + moved(directory, len(before)),
            end_64(count, len(directory), start),
            struct.pack(LOCATOR, b"PK\6\7", 0, pointed_to, 1),
            struct.pack(END, b"PK\5\6", 0, 0, count, count, len(directory), start, 0),
        )
    )


def test_a_file_in_which_two_readers_find_two_archives_is_refused(folder):
    path, other = path_of(folder, 100), path_of(folder, 9)
    path.write_bytes(two_archives(path.read_bytes(), other.read_bytes()))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # zipfile finds nothing wrong
    assert torch.load(path, weights_only=True)["step"] == 9  # but PyTorch would load this
    with pytest.raises(ValueError, match="damaged or not a checkpoint of this program"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: b"PK\3\4" + bytes(60) + c,
        lambda c: c + c,
        lambda c: c + bytes(22),
        lambda c: c[:-2] + b"\2\0hi",
        lambda c: c[:-98] + c[-22:],  # no end in 64 bits: PyTorch's writer always writes it
        lambda c: c[:-98] + bytes(20) + c[-98:],
        lambda c: c.replace(b"PK\3\4\0\0\x08\x08\0\0", b"PK\3\4\0\0\x08\x08\x08\0", 1),
    ],
    ids=["before", "twice", "after", "comment", "no 64", "gap", "local method"],
)
def test_a_file_that_is_not_laid_out_as_torch_does_it_is_refused(folder, change, request):
    path = path_of(folder, 100)
    path.write_bytes(change(path.read_bytes()))
    if request.node.callspec.id == "no 64":
        assert load(path)["step"] == 100  # both readers take it for the same archive
    else:
        with pytest.raises(ValueError, match="damaged|not a checkpoint"):
            load(path)


def test_no_byte_of_the_directory_and_the_end_can_change_what_is_loaded(folder):
    path = path_of(folder, 100)
    content = path.read_bytes()
    start = len(pieces(content)[0])
    whole = load(path)
    attributes = [
        found.start() + 38 for found in re.finditer(b"PK\1\2", content)
    ]  # such as: folder
    for at in (*range(start, len(content), 7), *attributes):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        with contextlib.suppress(ValueError):
            found = load(path)
            assert found["step"] == 100 and found["config"] == whole["config"]
            assert all(torch.equal(t, whole["model"][n]) for n, t in found["model"].items())


def test_more_than_4_gb_are_laid_out_as_torch_does_it(tmp_path):
    """A file with holes, which takes no room: an entry of 5 GB, and a small one after it."""
    path, size, most = tmp_path / "x.pt", 5 * 2**30, 2**32 - 1
    names = (b"x/data/0", b"x/version")
    second = 30 + len(names[0]) + size + 24  # after the descriptor in 64 bits
    start = second + 30 + len(names[1]) + 2 + 24
    local = "<4s5H3I2H"
    directory = b""
    for name, length, at in ((names[0], size, 0), (names[1], 2, second)):
        large = [n for n in (length, length, at) if n >= most]
        extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large)
        numbers = (0, min(length, most), min(length, most), len(name), len(extra), 0, 0, 0, 0)
        record = ("<4s6H3I5H2I", b"PK\1\2", 0, 0, 0x808, 0, 0, 0, *numbers, min(at, most))
        directory += struct.pack(*record) + name + extra
    with open(path, "wb") as file:
        for name, at in zip(names, (0, second), strict=True):
            file.seek(at)
            file.write(
                struct.pack(local, b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, len(name), 0) + name
            )
        file.write(b"3\n")  # what PyTorch looks for
        file.seek(start)
        file.write(directory + end_64(2, len(directory), start))
        file.write(struct.pack(LOCATOR, b"PK\6\7", 0, start + len(directory), 1))
        file.write(struct.pack(END, b"PK\5\6", 0, 0, 2, 2, len(directory), most, 0))
    reader = torch._C.PyTorchFileReader(str(path))
    assert reader.get_record_offset("version") == second + 30 + len(names[1])
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        length = path.stat().st_size
        assert checkpoint.unexpected_entry(archive.infolist(), length) is None
        assert checkpoint.unexpected_layout(file, archive, length) is None
        assert checkpoint.unexpected_layout(file, archive, length - 1) == "its end"


class Built:
    """A dict with attributes that hide its methods, as a pickle can make one."""

    def __init__(self, content=(), **attributes):
        self.content, self.attributes = content, attributes

    def __repr__(self):  # the ids of tests must be the same in all processes
        return "Built"

    def __reduce__(self):
        return OrderedDict, (), self.attributes, None, iter(dict(self.content).items())


SCALER = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9}

VIEW = torch.zeros(1).as_strided((10**9,), (0,))  # large, but of a small storage


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"format": "other"}, "not a checkpoint of this program"),
        ({"format_version": 1}, "has format version 1, this program reads 2"),
        ({"step": "1"}, "step must be int, got str"),
        ({"step": True}, "step must be int, got bool"),
        ({"optimizer": None}, "optimizer must be dict, got NoneType"),
        ({"config": {"n_layer": "x"}}, "n_layer must be a whole number, got"),
        ({"config": {"n_layers": 2}}, "unknown knob 'n_layers'; did you mean n_layer"),
        ({"config": {"a": torch.zeros(1)}}, "a Tensor stands"),
        ({"data": {("x",): 1}}, "a name is not a text"),
        ({"extra": bytearray(9)}, "not a checkpoint"),
        ({"optimizer": {"w": 1}}, "not a dense tensor"),
        ({"model": {"w": "text"}}, "not a dense tensor"),
        ({"model": {"w": VIEW}}, "model or optimizer hold what is not a dense tensor"),
        ({"model": {"w": torch.zeros(1).to_sparse()}}, "not a checkpoint"),
        ({"model": {"w": torch.zeros(1, dtype=torch.float64)}}, "torch DoubleStorage"),
        ({"model": {"w": torch.tensor([1.0, float("nan")])}}, "w holds NaN or Inf"),
        ({"model": {1: torch.zeros(1)}}, "name is not a text"),
        ({"optimizer": {"w": {"step": torch.tensor(-5.0)}}}, "step of w is negative"),
        ({"optimizer": {"w": {"exp_avg_sq": -torch.ones(2)}}}, "exp_avg_sq of w is negative"),
        ({"optimizer": Built(items="x")}, "optimizer must be dict, got OrderedDict"),
        ({"optimizer": {"w": Built(values=1)}}, "not a dense tensor"),
        ({"data": {"tokens": Built(keys=1)}}, "a OrderedDict stands where"),
        ({"model": {"w": torch.ones(1).requires_grad_()}}, "more than its numbers"),
        ({"model": {"w": torch._neg_view(torch.ones(1))}}, "more than its numbers"),
        ({"step": -1}, "its step cannot be right"),
        ({"best_val_loss": math.nan}, "its best_val_loss cannot be right"),
        ({"grad_norms": ["x"]}, "its grad_norms cannot be right"),
        ({"grad_norms": [math.inf]}, "its grad_norms cannot be right"),
        ({"scaler": {"scale": "x"}}, "its scaler cannot be right"),
        ({"scaler": SCALER | {"_growth_tracker": "x"}}, "its scaler cannot be right"),
        ({"scaler": SCALER | {"_growth_tracker": 0, "scale": -1.0}}, "its scaler cannot be right"),
        ({"base": {"context": 10**400}}, "its base context cannot be right"),
        ({"base": {"path": "\0"}}, "its base path cannot be right"),
        ({"data": {"tokens": {"train": "x"}}}, "its data tokens cannot be right"),
        ({"data": {"tokens": 7}}, "data 'tokens' is 7"),
        ({"data": {"vocab_size": 10**400}}, "its data vocab_size cannot be right"),
        (
            {"model": dict.fromkeys(map(str, range(9)), torch.zeros(9999))},
            "its tensors are larger than the file",
        ),
    ],
    ids=str,
)
def test_foreign_and_broken_contents_are_refused(tmp_path, changes, words):
    torch.save(HEAD | state() | changes, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "x.pt")


def test_a_bomb_of_references_is_refused_at_once(tmp_path):
    bomb = ["x" * 100]
    for _ in range(9):
        bomb = [bomb] * 100
    torch.save(HEAD | state(config={"n_layer": bomb}), tmp_path / "x.pt")
    assert os.path.getsize(tmp_path / "x.pt") < 40_000
    with pytest.raises(ValueError, match="it unfolds to more than the file"):
        load(tmp_path / "x.pt")


def test_a_renamed_checkpoint_is_not_taken_for_another(folder):
    path_of(folder, 9).rename(path_of(folder, 11))
    with pytest.raises(ValueError, match="ckpt_00000011.pt holds step 9: it has been renamed"):
        load(path_of(folder, 11))


@pytest.mark.parametrize(
    "config, words",
    [
        ({"n_embd": None}, "the checkpoint does not say its n_embd"),
        ({"n_embd": 1_000_000, "n_head": 2}, "a model of its config"),
        ({"block_size": -1}, "block_size must be between"),
        ({"block_size": 10**8}, "block_size=100,000,000 asks for more memory"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused_before_a_model_is_built(config, words):
    """To build a model a million wide would end in another error, about memory."""
    with pytest.raises(ValueError, match=words):
        rebuilt(state(config=vars(MODEL) | config))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"embed.weight": torch.zeros(3, 8)}, "embed.weight is [3, 8] in the checkpoint, [11, 8]"),
        ({"more": torch.zeros(1)}, "has a surplus more"),
        ({"norm.gain": None}, "lacks norm.gain"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_named(changes, words):
    weights = {n: t for n, t in (state()["model"] | changes).items() if t is not None}
    with pytest.raises(ValueError, match=re.escape(words)):
        checkpoint.load_weights(Decoder(MODEL), weights)


# The checkpoints of a folder


def test_a_checkpoint_is_found_by_its_name_and_the_newest_by_its_number(folder):
    save(folder / "best.pt", state(7))
    assert steps_in(folder) == [9, 10, 100]
    assert [load_named(folder, which)["step"] for which in ("latest", "best", "9")] == [100, 7, 9]


def test_a_damaged_newest_falls_back_loudly(folder, capsys):
    flip_bit(path_of(folder, 100), os.path.getsize(path_of(folder, 100)) // 2)
    path_of(folder, 10).write_bytes(b"")
    assert load_newest(folder)["step"] == 9
    warned = capsys.readouterr().err
    for words in ("ckpt_00000100.pt", "ckpt_00000010.pt is empty", "going on from"):
        assert words in warned
    path_of(folder, 9).write_bytes(path_of(folder, 9).read_bytes()[:-7])
    with pytest.raises(ValueError, match="no sound checkpoint"):
        load_newest(folder)
    assert len(all_in(folder)) == 3  # nothing is deleted


@pytest.mark.parametrize(
    "which, words",
    [
        ("5", "ckpt_00000005.pt does not exist; steps in .*: 9, 10, 100"),
        ("best", "best.pt does not exist"),
        ("newest", "latest, best or a step"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named(folder, which, words):
    with pytest.raises(ValueError, match=words):
        load_named(folder, which)


def test_a_checkpoint_that_a_training_removes_is_no_damage(folder, capsys):
    def late(path):
        if path_of(folder, 100).exists():  # the training goes on before the file is opened
            save(path_of(folder, 101), state(101))
            prune(folder, 1, step=101)
        return load(path)

    assert load_newest(folder, late)["step"] == 101
    assert capsys.readouterr().err == ""


def test_what_is_verified_is_loaded_while_another_takes_its_name(folder):
    """A run is sampled while it saves, and removes what it saved before, again and again."""
    stop = threading.Event()

    def training():
        step = 100
        while not stop.is_set():
            step += 1
            save(path_of(folder, step), state(step))
            save(folder / "best.pt", state(step))
            prune(folder, 1, step)

    save(folder / "best.pt", state(100))
    thread = threading.Thread(target=training)
    thread.start()
    try:
        for which in ("latest", "best") * 10:
            assert load_named(folder, which)["step"] >= 100
    finally:
        stop.set()
        thread.join()


def test_a_link_to_nothing_is_named_and_left_out(folder, capsys):
    path_of(folder, 200).symlink_to(folder / "gone")
    path_of(folder, 300).symlink_to(path_of(folder, 300))
    assert load_newest(folder)["step"] == 100
    warned = capsys.readouterr().err
    assert "ckpt_00000200.pt" in warned and "ckpt_00000300.pt" in warned


def test_only_damage_sends_a_run_back_to_an_older_checkpoint(folder, capsys):
    """Lack of memory, or a file that may not be read, says nothing of the file."""

    def without_memory(path):
        # In a thread of its own: glibc gives one that once lacked memory another arena, for good,
        # and that would map each large block anew.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(torch.empty, 2**55).result()

    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    def of_another_version(path):
        torch.save(HEAD | state(100) | {"format_version": 3}, path)
        return load(path)

    for read, words in (
        (without_memory, "error: not enough memory .*can't allocate memory"),
        (unreadable, "error: .*Permission denied: '.*ckpt_00000100.pt'\n"),
        (of_another_version, "error: .*ckpt_00000100.pt has format version 3, this program reads"),
    ):
        with pytest.raises(SystemExit), user_errors():
            load_newest(folder, read)
        printed = capsys.readouterr().err
        assert re.match(words, printed) and printed.count("\n") == 1


def test_what_a_checkpoint_says_cannot_command_a_terminal():
    saved = {"config": {"dataset": "\x1b]52;c;eA==\x07\u202e", "seed": "\x9b2J"}, "data": {}}
    (line,) = compare_with_run(saved, {"dataset": "words"}, {})
    with pytest.raises(ValueError) as error:
        compare_with_run(saved, {"seed": 1}, {})
    assert line.isprintable() and str(error.value).isprintable()


def test_pruning_does_not_count_a_checkpoint_that_is_known_to_be_damaged(folder):
    prune(folder, 1, step=100, damaged={path_of(folder, 100)})
    assert steps_in(folder) == [10]


def test_pruning_keeps_the_newest_and_all_files_of_others(folder):
    others = [folder / "ckpt_9.pt.bak", folder / "step-5-backup"]
    for other in others:
        other.touch()
    prune(folder, 1, step=10)  # 100 was damaged, the run went back to 9 and has just saved 10
    assert steps_in(folder) == [10, 100]
    prune(folder, 1, step=100)
    assert steps_in(folder) == [100]
    assert all(other.exists() for other in others)


def test_a_checkpoint_that_cannot_be_removed_stays_and_is_named(folder, capsys):
    stuck = folder / "ckpt_00000008.shards"
    stuck.symlink_to(folder)  # a link to a folder is what rmtree refuses
    prune(folder, 1, step=100)
    assert steps_in(folder) == [8, 100]
    assert "ckpt_00000008.shards could not be removed" in capsys.readouterr().err


# Whether it belongs to a run


def test_every_knob_of_the_model_but_two_is_fixed_for_a_run():
    saved = {"config": vars(MODEL), "data": {}}
    for name, value in vars(MODEL).items():
        changed, line = vars(MODEL) | {name: "other"}, f"{name}: checkpoint={value}, now=other"
        if name in ("dropout", "norm_impl"):
            assert compare_with_run(saved, changed, {}) == [line]
        else:
            with pytest.raises(ValueError, match=line):
                compare_with_run(saved, changed, {})


def test_a_changed_run_is_refused_field_by_field_and_a_tuned_one_told():
    config = {"n_layer": 6, "seed": 1, "learning_rate": 1e-3, "out_dir": "a"}
    saved = {"config": config, "data": {"name": "x", "content_sha256": "1"}}
    tuned = config | {"learning_rate": 2e-3, "out_dir": "b"}
    told = compare_with_run(saved, tuned, {"name": "y", "content_sha256": "1"})
    assert told == ["learning_rate: checkpoint=0.001, now=0.002"]
    other = tuned | {"n_layer": 8, "seed": 2}
    with pytest.raises(ValueError) as error:
        compare_with_run(saved, other, {"name": "x", "content_sha256": "2"})
    for words in (
        "n_layer: checkpoint=6, now=8",
        "seed: checkpoint=1, now=2",
        "data content_sha256: checkpoint=1, now=2",
    ):
        assert words in str(error.value)


def test_a_knob_that_is_younger_than_a_checkpoint_had_its_default():
    saved = {"config": {"seed": 1}, "data": {}}
    assert compare_with_run(saved, {"seed": 1, "taper_start": 0}, {}) == []
    with pytest.raises(ValueError, match="taper_start: checkpoint=0, now=5"):
        compare_with_run(saved, {"seed": 1, "taper_start": 5}, {})
