"""lab.bench norm times every norm in every way, and counts the bytes that it must move."""

import sys
import time
from functools import partial
from types import ModuleType

import pytest
import torch
from conftest import slow

import norm
from lab import bench_norm
from norm import EAGER, FUSED, Norm
from run.machine import processor

KINDS = [kind for kind in EAGER if kind != "none"]
TWO = ("layernorm", "rmsnorm")
NAMES = [("norm", kind, "eager") for kind in KINDS]
NAMES += [("norm", kind, "fused") for kind in FUSED if kind != "none"]
NAMES += [("add + norm", kind, impl) for kind in TWO for impl in ("eager", "fused")]
COMPILED = [("norm", kind, "compile") for kind in KINDS]
COMPILED += [("add + norm", kind, "compile") for kind in TWO]


def names_in(table):
    """(operation, kind, implementation) of each row of a printed table."""
    rows = table.rstrip().split("\n")[3:]
    assert len({len(line) for line in rows}) == 1  # aligned
    assert all(len(row[12:].split()) == 9 for row in rows)
    return [(row[:12].strip(), *row[12:].split()[:2]) for row in rows]


def test_bench_norm_prints_a_table_for_each_shape_and_dtype_with_a_row_for_each_norm_and_way(
    measure,
):
    options = "shapes=8x16,4x32 dtypes=float32,bfloat16 impls=eager,fused steps=1 device=cpu"
    code, out, err = measure("norm", *options.split())
    assert code == 0 and err == ""
    head, *tables = out.split("\n\n")
    assert head.startswith(f"cpu ({processor('cpu')}), 1 threads, torch ") and "commit" in head
    assert "copies of 256 MiB" in head
    heads = ["8 x 16 float32", "8 x 16 bfloat16", "4 x 32 float32", "4 x 32 bfloat16"]
    assert [table.split(":")[0] for table in tables] == heads
    for table in tables:
        assert sorted(names_in(table)) == sorted(NAMES)


@pytest.mark.slow
def test_all_of_what_runs_here_is_timed_and_the_rest_is_told(measure):
    options = "shapes=4x8 dtypes=float32 steps=1 device=cpu".split()
    code, out, err = measure("norm", *options)
    assert err == "compiling for each shape and dtype, which takes a while\n"
    assert code == 0 and "without liger: it needs a CUDA device" in out
    assert set(names_in(out.split("\n\n")[1])) == {*NAMES, *COMPILED}


def test_each_device_has_its_own_default_shapes_and_dtypes(monkeypatch):
    shapes, dtypes = bench_norm.inputs_to_time(bench_norm.NormBench(), "cpu")
    assert shapes == [(16384, 768), (2048, 128)] and dtypes == [torch.float32, torch.bfloat16]
    # There may be no GPU here.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    shapes, dtypes = bench_norm.inputs_to_time(bench_norm.NormBench(), "cuda:0")
    assert shapes == [(8192, 768), (8192, 2048), (8192, 4096)] and dtypes == [torch.bfloat16]


def forget_compiled_norms():
    for cached in vars(norm).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@pytest.fixture
def graphs(monkeypatch):
    """For each graph that torch.compile makes whether it is dynamic. No code is made of it, which
    would take minutes."""

    def backend(graph, inputs):
        made.append(any(isinstance(i, torch.SymInt) for i in inputs))
        return graph.forward

    made = []
    # Only a backend sees the graphs.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    forget_compiled_norms()
    yield made
    forget_compiled_norms()


