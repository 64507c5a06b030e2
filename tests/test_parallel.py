"""Several ranks do what one process does: the same training, of which main alone speaks and writes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import ranks
import torch
from conftest import ROOT, prepare_words
from faults.harness import command, difference, run
from ranks import only, trained

import checkpoint
import metrics

SHORT = {"max_iters": 4, "eval_interval": 2, "save_interval": 2, "keep": 9, "eval_iters": 5}
ODD = {"n_embd": 18, "n_head": 3, "n_kv_head": 1, "n_hidden": 10, "norm": "dyt", "qk_norm": True,
       "tie_embeddings": True, "optimizer": "muon"}  # 6 rows of keys: of 4 ranks the last has none
WAYS = [(size, way) for size in (2, 4) for way in ("ddp", "fsdp")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_folder):
    """whole(size, key=value, ...): the folder of such a run, which is made once."""
    place, done = tmp_path_factory.mktemp("whole"), {}

    def folder(size, **knobs):
        key = json.dumps([size, knobs], sort_keys=True)
        if key not in done:
            out = done[key] = place / str(len(done))
            if size == 1:
                code, text = run(command(out, **SHORT | knobs), data_folder)
            else:
                codes, text = trained(size, out, data_folder, **SHORT | knobs)
                code = max(map(abs, codes))
            assert code == 0, text
        return done[key]

    return folder


def numbers(folder):
    return {(r["step"], key): r[key] for r in metrics.read_metrics(folder)
            for key in ("loss", "grad_norm", "val_loss") if key in r}


def assert_same_training(a, b):
    """Up to rounding, which Muon's products in bfloat16 make large."""
    assert len(numbers(a)) == 10 and numbers(a) == pytest.approx(numbers(b), rel=1e-5)
    one, other = (checkpoint.load_newest(folder) for folder in (a, b))
    assert one["model"].keys() == other["model"].keys()
    for name, weight in one["model"].items():
        off = (weight - other["model"][name]).norm() / other["model"][name].norm()
        assert off < (2e-3 if "momentum_buffer" in one["optimizer"][name] else 1e-5), name


