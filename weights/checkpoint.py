"""Checkpoints: one file each, which is saved, verified, loaded and removed here.

A checkpoint is written under a temporary name, flushed to the disk, read back and verified, and
only then renamed. So whatever has the name of a checkpoint is whole. torch.save stores a checksum
of each tensor, but torch.load does not look at it. `verify` does: a flipped bit is an error and
not a silently wrong weight.

What follows from seed and step is not stored, so it cannot drift: the learning rate, the order of
the data and dropout.

Reading order: what a checkpoint holds; save; load, which trusts nothing that is in the file; the
checkpoints of a folder; the model of a checkpoint; whether a checkpoint belongs to a run.
"""

import os
import pickletools
import re
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from config.command import warn
from config.schema import Config, knobs_of, parse_knobs
from data.files import write_atomically
from model import Decoder, ModelConfig, parameter_count

FORMAT, VERSION = "rootllama checkpoint", 2
FIELDS = {
    "format": str,
    "format_version": int,
    "step": int,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "config": dict,
    "data": dict,
    "base": dict,
    "best_val_loss": float,
    "grad_norms": list,
}
BASE = {"path": str, "checksum": int, "context": int}  # of the weights that a run began with
ENTRY = re.compile(  # what torch.save puts into its zip files
    r"[^/]+/(data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|"
    r"\.data/serialization_id)"
)
GLOBALS = {  # all that the pickle of a checkpoint looks up
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "collections OrderedDict",
}
LOOKUPS = ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4")  # pickle's opcodes
# Bytes of the pickle. It holds names, shapes and numbers, about 150 bytes for each tensor; the
# values of the tensors are in other entries of the zip file.
LARGEST_PICKLE = 2**23
LARGEST_TABLE = 2**28  # angles of RoPE: 2 million tokens of context with heads of 128
ARCHITECTURE = tuple(
    name for name in ModelConfig.__dataclass_fields__ if name not in ("dropout", "norm_impl")
)
# A run that continues with another value of one of these would be another run.
FIXED = (*ARCHITECTURE, "lora_rank", "lora_alpha", "batch_size", "seed", "optimizer")
NEVER_COMPARED = (
    "out_dir",
    "resume",
    "log_interval",
    "keep",
    "sample_prompt",
    "sample_tokens",
    "sharded",
    "tracker",
    "watch",
)


class InParts(ValueError):
    """The checkpoint is a folder of parts, which only training and run/sharded.py can read."""


def path_of(folder: Path, step: int) -> Path:
    return folder / f"ckpt_{step:08d}.pt"


def step_in_name(path: Path) -> int | None:
    """The step in the name of a numbered checkpoint; None for any other file."""
    match = re.fullmatch(r"ckpt_(\d{8,15})\.(pt|shards)", path.name)
    return int(match[1]) if match else None


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically and reads it back. `state` has all of FIELDS but the two of
    the format. OSError if the disk does not take it, ValueError if the disk gives back something
    else, FloatingPointError if a tensor holds NaN or Inf.
    """
    state = {"format": FORMAT, "format_version": VERSION} | state
    if state.keys() != FIELDS.keys():
        raise ValueError(f"a checkpoint needs other fields: {sorted(state.keys() ^ FIELDS.keys())}")
    bad = first_non_finite(state)
    if bad:
        raise FloatingPointError(f"{bad} holds NaN or Inf after step {state['step']}: not saved")
    try:
        write_atomically(path, lambda file: torch.save(state, file), verify)
    except RuntimeError as error:  # torch.save raises it when the disk is full
        raise OSError(str(error)) from error


def verify(path: Path) -> None:
    """ValueError unless `path` is a whole zip file as torch.save writes them, each of its entries
    agrees with its checksum, and its pickle looks up nothing but GLOBALS.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # to open a FIFO would mean to wait forever
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        magic = file.read(4)
        file.seek(max(0, status.st_size - 22))
        end = file.read(4)
    if not magic:
        raise ValueError(f"{path} is empty")
    if magic != b"PK\x03\x04":
        raise ValueError(f"{path} is not a checkpoint of this program")
    broken = None
    try:
        with zipfile.ZipFile(path) as archive:
            unexpected = unexpected_entry(archive.infolist(), status.st_size)
            if not unexpected:
                broken = archive.testzip()
            if not unexpected and not broken:
                unexpected = unexpected_global(archive)
    except Exception as error:  # zipfile raises a dozen kinds of errors for damaged headers
        raise ValueError(f"{path} is damaged or cut short ({error})") from error
    if broken:
        raise ValueError(f"{path} is damaged: {broken} does not agree with its checksum")
    # A zip file ends with a record of 22 bytes. If more followed it, another reader of zip files
    # might find another archive there.
    if not unexpected and end != b"PK\x05\x06":
        unexpected = "its end"
    if unexpected:
        raise ValueError(
            f"{path} is damaged or not a checkpoint of this program ({unexpected!r:.200})"
        )


