"""One run, one writer: the lock on out_dir."""

import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from config.schema import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

OURS = ("ckpt_*.pt", "best.pt", "*.shards", "tokenizer.*", "*.json", "*.jsonl")  # what is written there


class Lock:
    """`folder`, made if it is missing, for this process alone; ValueError if another one has it.

    The kernel lets go when a process ends, however it ends, so no lock is ever left behind. What a killed process had
    not finished is removed, what it had put aside for that is put back.
    """

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out_dir={folder} is a file: name a folder")
        self.folder, self.path, self.made = folder, folder / ".lock", not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self.file = self.taken()
        while not self.is_at_path():  # the one before us removed it at its end
            self.file.close()
            self.file = self.taken()
        print(f"process {os.getpid()} on {socket.gethostname()}", file=self.file, flush=True)
        for aside in folder.glob(".*.shards.old"):
            there = aside.with_name(aside.name[1:].removesuffix(".old"))
            shutil.rmtree(aside) if there.exists() else aside.rename(there)
        for name in OURS:
            for unfinished in folder.glob(f".{name}.tmp"):
                shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()

    def taken(self) -> TextIO:
        """The open and locked file."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        file = open(handle, "r+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                holder = file.readline(200).strip() or "another process"
            raise ValueError(f"{self.folder} is in use by {holder}: wait until it has ended, or name another out_dir") \
                from None
        except (OSError, AttributeError) as error:  # a file system, or a system, without such locks
            warn(f"{self.folder} cannot be locked here ({error}): let no other run write there")
        file.truncate(0)
        return file

    def is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        with self.file, suppress(OSError):  # where nothing can be removed any more, it stays, but nobody holds it
            if self.is_at_path():
                self.path.unlink()
            if self.made:
                self.folder.rmdir()  # it stays if anything has come into it
