"""The lock on a run's folder: only one process at a time writes there."""

import errno
import os
import re
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from config.command import warn
from data.files import missing_folders, remove_empty

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHECKPOINT_IN_PARTS = r"(ckpt|best)_\d{8,15}\.shards"
# The files and folders there that are written under another name first: .NAME.tmp. If a process is
# killed meanwhile, it leaves that one behind. A file that somebody else calls so stays.
ATOMIC_FILES = re.compile(
    rf"{CHECKPOINT_IN_PARTS}|ckpt_\d{{8,15}}\.pt|best\.pt|(config|tokenizer|timing|plan)\.json|"
    r"tokenizer\.model|(metrics|results)\.jsonl|report\.md|(wandb|trackio)\.id|trace\.json\.gz|"
    r"loss\.png|(differences|loss_curves|step_time|learning_rate)\.(png|pdf)"
)
NOT_A_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)  # open's errors: a link, a folder, a socket
INNER_FOLDERS = ("cells", "tensorboard", "wandb")  # into which a run or a comparison writes


class FolderLost(OSError):
    """Another process has, or had, the folder of this one."""


class Lock:
    """Keeps `folder` for this process alone, and makes it if it is missing. ValueError if another
    process has it.

    The kernel releases the lock when a process ends, however it ends, so no lock is left behind.
    What a killed process had put aside is put back. Its unfinished files stay until `clean_up`.
    """

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out_dir={folder} is a file: name a folder")
        self.folder, self.path = folder, folder / ".lock"
        for inner in (folder / name for name in INNER_FOLDERS):
            if inner.is_symlink():
                raise ValueError(
                    f"{inner} is a link, and nothing is written through one: make it a folder; "
                    f"out_dir itself may be a link"
                )
        self.made = missing_folders(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self._lock()
        except OSError:  # no permission, or a name that is too long
            remove_empty(self.made)
            raise
        self._put_back()

    def take_again(self) -> None:
        """Locks a folder that has vanished and was made again."""
        before, self.file = self.file, self._lock()
        before.close()

    def _lock(self) -> TextIO:
        file = self._locked_file()
        while not self._is_at_path(file):  # its last owner removed it after we opened it
            file.close()
            file = self._locked_file()
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        return file

    def check(self) -> None:
        """To be called before anything is written. FolderLost if the lock is not this process's any
        more, although there is something in the folder: somebody has moved or removed the folder,
        or the lock, and another process may have written there. If all of it has just vanished,
        that is no reason to end: an empty folder is locked here, for a missing one see
        `take_again`."""
        if self._is_at_path(self.file) or not self.folder.is_dir():
            return
        with suppress(ValueError):  # another process was faster
            if not any(self.folder.iterdir()):
                self.take_again()
                return
        raise FolderLost(
            f"{self.folder} is not this process's any more: its {self.path.name} was moved, "
            f"removed or replaced, so nothing more is written there"
        )

    def _locked_file(self) -> TextIO:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle, foreign = None, False
        try:
            handle = os.open(self.path, flags, 0o644)
            status = os.fstat(handle)
            foreign = not stat.S_ISREG(status.st_mode) or status.st_nlink > 1
        except OSError as error:
            foreign = error.errno in NOT_A_FILE
            if not foreign:
                raise
        if foreign:
            if handle is not None:
                os.close(handle)
            raise ValueError(
                f"{self.path} is not a file of its own, as a lock is: remove it, or name another "
                f"out_dir"
            )
        file = open(handle, "r+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                holder = file.readline(200).strip() or "another process"
            raise ValueError(
                f"{self.folder} is in use by {holder}: wait until it has ended, or name another "
                f"out_dir"
            ) from None
        except (OSError, AttributeError) as error:  # a system or a disk without such locks
            reason = error if fcntl else "this system has no such locks"
            warn(f"{self.folder} cannot be locked here ({reason}): let no other run write there")
        file.truncate(0)
        return file

    def _is_at_path(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _put_back(self) -> None:
        """If a process was killed in sharded.commit_parts, a checkpoint may be aside without a new
        one in its place."""
        for aside in self.folder.glob(".*.old"):
            original = aside.with_name(aside.name[1:].removesuffix(".old"))
            if re.fullmatch(CHECKPOINT_IN_PARTS, original.name) and not original.exists():
                aside.rename(original)

    def clean_up(self) -> None:
        """Removes what a killed process left unfinished. A command calls this when nothing can be
        refused any more."""
        for left in (*self.folder.glob(".*.tmp"), *self.folder.glob(".*.old")):
            name, pattern = left.stem[1:], ATOMIC_FILES
            if left.suffix == ".old":
                pattern = re.compile(CHECKPOINT_IN_PARTS)
            if pattern.fullmatch(name):
                is_folder = left.is_dir() and not left.is_symlink()
                shutil.rmtree(left) if is_folder else left.unlink()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        # If the disk has become read-only, the file stays, but nobody holds the lock any more.
        with self.file, suppress(OSError):
            ours = self._is_at_path(self.file)
            if fcntl is None:
                self.file.close()  # Windows removes no file that is open
            if ours:
                self.path.unlink()
            remove_empty(self.made)  # but not what has been written into
