"""SIGKILL at every file operation of a save costs at most one save interval, and the run resumes identically."""

import shutil
import signal
from pathlib import Path

import pytest
from faults.harness import kill_during_save, read_files, snapshot_operations, verified_steps, weights_sha256

WRITERS = ("open", "save", "safe_save_file", "save_file")  # operations that can leave a torn file
#: Files with times, or with the path of the run.
UNLIKE = {
    "config.yaml", "metrics.jsonl", "run.json", "trainer_state.json", "MANIFEST.json", ".MANIFEST.json.unfinished",
}  # fmt: skip


def test_a_kill_during_a_save_costs_at_most_one_interval(sandbox, stopped_at_4, uninterrupted):
    assert not kill_during_save(sandbox, stopped_at_4, uninterrupted, every=12)


@pytest.fixture(scope="module")
def states(sandbox, stopped_at_4) -> list[tuple[str, Path]]:
    return snapshot_operations(sandbox, sandbox.new_folder(stopped_at_4), {"during": 6})


def test_a_kill_leaves_what_a_copy_of_the_folder_contains(sandbox, stopped_at_4, states):
    """So that the next test can replace 85 kills by the copies that one run makes."""
    for operation, folder in states[::10]:
        out = sandbox.new_folder(stopped_at_4)
        assert sandbox.run(out, {"kill_at": int(folder.name), "during": 6}).code == -signal.SIGKILL
        killed, copied = read_files(out), read_files(folder)
        assert killed.keys() == copied.keys(), operation
        different = {Path(name).name for name in killed if killed[name] != copied[name]}
        assert different <= UNLIKE, operation


@pytest.mark.slow
def test_a_kill_at_any_operation_of_a_save_costs_at_most_one_interval(sandbox, states, uninterrupted):
    assert len(states) > 30
    wrong = {}
    for operation, folder in states:
        out = sandbox.new_folder(folder)
        newest = max(verified_steps(out), default=0)
        resumed = sandbox.run(out)
        if newest not in (4, 6) or resumed.code or weights_sha256(out) != weights_sha256(uninterrupted):
            wrong[f"{folder.name} {operation}"] = f"step {newest}, {resumed.code}: {resumed.output}"
        shutil.rmtree(out)
    assert not wrong


@pytest.mark.slow
def test_a_torn_file_costs_at_most_one_interval(sandbox, stopped_at_4, uninterrupted):
    assert not kill_during_save(sandbox, stopped_at_4, uninterrupted, every=4, only=WRITERS, torn=True)
