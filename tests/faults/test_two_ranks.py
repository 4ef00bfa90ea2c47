"""Two processes over gloo: a signal to one stops both at the same step, a kill of either costs one interval at most."""

import json
import shutil
import signal
from functools import partial

import pytest
from faults.harness import Bench, verified_steps, weights

ranked = partial(Bench.run, processes=2)
DURING = 6  # the third save, which removes the first checkpoint


@pytest.fixture(scope="module")
def whole_by_two(bench):
    out = bench.fresh()
    done = ranked(bench, out)
    assert done.code == 0, done.said
    return out


@pytest.mark.parametrize("step", [0, 3, 4, 6])
def test_a_signal_to_the_second_process_stops_both_and_the_end_is_the_same(bench, whole_by_two, step):
    out = bench.fresh()
    done = ranked(bench, out, {"signal": int(signal.SIGTERM), "at": step, "where": "forward", "rank": 1})
    assert done.code == 75 and f"Stopped at step {step + 1}, which is saved" in done.said, done.said
    assert verified_steps(out)[0] == step + 1
    assert ranked(bench, out).code == 0
    assert weights(out) == weights(whole_by_two)


@pytest.fixture(scope="module")
def at_four(bench):
    """A run that ended after its second checkpoint, where every kill begins."""
    out = bench.fresh()
    assert ranked(bench, out, {"kill_at": 1, "during": DURING}).code != 0
    assert verified_steps(out) == [4, 2]
    return out


def kill_and_go_on(bench, at_four, whole_by_two, rank: int, number: int) -> str:
    """What is wrong after a kill of one process at one operation, "" where nothing is."""
    out = bench.fresh(at_four)
    done = ranked(bench, out, {"kill_at": number, "during": DURING, "rank": rank})
    if not done.code:
        return "nobody was killed"
    if (newest := max(verified_steps(out), default=0)) not in (4, 6):
        return f"the newest that verifies is of step {newest}: {done.said}"
    done = ranked(bench, out)
    if done.code:
        return f"went on with {done.code}: {done.said}"
    if weights(out) != weights(whole_by_two):
        return "ended with other weights"
    shutil.rmtree(out)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "least", "every"), [(0, 40, 8), (1, 2, 1)])
def test_a_kill_at_operations_of_a_save_ends_both_and_costs_one_interval(
    bench, at_four, whole_by_two, rank, least, every
):
    """Every eighth one of the first process's ninety, which are those of one process alone; all take two minutes."""
    found = bench.folder / f"operations-{rank}.json"
    assert ranked(bench, bench.fresh(at_four), {"count": str(found), "during": DURING, "rank": rank}).code == 0
    operations = json.loads(found.read_text())
    print(f"process {rank}: {len(operations)} operations", *operations, sep="\n")  # noqa: T201
    assert len(operations) >= least
    wrong = {}
    for number, operation in [*enumerate(operations, 1)][::every]:
        if told := kill_and_go_on(bench, at_four, whole_by_two, rank, number):
            wrong[f"{number} {operation}"] = told
    assert not wrong


def test_a_checkpoint_of_two_processes_goes_on_with_one_on_the_same_rows(bench, whole_by_two):
    out = bench.fresh()
    ranked(bench, out, {"signal": int(signal.SIGTERM), "at": 3, "where": "forward"}, logging_steps=1)
    done = bench.run(out, logging_steps=1)
    assert done.code == 0, done.said
    assert "processes" in done.said and "goes on, with other roundings" in done.said
    alone = bench.fresh()
    assert bench.run(alone, logging_steps=1).code == 0
    losses = [
        {line["step"]: line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
         if "loss" in line}
        for run in (out, alone)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
