"""Out of memory: the step is repeated on the same rows in smaller micro-batches, which the rest of the run keeps."""

import json
import signal

import pytest
from faults.comparison import read_log
from faults.harness import weights_sha256

FLAGS = {"per_device_train_batch_size": 4, "logging_steps": 1}  # 4 rows a step


def events(run) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "tokens", "per_device_train_batch_size", "gradient_accumulation_steps")
    return [tuple(line[key] for key in keys) for line in lines if line.get("event") == "out of memory"]


@pytest.fixture(scope="module")
def one_row(sandbox):
    """A run with micro-batches of one row from the first step."""
    out = sandbox.new_folder()
    result = sandbox.run(out, **FLAGS | {"per_device_train_batch_size": 1})
    assert result.code == 0, result.output
    return out


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_recovery_in_the_first_step_equals_the_smaller_micro_batch(sandbox, one_row, where):
    out = sandbox.new_folder()
    result = sandbox.run(out, {"fits": 1, "from": 1, "in": where}, **FLAGS)
    assert result.code == 0, result.output
    assert events(out) == [(1, 0, 2, 2), (1, 0, 1, 4)]
    assert "Out of memory at step 1" in result.output
    assert weights_sha256(out) == weights_sha256(one_row)
    assert read_log(out) == read_log(one_row)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_recovery_in_the_second_micro_batch_repeats_the_first(sandbox, where):
    """Near, not equal: the sums are formed in another order."""
    out, other = sandbox.new_folder(), sandbox.new_folder()
    flags = FLAGS | {"per_device_train_batch_size": 2, "optimizer": "adamw"}
    assert sandbox.run(out, {"fits": 1, "from": 5, "micro_batch": 2, "in": where}, **flags).code == 0
    assert sandbox.run(other, **flags).code == 0
    assert events(out) == [(5, 4 * 128, 1, 4)]  # tokens before the step
    losses = [[line["loss"] for line in read_log(run) if "loss" in line] for run in (out, other)]
    norms = [[line["grad_norm"] for line in read_log(run) if "loss" in line] for run in (out, other)]
    assert losses[0][:4] == losses[1][:4]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_resumed_run_starts_with_the_micro_batch_that_fits(sandbox, one_row):
    out = sandbox.new_folder()
    fault = {"fits": 1, "from": 1, "in": "forward", "signal": int(signal.SIGTERM), "at": 4, "where": "forward"}
    assert sandbox.run(out, fault, **FLAGS).code == 75
    result = sandbox.run(out, {"fits": 1, "from": 1, "in": "forward"}, **FLAGS)
    assert result.code == 0, result.output
    assert len(events(out)) == 2 and "Out of memory" not in result.output
    assert weights_sha256(out) == weights_sha256(one_row)


def test_a_single_row_that_does_not_fit_ends_the_run(sandbox):
    result = sandbox.run(sandbox.new_folder(), {"fits": 0, "from": 3, "in": "forward"}, **FLAGS)
    assert result.code == 2 and "Out of memory at step 3" in result.output, result.output
    assert "Traceback" not in result.output


def test_out_of_memory_in_an_evaluation_ends_the_run(sandbox):
    result = sandbox.run(sandbox.new_folder(), {"fits": 0, "from": 0, "in": "evaluate"}, **FLAGS)
    assert result.code == 2 and "Out of memory" in result.output and "Traceback" not in result.output


def test_two_processes_end_with_75_and_resume_with_what_fits(sandbox):
    out, complete = sandbox.new_folder(), sandbox.new_folder()
    flags = FLAGS | {"per_device_train_batch_size": 2}
    result = sandbox.run(out, {"fits": 1, "from": 4, "in": "backward", "rank": 1}, processes=2, **flags)
    assert result.code == 75 and "Out of memory at step" in result.output, result.output
    result = sandbox.run(out, {"fits": 1, "from": 1, "in": "forward"}, processes=2, **flags)
    assert result.code == 0 and "Out of memory" not in result.output, result.output
    assert sandbox.run(complete, processes=2, **flags).code == 0
    losses = [[line["loss"] for line in read_log(run) if "loss" in line] for run in (out, complete)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
