"""Checkpoints in parts, for models that one host's memory does not hold; and parts made one file:

    python sharded.py out/x [checkpoint=latest]         writes the .pt file that sample.py and the others read

A folder of files by torch.distributed.checkpoint (DCP), to which each rank writes what it has, so that any number of
ranks can read it. Beside them manifest.json says everything else, each file's size and CRC-32, and where in them each
tensor is: DCP's own list is a pickle, which would run whatever somebody has put there.
"""

import json
import os
import re
import shutil
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import checkpoint
from config.schema import split_arguments, user_errors
from data import checksum
from lock import Lock
from world import ALONE, World

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 2**28  # bytes; about 300 for each part of a tensor
PART = re.compile(r"__\d{1,6}_\d{1,6}\.distcp")  # the names that DCP gives its files
DTYPES = {"float32": torch.float32}
USAGE = "python sharded.py FOLDER [checkpoint=latest|best|STEP]\n\nMakes one file of a run's checkpoint in parts."


def save(path: Path, state: dict[str, Any], world: World) -> None:
    """Writes the fields of checkpoint.FIELDS, of whose tensors every rank has its part, as the folder `path`.

    As with checkpoint.save, it is written under another name, flushed, read back and checked, and only then renamed.
    OSError on all ranks if one cannot.
    """
    tensors = named(state)
    bad = [name for name, t in tensors.items() if not torch.isfinite(local(t)).all()]
    if world.largest(len(bad)):
        raise FloatingPointError(f"{bad[0] if bad else 'a tensor'} holds NaN or Inf after step {state['step']}: "
                                 f"not saved")
    temporary = path.with_name(f".{path.name}.tmp")
    writer = storage()[0](temporary)
    try:
        world.together(world.only_main(fresh_folder), temporary)
        write_parts(writer, tensors)
        world.together(world.only_main(write_manifest), temporary, state, writer.places)
        world.together(verify, temporary, world)
        world.together(world.only_main(commit), temporary, path)
    except OSError:
        with suppress(OSError):  # the next run clears what cannot be removed now
            world.together(world.only_main(remove), temporary)
        raise


def write_parts(writer: Any, tensors: dict[str, Tensor]) -> None:
    """Writes this rank's part. OSError on all ranks if one cannot."""
    from torch.distributed.checkpoint import CheckpointException
    from torch.distributed.checkpoint import save as write

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process alone is one process alone
            write(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {reason}" if rank else f"{reason}") from error


def path_of(path: Path, step: int) -> Path:
    """The folder in the place of a checkpoint's file. A best one has its step in its name, since a folder cannot be
    replaced by another in one moment."""
    return path.with_name(f"{'best' if path.stem == 'best' else 'ckpt'}_{step:08d}.shards")


def named(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under one name each."""
    names = {f"model/{name}": t for name, t in state["model"].items()}
    return names | {f"optimizer/{name}/{key}": t for name, per in state["optimizer"].items() for key, t in per.items()}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def fresh_folder(folder: Path) -> None:
    remove(folder)
    folder.mkdir()


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def storage() -> tuple[type, type]:
    """DCP's writer and reader of files, with our manifest in the place of its pickle."""
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
        """Keeps in `places`, on main, where each part of each tensor is."""

        places: dict[str, Any] = {}

        def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
            stored = [one for some in results for one in some]
            self.places = {name: {"shape": list(of.size), "dtype": str(of.properties.dtype).removeprefix("torch."),
                                  "parts": []} for name, of in metadata.state_dict_metadata.items()}
            sizes = {(name, tuple(chunk.offsets)): list(chunk.sizes)
                     for name, of in metadata.state_dict_metadata.items() for chunk in of.chunks}
            for one in stored:
                offset, info = one.index.offset, one.storage_data
                self.places[one.index.fqn]["parts"].append(
                    {"offset": list(offset), "shape": sizes[one.index.fqn, tuple(offset)], "file": info.relative_path,
                     "at": info.offset, "bytes": info.length})

    class Reader(FileSystemReader):
        """Takes from the manifest what DCP would take from its pickle."""

        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            tensors, where = {}, {}
            for name, of in read_manifest(Path(self.path))["tensors"].items():
                chunks = [ChunkStorageMetadata(torch.Size(p["offset"]), torch.Size(p["shape"])) for p in of["parts"]]
                tensors[name] = TensorStorageMetadata(TensorProperties(DTYPES[of["dtype"]]), torch.Size(of["shape"]),
                                                      chunks)
                where |= {MetadataIndex(name, p["offset"]): _StorageInfo(p["file"], p["at"], p["bytes"])
                          for p in of["parts"]}
            return Metadata(tensors, storage_data=where)

    return Writer, Reader


def write_manifest(folder: Path, state: dict[str, Any], places: dict[str, Any]) -> None:
    header = {name: value for name, value in state.items() if name not in ("model", "optimizer")}
    manifest = {"format": checkpoint.FORMAT, "format_version": checkpoint.VERSION} | header | {
        "tensors": places, "files": dict(zip(*sizes_and_sums(sorted(folder.iterdir())), strict=True))}
    text = json.dumps(manifest | {"checksum": checksum(manifest)})
    checkpoint.write_atomically(folder / MANIFEST, lambda file: file.write(text.encode()))


def sizes_and_sums(files: list[Path]) -> tuple[list[str], list[list[int]]]:
    """Names, and size and CRC-32 of each file; read by several threads, since a disk for such files is faster than
    one."""
    with ThreadPoolExecutor(8) as pool:
        return [f.name for f in files], [[f.stat().st_size, crc] for f, crc in zip(files, pool.map(crc_of, files),
                                                                                  strict=True)]


def crc_of(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc


def commit(temporary: Path, path: Path) -> None:
    """The moment at which a checkpoint counts; of those that are only the best one so far it is then the only one.

    One of the same name is put aside until then, for lock.Lock to put back if this is as far as it came."""
    before = path.with_name(f".{path.name}.old")
    if path.exists():
        remove(before)
        os.rename(path, before)
    os.rename(temporary, path)
    checkpoint.sync_folder(path.parent)
    remove(before)
    if path.name.startswith("best_"):
        for other in {path.with_name("best.pt"), *path.parent.glob("best_*.shards")} - {path}:
            remove(other)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked content of a checkpoint's manifest.json. ValueError if it is not one of ours, or damaged."""
    path = folder / MANIFEST
    if not path.is_file() or path.stat().st_size > LARGEST_MANIFEST:
        raise ValueError(f"{path} is missing or too large: {folder} is no whole checkpoint")
    try:
        manifest = json.loads(path.read_bytes())
        sound = manifest["format"] == checkpoint.FORMAT and manifest["checksum"] == checksum(manifest)
        sound = sound and all(PART.fullmatch(name) for name in manifest["files"])
        for of in manifest["tensors"].values():
            sound = sound and of["dtype"] in DTYPES and all(part["file"] in manifest["files"] for part in of["parts"])
            numbers = [*of["shape"], *(n for part in of["parts"] for n in (part["at"], part["bytes"], *part["offset"],
                                                                          *part["shape"]))]
            sound = sound and all(type(n) is int and n >= 0 for n in numbers)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r:.200})") from None
    if not sound:
        raise ValueError(f"{path} is damaged, or not of a checkpoint of this program")
    return manifest


def verify(folder: Path, world: World = ALONE) -> None:
    """ValueError unless the files of a checkpoint are what was written; ranks share the work."""
    listed = sorted(read_manifest(folder)["files"].items())[world.rank::world.size]
    files = [folder / name for name, _ in listed]
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"{missing[0]} is missing")
    found = sizes_and_sums(files)[1]
    for (name, wanted), now in zip(listed, found, strict=True):
        if wanted != now:
            raise ValueError(f"{folder / name} is damaged: its size or checksum is not what was written")


