"""A block is compared with its CRC once on a machine, by whichever process reads it first."""

import os
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from rorchat.errors import DataError
from rorchat.tokens import checked_blocks
from rorchat.tokens.checked_blocks import open_record
from rorchat.tokens.store import TokenStore

CRCS = np.arange(5, dtype=np.uint32)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch) -> Path:
    """The folder of the records, in a temporary folder of the test."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary" / f"rorchat-{os.getuid()}"


@pytest.fixture
def array(tmp_path) -> Path:
    np.save(tmp_path / "train.npy", np.arange(100))
    return tmp_path / "train.npy"


def test_processes_share_a_record_and_later_ones_find_it(array, own_folder):
    first, second = open_record(array, CRCS), open_record(array, CRCS)
    first[1] = 1
    if not (process := os.fork()):
        second[3] = 1
        os._exit(0)
    os.waitpid(process, 0)
    del second
    assert first.tolist() == open_record(array, CRCS).tolist() == [0, 1, 0, 1, 0]
    assert own_folder.stat().st_mode & 0o777 == 0o700 and len(list(own_folder.iterdir())) == 1


@pytest.mark.parametrize("change", ["written again", "same times", "other CRCs", "a copy"])
def test_another_content_has_a_record_of_its_own(change, array):
    open_record(array, CRCS)[:] = 1
    crcs, times = CRCS, array.stat()
    time.sleep(0.02)  # the clock of files is coarse before Linux 6.13
    if change == "other CRCs":
        crcs = CRCS + 1
    elif change == "a copy":
        original, array = array, array.with_name("copy.npy")
        array.write_bytes(original.read_bytes())
    else:
        data = bytearray(array.read_bytes())
        data[-3] ^= 4
        array.write_bytes(data)
        if change == "same times":  # the time of the change of the times cannot be set
            os.utime(array, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not open_record(array, crcs).any()


@pytest.mark.parametrize("problem", ["writable by others", "a link", "a file", "a full disk"])
def test_a_folder_that_others_may_write_to_is_not_trusted(problem, array, own_folder, tmp_path, monkeypatch):
    if problem == "writable by others":
        own_folder.mkdir()
        own_folder.chmod(0o777)
    elif problem == "a link":
        (tmp_path / "elsewhere").mkdir()
        own_folder.symlink_to(tmp_path / "elsewhere")
    elif problem == "a file":
        own_folder.touch()
    else:

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checked_blocks.os, "posix_fallocate", fail)
    open_record(array, CRCS)[:] = 1
    assert not open_record(array, CRCS).any()


def test_an_array_without_blocks_needs_no_record(array):
    assert len(open_record(array, CRCS[:0])) == 0


def test_a_store_is_checked_by_the_first_process_only_and_again_after_a_change(store, monkeypatch):
    asked, crc32 = [], zlib.crc32
    monkeypatch.setattr("rorchat.tokens.store.zlib.crc32", lambda data: asked.append(1) or crc32(data))
    for _ in range(3):
        opened = TokenStore(store.folder)
        opened.slice("train", 0, opened.tokens("train"))
        opened.slice("validation", 0, opened.tokens("validation"))
    assert len(asked) == 2  # one block of each split
    time.sleep(0.02)
    path = store.folder / "train-00000.npy"
    data = bytearray(path.read_bytes())
    data[-30] ^= 4
    path.write_bytes(data)
    opened = TokenStore(store.folder)
    with pytest.raises(DataError, match=r"block 0 \(from token 0\) has changed"):
        opened.slice("train", 0, 10)
