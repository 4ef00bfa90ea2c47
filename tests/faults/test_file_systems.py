"""Where folders cannot be renamed or flushed, and where a run was copied: nothing hangs on times, names or renames."""

import errno
import json
import os
import shutil

import pytest
from faults.harness import verified_steps, weights

from rorchat.training.checkpointing import checkpoint
from rorchat.training.checkpointing.checkpoint import Checkpoint, Checkpoints, seal


def test_a_copy_with_other_times_and_other_names_goes_on_from_its_newest_step(bench, at_four, whole):
    out = bench.fresh(at_four)
    (out / "checkpoint-4").rename(out / "checkpoint-1")
    for age, name in enumerate(["checkpoint-1", "checkpoint-2"]):
        for path in (out / name, *(out / name).iterdir()):
            os.utime(path, (10**9 + age, 10**9 + age))
    assert Checkpoints(out).recover().step == 4
    assert bench.run(out).code == 0
    assert weights(out) == weights(whole)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.ENOSYS])
def test_a_run_on_a_file_system_that_renames_no_folders_ends_the_same(bench, whole, number):
    out = bench.fresh()
    done = bench.run(out, {"no_rename": number})
    assert done.code == 0, done.said
    assert weights(out) == weights(whole)
    assert verified_steps(out) == [8, 6] and not [path for path in out.iterdir() if path.name.startswith((".t", ".s"))]


def test_a_kill_while_a_folder_is_copied_in_place_of_renaming_costs_one_interval(bench, at_four, whole):
    found = bench.folder / "copied.json"
    fault = {"no_rename": errno.EPERM, "during": 6}
    assert bench.run(bench.fresh(at_four), fault | {"count": str(found)}).code == 0
    operations = json.loads(found.read_text())
    assert len(operations) > 60
    wrong = {}
    for number, operation in [*enumerate(operations, 1)][::8]:
        out = bench.fresh(at_four)
        done = bench.run(out, fault | {"kill_at": number})
        newest = max(verified_steps(out), default=0)
        again = bench.run(out, {"no_rename": errno.EPERM})
        if done.code != -9 or newest not in (4, 6) or again.code or weights(out) != weights(whole):
            wrong[f"{number} {operation}"] = (done.code, newest, again.code, again.said)
        shutil.rmtree(out)
    assert not wrong


def test_a_file_system_that_flushes_no_folders_is_taken_as_it_is_and_any_other_failure_is_one(tmp_path, monkeypatch):
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
