"""The training commands as functions: `train_tokenizer`, `pretrain`, `sft`, `dpo` and `grpo`.

`rorchat sft --model gpt2 --max_steps 20` and `rorchat.sft(model="gpt2", max_steps=20)` run the same code: the recipe of
the stage, whose settings `rorchat.training.arguments.parse` checks. A function never ends the process, and leaves
signal handlers, loggers and environment variables as they were.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from rorchat.console import quiet_libraries
from rorchat.errors import Interrupted
from rorchat.recipes import dpo as dpo_recipe
from rorchat.recipes import grpo as grpo_recipe
from rorchat.recipes import pretrain as pretrain_recipe
from rorchat.recipes import sft as sft_recipe
from rorchat.recipes import tokenizer as tokenizer_recipe
from rorchat.stories import HELP_FOLDER
from rorchat.training.result import TokenizerResult, TrainingResult

T = TypeVar("T")
Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable)
StrPath = str | Path

# The signatures below are written out, because a type checker and an editor read only what is written: names, types and
# defaults of a signature that is generated from the dataclass at run time would be unknown to them, and `help` would
# have to import torch. A test compares them with the dataclasses. The rest of Transformers' and TRL's settings, about
# 150 for each stage, is accepted as `**trainer_settings`, and checked when the function is called.


class _Default:
    """A default value that differs from every given value, so that it does not override the config file."""

    def __init__(self, value: object):
        self.value = value

    def __repr__(self) -> str:  # what `help` shows
        return repr(self.value)


def default(value: T) -> T:
    """The default of a setting: for a type checker the value, at run time the information that it was not given."""
    return cast(T, _Default(value))


def _train(train: Callable[[Sequence[str], Mapping[str, object]], Result], values: dict[str, Any]) -> Result:
    """Calls a recipe with the settings that were given.

    Args:
        values: the parameters of a function below, with `_Default` for those that were not given.
    """
    more = values.pop("trainer_settings", {})
    settings = {name: value for name, value in values.items() if not isinstance(value, _Default)} | more
    config = settings.pop("config")
    with quiet_libraries():
        try:
            return train([] if config is None else ["--config", str(config)], settings)
        except SystemExit as stop:  # raised by the signal handler before and after training
            if stop.code != Interrupted.exit_code:
                raise
            raise Interrupted("Stopped before or after training. Call the function again to resume.") from None


def _explain_settings(command: str) -> Callable[[Function], Function]:
    """Decorates a function: appends the packaged help of its command to the docstring."""

    def decorate(function: Function) -> Function:
        groups = (HELP_FOLDER / f"{command}.txt").read_text(encoding="utf-8").split("\n\n")
        settings = [group for group in groups if re.match(r".*:\n  --", group)]
        text = re.sub(r"^  --", "  ", "\n\n".join(settings), flags=re.MULTILINE)
        function.__doc__ = f"{function.__doc__}\n" + "\n".join(f"    {line}".rstrip() for line in text.splitlines())
        return function

    return decorate


@_explain_settings("train-tokenizer")
def train_tokenizer(
    *,
    config: StrPath | None = None,
    sources: Sequence[StrPath] = default([]),
    columns: Sequence[str] = default([]),
    output_dir: StrPath = default(""),
    vocab_size: int = default(32_768),
    max_characters: int = default(1_000_000_000),
    persona: StrPath | None = default(None),
    validation_share: float = default(0.01),
    data_seed: int = default(0),
) -> TokenizerResult:
    """Train a tokenizer on the text of sources.

        rorchat.train_tokenizer(sources=["text=my_texts/"], vocab_size=8192, output_dir="runs/tokenizer")

    Args:
        config: a YAML file with settings, or one of a story in the package, such as "demo/tokenizer.yaml". Settings
            that are given here take precedence. All of them are listed below.

    Raises:
        UsageError: a setting is unknown or has a wrong value.
        DataError: the text cannot be read.
        MismatchError: the output folder contains another tokenizer or other files.
    """
    return _train(tokenizer_recipe.train, locals())


@_explain_settings("pretrain")
def pretrain(
    *,
    config: StrPath | None = None,
    model: StrPath | None = default(None),
    tokenizer: StrPath = default("gpt2"),
    size: str = default("124m"),
    sources: Sequence[StrPath] = default([]),
    columns: Sequence[str] = default([]),
    weights: Sequence[float] | None = default(None),
    mixture: StrPath | None = default(None),
    output_dir: StrPath | None = default(None),
    train_tokens: int = default(0),
    max_steps: int = default(-1),
    block_size: int = default(1024),
    global_batch_tokens: int = default(524_288),
    optimizer: str = default("adamw"),
    matrix_learning_rate: float = default(6e-3),
    cooldown_share: float = default(0.7),
    smoke: bool = default(False),
    sample_prompts: Sequence[str] | None = default(None),
    sample_steps: int = default(0),
    persona: StrPath | None = default(None),
    validation_share: float = default(0.01),
    data_seed: int = default(0),
    token_store: StrPath | None = default(None),
    new_phase: bool = default(False),
    max_eval_tokens: int = default(1_000_000),
    base_text: StrPath | None = default(None),
    weights_only: bool = default(False),
    mirror: StrPath | None = default(None),
    price_per_hour: float = default(0.0),
    compile: bool | None = default(None),
    dataloader_num_workers: int | None = default(None),
    **trainer_settings: Any,
) -> TrainingResult:
    """Pretrain a GPT-2 on documents: it learns to predict the next token.

        rorchat.pretrain(
            sources=["text=my_texts/"], tokenizer="runs/tokenizer", size="6x6x384", block_size=512,
            global_batch_tokens=32_768, train_tokens=50_000_000, output_dir="runs/pretrain",
        )

    Call it again with the same settings to resume a run that was stopped. A finished run is not repeated.

    Args:
        config: a YAML file with settings, or one of a story in the package, such as "demo/pretrain.yaml". Settings
            that are given here take precedence. All of them are listed below.
        trainer_settings: any other setting of Transformers' `TrainingArguments`.

    Raises:
        UsageError: a setting is unknown or has a wrong value.
        DataError: the data cannot be read.
        MismatchError: tokenizer and model, or the settings and the output folder, do not belong together.
        DivergedError: the loss became NaN or infinite.
        Interrupted: Ctrl-C or a signal stopped the run; its checkpoint is saved.
    """
    return _train(pretrain_recipe.train, locals())


@_explain_settings("sft")
def sft(
    *,
    config: StrPath | None = None,
    model: StrPath = default("gpt2"),
    sources: Sequence[StrPath] = default([]),
    columns: Sequence[str] = default([]),
    output_dir: StrPath | None = default(None),
    max_steps: int = default(-1),
    max_length: int | None = default(None),
    replay: StrPath | None = default(None),
    replay_share: float = default(0.1),
    lora_rank: int = default(0),
    load_in_4bit: bool = default(False),
    optimizer: str = default("adamw"),
    matrix_learning_rate: float = default(6e-3),
    cooldown_share: float = default(0.7),
    smoke: bool = default(False),
    sample_prompts: Sequence[str] | None = default(None),
    sample_steps: int = default(0),
    persona: StrPath | None = default(None),
    validation_share: float = default(0.01),
    data_seed: int = default(0),
    max_eval_tokens: int = default(1_000_000),
    base_text: StrPath | None = default(None),
    weights_only: bool = default(False),
    mirror: StrPath | None = default(None),
    price_per_hour: float = default(0.0),
    **trainer_settings: Any,
) -> TrainingResult:
    """Teach a model to chat: supervised fine-tuning (SFT) on conversations.

        result = rorchat.sft(model="gpt2", sources=["alpaca=data.json", "persona=500"], output_dir="runs/sft")
        rorchat.load(result.run_folder).chat("Who are you?")

    Args:
        config: a YAML file with settings, or one of a story in the package, such as "demo/sft.yaml". Settings that are
            given here take precedence. All of them are listed below.
        trainer_settings: any other setting of TRL's `SFTConfig`, which includes those of Transformers'
            `TrainingArguments`.

    Raises: as `pretrain`.
    """
    return _train(sft_recipe.train, locals())


@_explain_settings("dpo")
def dpo(
    *,
    config: StrPath | None = None,
    model: StrPath = default(""),
    sources: Sequence[StrPath] = default([]),
    columns: Sequence[str] = default([]),
    output_dir: StrPath | None = default(None),
    max_steps: int = default(-1),
    max_length: int | None = default(None),
    beta: float = default(0.1),
    chosen_drop: float = default(0.5),
    lora_rank: int = default(0),
    load_in_4bit: bool = default(False),
    optimizer: str = default("adamw"),
    matrix_learning_rate: float = default(6e-3),
    cooldown_share: float = default(0.7),
    smoke: bool = default(False),
    sample_prompts: Sequence[str] | None = default(None),
    sample_steps: int = default(0),
    persona: StrPath | None = default(None),
    validation_share: float = default(0.01),
    data_seed: int = default(0),
    max_eval_tokens: int = default(1_000_000),
    base_text: StrPath | None = default(None),
    weights_only: bool = default(False),
    mirror: StrPath | None = default(None),
    price_per_hour: float = default(0.0),
    **trainer_settings: Any,
) -> TrainingResult:
    """Train a chat model on preferences: direct preference optimization (DPO) on pairs of a better and a worse reply.

        rorchat.dpo(model="runs/sft", sources=["preference=pairs.jsonl"], output_dir="runs/dpo")

    Args:
        config: a YAML file with settings, or one of a story in the package, such as "demo/dpo.yaml". Settings that are
            given here take precedence. All of them are listed below.
        trainer_settings: any other setting of TRL's `DPOConfig`.

    Raises: as `pretrain`.
    """
    return _train(dpo_recipe.train, locals())


@_explain_settings("grpo")
def grpo(
    *,
    config: StrPath | None = None,
    model: StrPath = default(""),
    sources: Sequence[StrPath] = default([]),
    columns: Sequence[str] = default([]),
    output_dir: StrPath | None = default(None),
    max_steps: int = default(-1),
    rewards: Sequence[str] = default(["answer", "stop", "length", "repetition"]),
    readiness_questions: int = default(32),
    max_completion_length: int | None = default(None),
    scale_rewards: str = default("none"),
    optimizer: str = default("adamw"),
    matrix_learning_rate: float = default(6e-3),
    cooldown_share: float = default(0.7),
    smoke: bool = default(False),
    sample_prompts: Sequence[str] | None = default(None),
    sample_steps: int = default(0),
    persona: StrPath | None = default(None),
    validation_share: float = default(0.01),
    data_seed: int = default(0),
    max_eval_tokens: int = default(1_000_000),
    base_text: StrPath | None = default(None),
    weights_only: bool = default(False),
    mirror: StrPath | None = default(None),
    price_per_hour: float = default(0.0),
    **trainer_settings: Any,
) -> TrainingResult:
    """Train a chat model on rewards: group relative policy optimization (GRPO) on questions with known answers.

        rorchat.grpo(model="runs/sft", sources=["gsm8k"], output_dir="runs/grpo")

    Args:
        config: a YAML file with settings, or one of a story in the package, such as "demo/grpo.yaml". Settings that are
            given here take precedence. All of them are listed below.
        trainer_settings: any other setting of TRL's `GRPOConfig`.

    Raises: as `pretrain`.
    """
    return _train(grpo_recipe.train, locals())
