"""The processes of one run, ranks, and what they agree on. A launcher such as torchrun starts them; alone, a process is
a world of one, in which nothing here communicates.

Rank 0, main, reads and writes out_dir and speaks; the others know from it what to do. What one rank cannot do, none
does, so that no rank waits for another that has left.
"""

import os
import re
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=30)  # until a rank gives up on one that does not answer; preparing a text may take long
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FAULTS = (ValueError, OSError)  # of the user or the machine: one line; anything else shows where it rose
LOST = re.compile(r"gloo/\S+] (.*?(?:closed|closure|reset by peer|Broken pipe|refused|imed out).*?)(?:\. |$)", re.M)


@dataclass(frozen=True)
class World:
    """Which process of how many this is, in all and on this host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def everywhere(self, function: Callable, *arguments) -> Any:
        """function(*arguments) on each rank. Where it fails on one, all end: that one with its traceback, or, if the
        fault is the user's or the machine's, main with one line. No rank may wait for another inside."""
        if self.size == 1:
            return function(*arguments)
        result = error = None
        try:
            result = function(*arguments)
        except Exception as raised:  # whatever it is, the others must know
            error = raised
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, error and (isinstance(error, FAULTS), str(error)))
        if not any(told):
            return result
        if error is not None and (self.is_main or not isinstance(error, FAULTS)):
            raise error
        rank, (is_fault, text) = next((rank, said) for rank, said in enumerate(told) if said)
        if self.is_main and is_fault:
            raise ValueError(f"rank {rank}: {text}")
        raise SystemExit(1)

    def together(self, function: Callable, *arguments) -> None:
        """function(*arguments) on each rank. Where the user's or the machine's fault keeps one from it, OSError on all,
        who may go on; any other error ends all. No rank may wait for another inside."""
        status, error = 0, None
        try:
            function(*arguments)
        except Exception as raised:  # whatever it is, the others must know
            status, error = 1 if isinstance(raised, FAULTS) else 2, raised
        worst = self.largest(status)
        if worst == 2:
            raise error if status == 2 else SystemExit(1)
        if worst == 1:
            told: list[Any] = [error and str(error)] * self.size
            if self.size > 1:
                dist.all_gather_object(told, told[self.rank])
            rank, text = next((rank, text) for rank, text in enumerate(told) if text is not None)
            raise OSError(f"rank {rank}: {text}" if rank else text) from error

    def main(self, function: Callable, *arguments) -> Any:
        """function(*arguments) on main, None elsewhere; the others wait, and end with it where it fails."""
        return self.everywhere(self.only_main(function), *arguments)

    def only_main(self, function: Callable) -> Callable:
        """The function, and elsewhere one that does nothing."""
        return function if self.is_main else lambda *_: None

    def share(self, value: Any) -> Any:
        """Main's value, a small object, on all ranks."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def sum(self, value: float) -> float:
        """Of all ranks' values, in float64."""
        return self._reduced(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.SUM)

    def largest(self, value: int) -> int:
        return self._reduced(torch.tensor(value), dist.ReduceOp.MAX)

    def _reduced(self, value: Tensor, how: Any) -> Any:
        if self.size > 1:
            dist.all_reduce(value, how)
        return value.item()

    def mean_(self, tensor: Tensor) -> Tensor:
        """Puts the mean over all ranks in its place, on the device where it is."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor


ALONE = World()


def join() -> World:
    """The world that the launcher's variables describe, once all its ranks are there; ALONE where there are none.

    Of the ranks only main speaks on stdout. ValueError if the variables are not whole, OSError if a port is in use.
    """
    present = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not present.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:  # a cluster may set an address for everything
        return ALONE
    if missing := [name for name in VARIABLES if name not in present]:
        raise ValueError(f"{', '.join(present)} are set but {', '.join(missing)} not: start several ranks with "
                         f"torchrun, which sets them all, or unset them to run alone")
    numbers = {name: present[name] for name in VARIABLES if name != "MASTER_ADDR"}
    if wrong := [f"{name}={text}" for name, text in numbers.items() if not text.isdecimal()]:
        raise ValueError(f"{', '.join(wrong)}: must be whole numbers; torchrun sets them")
    world = World(*(int(numbers[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    if not (world.rank < world.size and world.local_rank < world.local_size <= world.size):
        raise ValueError(f"RANK={world.rank} of WORLD_SIZE={world.size}, LOCAL_RANK={world.local_rank} of "
                         f"LOCAL_WORLD_SIZE={world.local_size} cannot be: a rank is below its size")
    if dist.is_initialized():
        return world
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, store=meeting_place(world), rank=world.rank, world_size=world.size,
                                timeout=PATIENCE)
    except RuntimeError as error:  # the address is in use or unknown, or not all came
        where, reason = f"{present['MASTER_ADDR']}:{present['MASTER_PORT']}", str(error).strip().splitlines()[0]
        raise OSError(f"rank {world.rank} on {socket.gethostname()} could not meet the others at {where}: "
                      f"{reason:.200}") from error
    if not world.is_main:
        sys.stdout = open(os.devnull, "w")  # what all do is told once
    return world


def meeting_place(world: World) -> dist.Store:
    """Where these ranks find each other, and nothing of others before them: torchrun keeps one store for all its
    restarts (as in https://github.com/pytorch/pytorch/issues/135712), and with it the addresses of ranks long dead.

    So each rank asks there under a name that is new, and main answers all that it finds with a new one of its own.
    """
    store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
    name, end = uuid.uuid4().hex, time.monotonic() + PATIENCE.total_seconds()
    if not world.is_main:
        store.set(f"asks {world.rank}", name)
        name = store.get(name).decode()  # waits for the answer
        store.add(name, 1)
    while world.is_main and store.add(name, 0) < world.size - 1:
        for question in (f"asks {rank}" for rank in range(1, world.size)):
            if store.check([question]):
                store.set(store.get(question).decode(), name)
        if time.monotonic() > end:
            raise RuntimeError("not all ranks came")
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def leave(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Ends the process with the exit code of main(argv).

    With ranks not by way of Python's shutdown: there gloo's threads, which may still hold tensors, made one process in
    ten abort (https://github.com/pytorch/pytorch/pull/179291 tells why).
    """
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        if not dist.is_initialized():
            raise
        code, lost = 1, LOST.search(str(error))
        if not lost:
            traceback.print_exc()
        elif os.environ["LOCAL_RANK"] == "0":  # one line for each host
            print(f"error: another rank has gone or does not answer ({lost[1]}); resume=auto goes on from the last "
                  f"checkpoint", file=sys.stderr)
    if not dist.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
