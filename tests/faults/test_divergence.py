"""NaN and infinity in ten places: the step is skipped, rolled back, or ends the run with 70; nothing is saved."""

import json
import math

import pytest
import torch
from faults.harness import verified_steps
from safetensors.torch import load_file

from rorchat.training.checkpointing.recovery import Checkpoints

EVENTS = ("skipped", "rolled back", "diverged")


def events(run) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["event"]) for line in lines if line.get("event", "").startswith(EVENTS)]


def assert_finite(run) -> None:
    for checkpoint in Checkpoints(run).committed():
        tensors = [*load_file(checkpoint.folder / "model.safetensors").values()]
        states = torch.load(checkpoint.folder / "optimizer.pt", weights_only=True)["state"].values()
        tensors += [value for state in states for value in state.values() if torch.is_tensor(value)]
        assert all(tensor.isfinite().all() for tensor in tensors)


SKIPPED = {
    f"the {what} of the {name} step": {"poison": [step], "in": what}
    for what in ("loss", "gradient")
    for name, step in (("first", 1), ("middle", 4), ("last", 8))
}
SKIPPED["the loss of the second micro-batch"] = {"poison": [4], "in": "loss", "micro_batch": 2}
BY_TWO = {"the loss of the second process": {"poison": [5], "in": "loss", "rank": 1}}
#: Faults that persist, so that all later steps are non-finite, with the first such step.
PERSISTENT = {"a weight": ({"poison": [5], "in": "weight"}, 5), "a moment": ({"poison": [5], "in": "moment"}, 6)}


def assert_skipped(run, step: int) -> None:
    """One step was skipped: it has an event and its rows were written out, but it was not logged or saved."""
    assert events(run) == [(step, "skipped")]
    rows = [json.loads(line) for line in (run / "diverged_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(4 * (step - 1), 4 * step)) and all(row["text"] for row in rows)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in logged if "loss" in line and "event" not in line]
    assert steps == [other for other in range(1, 9) if other != step]
    assert all(math.isfinite(line["loss"]) for line in logged if "event" not in line and "loss" in line)
    assert verified_steps(run)[0] == 8
    assert_finite(run)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("place", [*SKIPPED, *BY_TWO])
def test_a_non_finite_step_is_skipped_and_its_rows_are_written(sandbox, value, place):
    out = sandbox.new_folder()
    fault = (SKIPPED | BY_TWO)[place]
    flags = {"processes": 2} if place in BY_TWO else {}
    result = sandbox.run(out, {**fault, "value": value}, logging_steps=1, **flags)
    assert result.code == 0 and "Traceback" not in result.output, result.output
    assert_skipped(out, *fault["poison"])


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("place", PERSISTENT)
def test_persistent_nan_rolls_back_and_continues_with_the_next_rows(sandbox, value, place):
    out = sandbox.new_folder()
    fault, first = PERSISTENT[place]
    result = sandbox.run(out, {**fault, "value": value}, max_steps=12)
    assert result.code == 0 and "Traceback" not in result.output, result.output
    skipped = [(step, "skipped") for step in range(first, first + 3)]
    assert events(out) == [*skipped, (first + 3, "rolled back to the weights of step 4")]
    assert verified_steps(out) == [12, 10]
    assert_finite(out)


def test_a_second_divergence_ends_the_run_with_70_and_a_good_checkpoint(sandbox):
    out = sandbox.new_folder()
    result = sandbox.run(out, {"poison": [3, 9], "value": "inf", "in": "weight"}, max_steps=16)
    assert result.code == 70, result.output
    assert [event.split()[0] for _, event in events(out)] == ["skipped"] * 3 + ["rolled"] + ["skipped"] * 3 + [
        "diverged"
    ]
    assert "Traceback" not in result.output
    assert verified_steps(out)[0] == 8
    assert_finite(out)


def test_a_divergence_without_a_checkpoint_ends_the_run_with_70(sandbox):
    out = sandbox.new_folder()
    result = sandbox.run(out, {"poison": [2], "value": "nan", "in": "weight"}, save_strategy="no")
    assert result.code == 70 and "Traceback" not in result.output
    assert events(out)[-1] == (5, "diverged")


@pytest.mark.parametrize(("poison", "count"), [([7, 8], 2), ([6, 7, 8], 3)])
def test_a_run_whose_last_steps_were_skipped_is_not_finished(sandbox, poison, count):
    out = sandbox.new_folder()
    result = sandbox.run(out, {"poison": poison, "value": "nan", "in": "loss"})
    assert result.code == 70 and "Traceback" not in result.output, result.output
    assert f"The last {count} of 8 steps were skipped" in result.output
    assert not (out / "model").exists()
    assert "finished" not in json.loads((out / "run.json").read_text(encoding="utf-8"))


def test_non_finite_final_weights_are_not_saved(sandbox):
    out = sandbox.new_folder()
    result = sandbox.run(out, learning_rate="1e38", matrix_learning_rate="1e38", max_steps=1, warmup_steps=0)
    assert result.code == 70, result.output
    assert not (out / "model").exists()
