"""File systems that cannot rename or flush folders, and copied runs: resuming needs no times, names or renames."""

import errno
import os

import pytest
from faults.harness import kill_during_save, verified_steps, weights_sha256

from rorchat.training.checkpointing import checkpoint
from rorchat.training.checkpointing.checkpoint import Checkpoint, seal
from rorchat.training.checkpointing.recovery import Checkpoints


def test_a_copy_with_other_names_and_times_resumes_at_its_newest_step(sandbox, stopped_at_4, uninterrupted):
    out = sandbox.new_folder(stopped_at_4)
    (out / "checkpoint-4").rename(out / "checkpoint-1")
    for age, name in enumerate(["checkpoint-1", "checkpoint-2"]):
        for path in (out / name, *(out / name).iterdir()):
            os.utime(path, (10**9 + age, 10**9 + age))
    assert Checkpoints(out).recover().step == 4
    assert sandbox.run(out).code == 0
    assert weights_sha256(out) == weights_sha256(uninterrupted)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.ENOSYS])
def test_a_run_without_folder_renames_ends_identically(sandbox, uninterrupted, number):
    out = sandbox.new_folder()
    result = sandbox.run(out, {"no_rename": number})
    assert result.code == 0, result.output
    assert weights_sha256(out) == weights_sha256(uninterrupted)
    assert verified_steps(out) == [8, 6] and not [path for path in out.iterdir() if path.name.startswith((".t", ".s"))]


def test_a_kill_during_a_save_without_renames_costs_one_interval(sandbox, stopped_at_4, uninterrupted):
    assert not kill_during_save(sandbox, stopped_at_4, uninterrupted, every=16, no_rename=errno.EPERM)


def test_only_an_unsupported_folder_fsync_is_ignored(tmp_path, monkeypatch):
    real, failing = os.fsync, errno.EINVAL

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(failing, os.strerror(failing))
        real(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    (tmp_path / "a").write_text("a")
    seal(tmp_path, {"step": 1})
    Checkpoint.read(tmp_path).verify()
    failing = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        seal(tmp_path, {"step": 1})
