"""The mirror receives and verifies every checkpoint, never stops a run by its failures, and can restore a run."""

import json
import shutil
import subprocess

import preloaded
import pytest
from fake_hub import TOKEN, FakeHub
from faults.comparison import flip_bit
from faults.harness import ROOT, fail_in_turn, snapshot_operations, verified_steps, weights_sha256

from rorchat.training.checkpointing.recovery import Checkpoints

DURING = 6


@pytest.fixture(scope="module")
def stopped_at_4(sandbox):
    """(run, mirror), both with checkpoints of steps 2 and 4."""
    out, mirror = sandbox.new_folder(), sandbox.new_folder()
    result = sandbox.run(out, {"kill_at": 1, "mirroring": DURING}, mirror=mirror)
    assert result.code == -9, result.output
    assert verified_steps(mirror) == [4, 2]
    return out, mirror


def copies(sandbox, stopped_at_4):
    return sandbox.new_folder(stopped_at_4[0]), sandbox.new_folder(stopped_at_4[1])


@pytest.fixture(scope="module")
def operations(sandbox, stopped_at_4) -> list[str]:
    out, mirror = copies(sandbox, stopped_at_4)
    return sandbox.operations(out, {"mirroring": DURING}, mirror=mirror)


def test_a_mirror_is_a_run_folder_with_the_newest_checkpoints(sandbox, uninterrupted):
    out, mirror = sandbox.new_folder(), sandbox.new_folder()
    result = sandbox.run(out, mirror=mirror)
    assert result.code == 0 and "mirror" not in result.output, result.output
    assert weights_sha256(out) == weights_sha256(uninterrupted)
    assert verified_steps(mirror) == verified_steps(out) == [8, 6]
    for name in ("config.yaml", "metrics.jsonl"):
        assert (mirror / name).is_file()


def test_a_lost_run_is_restored_from_the_mirror_with_its_log(sandbox, stopped_at_4, uninterrupted):
    out, mirror = copies(sandbox, stopped_at_4)
    shutil.rmtree(out)
    result = sandbox.run(out, mirror=mirror)
    assert result.code == 0 and "checkpoint-4 was restored from this mirror" in result.output, result.output
    assert weights_sha256(out) == weights_sha256(uninterrupted)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6] and {"resumed"} == {
        line["event"] for line in lines if "event" in line
    }


def test_damaged_checkpoints_are_restored_from_the_mirror(sandbox, stopped_at_4, uninterrupted):
    out, mirror = copies(sandbox, stopped_at_4)
    for checkpoint in Checkpoints(out).committed():
        flip_bit(0.5)(checkpoint.folder / "optimizer.pt")
    result = sandbox.run(out, mirror=mirror)
    assert result.code == 0 and "checkpoint-4 was restored from this mirror" in result.output, result.output
    assert weights_sha256(out) == weights_sha256(uninterrupted)


def test_a_damaged_copy_is_reported_and_the_one_before_is_used(sandbox, stopped_at_4, uninterrupted):
    out, mirror = copies(sandbox, stopped_at_4)
    shutil.rmtree(out)
    flip_bit(0.5)(mirror / "checkpoint-4" / "model.safetensors")
    result = sandbox.run(out, mirror=mirror)
    assert result.code == 0, result.output
    assert "sha256 differs" in result.output and "checkpoint-2 was restored from this mirror" in result.output
    assert weights_sha256(out) == weights_sha256(uninterrupted)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("torn", "every"), [(False, 8), pytest.param(True, 4, marks=SLOW)])
def test_a_kill_during_a_copy_leaves_a_usable_mirror(sandbox, stopped_at_4, operations, uninterrupted, torn, every):
    assert len(operations) > 30
    wrong = {}
    for number, operation in [*enumerate(operations, 1)][::every]:
        if torn and operation.split()[0] != "open":
            continue
        out, mirror = copies(sandbox, stopped_at_4)
        result = sandbox.run(out, {"kill_at": number, "mirroring": DURING, "torn": torn}, mirror=mirror)
        problem = restore_and_continue(sandbox, out, mirror, uninterrupted)
        if result.code != -9 or problem:
            wrong[f"{number} {operation}"] = (result.code, problem)
    assert not wrong


def restore_and_continue(sandbox, out, mirror, uninterrupted) -> tuple | None:
    """Deletes a run and continues it from the mirror alone; returns what is wrong."""
    newest = max(verified_steps(mirror), default=0)
    shutil.rmtree(out, ignore_errors=True)
    result = sandbox.run(out, mirror=mirror)
    is_equal = result.code == 0 and weights_sha256(out) == weights_sha256(uninterrupted)
    shutil.rmtree(out)
    shutil.rmtree(mirror)
    return None if is_equal and newest in (4, 6) else (newest, result.code, result.output)


