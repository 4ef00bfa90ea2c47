"""The training commands: `rorchat pretrain | sft | dpo | grpo | train-tokenizer`."""

from typing import Any

import typer

# Flags are those of the recipe and of the launcher, neither of which is known before its libraries are imported
RAW: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}


def train_tokenizer(context: typer.Context) -> None:
    """Train a byte-level BPE tokenizer with the ChatML control tokens."""
    _launch("train-tokenizer", context)


def pretrain(context: typer.Context) -> None:
    """Pretrain a GPT-2 on documents."""
    _launch("pretrain", context)


def sft(context: typer.Context) -> None:
    """Teach a model to chat: supervised fine-tuning on conversations."""
    _launch("sft", context)


def dpo(context: typer.Context) -> None:
    """Train a chat model on preferences: direct preference optimization."""
    _launch("dpo", context)


def grpo(context: typer.Context) -> None:
    """Train a chat model on rewards: group relative policy optimization."""
    _launch("grpo", context)


def _launch(command: str, context: typer.Context) -> None:
    from rorchat.cli.launch import launch_recipe

    launch_recipe(command, context.args)
