"""A checkpoint is whole or it is not there; what is not sound is never loaded."""

import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import all_in, compare_with_run, load, load_named, load_newest, path_of, prune, save, write_atomically
from model import LARGEST, Decoder, ModelConfig

MODEL = ModelConfig(vocab_size=11, n_layer=1, n_embd=8, n_head=2, n_hidden=8, block_size=8)


HEAD = {"format": checkpoint.FORMAT, "format_version": checkpoint.VERSION}


def state(step=1, **changes):
    model = Decoder(MODEL, seed=step)
    whole = {"step": step, "model": {n: p.detach() for n, p in model.named_parameters()},
             "optimizer": {"norm.gain": {"exp_avg": torch.ones(8)}}, "scaler": {}, "config": vars(MODEL) | {"seed": 1},
             "data": {"name": "x"}, "best_val_loss": 2.5, "grad_norms": [1.5], "base": {}}
    return whole | changes


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


def test_what_was_saved_is_loaded(folder):
    loaded, wanted = load(path_of(folder, 10)), state(10)
    assert {k: v for k, v in loaded.items() if k in ("step", "config", "data", "best_val_loss", "scaler")} == {
        k: wanted[k] for k in ("step", "config", "data", "best_val_loss", "scaler")}
    assert all(torch.equal(t, wanted["model"][n]) for n, t in loaded["model"].items())
    assert torch.equal(loaded["optimizer"]["norm.gain"]["exp_avg"], torch.ones(8))
    assert not list(folder.glob(".*"))


def rebuilt(state):
    return checkpoint.build_model(checkpoint.model_config(state), state["model"], "cpu")


def test_the_model_in_it_is_rebuilt(folder):
    model = rebuilt(load(path_of(folder, 9)))
    assert model.config == MODEL
    assert torch.equal(model.embed.weight, Decoder(MODEL, seed=9).embed.weight)


def test_a_model_trained_with_the_cuda_kernel_is_rebuilt_without_it():
    knobs = vars(MODEL) | {"norm_impl": "triton"}
    assert rebuilt(state(config=knobs)).config.norm_impl == "eager"


def test_the_deepest_model_with_the_most_norms_can_be_saved(tmp_path):
    """Its names fill LARGEST_PICKLE by so much a Block, and a little more where there are many."""
    sizes = []
    for layers in (8, 12):
        model = Decoder(replace(MODEL, n_layer=layers, norm="derf", norm_pos="sandwich", qk_norm=True))
        tensors = {name: p.detach() for name, p in model.named_parameters()}
        adamw = {name: {key: p.clone() for key in ("step", "exp_avg", "exp_avg_sq")} for name, p in tensors.items()}
        torch.save({"model": tensors, "optimizer": adamw}, tmp_path / "x.pt")
        with zipfile.ZipFile(tmp_path / "x.pt") as archive:
            sizes.append(archive.getinfo("x/data.pkl").file_size)
    assert (sizes[1] - sizes[0]) / 4 * 1.05 * LARGEST["n_layer"] < checkpoint.LARGEST_PICKLE


def test_newest_is_by_number(folder):
    assert [step for step, _ in all_in(folder)] == [9, 10, 100]
    assert load_newest(folder)["step"] == 100


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


def test_a_damaged_newest_falls_back_loudly(folder, capsys):
    flip_bit(path_of(folder, 100), os.path.getsize(path_of(folder, 100)) // 2)
    path_of(folder, 10).write_bytes(b"")
    assert load_newest(folder)["step"] == 9
    warned = capsys.readouterr().err
    assert "ckpt_00000100.pt" in warned and "ckpt_00000010.pt is empty" in warned and "going on from" in warned


def test_with_all_damaged_nothing_is_loaded_and_nothing_deleted(folder):
    for _, path in all_in(folder):
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="no sound checkpoint"):
        load_newest(folder)
    assert len(all_in(folder)) == 3


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b"hello\n", "not a checkpoint of this program"), (b"\x89PNG\r\n\x1a\n", "not a checkpoint"),
    (b"PK\x03\x04 and no more", "damaged or cut short"), (b"\x80\x04\x95\x00", "not a checkpoint")])
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


