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

import errno
import math
import os
import pickletools
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch

from config.command import lacks_memory, one_line, shell_path, warn
from config.schema import Config, knobs_of, parse_knobs
from data.files import open_regular, write_atomically
from model import LARGEST, Decoder, ModelConfig, parameter_count

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
DATA = dict.fromkeys(  # of the data that a run was trained on
    ("name", "dtype", "content_sha256", "tokenizer_sha256", "source"), str
) | {"vocab_size": int, "tokens": dict, "answers": bool}
SCALER = {  # of float16's loss scale; the names are those of torch.amp.GradScaler
    "scale": float,
    "growth_factor": float,
    "backoff_factor": float,
    "growth_interval": int,
    "_growth_tracker": int,
}
NEVER_NEGATIVE = {"step", "exp_avg_sq"}  # of what AdamW keeps
LAST_STEP = 10**15  # a checkpoint's name has room for so many
ENTRY = re.compile(  # what torch.save puts into its zip files
    r"[^/]+/(data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|"
    r"\.data/serialization_id)"
)
GLOBALS = {  # all that the pickle of a checkpoint looks up
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "collections OrderedDict",
}
# The records of a zip file, without their names and extra fields: of an entry, where it stands; and
# of the whole, at the end. END_64 and LOCATOR say once more, with 64 bits, what END says.
LOCAL, END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s4H2IH")
END_64, LOCATOR = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
DESCRIPTORS = (0, 16, 24)  # bytes after an entry: none, or its checksum and sizes in 32 or 64 bits
LOOKUPS = ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4")  # pickle's opcodes
# Bytes of the pickle. It holds names, shapes and numbers, about 150 bytes for each tensor; the
# values of the tensors are in other entries of the zip file.
LARGEST_PICKLE = 2**23
LARGEST_TABLE = 2**28  # angles of RoPE: 2 million tokens of context with heads of 128
ARCHITECTURE = tuple(
    name for name in ModelConfig.__dataclass_fields__ if name not in ("dropout", "norm_impl")
)
# A run that continues with another value of one of these would be another run.
FIXED = (
    *ARCHITECTURE,
    *("lora_rank", "lora_alpha", "batch_size", "seed", "optimizer", "taper_start", "taper_end"),
)
NEVER_COMPARED = (
    "out_dir",
    "resume",
    "branch",
    "log_interval",
    "keep",
    "keep_every",
    "sample_prompt",
    "sample_tokens",
    "sample_interval",
    "sharded",
    "tracker",
    "watch",
    "profile",
)


class Unreadable(ValueError):
    """The checkpoint is not damaged, but this program cannot read it. No older one may take its
    place."""


class InParts(Unreadable):
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
    with open_regular(path) as file:
        verify_file(file, path)


