"""What the tests do to ranks: functions that each rank calls before it trains, or instead."""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from faults.harness import after_call, at_batch, before_call
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import run.ranks
import train
from config.command import user_errors
from data import loader
from model import Decoder
from norm import Norm
from run import optim, parallel
from run.folder import save_checkpoint
from run.ranks import Ranks, join


def instead(function: Callable[[Ranks], object]) -> None:
    """The rank does this and does not train. Its exit code is 1 if function(ranks) raises."""

    def main(argv: list[str]) -> int:
        function(join())
        return 0

    train.main = main


def only(rank: int, function: Callable[[], None]) -> None:
    if os.environ["RANK"] == str(rank):
        function()


# Instead of training


def agree(ranks: Ranks) -> None:
    assert ranks.from_main(f"said by {ranks.rank}") == "said by 0"
    assert ranks.sum(0.1 + ranks.rank) == sum(0.1 + rank for rank in range(ranks.size))
    assert ranks.largest(ranks.rank % 2) == 1
    mean = torch.full((2,), float(ranks.rank))
    assert ranks.mean_(mean).tolist() == [(ranks.size - 1) / 2] * 2
    last = ranks.size - 1
    for together in (ranks.all_or_exit, ranks.all_or_none):
        with together():
            done = ranks.rank
        assert done == ranks.rank
    for rank, words in ((0, "full"), (last, f"rank {last}: full")):
        # The error comes on each of them, and all go on.
        with pytest.raises(OSError, match=f"^{words}$"), ranks.all_or_none():
            if ranks.rank == rank:
                raise OSError("full")


def fail(rank: int, error: Exception, how: str, ranks: Ranks) -> None:
    """One rank fails in what all do together, where errors of the user are told."""
    with user_errors(), getattr(ranks, how)():
        if ranks.rank == rank:
            raise error


def die(ranks: Ranks) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(seconds: float, ranks: Ranks) -> None:
    """The last rank does not come to an exchange, for which the others wait only so long."""
    run.ranks.limit_waits("cpu", timedelta(seconds=seconds))
    if ranks.rank == ranks.size - 1:
        time.sleep(4 * seconds)
    else:
        ranks.sum(1)


SHAPES = [(5, 7), (7, 5), (3, 3), (1, 6), *[(16, 16)] * 5]  # some have too few rows for all ranks


def compare_muons(kind: str, ranks: Ranks) -> None:
    """Three steps of FSDPMuon, or DDPMuon, must be those of Muon on whole matrices."""
    optim.choose_dtype = lambda wanted, device: "float32"
    mesh, draw = init_device_mesh("cpu", (ranks.size,)), torch.Generator().manual_seed(0)

    def part(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)]) if kind == "FSDPMuon" else tensor.clone()

    def optimizer(muon, parameters):
        return muon([{"params": parameters, "lr": 0.1, "weight_decay": 0.1}], momentum=0.9)

    wholes = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    parts = [torch.nn.Parameter(part(p.detach())) for p in wholes]
    plain, divided = optimizer(optim.Muon, wholes), optimizer(getattr(parallel, kind), parts)
    for _ in range(3):
        for p, q in zip(wholes, parts, strict=True):
            p.grad = torch.randn(p.shape, generator=draw)
            q.grad = part(p.grad)
        plain.step()
        divided.step()
    for p, q in zip(wholes, parts, strict=True):
        found = q.full_tensor() if kind == "FSDPMuon" else q.data
        torch.testing.assert_close(found, p.data, rtol=1e-4, atol=1e-5)


# Before training


def stop_in(step: int) -> None:
    """SIGTERM in the middle of optimizer step `step`, counted from 1; not in the first one."""
    at_batch(step - 1, partial(os.kill, os.getpid(), signal.SIGTERM))


def stop_in_evaluation() -> None:
    def stop(_, split: str, *__) -> None:
        if split == "val":
            os.kill(os.getpid(), signal.SIGTERM)

    before_call(loader.Dataset, "windows", stop)


def poison_from(step: int) -> None:
    """From this step on the loss of this rank is NaN."""
    forward, bad = Decoder.forward, []
    at_batch(step - 1, partial(bad.append, True))
    Decoder.forward = lambda self, *rest: forward(self, *rest) * (float("nan") if bad else 1)


def tell_seeds() -> None:
    before_call(torch, "manual_seed", lambda number: print("seed", number, file=sys.stderr))


def save_the_start(folder: Path) -> None:
    """What the run begins with is saved there, in one file."""

    def save_there(begun, tracker):
        config = replace(begun.config, out_dir=str(folder), sharded=False)
        save_checkpoint(replace(begun, config=config, lock=None), required=True)

    before_call(train, "train", save_there)


def count_graphs() -> None:
    """The compiler finds its graphs, but makes no code of them, which would take a minute. At the
    end the rank says how many there were, and how many parts of the model are compiled."""
    counter = CompileCounterWithBackend("eager")
    torch.compile = partial(torch.compile, backend=counter)

    def tell(_, begun, tracker):
        parts = [(block, "forward") for block in begun.model.blocks] + [(begun.model, "loss")]
        compiled = sum(name in vars(part) for part, name in parts)
        print(f"graphs: {counter.frame_count}, compiled: {compiled}", file=sys.stderr)

    after_call(train, "train", tell)


def never_look_into(out: Path) -> None:
    """This rank fails if it so much as looks into `out`, as if it were on another host."""

    def refuse(event: str, arguments: tuple) -> None:
        names = [os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, Path)) and a]
        if any(Path(name).is_relative_to(out) for name in names):
            raise AssertionError(f"{event} {arguments}")

    sys.addaudithook(refuse)


def find_parts_only(dtype: str) -> None:
    """A shared model must be built without ever being whole. Its matrices must be in parts, also
    what the optimizer has for them. All else must be whole and in fp32, also while a Block is at
    work."""
    loop, born, at_work = train.train, set(), set()

    def look(module, _):
        for parameter in module.parameters(recurse=False):
            at_work.add((type(module) is Norm, type(parameter) is DTensor, parameter.dtype))

    def looked_at(begun, tracker):
        matrices = [p for p in begun.model.parameters() if p.ndim == 2]
        own = sum(p.to_local().numel() for p in matrices)
        whole = sum(p.numel() for p in matrices)
        assert born == {"meta"}
        assert own < 0.6 * whole and begun.ranks.sum(own) == whole
        for module in begun.model.blocks.modules():
            module.register_forward_pre_hook(look)
        code = loop(begun, tracker)
        assert at_work == {(True, False, torch.float32), (False, False, getattr(torch, dtype))}
        states = [o.state[p] for o in begun.optimizers for p in matrices if p in o.state]
        moments = [value for state in states for value in state.values() if value.ndim]
        assert moments and all(type(moment) is DTensor for moment in moments)
        return code

    def note(model, *_):
        born.update(p.device.type for p in model.parameters())

    after_call(parallel, "Decoder", note)
    train.train = looked_at


def be_impatient(seconds: float) -> None:
    """This rank waits only so long for another."""
    run.ranks.PATIENCE = timedelta(seconds=seconds)


def fill_disk() -> None:
    """The disk of this rank is full where parts are written."""
    from torch.distributed.checkpoint import FileSystemWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    FileSystemWriter.write_data = full
