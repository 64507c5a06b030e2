"""Files and folders that appear whole or not at all, whatever interrupts their making."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(
    path: Path, write: Callable[[BinaryIO], Any], check: Callable[[Path], None] | None = None
) -> None:
    """Writes a file with write(file), checks it with check(its path), and only then names it path.

    If anything goes wrong, `path` keeps what it held before and the temporary file is deleted. Only
    kill -9 leaves the temporary file behind. It always has the same name, so the next call
    overwrites it, and only one process at a time may write in the folder.
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
    sync(path.parent)


@contextmanager
def new_folder(out: Path, progress: str | None = None) -> Iterator[Path]:
    """A folder beside `out` to build in. The caller renames it to `out` when it is complete.

    If the work stops before that, the folder is deleted, with one exception: `progress` names a
    file that makes it possible to go on. If that file is in the folder, the folder stays, and the
    next call with the same `out` gets it back.
    """
    made = missing_folders(out.parent)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if progress:
            folder = out.parent / f".{out.name}.partial"
            folder.mkdir(exist_ok=True)
        else:
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            folder.chmod(0o755)  # mkdtemp lets only this user in
        try:
            yield folder
        finally:
            if folder.exists() and not (progress and (folder / progress).exists()):
                shutil.rmtree(folder)
    finally:
        remove_empty(made)


def missing_folders(folder: Path) -> list[Path]:
    """The folders that must be made for this one to exist, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Removes folders, the innermost first, as long as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def sync(path: Path) -> None:
    """Waits until a file, or the list of files of a folder, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