def verify_file(file: BinaryIO, path: Path, checksums: bool = True) -> None:
    """As `verify`, for an open file; `path` is for the messages. Without `checksums`, what the
    entries hold is not read.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    magic = file.read(4)
    if not magic:
        raise ValueError(f"{path} is empty")
    if magic != b"PK\x03\x04":
        raise ValueError(f"{path} is not a checkpoint of this program")
    broken = None
    try:
        with zipfile.ZipFile(file) as archive:
            unexpected = unexpected_entry(archive.infolist(), size)
            unexpected = unexpected or unexpected_layout(file, archive, size)
            if checksums and not unexpected:
                broken = archive.testzip()
            if not unexpected and not broken:
                unexpected = unexpected_global(archive)
    except Exception as error:  # zipfile raises a dozen kinds of errors for damaged headers
        if lacks_memory(error):
            raise
        raise ValueError(f"{path} is damaged or cut short ({error})") from error
    if broken:
        raise ValueError(f"{path} is damaged: {broken} does not agree with its checksum")
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
        known = known and entry.orig_filename == name  # zipfile cuts a name off at a NUL
        if too_large or not stored or not known:
            return name
        seen.add(name)
    return None


def unexpected_layout(file: BinaryIO, archive: zipfile.ZipFile, size: int) -> str | None:
    """The part of a zip file of `size` bytes that is not as torch.save writes it, in words, or
    None.

    zipfile, which reads what is checked here, and PyTorch, which reads what is loaded, find their
    way through a file by different records. In a file without gaps, whose records all agree, they
    find the same entries at the same places. PyTorch's writer puts the entries side by side, then
    the directory, then the end in 64 and in 32 bits; numbers that do not fit into 32 bits are
    replaced by the largest one there, and stand in an extra field of the directory.
    """
    most, entries = 2**32 - 1, sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    file.seek(-(END_64.size + LOCATOR.size + END.size), os.SEEK_END)
    records = (END_64, LOCATOR, END)
    end_64, locator, end = (record.unpack(file.read(record.size)) for record in records)
    has_64 = locator[0] == b"PK\x06\x07"
    start, stop = archive.start_dir, size - END.size
    if has_64:
        stop -= END_64.size + LOCATOR.size
    count, length = len(entries), stop - start
    counts = 2 * (min(count, 2**16 - 1),)
    agree = end == (b"PK\x05\x06", 0, 0, *counts, min(length, most), min(start, most), 0)
    if has_64:
        agree = agree and locator == (b"PK\x06\x07", 0, stop, 1)
        versions = end_64[2:4]
        agree = agree and end_64 == (
            *(b"PK\x06\x06", 44, *versions, 0, 0),
            *(count, count, length, start),
        )
    if not agree:
        return "its end"
    place = 0
    for entry in entries:
        at, sizes = entry.header_offset, (entry.compress_size, entry.file_size)
        large = [number for number in (*sizes, at) if number >= most]
        extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        file.seek(at)
        local = LOCAL.unpack(file.read(LOCAL.size))
        signature, _, flags, method, _, _, *sums, name, more = local
        sums_agree = sums in ([0, 0, 0], [entry.CRC, *sizes])  # 0: they stand in the descriptor
        alike = (flags, method) == (entry.flag_bits, entry.compress_type) and sums_agree
        if signature != b"PK\x03\x04" or at - place not in DESCRIPTORS or not alike:
            return f"the header of {entry.filename}"
        # Of an entry that is called a folder, PyTorch would read nothing, and say nothing.
        plain = not (entry.external_attr & 0xFFFF or entry.volume or entry.flag_bits & ~0x808)
        if entry.extra != extra or not plain:
            return f"the directory's record of {entry.filename}"
        place = at + LOCAL.size + name + more + entry.file_size
    return None if start - place in DESCRIPTORS else "what stands before its directory"


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
    if path.suffix == ".shards" and path.exists():
        step = step_in_name(path)
        which = "best" if step is None else step
        raise InParts(
            f"{path} is in parts: python -m run.sharded {shell_path(path.parent)} "
            f"checkpoint={which} makes it one file"
        )
    # It is opened only once, so what is verified is what is loaded, even if a training replaces or
    # removes the file meanwhile.
    with open_regular(path) as file:
        verify_file(file, path)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except Exception as error:  # the unpickler raises many kinds of errors for foreign content
            if lacks_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(f"{path} is not a checkpoint of this program ({reason})") from error
    state = checked_state(path, state, size)
    bad = first_non_finite(state)
    if bad:
        raise ValueError(f"{path}: {bad} holds NaN or Inf")
    for name, of_one in state["optimizer"].items():
        for key in NEVER_NEGATIVE & of_one.keys():
            if (of_one[key] < 0).any():
                raise ValueError(f"{path}: {key} of {name} is negative, which it never is")
    return state


def check_can_go_on(state: dict[str, Any], path: Path) -> None:
    """ValueError if a training that goes on from this checkpoint, of `path`, would begin with an
    empty optimizer in the middle of the run. In float16 the first steps may all have overflowed, so
    that there is no state yet."""
    if state["step"] and not state["optimizer"] and not state["scaler"]:
        raise ValueError(
            f"{path} has no optimizer state, as best.pt has none, so no training can go on from "
            f"it: remove it, or begin another run with init_from={shell_path(path)}"
        )


def checked_state(path: Path, state: Any, size: int) -> dict[str, Any]:
    """The state that was read from the `size` bytes of `path`, with its configuration typed.
    ValueError if `save` cannot have written it.
    """
    format_is_ours = (
        type(state) is dict
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
            raise Unreadable(
                f"{path} has format version {state[name]}, this program reads {VERSION}: "
                f"use the version of the program that wrote it"
            )
    problem = unexpected_tensors(state, size) or unexpected_values(state, size)
    problem = problem or unexpected_fields(state)
    if problem:
        raise ValueError(f"{path} is not a checkpoint of this program: {problem}")
    try:
        state["config"] = parse_knobs(state["config"], knobs_of(Config, ModelConfig), "its config")
    except ValueError as error:
        raise Unreadable(
            f"{path}: {error} (use the version of the program that wrote it)"
        ) from None
    if step_in_name(path) not in (None, state["step"]):
        raise ValueError(f"{path} holds step {state['step']}: it has been renamed")
    return state


def unexpected_tensors(state: dict[str, Any], size: int) -> str | None:
    """In words, what model or optimizer hold beside dense tensors that together fit into a file of
    `size` bytes; None if nothing.
    """
    groups = [state["model"], *state["optimizer"].values()]
    if not all(type(group) is dict for group in groups):
        return "model or optimizer hold what is not a dense tensor"
    names = [*state["optimizer"], *(name for group in groups for name in group)]
    if not all(isinstance(name, str) for name in names):
        return "a tensor's name is not a text"
    tensors = [tensor for group in groups for tensor in group.values()]
    for tensor in tensors:
        dense = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        if not dense or not tensor.is_contiguous():
            return "model or optimizer hold what is not a dense tensor"
        if tensor.requires_grad or tensor.is_neg() or tensor._backward_hooks:
            return "model or optimizer hold a tensor that is more than its numbers"
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
        kind, children = type(value), []  # not isinstance: a subclass may be anything else, too
        if kind is dict:
            children = list(value.values())
        if kind is list:
            children = value
        room -= len(children)
        if kind is str:
            room -= len(value)
        if room < 0:
            return "it unfolds to more than the file"
        if kind not in (dict, list, str, int, float, bool, type(None)):
            return f"a {kind.__name__} stands where a number or a text belongs"
        if kind is dict and not all(type(name) is str for name in value):
            return "a name is not a text"
        waiting += children
    return None


def unexpected_fields(state: dict[str, Any]) -> str | None:
    """In words, the first of the other fields that `save` cannot have written so; None if all are
    sound. That they are plain values is known already.
    """
    base, data, scaler = state["base"], state["data"], state["scaler"]
    for field, values, kinds in (("base", base, BASE), ("data", data, DATA)):
        for name, value in values.items():
            if type(value) is not kinds.get(name):
                return f"{field} {name!r:.80} is {value!r:.80}"
    tokens = data.get("tokens", {})
    norms = state["grad_norms"]
    scales = [scaler.get(name) for name in ("scale", "growth_factor", "backoff_factor")]
    sound = {
        "step": 0 <= state["step"] < LAST_STEP,
        "best_val_loss": not math.isnan(state["best_val_loss"]),
        "grad_norms": all(type(norm) is float and math.isfinite(norm) for norm in norms),
        "base path": "\0" not in base.get("path", ""),
        "base context": 1 <= base.get("context", 1) <= LARGEST["block_size"],
        "data tokens": tokens.keys() <= {"train", "val"}
        and all(type(n) is int and 0 <= n < 2**63 for n in tokens.values()),
        "data vocab_size": 0 <= data.get("vocab_size", 0) <= 2**32,
        "scaler": not scaler
        or {name: type(value) for name, value in scaler.items()} == SCALER
        and all(math.isfinite(scale) and scale > 0 for scale in scales),
    }
    return next(
        (f"its {name} cannot be right" for name, is_sound in sound.items() if not is_sound), None
    )


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


def load_newest(
    folder: Path,
    load: Callable[[Path], dict[str, Any]] = load,
    damaged: dict[Path, str] | None = None,
) -> dict[str, Any]:
    """The newest sound checkpoint, read by `load`. If one is damaged, a warning says so and the
    checkpoint before it is taken. Those found damaged are put into `damaged`, each with the reason.
    """
    damaged = {} if damaged is None else damaged
    while left := [one for one in all_in(folder) if one[1] not in damaged]:
        step, path = left[-1]
        try:
            state = load(path)
        except FileNotFoundError as error:
            if not os.path.lexists(path):  # a training has removed it: it has newer ones by now
                continue
            damaged[path] = str(error)
        except Unreadable:
            raise
        except (ValueError, OSError) as error:
            # Any other error of the system is not damage, for instance that a file may not be read.
            if isinstance(error, OSError) and error.errno not in (errno.EIO, errno.ELOOP):
                raise
            damaged[path] = str(error)
        else:
            if damaged:
                warn(f"going on from the one before: {path} (step {step})")
            return state
        warn(damaged[path])
    problems = "; ".join(damaged.values()) or "it holds none"
    raise ValueError(f"no sound checkpoint in {folder}: {problems}")


def load_named(folder: Path, which: str) -> dict[str, Any]:
    """The checkpoint that `which` names: latest, best or a step. ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the out_dir of a run")
    if which == "latest":
        return load_newest(folder)
    if which != "best" and not re.fullmatch("[0-9]+", which):
        raise ValueError(f"checkpoint must be latest, best or a step, got {which!r}")
    path = folder / "best.pt" if which == "best" else path_of(folder, int(which))
    if not path.exists():  # it may have been saved in parts
        path = max(folder.glob(f"{path.stem}*.shards"), default=path)
    try:
        return load(path)
    except FileNotFoundError:
        steps = ", ".join(str(step) for step, _ in all_in(folder)) or "none"
        raise ValueError(f"{path} does not exist; steps in {folder}: {steps}") from None


