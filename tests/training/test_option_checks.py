"""What is refused before data is read (numbers, schedules, settings without an effect), repeated flags, what works."""

import math
import re
from pathlib import Path

import pytest
import torch
from support import read_strict
from training_support import build_pretrain_trainer
from transformers import TrainerCallback, get_scheduler

from rorchat.errors import UsageError
from rorchat.model import build_model
from rorchat.training.arguments import StageParser, parse
from rorchat.training.dpo import DPOArguments
from rorchat.training.grpo import GRPOArguments
from rorchat.training.optim import build_optimizer
from rorchat.training.option_checks import SCHEDULES
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.sft import SFTArguments

STAGES = {"pretrain": PretrainArguments, "sft": SFTArguments, "dpo": DPOArguments, "grpo": GRPOArguments}
SIZES = {"block_size": 32, "per_device_train_batch_size": 2, "global_batch_tokens": 128, "max_steps": 4}
REQUIRED = {"pretrain": SIZES, "sft": {}, "dpo": {}, "grpo": {}}
#: Settings that may be 0: nothing is added, done or limited, or the number is a position or a seed.
MAY_BE_ZERO = {
    "learning_rate", "matrix_learning_rate", "weight_decay", "max_grad_norm", "cooldown_share", "warmup_steps",
    "sample_steps", "price_per_hour", "eval_delay", "dataloader_num_workers", "seed", "data_seed", "local_rank",
    "lora_rank", "replay_share", "chosen_drop", "label_smoothing", "ld_alpha", "f_alpha_divergence_coef", "top_k",
    "min_p", "entropy_coef", "readiness_questions", "train_tokens", "max_eval_tokens",
}  # fmt: skip
ANY_NUMBER = {"local_rank", "f_alpha_divergence_coef", "max_steps"}  # that is finite; max_steps -1 is the default


def parse_stage(stage: str, *argv: str, **settings: object):
    """Parses a command line and the settings of a function call, with those that are required."""
    source = "gsm8k=unused" if stage == "grpo" else "tinytown=60"
    required = {"model": None if stage == "pretrain" else "unused", "sources": [source], "output_dir": "x"}
    given = {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    defaults = {name: value for name, value in (required | REQUIRED[stage]).items() if name not in given}
    return parse(STAGES[stage], argv, {"bf16": False} | defaults | settings)


def refusal(stage: str, *argv: str, **settings: object) -> str:
    with pytest.raises(UsageError) as caught:
        parse_stage(stage, *argv, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def number_settings(stage: str, *types: str) -> set[str]:
    """The settings with one number that the stage accepts, inherited ones and its own."""
    actions = StageParser(STAGES[stage])._actions
    names = {a.dest for a in actions if getattr(a.type, "__name__", "") in types and a.nargs is None}
    assert len(names) > 10
    return names - STAGES[stage].UNSUPPORTED_ARGS.keys()


def not_named(names: set[str], message: str) -> list[str]:
    return sorted(name for name in names if not re.search(rf"\b{name} (is )?-?[\dni]", message))


# Numbers


@pytest.mark.parametrize("stage", STAGES)
def test_negative_numbers_are_refused_together(stage):
    names = number_settings(stage, "int", "float") - ANY_NUMBER
    assert not_named(names, refusal(stage, **dict.fromkeys(names, -1))) == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(stage, value):
    names = number_settings(stage, "float")
    assert not_named(names, refusal(stage, **dict.fromkeys(names, value))) == []


@pytest.mark.parametrize("stage", STAGES)
def test_sizes_and_intervals_of_0_are_refused(stage):
    may_be_zero = MAY_BE_ZERO | ({"beta"} if stage == "grpo" else set())
    names = number_settings(stage, "int", "float") - may_be_zero
    assert {"save_steps", "eval_steps", "logging_steps", "per_device_eval_batch_size", "max_steps"} <= names
    assert not_named(names, refusal(stage, **dict.fromkeys(names, 0))) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_steps": 0}, "save_steps is 0: give a number of steps, or a share of the run between 0 and 1."),
        ({"eval_steps": 2.5}, "eval_steps is 2.5: give a number of steps"),
        ({"warmup_steps": 1.5}, "warmup_steps is 1.5: give 0, a number of steps"),
        ({"save_total_limit": 1}, "save_total_limit is 1: give 2 or more, because"),
        ({"save_strategy": "best"}, "save_strategy is 'best': give steps or no; .*the best checkpoint is kept"),
        ({"eval_strategy": "epoch"}, "eval_strategy is 'epoch': give steps or no"),
        ({"log_level": "loud"}, "log_level is 'loud': give one of"),
        ({"optimizer": "adan"}, "optimizer is 'adan': give one of adamw, adamw_8bit, muon. Did you mean 'adamw'?"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
        ({"warmup_steps": 50, "max_steps": 40}, "warmup_steps is 50, but the run has only 40 steps"),
    ],
)
def test_one_wrong_value_is_refused_with_what_is_allowed(settings, message):
    assert re.search(message, refusal("sft", **settings))


def test_a_decay_longer_than_the_run_is_refused():
    kwargs = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 16}}
    message = (
        "num_decay_steps in lr_scheduler_kwargs is 16, but the run has only 15 steps after its warm-up: give fewer."
    )
    assert refusal("sft", max_steps=20, warmup_steps=0.25, **kwargs) == message
    parse_stage("sft", max_steps=21, warmup_steps=5, **kwargs)


