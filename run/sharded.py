"""Sharded checkpoints: folders of parts, for models that the memory of one machine does not hold.

    python -m run.sharded out/x [checkpoint=latest|best|STEP]     makes one file of such a folder

Each rank writes its part, by torch.distributed.checkpoint (DCP), and any number of ranks can read
the parts again. manifest.json holds the rest of the checkpoint, the size and the CRC-32 of each
file, and where in the files each tensor is. DCP's own list of the tensors is a pickle, which can
run the code of whoever wrote it. So it is never written and never read.

Reading order: save_parts and its steps; load_parts and read_into; the manifest; the command.
"""

import io
import json
import math
import os
import re
import shutil
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the imports below would not be found
    command = "python -m run.sharded"
    print(f"error: run it as a module, from the repository's root: {command}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":  # before the imports that take seconds
    from config.command import start

    start()

import torch
import torch.distributed as dist
from torch import Tensor

from config.command import lacks_memory, run_command, split_arguments, user_errors
from config.schema import Config
from data import checksum
from data.files import sync, write_atomically
from data.loader import is_count
from model import Decoder
from run.optim import Optimizers
from run.ranks import ALONE, Ranks
from weights import checkpoint
from weights.lock import Lock
from weights.lora import adapter_count, add_adapters

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 2**28  # bytes; a manifest has about 300 for each part of a tensor
PART_NAME = re.compile(r"__\d{1,6}_\d{1,6}\.distcp")  # what DCP names its files
DTYPES = {"float32": torch.float32}
USAGE = """python -m run.sharded FOLDER [checkpoint=latest|best|STEP]

Makes one file of a checkpoint that a run saved in parts, for sample.py and the other commands."""


def folder_of(path: Path, step: int) -> Path:
    """The folder that takes the place of a checkpoint's file. The name of the best one contains its
    step, because a folder, unlike a file, cannot replace another one in a single moment."""
    kind = "best" if path.stem == "best" else "ckpt"
    return path.with_name(f"{kind}_{step:08d}.shards")


def save_parts(path: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Writes a checkpoint as the folder `path`. `state` is as in checkpoint.save, but every rank
    has, and writes, its part of the tensors.

    As checkpoint.save does, it writes under another name, flushes, reads back, checks, and only
    then renames. OSError on all ranks if one of them fails, FloatingPointError if a tensor holds
    NaN or Inf.
    """
    tensors = tensors_by_name(state)
    bad = [name for name, t in tensors.items() if not torch.isfinite(local_part(t)).all()]
    if ranks.largest(len(bad)):
        name = bad[0] if bad else "a tensor"
        raise FloatingPointError(f"{name} holds NaN or Inf after step {state['step']}: not saved")
    temporary = path.with_name(f".{path.name}.tmp")
    writer = storage_classes()[0](temporary)
    try:
        with ranks.all_or_none():
            if ranks.is_main:
                remove(temporary)
                temporary.mkdir()
        write_own_part(writer, tensors)
        with ranks.all_or_none():
            if ranks.is_main:
                write_manifest(temporary, state, writer.places)
        with ranks.all_or_none():
            verify_parts(temporary, ranks)
        with ranks.all_or_none():
            if ranks.is_main:
                commit_parts(temporary, path)
    except OSError:
        with suppress(OSError), ranks.all_or_none():  # else the next run's lock removes it
            if ranks.is_main:
                remove(temporary)
        raise


def write_own_part(writer: Any, tensors: dict[str, Tensor]) -> None:
    """Writes this rank's part with DCP. OSError on all ranks if one of them fails."""
    from torch.distributed.checkpoint import CheckpointException
    from torch.distributed.checkpoint import save as dcp_save

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns a process that is alone
            dcp_save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {reason}" if rank else f"{reason}") from error


def commit_parts(temporary: Path, path: Path) -> None:
    """Gives the folder its name. From this moment on it counts as a checkpoint.

    If another folder has the name already, that one is put aside first and removed afterwards. If
    the process is killed in between, the next run's lock puts it back. A new best checkpoint
    replaces all older best ones.
    """
    aside = path.with_name(f".{path.name}.old")
    if path.exists():
        remove(aside)
        os.rename(path, aside)
    os.rename(temporary, path)
    sync(path.parent)
    remove(aside)
    if path.name.startswith("best_"):
        for other in {path.with_name("best.pt"), *path.parent.glob("best_*.shards")} - {path}:
            remove(other)


def verify_parts(folder: Path, ranks: Ranks = ALONE) -> None:
    """ValueError unless the files of a checkpoint are as they were written. Each rank checks its
    share of them."""
    listed = sorted(read_manifest(folder)["files"].items())[ranks.rank :: ranks.size]
    files = [folder / name for name, _ in listed]
    refuse_links([folder / MANIFEST, *files])
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"{missing[0]} is missing")
    found = sizes_and_sums(files)
    for name, wanted in listed:
        if wanted != found[name]:
            raise ValueError(
                f"{folder / name} is damaged: its size or checksum is not what was written"
            )


def refuse_links(files: list[Path]) -> None:
    """ValueError if one of a checkpoint's files is a link, which could lead to any file."""
    if links := [file for file in files if file.is_symlink()]:
        raise ValueError(f"{links[0]} is a link: put the file itself there")


def load_parts(path: Path) -> dict[str, Any]:
    """Like checkpoint.load, but it also takes a folder of parts. The folder is verified, and the
    tensors in the result have no data. The result names the folder as `shards`, for `read_into`."""
    if not path.is_dir():
        return checkpoint.load(path)
    verify_parts(path)
    manifest = read_manifest(path)
    state = {name: manifest.get(name) for name in checkpoint.FIELDS}
    state |= {"model": {}, "optimizer": {}}
    for full_name, place in manifest["tensors"].items():
        kind, _, name = full_name.partition("/")
        tensor = torch.empty(place["shape"], dtype=DTYPES[place["dtype"]], device="meta")
        if kind == "model":
            state["model"][name] = tensor
        else:
            name, _, key = name.rpartition("/")
            state["optimizer"].setdefault(name, {})[key] = tensor
    size = sum(size for size, _ in manifest["files"].values())
    return checkpoint.checked_state(path, state, size) | {"shards": str(path)}


def read_into(state: dict[str, Any], folder: Path) -> None:
    """Fills the tensors in `state`, or this rank's parts of them, from a sharded checkpoint.
    ValueError if one holds NaN or Inf."""
    from torch.distributed.checkpoint import CheckpointException
    from torch.distributed.checkpoint import load as dcp_load

    tensors = tensors_by_name(state)
    reader = storage_classes()[1](folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns a process that is alone
            dcp_load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        if lacks_memory(reason):
            raise MemoryError(str(reason)) from error
        raise ValueError(f"{folder} cannot be read ({reason!s:.300})") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(local_part(tensor)).all():
            raise ValueError(f"{folder}: {name} holds NaN or Inf")
        of_optimizer, key = name.startswith("optimizer/"), name.rpartition("/")[2]
        if of_optimizer and key in checkpoint.NEVER_NEGATIVE and (local_part(tensor) < 0).any():
            raise ValueError(f"{folder}: {name} is negative, which it never is")


def tensors_by_name(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint in one dict: model/NAME and optimizer/NAME/KEY."""
    result = {f"model/{name}": t for name, t in state["model"].items()}
    for name, per in state["optimizer"].items():
        result |= {f"optimizer/{name}/{key}": t for key, t in per.items()}
    return result


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def storage_classes() -> tuple[type, type]:
    """DCP's writer and reader of files, changed to use our manifest instead of DCP's pickle."""
    from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    class Writer(FileSystemWriter):
        """After writing, `places` says on main where each part of each tensor is."""

        places: dict[str, Any] = {}

        def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
            self.places, shapes = {}, {}
            for name, tensor in metadata.state_dict_metadata.items():
                dtype = str(tensor.properties.dtype).removeprefix("torch.")
                self.places[name] = {"shape": list(tensor.size), "dtype": dtype, "parts": []}
                for chunk in tensor.chunks:
                    shapes[name, tuple(chunk.offsets)] = list(chunk.sizes)
            for written in (one for some in results for one in some):
                name, offset, info = written.index.fqn, written.index.offset, written.storage_data
                part = {
                    "offset": list(offset),
                    "shape": shapes[name, tuple(offset)],
                    "file": info.relative_path,
                    "at": info.offset,
                    "bytes": info.length,
                }
                self.places[name]["parts"].append(part)

    class Reader(FileSystemReader):
        """Takes from the manifest what DCP would take from its pickle, and lets torch.load see
        nothing that is not as checkpoint.verify wants it."""

        @cached_property
        def shapes(self) -> dict[tuple[str, int], list[int]]:
            """The shape of each part by the file and the place in it."""
            places = read_manifest(Path(self.path))["tensors"].values()
            parts = [part for place in places for part in place["parts"]]
            return {(part["file"], part["at"]): part["shape"] for part in parts}

        def _slice_file(self, file: Any, info: Any) -> Any:
            part = io.BytesIO(super()._slice_file(file, info).read())
            file_path, shape = (
                Path(self.path) / info.relative_path,
                self.shapes[info.relative_path, info.offset],
            )
            # The checksum of the whole file has been compared.
            checkpoint.verify_file(part, file_path, checksums=False)
            part.seek(0)
            tensor = torch.load(part, map_location="meta", weights_only=True)
            # DCP takes what it needs of a larger tensor, and says nothing.
            if type(tensor) is not Tensor or list(tensor.shape) != shape:
                raise ValueError(f"{file_path} has a tensor of another shape than {MANIFEST} says")
            if not tensor.is_contiguous():
                raise ValueError(f"{file_path} has a tensor that is not dense")
            part.seek(0)
            return part

        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            tensors, where = {}, {}
            for name, place in read_manifest(Path(self.path))["tensors"].items():
                chunks = []
                for part in place["parts"]:
                    offset, shape = torch.Size(part["offset"]), torch.Size(part["shape"])
                    chunks.append(ChunkStorageMetadata(offset, shape))
                    info = _StorageInfo(part["file"], part["at"], part["bytes"])
                    where[MetadataIndex(name, part["offset"])] = info
                properties = TensorProperties(DTYPES[place["dtype"]])
                size = torch.Size(place["shape"])
                tensors[name] = TensorStorageMetadata(properties, size, chunks)
            return Metadata(tensors, storage_data=where)

    return Writer, Reader


def write_manifest(folder: Path, state: dict[str, Any], places: dict[str, Any]) -> None:
    manifest = {"format": checkpoint.FORMAT, "format_version": checkpoint.VERSION}
    manifest |= {name: v for name, v in state.items() if name not in ("model", "optimizer")}
    manifest |= {"tensors": places, "files": sizes_and_sums(sorted(folder.iterdir()))}
    text = json.dumps(manifest | {"checksum": checksum(manifest)})
    write_atomically(folder / MANIFEST, lambda file: file.write(text.encode()))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked content of manifest.json. ValueError if it is damaged or not one of ours."""
    path = folder / MANIFEST
    if not path.is_file() or path.stat().st_size > LARGEST_MANIFEST:
        raise ValueError(f"{path} is missing or too large: {folder} is not a whole checkpoint")
    try:
        manifest = json.loads(path.read_bytes())
        sound = manifest["format"] == checkpoint.FORMAT
        sound = sound and manifest["checksum"] == checksum(manifest)
        sound = sound and all(PART_NAME.fullmatch(name) for name in manifest["files"])
        for name, place in manifest["tensors"].items():
            sound = sound and name.startswith(("model/", "optimizer/"))
            sound = sound and is_whole(place, manifest["files"])
        sound = sound and are_apart(manifest["tensors"], manifest["files"])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r:.200})") from None
    if not sound:
        raise ValueError(f"{path} is damaged, or not from this program")
    return manifest


def is_whole(place: dict[str, Any], files: dict[str, list[int]]) -> bool:
    """Whether the parts of a tensor, which FSDP cuts along the first dimension, are all of it,
    without gap and overlap, and each lies within its file and has room for its numbers."""
    shape, row = place["shape"], 0
    numbers, parts = list(shape), sorted(place["parts"], key=lambda part: part["offset"])
    for part in parts:
        numbers += [part["at"] + 1, part["bytes"], *part["shape"], *(n + 1 for n in part["offset"])]
    # Our tensors are matrices, vectors and, for an optimizer's count of steps, single numbers.
    if place["dtype"] not in DTYPES or len(shape) > 2 or not all(map(is_count, numbers)):
        return False
    size = DTYPES[place["dtype"]].itemsize
    for part in parts:
        alike = len(part["shape"]) == len(shape) and part["shape"][1:] == shape[1:]
        if not alike or part["offset"] != [row, 0][: len(shape)]:
            return False
        row += (part["shape"] or [1])[0]
        inside = part["at"] + part["bytes"] <= files[part["file"]][0]
        if not inside or part["bytes"] < size * math.prod(part["shape"]):
            return False
    return row == (shape or [1])[0]


def are_apart(tensors: dict[str, Any], files: dict[str, list[int]]) -> bool:
    """Whether no two parts share a byte, and every file has one."""
    parts = [part for place in tensors.values() for part in place["parts"]]
    places = sorted((part["file"], part["at"], part["at"] + part["bytes"]) for part in parts)
    return {file for file, _, _ in places} == files.keys() and not any(
        file == next_file and stop > start
        for (file, _, stop), (next_file, start, _) in pairwise(places)
    )


def sizes_and_sums(files: list[Path]) -> dict[str, list[int]]:
    """name -> [size, CRC-32] of each file. Several threads read, because a fast disk gives more
    than one thread can take."""
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(crc_of, files))
    return {f.name: [f.stat().st_size, crc] for f, crc in zip(files, sums, strict=True)}


