"""Which blocks of a store have been compared with their CRCs on this machine, shared by all processes.

Every process of a run and each of its DataLoader workers reads rows from everywhere in a store. Without this record,
each of them would read and check nearly all of its blocks for itself, and again after every start.

    TMPDIR/rorchat-UID/checked-<digest>    one byte per block of an array, 1 for a block that was equal to its CRC

All processes map the file into memory. The digest stands for the array's device, inode, size and times and for its
CRCs: an array that was written again has a record of its own. Temporary folders are emptied when a machine starts.
"""

import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

import numpy as np


def open_record(array: Path, crcs: np.ndarray) -> np.ndarray:
    """One byte per block of an array file, uint8, which may be written: 1 for a block that was checked.

    Without a temporary folder of one's own to write to, and on other systems than Linux, the record is only that of
    this process.
    """
    record = np.zeros(len(crcs), dtype=np.uint8)
    if sys.platform != "linux" or not len(crcs):
        return record
    try:
        folder = _own_folder()
        return _map_file(folder / f"checked-{_digest(array, crcs)}", len(crcs)) if folder else record
    except OSError:  # the disk is full, or read-only
        return record


def _own_folder() -> Path | None:
    """The folder of the records, which others can neither read nor replace; None if somebody else has made it."""
    folder = Path(tempfile.gettempdir()) / f"rorchat-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if is_own else None


def _digest(array: Path, crcs: np.ndarray) -> str:
    found = array.stat()
    values = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return hashlib.sha256(repr(values).encode() + crcs.tobytes()).hexdigest()[:32]


def _map_file(path: Path, blocks: int) -> np.ndarray:
    """Maps a record into memory, and makes it if it does not exist: a new file is zero."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, blocks)  # otherwise a full disk would kill the process that writes a byte
        with os.fdopen(descriptor, "r+b", closefd=False) as file:
            return np.asarray(np.memmap(file, dtype=np.uint8, mode="r+", shape=(blocks,)))
    finally:
        os.close(descriptor)
