"""Fine-tuning, preference training and learning from rewards are interrupted and go on as pretraining does."""

import signal

import pytest
from faults.comparison import equal, log_of, state_of
from faults.harness import verified_steps, weights

STEPS = 8
FLAGS = {
    "tokenizer": None, "token_store": None, "size": None, "block_size": None, "global_batch_tokens": None,
    "sources": ["tinytown=60"], "per_device_train_batch_size": 2, "max_steps": STEPS, "save_steps": 4,
    "optimizer": "adamw", "gradient_accumulation_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(bench):
    out = bench.fresh()
    sources = ["tinytown=60", "persona=60"]  # conversations too: what read documents alone is refused
    done = bench.run(out, block_size=256, max_steps=2, global_batch_tokens=512, sources=sources)
    assert done.code == 0, done.said
    return out


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_interrupted_at_four_points(bench, base, stage):
    flags = FLAGS | {"model": str(base)}
    whole = bench.fresh()
    done = bench.run(whole, stage=stage, **flags)
    assert done.code == 0, done.said
    for step in (0, 2, 3, 6):
        out = bench.fresh()
        done = bench.run(out, {"signal": int(signal.SIGTERM), "at": step, "where": "forward"}, stage=stage, **flags)
        assert done.code == 75, done.said
        assert verified_steps(out)[0] == step + 1
        done = bench.run(out, stage=stage, **flags)
        assert done.code == 0, done.said
        assert weights(out) == weights(whole)
        assert equal(state_of(out, STEPS), state_of(whole, STEPS))
        assert log_of(out) == log_of(whole)
        assert [line["step"] for line in log_of(out) if "base_loss" in line] == [0, STEPS]  # of the base's hold-out


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_step_that_is_no_number_is_skipped(bench, base, stage):
    out = bench.fresh()
    done = bench.run(out, {"poison": [3], "value": "nan", "in": "loss"}, stage=stage, **FLAGS | {"model": str(base)})
    assert done.code == 0 and "Skipped" in done.said, done.said
    assert (out / "diverged_rows.jsonl").is_file()


@pytest.mark.parametrize(("stage", "fits"), [("sft", 1), ("dpo", 2)])
def test_memory_that_runs_out_halves_the_micro_batch(bench, base, stage, fits):
    """A pair is two rows."""
    out, whole, flags = bench.fresh(), bench.fresh(), FLAGS | {"model": str(base), "logging_steps": 1}
    assert bench.run(whole, stage=stage, **flags).code == 0
    done = bench.run(out, {"fits": fits, "from": 3, "in": "backward"}, stage=stage, **flags)
    assert done.code == 0 and "Out of memory at step 3" in done.said, done.said
    lines = [[line for line in log_of(run) if "loss" in line] for run in (out, whole)]
    losses, margins = ([[line.get(name, 0) for line in run] for run in lines] for name in ("loss", "rewards/margins"))
    assert losses[0][:2] == losses[1][:2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert margins[0] == pytest.approx(margins[1], abs=1e-6)


def test_preferences_are_learned_alike_on_two_processes(bench, base):
    """The same pairs in each step, and every token of a step weighs the same."""
    flags = FLAGS | {"model": str(base), "logging_steps": 1, "max_steps": 4}
    found = []
    for processes in (1, 2):
        out = bench.fresh()
        accumulated = 4 // processes
        done = bench.run(out, stage="dpo", processes=processes, **flags | {"gradient_accumulation_steps": accumulated})
        assert done.code == 0, done.said
        lines = [line for line in log_of(out) if "loss" in line]
        found.append([line[name] for line in lines for name in ("loss", "chosen_change", "grad_norm")])
    assert len(found[0]) == 12
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


@pytest.fixture
def rewarded(bench, base) -> dict:
    """Flags of a run that learns from a reward of the user's."""
    mine = bench.folder / "mine.py"
    mine.write_text("def vowels(reply, row):\n    return sum(letter in 'aeiou' for letter in reply) / 9\n")
    given = {"model": str(base), "rewards": [f"{mine}:vowels"], "num_generations": 4, "logging_steps": 2}
    given |= {"per_device_train_batch_size": 4, "max_completion_length": 6, "readiness_questions": 4}
    return FLAGS | given


@pytest.mark.parametrize("step", [2, 5])
def test_learning_from_rewards_goes_on_with_the_same_samples(bench, rewarded, step):
    whole, out = bench.fresh(), bench.fresh()
    done = bench.run(whole, stage="grpo", **rewarded)
    assert done.code == 0, done.said
    done = bench.run(out, {"signal": int(signal.SIGTERM), "at": step, "where": "forward"}, stage="grpo", **rewarded)
    assert done.code == 75, done.said
    done = bench.run(out, stage="grpo", **rewarded)
    assert done.code == 0, done.said
    assert weights(out) == weights(whole)
    assert equal(state_of(out, STEPS), state_of(whole, STEPS))
    assert log_of(out) == log_of(whole)


def test_another_reward_under_the_same_name_is_another_run(bench, rewarded):
    out = bench.fresh()
    bench.run(out, {"signal": int(signal.SIGTERM), "at": 3, "where": "forward"}, stage="grpo", **rewarded)
    (bench.folder / "mine.py").write_text("def vowels(reply, row):\n    return len(reply)\n")
    done = bench.run(out, stage="grpo", **rewarded)
    assert done.code == 78 and "mine.py" in done.said, done.said
