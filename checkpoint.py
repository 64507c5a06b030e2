"""Save, verify, load and keep checkpoints: one file each, one moment at which it counts.

A checkpoint is written under a temporary name, flushed to the disk, read back and checked, and only then renamed; so
under its own name there is always a whole one. torch.save stores a CRC of each tensor but torch.load does not look at
it: `verify` does, which is what turns a flipped bit from silently wrong weights into an error.

State that could drift is not stored but derived: learning rate, data order and dropout are functions of (seed, step).
"""

import os
import re
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from model import Decoder, ModelConfig

FORMAT, VERSION = "rootllama checkpoint", 1
FIELDS = {"format": str, "format_version": int, "step": int, "model": dict, "optimizer": dict, "scaler": dict,
          "config": dict, "data": dict, "best_val_loss": float}
ARCHITECTURE = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "block_size", "vocab_size", "tie_embeddings",
                "norm", "norm_eps", "rope_theta", "rope_scaling", "rope_factor", "rope_low_freq", "rope_high_freq",
                "rope_original_context")
FIXED = ARCHITECTURE + ("dataset", "batch_size", "seed", "optimizer")  # changing these is another run
NEVER_COMPARED = ("out_dir", "resume", "log_interval", "keep", "sample_prompt", "sample_tokens", "tracker", "watch")


def path_of(folder: Path, step: int) -> Path:
    return folder / f"ckpt_{step:08d}.pt"


def write_atomically(path: Path, write: Callable[[BinaryIO], Any],
                     check: Callable[[Path], None] | None = None) -> None:
    """Calls write(file), then commits the file as `path`: fsync, check, rename, fsync of the folder.

    Whatever goes wrong, `path` still holds what it held before and no temporary file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # Windows cannot open a folder, and needs no such call
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint with the fields of FIELDS (less the two of the format) atomically, and reads it back."""
    state = {"format": FORMAT, "format_version": VERSION} | state
    assert state.keys() == FIELDS.keys(), state.keys() ^ FIELDS.keys()
    bad = first_non_finite(state)
    if bad:
        raise FloatingPointError(f"{bad} holds NaN or Inf: not saved")
    write_atomically(path, lambda file: torch.save(state, file), verify)


def verify(path: Path) -> None:
    """ValueError unless `path` is a whole zip file whose every entry agrees with its CRC."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # before opening it: a FIFO would wait for ever
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        magic = file.read(4)
    if not magic:
        raise ValueError(f"{path} is empty")
    if magic != b"PK\x03\x04":
        raise ValueError(f"{path} is not a checkpoint of this program")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # zipfile raises a dozen kinds on damaged headers; all mean the same here
        raise ValueError(f"{path} is damaged or cut short ({error})") from error
    if broken:
        raise ValueError(f"{path} is damaged: {broken} does not agree with its checksum")


def load(path: Path) -> dict[str, Any]:
    """A verified checkpoint as plain tensors on the CPU and plain types. ValueError if it is not a sound one."""
    verify(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # the unpickler raises many kinds; nothing but plain data is ever accepted
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"{path} is not a checkpoint of this program ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this program")
    if state.get("format_version") != VERSION:
        raise ValueError(f"{path} has format version {state.get('format_version')}, this program reads {VERSION}: "
                         f"use the version of the program that wrote it")
    for name, kind in FIELDS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path}: {name} must be {kind.__name__}, got {type(state.get(name)).__name__}")
    bad = first_non_finite(state)
    if bad:
        raise ValueError(f"{path}: {bad} holds NaN or Inf")
    return state


def first_non_finite(state: dict[str, Any]) -> str | None:
    """The name of a tensor of weights or optimizer that holds NaN or Inf, or None."""
    tensors = list(state["model"].items())
    tensors += [(f"{key} of {name}", t) for name, per in state["optimizer"].items() for key, t in per.items()]
    return next((name for name, t in tensors if not torch.isfinite(t).all()), None)


def all_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every numbered checkpoint in `folder`, oldest first. Other files are not ours and not seen."""
    if not folder.is_dir():
        return []
    found = ((re.fullmatch(r"ckpt_(\d{8,})\.pt", p.name), p) for p in folder.iterdir())
    return sorted((int(match[1]), p) for match, p in found if match)


def load_newest(folder: Path) -> dict[str, Any]:
    """The newest sound checkpoint; a damaged one is named loudly and the one before it is taken."""
    problems = []
    for step, path in reversed(all_in(folder)):
        try:
            state = load(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            print(f"warning: {error}", file=sys.stderr)
            continue
        if problems:
            print(f"warning: going on from the one before: {path} (step {step})", file=sys.stderr)
        return state
    raise ValueError(f"no sound checkpoint in {folder}: {'; '.join(problems) or 'it holds none'}")


def load_named(folder: Path, which: str) -> dict[str, Any]:
    """The checkpoint that `which` names: latest, best, or a step."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the out_dir of a run")
    if which == "latest":
        return load_newest(folder)
    if which != "best" and not which.isdecimal():
        raise ValueError(f"checkpoint must be latest, best or a step, got {which!r}")
    path = folder / "best.pt" if which == "best" else path_of(folder, int(which))
    if not path.exists():
        there = ", ".join(str(step) for step, _ in all_in(folder)) or "none"
        raise ValueError(f"{path} does not exist; steps in {folder}: {there}")
    return load(path)


def prune(folder: Path, keep: int, step: int) -> None:
    """Removes all but the newest `keep` numbered checkpoints up to `step`; a later one, left behind by a run that had
    to go back, does not count."""
    for _, path in [(s, p) for s, p in all_in(folder) if s <= step][:-keep]:
        path.unlink()


def build_model(state: dict[str, Any], device: str) -> Decoder:
    """The model that a checkpoint holds, with its weights, on `device`."""
    knobs = {name: state["config"][name] for name in ModelConfig.__dataclass_fields__}
    if knobs["norm_impl"] == "triton":  # how norms were computed in training is no property of the weights
        knobs["norm_impl"] = "eager"
    model = Decoder(ModelConfig(**knobs))
    load_weights(model, state["model"])
    return model.to(device)


def load_weights(model: Decoder, weights: dict[str, torch.Tensor]) -> None:
    """Copies weights by name; a missing, surplus or wrongly shaped one is named."""
    own = dict(model.named_parameters())
    for name in sorted(own.keys() ^ weights.keys()):
        raise ValueError(f"the checkpoint {'lacks' if name in own else 'has a surplus'} {name}")
    with torch.no_grad():
        for name, parameter in own.items():
            if weights[name].shape != parameter.shape:
                raise ValueError(f"{name} is {list(weights[name].shape)} in the checkpoint, "
                                 f"{list(parameter.shape)} in the model")
            parameter.copy_(weights[name])


def compare_with_run(state: dict[str, Any], config: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """Refuses, field by field, a resume that would be another run; returns what else differs, to be printed."""
    saved, refused, allowed = state["config"], [], []
    for name, now in config.items():
        if name in NEVER_COMPARED or saved.get(name) == now:
            continue
        line = f"{name}: checkpoint={saved.get(name)}, now={now}"
        (refused if name in FIXED else allowed).append(line)
    refused += [f"data {name}: checkpoint={state['data'].get(name)}, now={now}"
                for name, now in data.items() if state["data"].get(name) != now]
    if refused:
        raise ValueError("this is not the run in out_dir: " + "; ".join(refused) + " (put them back, or name another "
                         "out_dir)")
    return allowed
