"""A checkpoint is whole or it is not there; what is not sound is never loaded."""

import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

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
