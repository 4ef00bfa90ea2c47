"""Two processes over gloo: a signal to one stops both at the same step, a kill of either loses one interval at most."""

import json
import signal
from functools import partial

import pytest
from faults.harness import Bench, verified_steps, weights

ranked = partial(Bench.run, processes=2)


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


@pytest.mark.parametrize(("rank", "number"), [*((0, n) for n in range(1, 78, 6)), (1, 1), (1, 2)])
def test_a_kill_of_either_during_a_save_ends_both_and_loses_one_interval(bench, whole_by_two, rank, number):
    out = bench.fresh()
    done = ranked(bench, out, {"kill_at": number, "during": 6, "rank": rank})
    assert done.code != 0
    assert verified_steps(out)[0] in (4, 6), done.said
    done = ranked(bench, out)
    assert done.code == 0, done.said
    assert weights(out) == weights(whole_by_two)


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
