"""One training run: checked before anything is created, then built, at its first step or at the saved one."""

import dataclasses
import hashlib
import json
import math
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import checkpoint
import sharded
from config.schema import UNDECIDED, Config, as_place, load_config
from cost import fit_to_machine, parameter_count
from data.corpus import open_corpus
from data.loader import DATA, Dataset, open_dataset, train_starts, val_starts
from data.prepare import prepare
from data.tokenizer import tokenizer_file, tokenizer_sha256
from device import choose_device, choose_dtype, keep_freed_memory, versions
from metrics import read_metrics
from model import Decoder
from optim import Optimizers
from parallel import (
    build_on_ranks,
    check_shared,
    like_parameters,
    muon_for,
    put_weights,
    without_data,
    wrap,
    zeros_like_parameters,
)
from weights import Weights, inherited, is_hf, open_base, open_weights
from world import ALONE, World


@dataclass
class Run:
    """The parts of one training run. `model` is the plain module; `forward` is it or its compiled twin."""

    config: Config  # resolved: nothing is auto any more
    data: Dataset
    model: Decoder
    forward: nn.Module
    optimizers: Optimizers
    scaler: torch.amp.GradScaler
    world: World = ALONE
    step: int = 0  # optimizer steps done
    restored: bool = False  # from its newest checkpoint
    updated: bool = False  # since then: an update has begun, whole or not
    best_val_loss: float = math.inf
    base: dict[str, Any] = field(default_factory=dict)  # of adapters: path and checksum of the weights they are for
    grad_norms: list[float] = field(default_factory=list)  # of the last steps, to know a spike by

    @property
    def folder(self) -> Path:
        return Path(self.config.out_dir)


def read_config(argv: list[str]) -> Config:
    """The checked Config of a command line; with init_from, the model is that of the weights to begin with."""
    return load_config(argv, inherited)


def set_up(wanted: Config, world: World = ALONE) -> Run:
    """Checks everything, prepares a text that is not a data set yet, builds or restores the run.

    Main reads and decides; the others are told, and need only the data set on their own disk.
    """
    device = world.everywhere(choose_device, wanted.device, world.local_rank, world.local_size)
    config, data, begin = world.main(decide, wanted, device, world) or (None, None, None)
    config, folder, fingerprint, outline = world.share(
        data and (config, data.folder, data.fingerprint, without_data(begin)))
    data = world.everywhere(lambda: data or open_same(folder, fingerprint))
    return build(dataclasses.replace(config, device=device), data, begin or outline, world)


def decide(wanted: Config, device: str, world: World) -> tuple[Config, Dataset, dict[str, Any]]:
    """The configuration with nothing left open, the data, and what to begin with: `weights` of init_from or None, a
    checkpoint `saved` or None, and of what they are adapters or a continuation, `base`."""
    saved = find_saved(wanted)
    config = dataclasses.replace(wanted, device=device, dtype=choose_dtype(wanted.dtype, device))
    start = find_start(config, saved)
    tokenizer = Path(config.out_dir) if saved else start.folder if start else None
    data = open_dataset(find_dataset(config.dataset, tokenizer if config.init_from else None))
    config = fit_to_data(config, data, start)
    config = keep_what_was_automatic(config, wanted, saved, world)
    config = fit_to_machine(config, world.size, world.local_size)
    check_shared(config, world)
    if saved:
        for line in checkpoint.compare_with_run(saved, config.flat(), data.fingerprint):
            print(f"resuming with {line}")
    return config, data, {"saved": saved, "weights": start and start.tensors, "base": base_of(config, saved, start)}


def base_of(config: Config, saved: dict[str, Any] | None, start: Weights | None) -> dict[str, Any]:
    """What a run's checkpoints say of the weights that it began with."""
    base = ({"context": start.context} if start else {}) | (saved["base"] if saved else {})
    if config.lora_rank:
        path = os.path.relpath(start.place.resolve(), Path(config.out_dir).resolve())  # so that both can move together
        base |= {"path": path, "checksum": start.checksum()}
    return base