def prune(
    folder: Path, keep: int, step: int, damaged: Collection[Path] = (), keep_every: int = 0
) -> None:
    """Removes all numbered checkpoints up to `step` but the newest `keep` that are not known to be
    `damaged`, and those of each `keep_every` steps. Later ones do not count: a run that had to go
    back left them behind. One that cannot be removed stays, with a warning.
    """
    up_to_step = [(at, path) for at, path in all_in(folder) if at <= step]
    kept = [path for _, path in up_to_step if path not in damaged][-keep:]
    for at, path in up_to_step:
        if path in kept or (keep_every and at % keep_every == 0 and path not in damaged):
            continue
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
            f"the checkpoint does not say its {', '.join(missing)}: use the version of the "
            f"program that wrote it"
        )
    return ModelConfig(**knobs)


def build_model(config: ModelConfig, weights: dict[str, torch.Tensor], device: str) -> Decoder:
    """The model of a configuration with these weights, on `device`. ValueError if configuration and
    weights do not belong together; this is found out before memory is taken for the model.
    """
    check_fit(config, weights)
    model = Decoder(config, seed=None)
    load_weights(model, weights)
    return model.to(device)


def check_fit(config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
    """ValueError unless a model of the configuration has exactly these weights."""
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
    with torch.device("meta"):  # a model without memory
        check_weights(Decoder(config, seed=None), weights, frozen=False)


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
    refused, allowed = differences(state, config, data)
    if refused:
        raise ValueError(
            f"this is not the run of the checkpoint: {'; '.join(refused)} (put them "
            f"back, or begin another run: in another out_dir, without branch)"
        )
    return allowed


def differences(
    state: dict[str, Any], config: dict[str, Any], data: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """A line for each knob, or field of the data, that differs between a checkpoint and a run:
    (those that make it another run, the others). A knob that the checkpoint does not have, because
    it is younger, had its default."""
    defaults = {name: of.default for name, (_, of) in knobs_of(Config, ModelConfig).items()}
    saved, refused, allowed = defaults | state["config"], [], []
    for name, now in config.items():
        before = saved.get(name)
        if name in NEVER_COMPARED or before == now:
            continue
        line = f"{name}: checkpoint={one_line(before):.80}, now={one_line(now):.80}"
        (refused if name in FIXED else allowed).append(line)
    for name, now in data.items():
        before = state["data"].get(name)
        if name != "name" and before != now:
            refused.append(
                f"data {name}: checkpoint={one_line(before):.80}, now={one_line(now):.80}"
            )
    return refused, allowed
