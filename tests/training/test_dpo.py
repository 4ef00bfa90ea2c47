"""Preference training: what it is held to, what is kept of it, when it stops, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from recipe_commands import inside, metrics_of, succeeded
from support import json_lines

from rorchat.errors import UsageError
from rorchat.model import build_model, save_model
from rorchat.training.arguments import parse
from rorchat.training.dpo import CHOSEN_FELL, ChatDPOTrainer, DPOArguments

FLAGS = ["--model", "given-as-an-object", "--sources", "tinytown=1", "--bf16", "false", "--logging_steps", "1"]
DROP = 0.1  # nats a token, in every reply of those tests that name it


def rows_of(lengths: list[int], seed: int = 0) -> Dataset:
    """Pairs whose chosen replies have so many tokens."""
    draw = np.random.default_rng(seed)
    sizes = {"prompt_ids": lambda _: 4, "chosen_ids": lambda length: length, "rejected_ids": lambda _: 3}
    return Dataset.from_list(
        [{name: draw.integers(10, 300, of(length)).tolist() for name, of in sizes.items()} for length in lengths]
    )


@pytest.fixture
def trainer_of(tokenizer, tmp_path):
    def make(train: Dataset, *flags: object, validation: Dataset | None = None) -> ChatDPOTrainer:
        arguments = parse(DPOArguments, [*FLAGS, "--output_dir", str(tmp_path / "run"), *map(str, flags)])
        torch.manual_seed(0)
        model = build_model("1x2x16", tokenizer, n_positions=64)
        return ChatDPOTrainer(model, arguments, tokenizer, train, validation or rows_of([2, 2, 20], seed=1))

    return make


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many pairs each call of the reference was asked for."""
    found, real = [], ChatDPOTrainer.compute_ref_log_probs

    def counted(trainer, model, inputs):
        found.append(len(inputs["input_ids"]))
        return real(trainer, model, inputs)

    monkeypatch.setattr(ChatDPOTrainer, "compute_ref_log_probs", counted)
    return found


@pytest.fixture
def shifted(monkeypatch) -> None:
    """A reference that knew every chosen token by DROP better than the model does."""
    real = ChatDPOTrainer.compute_ref_log_probs

    def better(trainer, model, inputs):
        chosen, rejected = real(trainer, model, inputs)
        return chosen + DROP * inputs["group_sizes"][:, 1], rejected

    monkeypatch.setattr(ChatDPOTrainer, "compute_ref_log_probs", better)


