"""`--smoke`: three steps of the configured run with tiny batches, to check that it works before a GPU is rented.

Pretraining is reduced to a small model and short rows; a chat stage keeps its model and context window, and reads only
some rows of each source. Everything else is as configured: sources, mixture and tokenizer, optimizer and schedule,
precision, accumulation (up to a few micro-batches), evaluation and checkpoints. Pretraining prepares its sources
completely; a token store that the real run has prepared is read, never written.
"""

import os
import sys
from pathlib import Path

from rorchat.inference.engine import resolve_model_path
from rorchat.lineage import SMOKE_SUFFIX
from rorchat.tokens.store import TOKENS_FOLDER
from rorchat.training.arguments import SMOKE_REPLY_TOKENS, SMOKE_ROWS_PER_SOURCE, StageArguments

STEPS = 3
SIZE = "2x4x64"  # wide enough for heads of size 16, small enough for a vocabulary of 65,536 on a CPU
BLOCK_SIZE, ROWS, ACCUMULATION = 64, 2, 4  # upper limits
CHAT_ROWS, CHAT_ACCUMULATION = 1, 2  # upper limits: the model may be large, and a row may fill the context window
REPLIES = 2  # upper limit of replies in a micro-batch; GRPO compares at least two replies to a question
VALIDATION_SHARE = 0.1  # at least; with so few rows, 1 % may be no row at all


def shrink_pretraining(arguments) -> None:
    """Turns checked `PretrainArguments` into those of a smoke test."""
    model_before = arguments.model or arguments.size
    rows_before, tokens_before = arguments.block_size, arguments.global_batch_tokens
    steps_before = arguments.max_steps
    if arguments.model:  # a pretrained model cannot be made smaller: keep its tokenizer, and use random weights
        arguments.tokenizer, arguments.model = resolve_model_path(_prefer_smoke_run(arguments.model)), None
    arguments.size = SIZE
    arguments.block_size = min(BLOCK_SIZE, arguments.block_size)
    _shrink_batch(arguments, ROWS, ACCUMULATION)
    _shrink_steps(arguments)
    arguments.global_batch_tokens = _rows_per_step(arguments) * arguments.block_size
    arguments.train_tokens = arguments.max_steps * arguments.global_batch_tokens
    store = Path(arguments.token_store or Path(arguments.output_dir) / TOKENS_FOLDER)
    if not arguments.output_dir.endswith(SMOKE_SUFFIX):
        if store.is_dir():
            arguments.token_store = str(store)
        elif arguments.token_store:
            arguments.token_store += SMOKE_SUFFIX
    _redirect_output(
        arguments,
        f"model {arguments.size} with random weights (configured: {model_before}), rows of {arguments.block_size} "
        f"tokens ({rows_before:,}), {arguments.global_batch_tokens:,} tokens per step ({tokens_before:,}), "
        f"{arguments.max_steps} steps ({steps_before:,})",
    )


def shrink_chat_stage(arguments) -> None:
    """Turns checked arguments of SFT or DPO into those of a smoke test."""
    rows_before, length_before = _rows_per_step(arguments), _describe_length(arguments)
    _shrink_data(arguments)
    _shrink_batch(arguments, CHAT_ROWS, CHAT_ACCUMULATION)
    _shrink_steps(arguments)
    _redirect_output(arguments, _describe_chat_stage(arguments, rows_before, length_before))


def shrink_grpo(arguments) -> None:
    """Turns checked `GRPOArguments` into those of a smoke test: one question per step, without the readiness check."""
    rows_before, length_before = _rows_per_step(arguments), _describe_length(arguments)
    _shrink_data(arguments)
    _shrink_batch(arguments, REPLIES, CHAT_ACCUMULATION)
    arguments.num_generations = arguments.generation_batch_size = _rows_per_step(arguments)
    arguments.steps_per_generation = arguments.gradient_accumulation_steps
    arguments.max_completion_length = min(SMOKE_REPLY_TOKENS, arguments.max_completion_length or SMOKE_REPLY_TOKENS)
    arguments.readiness_questions = 0
    _shrink_steps(arguments)
    _redirect_output(arguments, _describe_chat_stage(arguments, rows_before, length_before))


def _shrink_data(arguments) -> None:
    arguments.model = _prefer_smoke_run(arguments.model)
    arguments.validation_share = max(VALIDATION_SHARE, arguments.validation_share)


def _prefer_smoke_run(model: str) -> str:
    """Returns the folder of the model's smoke test if the folder of its real run does not exist yet."""
    smoke = model.rstrip("/") + SMOKE_SUFFIX
    return smoke if not Path(model).exists() and Path(smoke).is_dir() else model


def _rows_per_step(arguments: StageArguments) -> int:
    return arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps


def _describe_length(arguments) -> str:
    steps = arguments.max_steps
    return f"{steps:,}" if steps > 0 else f"num_train_epochs {arguments.num_train_epochs:g}"


def _describe_chat_stage(arguments, rows_before: int, length_before: str) -> str:
    return (
        f"{arguments.model} on the first {SMOKE_ROWS_PER_SOURCE} rows of each source, "
        f"{arguments.validation_share:.0%} of them for validation, {_rows_per_step(arguments)} rows per step "
        f"(configured: {rows_before}), "
        f"{arguments.max_steps} steps ({length_before})"
    )


def _shrink_batch(arguments: StageArguments, rows: int, accumulation: int) -> None:
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        setattr(arguments, name, min(rows, getattr(arguments, name)))
    arguments.gradient_accumulation_steps = min(accumulation, arguments.gradient_accumulation_steps)


def _shrink_steps(arguments: StageArguments) -> None:
    """Three steps, in which everything that happens every N steps happens at least once."""
    if arguments.warmup_steps >= 1:  # keep its share of the steps, if their number is known
        is_known = arguments.max_steps > 0
        arguments.warmup_steps = min(0.999, arguments.warmup_steps / arguments.max_steps) if is_known else 1
    arguments.max_steps = min(STEPS, arguments.max_steps) if arguments.max_steps > 0 else STEPS
    arguments.logging_steps = 1
    for name in ("eval_steps", "save_steps"):
        if (getattr(arguments, name) or 0) > arguments.max_steps:
            setattr(arguments, name, arguments.max_steps)


def _redirect_output(arguments: StageArguments, description: str) -> None:
    """Writes into another folder than the real run, and prints what was reduced."""
    arguments.mirror = None
    if not arguments.output_dir.endswith(SMOKE_SUFFIX):  # it does when a smoke test's own config.yaml is run again
        arguments.output_dir = arguments.output_dir.rstrip("/") + SMOKE_SUFFIX
    if os.environ.get("RANK", "0") == "0":
        message = f"smoke test: {description}; everything else as configured; output in {arguments.output_dir}"
        print(message, file=sys.stderr)  # noqa: T201