@SLOW
def test_a_kill_at_any_operation_of_a_copy_leaves_a_usable_mirror(sandbox, stopped_at_4, uninterrupted):
    """The mirror as one run copied it before every operation; test_crash_points.py compares such copies with kills."""
    out, mirror = copies(sandbox, stopped_at_4)
    states = snapshot_operations(sandbox, out, {"mirroring": DURING}, mirror=mirror)
    assert len(states) > 30
    wrong = {}
    for operation, folder in states:
        mirror = sandbox.new_folder(folder)
        if problem := restore_and_continue(sandbox, sandbox.new_folder(), mirror, uninterrupted):
            wrong[f"{folder.name} {operation}"] = problem
    assert not wrong


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=SLOW)])
def test_a_failing_mirror_neither_stops_nor_changes_the_run(sandbox, operations, every):
    assert not fail_in_turn(sandbox, operations, every, {"mirroring": None}, mirror=sandbox.new_folder())


def test_a_vanished_mirror_is_reported_and_not_recreated(sandbox, stopped_at_4, uninterrupted):
    out, mirror = copies(sandbox, stopped_at_4)
    result = sandbox.run(out, {"vanish": DURING}, mirror=mirror)
    assert result.code == 0, result.output
    assert "no longer exists" in result.output and "the newest checkpoint is checkpoint-8" in result.output
    assert weights_sha256(out) == weights_sha256(uninterrupted) and not mirror.exists()


def test_a_mirror_without_a_parent_folder_is_refused(sandbox):
    result = sandbox.run(sandbox.new_folder(), mirror=sandbox.folder / "not-mounted" / "copy")
    assert result.code == 74 and "Mount the drive" in result.output and "Traceback" not in result.output


def test_the_mirror_of_another_run_is_refused_unchanged(sandbox, stopped_at_4):
    _, mirror = copies(sandbox, stopped_at_4)
    result = sandbox.run(sandbox.new_folder(), mirror=mirror, learning_rate=0.5)
    assert result.code == 78 and "contains another run: learning_rate" in result.output, result.output
    assert verified_steps(mirror) == [4, 2]


@pytest.fixture
def on_hub(sandbox, tmp_path):
    """Runs the recipe with a fake Hub as its mirror."""

    def run(hub: FakeHub, out, **options):
        environment = hub.environment(tmp_path / "home", options.pop("token", TOKEN)) | {"PYTHONPATH": str(ROOT)}
        command = [preloaded.client("python"), "recipes/pretrain.py"]
        command += sandbox.argv(out, mirror="owner/a-run", **options)
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    return run


def copied_steps(files: dict[str, bytes]) -> set[int]:
    return {int(path.split("/")[0][11:]) for path in files if path.startswith("checkpoint-")}


@SLOW
def test_a_hub_repository_can_be_a_mirror(sandbox, uninterrupted, on_hub):
    out = sandbox.new_folder()
    with FakeHub() as hub:
        result = on_hub(hub, out)
        assert result.returncode == 0 and "mirror" not in result.stderr, result.stderr
        there = hub.files["owner/a-run"]
        assert hub.private == {"owner/a-run"}
        newest = {path.name: path.read_bytes() for path in (out / "checkpoint-8").iterdir()}
        assert newest == {path[13:]: content for path, content in there.items() if path.startswith("checkpoint-8/")}
        assert "metrics.jsonl" in there and len(copied_steps(there)) <= 2

        shutil.rmtree(out)
        older = copied_steps(there) - {8}  # which steps were copied depends on timing
        broken = bytearray(there["checkpoint-8/optimizer.pt"])
        broken[100] ^= 1
        there["checkpoint-8/optimizer.pt"] = bytes(broken)
        result = on_hub(hub, out)
        assert result.returncode == 0, result.stderr
        assert "sha256 differs" in result.stderr
        if older:
            assert f"checkpoint-{max(older)} was restored" in result.stderr
        assert weights_sha256(out) == weights_sha256(uninterrupted)


@SLOW
def test_a_hub_failure_is_reported_and_a_missing_right_refused(sandbox, uninterrupted, on_hub):
    out = sandbox.new_folder()
    with FakeHub() as hub:
        hub.failing = {"POST .*/commit/": 400}
        result = on_hub(hub, out)
        assert result.returncode == 0, result.stderr
        assert "could not be copied (" in result.stderr and "the mirror is empty" in result.stderr
        assert "Traceback" not in result.stderr and weights_sha256(out) == weights_sha256(uninterrupted)
        result = on_hub(hub, sandbox.new_folder(), token="hf_another")
        assert result.returncode == 77 and "hf auth login" in result.stderr and "Traceback" not in result.stderr