def lines_of(trainer: ChatDPOTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


# The reference


def test_the_reference_is_asked_once_for_a_pair_whatever_the_epochs_and_starts(trainer_of, asked, tmp_path, capsys):
    flags = ["--num_train_epochs", 3, "--per_device_train_batch_size", 2]
    first = trainer_of(rows_of([3] * 5), *flags)
    assert sum(asked) == 5 + 3 and len(first.train_dataset) == 16
    again = trainer_of(rows_of([3] * 5), *flags)
    assert sum(asked) == 5 + 3
    names = ["ref_chosen_logps", "ref_rejected_logps"]
    assert first.train_dataset.select_columns(names).to_dict() == again.train_dataset.select_columns(names).to_dict()
    said = capsys.readouterr().err
    assert "5 train pairs computed" in said and "5 train pairs read from" in said


@pytest.mark.parametrize("change", ["a digit", "half", "other pairs", "other settings"])
def test_a_reference_that_is_damaged_or_anothers_is_computed_again(trainer_of, asked, tmp_path, change):
    trainer_of(rows_of([3] * 5))
    file = tmp_path / "run" / ".reference_train.json"
    text = file.read_text()
    digit = text.index(".", text.index("chosen")) + 1
    other = str((int(text[digit]) + 1) % 10)
    file.write_text({"a digit": text[:digit] + other + text[digit + 1 :], "half": text[:99]}.get(change, text))
    asked.clear()
    flags = ["--ld_alpha", "0.5"] if change == "other settings" else []
    trainer_of(rows_of([3] * 5, seed=2 if change == "other pairs" else 0), *flags)
    assert sum(asked) == (5 + 3 if change == "other settings" else 5)


# A step


def test_a_step_is_the_same_in_whatever_micro_batches(trainer_of):
    """Of replies of very unequal lengths; the validation loss as well."""
    found = []
    for micro in (4, 1):
        flags = ["--per_device_train_batch_size", micro, "--gradient_accumulation_steps", 4 // micro]
        trainer = trainer_of(rows_of([2, 2, 2, 40]), *flags, "--per_device_eval_batch_size", micro)
        validation = trainer.evaluate()["eval_loss"]
        trainer.train()
        found.append([validation, *lines_of(trainer, "loss"), *lines_of(trainer, "grad_norm")])
    assert len(found[0]) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# When chosen replies fall


def test_what_a_chosen_token_has_lost_does_not_hang_on_the_length_of_its_reply(trainer_of, shifted):
    """40 tokens a reply in one micro-batch and 2 in seven: by the mean of all that one would have lost six times it."""
    flags = ["--learning_rate", 0, "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 2]
    trainer = trainer_of(rows_of([40, 40] + [2] * 14), *flags, "--chosen_drop", 1.5 * DROP)
    trainer.train()
    assert lines_of(trainer, "chosen_change") == pytest.approx([-DROP] * 8, rel=1e-3)
    assert not trainer.stopped and trainer.state.global_step == 8
    trainer.evaluate()  # batches of 2 pairs and of 1
    assert lines_of(trainer, "eval_rewards/chosen")[-1] == pytest.approx(-DROP * 0.1 * np.mean([2, 2, 20]), rel=1e-3)


def test_a_run_whose_chosen_replies_fall_stops_and_says_so(tokenizer, tmp_path):
    save_model(build_model("1x2x16", tokenizer, n_positions=128), tokenizer, tmp_path / "base")
    turns = [[{"role": role, "content": text}] for role, text in (("assistant", "Yes."), ("assistant", "Yes, yes."))]
    rows = [
        {"prompt": [{"role": "user", "content": f"Is it {n}?"}], "chosen": turns[0], "rejected": turns[1]}
        for n in range(30)
    ]
    (tmp_path / "pairs.jsonl").write_text(json_lines(*rows))
    given = {
        "model": tmp_path / "base", "sources": f"preference={tmp_path / 'pairs.jsonl'}", "validation_share": 0.2,
        "max_steps": 30, "logging_steps": 1, "learning_rate": 0.1, "warmup_steps": 0, "loss_type": "sigmoid",
        "output_dir": tmp_path / "run",
    }  # fmt: skip
    done = succeeded(inside("dpo", *(word for name, value in given.items() for word in (f"--{name}", value))))
    assert "the chosen replies have lost" in done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["stopped"], record["finished"]) == (CHOSEN_FELL, True)
    assert record["metrics"]["steps"] < 30
    (event,) = [line for line in metrics_of(tmp_path / "run") if line.get("event") == CHOSEN_FELL]
    assert event["step"] == record["metrics"]["steps"] and event["chosen_change"] < -0.5


def test_a_step_that_is_no_number_leaves_nothing_in_the_log_and_does_not_stop_the_run(trainer_of, monkeypatch):
    real = ChatDPOTrainer.compute_ref_log_probs

    def poisoned(trainer, model, inputs):
        chosen, rejected = real(trainer, model, inputs)
        return chosen.masked_fill(inputs["group_sizes"][:, 1] == 20, math.nan), rejected

    monkeypatch.setattr(ChatDPOTrainer, "compute_ref_log_probs", poisoned)
    trainer = trainer_of(rows_of([20, 20] + [2] * 6), "--per_device_train_batch_size", 2, "--logging_steps", 4)
    trainer.train()
    assert len(lines_of(trainer, "loss")) == 1 and trainer.state.global_step == 4
    last = next(line for line in trainer.state.log_history if "loss" in line)
    assert {"chosen_change", "rewards/margins"} <= last.keys()
    assert math.isnan(last.pop("grad_norm"))  # of the last step, which it was
    assert all(math.isfinite(value) for value in last.values() if isinstance(value, float))


# What is refused


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--loss_type sigmod sft", "No loss_type 'sigmod'. Did you mean 'sigmoid'?"),
        ("--beta 0", "beta is 0.0: give a positive number"),
        ("--beta nan", "beta is nan: give a positive number"),
        ("--loss_weights 1 2 3", "loss_weights has 3 numbers for 2 losses (sigmoid, sft)"),
        ("--loss_weights 0 0", "not all of them 0"),
        ("--loss_type exo_pair", "give a positive one, as 1e-3"),
        ("--label_smoothing 0.5", "give a number from 0 to below 0.5"),
        ("--f_divergence_type foo", "f_divergence_type is 'foo': give one of reverse_kl"),
        ("--f_divergence_type forward_kl --loss_type bco_pair", "loss_type bco_pair is of reverse_kl alone"),
        ("--use_weighting true", "use_weighting cannot be set"),
        ("--precompute_ref_log_probs false", "precompute_ref_log_probs cannot be set"),
        ("--logging_strategy no", "give --chosen_drop 0"),
    ],
)
def test_settings_that_trl_would_fail_on_later_are_refused_at_once(flags, said, tmp_path):
    with pytest.raises(UsageError) as refusal:
        parse(DPOArguments, [*FLAGS, "--output_dir", str(tmp_path), *flags.split()])
    assert said in str(refusal.value)


def test_a_loss_needs_no_weight(tmp_path):
    arguments = parse(DPOArguments, [*FLAGS, "--output_dir", str(tmp_path), "--loss_type", "sigmoid"])
    assert arguments.loss_weights == [1.0]
