"""Resuming from weights only happens on request, keeps step and schedule, and stays recorded in the run."""

import json

import pytest
from faults.comparison import flip_bit
from faults.harness import verified_steps

from rorchat.hub import build_model_card


@pytest.fixture(scope="module")
def stopped_at_4(sandbox):
    out = sandbox.new_folder()
    assert sandbox.run(out, {"kill_at": 1, "during": 6}, logging_steps=1).code == -9
    return out


def damaged(sandbox, stopped_at_4, name):
    out = sandbox.new_folder(stopped_at_4)
    for step in (2, 4):
        flip_bit(0.5)(out / f"checkpoint-{step}" / name)
    return out


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_weights_only_resumes_at_the_step_and_is_recorded(sandbox, stopped_at_4, uninterrupted, name):
    out = damaged(sandbox, stopped_at_4, name)
    result = sandbox.run(out, logging_steps=1)
    assert result.code == 65 and "--weights_only" in result.output, result.output
    result = sandbox.run(out, logging_steps=1, weights_only=True)
    assert result.code == 0, result.output
    (event,) = (line for line in lines(out) if line.get("event") == "resumed")
    assert event["step"] == 4 and event["weights_only"] is True
    rates = [
        {line["step"]: line["learning_rate"] for line in lines(run) if "loss" in line} for run in (out, stopped_at_4)
    ]
    assert rates[0].keys() == set(range(1, 9))
    assert json.loads((out / "run.json").read_text())["weights_only"] == [4]
    assert "weights of step 4" in build_model_card(out / "model", "owner/name")


def test_a_later_resume_is_complete_and_keeps_the_record(sandbox, stopped_at_4):
    out = damaged(sandbox, stopped_at_4, "optimizer.pt")
    assert sandbox.run(out, {"kill_at": 1, "during": 8}, logging_steps=1, weights_only=True).code == -9
    assert verified_steps(out) == [6]
    result = sandbox.run(out, logging_steps=1, weights_only=True)
    assert result.code == 0, result.output
    assert json.loads((out / "run.json").read_text())["weights_only"] == [4]


def test_weights_only_keeps_schedule_and_rows(sandbox, stopped_at_4):
    out, other = damaged(sandbox, stopped_at_4, "optimizer.pt"), sandbox.new_folder(stopped_at_4)
    assert sandbox.run(out, logging_steps=1, weights_only=True).code == 0
    assert sandbox.run(other, logging_steps=1).code == 0
    keys = ("step", "learning_rate", "matrix_learning_rate", "tokens", "mixture")
    logs = [[{key: line[key] for key in keys} for line in lines(run) if "loss" in line] for run in (out, other)]
    assert logs[0] == logs[1]
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in (out, other)]
    assert losses[0][:5] == losses[1][:5] and losses[0][5:] != losses[1][5:]


def test_damaged_weights_are_refused(sandbox, stopped_at_4):
    out = damaged(sandbox, stopped_at_4, "model.safetensors")
    result = sandbox.run(out, logging_steps=1, weights_only=True)
    assert result.code == 65 and "Traceback" not in result.output, result.output


def test_weights_only_allows_another_optimizer(sandbox, stopped_at_4):
    out = sandbox.new_folder(stopped_at_4)
    result = sandbox.run(out, logging_steps=1, optimizer="adamw")
    assert result.code == 78 and "optimizer muon, now default" in result.output, result.output
    result = sandbox.run(out, logging_steps=1, optimizer="adamw", weights_only=True)
    assert result.code == 0, result.output
    assert json.loads((out / "run.json").read_text())["weights_only"] == [4]
    result = sandbox.run(sandbox.new_folder(stopped_at_4), logging_steps=1, max_steps=9, weights_only=True)
    assert result.code == 78, result.output


def test_two_processes_resume_from_weights_only(sandbox):
    out = sandbox.new_folder()
    assert sandbox.run(out, {"kill_at": 1, "during": 6}, processes=2).code == -9
    for step in (2, 4):
        flip_bit(0.5)(out / f"checkpoint-{step}" / "optimizer.pt")
    result = sandbox.run(out, weights_only=True, processes=2)
    assert result.code == 0, result.output


def test_a_finished_run_with_other_settings_is_refused(sandbox, uninterrupted):
    result = sandbox.run(sandbox.new_folder(uninterrupted), learning_rate=1e-4, weights_only=True)
    assert result.code == 78 and "learning_rate" in result.output, result.output
