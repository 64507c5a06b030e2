"""The lock on a run's folder: only one process at a time writes there."""

import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from config.command import warn
from data.files import missing_folders, remove_empty

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# The files and folders there that are written under another name first: .NAME.tmp. If a process is
# killed meanwhile, it leaves that one behind.
ATOMIC_FILES = ("ckpt_*.pt", "best.pt", "*.shards", "tokenizer.*", "*.json", "*.jsonl")


class Lock:
    """Keeps `folder` for this process alone, and makes it if it is missing. ValueError if another
    process has it.

    The kernel releases the lock when a process ends, however it ends, so no lock is left behind.
    Files that a killed process had not finished are removed, and what it had put aside is put back.
    """

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out_dir={folder} is a file: name a folder")
        self.folder, self.path = folder, folder / ".lock"
        self.made = missing_folders(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self._locked_file()
        except OSError:  # no permission, or a name that is too long
            remove_empty(self.made)
            raise
        while not self._is_at_path():  # its last owner removed it after we opened it
            self.file.close()
            self.file = self._locked_file()
        print(f"process {os.getpid()} on {socket.gethostname()}", file=self.file, flush=True)
        self._clean_up()

    def _locked_file(self) -> TextIO:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(self.path, flags, 0o644)
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
            warn(f"{self.folder} cannot be locked here ({error}): let no other run write there")
        file.truncate(0)
        return file

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _clean_up(self) -> None:
        """Removes what a killed process left unfinished. If it was killed in sharded.commit_parts,
        a checkpoint may be aside without a new one in its place. Then that one is put back."""
        for aside in self.folder.glob(".*.shards.old"):
            original = aside.with_name(aside.name[1:].removesuffix(".old"))
            shutil.rmtree(aside) if original.exists() else aside.rename(original)
        for name in ATOMIC_FILES:
            for unfinished in self.folder.glob(f".{name}.tmp"):
                shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        # If the disk has become read-only, the file stays, but nobody holds the lock any more.
        with self.file, suppress(OSError):
            if self._is_at_path():
                self.path.unlink()
            remove_empty(self.made)  # but not what has been written into
