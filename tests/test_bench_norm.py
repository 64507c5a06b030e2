"""bench norm times every norm in every way, and counts the bytes that it must move."""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch

import bench
import bench_norm
import norm
from device import processor
from norm import EAGER, FUSED, Norm

NAMES = [(operation, kind, impl) for operation, kind, impl in (
    *(("norm", kind, "eager") for kind in EAGER), *(("norm", kind, "fused") for kind in FUSED),
    *(("add + norm", kind, impl) for kind in ("layernorm", "rmsnorm") for impl in ("eager", "fused")))
    if kind != "none"]
COMPILED = [("norm", kind, "compile") for kind in EAGER if kind != "none"] + [
    ("add + norm", kind, "compile") for kind in ("layernorm", "rmsnorm")]


def test_bench_norm_prints_a_table_for_each_shape_and_dtype_with_a_row_for_each_norm_and_way(measure):
    code, out, _ = measure("norm", "shapes=8x16,4x32", "dtypes=float32,bfloat16", "impls=eager,fused", "steps=1",
                           "device=cpu")
    assert code == 0
    head, *tables = out.split("\n\n")
    assert head.startswith(f"cpu ({processor('cpu')}), 1 threads, torch ") and "commit" in head
    assert "copies of 256 MiB" in head
    assert [t.split(":")[0] for t in tables] == ["8 x 16 float32", "8 x 16 bfloat16", "4 x 32 float32",
                                                 "4 x 32 bfloat16"]
    for table in tables:
        rows = table.rstrip().split("\n")[3:]
        assert {(r[:12].strip(), *r[12:].split()[:2]) for r in rows} == set(NAMES) and len(rows) == len(NAMES)
        assert len({len(line) for line in rows}) == 1  # aligned
        assert all(len(r[12:].split()) == 9 for r in rows)


