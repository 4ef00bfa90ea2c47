"""One process at a time for a folder; the system lets go of the lock when its holder dies."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rorchat.errors import MismatchError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a lock beside a folder, which need not exist yet.

    Raises:
        MismatchError: another process holds it; says which.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        with path.open("a+", encoding="utf-8") as file:
            _lock(file, folder)
            if not _is(path, file):
                continue  # its last holder was about to delete it: the next one would hold another file
            _leave_to_parent(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _lock(file: TextIO, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"
        raise MismatchError(f"{folder} is in use by {holder}: wait for it, or choose another folder.") from None


def _leave_to_parent(file: TextIO) -> None:
    """Closes a file in the processes that this one forks: a lock is the open file's, and would outlive its holder."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=file.close)


def _is(path: Path, file: TextIO) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