def unexpected_entry(entries: list[zipfile.ZipInfo], size: int) -> str | None:
    """The name of the first entry that torch.save would not have written into a file of `size`
    bytes, or None. torch.save compresses nothing, so all entries together are smaller than the
    file.
    """
    folder = entries[0].filename.split("/")[0]
    seen, left = set(), size
    for entry in entries:
        name = entry.filename
        left -= entry.file_size
        too_large = left < 0 or (name.endswith(".pkl") and entry.file_size > LARGEST_PICKLE)
        stored = entry.compress_type == zipfile.ZIP_STORED
        stored = stored and entry.compress_size == entry.file_size
        known = ENTRY.fullmatch(name) and name.split("/")[0] == folder and name not in seen
        if too_large or not stored or not known:
            return name
        seen.add(name)
    return None


def unexpected_global(archive: zipfile.ZipFile) -> str | None:
    """The first name outside GLOBALS that a pickle in the archive would look up, or None."""
    for entry in archive.infolist():
        if not entry.filename.endswith(".pkl"):
            continue
        for code, argument, _ in pickletools.genops(archive.read(entry)):
            allowed = code.name == "GLOBAL" and argument in GLOBALS
            if code.name in LOOKUPS and not allowed:
                return str(argument)
    return None


def load(path: Path) -> dict[str, Any]:
    """A verified checkpoint: tensors on the CPU and plain types. ValueError if it is not sound."""
    if path.suffix == ".shards":
        step = step_in_name(path)
        which = "best" if step is None else step
        raise InParts(
            f"{path} is in parts: python -m run.sharded {path.parent} checkpoint={which} "
            f"makes it one file"
        )
    verify(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # the unpickler raises many kinds of errors for foreign content
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"{path} is not a checkpoint of this program ({reason})") from error
    state = checked_state(path, state, os.path.getsize(path))
    bad = first_non_finite(state)
    if bad:
        raise ValueError(f"{path}: {bad} holds NaN or Inf")
    return state


def checked_state(path: Path, state: Any, size: int) -> dict[str, Any]:
    """The state that was read from the `size` bytes of `path`, with its configuration typed.
    ValueError if `save` cannot have written it.
    """
    format_is_ours = (
        isinstance(state, dict)
        and type(state.get("format")) is str  # == of another type may be no truth value
        and state["format"] == FORMAT
    )
    if not format_is_ours:
        raise ValueError(f"{path} is not a checkpoint of this program")
    for name, kind in FIELDS.items():
        found = type(state.get(name))
        if found is not kind:
            raise ValueError(f"{path}: {name} must be {kind.__name__}, got {found.__name__}")
        if name == "format_version" and state[name] != VERSION:
            raise ValueError(
                f"{path} has format version {state[name]}, this program reads {VERSION}: "
                f"use the version of the program that wrote it"
            )
    for name, value in state["base"].items():
        if type(value) is not BASE.get(name):
            raise ValueError(f"{path}: base {name!r:.80} is {value!r:.80}: it is damaged")
    problem = unexpected_tensors(state, size) or unexpected_values(state, size)
    if problem:
        raise ValueError(f"{path} is not a checkpoint of this program: {problem}")
    state["config"] = parse_knobs(state["config"], knobs_of(Config, ModelConfig), str(path))
    if step_in_name(path) not in (None, state["step"]):
        raise ValueError(f"{path} holds step {state['step']}: it has been renamed")
    return state


def unexpected_tensors(state: dict[str, Any], size: int) -> str | None:
    """In words, what model or optimizer hold beside dense tensors that together fit into a file of
    `size` bytes; None if nothing.
    """
    groups = [state["model"], *state["optimizer"].values()]
    if not all(isinstance(group, dict) for group in groups):
        return "model or optimizer hold what is not a dense tensor"
    names = [*state["optimizer"], *(name for group in groups for name in group)]
    if not all(isinstance(name, str) for name in names):
        return "a tensor's name is not a text"
    tensors = [tensor for group in groups for tensor in group.values()]
    for tensor in tensors:
        dense = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        if not dense or not tensor.is_contiguous():
            return "model or optimizer hold what is not a dense tensor"
    if sum(tensor.nbytes for tensor in tensors) > size:
        return "its tensors are larger than the file"
    return None


def unexpected_values(state: dict[str, Any], size: int) -> str | None:
    """In words, what the other fields hold beside numbers and texts, in lists and dicts that
    together fit into a file of `size` bytes; None if nothing.
    """
    waiting = [{name: state[name] for name in state if name not in ("model", "optimizer")}]
    room = min(size, LARGEST_PICKLE)
    for value in waiting:  # the list grows while it is read
        children = []
        if isinstance(value, dict):
            children = list(value.values())
        if isinstance(value, list):
            children = value
        room -= len(children)
        if isinstance(value, str):
            room -= len(value)
        if room < 0:
            return "it unfolds to more than the file"
        if not isinstance(value, (dict, list, str, int, float, type(None))):
            return f"a {type(value).__name__} stands where a number or a text belongs"
        if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
            return "a name is not a text"
        waiting += children
    return None


def first_non_finite(state: dict[str, Any]) -> str | None:
    """The name of the first tensor of model or optimizer that holds NaN or Inf, or None."""
    tensors = list(state["model"].items())
    for name, of_one in state["optimizer"].items():
        tensors += [(f"{key} of {name}", tensor) for key, tensor in of_one.items()]
    return next((name for name, tensor in tensors if not torch.isfinite(tensor).all()), None)


def all_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every numbered checkpoint in `folder`, oldest first. Other files are left
    out. If a step was saved both ways, as parts and as one file, the file comes last, so it is the
    one that is loaded.
    """
    if not folder.is_dir():
        return []
    found = [(step_in_name(path), path) for path in folder.iterdir()]
    numbered = [(step, path) for step, path in found if step is not None]
    return sorted(numbered, key=lambda one: (one[0], one[1].suffix == ".pt"))


def load_newest(folder: Path, load: Callable[[Path], dict[str, Any]] = load) -> dict[str, Any]:
    """The newest sound checkpoint, read by `load`. If one is damaged, a warning says so and the
    checkpoint before it is taken.
    """
    problems = []
    for step, path in reversed(all_in(folder)):
        try:
            state = load(path)
        except InParts:  # it is sound, so no older one may take its place
            raise
        except (ValueError, OSError) as error:
            problems.append(str(error))
            warn(str(error))
            continue
        if problems:
            warn(f"going on from the one before: {path} (step {step})")
        return state
    raise ValueError(f"no sound checkpoint in {folder}: {'; '.join(problems) or 'it holds none'}")


def load_named(folder: Path, which: str) -> dict[str, Any]:
    """The checkpoint that `which` names: latest, best or a step. ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the out_dir of a run")
    if which == "latest":
        return load_newest(folder)
    if which != "best" and not which.isdecimal():
        raise ValueError(f"checkpoint must be latest, best or a step, got {which!r}")
    path = folder / "best.pt" if which == "best" else path_of(folder, int(which))
    if not path.exists():  # it may have been saved in parts
        path = max(folder.glob(f"{path.stem}*.shards"), default=path)
    if not path.exists():
        steps = ", ".join(str(step) for step, _ in all_in(folder)) or "none"
        raise ValueError(f"{path} does not exist; steps in {folder}: {steps}")
    return load(path)


