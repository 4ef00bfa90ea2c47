"""What is no number, in ten places: skipped, rolled back, or the end with 70; never saved or stepped on."""

import json
import math

import pytest
import torch
from faults.harness import verified_steps
from safetensors.torch import load_file

from rorchat.training.checkpointing.checkpoint import Checkpoints

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


ALONE = {
    f"the {what} of the {name} step": {"poison": [step], "in": what}
    for what in ("loss", "gradient")
    for name, step in (("first", 1), ("middle", 4), ("last", 8))
}
ALONE["the loss of the second micro-batch"] = {"poison": [4], "in": "loss", "micro_batch": 2}
BY_TWO = {"the loss of the second process": {"poison": [5], "in": "loss", "rank": 1}}
#: What stays, so that every step is no number from then on, and the first step that is none.
STAYING = {"a weight": ({"poison": [5], "in": "weight"}, 5), "a moment": ({"poison": [5], "in": "moment"}, 6)}


def assert_skipped(run, step: int) -> None:
    """One step was left out: told, its rows written, not logged, and nothing of it saved."""
    assert events(run) == [(step, "skipped")]
    rows = [json.loads(line) for line in (run / "diverged_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(4 * (step - 1), 4 * step)) and all(row["text"] for row in rows)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in logged if "loss" in line and "event" not in line]
    assert steps == [each for each in range(1, 9) if each != step]
    assert all(math.isfinite(line["loss"]) for line in logged if "event" not in line and "loss" in line)
    assert verified_steps(run)[0] == 8
    assert_finite(run)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("place", [*ALONE, *BY_TWO])
def test_a_step_that_is_no_number_is_skipped_and_its_rows_written_out(bench, value, place):
    out = bench.fresh()
    fault = (ALONE | BY_TWO)[place]
    flags = {"processes": 2} if place in BY_TWO else {}
    done = bench.run(out, {**fault, "value": value}, logging_steps=1, **flags)
    assert done.code == 0 and "Traceback" not in done.said, done.said
    assert_skipped(out, *fault["poison"])


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("place", STAYING)
def test_what_stays_no_number_rolls_back_once_and_goes_on_with_the_next_rows(bench, value, place):
    out = bench.fresh()
    fault, first = STAYING[place]
    done = bench.run(out, {**fault, "value": value}, max_steps=12)
    assert done.code == 0 and "Traceback" not in done.said, done.said
    skipped = [(step, "skipped") for step in range(first, first + 3)]
    assert events(out) == [*skipped, (first + 3, "rolled back to the weights of step 4")]
    assert verified_steps(out) == [12, 10]
    assert_finite(out)


def test_the_second_time_the_run_ends_with_70_and_its_last_good_checkpoint(bench):
    out = bench.fresh()
    done = bench.run(out, {"poison": [3, 9], "value": "inf", "in": "weight"}, max_steps=16)
    assert done.code == 70, done.said
    assert [event.split()[0] for _, event in events(out)] == ["skipped"] * 3 + ["rolled"] + ["skipped"] * 3 + [
        "diverged"
    ]
    assert "Traceback" not in done.said
    assert verified_steps(out)[0] == 8
    assert_finite(out)


def test_without_a_checkpoint_the_run_ends_with_70(bench):
    out = bench.fresh()
    done = bench.run(out, {"poison": [2], "value": "nan", "in": "weight"}, save_strategy="no")
    assert done.code == 70 and "Traceback" not in done.said
    assert events(out)[-1] == (5, "diverged")


def test_weights_that_are_no_numbers_after_the_last_step_are_no_result(bench):
    out = bench.fresh()
    done = bench.run(out, learning_rate="1e38", matrix_learning_rate="1e38", max_steps=1, warmup_steps=0)
    assert done.code == 70 and "no numbers" in done.said, done.said
    assert not (out / "model").exists()