def open_same(folder: Path, fingerprint: dict[str, Any]) -> Dataset:
    """The data set in this rank's folder; ValueError if it is not the one with this fingerprint, which rank 0 has."""
    data = open_dataset(folder)
    if data.fingerprint != fingerprint:
        raise ValueError(f"{data.folder} on {socket.gethostname()} is not the data set that rank 0 has there: copy it")
    return data


def find_saved(config: Config) -> dict[str, Any] | None:
    """The checkpoint to continue from, or None for a fresh run; a fresh run never overwrites another."""
    folder = Path(config.out_dir)
    there = checkpoint.all_in(folder)
    if is_hf(folder):
        raise ValueError(f"out_dir={folder} is a Hugging Face folder, whose files would be lost: name another")
    best = [*folder.glob("best.pt"), *folder.glob("best_*.shards")]
    saved_before = config.save_interval and any(r["step"] > config.save_interval for r in read_metrics(folder))
    if best and not there and saved_before:
        raise ValueError(f"{folder} has {best[0].name} but no checkpoint to go on from any more: name another out_dir; "
                         f"init_from={best[0]} begins with these weights there")
    if config.resume == "no" and (there or best):
        newest = there[-1][1].name if there else best[0].name
        raise ValueError(f"{folder} already holds a run ({newest}): train.py {as_place(folder)} goes on with it, "
                         f"another out_dir begins another")
    if not there and config.resume == "yes":
        raise ValueError(f"resume=yes, but there is no checkpoint in {folder}: resume=auto would start afresh")
    return checkpoint.load_newest(folder, sharded.load) if there else None


def find_start(config: Config, saved: dict[str, Any] | None) -> Weights | None:
    """The weights to begin with, if init_from names some. A resumed run has its own; adapters alone need them again."""
    if not config.init_from or (saved and not (config.lora_rank and "path" in saved["base"])):
        return None
    if saved:
        file = checkpoint.path_of(Path(config.out_dir), saved["step"])
        return open_base(saved["base"], file, moved=Path(config.init_from))
    start = open_weights(Path(config.init_from))
    for name in checkpoint.ARCHITECTURE:
        if name not in UNDECIDED and getattr(start.config, name) != getattr(config.model, name):
            raise ValueError(f"{start.folder / 'config.json'} says {name}={getattr(config.model, name)}, but the "
                             f"weights there have {getattr(start.config, name)}: one of the two is not from this run")
    return start


def find_dataset(name: str, tokenizer: Path | None) -> Path:
    """The folder of the data set. A text in its place is prepared first, with the tokenizer in a folder or one of its
    own, under a name that has a hash of both: so once, and again if either is another."""
    folder, text = DATA / Path(name).name, Path(name)
    if (text / "meta.json").is_file():  # a data set by its path
        return text
    if "/" not in name and (folder.exists() or not text.is_file()):
        if tokenizer is not None and not folder.exists():
            raise ValueError(f"{folder}: no such data set; name your text itself as dataset, or make one with: python "
                             f"data/prepare.py TEXT name={folder.name} tokenizer={tokenizer}")
        if name == "python" and not folder.exists():
            print("data/python is not there yet: preparing it from this Python's standard library")
            prepare(["python"], folder)
        return folder
    if not text.exists():
        raise ValueError(f"dataset={name} does not exist: name a folder under data/, or a text")
    digest = hashlib.sha256(b"" if tokenizer is None else tokenizer_sha256(tokenizer).encode())
    for piece in open_corpus([name]).pieces():
        digest.update(f"{piece.split} {piece.start} {len(piece.text)} ".encode() + piece.text.encode())
    folder = DATA / f"{text.resolve().stem.lstrip('.')}-{digest.hexdigest()[:8]}"
    if not folder.exists():
        print(f"preparing {name} as data/{folder.name}")
        try:
            prepare([name], folder, tokenizer and str(tokenizer))
        except OSError:
            if not (folder / "meta.json").is_file():  # else another process was faster, with the same
                raise
    return folder


