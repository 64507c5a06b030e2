"""The processes of one run, called ranks, and how they agree.

A launcher such as torchrun starts them. A process that is alone is one rank of one, and then
nothing here communicates. Rank 0 is the main one: it reads and writes out_dir and prints, and it
tells the others what to do. If something fails on one rank, all ranks stop or skip it together,
because the others would wait in vain for a rank that has left.

Reading order: Ranks; join, which finds the other ranks; exit_with, which ends the process.
"""

import os
import re
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from config.command import run_command

# How long a rank waits for another one. It is long because main may be preparing a long text.
PATIENCE = timedelta(minutes=30)
# The same between GPUs, once the first step has been tried: a step's exchanges begin together.
PATIENCE_OF_GPUS = timedelta(minutes=5)
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
# Errors of the user or the machine, which are told in one line. Other errors show a traceback.
FAULTS = (ValueError, OSError)
# How gloo and NCCL say that a rank has gone or does not answer.
LOST_RANK = re.compile(
    # Most of gloo's begin with the place in its sources. What comes out of a backward does not.
    r"(?:gloo/\S+] |^(?=Application timeout|Connection (?:closed|reset)|Timed out waiting))"
    r"(?P<gloo>.*?(?:closed|closure|reset by peer|Broken pipe|refused|imed out).*?)(?:\. |$)"
    r"|NCCL error in[^,]*, (?P<nccl>remote process exited or there was a network error"
    r"|internal error(?=[\s\S]*Connection closed by remote peer))"
    r"|(?P<watchdog>Watchdog caught collective operation timeout)",
    re.M,
)


