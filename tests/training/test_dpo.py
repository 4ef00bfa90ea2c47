"""DPO: cached reference log-probabilities, micro-batches, the stop at `chosen_drop`, and invalid settings."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from recipe_commands import inside, metrics_of, succeeded
from support import json_lines

from rorchat.chatml import encode_preferences
from rorchat.errors import UsageError
from rorchat.model import build_model, save_model
from rorchat.training.arguments import parse
from rorchat.training.context import StageContext
from rorchat.training.dpo import CHOSEN_FELL, ChatDPOTrainer, DPOArguments, collate_pairs
from rorchat.training.dpo_losses import DIFFERENCE_LOSSES, LOSSES, LOSSES_OF_PAIRS, SMOOTHED_LOSSES
from rorchat.training.kernels.dpo_logps import patch_dpo_logps

FLAGS = ["--model", "unused", "--sources", "tinytown=1", "--bf16", "false", "--logging_steps", "1"]
DROP = 0.1  # nats per token


def build_pairs(lengths: list[int], seed: int = 0) -> Dataset:
    """Random pairs whose chosen replies have these numbers of tokens."""
    generator = np.random.default_rng(seed)
    sizes = {"prompt_ids": lambda _: 4, "chosen_ids": lambda length: length, "rejected_ids": lambda _: 3}
    return Dataset.from_list(
        [
            {name: generator.integers(10, 300, size(length)).tolist() for name, size in sizes.items()}
            for length in lengths
        ]
    )


@pytest.fixture
def build_trainer(tokenizer, tmp_path):
    def make(train: Dataset, *flags: object, validation: Dataset | None = None) -> ChatDPOTrainer:
        arguments = parse(DPOArguments, [*FLAGS, "--output_dir", str(tmp_path / "run"), *map(str, flags)])
        torch.manual_seed(0)
        model = build_model("1x2x16", tokenizer, n_positions=64)
        return ChatDPOTrainer(
            model, arguments, tokenizer, train, validation or build_pairs([2, 2, 20], seed=1), StageContext()
        )

    return make


@pytest.fixture
def reference_pairs(monkeypatch) -> list[int]:
    """Records the number of pairs in each call of the reference model."""
    counts, compute = [], ChatDPOTrainer.compute_ref_log_probs

    def counted(trainer, model, inputs):
        counts.append(len(inputs["input_ids"]))
        return compute(trainer, model, inputs)

    monkeypatch.setattr(ChatDPOTrainer, "compute_ref_log_probs", counted)
    return counts


@pytest.fixture
def better_reference(monkeypatch) -> None:
    """Makes the reference prefer the chosen replies by DROP nats per token more than the model."""
    compute = ChatDPOTrainer.compute_ref_log_probs

    def better(trainer, model, inputs):
        chosen, rejected = compute(trainer, model, inputs)
        return chosen + DROP * inputs["group_sizes"][:, 1], rejected

    monkeypatch.setattr(ChatDPOTrainer, "compute_ref_log_probs", better)


def logged_values(trainer: ChatDPOTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


# The reference


def test_reference_is_computed_once_per_pair(build_trainer, reference_pairs, tmp_path, capsys):
    flags = ["--num_train_epochs", 3, "--per_device_train_batch_size", 2]
    first = build_trainer(build_pairs([3] * 5), *flags)
    assert sum(reference_pairs) == 5 + 3 and len(first.train_dataset) == 16
    again = build_trainer(build_pairs([3] * 5), *flags)
    assert sum(reference_pairs) == 5 + 3
    names = ["ref_chosen_logps", "ref_rejected_logps"]
    assert first.train_dataset.select_columns(names).to_dict() == again.train_dataset.select_columns(names).to_dict()
    stderr = capsys.readouterr().err
    assert "5 training pairs computed" in stderr and "5 training pairs read from" in stderr


@pytest.mark.parametrize("change", ["a digit", "half", "other pairs", "other settings"])
def test_damaged_or_mismatched_reference_is_computed_again(build_trainer, reference_pairs, tmp_path, change):
    build_trainer(build_pairs([3] * 5))
    file = tmp_path / "run" / ".reference_train.json"
    text = file.read_text()
    digit = text.index(".", text.index("chosen")) + 1
    other = str((int(text[digit]) + 1) % 10)
    file.write_text({"a digit": text[:digit] + other + text[digit + 1 :], "half": text[:99]}.get(change, text))
    reference_pairs.clear()
    flags = ["--ld_alpha", "0.5"] if change == "other settings" else []
    build_trainer(build_pairs([3] * 5, seed=2 if change == "other pairs" else 0), *flags)
    assert sum(reference_pairs) == (5 + 3 if change == "other settings" else 5)


# A step


def test_step_does_not_depend_on_micro_batches(build_trainer):
    """Chosen replies have very different lengths in training and validation."""
    results = []
    for micro in (4, 1):
        flags = ["--per_device_train_batch_size", micro, "--gradient_accumulation_steps", 4 // micro]
        trainer = build_trainer(build_pairs([2, 2, 2, 40]), *flags, "--per_device_eval_batch_size", micro)
        validation = trainer.evaluate()["eval_loss"]
        trainer.train()
        results.append([validation, *logged_values(trainer, "loss"), *logged_values(trainer, "grad_norm")])
    assert len(results[0]) == 3
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_cut_pairs_are_scored_like_their_sides_alone(tokenizer):
    """Dropped messages and cut replies leave log-probabilities exact, and no cut reply has a target <|im_end|>."""
    turns = [{"role": role, "content": f"A {role} says this."} for role in ("user", "assistant", "user")]
    sides = {"chosen": "Good. " * 60, "rejected": "Bad, and short."}
    replies = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    rows = [{"prompt": turns, **replies}, {"prompt": turns[2:], "chosen": replies["rejected"], "rejected": turns[1:2]}]
    pairs = encode_preferences(tokenizer, rows, 160)
    assert [(pair.dropped_turns, pair.cut_replies) for pair in pairs] == [(2, 1), (0, 0)]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in pairs[0].chosen_ids and pairs[0].rejected_ids[-1] == end
    torch.manual_seed(0)
    model = build_model("2x2x32", tokenizer, n_positions=160).eval()
    expected = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            ids, reply = torch.tensor([pair.prompt_ids + getattr(pair, side)]), getattr(pair, side)
            log_probs = model(ids).logits[0, -len(reply) - 1 : -1].log_softmax(-1)
            expected.append(log_probs[range(len(reply)), reply].sum().item())
    batch = collate_pairs([vars(pair) for pair in pairs], tokenizer.pad_token_id)
    patch_dpo_logps(model)
    scores = model(input_ids=batch["input_ids"], group_sizes=batch["group_sizes"]).log_probs.sum(1)
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)


def test_settings_of_the_loss_act_with_the_losses_for_which_they_are_accepted(build_trainer, better_reference):
    flags = ["--loss_type", "robust", "--label_smoothing", 0.2, "--beta", 0.3, "--ld_alpha", 0.5]
    trainer = build_trainer(build_pairs([3] * 4), *flags)
    assert (trainer.loss_types, trainer.label_smoothing, trainer.beta, trainer.ld_alpha) == (["robust"], 0.2, 0.3, 0.5)

    def losses_that_depend_on(owner: object, name: str, *values: object) -> set[str]:
        dependent = set()
        for kind in LOSSES:
            trainer.loss_types, trainer.args.loss_weights = [kind], [1.0]
            results = set()
            for value in values:
                setattr(owner, name, value)
                results.add(trainer.evaluate()["eval_loss"])
            if len(results) > 1:
                dependent.add(kind)
        return dependent

    # apo_down would too, if the rejected replies differed from the reference's
    assert losses_that_depend_on(trainer, "beta", 0.3, 0.4) == {*LOSSES_OF_PAIRS} - {"apo_down"}
    assert losses_that_depend_on(trainer.args, "discopop_tau", 0.5, 0.05) == {"discopop"}
    assert losses_that_depend_on(trainer, "label_smoothing", 0.3, 0.01) == {*SMOOTHED_LOSSES}
    assert losses_that_depend_on(trainer, "f_divergence_type", "js_divergence", "reverse_kl") == {*DIFFERENCE_LOSSES}
    trainer.f_divergence_type = "alpha_divergence"
    assert losses_that_depend_on(trainer, "f_alpha_divergence_coef", 0.3, 0.6) == {*DIFFERENCE_LOSSES}


def test_the_reference_is_computed_in_batches_of_the_given_size(build_trainer, reference_pairs):
    build_trainer(build_pairs([3] * 5), "--precompute_ref_batch_size", 4)
    assert reference_pairs == [4, 1, 3]


# Stopping


def test_chosen_change_does_not_depend_on_reply_length(build_trainer, better_reference):
    """One micro-batch has replies of 40 tokens, seven of 2 tokens: an unweighted mean would be six times as large."""
    flags = ["--learning_rate", 0, "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 2]
    trainer = build_trainer(build_pairs([40, 40] + [2] * 14), *flags, "--chosen_drop", 1.5 * DROP)
    trainer.train()
    assert logged_values(trainer, "chosen_change") == pytest.approx([-DROP] * 8, rel=1e-3)
    assert not trainer.stop_reason and trainer.state.global_step == 8
    trainer.evaluate()  # batches of 2 pairs and of 1 pair
    assert logged_values(trainer, "eval_rewards/chosen")[-1] == pytest.approx(
        -DROP * 0.1 * np.mean([2, 2, 20]), rel=1e-3
    )


def test_run_stops_when_chosen_replies_become_less_likely(tokenizer, tmp_path):
    save_model(build_model("1x2x16", tokenizer, n_positions=128), tokenizer, tmp_path / "base")
    turns = [[{"role": role, "content": text}] for role, text in (("assistant", "Yes."), ("assistant", "Yes, yes."))]
    rows = [
        {"prompt": [{"role": "user", "content": f"Is it {n}?"}], "chosen": turns[0], "rejected": turns[1]}
        for n in range(30)
    ]
    (tmp_path / "pairs.jsonl").write_text(json_lines(*rows))
    flags = {
        "model": tmp_path / "base", "sources": f"preference={tmp_path / 'pairs.jsonl'}", "validation_share": 0.2,
        "max_steps": 30, "logging_steps": 1, "learning_rate": 0.1, "warmup_steps": 0, "loss_type": "sigmoid",
        "output_dir": tmp_path / "run",
    }  # fmt: skip
    done = succeeded(inside("dpo", *(word for name, value in flags.items() for word in (f"--{name}", value))))
    assert "the chosen replies have lost" in done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["stopped"], record["finished"]) == (CHOSEN_FELL, True)
    assert record["metrics"]["steps"] < 30
    (event,) = [line for line in metrics_of(tmp_path / "run") if line.get("event") == CHOSEN_FELL]
    assert event["step"] == record["metrics"]["steps"] and event["chosen_change"] < -0.5


def test_nan_step_is_not_logged_and_does_not_stop_the_run(build_trainer, monkeypatch):
    compute = ChatDPOTrainer.compute_ref_log_probs

    def with_nan(trainer, model, inputs):
        chosen, rejected = compute(trainer, model, inputs)
        return chosen.masked_fill(inputs["group_sizes"][:, 1] == 20, math.nan), rejected

    monkeypatch.setattr(ChatDPOTrainer, "compute_ref_log_probs", with_nan)
    trainer = build_trainer(build_pairs([20, 20] + [2] * 6), "--per_device_train_batch_size", 2, "--logging_steps", 4)
    trainer.train()
    assert len(logged_values(trainer, "loss")) == 1 and trainer.state.global_step == 4
    last = next(line for line in trainer.state.log_history if "loss" in line)
    assert {"chosen_change", "rewards/margins"} <= last.keys()
    assert math.isnan(last.pop("grad_norm"))  # of the last step, which was skipped
    assert all(math.isfinite(value) for value in last.values() if isinstance(value, float))


# Settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loss_type sigmod sft", "No loss_type 'sigmod'. Did you mean 'sigmoid'?"),
        ("--beta 0", "beta is 0.0: give a positive number"),
        ("--beta nan", "beta is nan: give a positive number"),
        ("--loss_weights 1 2 3", "loss_weights has 3 numbers for 2 losses (sigmoid, sft)"),
        ("--loss_weights 0 0", "not all of them 0"),
        ("--loss_type exo_pair", "give a positive one, such as 1e-3"),
        ("--label_smoothing 0.5", "give a number from 0 to below 0.5"),
        ("--f_divergence_type foo", "f_divergence_type is 'foo': give one of reverse_kl"),
        ("--f_divergence_type forward_kl --loss_type bco_pair", "loss_type bco_pair needs reverse_kl"),
        ("--use_weighting true", "use_weighting cannot be set"),
        ("--precompute_ref_log_probs false", "precompute_ref_log_probs cannot be set"),
        ("--logging_strategy no", "give --chosen_drop 0"),
        (
            "--label_smoothing 0.1",
            "label_smoothing has no effect with loss_type sigmoid sft: leave it out, or",
        ),
        ("--discopop_tau 0.1", "discopop_tau has no effect with loss_type sigmoid sft"),
        ("--loss_type sft --f_divergence_type forward_kl", "f_divergence_type has no effect with loss_type sft"),
        ("--f_alpha_divergence_coef 0.7", "f_alpha_divergence_coef has no effect with f_divergence_type reverse_kl"),
    ],
)
def test_invalid_settings_raise_usage_error(flags, message, tmp_path):
    with pytest.raises(UsageError) as error:
        parse(DPOArguments, [*FLAGS, "--output_dir", str(tmp_path), *flags.split()])
    assert message in str(error.value)


def test_loss_weights_default_to_1(tmp_path):
    arguments = parse(DPOArguments, [*FLAGS, "--output_dir", str(tmp_path), "--loss_type", "sigmoid"])
    assert arguments.loss_weights == [1.0]


@pytest.mark.parametrize(("pairs", "warns"), [(3, False), (60, True)])
def test_a_margin_of_few_validation_pairs_does_not_count(build_trainer, pairs, warns):
    trainer = build_trainer(build_pairs([3] * 5), validation=build_pairs([3] * pairs, seed=1))
    trainer.state.log_history = [{"rewards/margins": 0.5}, {"eval_rewards/margins": 0.0}]
    assert any("hardly changed" in note for note in trainer.final_notes()) == warns
