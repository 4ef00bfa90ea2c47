"""Atomic writes, hashes and the folder lock."""

import hashlib
import subprocess
import sys

import pytest

from rorchat.errors import MismatchError
from rorchat.files import file_sha256, folder_lock, json_sha256, write_atomically


def test_write_atomically_replaces_the_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def fail(_):
        raise OSError("no space left")

    monkeypatch.setattr("rorchat.files.fsync_file", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_json_sha256_ignores_the_order_of_keys():
    assert json_sha256({"a": 1, "b": [2]}) == json_sha256({"b": [2], "a": 1})
    assert json_sha256({"a": 1}) != json_sha256({"a": 2})


def test_file_sha256_equals_hashlib(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(256)) * 1000)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_locked_folder_is_refused_to_other_processes(tmp_path):
    code = (
        "import sys; from pathlib import Path; from rorchat.files import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with folder_lock(tmp_path / "run"):
        with pytest.raises(MismatchError, match=r"run is in use by process \d+ on "), folder_lock(tmp_path / "run"):
            pass
        other = subprocess.run(command, capture_output=True, text=True)
        assert other.returncode != 0 and "is in use by process" in other.stderr
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert list(tmp_path.iterdir()) == []  # the lock file is removed
