"""One model on several ranks, by PyTorch's own engines. They are put around the model from outside,
so the model knows nothing of ranks.

ddp: every rank has all weights, and gradients are averaged while backward runs (Li et al. 2020,
arXiv 2006.15704).

fsdp: every rank has some rows of each matrix, with their gradient and moments. A Block's matrices
are whole only while the Block computes (FSDP2, Zhao et al. 2023, arXiv 2304.11277). The parameters
of norms and adapters are few. They stay whole on every rank and in fp32, so that a norm computes
the same on eight devices as on one.

Reading order: building the model; what a step needs; moving tensors between one file and the parts
of many ranks; Muon on several ranks.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config.schema import Config
from model import Decoder, Scale, initial_weights, rope_table
from norm import Norm
from run.optim import Muon
from run.ranks import Ranks
from weights.checkpoint import check_weights, load_weights
from weights.lora import LoRALinear, add_adapters, draw_adapters


def uses_fsdp(config: Config, ranks: Ranks) -> bool:
    return config.parallel == "fsdp" and ranks.size > 1


def is_part(tensor: Tensor) -> bool:
    """Whether this rank has only its rows of the tensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # This import takes half a second, so a process that is alone must not reach it.
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def refuse_what_fsdp_cannot(config: Config, ranks: Ranks) -> None:
    """ValueError if the run wants something that fsdp does not support."""
    if not uses_fsdp(config, ranks):
        return
    if config.watch:
        raise ValueError(
            "watch=true needs whole matrices on a device, but parallel=fsdp shares them: use "
            "parallel=ddp"
        )
    if config.dtype == "float16":
        raise ValueError(
            "dtype=float16 is not supported with parallel=fsdp: use parallel=ddp, or dtype=bfloat16"
        )


def build_on_ranks(config: Config, ranks: Ranks, seed: int | None) -> Decoder:
    """The model of a run, with its adapters, on its device. `seed` draws the weights. With
    seed=None they are left without numbers, for those of a checkpoint.

    With fsdp, no rank holds more than its part and one whole matrix at any time.
    """
    shared = uses_fsdp(config, ranks)
    with torch.device("meta") if shared else nullcontext():
        model = Decoder(config.model, seed=None if shared else seed)
    if config.lora_rank:
        add_adapters(model, config.lora_rank, config.lora_alpha, config.seed)
    model.activation_checkpointing = config.activation_checkpointing
    model.stream_dtype = getattr(torch, config.stream_dtype)
    if not shared:
        return model.to(config.device)

    apply_fsdp(model, config, ranks)
    model.to_empty(device=config.device)
    for module in model.modules():
        if isinstance(module, (Norm, Scale)):
            module.reset_parameters()
    model.cos, model.sin = (table.to(config.device) for table in rope_table(config.model))
    if config.lora_rank:
        draw_adapters(model, config.seed)
    if seed is not None:
        for parameter, drawn in initial_weights(model, seed):
            copy_own_part(parameter, drawn)
    return model


