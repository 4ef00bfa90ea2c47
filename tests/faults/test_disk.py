"""A disk that fills up: nothing that was saved is lost, nothing half saved is left, and the run says what it needs."""

import errno
import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from faults.harness import verified_steps, weights

from rorchat.training.checkpointing.checkpoint import STAGING, TRASH


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


@pytest.mark.parametrize(("saves", "evaluations", "most"), [(9, "no", 3), (9, "steps", 4), (2, "steps", 2)])
def test_no_room_for_what_will_be_there_at_once_is_refused_before_the_first_step(
    monkeypatch, tmp_path, saves, evaluations, most
):
    from rorchat.errors import StorageError
    from rorchat.training.checkpointing.checkpoint import Checkpoints
    from rorchat.training.checkpointing.trainer_mixin import CheckpointMixin

    class Model:
        def parameters(self):
            return [SimpleNamespace(numel=lambda: 1000, requires_grad=True)]

    arguments = SimpleNamespace(save_strategy="steps", eval_strategy=evaluations, save_steps=2, max_steps=2 * saves)
    trainer = SimpleNamespace(args=arguments, model=Model(), checkpoints=Checkpoints(tmp_path))
    trainer._saves_to_come = lambda step: CheckpointMixin._saves_to_come(trainer, step)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=12_000 * most - 1))
    with pytest.raises(StorageError, match=f"{12_000 * most - 1:,} bytes free, and checkpoints need {12_000 * most:,}"):
        CheckpointMixin.require_room(trainer)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=12_000 * most))
    CheckpointMixin.require_room(trainer)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    trainer.args.save_strategy = "no"
    CheckpointMixin.require_room(trainer)


def small(place, size: int, *more: str) -> bool:
    """Mounts a file system of so many bytes, or changes its size."""
    options = ",".join([*more, f"size={size}"])
    return not subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]).returncode


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted")
def test_runs_on_ten_small_file_systems_lose_nothing_and_end_the_same_where_there_is_room(bench, at_four, tmp_path):
    whole, seen = bench.fresh(), {}
    assert bench.run(whole, max_steps=12).code == 0
    size = sum(path.stat().st_size for path in (at_four / "checkpoint-4").iterdir())
    for times in (0.5, 1.2, 1.6, 2.0, 2.4, 2.8, 3.2, 3.6, 4.4, 6.0):
        place = tmp_path / f"{times}"
        place.mkdir()
        if not small(place, int(size * times)):
            pytest.skip("tmpfs cannot be mounted here")
        try:
            done = bench.run(place / "run", max_steps=12)
            assert done.code in (0, 74) and "Traceback" not in done.said, done.said
            saved = verified_steps(place / "run")
            seen[times] = "done" if not done.code else "refused" if "bytes free" in done.said else "stopped"
            assert seen[times] == ("done" if saved else "refused"), done.said
            assert small(place, 20 * size, "remount")
            done = bench.run(place / "run", max_steps=12)
            assert done.code == 0, done.said
            assert max(saved, default=0) in (0, 12) or f"step {max(saved)}/" not in done.said
            assert weights(place / "run") == weights(whole)
            assert not [path for path in (place / "run").iterdir() if path.name.startswith((STAGING, TRASH))]
        finally:
            subprocess.run(["umount", str(place)], check=True)
    assert sorted(seen.values(), key=["refused", "done"].index) == [*seen.values()] and len({*seen.values()}) == 2, seen


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted")
def test_a_disk_that_somebody_else_fills_stops_the_run_with_what_it_had_and_it_goes_on_with_room(
    bench, at_four, whole, tmp_path
):
    size = sum(path.stat().st_size for path in (at_four / "checkpoint-4").iterdir())
    place = tmp_path / "small"
    place.mkdir()
    if not small(place, 20 * size):
        pytest.skip("tmpfs cannot be mounted here")
    try:
        filler = {"fill": str(place / "filler"), "at": 6, "leave": size // 2}
        done = bench.run(place / "run", filler, save_steps=1)
        assert done.code == 74 and done.said.count("could not be written") == 3, done.said
        assert verified_steps(place / "run") == [5, 4]
        (place / "filler").unlink()
        assert bench.run(place / "run", save_steps=1).code == 0
        assert weights(place / "run") == weights(whole)
    finally:
        subprocess.run(["umount", str(place)], check=True)
