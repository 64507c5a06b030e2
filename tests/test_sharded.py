"""A checkpoint in parts keeps the promises of one in a file, and becomes one."""

import json
import os
import pickle
import shutil
from functools import partial

import pytest
import torch
from ranks import only, saved_again, trained
from test_checkpoint import MODEL, flip_bit, state
from test_parallel import same
from test_train import assert_same_run

import checkpoint
import sample
import sharded
from data import checksum
from lock import Lock
from model import Decoder
from world import ALONE


@pytest.fixture
def parts(tmp_path):
    path = tmp_path / "ckpt_00000007.shards"
    sharded.save(path, state(7), ALONE)
    return path


def read(path):
    """The checkpoint with its tensors read."""
    there = sharded.load(path)
    for tensors in (there["model"], *there["optimizer"].values()):
        tensors |= {name: torch.full(t.shape, 7.0) for name, t in tensors.items()}
    sharded.read_into(there, path)
    return there


def test_what_was_saved_is_loaded(parts):
    there, wanted = read(parts), state(7)
    assert {k: there[k] for k in ("step", "config", "data", "best_val_loss", "grad_norms", "base")} == {
        k: wanted[k] for k in ("step", "config", "data", "best_val_loss", "grad_norms", "base")}
    assert there["model"].keys() == wanted["model"].keys()
    assert all(torch.equal(t, wanted["model"][n]) for n, t in there["model"].items())
    assert torch.equal(there["optimizer"]["norm.gain"]["exp_avg"], torch.ones(8))


def test_before_it_is_read_it_has_no_data(parts):
    assert all(t.is_meta for t in sharded.load(parts)["model"].values())


def test_nothing_but_our_files_is_there(parts):
    assert sorted(p.name for p in parts.iterdir()) == ["__0_0.distcp", "manifest.json"]
    assert [p.name for p in parts.parent.iterdir()] == [parts.name]


def test_a_pickle_beside_it_is_never_opened(parts):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(parts.parent / "exploded"),)

    (parts / ".metadata").write_bytes(pickle.dumps(Bomb()))
    assert torch.equal(read(parts)["model"]["embed.weight"], Decoder(MODEL, seed=7).embed.weight)
    assert not (parts.parent / "exploded").exists()


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_a_flipped_bit_is_found(parts, at):
    flip_bit(parts / "__0_0.distcp", at)
    with pytest.raises(ValueError, match="__0_0.distcp is damaged"):
        sharded.load(parts)


def test_a_file_cut_short_or_missing_is_found(parts):
    file = parts / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match="damaged"):
        sharded.load(parts)
    file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        sharded.load(parts)


def test_every_changed_byte_of_the_manifest_is_found(parts):
    path = parts / "manifest.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        flip_bit(path, at)
        with pytest.raises(ValueError, match="damaged|not a checkpoint|format version"):
            sharded.load(parts)
        path.write_bytes(whole)


def forged(parts, change):
    """The manifest changed and its checksum made to agree."""
    path = parts / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


@pytest.mark.parametrize("change", [
    lambda m: m["files"].update({"../x.distcp": [0, 0]}),
    lambda m: m["files"].update({"/dev/null": [0, 0]}),
    lambda m: m["tensors"]["model/norm.gain"].update(dtype="object"),
    lambda m: m["tensors"]["model/norm.gain"]["parts"][0].update(file="../x.distcp"),
    lambda m: m["tensors"]["model/norm.gain"].update(shape=[2**40]),
    lambda m: m["tensors"]["model/norm.gain"].update(shape="x"),
    lambda m: m["tensors"]["model/norm.gain"]["parts"][0].update(at=-1),
    lambda m: m.update(tensors=[]),
    lambda m: m.update(files=7),
    lambda m: m.update(step="7"),
    lambda m: m.update(config={"nonsense": 1}),
    lambda m: m.pop("base")])
def test_a_forged_manifest_is_refused(parts, change):
    (parts.parent / "x.distcp").touch()  # a file of size 0, whose checksum is 0
    forged(parts, change)
    with pytest.raises(ValueError):
        sharded.load(parts)


def test_a_renamed_one_is_refused(parts):
    other = parts.rename(parts.with_name("ckpt_00000008.shards"))
    with pytest.raises(ValueError, match="renamed"):
        sharded.load(other)