def apply_fsdp(model: Decoder, config: Config, ranks: Ranks) -> None:
    """Puts FSDP2 around each Block and around the model.

    A Block's matrices are gathered in the dtype of their products. The embedding and the head must
    stay exact, so they are gathered in fp32. Gradients are averaged in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(config.device).type, (ranks.size,))
    narrow = None if config.dtype == "float32" else getattr(torch, config.dtype)
    whole: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, (Norm, Scale)):
            whole |= set(module.parameters())
        if isinstance(module, LoRALinear):
            whole |= {module.lora_a, module.lora_b}
    for part, dtype in [*((block, narrow) for block in model.blocks), (model, None)]:
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=whole)


def wrap(model: Decoder, config: Config, ranks: Ranks) -> nn.Module:
    """What a step calls: the model, compiled if config.compile says so, and with DDP around it if
    there are several ranks with ddp.

    On several ranks the Blocks and the loss are compiled one by one, so that the ranks can exchange
    gradients while the rest of backward runs.
    """
    if ranks.size == 1:
        return torch.compile(model, dynamic=False) if config.compile else model
    if config.compile:
        for part, name in compiled_alone(model):
            setattr(part, name, torch.compile(getattr(part, name), dynamic=False))
        # Else a Block would be cut again where its gradients fill one of DDP's buckets.
        torch._dynamo.config.optimize_ddp = False
    if config.parallel == "fsdp":
        return model
    ddp = nn.parallel.DistributedDataParallel
    equal_on_all = [name for name, _ in model.named_buffers()]
    ddp._set_params_and_buffers_to_ignore_for_model(model, equal_on_all)
    return ddp(model, gradient_as_bucket_view=True)


def compiled_alone(model: Decoder) -> list[tuple[nn.Module, str]]:
    """Each part of the model that several ranks compile by itself, and its method."""
    return [*((block, "forward") for block in model.blocks), (model, "loss")]


@contextmanager
def uncompiled(model: Decoder) -> Iterator[Decoder]:
    """A context in which the parts that `wrap` compiled in place run as they are written: the
    compiled code is for the shapes of a training batch alone."""
    places = [(part, name) for part, name in compiled_alone(model) if name in vars(part)]
    compiled = [(part, name, vars(part).pop(name)) for part, name in places]
    try:
        yield model
    finally:
        for part, name, function in compiled:
            setattr(part, name, function)


# What a step needs.


def average_gradients_in_backward(forward: nn.Module, now: bool) -> None:
    """Called before each micro-batch. DDP averages gradients over the ranks only if `now` is true,
    which it is for the last micro-batch of a step.

    FSDP averages after every micro-batch, because to wait it would have to hold the whole gradient.
    """
    if isinstance(forward, nn.parallel.DistributedDataParallel):
        forward.require_backward_grad_sync = now


def average_what_fsdp_skips(model: Decoder, config: Config, ranks: Ranks) -> None:
    """Averages over the ranks what FSDP leaves alone: the gradients of norms and adapters."""
    if not uses_fsdp(config, ranks):
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None and not is_part(p)]
    if gradients:
        together = ranks.mean_(torch.cat([g.flatten() for g in gradients]))
        means = together.split([g.numel() for g in gradients])
        means = [mean.view_as(g) for mean, g in zip(means, gradients, strict=True)]
        torch._foreach_copy_(gradients, means)


def free_gathered_weights(model: Decoder, config: Config, ranks: Ranks) -> None:
    """Called after an evaluation: FSDP keeps embedding and head whole until a backward comes."""
    if uses_fsdp(config, ranks):
        model.reshard()


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scales the whole gradient down to the norm `limit`; 0 = no limit. Returns the norm before, a
    scalar on the gradient's device."""
    parts, wholes = [], []
    for parameter in parameters:
        if parameter.grad is not None:
            (parts if is_part(parameter) else wholes).append(parameter)
    groups = [group for group in (parts, wholes) if group]
    norms = [nn.utils.get_total_norm([p.grad for p in group]) for group in groups]
    norms = [norm.full_tensor() if is_part(norm) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if limit:
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, limit, total)
    return total


# Between one whole tensor and the parts of many ranks.


@torch.no_grad()
def copy_own_part(parameter: Tensor, whole: Tensor) -> None:
    """Copies this rank's part of `whole`, which every rank has, into the parameter."""
    copy_from_whole(parameter, whole, all_have_it=True)


@torch.no_grad()
def copy_from_whole(target: Tensor, whole: Tensor, all_have_it: bool = False) -> None:
    """Copies `whole`, or this rank's part of it if `target` is a part. Main has the numbers of
    `whole`; the other ranks only need its shape, unless all_have_it says that they have them, too.
    """
    if not is_part(target):
        if not whole.is_meta:
            target.copy_(whole)
        dist.broadcast(target, 0)
        return
    from torch.distributed.tensor import distribute_tensor

    whole = torch.empty(whole.shape, device=target.device) if whole.is_meta else whole.to(target)
    mesh, placements = target.device_mesh, target.placements
    source = None if all_have_it else 0
    target.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=source))


def gather_on_main(tree: Any, ranks: Ranks) -> Any:
    """Copies nested dicts. A tensor of which each rank has a part becomes the whole tensor, on the
    CPU of main, and a tensor without data on the other ranks. Other values stay."""
    if isinstance(tree, dict):
        return {name: gather_on_main(value, ranks) for name, value in tree.items()}
    if not is_part(tree):
        return tree
    whole = tree.full_tensor()
    return whole.cpu() if ranks.is_main else whole.to("meta")


def shapes_only(tree: Any) -> Any:
    """Copies nested dicts. Tensors keep only shape and dtype, so the copy is small to send."""
    if isinstance(tree, dict):
        return {name: shapes_only(value) for name, value in tree.items()}
    return tree.to("meta") if isinstance(tree, Tensor) else tree


def put_weights(
    model: Decoder, weights: dict[str, Tensor], ranks: Ranks, frozen: bool = False
) -> None:
    """Like checkpoint.load_weights, but puts main's `weights` into the model of every rank. The
    `weights` of the other ranks need no data."""
    if ranks.size == 1:
        load_weights(model, weights, frozen)
        return
    for name, parameter in check_weights(model, weights, frozen).items():
        copy_from_whole(parameter.detach(), weights[name])


def spread_optimizer_state(
    saved: dict[str, dict[str, Tensor]], model: Decoder, ranks: Ranks
) -> dict[str, dict[str, Tensor]]:
    """This rank's part of the optimizer's state that main has in `saved`. The tensors in `saved` of
    the other ranks need no data."""
    if ranks.size == 1:
        return saved
    result = empty_optimizer_state(saved, model)
    for name, state in result.items():
        for key, target in state.items():
            copy_from_whole(target, saved[name][key])
    return result


