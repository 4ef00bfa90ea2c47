"""A checkpoint is hashed while it is flushed; tests/faults damages and interrupts whole ones."""

import hashlib
import os
import threading
from collections import deque
from types import SimpleNamespace

import pytest

from rorchat.files import file_sha256
from rorchat.training.checkpointing import checkpoint as checkpoint_module
from rorchat.training.checkpointing import trainer_mixin
from rorchat.training.checkpointing.checkpoint import MANIFEST, Checkpoint, seal
from rorchat.training.checkpointing.trainer_mixin import CheckpointMixin

FILES = {"model.safetensors": b"weights" * 1000, "optimizer.pt": b"moments" * 2000, "nested/state.json": b"{}"}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "staged" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "staged" / name).write_bytes(content)
    return tmp_path / "staged"


def test_a_sealed_folder_has_size_and_sha256_of_every_file(folder):
    sealed = seal(folder, {"step": 3})
    assert sealed.files == {name: (len(data), file_sha256(folder / name)) for name, data in sorted(FILES.items())}
    sealed.verify()
    assert Checkpoint.read(folder).files == sealed.files


def test_files_are_hashed_while_they_are_flushed(folder, monkeypatch):
    """The first flush ends only when every file has been hashed."""
    hashed, all_hashed = [], threading.Event()
    digest, fsync = hashlib.file_digest, os.fsync

    def count(file, name):
        result = digest(file, name)
        hashed.append(file.name)
        if len(hashed) == len(FILES):
            all_hashed.set()
        return result

    def wait(descriptor):
        assert all_hashed.wait(10)
        fsync(descriptor)

    monkeypatch.setattr(checkpoint_module.hashlib, "file_digest", count)
    monkeypatch.setattr(checkpoint_module.os, "fsync", wait)
    seal(folder, {"step": 3})
    assert sorted(hashed) == sorted(str(folder / name) for name in FILES)


@pytest.mark.parametrize("failing", ["file_digest", "fsync"])
def test_a_folder_whose_files_cannot_be_read_or_flushed_is_no_checkpoint(failing, folder, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    owner = checkpoint_module.hashlib if failing == "file_digest" else checkpoint_module.os
    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(OSError, match="Input/output error"):
        seal(folder, {"step": 3})
    assert not (folder / MANIFEST).exists()


def test_a_slow_save_is_told_once_and_by_the_main_process_only(monkeypatch, capsys):
    monkeypatch.setattr(trainer_mixin, "warn_about_save_time", lambda save, step: f"{save} {step}" if save > 30 else "")
    for is_main in (True, False):
        trainer = CheckpointMixin.__new__(CheckpointMixin)
        metrics = SimpleNamespace(seconds_per_step=deque([2.0, 4.0, 9.0]))
        vars(trainer).update(_told_save_time=False, metrics=metrics, is_world_process_zero=lambda main=is_main: main)
        for seconds in (20, 40, 50):
            trainer._compare_with_grace(seconds)
        assert capsys.readouterr().err == ("40 4.0\n" if is_main else "")
