"""Files and folders that appear whole or not at all, whatever interrupts their making."""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

UNFINISHED = ".rootllama-unfinished"  # the end of the name of a folder that its owner has locked


def write_atomically(
    path: Path, write: Callable[[BinaryIO], Any], check: Callable[[Path], None] | None = None
) -> None:
    """Writes a file with write(file), checks it with check(its path), and only then names it path.

    If anything goes wrong, `path` keeps what it held before and the temporary file is deleted. Only
    kill -9 leaves the temporary file behind. It always has the same name, so the next call
    replaces it, and only one process at a time may write in the folder.

    Nothing is ever written into a file that was there before. So a link in the place of `path`, or
    a second name of that file, leads no write to another place.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
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


def open_regular(path: Path) -> BinaryIO:
    """A file opened for reading. ValueError if it is not a regular file: a FIFO, for one, could
    make the reader wait for ever.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is not a regular file")
    return open(handle, "rb")


def is_own_file(path: Path) -> bool:
    """Whether a path is a regular file that has no other name. What is appended to any other one,
    such as a link, would be written elsewhere.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


@contextmanager
def new_folder(out: Path, progress: str | None = None) -> Iterator[Path]:
    """A folder beside `out` to build in. The caller renames it to `out` when it is complete.

    If the work stops before that, the folder is deleted, with one exception: `progress` names a
    file that makes it possible to go on. If that file is in the folder, the folder stays, and the
    next call with the same `out` gets it back. A process that is killed by kill -9 leaves its
    folder behind; the next call beside it deletes that folder, if the disk has locks.
    """
    made = missing_folders(out.parent)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out.parent)
        with _folder_to_build_in(out, progress) as folder:
            yield folder
    finally:
        remove_empty(made)


@contextmanager
def _folder_to_build_in(out: Path, progress: str | None) -> Iterator[Path]:
    lock = None
    if progress:
        folder = out.parent / f".{out.name}.partial"
        folder.mkdir(exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        if not progress:
            folder.chmod(0o755)  # mkdtemp lets only this user in
            lock = lock_folder(folder)
            if lock is not None:  # only then does the name say that others may delete it
                folder = folder.rename(folder.with_name(folder.name + UNFINISHED))
        yield folder
    finally:
        if folder.exists() and not (progress and (folder / progress).exists()):
            shutil.rmtree(folder)
        if lock is not None:
            os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Deletes the folders that new_folder has made here and whose owner has been killed."""
    for folder in parent.glob(f".*.????????{UNFINISHED}"):
        lock = None if folder.is_symlink() else lock_folder(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)  # another user's stays
            os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """Locks a folder until the handle is closed or this process ends, however it ends.

    None if another process has the lock, or if this system or disk has no such locks.
    """
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except (OSError, AttributeError):
        if handle is not None:
            os.close(handle)
        return None


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
    if path.is_dir() and sys.platform == "win32":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