def test_a_warmup_longer_than_the_run_is_refused_wherever_its_length_comes_from(tokenizer, tmp_path):
    message = "warmup_steps is 9, but the run has only 4 steps: give fewer, or a share of them below 1."
    assert refusal("pretrain", max_steps=-1, train_tokens=512, warmup_steps=9) == message
    trainer = make_trainer(tokenizer, tmp_path)
    trainer.args.warmup_steps = 9  # as if the length had followed from the data
    trainer.create_optimizer()
    with pytest.raises(UsageError, match=message):
        trainer.create_scheduler(4)


# Schedules


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("cosin", None, "lr_scheduler_type is 'cosin': give one of .* Did you mean 'cosine'?"),
        ("greedy", None, "eval_steps would change the training"),
        ("cosine_warmup_with_min_lr", None, "without lr_scheduler_kwargs: One of min_lr or min_lr_rate should be set"),
        ("linear", {"foo": 1}, "lr_scheduler_type linear with .*unexpected keyword argument 'foo'"),
        ("cosine_with_min_lr", '{"min_lr": 1e-5, "min_lr_rate": 0.1}', "Only one of min_lr or min_lr_rate"),
        ("warmup_stable_decay", {"decay_type": "linear"}, "num_decay_steps"),
        ("cosine", {"num_cycles": "two"}, "could not convert string to float"),
        ("polynomial", {"lr_end": 1}, "must be smaller than initial lr"),
        (
            "cosine_with_min_lr",
            {"min_lr_rate": 5},
            r"would be [1-5].* times learning_rate. Give settings with which it stays",
        ),
        ("cosine_with_min_lr", {"min_lr": 1.0}, "times learning_rate"),
        ("cosine_with_min_lr", {"min_lr_rate": math.nan}, "min_lr_rate in lr_scheduler_kwargs is nan: give 0"),
        ("warmup_stable_decay", {"num_decay_steps": -4}, "num_decay_steps in .* is -4: give 0 or"),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 3}, "would be 3 times learning_rate"),
        ("cosine", '{"num_cycles": NaN}', "num_cycles in lr_scheduler_kwargs is nan"),  # a rate of 0 in all steps
        ("cosine", {"last_epoch": 3}, "'initial_lr' is not specified"),
        ("inverse_sqrt", {"timescale": 0}, "division by zero"),
        ("cosine", "fast", "lr_scheduler_kwargs is no JSON object"),
        ("cosine", "{fast", "lr_scheduler_kwargs is no JSON object"),
        (
            "constant_with_warmup",
            {"a": 1},
            "lr_scheduler_kwargs has no effect with lr_scheduler_type constant_with_warmup",
        ),
    ],
)
def test_a_schedule_that_does_not_accept_its_settings_is_refused(kind, kwargs, message):
    settings = {"lr_scheduler_type": kind} | ({"lr_scheduler_kwargs": kwargs} if kwargs else {})
    assert re.search(message, refusal("sft", **settings))