def test_nan_is_neither_saved_nor_loaded(parts, monkeypatch):
    bad = state(8)
    bad["model"]["norm.gain"][0] = float("nan")
    with pytest.raises(FloatingPointError, match="model/norm.gain holds NaN"):
        sharded.save(parts.with_name("ckpt_00000008.shards"), bad, ALONE)
    monkeypatch.setattr(torch, "isfinite", lambda t: torch.ones(1, dtype=torch.bool))
    sharded.save(parts.with_name("ckpt_00000008.shards"), bad, ALONE)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="model/norm.gain holds NaN"):
        read(parts.with_name("ckpt_00000008.shards"))


@pytest.mark.parametrize("call", ["mkdir", "replace", "rename"])
def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path) if call == "mkdir" else os, call, full)
    with pytest.raises(OSError, match="No space"):
        sharded.save(tmp_path / "ckpt_00000007.shards", state(7), ALONE)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_not_what_was_written_is_not_committed(tmp_path, monkeypatch):
    write = sharded.write_manifest

    def then_damaged(folder, *rest):
        write(folder, *rest)
        flip_bit(folder / "__0_0.distcp", 500)

    monkeypatch.setattr(sharded, "write_manifest", then_damaged)
    with pytest.raises(OSError, match="damaged"):
        sharded.save(tmp_path / "ckpt_00000007.shards", state(7), ALONE)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_cleared_by_the_next_run(tmp_path):
    (tmp_path / ".ckpt_00000007.shards.tmp").mkdir()
    (tmp_path / ".ckpt_00000007.shards.tmp" / "__0_0.distcp").write_text("half")
    with Lock(tmp_path):
        assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_a_kill_while_one_takes_the_place_of_another_loses_neither(parts, monkeypatch):
    wanted, renamed = read(parts), os.rename

    def killed(source, target):
        renamed(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        sharded.save(parts, state(7), ALONE)
    monkeypatch.setattr(os, "rename", renamed)
    assert not parts.exists()
    with Lock(parts.parent):
        assert torch.equal(read(parts)["model"]["norm.gain"], wanted["model"]["norm.gain"])
    sharded.save(parts, state(7), ALONE)
    assert sorted(p.name for p in parts.parent.iterdir()) == [parts.name]


def test_of_the_best_ones_the_last_stays(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"of a time before")
    for step in (3, 8):
        sharded.save(sharded.path_of(tmp_path / "best.pt", step), state(step), ALONE)
    assert [p.name for p in tmp_path.iterdir()] == ["best_00000008.shards"]


@pytest.mark.parametrize("which", ["latest", "best", "7"])
def test_parts_become_the_file_that_one_process_would_have_saved(tmp_path, which, capsys):
    for path in (tmp_path / "ckpt_00000007.pt", tmp_path / "best.pt"):
        sharded.save(sharded.path_of(path, 7), state(7), ALONE)
    assert sharded.main([str(tmp_path), f"checkpoint={which}"]) == 0
    file = tmp_path / ("best.pt" if which == "best" else "ckpt_00000007.pt")
    assert f"is now {file}" in capsys.readouterr().out
    checkpoint.save(tmp_path / "other.pt", state(7))
    ours, other = checkpoint.load(file), checkpoint.load(tmp_path / "other.pt")
    assert all(torch.equal(t, other["model"][n]) for n, t in ours["model"].items())
    assert {k: v for k, v in ours.items() if k not in ("model", "optimizer")} == {
        k: v for k, v in other.items() if k not in ("model", "optimizer")}
    assert torch.equal(ours["optimizer"]["norm.gain"]["exp_avg"], other["optimizer"]["norm.gain"]["exp_avg"])


@pytest.mark.parametrize("arguments, said", [
    (["checkpoint=best"], "no checkpoint best in parts"), (["checkpoint=3"], "there are 7"), (["x=1"], "are wanted"),
    (["checkpoint"], "are wanted")])
def test_bad_input_is_one_line(parts, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        sharded.main([str(parts.parent), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_a_run_in_parts_resumes_bitwise_and_keeps_as_many(start, tmp_path):
    knobs = ("sharded=true", "optimizer=muon", "keep=1", "lr_schedule=constant", "eval_interval=4")
    assert start(*knobs, "max_iters=8")[0] == 0
    assert start(*knobs, "resume=yes")[0] == 0
    assert start(*knobs, out="other")[0] == 0
    for name in ("run", "other"):
        assert [p.name for _, p in checkpoint.all_in(tmp_path / name)] == ["ckpt_00000012.shards"]
        assert sharded.main([str(tmp_path / name)]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_a_damaged_one_is_named_and_the_one_before_taken(start, tmp_path):
    start("sharded=true", "max_iters=8")
    flip_bit(tmp_path / "run" / "ckpt_00000008.shards" / "__0_0.distcp", 700)
    code, out, err = start("sharded=true", "max_iters=8", "resume=yes")
    assert code == 0 and "going on from the one before" in err and "from step 4" in out


def test_others_say_how_to_make_it_one_file(start, tmp_path, capsys):
    start("max_iters=4")
    start("sharded=true", "resume=yes")
    folder = tmp_path / "run"
    for which, file in (("latest", "ckpt_00000012"), ("12", "ckpt_00000012"), ("best", "best_00000012")):
        with pytest.raises(SystemExit) as stop:  # not the older file, which it could read
            sample.main([str(folder), "prompt=a", f"checkpoint={which}"])
        said = f"python sharded.py {folder} checkpoint={which.replace('latest', '12')} makes it one file"
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error: {folder / file}.shards is in parts: {said}\n"


def test_a_fresh_run_does_not_take_the_place_of_one_in_parts(start):
    start("sharded=true")
    code, _, err = start("sharded=true")
    assert code == 2 and "already holds a run (ckpt_00000012.shards)" in err


RANKS = {"max_iters": 4, "eval_interval": 2, "save_interval": 2, "keep": 9, "optimizer": "muon", "parallel": "fsdp"}


@pytest.mark.parametrize("before, after, way", [(2, 2, "fsdp"), (2, 4, "fsdp"), (4, 1, "ddp")])
def test_any_number_of_ranks_reads_what_some_wrote_bit_for_bit(tmp_path, data_folder, before, after, way):
    uncut, out, again = (tmp_path / name for name in ("uncut", "run", "again.pt"))
    codes, texts = trained(before, uncut, data_folder, sharded=True, **RANKS)
    assert not any(codes), texts
    shutil.copytree(uncut, out)
    shutil.rmtree(out / "ckpt_00000004.shards")
    assert [len(list(path.glob("*.distcp"))) for _, path in checkpoint.all_in(uncut)] == [before, before]
    tensors = sharded.read_manifest(uncut / "ckpt_00000002.shards")["tensors"]
    assert len(tensors["model/embed.weight"]["parts"]) == before  # though an evaluation had made it whole
    codes, texts = trained(after, out, data_folder, partial(saved_again, again), resume="yes",
                           **RANKS | {"parallel": way})
    assert not any(codes), texts
    assert sharded.main([str(uncut), "checkpoint=2"]) == 0
    loaded, wanted = checkpoint.load(again), checkpoint.load(uncut / "ckpt_00000002.pt")
    assert same(wanted, loaded | {"config": wanted["config"]})
    if (before, RANKS["parallel"]) == (after, way):
        assert sharded.main([str(uncut)]) == 0
        (uncut / "ckpt_00000002.pt").unlink()
        (out / "ckpt_00000002.shards").rename(tmp_path / "aside")
        assert same(*(checkpoint.load_newest(folder)["model"] for folder in (uncut, out)))


def test_a_rank_that_cannot_write_its_part_is_told_and_the_run_goes_on_or_ends(tmp_path, data_folder):
    codes, texts = trained(2, tmp_path / "run", data_folder, partial(only, 1, no_room), sharded=True, **RANKS)
    assert codes == [1, 1] and "rank 1: " in texts[0] and "training goes on" in texts[0]
    assert "could not be saved" in texts[0] and not list((tmp_path / "run").glob("*.shards"))


def no_room():
    """This rank's disk is full where parts are written."""
    from torch.distributed.checkpoint import FileSystemWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    FileSystemWriter.write_data = full