@dataclass(frozen=True)
class Ranks:
    """The number of this process and how many there are: in all, and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def all_or_exit(self) -> Iterator[None]:
        """A context for what every rank does before training. If one rank fails, all ranks exit.

        An error of the user or the machine is raised on main. If it came from another rank, its
        text begins with that rank, which exits without a word. Any other error is raised on the
        rank where it came. Inside the context, no rank may wait for another one.
        """
        error = None
        try:
            yield
        except Exception as raised:  # whatever it is, the others must know of it
            if self.size == 1:
                raise
            error = raised
        if self.size == 1:
            return
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, error and (isinstance(error, FAULTS), str(error)))
        if not any(told):
            return
        if error is not None and (self.is_main or not isinstance(error, FAULTS)):
            raise error
        rank, (is_fault, text) = next((rank, said) for rank, said in enumerate(told) if said)
        if self.is_main and is_fault:
            raise ValueError(f"rank {rank}: {text}")
        raise SystemExit(1)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A context for what every rank does during training. If one rank has an error of the user
        or the machine, every rank raises OSError, which the caller may catch to go on.

        Any other error ends all ranks. Inside the context, no rank may wait for another one.
        """
        status, error = 0, None
        try:
            yield
        except Exception as raised:  # whatever it is, the others must know of it
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

    def from_main(self, value: Any) -> Any:
        """Main's value, a small object, on all ranks. The value of the other ranks is ignored."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def sum(self, value: float) -> float:
        """The sum of all ranks' values, in float64."""
        return self._reduced(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.SUM)

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        return self._reduced(torch.tensor(value), dist.ReduceOp.MAX)

    def expect_answers(self, device: str) -> None:
        """From here on, an exchange between GPUs fails after PATIENCE_OF_GPUS. While main works
        alone, for instance to save, the others wait for its word, which does not come that way."""
        if self.size > 1 and device.startswith("cuda"):
            limit_waits(device, PATIENCE_OF_GPUS)

    def _reduced(self, value: Tensor, operation: Any) -> Any:
        if self.size > 1:
            dist.all_reduce(value, operation)
        return value.item()

    def mean_(self, tensor: Tensor) -> Tensor:
        """Replaces the tensor, on its own device, by its mean over all ranks; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor


ALONE = Ranks()


def join() -> Ranks:
    """Waits for all ranks that the launcher's variables describe, and returns this process's Ranks.
    Without a launcher it returns ALONE.

    From then on only main prints to stdout. ValueError if the variables contradict each other,
    OSError if the ranks cannot meet, for instance because a port is in use.
    """
    present = {name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ}
    # A cluster may set MASTER_ADDR for every process. Only a launcher sets these three.
    if not present.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        return ALONE
    if missing := [name for name in LAUNCHER_VARIABLES if name not in present]:
        raise ValueError(
            f"{', '.join(present)} are set but {', '.join(missing)} not: start several ranks with "
            f"torchrun, which sets them all, or unset them to run alone"
        )
    numbers = {name: present[name] for name in LAUNCHER_VARIABLES if name != "MASTER_ADDR"}
    if wrong := [f"{name}={text}" for name, text in numbers.items() if not text.isdecimal()]:
        raise ValueError(f"{', '.join(wrong)}: must be whole numbers; torchrun sets them")
    ranks = Ranks(
        rank=int(numbers["RANK"]),
        size=int(numbers["WORLD_SIZE"]),
        local_rank=int(numbers["LOCAL_RANK"]),
        local_size=int(numbers["LOCAL_WORLD_SIZE"]),
    )
    if not (ranks.rank < ranks.size and ranks.local_rank < ranks.local_size <= ranks.size):
        raise ValueError(
            f"RANK={ranks.rank} of WORLD_SIZE={ranks.size}, LOCAL_RANK={ranks.local_rank} of "
            f"LOCAL_WORLD_SIZE={ranks.local_size} cannot be: each rank must be below its "
            f"size, and the local size at most the whole size"
        )
    if dist.is_initialized():
        return ranks
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
            store=meeting_place(ranks),
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=PATIENCE,
        )
    except RuntimeError as error:  # the address is in use or unknown, or not all ranks came
        where = f"{present['MASTER_ADDR']}:{present['MASTER_PORT']}"
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"rank {ranks.rank} on {socket.gethostname()} could not meet the others at {where}: "
            f"{reason:.200}"
        ) from error
    if not ranks.is_main:
        sys.stdout = open(os.devnull, "w")  # so that the ranks do not all print the same
    return ranks


def meeting_place(ranks: Ranks) -> dist.Store:
    """A store in which these ranks find each other's addresses, but no addresses of earlier ranks.

    torchrun keeps one store for all its restarts, so an old address of a dead rank may still be in
    it (https://github.com/pytorch/pytorch/issues/135712). Therefore the ranks agree on a new name:
    each rank asks under a name of its own, and main answers all of them with the common one.
    """
    store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
    name, end = uuid.uuid4().hex, time.monotonic() + PATIENCE.total_seconds()
    if not ranks.is_main:
        store.set(f"asks {ranks.rank}", name)
        name = store.get(name).decode()  # waits for the answer
        store.add(name, 1)
    while ranks.is_main and store.add(name, 0) < ranks.size - 1:
        for question in (f"asks {rank}" for rank in range(1, ranks.size)):
            if store.check([question]):
                store.set(store.get(question).decode(), name)
        if time.monotonic() > end:
            raise RuntimeError("not all ranks came")
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def limit_waits(device: str, patience: timedelta) -> None:
    """From here on, an exchange between the ranks' devices of this kind fails after `patience`."""
    backend = dist.group.WORLD._get_backend(torch.device(device))
    backend._set_default_timeout(patience)  # PyTorch has no public way for one kind alone


def exit_with(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Ends the process with the exit code of main(argv).

    With several ranks it skips Python's own shutdown. In a shutdown gloo's threads may still hold
    tensors, and one process in ten aborted (https://github.com/pytorch/pytorch/pull/179291).
    """
    try:
        code = run_command(main, argv)
    except BaseException as error:
        code, lost = 1, LOST_RANK.search(str(error))
        if not dist.is_initialized():
            raise
        if not lost:
            traceback.print_exc()
        elif os.environ["LOCAL_RANK"] == "0":  # one line for each machine
            print(
                f"error: another rank has gone or does not answer ({lost[lost.lastgroup]}); "
                f"resume=auto goes on from the last checkpoint",
                file=sys.stderr,
            )
    if not dist.is_initialized():
        sys.exit(code)
    os._exit(code)