def empty_optimizer_state(
    saved: dict[str, dict[str, Tensor]], model: Decoder
) -> dict[str, dict[str, Tensor]]:
    """Zeros to read an optimizer's state into, each with the layout of its parameter on this rank.
    ValueError if the model lacks a parameter that `saved` names."""
    own = dict(model.named_parameters())
    if surplus := sorted(saved.keys() - own.keys()):
        raise ValueError(f"the optimizer's state does not fit the model, which has no {surplus[0]}")
    result: dict[str, dict[str, Tensor]] = {}
    for name, state in saved.items():
        result[name] = {}
        for key, value in state.items():  # AdamW also counts its steps, in a scalar
            like = torch.zeros_like(own[name], requires_grad=False)
            result[name][key] = like if value.ndim else torch.zeros(())
    return result


# Muon on several ranks.


def muon_class(config: Config, ranks: Ranks) -> type[Muon]:
    if ranks.size == 1:
        return Muon
    return FSDPMuon if config.parallel == "fsdp" else DDPMuon


class DistributedMuon(Muon):
    """Muon that gives each rank some of the matrices, so that all ranks work at the same time."""

    def matrices_at_once(self, elements: int) -> int:
        return dist.get_world_size() * super().matrices_at_once(elements)


class DDPMuon(DistributedMuon):
    """Every rank has every matrix. Each rank orthogonalises its share of the momenta and sends the
    results to all ranks."""

    def orthogonal_directions(self, momenta: list[Tensor]) -> list[Tensor]:
        rank, size = dist.get_rank(), dist.get_world_size()
        mine = momenta[rank::size]
        ready = super().orthogonal_directions(mine) if mine else []
        shapes = [[t.shape for t in momenta[r::size]] for r in range(size)]
        received = exchange_matrices([ready] * size, shapes, momenta[0])
        return [received[i % size][i // size] for i in range(len(momenta))]


class FSDPMuon(DistributedMuon):
    """Every rank has some rows of every matrix. For each matrix, one rank gathers the rows of the
    momentum, orthogonalises it, and sends the rows back."""

    def orthogonal_directions(self, momenta: list[Tensor]) -> list[Tensor]:
        rank, size = dist.get_rank(), dist.get_world_size()
        parts = [t.to_local() for t in momenta]
        mine = momenta[rank::size]

        # Send the parts of each matrix to the rank that works on it.
        shapes = [[rows_of_rank(t, r) for t in mine] for r in range(size)]
        received = exchange_matrices([parts[r::size] for r in range(size)], shapes, parts[0])
        wholes = [torch.cat(rows) for rows in zip(*received, strict=True)]
        ready = super().orthogonal_directions(wholes) if mine else []

        # Send the rows of each result back.
        heights = [[rows_of_rank(t, r)[0] for r in range(size)] for t in mine]
        rows = [whole.split(h) for whole, h in zip(ready, heights, strict=True)]
        shapes = [[part.shape for part in parts[r::size]] for r in range(size)]
        to_ranks = [[of_matrix[r] for of_matrix in rows] for r in range(size)]
        received = exchange_matrices(to_ranks, shapes, parts[0])
        return [as_dtensor(received[i % size][i // size], t) for i, t in enumerate(momenta)]


def rows_of_rank(tensor: Tensor, rank: int) -> tuple[int, int]:
    """The shape of a rank's part of a matrix. All ranks have the same number of rows, but the last
    ones may have fewer or none."""
    most = -(-tensor.shape[0] // dist.get_world_size())
    return max(0, min(most, tensor.shape[0] - rank * most)), tensor.shape[1]


def exchange_matrices(
    to_ranks: list[list[Tensor]], from_ranks: list[list[tuple[int, int]]], like: Tensor
) -> list[list[Tensor]]:
    """Sends the matrices to_ranks[r] to rank r. Returns, for each rank r, the matrices that came
    from it: their shapes are from_ranks[r], their dtype and device are those of `like`."""
    sent = [torch.cat([like.new_empty(0), *(t.flatten() for t in some)]) for some in to_ranks]
    sizes = [sum(rows * cols for rows, cols in shapes) for shapes in from_ranks]
    received = like.new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(sent), sizes, [t.numel() for t in sent])
    result = []
    for block, shapes in zip(received.split(sizes), from_ranks, strict=True):
        flat = block.split([rows * cols for rows, cols in shapes])
        result.append([t.view(shape) for t, shape in zip(flat, shapes, strict=True)])
    return result


def as_dtensor(rows: Tensor, like: Tensor) -> Tensor:
    """This rank's rows as its part of a whole tensor with the shape and layout of `like`."""
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(
        rows, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )
