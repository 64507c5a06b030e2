"""Save, verify, load and keep checkpoints: one file each, one moment at which it counts.

A checkpoint is written under a temporary name, flushed to the disk, read back and checked, and only then renamed; so
under its own name there is always a whole one. torch.save stores a CRC of each tensor but torch.load does not look at
it: `verify` does, which is what turns a flipped bit from silently wrong weights into an error.

State that could drift is not stored but derived: learning rate, data order and dropout are functions of (seed, step).
"""

import itertools
import os
import pickletools
import re
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from config.schema import Config, knobs_of, typed, warn
from cost import parameter_count
from model import Decoder, ModelConfig

FORMAT, VERSION = "rootllama checkpoint", 2
FIELDS = {"format": str, "format_version": int, "step": int, "model": dict, "optimizer": dict, "scaler": dict,
          "config": dict, "data": dict, "base": dict, "best_val_loss": float, "grad_norms": list}
BASE = {"path": str, "checksum": int, "context": int}  # what is known of the weights that a run began with
ENTRY = re.compile(r"[^/]+/(data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|"
                   r"\.data/serialization_id)")  # what torch.save puts into its zip files
GLOBALS = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}  # all that ours look up
LARGEST_PICKLE = 2**23  # bytes of names, shapes and numbers, about 150 for a tensor, whose own bytes are elsewhere
LARGEST_TABLE = 2**28  # angles of RoPE: 2 million tokens of context with heads of 128
ARCHITECTURE = tuple(name for name in ModelConfig.__dataclass_fields__ if name not in ("dropout", "norm_impl"))
FIXED = (*ARCHITECTURE, "lora_rank", "lora_alpha", "batch_size", "seed", "optimizer")  # changing these is another run
NEVER_COMPARED = ("out_dir", "resume", "log_interval", "keep", "sample_prompt", "sample_tokens", "sharded",
                  "tracker", "watch")


class InParts(ValueError):
    """A checkpoint that only runs and sharded.py can read."""


def path_of(folder: Path, step: int) -> Path:
    return folder / f"ckpt_{step:08d}.pt"


def step_of(path: Path) -> int | None:
    """The step in the name of a numbered checkpoint; None for any other file."""
    match = re.fullmatch(r"ckpt_(\d{8,15})\.(pt|shards)", path.name)
    return int(match[1]) if match else None


def write_atomically(path: Path, write: Callable[[BinaryIO], Any],
                     check: Callable[[Path], None] | None = None) -> None:
    """Calls write(file), then commits the file as `path`: fsync, check, rename, fsync of the folder.

    Whatever goes wrong, `path` still holds what it held before and no temporary file stays (after kill -9 until the
    next lock.Lock). One process writes in a folder, so the temporary name can be the same each time.
    """
    temporary = path.with_name(f".{path.name}.tmp")
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
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in a folder, too."""
    if os.name == "posix":  # Windows cannot open a folder, and needs no such call
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint with the fields of FIELDS (less the two of the format) atomically, and reads it back. OSError
    if the disk will not take it, ValueError if it did not take it well."""
    state = {"format": FORMAT, "format_version": VERSION} | state
    assert state.keys() == FIELDS.keys(), state.keys() ^ FIELDS.keys()
    bad = first_non_finite(state)
    if bad:
        raise FloatingPointError(f"{bad} holds NaN or Inf after step {state['step']}: not saved")
    try:
        write_atomically(path, lambda file: torch.save(state, file), verify)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(str(error)) from error


def verify(path: Path) -> None:
    """ValueError unless `path` is a whole zip file as torch.save writes them, its entries agree with their CRC, and its
    pickle looks up nothing but what puts tensors together."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # before opening it: a FIFO would wait for ever
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        magic = file.read(4)
        file.seek(max(0, status.st_size - 22))
        end = file.read(4)
    if not magic:
        raise ValueError(f"{path} is empty")
    if magic != b"PK\x03\x04":
        raise ValueError(f"{path} is not a checkpoint of this program")
    try:
        with zipfile.ZipFile(path) as archive:
            foreign = foreign_entry(archive.infolist(), status.st_size)
            broken = None if foreign else archive.testzip()
            foreign = foreign or broken or foreign_global(archive)
    except Exception as error:  # zipfile raises a dozen kinds on damaged headers; all mean the same here
        raise ValueError(f"{path} is damaged or cut short ({error})") from error
    if broken:
        raise ValueError(f"{path} is damaged: {broken} does not agree with its checksum")
    if foreign or end != b"PK\x05\x06":  # behind whose 22 bytes another reader might find another archive
        raise ValueError(f"{path} is damaged or not a checkpoint of this program ({foreign or 'its end'!r:.200})")


def foreign_entry(entries: list[zipfile.ZipInfo], size: int) -> str | None:
    """The name of an entry that torch.save would not have written into a file of `size` bytes, where nothing is
    compressed; None if there is no such."""
    seen, first, left = set(), entries[0].filename.split("/")[0], size
    for entry in entries:
        name, left = entry.filename, left - entry.file_size
        small = left >= 0 and not (name.endswith(".pkl") and entry.file_size > LARGEST_PICKLE)
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if not (small and stored and ENTRY.fullmatch(name)) or name in seen or name.split("/")[0] != first:
            return name
        seen.add(name)
    return None


def foreign_global(archive: zipfile.ZipFile) -> str | None:
    """What the pickle in it would look up beside GLOBALS, or None."""
    pickles = (archive.read(entry) for entry in archive.infolist() if entry.filename.endswith(".pkl"))
    for code, argument, _ in itertools.chain.from_iterable(map(pickletools.genops, pickles)):
        looks_up = code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4")
        if looks_up and not (code.name == "GLOBAL" and argument in GLOBALS):
            return str(argument)
    return None


def load(path: Path) -> dict[str, Any]:
    """A verified checkpoint as plain tensors on the CPU and plain types. ValueError if it is not a sound one."""
    if path.suffix == ".shards":
        which = "best" if step_of(path) is None else step_of(path)
        raise InParts(f"{path} is in parts: python sharded.py {path.parent} checkpoint={which} makes it one file")
    verify(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # the unpickler raises many kinds; nothing but plain data is ever accepted
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"{path} is not a checkpoint of this program ({reason})") from error
    state = checked(path, state, os.path.getsize(path))
    bad = first_non_finite(state)
    if bad:
        raise ValueError(f"{path}: {bad} holds NaN or Inf")
    return state


def checked(path: Path, state: Any, size: int) -> dict[str, Any]:
    """What was read from `path`, `size` bytes, with its configuration typed; ValueError if `save` did not write it."""
    if not isinstance(state, dict) or type(state.get("format")) is not str or state["format"] != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this program")
    for name, kind in FIELDS.items():
        if type(state.get(name)) is not kind:
            raise ValueError(f"{path}: {name} must be {kind.__name__}, got {type(state.get(name)).__name__}")
        if name == "format_version" and state[name] != VERSION:
            raise ValueError(f"{path} has format version {state[name]}, this program reads {VERSION}: use the version "
                             f"of the program that wrote it")
    for name, value in state["base"].items():
        if type(value) is not BASE.get(name):
            raise ValueError(f"{path}: base {name!r:.80} is {value!r:.80}: it is damaged")
    bad = first_not_plain(state, size)
    if bad:
        raise ValueError(f"{path} is not a checkpoint of this program: {bad}")
    state["config"] = typed(state["config"], knobs_of(Config, ModelConfig), str(path))
    if step_of(path) not in (None, state["step"]):
        raise ValueError(f"{path} holds step {state['step']}: it has been renamed")
    return state


def first_not_plain(state: dict[str, Any], size: int) -> str | None:
    """In words, what a file of ours with `size` bytes cannot hold, or None: only dense tensors in model and optimizer,
    only numbers and texts elsewhere, and nothing that unfolds to more than the file."""
    inside = [*state["model"].items()]
    for state_of_one in state["optimizer"].values():
        inside += state_of_one.items() if isinstance(state_of_one, dict) else [("", None)]
    if not all(isinstance(name, str) for name in (*state["optimizer"], *(name for name, _ in inside))):
        return "a tensor's name is not a text"
    if not all(type(t) is torch.Tensor and t.layout is torch.strided and t.is_contiguous() for _, t in inside):
        return "model or optimizer hold what is not a dense tensor"
    if sum(t.nbytes for _, t in inside) > size:
        return "its tensors are larger than the file"
    waiting = [{name: value for name, value in state.items() if name not in ("model", "optimizer")}]
    room = min(size, LARGEST_PICKLE)
    for value in waiting:  # which grows as it is read
        children = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        room -= len(children) + (len(value) if isinstance(value, str) else 0)
        if room < 0:
            return "it unfolds to more than the file"
        if not isinstance(value, (dict, list, str, int, float, type(None))):
            return f"a {type(value).__name__} stands where a number or a text belongs"
        if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
            return "a name is not a text"
        waiting += children
    return None


def first_non_finite(state: dict[str, Any]) -> str | None:
    """The name of a tensor of weights or optimizer that holds NaN or Inf, or None."""
    tensors = list(state["model"].items())
    tensors += [(f"{key} of {name}", t) for name, per in state["optimizer"].items() for key, t in per.items()]
    return next((name for name, t in tensors if not torch.isfinite(t).all()), None)


def all_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every numbered checkpoint in `folder`, oldest first. Other files are not ours and not seen. One
    that is there in parts and whole has the whole last."""
    if not folder.is_dir():
        return []
    there = [(step_of(path), path) for path in folder.iterdir() if step_of(path) is not None]
    return sorted(there, key=lambda one: (one[0], one[1].suffix == ".pt"))