def test_a_constant_schedule_has_no_warmup():
    assert parse_stage("sft", lr_scheduler_type="constant").lr_scheduler_type == "constant"
    message = refusal("sft", lr_scheduler_type="constant", warmup_steps=0.05)  # the default, but given
    assert message.startswith(
        "warmup_steps has no effect with lr_scheduler_type constant: leave it out, or give one of"
    )


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("sft", {"matrix_learning_rate": 1e-3}, "matrix_learning_rate has no effect .* adamw: .* give muon."),
        ("sft", {"cooldown_share": 0.2, "lr_scheduler_type": "linear"}, "lr_scheduler_type linear: .* give warmup"),
        ("sft", {"cooldown_share": 0.2, "lr_scheduler_kwargs": {"num_decay_steps": 3}}, "with lr_scheduler_kwargs"),
        ("sft", {"replay_share": 0.2}, "replay_share has no effect with replay None: .* give a token store"),
        ("dpo", {"eval_steps": 5}, "eval_steps has no effect with eval_strategy no: leave it out, or give steps."),
        ("grpo", {"eval_delay": 5}, "eval_delay has no effect with eval_strategy no"),
        ("pretrain", {"model": "runs/x", "tokenizer": "gpt2"}, "tokenizer has no effect .* runs/x: .* give no model."),
        ("pretrain", {"model": "runs/x", "size": "demo"}, "size has no effect with model runs/x"),
    ],
)  # fmt: skip
def test_a_setting_without_an_effect_is_refused(stage, settings, message):
    assert re.search(message, refusal(stage, **settings))


def test_a_setting_of_a_file_that_a_flag_has_made_idle_is_only_told(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("optimizer: muon\nmatrix_learning_rate: 1e-3\n")
    assert parse_stage("sft", "--config", str(config), "--optimizer", "adamw").optimizer == "adamw"
    assert capsys.readouterr().err == "matrix_learning_rate has no effect with optimizer adamw\n"
    assert parse_stage("sft", "--config", str(config)).optimizer == "muon"
    assert capsys.readouterr().err == ""
    config.write_text("optimizer: adamw\n")
    message = refusal("sft", "--config", str(config), "--matrix_learning_rate", "1e-3")
    assert message.startswith("matrix_learning_rate has no effect with optimizer adamw")


def test_a_file_beside_the_recipe_gives_no_flags(tmp_path, monkeypatch):
    """HfArgumentParser would read it, unchecked."""
    (tmp_path / "sft.args").write_text("--seed 7")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "sft.py")])
    assert parse_stage("sft").seed == 42


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_schedule_ends_at_its_share_of_every_learning_rate(tokenizer, optimizer):
    """`min_lr` and `lr_end` are shares of `learning_rate`, which Transformers reads from the optimizer's defaults."""
    model, rate = build_model("1x2x16", tokenizer, 32), 0.02
    ends = {
        "warmup_stable_decay": ({"num_decay_steps": 4}, 0), "linear": ({}, 0), "cosine": ({}, 0),
        "cosine_with_min_lr": ({"min_lr": rate / 4}, 0.25), "cosine_with_restarts": ({"num_cycles": 2}, 0),
        "cosine_warmup_with_min_lr": ({"min_lr_rate": 0.1}, None), "polynomial": ({"lr_end": rate / 10}, 0.1),
        "inverse_sqrt": ({"timescale": 3}, 0.5), "constant": ({}, 1), "constant_with_warmup": ({}, 1),
    }  # fmt: skip
    assert ends.keys() == {*SCHEDULES}
    for kind, (kwargs, share) in ends.items():
        parse_stage(
            "sft", lr_scheduler_type=kind, learning_rate=rate, **({"lr_scheduler_kwargs": kwargs} if kwargs else {})
        )
        built = build_optimizer(model, optimizer, learning_rate=rate, matrix_learning_rate=0.3, weight_decay=0.0)
        rates = [group["lr"] for group in built.param_groups]
        schedule = get_scheduler(kind, built, 0, 9, scheduler_specific_kwargs=kwargs)
        for _ in range(9):
            built.step()
            schedule.step()
        if share is not None:
            assert schedule.get_last_lr() == pytest.approx([share * rate for rate in rates]), kind


# Flags


def test_the_values_of_a_repeated_list_are_gathered():
    flags = ["--sources", "tinytown=9", "persona=5", "--rewards=stop", "--sources", "tinytown=8", "--rewards", "length"]
    arguments = parse(GRPOArguments, [*flags, "--model", "unused", "--output_dir", "x", "--bf16", "false"])
    assert arguments.sources == ["tinytown=9", "persona=5", "tinytown=8"]
    assert arguments.rewards == ["stop", "length"]  # instead of the default, not in addition to it
    assert arguments.given["sources"] == arguments.sources


