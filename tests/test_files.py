"""Atomic writes, hashes, strict JSON and the folder lock."""

import errno
import hashlib
import json
import math
import subprocess
import sys

import pytest

from rorchat import files
from rorchat.errors import MismatchError, StorageError
from rorchat.files import as_number, file_sha256, folder_lock, json_sha256, to_json, write_atomically


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


def test_json_is_strict_and_its_numbers_can_be_read_back():
    value = {"loss": math.nan, "rows": [{"grad_norm": math.inf}, (-math.inf, 1.5)], "text": "naïve"}
    text = to_json(value, ensure_ascii=False)
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert read == {"loss": "nan", "rows": [{"grad_norm": "inf"}, ["-inf", 1.5]], "text": "naïve"}
    assert json_sha256(value) == json_sha256(read)  # of a manifest that was written and read
    assert math.isnan(as_number("nan")) and as_number("-inf") == -math.inf
    assert [as_number(given) for given in (1.5, 3, "text", None, [1])] == [1.5, 3, "text", None, [1]]


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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_drive_without_locks_is_refused_with_what_to_do(number, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def fail(*_):
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    message = "run cannot be locked .* no file locks .no locks available.. Choose a folder on another drive; --mirror"
    with pytest.raises(StorageError, match=message), folder_lock(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    ("holder", "advice"),
    [
        (
            "process 77 on node7 (anna, since 2026-11-30 14:02:00)",
            "process 77 on node7 (anna, since 2026-11-30 14:02:00): wait for it, or choose another folder. node7 is "
            "another machine: if it is lost, or `ps -p 77` there finds nothing, delete {lock} and run the same command",
        ),
        (
            "process 77 on node7",
            "if it is lost, or `ps -p 77` there finds nothing, delete {lock}",
        ),  # an earlier version
        (f"process {2**22 + 1} on this", "No process 4194305 is visible here: if the container that ran it has ended"),
        (
            "",
            "is in use by another process: wait for it, or choose another folder. If no process uses it, delete {lock}",
        ),
    ],
)
def test_the_lock_of_a_process_that_may_be_gone_says_whose_it_is_and_how_to_remove_it(
    holder, advice, tmp_path, monkeypatch
):
    monkeypatch.setattr(files.socket, "gethostname", lambda: "this")
    lock = tmp_path / ".run.lock"
    with folder_lock(tmp_path / "run"):
        own = lock.read_text()
        with pytest.raises(MismatchError) as refused, folder_lock(tmp_path / "run"):
            pass
        assert own in str(refused.value) and str(lock) not in str(refused.value)  # it runs: nothing to remove
        lock.write_text(holder)
        with pytest.raises(MismatchError) as refused, folder_lock(tmp_path / "run"):
            pass
        assert advice.format(lock=lock) in str(refused.value)
        lock.unlink()  # as advised
        with folder_lock(tmp_path / "run"):
            assert lock.read_text().startswith("process ")
