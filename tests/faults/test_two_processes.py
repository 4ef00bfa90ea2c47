"""Two processes over gloo: a signal to one stops both at the same step; a kill costs at most one save interval."""

import json
import signal
from functools import partial

import pytest
from faults.harness import Sandbox, kill_during_save, verified_steps, weights_sha256

run_two = partial(Sandbox.run, processes=2)


@pytest.fixture(scope="module")
def uninterrupted_by_two(sandbox):
    out = sandbox.new_folder()
    result = run_two(sandbox, out)
    assert result.code == 0, result.output
    return out


def test_a_signal_to_one_process_stops_both_resumably(sandbox, uninterrupted_by_two):
    out = sandbox.new_folder()
    for step in (0, 3, 4, 6):
        result = run_two(sandbox, out, {"signal": int(signal.SIGTERM), "at": step, "where": "forward", "rank": 1})
        assert result.code == 75 and f"Stopped at step {step + 1}, which is saved" in result.output, result.output
        assert verified_steps(out)[0] == step + 1
    assert run_two(sandbox, out).code == 0
    assert weights_sha256(out) == weights_sha256(uninterrupted_by_two)


@pytest.fixture(scope="module")
def stopped_at_4(sandbox):
    """A run of two processes with checkpoints of steps 2 and 4."""
    out = sandbox.new_folder()
    assert run_two(sandbox, out, {"kill_at": 1, "during": 6}).code != 0
    assert verified_steps(out) == [4, 2]
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "every"), [(0, 20), (1, 1)])
def test_a_kill_during_a_save_costs_at_most_one_interval(sandbox, stopped_at_4, uninterrupted_by_two, rank, every):
    """Every twentieth operation of the first process: they are the same as in a run of one process."""
    assert not kill_during_save(sandbox, stopped_at_4, uninterrupted_by_two, every, processes=2, rank=rank)


def test_one_process_resumes_a_checkpoint_of_two_on_the_same_rows(sandbox, uninterrupted_by_two):
    out = sandbox.new_folder()
    run_two(sandbox, out, {"signal": int(signal.SIGTERM), "at": 3, "where": "forward"}, logging_steps=1)
    result = sandbox.run(out, logging_steps=1)
    assert result.code == 0, result.output
    assert "processes" in result.output and "rounding" in result.output
    single = sandbox.new_folder()
    assert sandbox.run(single, logging_steps=1).code == 0
    losses = [
        {line["step"]: line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
         if "loss" in line}
        for run in (out, single)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