def load(path: Path) -> dict[str, Any]:
    """As checkpoint.load, for one of parts too: then verified, but with tensors that have no data yet, and the folder
    under the name `shards`."""
    if not path.is_dir():
        return checkpoint.load(path)
    verify(path)
    manifest = read_manifest(path)
    state = {name: manifest.get(name) for name in checkpoint.FIELDS} | {"model": {}, "optimizer": {}}
    for full, of in manifest["tensors"].items():
        kind, _, name = full.partition("/")
        tensor = torch.empty(of["shape"], dtype=DTYPES[of["dtype"]], device="meta")
        if kind == "model":
            state["model"][name] = tensor
        else:
            name, _, key = name.rpartition("/")
            state["optimizer"].setdefault(name, {})[key] = tensor
    size = sum(size for size, _ in manifest["files"].values())
    return checkpoint.checked(path, state, size) | {"shards": str(path)}


def read_into(state: dict[str, Any], folder: Path) -> None:
    """Fills the tensors of model and optimizer, or each rank its part of them. ValueError if one holds NaN or Inf."""
    from torch.distributed.checkpoint import load as read

    tensors = named(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process alone is one process alone
        read(tensors, storage_reader=storage()[1](folder), no_dist=not dist.is_initialized())
    bad = next((name for name, t in tensors.items() if not torch.isfinite(local(t)).all()), None)
    if bad:
        raise ValueError(f"{folder}: {bad} holds NaN or Inf")


def find(folder: Path, which: str) -> Path:
    """The checkpoint in parts that `which` names: latest, best, or a step."""
    there = {str(step): path for step, path in checkpoint.all_in(folder) if path.suffix == ".shards"}
    best = sorted(folder.glob("best_*.shards"))
    named = {"latest": list(there.values())[-1:], "best": best[-1:]}
    wanted = named.get(which, [there[which]] if which in there else [])
    if not wanted:
        raise ValueError(f"no checkpoint {which} in parts in {folder}; there are {', '.join(there) or 'none'}"
                         f"{' and best' if best else ''}")
    return wanted[0]


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    with user_errors():
        places, pairs = split_arguments(argv)
        which = pairs.pop("checkpoint", "latest")
        if len(places) != 1 or pairs:
            raise ValueError(f"one folder of a run and checkpoint=... are wanted, got {' '.join(argv)}")
        folder = Path(places[0])
        parts = find(folder, which)
        with Lock(folder):
            state = load(parts)
            del state["shards"]
            for tensors in (state["model"], *state["optimizer"].values()):
                tensors |= {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}
            read_into(state, parts)
            one = folder / "best.pt" if which == "best" else checkpoint.path_of(folder, state["step"])
            checkpoint.save(one, {k: v for k, v in state.items() if k not in ("format", "format_version")})
        print(f"{parts} is now {one}, too: {one.stat().st_size / 1e9:.3f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
