"""What is left when nothing but the weights is: it goes on where that was asked for, and says so for ever after."""

import json

import pytest
from faults.comparison import flipped
from faults.harness import verified_steps

from rorchat.hub import build_model_card


@pytest.fixture(scope="module")
def at_four(bench):
    out = bench.fresh()
    assert bench.run(out, {"kill_at": 1, "during": 6}, logging_steps=1).code == -9
    return out


def damaged(bench, at_four, name):
    out = bench.fresh(at_four)
    for step in (2, 4):
        flipped(0.5)(out / f"checkpoint-{step}" / name)
    return out


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_the_newest_weights_go_on_at_their_step_and_log_and_card_say_so(bench, at_four, whole, name):
    out = damaged(bench, at_four, name)
    done = bench.run(out, logging_steps=1)
    assert done.code == 65 and "--weights_only" in done.said, done.said
    done = bench.run(out, logging_steps=1, weights_only=True)
    assert done.code == 0 and "The weights of step 4 go on alone" in done.said, done.said
    (event,) = (line for line in lines(out) if line.get("event") == "resumed")
    assert event["step"] == 4 and event["weights_only"] is True
    rates = [{line["step"]: line["learning_rate"] for line in lines(run) if "loss" in line} for run in (out, at_four)]
    assert rates[0].keys() == set(range(1, 9))
    assert json.loads((out / "run.json").read_text())["weights_only"] == [4]
    assert "(pretrain) went on from the weights of step 4 alone" in build_model_card(out / "model", "owner/name")


def test_a_later_restart_is_exact_and_remembers(bench, at_four):
    out = damaged(bench, at_four, "optimizer.pt")
    assert bench.run(out, {"kill_at": 1, "during": 8}, logging_steps=1, weights_only=True).code == -9
    assert verified_steps(out) == [6]
    done = bench.run(out, logging_steps=1, weights_only=True)
    assert done.code == 0 and "go on alone" not in done.said, done.said
    assert json.loads((out / "run.json").read_text())["weights_only"] == [4]


def test_the_schedule_and_the_rows_go_on_as_they_would_have(bench, at_four):
    out, other = damaged(bench, at_four, "optimizer.pt"), bench.fresh(at_four)
    assert bench.run(out, logging_steps=1, weights_only=True).code == 0
    assert bench.run(other, logging_steps=1).code == 0
    keys = ("step", "learning_rate", "matrix_learning_rate", "tokens", "mixture")
    told = [[{key: line[key] for key in keys} for line in lines(run) if "loss" in line] for run in (out, other)]
    assert told[0] == told[1]
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in (out, other)]
    assert losses[0][:5] == losses[1][:5] and losses[0][5:] != losses[1][5:]


def test_weights_that_do_not_verify_either_are_refused(bench, at_four):
    out = damaged(bench, at_four, "model.safetensors")
    done = bench.run(out, logging_steps=1, weights_only=True)
    assert done.code == 65 and "nor the weights of one" in done.said and "Traceback" not in done.said, done.said


def test_another_optimizer_goes_on_from_the_weights_where_that_was_asked_for(bench, at_four):
    out = bench.fresh(at_four)
    done = bench.run(out, logging_steps=1, optimizer="adamw")
    assert done.code == 78 and "optimizer muon, now default" in done.said, done.said
    done = bench.run(out, logging_steps=1, optimizer="adamw", weights_only=True)
    assert done.code == 0 and "the weights alone go on" in done.said, done.said
    assert json.loads((out / "run.json").read_text())["weights_only"] == [4]
    done = bench.run(bench.fresh(at_four), logging_steps=1, max_steps=9, weights_only=True)
    assert done.code == 78, done.said


def test_two_processes(bench):
    out = bench.fresh()
    assert bench.run(out, {"kill_at": 1, "during": 6}, processes=2).code == -9
    for step in (2, 4):
        flipped(0.5)(out / f"checkpoint-{step}" / "optimizer.pt")
    done = bench.run(out, weights_only=True, processes=2)
    assert done.code == 0 and "The weights of step 4 go on alone" in done.said, done.said


def test_a_finished_run_of_other_settings_is_another_run(bench, whole):
    done = bench.run(bench.fresh(whole), learning_rate=1e-4, weights_only=True)
    assert done.code == 78 and "learning_rate" in done.said, done.said
