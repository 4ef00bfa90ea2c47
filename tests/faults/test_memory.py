"""Memory that runs out: the step is done again in smaller micro-batches, on the same rows, and the run goes on so."""

import json
import signal

import pytest
from faults.comparison import log_of
from faults.harness import weights

FLAGS = {"per_device_train_batch_size": 4, "logging_steps": 1}  # 4 rows a step


def events(run) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "per_device_train_batch_size", "gradient_accumulation_steps")
    return [tuple(line[key] for key in keys) for line in lines if line.get("event") == "out of memory"]


@pytest.fixture(scope="module")
def one_by_one(bench):
    """A run whose micro-batches are of one row from the first step on."""
    out = bench.fresh()
    done = bench.run(out, **FLAGS | {"per_device_train_batch_size": 1})
    assert done.code == 0, done.said
    return out


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_from_the_first_step_it_is_the_run_with_the_smaller_micro_batch(bench, one_by_one, where):
    out = bench.fresh()
    done = bench.run(out, {"fits": 1, "from": 1, "in": where}, **FLAGS)
    assert done.code == 0, done.said
    assert events(out) == [(1, 2, 2), (1, 1, 4)]
    assert "Out of memory at step 1: it is done again, and all others, with 2 rows at a time, 2 times" in done.said
    assert weights(out) == weights(one_by_one)
    assert log_of(out) == log_of(one_by_one)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_in_the_second_micro_batch_of_a_later_step_the_first_is_done_again(bench, where):
    """Sums are formed in another order then: near, not equal."""
    out, other = bench.fresh(), bench.fresh()
    flags = FLAGS | {"per_device_train_batch_size": 2, "optimizer": "adamw"}
    assert bench.run(out, {"fits": 1, "from": 5, "micro_batch": 2, "in": where}, **flags).code == 0
    assert bench.run(other, **flags).code == 0
    assert events(out) == [(5, 1, 4)]
    losses = [[line["loss"] for line in log_of(run) if "loss" in line] for run in (out, other)]
    norms = [[line["grad_norm"] for line in log_of(run) if "loss" in line] for run in (out, other)]
    assert losses[0][:4] == losses[1][:4]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_run_that_goes_on_begins_with_what_fits(bench, one_by_one):
    out = bench.fresh()
    fault = {"fits": 1, "from": 1, "in": "forward", "signal": int(signal.SIGTERM), "at": 4, "where": "forward"}
    assert bench.run(out, fault, **FLAGS).code == 75
    done = bench.run(out, {"fits": 1, "from": 1, "in": "forward"}, **FLAGS)
    assert done.code == 0, done.said
    assert len(events(out)) == 2 and "Out of memory" not in done.said
    assert weights(out) == weights(one_by_one)


def test_one_row_that_does_not_fit_ends_the_run_with_one_line(bench):
    done = bench.run(bench.fresh(), {"fits": 0, "from": 3, "in": "forward"}, **FLAGS)
    assert done.code == 2 and "Out of memory at step 3 with one row at a time" in done.said, done.said
    assert "Traceback" not in done.said


def test_no_memory_for_an_evaluation_ends_the_run_with_one_line(bench):
    done = bench.run(bench.fresh(), {"fits": 0, "from": 0, "in": "evaluate"}, **FLAGS)
    assert done.code == 2 and "not in a forward or backward pass" in done.said and "Traceback" not in done.said


def test_two_processes_end_with_75_and_go_on_with_what_fits(bench):
    out, whole = bench.fresh(), bench.fresh()
    flags = FLAGS | {"per_device_train_batch_size": 2}
    done = bench.run(out, {"fits": 1, "from": 4, "in": "backward", "rank": 1}, processes=2, **flags)
    assert done.code == 75 and "goes on from the last checkpoint with 1" in done.said, done.said
    done = bench.run(out, {"fits": 1, "from": 1, "in": "forward"}, processes=2, **flags)
    assert done.code == 0 and "Out of memory" not in done.said, done.said
    assert bench.run(whole, processes=2, **flags).code == 0
    losses = [[line["loss"] for line in log_of(run) if "loss" in line] for run in (out, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
