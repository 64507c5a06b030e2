"""One model on all ranks, by PyTorch's own engines, put around it from outside: the model knows nothing of ranks.

ddp: every rank has all weights, and gradients are averaged while backward runs (Li et al. 2020, arXiv 2006.15704).
fsdp: every rank has its rows of each matrix, with their gradient and moments, and a Block's matrices are whole only
while it works (FSDP2, Zhao et al. 2023, arXiv 2304.11277). What norms and adapters learn is little: it stays whole on
every rank and in fp32, so that sharing does not change what a norm computes.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint import check_weights, load_weights
from config.schema import Config
from lora import LoRALinear, add_adapters, draw_adapters
from model import Decoder, Scale, initialise, rope_table
from norm import Norm
from optim import Muon
from world import World


def is_shared(config: Config, world: World) -> bool:
    return config.parallel == "fsdp" and world.size > 1


def is_part(tensor: Tensor) -> bool:
    """Whether this rank has only its rows of the tensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # half a second, which one process alone need not wait

    return isinstance(tensor, DTensor)


def check_shared(config: Config, world: World) -> None:
    """ValueError if the run wants what needs whole matrices."""
    if is_shared(config, world) and (config.watch or config.dtype == "float16"):
        raise ValueError(f"{'watch=true' if config.watch else 'dtype=float16'} needs whole matrices on a device, but "
                         f"parallel=fsdp shares them: use parallel=ddp{'' if config.watch else ', or dtype=bfloat16'}")


def build_on_ranks(config: Config, world: World, seed: int | None) -> Decoder:
    """The model of a run on its device, adapters too, with the weights of `seed`; None: with none yet.

    Of a shared one no rank ever has more than its part and one matrix.
    """
    shared = is_shared(config, world)
    with torch.device("meta") if shared else nullcontext():
        model = Decoder(config.model, seed=None if shared else seed)
    if config.lora_rank:
        add_adapters(model, config.lora_rank, config.lora_alpha, config.seed)
    model.activation_checkpointing = config.activation_checkpointing
    if not shared:
        return model.to(config.device)
    shard(model, config, world)
    model.to_empty(device=config.device)
    for module in model.modules():
        if isinstance(module, (Norm, Scale)):
            module.reset_parameters()
    model.cos, model.sin = (table.to(config.device) for table in rope_table(config.model))
    if config.lora_rank:
        draw_adapters(model, config.seed)
    if seed is not None:
        initialise(model, seed, fill)
    return model