def rewritten(path, change):
    """The zip file once more, each entry as change(name, content) says: (name, content), or None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in filter(None, (change(*entry) for entry in entries)):
            archive.writestr(name, content)


@pytest.mark.parametrize("change", [
    lambda name, content: (name.replace("data.pkl", "DATA.PKL"), content),
    lambda name, content: (name.replace("version", "../version"), content),
    lambda name, content: ("other/data/0" if name.endswith("data/0") else name, content),
    lambda name, content: (name, content + b" " * 2**23) if name.endswith("data.pkl") else (name, content),
], ids=["case", "path", "prefix", "large"])
def test_a_zip_file_that_torch_would_not_write_is_refused(folder, change):
    path = path_of(folder, 9)
    rewritten(path, lambda name, content: (name, content))
    assert load(path)["step"] == 9
    rewritten(path, change)
    with pytest.raises(ValueError, match="not a checkpoint of this program"):
        load(path)


def test_compressed_repeated_and_appended_content_is_refused(folder):
    with zipfile.ZipFile(path_of(folder, 9), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"0" * 10**6)
    with zipfile.ZipFile(path_of(folder, 10), "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/version", b"3")
    with open(path_of(folder, 100), "ab") as file:
        file.write(b"more")
    for step in (9, 10, 100):
        with pytest.raises(ValueError, match="damaged or not a checkpoint of this program"):
            load(path_of(folder, step))


def view(*shape, stride):
    return torch.zeros(1).as_strided(shape, stride)


@pytest.mark.parametrize("changes, words", [
    ({"model": {"w": view(10**9, stride=(0,))}}, "model or optimizer hold what is not a dense tensor"),
    ({"model": dict.fromkeys(map(str, range(9)), torch.zeros(9999))}, "its tensors are larger than the file"),
    ({"model": {"w": "text"}}, "not a dense tensor"), ({"optimizer": {"w": 1}}, "not a dense tensor"),
    ({"model": {1: torch.zeros(1)}}, "name is not a text"), ({"config": {"a": torch.zeros(1)}}, "a Tensor stands"),
    ({"data": {("x",): 1}}, "a name is not a text"), ({"step": True}, "step must be int, got bool"),
    ({"model": {"w": torch.zeros(1).to_sparse()}}, "not a checkpoint"), ({"extra": bytearray(9)}, "not a checkpoint"),
    ({"model": {"w": torch.zeros(1, dtype=torch.float64)}}, "torch DoubleStorage"),
], ids=str)
def test_what_would_unfold_when_it_is_used_is_refused(tmp_path, changes, words):
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


@pytest.mark.parametrize("config, words", [
    ({"n_embd": None}, "the checkpoint does not say its n_embd"),
    ({"n_embd": 1_000_000, "n_head": 2}, "a model of its config"), ({"block_size": -1}, "block_size must be between"),
    ({"block_size": 10**8}, "block_size=100,000,000 asks for more memory")])
def test_a_config_that_does_not_fit_the_weights_is_refused_before_a_model_is_built(monkeypatch, config, words):
    monkeypatch.setattr(checkpoint, "Decoder", None)
    with pytest.raises(ValueError, match=words):
        rebuilt(state(config=vars(MODEL) | config))


def test_every_knob_of_the_model_but_two_is_fixed_for_a_run():
    saved = {"config": vars(MODEL), "data": {}}
    for name, value in vars(MODEL).items():
        changed = vars(MODEL) | {name: "other"}
        if name in ("dropout", "norm_impl"):
            assert compare_with_run(saved, changed, {}) == [f"{name}: checkpoint={value}, now=other"]
        else:
            with pytest.raises(ValueError, match=f"{name}: checkpoint={value}, now=other"):
                compare_with_run(saved, changed, {})


def test_a_checkpoint_that_cannot_be_removed_stays_and_is_named(folder, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    prune(folder, 1, step=100)
    assert "ckpt_00000009.pt could not be removed ([Errno 30] Read-only file system)" in capsys.readouterr().err


@pytest.mark.parametrize("changes, words", [
    ({"format": "other"}, "not a checkpoint of this program"),
    ({"format_version": 1}, "has format version 1, this program reads 2"),
    ({"step": "1"}, "step must be int, got str"), ({"config": {"n_layer": "x"}}, "n_layer must be a whole number, got"),
    ({"config": {"n_layers": 2}}, "unknown knob 'n_layers'; did you mean n_layer"),
    ({"optimizer": None}, "optimizer must be dict, got NoneType"),
    ({"model": {"w": torch.tensor([1.0, float("nan")])}}, "w holds NaN or Inf"),
])
def test_foreign_and_broken_contents_are_refused(tmp_path, changes, words):
    whole = HEAD | state() | changes
    torch.save(whole, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "x.pt")


def test_non_finite_weights_are_never_saved(tmp_path):
    bad = state()
    bad["model"]["norm.gain"][3] = float("inf")
    with pytest.raises(FloatingPointError, match="norm.gain"):
        save(path_of(tmp_path, 1), bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", ["write", "os.fsync", "verify", "os.replace"])
def test_a_failed_save_leaves_the_old_file_and_no_other(folder, monkeypatch, fails):
    path = path_of(folder, 100)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    if fails.startswith("os."):
        monkeypatch.setattr(os, fails[3:], fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail if fails == "write" else lambda f: f.write(b"new"),
                         fail if fails == "verify" else None)
    assert path.read_bytes() == before
    assert len(list(folder.iterdir())) == 3


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{fd}")
                                                              else "fsync file"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])
    write_atomically(tmp_path / "x", lambda f: f.write(b"1"), lambda path: calls.append("check"))
    assert calls == ["fsync file", "check", "rename", "fsync folder"]


def test_pruning_keeps_the_newest_and_all_files_of_others(folder):
    (folder / "ckpt_9.pt.bak").touch()
    (folder / "step-5-backup").touch()
    prune(folder, 2, step=100)
    assert [step for step, _ in all_in(folder)] == [10, 100]
    assert (folder / "ckpt_9.pt.bak").exists() and (folder / "step-5-backup").exists()


def test_pruning_never_takes_the_sound_ones_for_a_later_damaged_one(folder):
    prune(folder, 1, step=10)  # 100 was damaged, the run went back to 9 and has just saved 10
    assert [step for step, _ in all_in(folder)] == [10, 100]


@pytest.mark.parametrize("which, words", [("5", "ckpt_00000005.pt does not exist; steps in .*: 9, 10, 100"),
                                          ("best", "best.pt does not exist"), ("newest", "latest, best or a step")])
def test_a_checkpoint_that_is_not_there_is_named(folder, which, words):
    with pytest.raises(ValueError, match=words):
        load_named(folder, which)


def test_a_checkpoint_is_found_by_its_name(folder):
    save(folder / "best.pt", state(7))
    assert [load_named(folder, which)["step"] for which in ("latest", "best", "9")] == [100, 7, 9]


def test_weights_that_do_not_fit_are_named():
    weights = state()["model"]
    with pytest.raises(ValueError, match=re.escape("embed.weight is [3, 8] in the checkpoint, [11, 8] in the model")):
        checkpoint.load_weights(Decoder(MODEL), weights | {"embed.weight": torch.zeros(3, 8)})
    with pytest.raises(ValueError, match="has a surplus more"):
        checkpoint.load_weights(Decoder(MODEL), weights | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match="lacks norm.gain"):
        checkpoint.load_weights(Decoder(MODEL), {n: t for n, t in weights.items() if n != "norm.gain"})


def test_a_changed_run_is_refused_field_by_field_and_a_tuned_one_told():
    saved = {"config": {"n_layer": 6, "seed": 1, "learning_rate": 1e-3, "out_dir": "a"},
             "data": {"name": "x", "content_sha256": "1"}}
    now = saved["config"] | {"n_layer": 8, "seed": 2, "learning_rate": 2e-3, "out_dir": "b"}
    with pytest.raises(ValueError) as error:
        compare_with_run(saved, now, {"name": "x", "content_sha256": "2"})
    for words in ("n_layer: checkpoint=6, now=8", "seed: checkpoint=1, now=2",
                  "data content_sha256: checkpoint=1, now=2"):
        assert words in str(error.value)
    assert compare_with_run(saved, saved["config"] | {"learning_rate": 2e-3, "out_dir": "b"},
                            {"name": "y", "content_sha256": "1"}) == [
        "learning_rate: checkpoint=0.001, now=0.002"]