def prune(folder: Path, keep: int, step: int) -> None:
    """Removes all numbered checkpoints up to `step` but the newest `keep`. Later ones do not count:
    a run that had to go back left them behind. One that cannot be removed stays, with a warning.
    """
    up_to_step = [path for at, path in all_in(folder) if at <= step]
    for path in up_to_step[:-keep]:
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            warn(f"{path} could not be removed ({error})")


def model_config(state: dict[str, Any]) -> ModelConfig:
    """The configuration of a checkpoint's model. ValueError if a knob is missing."""
    knobs = {name: state["config"].get(name) for name in ModelConfig.__dataclass_fields__}
    missing = [name for name, value in knobs.items() if value is None]
    if missing:
        raise ValueError(
            f"the checkpoint does not say its {', '.join(missing)}: it is not from this program"
        )
    return ModelConfig(**knobs)


def build_model(config: ModelConfig, weights: dict[str, torch.Tensor], device: str) -> Decoder:
    """The model of a configuration with these weights, on `device`. ValueError if configuration and
    weights do not belong together; this is found out before memory is taken for the model.
    """
    wanted, found = parameter_count(config), sum(weight.numel() for weight in weights.values())
    if wanted != found:
        raise ValueError(
            f"the checkpoint has {found:,} weights, a model of its config {wanted:,}: it is damaged"
        )
    if config.block_size * config.head_size > LARGEST_TABLE:
        raise ValueError(
            f"the checkpoint's block_size={config.block_size:,} asks for more memory than any "
            f"model needs"
        )
    model = Decoder(config, seed=None)
    load_weights(model, weights)
    return model.to(device)


def load_weights(model: Decoder, weights: dict[str, torch.Tensor], frozen: bool = False) -> None:
    """Replaces the model's trainable parameters, or its frozen ones, by the weights of the same
    names. ValueError names a weight that is missing, surplus or of another shape.

    A weight that has the model's device and dtype already is not copied: it becomes the parameter.
    """
    for name, parameter in check_weights(model, weights, frozen).items():
        parameter.data = weights[name].to(parameter)


def check_weights(
    model: Decoder, weights: dict[str, torch.Tensor], frozen: bool
) -> dict[str, torch.nn.Parameter]:
    """The model's trainable parameters, or its frozen ones, by name. ValueError unless `weights`
    have the same names and shapes.
    """
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad != frozen
    }
    for name in sorted(parameters.keys() ^ weights.keys()):
        verb = "lacks" if name in parameters else "has a surplus"
        raise ValueError(f"the checkpoint {verb} {name}")
    for name, parameter in parameters.items():
        found, wanted = list(weights[name].shape), list(parameter.shape)
        if found != wanted:
            raise ValueError(f"{name} is {found} in the checkpoint, {wanted} in the model")
    return parameters


def compare_with_run(
    state: dict[str, Any], config: dict[str, Any], data: dict[str, Any]
) -> list[str]:
    """A line for each knob that differs between a checkpoint and the run that continues it.
    ValueError, with a line for each, if a knob in FIXED or the data differ: that is another run.
    """
    saved, refused, allowed = state["config"], [], []
    for name, now in config.items():
        if name in NEVER_COMPARED or saved.get(name) == now:
            continue
        line = f"{name}: checkpoint={saved.get(name)!s:.80}, now={now}"
        (refused if name in FIXED else allowed).append(line)
    for name, now in data.items():
        before = state["data"].get(name)
        if name != "name" and before != now:
            refused.append(f"data {name}: checkpoint={before!s:.80}, now={now}")
    if refused:
        raise ValueError(
            f"this is not the run in out_dir: {'; '.join(refused)} (put them back, or name "
            f"another out_dir)"
        )
    return allowed