def shard(model: Decoder, config: Config, world: World) -> None:
    """Puts FSDP2 around each Block and the whole. Blocks are gathered in the dtype of their products, the embedding and
    the head, which may not, in fp32; gradients are averaged in fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(config.device).type, (world.size,))
    narrow = None if config.dtype == "float32" else getattr(torch, config.dtype)
    whole = {p for module in model.modules() if isinstance(module, (Norm, Scale)) for p in module.parameters()}
    whole |= {p for module in model.modules() if isinstance(module, LoRALinear) for p in (module.lora_a, module.lora_b)}
    for part, dtype in (*((block, narrow) for block in model.blocks), (model, None)):
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=whole)


def wrap(model: Decoder, config: Config, world: World) -> nn.Module:
    """What a step calls: the model, compiled if that is wanted, and with DDP around it.

    With several ranks Blocks are compiled one by one, so that gradients travel while the rest of backward runs.
    """
    if world.size == 1:
        return torch.compile(model, dynamic=False) if config.compile else model
    for block in model.blocks if config.compile else ():
        block.forward = torch.compile(block.forward, dynamic=False)
    if config.parallel == "fsdp":
        return model
    wrapper = nn.parallel.DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(model, ["cos", "sin"])  # the same everywhere
    return wrapper(model, gradient_as_bucket_view=True)


def plain(model: Decoder) -> Decoder:
    """The model with its Blocks not compiled, which were so for one shape of batch."""
    for block in model.blocks:
        vars(block).pop("forward", None)
    return model


def accumulate(forward: nn.Module, last: bool) -> None:
    """Before each micro-batch: DDP averages the gradient once, with the last one. FSDP does each time: to wait, it
    would need memory for the whole gradient."""
    if isinstance(forward, nn.parallel.DistributedDataParallel):
        forward.require_backward_grad_sync = last


def finish_gradients(model: Decoder, config: Config, world: World) -> None:
    """Averages what FSDP was told to leave alone."""
    if is_shared(config, world):
        gradients = [p.grad for p in model.parameters() if p.grad is not None and not is_part(p)]
        if gradients:
            mean = world.mean_(torch.cat([g.flatten() for g in gradients])).split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(mean, gradients, strict=True)])


def release(model: Decoder, config: Config, world: World) -> None:
    """After a forward without backward: FSDP keeps embedding and head whole until one comes."""
    if is_shared(config, world):
        model.reshard()


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scales the gradient so that its norm is at most `limit` (0: does not), and returns the norm it had."""
    kinds: dict[bool, list[Tensor]] = {True: [], False: []}
    for p in parameters:
        if p.grad is not None:
            kinds[is_part(p)].append(p)
    found = [nn.utils.get_total_norm([p.grad for p in some]) for some in kinds.values() if some]
    total = torch.linalg.vector_norm(torch.stack([norm.full_tensor() if is_part(norm) else norm for norm in found]))
    for some in kinds.values() if limit else ():
        nn.utils.clip_grads_with_norm_(some, limit, total)
    return total


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Puts this rank's part of `whole`, which every rank has, into the parameter."""
    receive(parameter, whole, everywhere=True)


@torch.no_grad()
def receive(into: Tensor, whole: Tensor, everywhere: bool = False) -> None:
    """Puts main's `whole` into the tensor, or this rank's part of it; of the others' only the shape is looked at."""
    if not is_part(into):
        if not whole.is_meta:
            into.copy_(whole)
        dist.broadcast(into, 0)
        return
    from torch.distributed.tensor import distribute_tensor

    whole = torch.empty(whole.shape, device=into.device) if whole.is_meta else whole.to(into)
    into.copy_(distribute_tensor(whole, into.device_mesh, into.placements, src_data_rank=None if everywhere else 0))


def gathered(tree: Any, world: World) -> Any:
    """Nested dicts with each tensor that ranks have parts of whole on the CPU of main, and elsewhere without data."""
    if isinstance(tree, dict):
        return {name: gathered(value, world) for name, value in tree.items()}
    if not is_part(tree):
        return tree
    full = tree.full_tensor()
    return full.cpu() if world.is_main else full.to("meta")


def without_data(tree: Any) -> Any:
    """Nested dicts with each tensor reduced to its shape and dtype: small enough to be shared."""
    if isinstance(tree, dict):
        return {name: without_data(value) for name, value in tree.items()}
    return tree.to("meta") if isinstance(tree, Tensor) else tree


def put_weights(model: Decoder, weights: dict[str, Tensor], world: World, frozen: bool = False) -> None:
    """As checkpoint.load_weights; with ranks, `weights` are those of main, and elsewhere without data."""
    if world.size == 1:
        load_weights(model, weights, frozen)
        return
    for name, parameter in check_weights(model, weights, frozen).items():
        receive(parameter.detach(), weights[name])


def like_parameters(saved: dict[str, dict[str, Tensor]], model: Decoder, world: World) -> dict[str, dict[str, Tensor]]:
    """An optimizer's state, of which main has the data, as each rank holds it: as its parameters are."""
    if world.size == 1:
        return saved
    result = zeros_like_parameters(saved, model)
    for name, state in result.items():
        for key, into in state.items():
            receive(into, saved[name][key])
    return result


