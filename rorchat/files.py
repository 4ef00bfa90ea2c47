"""Files that survive a crash: atomic writes, fsync, sha256, and a lock for a folder."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rorchat.errors import MismatchError


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step: after a crash it holds either the old or the new content."""
    staged = path.with_name(f".{path.name}.unfinished")
    staged.write_text(text, encoding="utf-8")
    fsync_file(staged)
    staged.replace(path)


def fsync_file(path: Path) -> None:
    """Flushes a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """The sha256 of a file, which is read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: dict) -> str:
    """The sha256 of a JSON object, independent of the order of its keys. Manifests store it to detect changes."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on a folder, which need not exist yet, among the processes of this machine.

    The lock is a file next to the folder. The operating system releases it when the process that holds it exits.

    Raises:
        MismatchError: another process holds the lock; the message contains its id.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        with path.open("a+", encoding="utf-8") as file:
            _acquire(file, folder)
            if not _is_same_file(path, file):
                continue  # the previous holder has deleted this file, so the lock on it is void
            _close_in_forked_processes(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _acquire(file: TextIO, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"
        raise MismatchError(f"{folder} is in use by {holder}: wait for it, or choose another folder.") from None


def _close_in_forked_processes(file: TextIO) -> None:
    """Closes the lock file in forked processes, which would otherwise keep the lock after their parent exits."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=file.close)


def _is_same_file(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