def load_newest(folder: Path, load: Callable[[Path], dict[str, Any]] = load) -> dict[str, Any]:
    """The newest sound checkpoint; a damaged one is named loudly and the one before it is taken."""
    problems = []
    for step, path in reversed(all_in(folder)):
        try:
            state = load(path)
        except InParts:  # no reason to go back to an older one
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
    """The checkpoint that `which` names: latest, best, or a step."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the out_dir of a run")
    if which == "latest":
        return load_newest(folder)
    if which != "best" and not which.isdecimal():
        raise ValueError(f"checkpoint must be latest, best or a step, got {which!r}")
    path = folder / "best.pt" if which == "best" else path_of(folder, int(which))
    path = max(folder.glob(f"{path.stem}*.shards"), default=path) if not path.exists() else path
    if not path.exists():
        there = ", ".join(str(step) for step, _ in all_in(folder)) or "none"
        raise ValueError(f"{path} does not exist; steps in {folder}: {there}")
    return load(path)


def prune(folder: Path, keep: int, step: int) -> None:
    """Removes all but the newest `keep` numbered checkpoints up to `step`; a later one, left behind by a run that had
    to go back, does not count. One that cannot be removed is named and stays."""
    for _, path in [(s, p) for s, p in all_in(folder) if s <= step][:-keep]:
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            warn(f"{path} could not be removed ({error})")


def model_config(state: dict[str, Any]) -> ModelConfig:
    """The configuration of a checkpoint's model. ValueError if it does not say all of it."""
    knobs = {name: state["config"].get(name) for name in ModelConfig.__dataclass_fields__}
    missing = [name for name, value in knobs.items() if value is None]
    if missing:
        raise ValueError(f"the checkpoint does not say its {', '.join(missing)}: it is not from this program")
    if knobs["norm_impl"] == "triton":  # how norms were computed in training is no property of the weights
        knobs["norm_impl"] = "eager"
    return ModelConfig(**knobs)


def build_model(config: ModelConfig, weights: dict[str, torch.Tensor], device: str) -> Decoder:
    """The model of a configuration with these weights, on `device`. ValueError if they do not fit together."""
    wanted, there = parameter_count(config), sum(weight.numel() for weight in weights.values())
    if wanted != there:  # before memory is asked for
        raise ValueError(f"the checkpoint has {there:,} weights, a model of its config {wanted:,}: it is damaged")
    if config.block_size * config.head_size > LARGEST_TABLE:
        raise ValueError(f"the checkpoint's block_size={config.block_size:,} asks for more memory than any model needs")
    model = Decoder(config, seed=None)
    load_weights(model, weights)
    return model.to(device)


def load_weights(model: Decoder, weights: dict[str, torch.Tensor], frozen: bool = False) -> None:
    """Puts weights by name in the place of all that is not frozen, or of all that is; a missing, surplus or wrongly
    shaped one is named.

    Nothing is copied that has the model's device and dtype already, so what is given belongs to the model then.
    """
    for name, parameter in check_weights(model, weights, frozen).items():
        parameter.data = weights[name].to(parameter)


def check_weights(model: Decoder, weights: dict[str, torch.Tensor], frozen: bool) -> dict[str, torch.nn.Parameter]:
    """What of the model is not frozen, or is, by name. ValueError unless `weights` have the same names and shapes."""
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad != frozen}
    for name in sorted(own.keys() ^ weights.keys()):
        raise ValueError(f"the checkpoint {'lacks' if name in own else 'has a surplus'} {name}")
    for name, parameter in own.items():
        if weights[name].shape != parameter.shape:
            raise ValueError(f"{name} is {list(weights[name].shape)} in the checkpoint, "
                             f"{list(parameter.shape)} in the model")
    return own


def compare_with_run(state: dict[str, Any], config: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """Refuses, field by field, a resume that would be another run; returns what else differs, to be printed."""
    saved, refused, allowed = state["config"], [], []
    for name, now in config.items():
        if name in NEVER_COMPARED or saved.get(name) == now:
            continue
        line = f"{name}: checkpoint={saved.get(name)!s:.80}, now={now}"
        (refused if name in FIXED else allowed).append(line)
    refused += [f"data {name}: checkpoint={state['data'].get(name)!s:.80}, now={now}"
                for name, now in data.items() if name != "name" and state["data"].get(name) != now]
    if refused:
        raise ValueError("this is not the run in out_dir: " + "; ".join(refused) + " (put them back, or name another "
                         "out_dir)")
    return allowed
