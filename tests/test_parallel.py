"""Several ranks do what one process does: the same training. Main alone speaks and writes."""

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
from conftest import ROOT, slow
from faults.harness import command, difference, train_child, train_ranks
from ranks import only

from data.prepare import prepare
from run.metrics import read_metrics
from weights import checkpoint

SHORT = {"max_iters": 4, "eval_interval": 2, "save_interval": 2, "keep": 9, "eval_iters": 5}
ODD = {  # 6 rows of keys: of 4 ranks the last has none, and of the 18 of `out` fewer than others
    "n_embd": 18,
    "n_head": 3,
    "n_kv_head": 1,
    "n_hidden": 10,
    "norm": "dyt",
    "qk_norm": True,
    "tie_embeddings": True,
    "optimizer": "muon",
    "centred_writers": True,
}
FADE = {"norm": "tapernorm", "taper_start": 1, "taper_end": 3, "micro_batch_size": 1}
WAYS = [(size, way) for size in (2, 4) for way in ("ddp", "fsdp")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(size, key=value, ...): the folder of such a run, which is made once."""
    place, done = tmp_path_factory.mktemp("whole"), {}

    def folder(size, **knobs):
        key = json.dumps([size, knobs], sort_keys=True)
        if key not in done:
            out = done[key] = place / str(len(done))
            if size == 1:
                knobs.pop("parallel", None)  # which means something to a launcher only
                codes, texts = train_child(out, **SHORT | knobs)
            else:
                codes, texts = train_ranks(size, out, **SHORT | knobs)
            assert codes in (0, [0] * size), texts
        return done[key]

    return folder


def numbers(folder):
    return {
        (record["step"], key): record[key]
        for record in read_metrics(folder)
        for key in ("loss", "grad_norm", "val_loss")
        if key in record
    }


def assert_same_training(a, b):
    """Up to rounding, which Muon's products in bfloat16 make large."""
    assert len(numbers(a)) == 10 and numbers(a) == pytest.approx(numbers(b), rel=1e-5)
    one, other = (checkpoint.load_newest(folder) for folder in (a, b))
    assert one["model"].keys() == other["model"].keys()
    for name, weight in one["model"].items():
        off = (weight - other["model"][name]).norm() / other["model"][name].norm()
        assert off < (2e-3 if "momentum_buffer" in one["optimizer"][name] else 1e-5), name


def same(a, b):
    """Whether nested dicts hold the same, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


# The same training


QUICK = [
    (2, "ddp", {}),
    (2, "fsdp", {"micro_batch_size": 1}),
    (2, "fsdp", {"optimizer": "muon", "activation_checkpointing": True}),
    (4, "fsdp", ODD),
]
EVERY_WAY = [slow(*way, {"optimizer": name}) for way in WAYS for name in ("adamw", "muon")]
OTHERS = [
    slow(2, "ddp", {"micro_batch_size": 1}),
    slow(4, "ddp", ODD),
    slow(2, "ddp", FADE),
    slow(2, "fsdp", FADE),
]


@pytest.mark.parametrize("size, way, knobs", QUICK + EVERY_WAY + OTHERS)
def test_the_training_is_that_of_one_process(whole, size, way, knobs):
    assert_same_training(whole(size, parallel=way, **knobs), whole(1, **knobs))


@pytest.mark.parametrize(
    "size, way, adapters",
    [
        (2, "fsdp", {"lora_rank": 2}),
        slow(4, "fsdp", {}),
        slow(4, "fsdp", {"lora_rank": 2}),
        slow(2, "ddp", {"lora_rank": 2}),
    ],
)
def test_ranks_begin_with_other_weights_and_train_adapters_as_one_does(whole, size, way, adapters):
    knobs = {"init_from": str(whole(1)), "learning_rate": 1e-2, **adapters}
    assert_same_training(whole(size, parallel=way, **knobs), whole(1, **knobs))


@pytest.mark.parametrize("way", ["ddp", slow("fsdp")])
def test_every_token_of_an_answer_counts_the_same_on_whichever_rank(whole, tmp_path, way):
    lines = [{"prompt": f"{i}?", "completion": "so " * (i % 9)} for i in range(60)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([str(tmp_path / "talks.jsonl")], tmp_path / "set", "byte")
    knobs = {"dataset": str(tmp_path / "set"), "micro_batch_size": 1, "doc_mask": True}
    assert_same_training(whole(2, parallel=way, **knobs), whole(1, **knobs))


@pytest.mark.slow
def test_in_bfloat16_both_ways_are_the_same(whole):
    ddp, fsdp = (whole(2, parallel=way, dtype="bfloat16") for way in ("ddp", "fsdp"))
    assert_same_training(ddp, fsdp)


@pytest.mark.parametrize("way", [slow("ddp"), "fsdp"])
def test_compiled_ranks_train_the_same_with_a_graph_for_all_blocks_and_one_for_the_loss(
    whole, tmp_path, way
):
    out, drawn = tmp_path / "run", {"sample_interval": 3, "sample_tokens": 2}
    knobs = SHORT | drawn | {"parallel": way, "compile": True}
    codes, texts = train_ranks(2, out, ranks.count_graphs, **knobs)
    assert codes == [0, 0], texts
    assert_same_training(out, whole(2, parallel=way))
    # Of each there is one with a gradient and one without; a sample leaves all compiled.
    assert all("graphs: 4, compiled: 3" in text for text in texts), texts


def test_a_launcher_of_one_rank_changes_nothing(whole, tmp_path):
    codes, texts = train_ranks(1, tmp_path / "run", parallel="fsdp", **SHORT)
    assert codes == [0] and difference(whole(1), tmp_path / "run") == "", texts


def test_dropout_has_other_masks_on_each_rank(tmp_path):
    codes, texts = train_ranks(2, tmp_path / "run", ranks.tell_seeds, dropout=0.1, **SHORT)
    seeds = [{line for line in text.splitlines() if line.startswith("seed ")} for text in texts]
    assert codes == [0, 0] and len(seeds[0]) == len(seeds[1]) == 4 and not seeds[0] & seeds[1]


@pytest.mark.parametrize(
    "size, kind", [(3, "FSDPMuon"), (2, "DDPMuon"), slow(2, "FSDPMuon"), slow(3, "DDPMuon")]
)
def test_muon_divided_among_ranks_is_muon(tmp_path, size, kind):
    compare = partial(ranks.instead, partial(ranks.compare_muons, kind))
    codes, texts = train_ranks(size, tmp_path / "run", compare)
    assert codes == [0] * size, texts


@pytest.mark.parametrize("dtype", [slow("float32"), "bfloat16"])
def test_a_shared_model_is_never_whole_but_for_its_gains(tmp_path, dtype):
    before = partial(ranks.find_parts_only, dtype)
    knobs = SHORT | {"parallel": "fsdp", "dtype": dtype, "qk_norm": True}
    codes, texts = train_ranks(2, tmp_path / "run", before, **knobs)
    assert codes == [0, 0], texts


# Going on


@pytest.mark.parametrize(
    "before, after",
    [
        ((2, "fsdp"), (2, "fsdp")),
        slow((1, "ddp"), (2, "ddp")),
        slow((2, "ddp"), (4, "fsdp")),
        slow((4, "fsdp"), (1, "ddp")),
        slow((4, "ddp"), (4, "ddp")),
    ],
    ids=lambda way: f"{way[0]} {way[1]}",
)
def test_a_run_goes_on_on_other_ranks_with_what_was_saved_and_on_as_many_bit_for_bit(
    whole, tmp_path, before, after
):
    knobs = SHORT | {"optimizer": "muon", "centred_writers": True}
    knobs |= {"skip_spikes": 6}  # whose norms are state, too
    uncut, out, again = whole(before[0], parallel=before[1], **knobs), *places(tmp_path)
    shutil.copytree(uncut, out)
    (out / "ckpt_00000004.pt").unlink()
    knobs |= {"resume": "yes", "parallel": after[1]}
    codes, texts = train_ranks(after[0], out, partial(ranks.save_the_start, again), **knobs)
    assert not any(codes), texts
    saved, loaded = checkpoint.load(uncut / "ckpt_00000002.pt"), checkpoint.load_newest(again)
    assert same(saved, loaded | {"config": saved["config"]})
    assert_same_training(out, uncut)
    if before == after:
        assert difference(uncut, out) == ""


def places(folder):
    return folder / "run", folder / "again"


@pytest.mark.parametrize(
    "rank, way, micro, saved",
    [(1, "fsdp", 1, 2), slow(0, "fsdp", 1, 2), slow(1, "ddp", 1, 2), slow(1, "ddp", 0, 3)],
)
def test_a_signal_to_one_rank_saves_and_ends_all(whole, tmp_path, rank, way, micro, saved):
    """In step 3, which is thrown away if it has several micro-batches."""
    knobs = {"parallel": way} | ({"micro_batch_size": micro} if micro else {})
    out, stop = tmp_path / "run", partial(only, rank, partial(ranks.stop_in, 3))
    codes, texts = train_ranks(2, out, stop, **SHORT | knobs)
    assert codes == [143, 143]
    assert f"SIGTERM: saved at step {saved}; train.py {out} goes on from here" in texts[0]
    assert train_ranks(2, out, resume="auto", **SHORT | knobs)[0] == [0, 0]
    assert difference(whole(2, **knobs), out) == ""


@pytest.mark.slow
def test_a_signal_to_one_rank_in_an_evaluation_loses_nothing(whole, tmp_path):
    out, knobs = tmp_path / "run", SHORT | {"micro_batch_size": 1}  # so it has more than one part
    codes, texts = train_ranks(2, out, partial(only, 1, ranks.stop_in_evaluation), **knobs)
    assert codes == [143, 143] and "saved at step 2" in texts[0] and "val loss" not in texts[0]
    assert train_ranks(2, out, resume="auto", **knobs)[0] == [0, 0]
    assert difference(whole(2, micro_batch_size=1), out) == ""


@pytest.mark.parametrize("way", ["ddp", slow("fsdp")])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path, way):
    out, before = tmp_path / "run", partial(only, 1, partial(ranks.poison_from, 4))
    codes, (said, *others) = train_ranks(2, out, before, parallel=way, **SHORT)
    assert codes == [3, 3] and others == [""] and said.count("error: ") == 1
    assert "at step 4: stopped before the update. Last good checkpoint: ckpt_00000002" in said
    assert [step for step, _ in checkpoint.all_in(out)] == [2]


# Main, and hosts


@pytest.mark.parametrize("way", ["ddp", slow("fsdp")])
def test_main_alone_has_the_folder_and_speaks(tmp_path, way):
    out = tmp_path / "run"
    before = partial(only, 1, partial(ranks.never_look_into, out))
    codes, (said, *others) = train_ranks(2, out, before, parallel=way, sample_tokens=3)
    assert codes == [0, 0] and others == [""], others
    assert len(set(said.splitlines())) == len(said.splitlines()) and said.count("| loss") == 12
    shown = {"ddp": "--- sample ---", "fsdp": f"python sample.py {out} prompt=... makes a text"}
    assert shown[way] in said
    names = {"ckpt_00000008.pt", "ckpt_00000012.pt", "best.pt"}
    names |= {"config.json", "tokenizer.json", "metrics.jsonl"}
    assert {path.name for path in out.iterdir()} == names


@pytest.fixture
def hosts():
    """The network namespaces of two hosts on one cable: what a command that is to run in each
    begins with."""
    names = [f"rootllama{i}-{os.getpid()}" for i in (1, 2)]
    ip = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin")
    lines = [f"netns add {name}" for name in names]
    lines.append(f"link add eth netns {names[0]} type veth peer name eth netns {names[1]}")
    for i, name in enumerate(names, start=1):
        lines.append(f"-n {name} address add 10.77.0.{i}/24 dev eth")
        lines += [f"-n {name} link set {device} up" for device in ("lo", "eth")]
    try:
        for line in lines:
            if not ip or subprocess.run([ip, *line.split()], capture_output=True).returncode:
                pytest.skip("needs ip and the right to make network namespaces")
        yield [[ip, "netns", "exec", name] for name in names]
    finally:
        end = time.monotonic() + 10
        for name in names:
            # It is busy while a process is in it.
            while Path("/run/netns", name).exists() and time.monotonic() < end:
                subprocess.run([ip, "netns", "delete", name], capture_output=True)
                time.sleep(0.05)


@pytest.mark.slow
def test_two_hosts_train_as_two_ranks_on_one(whole, hosts, tmp_path):
    jobs = []
    for i, host in enumerate(hosts, start=1):
        (tmp_path / str(i)).mkdir()
        options = "--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_id=1".split()
        options += ["--rdzv_endpoint=10.77.0.1:29400", f"--rdzv_conf=is_host={2 - i}"]
        options.append(f"--local-addr=10.77.0.{i}")
        launcher = [*host, sys.executable, "-m", "torch.distributed.run", *options]
        program = [ROOT / "train.py", *command("run", **SHORT | {"parallel": "fsdp"})]
        job = subprocess.Popen(
            [*launcher, *program],
            cwd=tmp_path / str(i),
            env=os.environ | {"GLOO_SOCKET_IFNAME": "eth", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        jobs.append(job)
    try:
        said = [job.communicate(timeout=100)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], said
    (out,) = tmp_path.glob("*/run")  # where rank 0 is
    assert difference(whole(2, parallel="fsdp"), out) == ""


def tables(folder):
    """Prints the figures of docs/devices.md: how far ranks are from one process, and whether others
    go on from what they save."""
    every = [(1, "ddp"), *WAYS]
    knobs = SHORT | {"max_iters": 40, "warmup_iters": 5, "eval_interval": 20, "save_interval": 20}

    def losses(name, size, way, before=None, **more):
        more |= {"parallel": way}
        codes, texts = train_ranks(size, folder / name, before, **knobs | more)
        assert not any(codes), texts
        return {key: n for key, n in numbers(folder / name).items() if key[1] != "grad_norm"}

    def furthest(some, others):
        return max(abs(loss / others[key] - 1) for key, loss in some.items())

    for optimizer in ("adamw", "muon"):
        found = {way: losses(f"{optimizer} {way}", *way, optimizer=optimizer) for way in every}
        for way in WAYS:
            off = furthest(found[way], found[1, "ddp"])
            print(f"{optimizer} {way}: losses of 40 steps differ by at most {off:.0e}", flush=True)
    for way, then in product(every, every):
        uncut, out, again = folder / f"muon {way}", folder / f"{way} to {then}", folder / "again"
        shutil.copytree(uncut, out)
        shutil.rmtree(again, ignore_errors=True)
        (out / "ckpt_00000040.pt").unlink()
        before = partial(ranks.save_the_start, again)
        ends = losses(out.name, *then, before, optimizer="muon", resume="yes")
        saved, loaded = checkpoint.load(uncut / "ckpt_00000020.pt"), checkpoint.load_newest(again)
        bitwise = same(saved, loaded | {"config": saved["config"]})
        print(
            f"saved by {way}, resumed by {then}: loaded bitwise {bitwise}, losses then differ by "
            f"{furthest(ends, found[way]):.0e}; no bit differs: {difference(uncut, out) == ''}",
            flush=True,
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        tables(Path(place))