def crc_of(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc


def find_parts(folder: Path, which: str) -> Path:
    """The sharded checkpoint that `which` names: latest, best, or a step."""
    parts, files = {}, {"best": folder / "best.pt"}
    for step, path in checkpoint.all_in(folder):
        of_kind = parts if path.suffix == ".shards" else files
        of_kind.update({str(step): path, "latest": path})
    for path in sorted(folder.glob("best_*.shards")):
        parts["best"] = path
    if which in parts:
        return parts[which]
    names = ", ".join(name for name in parts if name != "latest")
    there = f"in parts there are: {names or 'none'}"
    if which in files and files[which].exists():
        raise ValueError(f"{files[which]} is whole already; {there}")
    raise ValueError(f"no checkpoint {which} in parts in {folder}; {there}")


def check_whole(state: dict[str, Any]) -> None:
    """ValueError unless a checkpoint has exactly the weights of its model, and the optimizer's
    state, if there is any, fits them. The tensors need no data."""
    config, knobs = checkpoint.model_config(state), state["config"]
    if rank := knobs.get("lora_rank", 0):
        wanted = adapter_count(config, rank)
        found = sum(weight.numel() for weight in state["model"].values())
        if wanted != found:
            raise ValueError(f"it has {found:,} weights of adapters, its config {wanted:,}")
        with torch.device("meta"):  # a model without memory
            model = Decoder(config, seed=None)
        add_adapters(model, rank, knobs.get("lora_alpha", Config.lora_alpha), seed=0)
        checkpoint.check_weights(model, state["model"], frozen=False)
    else:
        checkpoint.check_fit(config, state["model"])
        with torch.device("meta"):
            model = Decoder(config, seed=None)
    if state["optimizer"]:
        kind = knobs.get("optimizer", Config.optimizer)
        unused = dict(weight_decay=0.0, betas=(0.9, 0.95), momentum=0.9)
        Optimizers(model, optimizer=kind, **unused).check_fit(state["optimizer"])


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; the user's errors exit with 2."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    with user_errors():
        places, pairs = split_arguments(argv)
        which = pairs.pop("checkpoint", "latest")
        if len(places) != 1 or pairs:
            raise ValueError(
                f"one folder of a run and checkpoint=... are wanted, got {' '.join(argv)}"
            )
        folder = Path(places[0])
        parts = find_parts(folder, which)
        with Lock(folder) as lock:
            state = load_parts(parts)
            try:
                check_whole(state)
                if which != "best":
                    checkpoint.check_can_go_on(state, parts)
            except ValueError as error:
                raise ValueError(f"{parts} cannot become one file: {error}") from None
            lock.clean_up()
            for tensors in (state["model"], *state["optimizer"].values()):
                for name, tensor in tensors.items():
                    tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            read_into(state, parts)
            step = state["step"]
            file = folder / "best.pt" if which == "best" else checkpoint.path_of(folder, step)
            fields = [n for n in checkpoint.FIELDS if n not in ("format", "format_version")]
            checkpoint.save(file, {name: state[name] for name in fields})
        print(f"{parts} is now {file}, too: {file.stat().st_size / 1e9:.3f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
