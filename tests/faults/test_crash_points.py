"""SIGKILL at every operation of a save: the newest checkpoint that verifies is the last or the one before, and the
same command ends with the weights of a run that nothing interrupted."""

import json
import shutil

import pytest
from faults.harness import verified_steps, weights

DURING = 6  # the third save, which removes the first checkpoint


@pytest.fixture(scope="module")
def at_four(bench):
    """A run that was killed after its second checkpoint, where every one of these begins."""
    out = bench.fresh()
    done = bench.run(out, {"kill_at": 1, "during": DURING})
    assert done.code == -9, done.said
    assert verified_steps(out) == [4, 2]
    return out


@pytest.fixture(scope="module")
def operations(bench, at_four) -> list[str]:
    out, found = bench.fresh(at_four), bench.folder / "operations.json"
    done = bench.run(out, {"count": str(found), "during": DURING})
    assert done.code == 0, done.said
    return json.loads(found.read_text())


def kill_and_go_on(bench, at_four, whole, number: int, torn: bool) -> str:
    """What is wrong after a kill at one operation, "" where nothing is."""
    out = bench.fresh(at_four)
    done = bench.run(out, {"kill_at": number, "during": DURING, "torn": torn})
    if done.code != -9:
        return f"ended with {done.code}: {done.said}"
    if (newest := max(verified_steps(out), default=0)) not in (4, 6):
        return f"the newest that verifies is of step {newest}"
    done = bench.run(out)
    if done.code:
        return f"went on with {done.code}: {done.said}"
    if weights(out) != weights(whole):
        return "ended with other weights"
    shutil.rmtree(out)
    return ""


@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_at_every_operation_of_a_save_costs_one_interval_at_most(bench, at_four, operations, whole, torn):
    print(f"{len(operations)} operations", *operations, sep="\n")  # noqa: T201
    assert len(operations) > 40
    wrong = {}
    for number, operation in [*enumerate(operations, 1)][:: 4 if torn else 1]:
        if torn and operation.split()[0] not in ("open", "save", "safe_save_file", "save_file"):
            continue  # there is no file to tear
        if found := kill_and_go_on(bench, at_four, whole, number, torn):
            wrong[f"{number} {operation}"] = found
    assert not wrong