@pytest.mark.parametrize("size, way", WAYS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_training_is_that_of_one_process(whole, size, way, optimizer):
    assert_same_training(whole(size, parallel=way, optimizer=optimizer), whole(1, optimizer=optimizer))


@pytest.mark.parametrize("size, way, knobs", [
    (2, "ddp", {"micro_batch_size": 1}), (2, "fsdp", {"micro_batch_size": 1}),
    (4, "ddp", ODD), (4, "fsdp", ODD), (2, "fsdp", {"activation_checkpointing": True})],
    ids=["parts ddp", "parts fsdp", "odd ddp", "odd fsdp", "computed twice"])
def test_so_it_is_whatever_the_model_and_however_the_batch_is_cut(whole, size, way, knobs):
    assert_same_training(whole(size, parallel=way, **knobs), whole(1, **knobs))


def test_dropout_has_other_masks_on_each_rank(tmp_path, data_folder):
    codes, texts = trained(2, tmp_path / "run", data_folder, ranks.seeds_told, dropout=0.1, **SHORT)
    seeds = [{line for line in text.splitlines() if line.startswith("seed ")} for text in texts]
    assert codes == [0, 0] and len(seeds[0]) == len(seeds[1]) == 4 and not seeds[0] & seeds[1]


def test_in_bfloat16_both_ways_are_the_same(whole):
    ddp, fsdp = (whole(2, parallel=way, dtype="bfloat16") for way in ("ddp", "fsdp"))
    assert_same_training(ddp, fsdp)


@pytest.mark.parametrize("before, after", [
    ((1, "ddp"), (2, "ddp")), ((2, "ddp"), (4, "fsdp")), ((4, "fsdp"), (1, "ddp")), ((2, "fsdp"), (2, "fsdp")),
    ((4, "ddp"), (4, "ddp"))],
    ids=lambda way: f"{way[0]} {way[1]}")
def test_a_run_goes_on_on_other_ranks_with_what_was_saved_and_on_as_many_bit_for_bit(
        whole, tmp_path, data_folder, before, after):
    knobs = {"optimizer": "muon", "skip_spikes": 6}  # whose norms are state too
    (ranks_before, way_before), (ranks_after, way_after) = before, after
    uncut, out = whole(ranks_before, parallel=way_before, **knobs), tmp_path / "run"
    shutil.copytree(uncut, out)
    (out / "ckpt_00000004.pt").unlink()
    again = tmp_path / "again.pt"
    codes, texts = trained(ranks_after, out, data_folder, partial(ranks.saved_again, again), resume="yes",
                           parallel=way_after, **SHORT | knobs)
    assert not any(codes), texts
    saved, loaded = checkpoint.load(uncut / "ckpt_00000002.pt"), checkpoint.load(again)
    assert same(saved, loaded | {"config": saved["config"]})
    assert_same_training(out, uncut)
    if before == after:
        assert difference(uncut, out) == ""


def same(a, b):
    """Whether nested dicts hold the same, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("size, way, adapters", [
    (4, "fsdp", {}), (4, "fsdp", {"lora_rank": 2}), (2, "ddp", {"lora_rank": 2})],
    ids=["all weights, fsdp", "adapters, fsdp", "adapters, ddp"])
def test_ranks_begin_with_other_weights_and_train_adapters_as_one_does(whole, size, way, adapters):
    knobs = {"init_from": str(whole(1)), "learning_rate": 1e-2, **adapters}
    assert_same_training(whole(size, parallel=way, **knobs), whole(1, **knobs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_model_is_never_whole_but_for_its_gains(tmp_path, data_folder, dtype):
    codes, texts = trained(2, tmp_path / "run", data_folder, partial(ranks.apart, dtype), parallel="fsdp", dtype=dtype,
                           qk_norm=True, **SHORT)
    assert codes == [0, 0], texts


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["SharedMuon", "CopiedMuon"])
def test_muon_divided_among_ranks_is_muon(tmp_path, data_folder, size, kind):
    before = partial(ranks.instead, partial(ranks.muons, kind))  # of one shape too few for all, or of too few rows
    codes, texts = trained(size, tmp_path / "run", data_folder, before)
    assert codes == [0] * size, texts


def test_a_launcher_of_one_rank_changes_nothing(whole, tmp_path, data_folder):
    codes, texts = trained(1, tmp_path / "run", data_folder, parallel="fsdp", **SHORT)
    assert codes == [0] and difference(whole(1), tmp_path / "run") == "", texts


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_main_alone_has_the_folder_and_speaks(tmp_path, data_folder, way):
    out = tmp_path / "run"
    codes, (said, *others) = trained(2, out, data_folder, partial(only, 1, partial(ranks.stranger, out)), parallel=way,
                                     sample_tokens=3)
    assert codes == [0, 0] and others == [""], others
    assert len(set(said.splitlines())) == len(said.splitlines()) and said.count("| loss") == 12
    assert "--- sample ---" in said or way == "fsdp" and f"python sample.py {out} prompt=... makes a text" in said
    assert {p.name for p in out.iterdir()} == {"ckpt_00000008.pt", "ckpt_00000012.pt", "best.pt", "config.json",
                                               "tokenizer.json", "metrics.jsonl"}


@pytest.mark.parametrize("rank, way", [(0, "fsdp"), (1, "ddp")])
def test_a_signal_to_one_rank_saves_and_ends_all(whole, tmp_path, data_folder, rank, way):
    out = tmp_path / "run"
    codes, texts = trained(2, out, data_folder, partial(only, rank, partial(ranks.stopped, 3)), parallel=way, **SHORT)
    assert codes == [143, 143] and f"SIGTERM: saved at step 3; train.py {out} goes on from here" in texts[0]
    assert trained(2, out, data_folder, parallel=way, resume="auto", **SHORT)[0] == [0, 0]
    (out / "ckpt_00000003.pt").unlink()
    assert difference(whole(2, parallel=way), out) == ""


def test_a_signal_to_one_rank_in_an_evaluation_loses_nothing(whole, tmp_path, data_folder):
    out = tmp_path / "run"
    knobs = SHORT | {"micro_batch_size": 1}  # so it has more than one part
    codes, texts = trained(2, out, data_folder, partial(only, 1, ranks.stopped_in_evaluation), **knobs)
    assert codes == [143, 143] and "saved at step 2" in texts[0] and "val loss" not in texts[0]
    assert trained(2, out, data_folder, resume="auto", **knobs)[0] == [0, 0]
    assert difference(whole(2, micro_batch_size=1), out) == ""


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path, data_folder, way):
    out = tmp_path / "run"
    codes, (said, *others) = trained(2, out, data_folder, partial(only, 1, partial(ranks.poisoned, 4)), parallel=way,
                                     **SHORT)
    assert codes == [3, 3] and others == [""]
    assert said.count("error: ") == 1 and "at step 4: stopped before the update. Last good checkpoint: ckpt_00000002" \
        in said
    assert [step for step, _ in checkpoint.all_in(out)] == [2]


@pytest.fixture
def hosts():
    """The network namespaces of two hosts on one cable: what a command that is to run in each begins with."""
    names, ip = [f"rootllama{i}-{os.getpid()}" for i in (1, 2)], shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin")
    lines = [*(f"netns add {name}" for name in names),
             f"link add eth netns {names[0]} type veth peer name eth netns {names[1]}",
             *(line for i, name in enumerate(names, start=1) for line in (
                 f"-n {name} address add 10.77.0.{i}/24 dev eth", f"-n {name} link set lo up",
                 f"-n {name} link set eth up"))]
    try:
        if not ip or any(subprocess.run([ip, *line.split()], capture_output=True).returncode for line in lines):
            pytest.skip("needs ip and the right to make network namespaces")
        yield [[ip, "netns", "exec", name] for name in names]
    finally:
        end = time.monotonic() + 10
        for name in names:
            while Path("/run/netns", name).exists() and time.monotonic() < end:  # busy while a process is in it
                subprocess.run([ip, "netns", "delete", name], capture_output=True)
                time.sleep(0.05)


def test_two_hosts_train_as_two_ranks_on_one(whole, hosts, tmp_path, data_folder):
    jobs = []
    for i, host in enumerate(hosts, start=1):
        (tmp_path / str(i)).mkdir()
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth", "OMP_NUM_THREADS": "1"}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                    "--rdzv_backend=c10d", "--rdzv_id=1", "--rdzv_endpoint=10.77.0.1:29400",
                    f"--rdzv_conf=is_host={2 - i}", f"--local-addr=10.77.0.{i}"]
        arguments = command("run", **SHORT | {"parallel": "fsdp", "dataset": data_folder / "words"})
        jobs.append(subprocess.Popen([*host, *launcher, ROOT / "train.py", *arguments], cwd=tmp_path / str(i),
                                     env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        said = [job.communicate(timeout=100)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], said
    there = [(tmp_path / name / "run").exists() for name in "12"]
    assert sorted(there) == [False, True]  # where rank 0 is
    assert difference(whole(2, parallel="fsdp"), tmp_path / "12"[there.index(True)] / "run") == ""


def tables(folder):
    """Prints what README.md shows: how far ranks are from one process, and whether others go on from what they save."""
    every = [(1, "ddp"), *WAYS]
    knobs = SHORT | {"max_iters": 40, "warmup_iters": 5, "eval_interval": 20, "save_interval": 20}

    def made(name, size, way, before=None, **more):
        codes, texts = trained(size, folder / name, folder, before, parallel=way, **knobs | more)
        assert not any(codes), texts
        return {key: value for key, value in numbers(folder / name).items() if key[1] != "grad_norm"}

    for optimizer in ("adamw", "muon"):
        losses = {way: made(f"{optimizer} {way}", *way, optimizer=optimizer) for way in every}
        for way in WAYS:
            off = max(abs(loss / losses[1, "ddp"][key] - 1) for key, loss in losses[way].items())
            print(f"{optimizer} {way}: losses of 40 steps differ by at most {off:.0e}", flush=True)
    for way, then in product(every, every):
        uncut, name = folder / f"muon {way}", f"{way} to {then}"
        shutil.copytree(uncut, folder / name)
        (folder / name / "ckpt_00000040.pt").unlink()
        ends = made(name, *then, partial(ranks.saved_again, folder / "again.pt"), optimizer="muon", resume="yes")
        saved, loaded = checkpoint.load(uncut / "ckpt_00000020.pt"), checkpoint.load(folder / "again.pt")
        off = max(abs(ends[key] / loss - 1) for key, loss in losses[way].items())
        print(f"saved by {way}, resumed by {then}: loaded bitwise {same(saved, loaded | {'config': saved['config']})}, "
              f"losses then differ by {off:.0e}; no bit differs: {difference(uncut, folder / name) == ''}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        prepare_words(Path(place))
        tables(Path(place))
