"""What eight ranks compile and send, without the other seven: python -m fake_ranks KNOBS ...

PyTorch's own process group `fake` answers for them. Everything is on the CPU: what is sent does not
depend on the device. The graphs are counted and run as they are, so nothing is compiled.
"""

import json
import sys
from collections import Counter
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from run.ranks import Ranks
from run.setup import build, open_data, read_config, resolve

NEW = {"weights": None, "saved": None, "base": {}}  # what a run begins with that has no checkpoint
RANKS = Ranks(rank=0, size=8, local_rank=0, local_size=8)


class Sent(TorchDispatchMode):
    """Counts the bytes of what is handed over to each kind of exchange between the ranks: of the
    whole tensor, not of the part that one rank has of it."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::")
            sizes = [t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.bytes[kind] += max(sizes)  # an exchange has the whole and a part as arguments
        return func(*args, **(kwargs or {}))

    def bucket(self, _, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Stands for DDP's own exchange of a bucket of gradients, which no mode sees."""
        self.bytes["bucket"] += bucket.buffer().nbytes
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


def step(parallel: str, *knobs: str) -> dict:
    """One training step on rank 0 of 8: how many graphs it compiles, and what it sends."""
    torch._dynamo.reset()
    config = read_config([*knobs, "device=cpu", "compile=true", f"parallel={parallel}"])
    data, graphs, sent = open_data(config), [], Sent()
    config = resolve(config, "cpu", data, None, RANKS)
    with patch("torch.compile", partial(torch.compile, backend=counting(graphs))):
        run = build(config, data, NEW, RANKS)
    if parallel == "ddp":
        run.forward.register_comm_hook(None, sent.bucket)
    train.accumulate_gradients(run)  # compiles; and DDP arranges its buckets
    sent.bytes.clear()
    with sent:  # in which nothing would be compiled
        train.accumulate_gradients(run)
    sizes = {"whole": 0, "norms": 0, "ends": 0}
    for name, parameter in run.model.named_parameters():
        sizes["whole"] += parameter.numel()
        sizes["norms"] += parameter.numel() if parameter.ndim == 1 else 0
        sizes["ends"] += parameter.numel() if name.startswith(("embed", "head")) else 0
    return {"graphs": len(graphs), "sent": dict(sent.bytes), "parameters": sizes}


def counting(graphs: list):
    """A backend for torch.compile that notes each graph and leaves it as it is."""

    def backend(graph: torch.fx.GraphModule, inputs: list):
        graphs.append(graph)
        return graph

    return backend


if __name__ == "__main__":
    dist.init_process_group("fake", rank=0, world_size=RANKS.size, store=FakeStore())
    print(json.dumps([step(parallel, *sys.argv[1:]) for parallel in ("ddp", "fsdp")]))