def zeros_like_parameters(saved: dict[str, dict[str, Tensor]], model: Decoder) -> dict[str, dict[str, Tensor]]:
    """Room for an optimizer's state, as each rank holds it. ValueError if it is for other parameters."""
    own = dict(model.named_parameters())
    if surplus := sorted(saved.keys() - own.keys()):
        raise ValueError(f"the optimizer's state does not fit the model, which has no {surplus[0]}")
    return {name: {key: torch.zeros_like(own[name], requires_grad=False) if value.ndim else torch.zeros(())
                   for key, value in state.items()} for name, state in saved.items()}


class DividedMuon(Muon):
    """Muon whose matrices the ranks divide among themselves."""

    def at_once(self, elements: int) -> int:
        return dist.get_world_size() * super().at_once(elements)


class CopiedMuon(DividedMuon):
    """Where each rank has every matrix: each makes its share of the momenta orthogonal and gives it to all."""

    def directions(self, ahead: list[Tensor]) -> list[Tensor]:
        rank, size = dist.get_rank(), dist.get_world_size()
        mine = ahead[rank::size]
        ready = super().directions(mine) if mine else []
        given = exchange([ready] * size, [[t.shape for t in ahead[r::size]] for r in range(size)], ahead[0])
        return [given[i % size][i // size] for i in range(len(ahead))]


class SharedMuon(DividedMuon):
    """Where each rank has some rows of every matrix: one rank gathers a matrix, makes its momentum orthogonal, and
    gives the rows back, so that all work at once and none does another's work."""

    def directions(self, ahead: list[Tensor]) -> list[Tensor]:
        rank, size = dist.get_rank(), dist.get_world_size()
        parts, mine = [t.to_local() for t in ahead], ahead[rank::size]
        came = exchange([parts[r::size] for r in range(size)], [[rows_of(t, r) for t in mine] for r in range(size)],
                        parts[0])
        ready = super().directions([torch.cat(rows) for rows in zip(*came, strict=True)]) if mine else []
        rows = [one.split([rows_of(t, r)[0] for r in range(size)]) for t, one in zip(mine, ready, strict=True)]
        given = exchange([[of_one[r] for of_one in rows] for r in range(size)],
                         [[part.shape for part in parts[r::size]] for r in range(size)], parts[0])
        return [as_part(given[i % size][i // size], t) for i, t in enumerate(ahead)]


def rows_of(tensor: Tensor, rank: int) -> tuple[int, int]:
    """The shape of a rank's part of a matrix: equal numbers of rows, but for the last that have any."""
    most = -(-tensor.shape[0] // dist.get_world_size())
    return max(0, min(most, tensor.shape[0] - rank * most)), tensor.shape[1]


def exchange(to_ranks: list[list[Tensor]], from_ranks: list[list[tuple[int, int]]], like: Tensor) -> list[list[Tensor]]:
    """Sends the tensors of to_ranks[r] to rank r; returns those that come, which have the shapes from_ranks and are
    otherwise `like` this one."""
    sent = [torch.cat([like.new_empty(0), *(t.flatten() for t in some)]) for some in to_ranks]
    sizes = [sum(rows * cols for rows, cols in shapes) for shapes in from_ranks]
    came = like.new_empty(sum(sizes))
    dist.all_to_all_single(came, torch.cat(sent), sizes, [t.numel() for t in sent])
    return [[t.view(shape) for t, shape in zip(block.split([r * c for r, c in shapes]), shapes, strict=True)]
            for block, shapes in zip(came.split(sizes), from_ranks, strict=True)]


def as_part(rows: Tensor, like: Tensor) -> Tensor:
    """A rank's rows as the part of a whole tensor, laid out as `like`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=like.shape,
                              stride=like.stride())


def muon_for(config: Config, world: World) -> type[Muon]:
    """Muon that divides its work among the ranks, if there are several."""
    if world.size == 1:
        return Muon
    return SharedMuon if config.parallel == "fsdp" else CopiedMuon