def fit_to_data(config: Config, data: Dataset, start: Weights | None) -> Config:
    """vocab_size 0 becomes the tokenizer's, a larger one pads, a smaller one is refused. Short splits are refused, and
    tokens that mean something else to the weights to begin with."""
    if start is not None and start.data["tokenizer_sha256"] != data.meta["tokenizer_sha256"]:
        raise ValueError(f"{data.folder} was not made with the tokenizer of {start.folder}: python data/prepare.py "
                         f"TEXT tokenizer={start.folder} name=NAME makes one that is, and so does dataset=TEXT")
    vocab, wanted = data.meta["vocab_size"], config.model.vocab_size
    if 0 < wanted < vocab:
        raise ValueError(f"vocab_size={wanted} is below the {vocab} tokens of data/{config.dataset}: "
                         f"leave it 0 (automatic) or choose a larger one")
    train_starts(len(data.train), config.model.block_size, config.batch_size, config.seed, step=0)
    val_starts(len(data.val), config.model.block_size, config.eval_iters)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=wanted or vocab))


def keep_what_was_automatic(config: Config, wanted: Config, saved: dict[str, Any] | None, world: World) -> Config:
    """On the same device a resumed run keeps what auto chose at its start, so that it stays bitwise the same run."""
    before = dict(saved["config"]) if saved else {}
    if before.get("device") != config.device:
        return config
    if "micro_batch_size" in before and config.batch_size % (world.size * before["micro_batch_size"]):
        del before["micro_batch_size"]  # it began on fewer ranks
    if wanted.dtype == "auto":
        choose_dtype(before.get("dtype", "auto"), config.device)  # refuses it where the device is now an older one
    automatic = [name for name in ("dtype", "compile", "micro_batch_size") if getattr(wanted, name) in ("auto", 0)]
    return dataclasses.replace(config, **{name: before[name] for name in automatic if name in before})


def build(config: Config, data: Dataset, begin: dict[str, Any], world: World = ALONE) -> Run:
    """Model, optimizers and scaler, at their first step or at the saved one."""
    if config.device.startswith("cuda"):
        torch.cuda.set_device(config.device)
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
    elif config.device == "cpu":
        keep_freed_memory()
    weights, saved = begin["weights"], begin["saved"]
    model = build_on_ranks(config, world, seed=None if weights or saved else config.seed)
    if weights:
        put_weights(model, weights, world, frozen=bool(config.lora_rank))
    if saved and "shards" not in saved:
        put_weights(model, saved["model"], world)
    optimizers = Optimizers(model, optimizer=config.optimizer, weight_decay=config.weight_decay,
                            betas=(config.beta1, config.beta2), momentum=config.muon_momentum,
                            embed_lr=config.embed_lr, muon=muon_for(config, world))
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.dtype == "float16")
    run = Run(config, data, model, wrap(model, config, world), optimizers, scaler, world, base=begin["base"])
    if saved:
        optimizers.load_state_dict(restore(saved, model) if "shards" in saved else
                                   like_parameters(saved["optimizer"], model, world))
        if saved["scaler"]:  # empty if the run was not in float16 so far
            scaler.load_state_dict(saved["scaler"])
        run.step, run.grad_norms, run.restored = saved["step"], saved["grad_norms"], True
        if saved["config"]["eval_iters"] == config.eval_iters:  # else it is the loss of other windows
            run.best_val_loss = saved["best_val_loss"]
    return run


def restore(saved: dict[str, Any], model: Decoder) -> dict[str, dict[str, torch.Tensor]]:
    """Reads a checkpoint in parts into the model, each rank what it needs; returns the optimizer's state."""
    weights = {name: p.detach() for name, p in checkpoint.check_weights(model, saved["model"], frozen=False).items()}
    moments = zeros_like_parameters(saved["optimizer"], model)
    sharded.read_into({"model": weights, "optimizer": moments}, Path(saved["shards"]))
    return moments


def claim_folder(run: Run) -> None:
    """Puts config.json and the tokenizer into out_dir, which also proves that it can be written."""
    run.folder.mkdir(exist_ok=True)  # it is there, but may vanish while the run goes on
    about = {"versions": versions(), "parameters": parameter_count(run.config.model), "data": run.data.fingerprint}
    text = json.dumps(run.config.flat() | about, indent=1) + "\n"
    tokenizer = tokenizer_file(run.data.folder)
    for name, content in (("config.json", text.encode()), (tokenizer.name, tokenizer.read_bytes())):
        checkpoint.write_atomically(run.folder / name, lambda file, content=content: file.write(content))
