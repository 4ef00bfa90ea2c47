"""An interrupted and resumed run ends with the same weights, optimizer, schedule, random states and log."""

import json
import signal

import pytest
from faults.comparison import RAMP, load_state, read_log, states_equal
from faults.harness import weights_sha256

from rorchat.training.checkpointing.recovery import Checkpoints

STEPS = 12
FLAGS = {
    "sources": None, "max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 5, "save_steps": 4,
    "dropout": 0.1,
}  # fmt: skip


def assert_identical(run, complete) -> None:
    assert weights_sha256(run) == weights_sha256(complete)
    assert states_equal(load_state(run, STEPS), load_state(complete, STEPS))
    assert read_log(run) == read_log(complete)


@pytest.fixture(scope="module")
def complete_run(sandbox):
    """Runs training without interruption, once for each set of flags, with dropout and a mixture that changes."""
    made = {}
    mixture = sandbox.folder / "ramp.yaml"
    mixture.write_text(RAMP)
    FLAGS["mixture"] = str(mixture)

    def complete(**flags):
        key = json.dumps(flags, sort_keys=True)
        if key not in made:
            made[key] = sandbox.new_folder()
            result = sandbox.run(made[key], **FLAGS | flags)
            assert result.code == 0, result.output
        return made[key]

    return complete


def run_with_interruptions(sandbox, steps, number: int, **flags):
    """The folder of a run that was interrupted in each of these steps and resumed each time."""
    out, flags = sandbox.new_folder(), FLAGS | flags
    for step in steps:
        result = sandbox.run(out, {"signal": number, "at": step, "where": "forward"}, **flags)
        assert result.code == 75, result.output
        assert Checkpoints(out).committed()[0].step == step + 1
    result = sandbox.run(out, **flags)
    assert result.code == 0, result.output
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "every"), [(0, 1), (2, 2)])
def test_a_run_interrupted_after_every_step_ends_identically(sandbox, complete_run, workers, every):
    flags = {"dataloader_num_workers": workers}
    out = run_with_interruptions(sandbox, range(0, STEPS - 1, every), signal.SIGTERM, **flags)
    assert_identical(out, complete_run(**flags))


@pytest.mark.parametrize(
    "steps", [(5,), pytest.param(range(0, STEPS - 1, 2), marks=pytest.mark.slow)], ids=["one", "many"]
)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_every_optimizer_resumes_identically(sandbox, complete_run, optimizer, steps):
    out = run_with_interruptions(sandbox, steps, signal.SIGINT, optimizer=optimizer)
    assert_identical(out, complete_run(optimizer=optimizer))


def test_a_run_killed_five_times_ends_identically(sandbox, complete_run):
    out = sandbox.new_folder()
    for step in (4, 4, 8, 8, 12):
        assert sandbox.run(out, {"kill_at": 9, "during": step}, **FLAGS).code == -9
    assert sandbox.run(out, **FLAGS).code == 0
    assert_identical(out, complete_run())


def test_a_resumed_run_uses_the_new_logging_and_saving_intervals(sandbox):
    out = sandbox.new_folder()
    assert sandbox.run(out, {"kill_at": 1, "during": 4}).code == -9
    assert sandbox.run(out, {"kill_at": 1, "during": 6}, save_steps=3, logging_steps=2).code == -9
    assert [checkpoint.step for checkpoint in Checkpoints(out).committed()] == [3, 2]
    assert [line["step"] for line in read_log(out) if "loss" in line] == [4, 6]
