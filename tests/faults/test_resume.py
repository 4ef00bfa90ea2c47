"""Interrupted after any step, a run ends as if it had not been: weights, optimizer, schedule, random state and log."""

import json
import signal

import pytest
from faults.comparison import RAMP, STEPS, equal, log_of, state_of
from faults.harness import weights

from rorchat.training.checkpointing.checkpoint import Checkpoints

FLAGS = {
    "sources": None, "max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 5, "save_steps": 8,
    "dropout": 0.1,
}  # fmt: skip
#: What no two runs have alike: times, and what comes of them.


def assert_same(run, whole) -> None:
    assert weights(run) == weights(whole)
    assert equal(state_of(run), state_of(whole))
    assert log_of(run) == log_of(whole)


@pytest.fixture(scope="module")
def wholes(bench):
    """Uninterrupted runs, by their flags: two micro-batches a step, dropout, and a mixture that changes on the way."""
    made = {}
    mixture = bench.folder / "ramp.yaml"
    mixture.write_text(RAMP)
    FLAGS["mixture"] = str(mixture)

    def whole(**flags):
        key = json.dumps(flags, sort_keys=True)
        if key not in made:
            made[key] = bench.fresh()
            done = bench.run(made[key], **FLAGS | flags)
            assert done.code == 0, done.said
        return made[key]

    return whole


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_after_each_step(bench, wholes, workers):
    flags = FLAGS | {"dataloader_num_workers": workers}
    whole = wholes(dataloader_num_workers=workers)
    for step in range(STEPS - 1):
        out = bench.fresh()
        done = bench.run(out, {"signal": signal.SIGTERM, "at": step, "where": "forward"}, **flags)
        assert done.code == 75, done.said
        assert Checkpoints(out).committed()[0].step == step + 1
        done = bench.run(out, **flags)
        assert done.code == 0, done.said
        assert_same(out, whole)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_each_optimizer(bench, wholes, optimizer):
    whole = wholes(optimizer=optimizer)
    for step in range(0, STEPS - 1, 2):
        out = bench.fresh()
        flags = FLAGS | {"optimizer": optimizer}
        assert bench.run(out, {"signal": signal.SIGINT, "at": step, "where": "forward"}, **flags).code == 75
        assert bench.run(out, **flags).code == 0
        assert_same(out, whole)


def test_five_kills_in_a_row(bench, wholes):
    out = bench.fresh()
    for step in (8, 8, 16, 16, 24):
        assert bench.run(out, {"kill_at": 9, "during": step}, **FLAGS).code == -9
    assert bench.run(out, **FLAGS).code == 0
    assert_same(out, wholes())


def test_a_run_that_goes_on_logs_and_saves_as_often_as_it_is_told_now(bench):
    out = bench.fresh()
    assert bench.run(out, {"kill_at": 1, "during": 4}).code == -9
    assert bench.run(out, {"kill_at": 1, "during": 6}, save_steps=3, logging_steps=2).code == -9
    assert [each.step for each in Checkpoints(out).committed()] == [3, 2]
    assert [line["step"] for line in log_of(out) if "loss" in line] == [4, 6]
