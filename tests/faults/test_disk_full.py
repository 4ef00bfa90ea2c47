"""The disk fills up: saved checkpoints stay, incomplete ones are removed, and the run reports the space it needs."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults.harness import fail_in_turn, leftovers, verified_steps, weights_sha256

from rorchat.errors import StorageError
from rorchat.training.checkpointing.recovery import Checkpoints
from rorchat.training.checkpointing.trainer_mixin import CheckpointMixin


@pytest.fixture(scope="module")
def operations(sandbox, stopped_at_4) -> list[str]:
    return sandbox.operations(sandbox.new_folder(stopped_at_4), {"during": 6})


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_a_failed_save_loses_no_checkpoint_and_training_continues(sandbox, operations, every):
    """The disk is full at every 12th operation of a save, or at every one."""
    assert len(operations) > 60
    assert not fail_in_turn(sandbox, operations, every, {"during": None})


def test_three_failed_saves_in_a_row_end_the_run_with_74(sandbox):
    fault = {"fail_at": 1, "during": None, "errno": errno.ENOSPC, "always": True}
    result = sandbox.run(sandbox.new_folder(), fault, max_steps=12)
    assert result.code == 74, result.output
    assert result.output.count("could not be written") == 3 and "Traceback" not in result.output


@pytest.mark.parametrize(("saves", "evaluations", "most"), [(9, "no", 3), (9, "steps", 4), (2, "steps", 2)])
def test_too_little_space_for_checkpoints_is_refused_at_the_start(monkeypatch, tmp_path, saves, evaluations, most):
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(numel=lambda: 1000, requires_grad=True)])
    arguments = SimpleNamespace(save_strategy="steps", eval_strategy=evaluations, save_steps=2, max_steps=2 * saves)
    trainer = SimpleNamespace(args=arguments, model=model, checkpoints=Checkpoints(tmp_path))
    trainer._count_upcoming_saves = lambda step: CheckpointMixin._count_upcoming_saves(trainer, step)
    free = 12_000 * most - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(StorageError, match=f"{free:,} bytes free, and checkpoints need {free + 1:,}"):
        CheckpointMixin.require_disk_space(trainer)
    free += 1
    CheckpointMixin.require_disk_space(trainer)
    free, arguments.save_strategy = 0, "no"
    CheckpointMixin.require_disk_space(trainer)


def mount(folder: Path, size: int, *options: str) -> bool:
    """Mount a tmpfs of `size` bytes, or change its size with the option "remount"; returns False if not permitted."""
    mount_options = ",".join([*options, f"size={size}"])
    return not subprocess.run(["mount", "-t", "tmpfs", "-o", mount_options, "tmpfs", str(folder)]).returncode


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    if not mount(folder, size):
        pytest.skip("tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def checkpoint_bytes(run: Path) -> int:
    return sum(path.stat().st_size for path in (run / "checkpoint-4").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_runs_on_small_disks_lose_nothing_and_finish_with_more_space(sandbox, stopped_at_4, tmp_path):
    complete, outcomes = sandbox.new_folder(), []
    assert sandbox.run(complete, max_steps=12).code == 0
    size = checkpoint_bytes(stopped_at_4)
    for multiple in (0.5, 1.2, 1.6, 2.0, 2.4, 2.8, 3.2, 3.6, 4.4, 6.0):
        with small_disk(tmp_path / f"{multiple}", int(size * multiple)) as disk:
            run = disk / "run"
            result = sandbox.run(run, max_steps=12)
            assert result.code in (0, 74) and "Traceback" not in result.output, result.output
            saved = verified_steps(run)
            outcomes.append("finished" if saved else "refused")
            assert saved if result.code == 0 else not saved and "bytes free" in result.output, result.output
            assert mount(disk, 20 * size, "remount")
            result = sandbox.run(run, max_steps=12)
            assert result.code == 0, result.output
            assert max(saved, default=0) in (0, 12) or f"step {max(saved)}/" not in result.output
            assert weights_sha256(run) == weights_sha256(complete)
            assert not leftovers(run)
    assert outcomes == sorted(outcomes, reverse=True) and len(set(outcomes)) == 2, outcomes


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_a_disk_filled_by_another_program_stops_the_run_resumably(sandbox, stopped_at_4, uninterrupted, tmp_path):
    size = checkpoint_bytes(stopped_at_4)
    with small_disk(tmp_path / "disk", 20 * size) as disk:
        fault = {"fill": str(disk / "filler"), "at": 6, "leave": size // 2}
        result = sandbox.run(disk / "run", fault, save_steps=1)
        assert result.code == 74 and result.output.count("could not be written") == 3, result.output
        assert verified_steps(disk / "run") == [5, 4]
        (disk / "filler").unlink()
        assert sandbox.run(disk / "run", save_steps=1).code == 0
        assert weights_sha256(disk / "run") == weights_sha256(uninterrupted)
