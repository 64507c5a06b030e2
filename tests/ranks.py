"""What the tests do to ranks: functions that a rank calls before it trains, or instead."""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from faults.harness import Ranks, command
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import evaluate
import optim
import parallel
import run as run_module
import train
import world as world_module
from config.schema import user_errors
from model import Decoder
from norm import Norm
from world import World, join


def trained(size: int, out: Path, data: Path, before: Callable[[], None] | None = None,
            **knobs: object) -> tuple[list[int], list[str]]:
    """Trains a very small model in `out` on so many ranks: (the exit code of each, what each printed)."""
    ranks = Ranks(size, command(out, **knobs), data, before)
    return ranks.wait(), ranks.texts()


def instead(function: Callable[[World], int | None]) -> None:
    """The rank does this and does not train; what it returns is its exit code, which is 1 if it raises."""
    train.main = lambda argv: function(join()) or 0


def only(rank: int, function: Callable[[], None]) -> None:
    if os.environ["RANK"] == str(rank):
        function()


def in_step(step: int, act: Callable[[], None]) -> None:
    """act() in the middle of this optimizer step, which is not the first."""
    batch = train.batch

    def acted(data, at, *rest):
        if at == step - 1:
            act()
        return batch(data, at, *rest)

    train.batch = acted


def stopped(step: int) -> None:
    in_step(step, partial(os.kill, os.getpid(), signal.SIGTERM))


def stopped_in_evaluation() -> None:
    read = evaluate.read_windows

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*arguments)

    evaluate.read_windows = interrupted


def poisoned(step: int) -> None:
    """From this step on the loss of this rank is NaN."""
    forward, bad = Decoder.forward, []
    in_step(step, partial(bad.append, True))
    Decoder.forward = lambda self, *rest: forward(self, *rest) * (float("nan") if bad else 1)


def seeds_told() -> None:
    seed = torch.manual_seed
    torch.manual_seed = lambda number: print("seed", number, file=sys.stderr) or seed(number)


def other_data(folder: Path) -> None:
    """This rank's host has other tokens where rank 0 has its own."""
    opened = run_module.open_dataset
    run_module.open_dataset = lambda _: opened(folder)


def saved_again(path: Path) -> None:
    """What the run begins with is saved there too."""
    loop = train.train

    def noted(run, tracker):
        train.save(run, path, must=True)
        return loop(run, tracker)

    train.train = noted


def stranger(out: Path) -> None:
    """This rank may not so much as look into `out`, as if it were on another host."""
    def refuse(event: str, arguments: tuple) -> None:
        places = [Path(os.fsdecode(a)) for a in arguments if isinstance(a, (str, bytes, Path)) and a]
        if any(place.is_relative_to(out) for place in places):
            raise AssertionError(f"{event} {arguments}")

    sys.addaudithook(refuse)


def apart(dtype: str) -> None:
    """A shared model is built without ever being whole; its matrices are in parts, also what the optimizer has for
    them; all else is whole and in fp32, also while a Block is at work."""
    decoder, loop, born, at_work = parallel.Decoder, train.train, set(), set()

    def noted(*arguments, **named):
        model = decoder(*arguments, **named)
        born.update(p.device.type for p in model.parameters())
        return model

    def look(module, _):
        at_work.update((type(module) is Norm, type(p) is DTensor, p.dtype) for p in module.parameters(recurse=False))

    def looked_at(run, tracker):
        matrices = [p for p in run.model.parameters() if p.ndim == 2]
        own = sum(p.to_local().numel() for p in matrices)
        whole = sum(p.numel() for p in matrices)
        assert born == {"meta"}
        assert own < 0.6 * whole and run.world.sum(own) == whole
        for block in run.model.blocks:
            for module in block.modules():
                module.register_forward_pre_hook(look)
        code = loop(run, tracker)
        assert at_work == {(True, False, torch.float32), (False, False, getattr(torch, dtype))}
        assert all(type(t) is DTensor for o in run.optimizers for p in matrices if p in o.state
                   for t in o.state[p].values() if t.ndim)
        return code

    parallel.Decoder, train.train = noted, looked_at


SHAPES = [(5, 7), (7, 5), (3, 3), (1, 6), *[(16, 16)] * 5]


def muons(kind: str, world: World) -> None:
    """Three steps of SharedMuon, or CopiedMuon, are those of Muon on whole matrices."""
    optim.choose_dtype = lambda wanted, device: "float32"
    mesh, draw = init_device_mesh("cpu", (world.size,)), torch.Generator().manual_seed(0)

    def part(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)]) if kind == "SharedMuon" else tensor.clone()

    plain = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    divided = [torch.nn.Parameter(part(p.detach())) for p in plain]
    both = [one([{"params": some, "lr": 0.1, "weight_decay": 0.1}], 0.9)
            for one, some in ((optim.Muon, plain), (getattr(parallel, kind), divided))]
    for _ in range(3):
        for p, q in zip(plain, divided, strict=True):
            p.grad = torch.randn(p.shape, generator=draw)
            q.grad = part(p.grad)
        for optimizer in both:
            optimizer.step()
    for p, q in zip(plain, divided, strict=True):
        whole = q.full_tensor() if kind == "SharedMuon" else q.data
        torch.testing.assert_close(whole, p.data, rtol=1e-4, atol=1e-5)


def failing(rank: int, error: Exception, world: World, how: str = "everywhere") -> None:
    """One rank fails in what all do, where the user's errors are told."""
    def act():
        if world.rank == rank:
            raise error

    with user_errors():
        getattr(world, how)(act)


def agreeing(world: World) -> None:
    assert world.share(f"said by {world.rank}") == "said by 0"
    assert world.main(lambda: world.rank + 5) == (5 if world.rank == 0 else None)
    assert world.everywhere(lambda: world.rank * 2) == world.rank * 2
    assert world.sum(0.1 + world.rank) == sum(0.1 + rank for rank in range(world.size))
    assert world.largest(world.rank % 2) == 1
    mean = torch.full((2,), float(world.rank))
    assert world.mean_(mean).tolist() == [(world.size - 1) / 2] * 2
    world.together(lambda: None)
    for rank, words in ((0, "full"), (world.size - 1, f"rank {world.size - 1}: full")):
        with pytest.raises(OSError, match=f"^{words}$"):  # on each of them, and all go on
            world.together(partial(full_disk_of, rank, world))


def full_disk_of(rank: int, world: World) -> None:
    if world.rank == rank:
        raise OSError("full")


def dying(world: World) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def impatient(seconds: float) -> None:
    """This rank waits only so long for another."""
    world_module.PATIENCE = timedelta(seconds=seconds)
