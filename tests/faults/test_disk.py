"""A disk that fills up: nothing that was saved is lost, nothing half saved is left, and the run says what it needs."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
from faults.harness import verified_steps, weights

from rorchat.training.checkpoint import STAGING, TRASH


@pytest.fixture(scope="module")
def at_four(bench):
    out = bench.fresh()
    assert bench.run(out, {"kill_at": 1, "during": 6}).code == -9
    return out


@pytest.fixture(scope="module")
def operations(bench, at_four) -> list[str]:
    out, found = bench.fresh(at_four), bench.folder / "operations.json"
    assert bench.run(out, {"count": str(found), "during": 6}).code == 0
    return json.loads(found.read_text())


def test_a_full_disk_at_every_operation_loses_no_checkpoint_and_the_run_goes_on(bench, at_four, operations, whole):
    wrong = {}
    for number, operation in enumerate(operations, 1):
        out = bench.fresh(at_four)
        done = bench.run(out, {"fail_at": number, "during": 6, "errno": errno.ENOSPC})
        left = [path.name for path in out.iterdir() if path.name.startswith((STAGING, TRASH))]
        if done.code or weights(out) != weights(whole) or verified_steps(out)[0] != 8 or left:
            wrong[f"{number} {operation}"] = (done.code, verified_steps(out), left, done.said)
        shutil.rmtree(out)
    assert not wrong


def test_the_third_save_in_a_row_that_fails_ends_the_run_with_74(bench, monkeypatch):
    out = bench.fresh()
    done = bench.run(out, {"fail_at": 1, "during": None, "errno": errno.ENOSPC, "always": True}, max_steps=12)
    assert done.code == 74, done.said
    assert done.said.count("could not be written") == 3 and "Traceback" not in done.said


def test_no_room_for_two_checkpoints_is_refused_before_the_first_step(monkeypatch, tmp_path):
    from rorchat.errors import StorageError
    from rorchat.training.checkpoint import Checkpoints
    from rorchat.training.resume import ResumableTrainer

    class Model:
        def parameters(self):
            return [SimpleNamespace(numel=lambda: 1000)]

    trainer = SimpleNamespace(args=SimpleNamespace(save_strategy="steps"), model=Model())
    trainer.checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=23_999))
    with pytest.raises(StorageError, match="23,999 bytes free, and checkpoints need 24,000 more"):
        ResumableTrainer.require_room(trainer)
    trainer.args.save_strategy = "no"
    ResumableTrainer.require_room(trainer)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted")
@pytest.mark.parametrize("times", [1.2, 1.6, 2.0, 2.4, 2.8, 3.2, 3.6, 4.0, 4.4, 5.0])
def test_runs_on_a_small_file_system_end_as_they_should_and_leave_it_whole(bench, at_four, tmp_path, times):
    import subprocess

    size = sum(path.stat().st_size for path in (at_four / "checkpoint-4").iterdir())
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * times)}", "tmpfs", str(place)])
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        done = bench.run(place / "run", max_steps=12)
        assert done.code in (0, 74), done.said
        assert "Traceback" not in done.said
        steps = verified_steps(place / "run")
        if "could not be written" in done.said or done.code == 0:
            assert steps, done.said
    finally:
        subprocess.run(["umount", str(place)], check=True)
