"""SIGKILL at every file operation of a save. The newest intact checkpoint is the last one or the one before it, and
the same command ends with the weights of an uninterrupted run."""

import shutil

import pytest
from faults.harness import verified_steps, weights_sha256

DURING = 6  # the third save, which also removes the first checkpoint
WRITERS = ("open", "save", "safe_save_file", "save_file")  # operations that can leave a torn file


@pytest.fixture(scope="module")
def operations(sandbox, stopped_at_4) -> list[str]:
    return sandbox.operations(sandbox.new_folder(stopped_at_4), {"during": DURING})


def kill_and_resume(sandbox, stopped_at_4, uninterrupted, number: int, torn: bool) -> str:
    """What is wrong after a kill at one operation, or an empty string."""
    out = sandbox.new_folder(stopped_at_4)
    result = sandbox.run(out, {"kill_at": number, "during": DURING, "torn": torn})
    if result.code != -9:
        return f"exit code {result.code}: {result.output}"
    if (newest := max(verified_steps(out), default=0)) not in (4, 6):
        return f"the newest intact checkpoint is of step {newest}"
    result = sandbox.run(out)
    if result.code:
        return f"exit code {result.code} after resuming: {result.output}"
    if weights_sha256(out) != weights_sha256(uninterrupted):
        return "different weights"
    shutil.rmtree(out)
    return ""


def failures(sandbox, stopped_at_4, uninterrupted, operations: list[tuple[int, str]], torn: bool) -> dict[str, str]:
    wrong = {
        f"{number} {operation}": kill_and_resume(sandbox, stopped_at_4, uninterrupted, number, torn)
        for number, operation in operations
    }
    return {operation: problem for operation, problem in wrong.items() if problem}


def test_a_kill_during_a_save_costs_at_most_one_interval(sandbox, stopped_at_4, operations, uninterrupted):
    """Every twelfth operation; the slow test below covers all."""
    assert len(operations) > 40
    assert not failures(sandbox, stopped_at_4, uninterrupted, [*enumerate(operations, 1)][::12], torn=False)


@pytest.mark.slow
def test_a_kill_at_any_operation_of_a_save_costs_one_interval(sandbox, stopped_at_4, operations, uninterrupted):
    print(f"{len(operations)} operations", *operations, sep="\n")  # noqa: T201
    assert not failures(sandbox, stopped_at_4, uninterrupted, [*enumerate(operations, 1)], torn=False)


@pytest.mark.slow
def test_a_torn_file_costs_at_most_one_interval(sandbox, stopped_at_4, operations, uninterrupted):
    writes = [(number, name) for number, name in enumerate(operations, 1) if name.split()[0] in WRITERS]
    assert len(writes) > 10
    assert not failures(sandbox, stopped_at_4, uninterrupted, writes[::4], torn=True)