def test_flags_replace_the_list_of_a_config_file(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("sources: [tinytown=1, persona=2]\noutput_dir: x\nmodel: unused\nbf16: false\n")
    flags = [f"--config={config}", "--sources", "tinytown=9", "--sources", "tinytown=8"]
    assert parse(SFTArguments, flags).sources == ["tinytown=9", "tinytown=8"]
    with pytest.raises(UsageError, match="--config is given twice"):
        parse(SFTArguments, [*flags, "--config", str(config)])


def test_the_last_value_of_another_repeated_flag_counts_and_is_told(capsys):
    assert (
        parse_stage("sft", "--learning_rate", "1", "--seed", "3", "--learning-rate=2", "--seed", "3").learning_rate == 2
    )
    assert capsys.readouterr().err == "--learning_rate is given twice: the last value counts, 2.0\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning", "1"], "Unknown option --learning. Did you mean 'learning_rate'? See --help."),
        (
            ["--warmup_ratio", "0.1"],
            "Unknown option --warmup_ratio. Give --warmup_steps, with a share below 1. See --help.",
        ),
        (["--packin", "x"], "Unknown option --packin. See --help."),  # not packing, which is refused
        (["--confg", "a.yaml"], "Unknown option --confg. Did you mean 'config'? See --help."),
        (
            ["stray", "--seed", "1", "-lr", "3"],
            "Unexpected 'stray -lr 3': give every setting as --NAME VALUE. See --help.",
        ),
    ],
)
def test_words_that_are_no_setting_are_refused(argv, message):
    assert refusal("sft", *argv) == message


@pytest.mark.parametrize("value", ["0", ".nan", ".inf", "-1"])
def test_a_config_file_is_checked_like_flags(tmp_path, value):
    config = tmp_path / "c.yaml"
    config.write_text(f"learning_rate: 6e-4\nsave_steps: {value}\n")
    assert refusal("sft", "--config", str(config)).startswith("save_steps is ")


# What works


class GradNorms(TrainerCallback):
    """Records the norm of the gradients that the optimizer receives."""

    def __init__(self):
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())


def make_trainer(tokenizer, folder: Path, **settings: object):
    settings = {"output_dir": folder, "validation_share": 0.2, "save_strategy": "no"} | settings
    arguments = parse_stage("pretrain", **settings)
    return build_pretrain_trainer(build_model("2x2x32", tokenizer, 32), arguments, tokenizer)


def steps_with(folder: Path, key: str) -> list[int]:
    return [line["step"] for line in read_strict(folder / "metrics.jsonl") if key in line]


def test_settings_of_the_trainer_have_their_effect(tokenizer, tmp_path):
    trainer = make_trainer(
        tokenizer, tmp_path, logging_first_step=True, logging_steps=3, eval_strategy="steps", eval_steps=1,
        eval_delay=3, eval_on_start=True, max_grad_norm=1e-3, gradient_checkpointing=True, seed=5, save_total_limit=3,
        ddp_bucket_cap_mb=7,
    )  # fmt: skip
    assert torch.initial_seed() == 5
    assert trainer.accelerator.ddp_handler.bucket_cap_mb == 7
    assert trainer.checkpoints.kept == 3
    trainer.add_callback(gradients := GradNorms())
    trainer.train()
    assert steps_with(tmp_path, "loss") == [1, 3]
    assert steps_with(tmp_path, "eval_loss") == [0, 3, 4]
    assert gradients.norms == pytest.approx([1e-3] * 4, rel=1e-2)
    assert trainer.model.is_activation_checkpointing


def test_settings_of_logs_workers_and_determinism_have_their_effect(tokenizer, tmp_path, monkeypatch):
    seeds: list[int] = []
    monkeypatch.setattr("transformers.trainer.enable_full_determinism", seeds.append)
    trainer = make_trainer(
        tokenizer, tmp_path, logging_strategy="no", eval_strategy="no", dataloader_num_workers=1,
        dataloader_prefetch_factor=3, full_determinism=True, seed=6,
    )  # fmt: skip
    assert seeds == [6]
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor) == (1, 3)
    trainer.train()
    assert not (tmp_path / "metrics.jsonl").exists() or steps_with(tmp_path, "loss") == []


def test_settings_of_the_device_reach_it(monkeypatch):
    arguments = parse_stage("sft", use_cpu=True)
    assert arguments.device.type == "cpu" and not arguments.on_gpu
    enabled: list[bool] = []
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", enabled.append)
    parse_stage("sft", tf32=True)
    parse_stage("sft", tf32=False)
    assert enabled == [True, False]
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: False)
    assert "tf32 requires Ampere" in refusal("sft", tf32=True)