@pytest.mark.parametrize("names", [[COMPILED[0], COMPILED[-1]], slow(COMPILED)])
def test_all_compiled_norms_get_static_graphs_of_their_own_for_each_shape(graphs, names):
    """However few graphs of one function the compiler allows, none falls back to eager."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for shape in ((8, 16), (4, 32)):
            table = bench_norm.measure_norms("cpu", shape, torch.float32, names, 2)
            assert [(r.operation, r.kind, r.impl) for r in table.rows] == names
            assert all(0 < r.forward and 0 < r.both and r.kept >= 4 for r in table.rows)
            assert table.copy > 0
    half = len(graphs) // 2
    assert half >= 2 * len(names)  # without and with gradients
    assert len(graphs) == 2 * half and not any(graphs)


def test_each_time_stands_in_its_column(monkeypatch):
    names = [("norm", "rmsnorm", "eager"), ("add + norm", "layernorm", "fused")]

    def told(calls, device, steps):
        return {
            key: "copy" if key == "copy" else (key[0].operation, call.__name__)
            for key, call in calls.items()
        }

    monkeypatch.setattr(bench_norm, "medians", told)
    table = bench_norm.measure_norms("cpu", (4, 8), torch.float32, names, 1)
    assert table.copy == "copy"
    for row, (operation, *_) in zip(table.rows, names, strict=True):
        assert (row.forward, row.both) == ((operation, "forward"), (operation, "both"))


def test_rates_are_the_bytes_of_the_floor_by_the_time():
    row = bench_norm.Row("norm", "rmsnorm", "eager", forward=1e-6, both=5e-6, kept=4.0)
    adding = bench_norm.Row("add + norm", "rmsnorm", "fused", forward=4e-6, both=1e-6, kept=6.0)
    table = bench_norm.Table((10, 100), torch.bfloat16, 1e-6, [row, adding])
    copy, *_, first, second = bench_norm.table_text(table).split("\n")
    # A copy moves 1000 elements of 2 bytes, there and back.
    assert copy == "10 x 100 bfloat16: a copy takes 0.001 ms, 4.0 GB/s"
    # The norm moves 2 x 2000 bytes in 1 us, and 5 x 2000 in 5 us with its backward.
    assert first.split()[3:] == ["0.001", "4.0", "100%", "0.005", "2.0", "50%", "4.00"]
    # Sum and norm move 4 x 2000 bytes in 4 us, and 8 x 2000 in 1 us.
    assert second.split()[5:] == ["0.004", "2.0", "50%", "0.001", "16.0", "400%", "6.00"]


def test_a_norm_keeps_its_input_and_its_statistics_for_the_backward():
    names = [("norm", "layernorm", "fused"), ("norm", "rmsnorm", "eager")]
    layernorm, rmsnorm = bench_norm.arms_on("cpu", (16, 64), torch.float32, names)
    # x, mean and rstd of each row, gain and bias
    assert layernorm.kept() == 4 * (16 * 64 + 2 * 16 + 2 * 64)
    # x once, though three operations keep it; x * rstd, rstd, gain; and whether a row overflows
    assert rmsnorm.kept() == 4 * (2 * 16 * 64 + 16 + 64) + 16


@pytest.mark.parametrize("name", NAMES, ids="-".join)
def test_an_arm_computes_the_norm_and_its_gradients(name):
    (arm,) = bench_norm.arms_on("cpu", (4, 8), torch.float32, [name])
    plain = Norm(arm.kind, 8, bench_norm.EPS)
    total = sum(arm.inputs)
    wanted = (plain(total),) if name[0] == "norm" else (total, plain(total))
    outputs = arm.forward()
    for got, want in zip([outputs] if name[0] == "norm" else outputs, wanted, strict=True):
        torch.testing.assert_close(got, want)
        assert not got.requires_grad
    gradients = torch.autograd.grad(wanted, (*arm.inputs, *plain.parameters()), arm.given)
    found = arm.both()
    for got, want in zip(found, gradients, strict=True):
        torch.testing.assert_close(got, want)
    fades = arm.kind == "tapernorm"  # its last parameter does nothing before it fades
    assert all(got.any() for got in (found[:-1] if fades else found))


def test_calls_are_timed_in_turn_and_the_median_is_told():
    order, naps = [], {"a": iter((0.02, 0.5, 0.02)), "b": iter((0.0, 0.0, 0.0))}
    calls = {
        name: lambda name=name: (order.append(name), time.sleep(next(naps[name]))) for name in "ab"
    }
    seconds = bench_norm.medians(calls, "cpu", 3)
    assert order == list("abbaab") and seconds["b"] < 0.02 <= seconds["a"] < 0.5


def test_on_cuda_the_events_stand_around_the_call_alone(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 2500.0  # milliseconds

    class Evict:
        def sum(self):
            log.append("evict")

    monkeypatch.setattr(torch.cuda, "Event", Event)  # there may be no GPU here
    assert bench_norm.seconds_of(lambda: log.append("call"), "cuda:0", Evict()) == 2.5
    assert log == ["evict", "record", "call", "record", "wait"]


@pytest.fixture
def liger(monkeypatch):
    """liger(package) puts a package in the place of Liger-Kernel; None is that there is none."""

    def put(package):
        for name in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.setitem(sys.modules, name, package and ModuleType(name))
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", package)
        bench_norm.liger_function.cache_clear()

    yield put
    bench_norm.liger_function.cache_clear()


def test_liger_is_given_the_same_sum_and_gives_the_same_order(liger):
    """Liger-Kernel takes (branch, residual stream) and returns (normed, sum); in place it would
    spoil the gradient."""
    functional, calls = ModuleType("liger_kernel.transformers.functional"), []

    def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        calls.append((offset, casting_mode, in_place))
        return EAGER["rmsnorm"](X + R, W, eps), X + R

    functional.liger_fused_add_rms_norm = liger_fused_add_rms_norm
    liger(functional)
    assert bench_norm.why_not("liger", "cuda:0") is None
    names = [("add + norm", "rmsnorm", impl) for impl in ("eager", "liger")]
    arms = bench_norm.arms_on("cpu", (4, 8), torch.float32, names)
    ours, theirs = (arm.function(*arm.inputs) for arm in arms)
    torch.testing.assert_close(theirs, ours)
    assert calls == [(0.0, "gemma", False)]


def test_where_liger_is_not_installed_it_is_told(liger):
    liger(None)
    assert "liger_kernel" in bench_norm.why_not("liger", "cuda:0")
