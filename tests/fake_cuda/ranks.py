"""What eight ranks compile and send, without the other seven: python -m fake_cuda.ranks WAY ...

PyTorch's own process group `fake` answers for them. Everything is on the CPU: what is sent does not
depend on the device. The graphs are counted and run as they are, so nothing is compiled.
"""

import json
import sys
from collections import Counter

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from run.ranks import Ranks
from run.setup import build, open_data, read_config, resolve

RANKS = Ranks(rank=0, size=8, local_rank=0, local_size=8)


class Sent(TorchDispatchMode):
    """Counts the bytes of what is handed over to each kind of exchange between the ranks: of the
    whole tensor, not of the part that one rank has of it."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::")
            sizes = [t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.bytes[kind] += max(sizes)  # an exchange has the whole and a part as arguments
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))

    def bucket(self, _, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Stands for DDP's own exchange of a bucket of gradients, which no mode sees."""
        self.bytes["bucket"] += bucket.buffer().nbytes
        self.calls["bucket"] += 1
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


def step(preset: str, *knobs: str) -> dict:
    """One training step on rank 0 of 8, of two micro-batches: its graphs, and what it sends."""
    config = read_config([preset, "device=cpu", *knobs])
    data = open_data(config)
    config = resolve(config, "cpu", data, None, RANKS)
    graphs = []
    compile = torch.compile
    torch.compile = lambda function, **kwargs: compile(
        function, backend=lambda graph, inputs: graphs.append(len(graph.graph.nodes)) or graph
    )
    run = build(config, data, {"weights": None, "saved": None, "base": {}}, RANKS)
    sent = Sent()
    if config.parallel == "ddp":
        run.forward.register_comm_hook(None, sent.bucket)
    train.accumulate_gradients(run)  # compiles, and DDP arranges its buckets
    sent.bytes.clear(), sent.calls.clear()
    with sent:  # in which nothing would be compiled
        train.accumulate_gradients(run)
    return {"graphs": len(graphs), "bytes": dict(sent.bytes), "calls": dict(sent.calls)}


if __name__ == "__main__":
    dist.init_process_group("fake", rank=0, world_size=RANKS.size, store=FakeStore())
    print(json.dumps(step(*sys.argv[1:])))
