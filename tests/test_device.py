"""What auto means, and that the ceiling is a real one."""

import sys

import pytest
import torch

from device import (
    autocast,
    choose_device,
    choose_dtype,
    copy_rate,
    keep_freed_memory,
    matmul_rate,
    peak_memory,
    to_device,
    total_memory,
    without_cudnn_attention,
)


def test_auto_takes_the_best_device_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == "cuda:0"
    assert choose_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"


def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for wanted in ("cuda:7", "cdua"):
        with pytest.raises(ValueError, match=f"device={wanted} is not on this machine; it has cuda:0, cpu"):
            choose_device(wanted)


@pytest.mark.parametrize("capability, auto", [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_bfloat16_needs_the_hardware_on_cuda(monkeypatch, capability, auto):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_dtype("auto", "cuda:0") == auto
    assert choose_dtype("float16", "cuda:0") == "float16"
    if auto == "float32":
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
    size, pages = 2**26, 2**26 // resource.getpagesize()  # 64 MiB: glibc by itself gives such a block back at once

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(size // 4)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(10)) < pages / 10


def test_only_on_cuda_is_a_kernel_left_out_that_plans_each_length_anew(monkeypatch):
    left_out = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: left_out.append(not on))
    without_cudnn_attention("cpu")
    without_cudnn_attention("mps")
    assert left_out == []
    without_cudnn_attention("cuda:1")
    assert left_out == [True]
