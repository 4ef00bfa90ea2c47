"""Files that survive a crash: atomic writes, fsync, sha256, and a lock for a folder. Strict JSON."""

import getpass
import hashlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rorchat.errors import MismatchError, StorageError


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


def json_sha256(value: object) -> str:
    """The sha256 of a JSON value, independent of the order of keys. Manifests store it to detect changes."""
    return hashlib.sha256(to_json(value, sort_keys=True).encode()).hexdigest()


def to_json(value: object, **options: Any) -> str:
    """Strict JSON, with the options of `json.dumps`. Every JSON file of rorchat is written with this function.

    NaN and infinity, which JSON cannot represent, become the strings "nan", "inf" and "-inf".
    """
    return json.dumps(_replace_non_finite(value), allow_nan=False, **options)


def as_number(value: Any) -> Any:
    """A value that was read from JSON: NaN or infinity for the string that `to_json` has written in its place."""
    return float(value) if value in ("nan", "inf", "-inf") else value


def _replace_non_finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on a folder, which need not exist yet, among the processes of this machine.

    The lock is a file next to the folder. The operating system releases it when the process that holds it exits. On a
    shared drive that passes locks on, the lock also excludes other machines, and outlives one that is lost.

    Raises:
        MismatchError: another process holds the lock; the message says which, and how to remove what is left of it.
        StorageError: the drive has no locks.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        with path.open("a+", encoding="utf-8") as file:
            _acquire(file, folder, path)
            if not _is_same_file(path, file):
                continue  # the previous holder has deleted this file, so the lock on it is void
            _close_in_forked_processes(file)
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} ({_user_name()}, since {since})")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _acquire(file: TextIO, folder: Path, path: Path) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return
    except BlockingIOError:
        file.seek(0)
        holder = file.read()
        advice = _explain_removal(holder, path)
        raise MismatchError(
            f"{folder} is in use by {holder or 'another process'}: wait for it, or choose another folder.{advice}"
        ) from None
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be locked against a second process, because its drive has no file locks "
            f"({str(error.strerror).lower()}). Choose a folder on another drive; --mirror copies a run's checkpoints "
            "to this one."
        ) from None


def _explain_removal(holder: str, path: Path) -> str:
    """How to remove the lock of a process that has ended, if it may have: on another machine, or with an unknown id.

    Args:
        holder: the content of the lock file.
    """
    named = re.match(r"process (\d+) on (\S+)", holder)
    if named is None:
        return f" If no process uses it, delete {path}."
    process, machine = named.groups()
    if machine != socket.gethostname():
        return (
            f" {machine} is another machine: if it is lost, or `ps -p {process}` there finds nothing, delete {path} "
            "and run the same command again."
        )
    if _is_running(int(process)):
        return ""
    return (
        f" No process {process} is visible here: if the container that ran it has ended, delete {path} and run the "
        "same command again."
    )


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under an id without a name
        return f"user {os.getuid()}"


def _close_in_forked_processes(file: TextIO) -> None:
    """Closes the lock file in forked processes, which would otherwise keep the lock after their parent exits."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=file.close)


def _is_same_file(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
