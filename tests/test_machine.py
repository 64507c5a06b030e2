"""What auto means, that the ceiling is a real one, and what a model costs, by hand. Every variant's
parameters are counted in test_model.py.
"""

import ast
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from config.schema import Config
from lab.bench_norm import copy_rate
from model import Decoder, ModelConfig, parameter_count
from run.machine import (
    CODE_THAT_TRAINS,
    autocast,
    choose_device,
    choose_dtype,
    code_hash,
    disable_cudnn_attention,
    flops_per_token,
    keep_freed_memory,
    matmul_rate,
    memory_estimate,
    pays_to_compile,
    peak_memory,
    to_device,
    total_memory,
)
from run.ranks import ALONE
from run.setup import read_config, resolve


def has_devices(monkeypatch, gpus=0, mps=False):
    """This machine has a CPU alone, so what PyTorch says of others is set here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_auto_takes_the_best_device_there_is(monkeypatch):
    has_devices(monkeypatch, gpus=2, mps=True)
    assert choose_device("auto") == choose_device("cuda") == "cuda:0"
    assert choose_device("cuda:1") == "cuda:1"
    has_devices(monkeypatch, mps=True)
    assert choose_device("auto") == "mps"
    has_devices(monkeypatch)
    assert choose_device("auto") == "cpu"


def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    has_devices(monkeypatch, gpus=1)
    for wanted in ("cuda:7", "cdua"):
        with pytest.raises(
            ValueError, match=f"device={wanted} is not on this machine; it has cuda:0, cpu"
        ):
            choose_device(wanted)


@pytest.mark.parametrize(
    "capability, auto",
    [((6, 1), "float32"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16")],
)
def test_auto_is_the_narrowest_that_the_hardware_multiplies_on_cuda(monkeypatch, capability, auto):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_dtype("auto", "cuda:0") == auto
    assert choose_dtype("float16", "cuda:0") == "float16"
    if auto != "bfloat16":
        with pytest.raises(ValueError, match="compute capability 8.0"):
            choose_dtype("bfloat16", "cuda:0")


@pytest.mark.parametrize("native, auto", [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_on_a_cpu_is_automatic_only_where_it_is_native(monkeypatch, native, auto):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert choose_dtype("auto", "cpu") == auto
    assert choose_dtype("bfloat16", "cpu") == "bfloat16"


def test_float16_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="needs a CUDA device, this is cpu"):
        choose_dtype("float16", "cpu")


def test_autocast_multiplies_in_the_dtype_asked_for():
    a = torch.ones(2, 2)
    with autocast("cpu", "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast("cpu", "float32"):
        assert (a @ a).dtype == torch.float32


def test_the_measured_rate_is_what_a_product_reaches():
    rate = matmul_rate("cpu", "float32")
    assert 1e8 < rate < 1e14
    assert matmul_rate("cpu", "float32") == rate  # measured once


def test_the_rate_of_a_copy_is_bytes_read_and_written_by_the_time(monkeypatch):
    rate = copy_rate("cpu", 2**20)
    assert 1e8 < rate < 1e13
    assert copy_rate("cpu", 2**20) == rate  # measured once, for each size
    ticks = iter([0.0, 3.0, 0.0, 2.0, *[0.0, 5.0] * 3])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert copy_rate("cpu", 1000) == 4 * 2 * 1000 / 2.0  # the best of five times four copies


def test_memory_is_told_in_bytes():
    assert 2**28 < peak_memory("cpu") < total_memory("cpu") < 2**50


def test_the_cpu_needs_no_copy():
    x = torch.ones(3)
    assert to_device(x, "cpu") is x


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is on Linux")
def test_freed_memory_is_used_again_without_page_faults():
    import resource

    keep_freed_memory()
    size = 2**26  # bytes: glibc by itself gives such a block back at once
    pages = size // resource.getpagesize()

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(size // 4)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(10)) < pages / 10


def test_only_on_cuda_is_a_kernel_left_out_that_plans_each_length_anew(monkeypatch):
    left_out = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: left_out.append(not on))
    disable_cudnn_attention("cpu")
    disable_cudnn_attention("mps")
    assert left_out == []
    disable_cudnn_attention("cuda:1")
    assert left_out == [True]


# What train.py imports, and yet decides no loss of a given config on given data.
DECIDES_NO_LOSS = {
    "config/__init__.py": "has no code",
    "config/command.py": "words, help and errors",
    "config/help.py": "words of --help",
    "config/preset.py": "the config that it makes is known",
    "config/schema.py": "the config that it makes is known",
    "data/__init__.py": "sums files up",
    "data/corpus.py": "the data that it makes have a fingerprint",
    "data/files.py": "writes files",
    "text/__init__.py": "has no code",
    "text/chat.py": "the data that it makes have a fingerprint",
    "text/messages.py": "the data that it makes have a fingerprint",
    "text/prompt.py": "comes after the last step",
    "text/formats.py": "the data that it lets in have a fingerprint",
    "data/overlap.py": "measures the data",
    "data/prepare.py": "the data that it makes have a fingerprint",
    "data/rows.py": "the data that it makes have a fingerprint",
    "text/tokenizer.py": "the data that it makes have a fingerprint",
    "text/tokenizer_export.py": "is for exports",
    "text/tokenizer_json.py": "the data that it makes have a fingerprint",
    "run/__init__.py": "has no code",
    "run/folder.py": "writes files",
    "run/log.py": "reports",
    "run/metrics.py": "reports",
    "run/profile.py": "looks, and changes nothing (test_profile.py)",
    "run/sharded.py": "stores tensors and gives them back",
    "run/signals.py": "stops between steps, or throws the step away",
    "run/watch.py": "looks, and changes nothing (test_watch.py)",
    "sample.py": "comes after the last step",
    "weights/__init__.py": "has no code",
    "weights/checkpoint.py": "stores tensors and gives them back",
    "weights/lock.py": "keeps others out",
    "weights/open.py": "finds weights and gives them on",
    "weights/quantize.py": "is for sampling",
}


def test_the_hash_of_the_code_has_every_file_that_decides_a_loss():
    """So a result is never taken for that of other code: each file that train.py imports is hashed,
    or stands above."""
    reached, waiting = set(), ["train.py"]
    while waiting:
        name = waiting.pop()
        if name in reached or not (ROOT / name).is_file():
            continue
        reached.add(name)
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                folder = node.module.replace(".", "/")
                waiting += [f"{folder}.py", f"{folder.partition('/')[0]}/__init__.py"]
                waiting += [f"{folder}/{alias.name}.py" for alias in node.names]
            if isinstance(node, ast.Import):
                waiting += [f"{alias.name.replace('.', '/')}.py" for alias in node.names]
    assert not DECIDES_NO_LOSS.keys() & set(CODE_THAT_TRAINS)
    assert reached == DECIDES_NO_LOSS.keys() | set(CODE_THAT_TRAINS)


USES = b"from lab.report import a as b, c\nimport torch\nfrom torch import nn\nx = b + 1  # why\n"
HAS = b"CODE_THAT_TRAINS = ('lab/report.py',)\na = 1\n"


def test_moving_files_and_writing_comments_leave_the_hash_of_the_code():
    before = code_hash([USES, HAS])
    moved = USES.replace(b"from lab.report import a as b, c", b"from run import c, a as b")
    assert code_hash([HAS, USES]) == before
    assert code_hash([moved, HAS.replace(b"lab/report", b"run/deep")]) == before
    assert code_hash([USES.replace(b"# why", b""), HAS]) == before


@pytest.mark.parametrize(
    "old, new", [(b"a as b", b"d as b"), (b"1", b"2"), (b"torch import nn", b"torch.nn import nn")]
)
def test_other_code_has_another_hash(old, new):
    assert code_hash([USES, HAS]) != code_hash([USES.replace(old, new), HAS])


def config(**knobs):
    return ModelConfig(
        **(dict(n_layer=2, n_head=4, n_embd=64, n_hidden=96, block_size=64, vocab_size=101) | knobs)
    )


@pytest.mark.parametrize(
    "knobs",
    [{}, {"tie_embeddings": True}, {"norm": "layernorm"}, {"n_kv_head": 1}, {"n_hidden": 0}],
)
def test_parameter_count_is_that_of_the_model(knobs):
    c = config(**knobs)
    assert parameter_count(c) == sum(p.numel() for p in Decoder(c).parameters())


def test_flops_by_hand():
    c = config(
        n_layer=1, n_embd=8, n_head=2, n_hidden=10, vocab_size=7, block_size=4, tie_embeddings=True
    )
    matrices = 4 * 8 * 8 + 3 * 8 * 10 + 7 * 8 + 3 * 8  # attention, feed-forward, head, gains
    assert flops_per_token(c) == 6 * matrices + 12 * 1 * 8 * 4
    adapters = 2 * (4 * (8 + 8) + 3 * (8 + 10))  # rank 2
    assert flops_per_token(c, lora_rank=2) == 4 * matrices + 6 * adapters + 12 * 1 * 8 * 4


def estimate(model, micro_batch, dtype="float32", device="cpu", **knobs):
    run = Config(model=model, dtype=dtype, device=device, **knobs)
    return memory_estimate(run, micro_batch)


def test_memory_estimate_grows_as_it_should():
    fixed, one = estimate(config(), 1)
    assert fixed == 16 * parameter_count(config())
    assert estimate(config(), 4)[1] == 4 * one
    assert estimate(config(), 1, "bfloat16")[1] < one
    assert estimate(config(), 1, activation_checkpointing=True)[1] < one


def test_memory_for_logits_is_bounded_and_a_cpu_keeps_its_scores_in_bfloat16():
    large = config(vocab_size=50_000, block_size=1024)
    few, many = (estimate(large, micro)[1] for micro in (1, 8))
    assert many < 8 * few - 7 * 2**25 * 4 * 2  # logits of 671 tokens, of 1,024 or of 8,192
    plain, fused = (estimate(large, 2, "bfloat16", device)[1] for device in ("cpu", "mps"))
    scores = 2 * large.n_layer * large.n_head * 1024 * 1024  # T x T for each head of two rows
    assert plain - fused == 2 * scores  # bytes
    for dtype, block_size in (("float32", 1024), ("bfloat16", 1025)):
        c = config(block_size=block_size)
        assert estimate(c, 2, dtype, "cpu") == estimate(c, 2, dtype, "mps")


def test_compiled_code_on_cuda_needs_less_than_the_same_uncompiled():
    preset = read_config([str(ROOT / "config" / "llama_124m.py")])
    gpu = replace(preset, device="cuda:0", dtype="bfloat16")
    fixed, activations = memory_estimate(gpu, 16)
    P, V, C, F, tokens = 123_587_328, 50_304, 768, 2048, 16 * 1024
    assert fixed == 18 * P  # as below, and a copy in bfloat16
    kept = 12 * (2 * 4 * C + 2 * (8 * C + 3 * F))  # 12 Blocks
    rows = 5376  # 128 times 42: 2^28 logits, in 4 pieces
    assert activations == tokens * kept + 4 * rows * V + (4 + 2 * (2 + 4)) * V * C
    assert sum(memory_estimate(replace(gpu, compile=False), 16)) > fixed + activations
    narrow = memory_estimate(replace(gpu, stream_dtype="bfloat16"), 16)
    assert narrow == (fixed, activations - tokens * 12 * 2 * 2 * C)


def on_a_card(monkeypatch, preset, gigabytes):
    """The resolved config of a preset on one GPU with that much memory."""
    monkeypatch.setattr("run.setup.total_memory", lambda device: gigabytes * 10**9)
    monkeypatch.setattr("run.setup.choose_dtype", lambda wanted, device: "bfloat16")
    config = replace(read_config([str(ROOT / "config" / f"{preset}.py")]), parallel="ddp")
    data = SimpleNamespace(fingerprint={"vocab_size": config.model.vocab_size})
    return resolve(config, "cuda:0", data, None, ALONE)


def test_a_micro_batch_fills_nine_tenths_of_a_card_by_the_estimate(monkeypatch):
    chosen = on_a_card(monkeypatch, "llama_124m", 80)
    micro, share = chosen.micro_batch_size, chosen.batch_size
    larger = min(m for m in range(micro + 1, share + 1) if share % m == 0)
    fits, does_not = (sum(memory_estimate(chosen, m)) for m in (micro, larger))
    assert fits < 0.9 * 80e9 <= does_not


def test_a_card_may_have_a_little_less_than_the_estimate_and_no_less(monkeypatch):
    chosen = on_a_card(monkeypatch, "llama_7b", 142)
    assert 1.04 * 142e9 < sum(memory_estimate(chosen, 1)) < 1.05 * 142e9
    words = "6.9 billion parameters need about 148 GB to train, cuda:0 has 141 GB"
    with pytest.raises(ValueError, match=words):
        on_a_card(monkeypatch, "llama_7b", 141)


@pytest.mark.parametrize(
    "device, max_iters, wanted",
    [("cuda:0", 1, True), ("mps", 10**6, False), ("cpu", 1050, False), ("cpu", 1150, True)],
)
def test_a_cpu_compiles_where_a_run_is_long_enough(device, max_iters, wanted):
    """4 layers of 128 channels save 30 ms of a step of 2,048 tokens, and take 33 s."""
    model = ModelConfig(n_layer=4, n_head=2, n_embd=128, block_size=256)
    run = Config(model=model, batch_size=8, max_iters=max_iters, warmup_iters=0, device=device)
    assert pays_to_compile(run) == wanted
