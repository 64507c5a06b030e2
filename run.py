"""One training run: checked before anything is created, then built, at its first step or at the saved one."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import checkpoint
from config.schema import Config
from cost import fit_to_machine, parameter_count
from data.loader import Dataset, open_dataset, train_starts, val_starts
from data.prepare import prepare
from data.tokenizer import tokenizer_file
from device import choose_device, choose_dtype, keep_freed_memory, versions
from model import Decoder
from optim import Optimizers

DATA = Path(__file__).resolve().parent / "data"


@dataclass
class Run:
    """The parts of one training run. `model` is the plain module; `forward` is it or its compiled twin."""

    config: Config  # resolved: nothing is auto any more
    data: Dataset
    model: Decoder
    forward: nn.Module
    optimizers: Optimizers
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps done
    best_val_loss: float = math.inf
    grad_norms: list[float] = field(default_factory=list)  # of the last steps, to know a spike by

    @property
    def folder(self) -> Path:
        return Path(self.config.out_dir)


def set_up(wanted: Config) -> Run:
    """Checks everything, prepares the embedded data set if it is missing, builds or restores the run."""
    saved = find_saved(wanted)
    device = choose_device(wanted.device)
    config = dataclasses.replace(wanted, device=device, dtype=choose_dtype(wanted.dtype, device))
    if wanted.dataset == "python" and not (DATA / "python").exists():
        print("data/python is not there yet: preparing it from this Python's standard library")
        prepare(["python"], DATA / "python")
    data = open_dataset(DATA / wanted.dataset)
    config = fit_to_data(config, data)
    config = keep_what_was_automatic(config, wanted, saved)
    config = fit_to_machine(config)
    if saved:
        for line in checkpoint.compare_with_run(saved, config.flat(), data.fingerprint):
            print(f"resuming with {line}")
    return build(config, data, saved)


def find_saved(config: Config) -> dict[str, Any] | None:
    """The checkpoint to continue from, or None for a fresh run; a fresh run never overwrites another."""
    folder = Path(config.out_dir)
    there = checkpoint.all_in(folder)
    if config.resume == "no" and (there or (folder / "best.pt").exists()):
        newest = there[-1][1].name if there else "best.pt"
        raise ValueError(f"{folder} already holds a run ({newest}): continue it with resume=auto, or name "
                         f"another out_dir")
    if not there and config.resume == "yes":
        raise ValueError(f"resume=yes, but there is no checkpoint in {folder}: resume=auto would start afresh")
    return checkpoint.load_newest(folder) if there else None


def fit_to_data(config: Config, data: Dataset) -> Config:
    """vocab_size 0 becomes the tokenizer's, a larger one pads, a smaller one is refused. Short splits are refused."""
    vocab, wanted = data.meta["vocab_size"], config.model.vocab_size
    if 0 < wanted < vocab:
        raise ValueError(f"vocab_size={wanted} is below the {vocab} tokens of data/{config.dataset}: "
                         f"leave it 0 (automatic) or choose a larger one")
    train_starts(len(data.train), config.model.block_size, config.batch_size, config.seed, step=0)
    val_starts(len(data.val), config.model.block_size, config.eval_iters)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=wanted or vocab))


def keep_what_was_automatic(config: Config, wanted: Config, saved: dict[str, Any] | None) -> Config:
    """On the same device a resumed run keeps what auto chose at its start, so that it stays bitwise the same run."""
    before = saved["config"] if saved else {}
    if before.get("device") != config.device:
        return config
    if wanted.dtype == "auto":
        choose_dtype(before.get("dtype", "auto"), config.device)  # refuses it where the device is now an older one
    automatic = [name for name in ("dtype", "compile", "micro_batch_size") if getattr(wanted, name) in ("auto", 0)]
    return dataclasses.replace(config, **{name: before[name] for name in automatic if name in before})


def build(config: Config, data: Dataset, saved: dict[str, Any] | None) -> Run:
    """Model, optimizers and scaler, at their first step or at the saved one."""
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
    elif config.device == "cpu":
        keep_freed_memory()
    model = Decoder(config.model, seed=config.seed).to(config.device)
    model.activation_checkpointing = config.activation_checkpointing
    optimizers = Optimizers(model, optimizer=config.optimizer, weight_decay=config.weight_decay,
                            betas=(config.beta1, config.beta2), momentum=config.muon_momentum,
                            embed_lr=config.embed_lr)
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.dtype == "float16")
    run = Run(config, data, model, torch.compile(model, dynamic=False) if config.compile else model, optimizers, scaler)
    if saved:
        checkpoint.load_weights(model, saved["model"])
        optimizers.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty if the run was not in float16 so far
            scaler.load_state_dict(saved["scaler"])
        run.step, run.best_val_loss, run.grad_norms = saved["step"], saved["best_val_loss"], saved["grad_norms"]
    return run


def claim_folder(run: Run) -> None:
    """Puts config.json and the tokenizer into out_dir, which also proves that it can be written."""
    run.folder.mkdir(exist_ok=True)  # it is there, but may vanish while the run goes on
    about = {"versions": versions(), "parameters": parameter_count(run.config.model), "data": run.data.fingerprint}
    text = json.dumps(run.config.flat() | about, indent=1) + "\n"
    tokenizer = tokenizer_file(run.data.folder)
    for name, content in (("config.json", text.encode()), (tokenizer.name, tokenizer.read_bytes())):
        checkpoint.write_atomically(run.folder / name, lambda file, content=content: file.write(content))