def test_all_of_what_runs_here_is_timed_and_the_rest_is_told(measure, monkeypatch):
    seen = []
    monkeypatch.setattr(bench_norm, "measure_norms", lambda *arguments: seen.append(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.main(["norm", "device=cpu", "steps=7"])
    device, shape, dtype, names, steps = seen[0]
    assert (device, shape, dtype, steps) == ("cpu", (16384, 768), torch.float32, 7)
    assert set(names) == {*NAMES, *COMPILED}


def test_without_a_compiler_the_rest_is_timed(measure, monkeypatch):
    def broken(_):
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    code, out, _ = measure("norm", "shapes=4x8", "kinds=rmsnorm", "dtypes=float32", "steps=1", "device=cpu")
    assert code == 0 and "without compile: no C++ compiler\n" in out and "without triton: " in out
    assert "eager" in out and "fused" in out
    assert measure("norm", "impls=compile")[0] == 2


@pytest.fixture
def graphs(monkeypatch):
    """For each graph that torch.compile makes whether it is dynamic. No code is made of it, that would take minutes."""
    def backend(graph, inputs):
        made.append(any(isinstance(i, torch.SymInt) for i in inputs))
        return graph.forward

    made = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    forget_compiled_norms()
    yield made
    forget_compiled_norms()


def forget_compiled_norms():
    for cached in vars(norm).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def test_all_compiled_norms_get_static_graphs_of_their_own_for_each_shape(graphs):
    for shape in ((8, 16), (4, 32)):
        table = bench_norm.measure_norms("cpu", shape, torch.float32, COMPILED, 2)
        assert [(r.operation, r.kind, r.impl) for r in table.rows] == COMPILED
        assert all(0 < r.forward and 0 < r.both and r.kept >= 4 for r in table.rows) and table.copy > 0
    half = len(graphs) // 2
    assert half >= 2 * len(COMPILED)  # without and with gradients
    assert len(graphs) == 2 * half and not any(graphs)


def test_one_function_may_have_many_graphs_and_none_falls_back_to_eager(graphs, monkeypatch):
    x = torch.ones(2, 3, requires_grad=True)
    function = torch.compile(lambda name, x: x * len(name))
    arms = [bench_norm.Arm("norm", "", "", partial(function, "n" * i), (x,), (x.detach(),), ()) for i in range(12)]
    monkeypatch.setattr(bench_norm, "arms_on", lambda *_: arms)
    bench_norm.measure_norms("cpu", (2, 3), torch.float32, [], 1)
    assert len(graphs) == 24


def test_each_time_stands_in_its_column(monkeypatch):
    times = {"copy": 1.0, "forward": 2.0, "both": 3.0}
    monkeypatch.setattr(bench_norm, "medians", lambda calls, *_: {c: times[c if c == "copy" else c[1]] for c in calls})
    table = bench_norm.measure_norms("cpu", (4, 8), torch.float32, NAMES[:2], 1)
    assert table.copy == 1.0 and [(r.forward, r.both) for r in table.rows] == [(2.0, 3.0)] * 2


def test_rates_are_the_bytes_of_the_floor_by_the_time():
    row = bench_norm.Row("norm", "rmsnorm", "eager", forward=1e-6, both=5e-6, kept=4.0)
    adding = bench_norm.Row("add + norm", "rmsnorm", "fused", forward=4e-6, both=1e-6, kept=6.0)
    table = bench_norm.Table((10, 100), torch.bfloat16, 1e-6, [row, adding])
    copy, *_, first, second = bench_norm.table_text(table).split("\n")
    assert copy == "10 x 100 bfloat16: a copy takes 0.001 ms, 4.0 GB/s"  # 1000 elements of 2 bytes, there and back
    # forward reads and writes 2 x 2000 bytes in 1 us; both 5 x 2000 in 5 us; add + norm 4 x 2000 in 4, 8 x 2000 in 1
    assert first.split()[3:] == ["0.001", "4.0", "100%", "0.005", "2.0", "50%", "4.00"]
    assert second.split()[5:] == ["0.004", "2.0", "50%", "0.001", "16.0", "400%", "6.00"]


def test_a_norm_keeps_its_input_and_its_statistics_for_the_backward():
    (arm,) = bench_norm.arms_on("cpu", (16, 64), torch.float32, [("norm", "layernorm", "fused")])
    assert arm.kept() == 4 * (16 * 64 + 2 * 16 + 2 * 64)  # x, mean and rstd of each row, gain and bias
    (arm,) = bench_norm.arms_on("cpu", (16, 64), torch.float32, [("norm", "rmsnorm", "eager")])
    assert arm.kept() == 4 * (2 * 16 * 64 + 16 + 64)  # x once, though three steps keep it; x * rstd, rstd and gain


def gradients_of(arm, monkeypatch):
    """What arm.both() asks autograd for, and gets."""
    seen, grad = [], torch.autograd.grad
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *a: seen.append((a, grad(*a))))
        arm.both()
    return seen[0]


@pytest.mark.parametrize("name", NAMES, ids="-".join)
def test_backward_yields_the_gradients_of_input_and_parameters(monkeypatch, name):
    (arm,) = bench_norm.arms_on("cpu", (4, 8), torch.float32, [name])
    (outputs, wrt, given), gradients = gradients_of(arm, monkeypatch)
    assert len(wrt) == len(arm.inputs) + len(arm.parameters) == len(gradients)
    assert all(g.shape == w.shape and g.any() for g, w in zip(gradients, wrt, strict=True))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    plain = Norm(arm.kind, 8, bench_norm.EPS)
    y = plain(sum(arm.inputs))
    wanted = (y,) if name[0] == "norm" else (sum(arm.inputs), y)
    for got, want in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(gradients, torch.autograd.grad(wanted, (*arm.inputs, *plain.parameters()), given),
                         strict=True):
        torch.testing.assert_close(got, want)


def test_the_forward_alone_records_no_gradients():
    (arm,) = bench_norm.arms_on("cpu", (4, 8), torch.float32, [("norm", "rmsnorm", "eager")])
    seen = []
    bench_norm.Arm("norm", "rmsnorm", "eager", lambda x: seen.append(arm.function(x)), arm.inputs, (), ()).forward()
    assert not seen[0].requires_grad


def test_calls_are_timed_in_turn_and_the_median_is_told(monkeypatch):
    order, now = [], iter(range(100))
    monkeypatch.setattr(bench_norm.time, "perf_counter", lambda: next(now) ** 2)
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = bench_norm.medians(calls, "cpu", 3)
    assert order == list("baabba")
    # the n-th call takes (2n + 1)^2 - (2n)^2 = 4n + 1: b 1, 13, 17 and a 5, 9, 21
    assert seconds == {"a": 9, "b": 13}


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

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert bench_norm.seconds_of(lambda: log.append("call"), "cuda:0", Evict()) == 2.5
    assert log == ["evict", "record", "call", "record", "wait"]


def test_triton_and_liger_are_given_the_same_sum_and_give_the_same_order(monkeypatch):
    """Liger-Kernel takes (branch, residual stream) and returns (normed, sum); in place it would spoil the gradient."""
    functional = ModuleType("liger_kernel.transformers.functional")
    calls = []

    def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        calls.append((offset, casting_mode, in_place))
        return EAGER["rmsnorm"](X + R, W, eps), X + R

    functional.liger_fused_add_rms_norm = liger_fused_add_rms_norm
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setattr(bench_norm, "liger_function", bench_norm.liger_function.__wrapped__)
    monkeypatch.setattr(bench_norm.norm_triton, "add_rmsnorm", lambda x, branch, gain, eps: (
        x + branch, EAGER["rmsnorm"](x + branch, gain, eps)))
    assert bench_norm.why_not("liger", "cuda:0") is None
    arms = bench_norm.arms_on("cpu", (4, 8), torch.float32, [("add + norm", "rmsnorm", i) for i in ("eager", "triton",
                                                                                             "liger")])
    (total, normed), *others = (arm.function(*arm.inputs) for arm in arms)
    for other in others:
        torch.testing.assert_close(other, (total, normed))
    assert calls == [(0.0, "gemma", False)]


def test_where_liger_is_not_installed_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(bench_norm, "liger_function", bench_norm.liger_function.__wrapped__)
    assert "liger_kernel" in bench_norm.why_not("liger", "cuda:0")


def test_cuda_has_its_own_default_shapes_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    shapes, dtypes = bench_norm.inputs_to_time(bench_norm.NormBench(), "cuda:0")
    assert shapes == [(8192, 768), (8192, 2048), (8192, 4096)] and dtypes == [torch.bfloat16]
