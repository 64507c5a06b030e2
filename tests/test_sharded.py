"""A checkpoint in parts keeps the promises of one in a file, and becomes one."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from functools import partial

import pytest
import torch
from conftest import slow
from faults.harness import train_ranks
from ranks import fill_disk, only, save_the_start
from test_checkpoint import MODEL, flip_bit, state
from test_parallel import same
from test_train import assert_same_run

import sample
from data import checksum
from model import Decoder
from run import sharded
from run.ranks import ALONE
from weights import checkpoint
from weights.lock import Lock
from weights.lora import add_adapters


@pytest.fixture
def parts(tmp_path):
    path = tmp_path / "ckpt_00000007.shards"
    sharded.save_parts(path, state(7), ALONE)
    return path


def read(path):
    """The checkpoint with its tensors read."""
    there = sharded.load_parts(path)
    for tensors in (there["model"], *there["optimizer"].values()):
        assert all(t.is_meta for t in tensors.values())  # before it is read it has no data
        tensors |= {name: torch.full(t.shape, 7.0) for name, t in tensors.items()}
    sharded.read_into(there, path)
    return there


def forge(parts, change):
    """Changes the manifest and makes its checksum agree."""
    path = parts / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


def full_disk(*_):
    raise OSError(28, "No space left on device")


# What is loaded


def test_what_was_saved_is_loaded_and_nothing_but_our_files_is_there(parts):
    there, wanted = read(parts), state(7)
    for name in ("step", "config", "data", "best_val_loss", "grad_norms", "base", "model"):
        assert same(there[name], wanted[name])
    assert torch.equal(there["optimizer"]["norm.gain"]["exp_avg"], torch.ones(8))
    assert sorted(path.name for path in parts.iterdir()) == ["__0_0.distcp", "manifest.json"]
    assert [path.name for path in parts.parent.iterdir()] == [parts.name]


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
        sharded.load_parts(parts)


def test_a_file_cut_short_or_missing_or_renamed_is_found(parts):
    file = parts / "__0_0.distcp"
    other = parts.with_name("ckpt_00000008.shards")
    parts.rename(other)
    with pytest.raises(ValueError, match="renamed"):
        sharded.load_parts(other)
    other.rename(parts)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match="damaged"):
        sharded.load_parts(parts)
    file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        sharded.load_parts(parts)


def test_every_changed_byte_of_the_manifest_is_found(parts):
    path = parts / "manifest.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        flip_bit(path, at)
        with pytest.raises(ValueError, match="damaged|not a checkpoint|format version"):
            sharded.load_parts(parts)
        path.write_bytes(whole)


def gain(manifest):
    return manifest["tensors"]["model/norm.gain"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: gain(m).update(parts=[]),
        lambda m: gain(m)["parts"].append(gain(m)["parts"][0]),
        lambda m: gain(m)["parts"][0].update(shape=[7]),
        lambda m: gain(m)["parts"][0].update(offset=[1]),
        lambda m: gain(m)["parts"][0].update(offset=[0, 0]),
        lambda m: gain(m)["parts"][0].update(offset="0"),
        lambda m: gain(m)["parts"][0].update(at=10**9),
        lambda m: gain(m)["parts"][0].update(bytes=31),
        lambda m: gain(m)["parts"][0].update(bytes=10**30),
        lambda m: (gain(m).update(shape=[2**62]), gain(m)["parts"][0].update(shape=[2**62])),
        lambda m: (gain(m).update(shape=[0]), gain(m)["parts"][0].update(shape=[0])),
        lambda m: (gain(m).update(shape=[1] * 99), gain(m)["parts"][0].update(shape=[1] * 99)),
        lambda m: gain(m).update(shape=[8.0]),
        lambda m: gain(m).update(shape=8),
        lambda m: gain(m).update(parts=[7]),
        lambda m: gain(m).update(parts=m["tensors"]["model/blocks.0.attn_norm.gain"]["parts"]),
        lambda m: gain(m)["parts"][0].update(at=gain(m)["parts"][0]["at"] - 1),
        lambda m: m["files"].update({"__9_9.distcp": [0, 0]}),
        lambda m: m["files"].update({"__0_0.distcp": []}),
        lambda m: m["files"].update({"__0_0.distcp": "x"}),
        lambda m: m["tensors"].update({"norm.gain": m["tensors"].pop("model/norm.gain")}),
        lambda m: m.update(grad_norms=["x"]),
        lambda m: m["files"].update({"../x.distcp": [0, 0]}),
        lambda m: m["files"].update({"/dev/null": [0, 0]}),
        lambda m: gain(m).update(dtype="object"),
        lambda m: gain(m)["parts"][0].update(file="../x.distcp"),
        lambda m: gain(m).update(shape=[2**40]),
        lambda m: gain(m).update(shape="x"),
        lambda m: gain(m)["parts"][0].update(at=-1),
        lambda m: m.update(tensors=[]),
        lambda m: m.update(files=7),
        lambda m: m.update(step="7"),
        lambda m: m.update(config={"nonsense": 1}),
        lambda m: m.pop("base"),
    ],
)
def test_a_forged_manifest_is_refused(parts, change):
    for path in (parts.parent / "x.distcp", parts / "__9_9.distcp"):
        path.touch()  # a file of size 0, whose checksum is 0
    forge(parts, change)
    with pytest.raises(ValueError):
        sharded.load_parts(parts)


def test_a_part_that_unfolds_to_more_than_it_is_is_refused(parts):
    """A part is a file of torch.save in itself. This one is compressed, with a right checksum."""
    file = parts / "__0_0.distcp"
    whole, place = file.read_bytes(), gain(json.loads((parts / "manifest.json").read_bytes()))
    at, size = (place["parts"][0][name] for name in ("at", "bytes"))
    squeezed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(whole[at : at + size])) as before,
        zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as after,
    ):
        for name in before.namelist():
            after.writestr(name, before.read(name))
    file.write_bytes(whole + squeezed.getvalue())

    def change(manifest):
        moved = {"at": len(whole), "bytes": len(squeezed.getvalue())}
        gain(manifest)["parts"][0].update(moved)
        manifest["files"] = sharded.sizes_and_sums([file])

    forge(parts, change)
    with pytest.raises(ValueError, match="__0_0.distcp is damaged or not a checkpoint"):
        read(parts)


@pytest.mark.parametrize(
    "tensor, words",
    [
        (torch.ones(9), "of another shape"),
        (torch.ones(7), "of another shape"),
        (torch.ones(8, 1), "of another shape"),
        (OrderedDict(), "of another shape"),
        (torch.ones(1).expand(8), "not dense"),
    ],
    ids=["more", "fewer", "a matrix", "no tensor", "expanded"],
)
def test_a_part_of_another_shape_than_its_manifest_says_is_refused(parts, tensor, words):
    file, other = parts / "__0_0.distcp", io.BytesIO()
    torch.save(tensor, other)
    whole = file.read_bytes()
    file.write_bytes(whole + other.getvalue())

    def change(manifest):
        gain(manifest)["parts"][0].update(at=len(whole), bytes=len(other.getvalue()))
        manifest["files"] = sharded.sizes_and_sums([file])

    forge(parts, change)
    with pytest.raises(ValueError, match=words):
        read(parts)


@pytest.mark.parametrize("name", ["__0_0.distcp", "manifest.json"])
def test_a_part_that_is_a_link_is_refused(parts, name):
    (parts / name).rename(parts.parent / name)
    (parts / name).symlink_to(parts.parent / name)
    with pytest.raises(ValueError, match=f"{name} is a link: put the file itself there"):
        sharded.load_parts(parts)


# What is saved


def test_nan_is_neither_saved_nor_loaded(parts):
    bad = state(8)
    bad["model"]["norm.gain"][0] = float("nan")
    with pytest.raises(FloatingPointError, match="model/norm.gain holds NaN"):
        sharded.save_parts(parts.with_name("ckpt_00000008.shards"), bad, ALONE)
    file = parts / "__0_0.distcp"
    good, nan = struct.pack("8f", *[1.0] * 8), struct.pack("8f", *[float("nan")] * 8)
    assert good in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(good, nan))
    forge(parts, lambda m: m.update(files=sharded.sizes_and_sums([file])))
    with pytest.raises(ValueError, match="holds NaN"):
        read(parts)


@pytest.mark.parametrize("call", ["replace", "rename"])
def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, call):
    # A real disk is full at another moment each time; these are the two that matter.
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match="No space"):
        sharded.save_parts(tmp_path / "ckpt_00000007.shards", state(7), ALONE)
    monkeypatch.undo()
    with pytest.raises(OSError):
        sharded.save_parts(tmp_path / "gone" / "ckpt_00000007.shards", state(7), ALONE)
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_not_what_was_written_is_not_committed(tmp_path, monkeypatch):
    write = sharded.write_manifest

    def then_damage(folder, *rest):
        write(folder, *rest)
        flip_bit(folder / "__0_0.distcp", 500)

    monkeypatch.setattr(sharded, "write_manifest", then_damage)  # as a bad disk does it
    with pytest.raises(OSError, match="damaged"):
        sharded.save_parts(tmp_path / "ckpt_00000007.shards", state(7), ALONE)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_loses_nothing_and_the_next_run_clears_up(parts, monkeypatch):
    wanted, rename = read(parts), os.rename

    def killed(source, target):
        rename(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)  # when the old one has been put aside
        sharded.save_parts(parts, state(7), ALONE)
    half = parts.with_name(".ckpt_00000008.shards.tmp")
    half.mkdir()
    (half / "__0_0.distcp").write_text("half")
    assert not parts.exists()
    with Lock(parts.parent) as lock:
        assert same(read(parts)["model"], wanted["model"])
        lock.clean_up()
        assert not list(parts.parent.glob(".*.tmp"))
    sharded.save_parts(parts, state(7), ALONE)
    assert [path.name for path in parts.parent.iterdir()] == [parts.name]


def test_of_the_best_ones_the_last_stays(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"of a time before")
    for step in (3, 8):
        sharded.save_parts(sharded.folder_of(tmp_path / "best.pt", step), state(step), ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["best_00000008.shards"]


# One file


def moments(weights):
    """What AdamW keeps of these weights."""
    like = {name: torch.ones_like(weight) for name, weight in weights.items()}
    return {
        name: {"step": torch.tensor(7.0), "exp_avg": one, "exp_avg_sq": one.clone()}
        for name, one in like.items()
    }


def without(manifest, start):
    """Takes the tensors with such names out of a manifest."""
    for name in [name for name in manifest["tensors"] if name.startswith(start)]:
        del manifest["tensors"][name]


@pytest.mark.parametrize(
    "start, words",
    [
        ("", "is damaged, or not from this program"),  # its file is in use no more
        ("model/", "has 0 weights"),
        ("model/norm.gain", "weights, a model of its config"),
        ("optimizer/", "has no optimizer state"),
        ("optimizer/norm.gain/", "1 missing (norm.gain)"),
        ("optimizer/norm.gain/exp_avg_sq", "lacks exp_avg_sq of norm.gain"),
    ],
)
def test_parts_that_are_not_all_of_a_checkpoint_become_no_file(tmp_path, capsys, start, words):
    parts = tmp_path / "ckpt_00000007.shards"
    sharded.save_parts(parts, state(7, optimizer=moments(state(7)["model"])), ALONE)
    forge(parts, partial(without, start=start))
    with pytest.raises(SystemExit) as stop:
        sharded.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [parts.name]


@pytest.mark.parametrize("lost, code", [(None, 0), ("blocks.0.attn.q.lora_a", 2)])
def test_adapters_in_parts_become_a_file_if_all_are_there(tmp_path, capsys, lost, code):
    model = Decoder(MODEL, seed=7)
    add_adapters(model, rank=2, alpha=4.0, seed=7)
    adapters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    config = vars(MODEL) | {"lora_rank": 2, "lora_alpha": 4.0}
    kept = {name: adapter for name, adapter in adapters.items() if name != lost}
    assert code == 0 or len(kept) < len(adapters)
    saved = state(7, model=kept, optimizer=moments(kept), config=config)
    sharded.save_parts(tmp_path / "ckpt_00000007.shards", saved, ALONE)
    try:
        found = sharded.main([str(tmp_path)])
    except SystemExit as stop:
        found = stop.code
    assert found == code and (tmp_path / "ckpt_00000007.pt").exists() == (not code)
    assert not code or "weights of adapters, its config" in capsys.readouterr().err


def test_a_moment_of_parts_that_cannot_be_negative_is_refused(tmp_path):
    parts, kept = tmp_path / "ckpt_00000007.shards", moments(state(7)["model"])
    kept["norm.gain"]["exp_avg_sq"] *= -1
    sharded.save_parts(parts, state(7, optimizer=kept), ALONE)
    with pytest.raises(ValueError, match="norm.gain/exp_avg_sq is negative"):
        read(parts)


@pytest.mark.parametrize("which", ["latest", "best", slow("7")])
def test_parts_become_the_file_that_one_process_would_have_saved(tmp_path, which, capsys):
    whole = state(7, optimizer=moments(state(7)["model"]))
    for path in (tmp_path / "ckpt_00000007.pt", tmp_path / "best.pt"):
        sharded.save_parts(sharded.folder_of(path, 7), whole, ALONE)
    assert sharded.main([str(tmp_path), f"checkpoint={which}"]) == 0
    file = tmp_path / ("best.pt" if which == "best" else "ckpt_00000007.pt")
    assert f"is now {file}" in capsys.readouterr().out
    checkpoint.save(tmp_path / "other.pt", whole)
    assert same(checkpoint.load(file), checkpoint.load(tmp_path / "other.pt"))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["checkpoint=best"], "no checkpoint best in parts"),
        (["checkpoint=3"], "there are: 7"),
        (["x=1"], "are wanted"),
        (["checkpoint"], "are wanted"),
    ],
)
def test_bad_input_is_one_line(parts, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        sharded.main([str(parts.parent), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_a_run_without_parts_is_told_that_its_checkpoints_are_whole(tmp_path, capsys):
    checkpoint.save(tmp_path / "ckpt_00000007.pt", state(7))
    for which, said in (("latest", "is whole already"), ("7", "is whole already"), ("5", "none")):
        with pytest.raises(SystemExit):
            sharded.main([str(tmp_path), f"checkpoint={which}"])
        assert said in capsys.readouterr().err
    sharded.save_parts(sharded.folder_of(tmp_path / "best.pt", 7), state(7), ALONE)
    with pytest.raises(SystemExit):
        sharded.main([str(tmp_path)])
    err = capsys.readouterr().err
    assert f"{tmp_path / 'ckpt_00000007.pt'} is whole already; in parts there are: best" in err


def test_others_say_how_to_make_it_one_file(start, tmp_path, capsys):
    start("max_iters=4")
    start("sharded=true", "resume=yes")
    folder = tmp_path / "run"
    for which, wanted, name in (
        ("latest", "12", "ckpt_00000012"),
        ("12", "12", "ckpt_00000012"),
        ("best", "best", "best_00000012"),
    ):
        with pytest.raises(SystemExit) as stop:  # not the older file, which it could read
            sample.main([str(folder), "prompt=a", f"checkpoint={which}"])
        made = f"python -m run.sharded {folder} checkpoint={wanted} makes it one file"
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error: {folder / name}.shards is in parts: {made}\n"


# Runs


def test_a_run_in_parts_resumes_bitwise_and_keeps_as_many(start, tmp_path):
    knobs = ("sharded=true", "optimizer=muon", "keep=1", "lr_schedule=constant", "eval_interval=4")
    assert start(*knobs, "max_iters=8")[0] == 0
    assert start(*knobs, "resume=yes")[0] == 0
    assert start(*knobs, out="other")[0] == 0
    for name in ("run", "other"):
        found = [path.name for _, path in checkpoint.all_in(tmp_path / name)]
        assert found == ["ckpt_00000012.shards"]
        assert sharded.main([str(tmp_path / name)]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_a_damaged_one_is_named_and_the_one_before_taken_but_never_overwritten(start, tmp_path):
    start("sharded=true", "max_iters=8")
    code, _, err = start("sharded=true", "max_iters=8")
    assert code == 2 and "already holds a run (ckpt_00000008.shards)" in err
    flip_bit(tmp_path / "run" / "ckpt_00000008.shards" / "__0_0.distcp", 700)
    code, out, err = start("sharded=true", "max_iters=8", "resume=yes")
    assert code == 0 and "going on from the one before" in err and "from step 4" in out


SHORT = {"max_iters": 4, "eval_interval": 2, "save_interval": 2, "keep": 9}
RANKS = SHORT | {"optimizer": "muon", "parallel": "fsdp", "sharded": True}


@pytest.mark.parametrize(
    "before, after, way", [(2, 1, "ddp"), slow(2, 2, "fsdp"), slow(2, 4, "fsdp"), slow(4, 1, "ddp")]
)
def test_any_number_of_ranks_reads_what_some_wrote_bit_for_bit(tmp_path, before, after, way):
    uncut, out, again = (tmp_path / name for name in ("uncut", "run", "again"))
    codes, texts = train_ranks(before, uncut, **RANKS)
    assert not any(codes), texts
    shutil.copytree(uncut, out)
    shutil.rmtree(out / "ckpt_00000004.shards")
    for _, path in checkpoint.all_in(uncut):
        assert len(list(path.glob("*.distcp"))) == before
        tensors = sharded.read_manifest(path)["tensors"]
        # An evaluation had made it whole.
        assert len(tensors["model/embed.weight"]["parts"]) == before
    knobs = RANKS | {"parallel": way, "sharded": way == "fsdp", "resume": "yes"}
    codes, texts = train_ranks(after, out, partial(save_the_start, again), **knobs)
    assert not any(codes), texts
    assert sharded.main([str(uncut), "checkpoint=2"]) == 0
    loaded, wanted = checkpoint.load_newest(again), checkpoint.load(uncut / "ckpt_00000002.pt")
    assert same(wanted, loaded | {"config": wanted["config"]})
    if (before, RANKS["parallel"]) == (after, way):
        for run in (uncut, out):
            assert sharded.main([str(run), "checkpoint=4"]) == 0
        ends = [checkpoint.load(run / "ckpt_00000004.pt") for run in (uncut, out)]
        assert all(same(ends[0][name], ends[1][name]) for name in ("model", "optimizer"))


def test_a_rank_that_cannot_write_its_part_is_told_and_the_run_goes_on_or_ends(tmp_path):
    codes, texts = train_ranks(2, tmp_path / "run", partial(only, 1, fill_disk), **RANKS)
    assert codes == [1, 1] and "rank 1: " in texts[0] and "training goes on" in texts[0]
    assert "could not be saved" in texts[0] and not list((tmp_path / "run").glob("*.shards"))
