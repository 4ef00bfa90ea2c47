"""SFT, DPO and GRPO survive interruptions, non-finite steps and out-of-memory errors as pretraining does."""

import json
import signal

import pytest
from faults.comparison import load_state, read_log, states_equal
from faults.harness import verified_steps, weights_sha256

STEPS = 8
FLAGS = {
    "tokenizer": None, "token_store": None, "size": None, "block_size": None, "global_batch_tokens": None,
    "sources": ["tinytown=60"], "per_device_train_batch_size": 2, "max_steps": STEPS, "save_steps": 4,
    "optimizer": "adamw", "gradient_accumulation_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def complete_run(sandbox, chat_base):
    """Trains a stage without interruption, once for each set of flags."""
    made = {}

    def complete(stage, **flags):
        key = json.dumps([stage, flags])
        if key not in made:
            made[key] = sandbox.new_folder()
            result = sandbox.run(made[key], stage=stage, **FLAGS | {"model": str(chat_base)} | flags)
            assert result.code == 0, result.output
        return made[key]

    return complete


def assert_resumes_identically(sandbox, complete, steps, stage, flags) -> None:
    """Interrupts a run in each of these steps, resumes it each time, and compares its end with a complete run."""
    out = sandbox.new_folder()
    for step in steps:
        result = sandbox.run(out, {"signal": int(signal.SIGTERM), "at": step, "where": "forward"}, stage=stage, **flags)
        assert result.code == 75, result.output
        assert verified_steps(out)[0] == step + 1
    result = sandbox.run(out, stage=stage, **flags)
    assert result.code == 0, result.output
    assert weights_sha256(out) == weights_sha256(complete)
    assert states_equal(load_state(out, STEPS), load_state(complete, STEPS))
    assert read_log(out) == read_log(complete)


@pytest.mark.parametrize("steps", [(3,), pytest.param((0, 2, 6), marks=pytest.mark.slow)], ids=["middle", "others"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_an_interrupted_run_ends_identically(sandbox, chat_base, complete_run, stage, steps):
    complete = complete_run(stage)
    assert_resumes_identically(sandbox, complete, steps, stage, FLAGS | {"model": str(chat_base)})
    # the loss on the validation split of the base
    assert [line["step"] for line in read_log(complete) if "base_loss" in line] == [0, STEPS]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_non_finite_step_is_skipped(sandbox, chat_base, stage):
    out = sandbox.new_folder()
    result = sandbox.run(
        out, {"poison": [3], "value": "nan", "in": "loss"}, stage=stage, **FLAGS | {"model": str(chat_base)}
    )
    assert result.code == 0, result.output
    assert (out / "diverged_rows.jsonl").is_file()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_out_of_memory_halves_the_micro_batch(sandbox, chat_base, complete_run, stage):
    out, complete = sandbox.new_folder(), complete_run(stage, logging_steps=1)
    flags = FLAGS | {"model": str(chat_base), "logging_steps": 1}
    result = sandbox.run(out, {"fits": 1, "from": 3, "in": "backward"}, stage=stage, **flags)
    assert result.code == 0 and "Out of memory at step 3" in result.output, result.output
    lines = [[line for line in read_log(run) if "loss" in line] for run in (out, complete)]
    losses, margins = ([[line.get(name, 0) for line in run] for run in lines] for name in ("loss", "rewards/margins"))
    assert losses[0][:2] == losses[1][:2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert margins[0] == pytest.approx(margins[1], rel=1e-5, abs=1e-6)  # of another order of summation


def test_dpo_trains_alike_on_two_processes(sandbox, chat_base):
    """Every step has the same pairs, and every token of a step the same weight."""
    flags = FLAGS | {"model": str(chat_base), "logging_steps": 1, "max_steps": 4}
    logged = []
    for processes in (1, 2):
        out = sandbox.new_folder()
        accumulated = 4 // processes
        result = sandbox.run(
            out, stage="dpo", processes=processes, **flags | {"gradient_accumulation_steps": accumulated}
        )
        assert result.code == 0, result.output
        lines = [line for line in read_log(out) if "loss" in line]
        logged.append([line[name] for line in lines for name in ("loss", "chosen_change", "grad_norm")])
    assert len(logged[0]) == 12
    assert logged[0] == pytest.approx(logged[1], rel=1e-4, abs=1e-6)


@pytest.fixture
def grpo_flags(sandbox, chat_base) -> dict:
    """Flags of GRPO with a reward function from a user's file."""
    mine = sandbox.folder / "mine.py"
    mine.write_text("def vowels(reply, row):\n    return sum(letter in 'aeiou' for letter in reply) / 9\n")
    flags = {"model": str(chat_base), "rewards": [f"{mine}:vowels"], "num_generations": 4, "logging_steps": 2}
    flags |= {"per_device_train_batch_size": 4, "max_completion_length": 6, "readiness_questions": 4}
    return FLAGS | flags


def test_grpo_resumes_with_the_same_samples(sandbox, grpo_flags):
    complete = sandbox.new_folder()
    result = sandbox.run(complete, stage="grpo", **grpo_flags)
    assert result.code == 0, result.output
    assert_resumes_identically(sandbox, complete, (2, 5), "grpo", grpo_flags)


def test_a_changed_reward_function_is_refused(sandbox, grpo_flags):
    out = sandbox.new_folder()
    sandbox.run(out, {"signal": int(signal.SIGTERM), "at": 3, "where": "forward"}, stage="grpo", **grpo_flags)
    (sandbox.folder / "mine.py").write_text("def vowels(reply, row):\n    return len(reply)\n")
    result = sandbox.run(out, stage="grpo", **grpo_flags)
    assert result.code == 78 and "mine.py" in result.output, result.output
