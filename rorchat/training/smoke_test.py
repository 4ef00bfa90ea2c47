"""`--smoke`: the same run in the small, to see it begin, step, evaluate, sample and end before a GPU is rented for it.

Made smaller are the batch and the number of steps; in pretraining the model and its rows; in a chat stage, where model
and window are what they are, what is read of each source, and what is sampled. All else is the run's own: sources,
mixture and tokenizer, optimizer and schedule, precision, accumulation (up to a few micro-batches), evaluation and
checkpoints.
Pretraining prepares its sources whole; a store that the real run has prepared is read, never written.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rorchat.inference.engine import resolve_model_path
from rorchat.training.run_folder import TOKENS

STEPS = 3
SIZE = "2x4x64"  # large enough for heads of 16, small enough for a vocabulary of 65,536 on a CPU
BLOCK_SIZE, ROWS, ACCUMULATED = 64, 2, 4  # at most
CHAT_ROWS, CHAT_ACCUMULATED = 1, 2  # at most: the model may be large, and rows are whole windows
REPLIES = 2  # at most, at a time: none is compared with itself
ROWS_PER_SOURCE, HELD_OUT = 64, 0.1  # of so few a hundredth may be none
REPLY_TOKENS = 16  # a model that has not learned to stop would fill a quarter of the window
SUFFIX = "-smoke"


@dataclass
class SmokeTestArguments:
    """What every stage has for `--smoke`; `make_small` comes after the stage's own checks."""

    smoke: bool = field(
        default=False, metadata={"help": "Three steps of the same run in the small, in OUTPUT_DIR-smoke."}
    )

    @property
    def rows_per_source(self) -> int | None:
        """How many rows of each source a chat stage reads; None for all."""
        return ROWS_PER_SOURCE if self.smoke else None

    @property
    def reply_tokens(self) -> int | None:
        """How long a sample of a chat stage may become; None for the engine's own limit."""
        return REPLY_TOKENS if self.smoke else None


def make_small(arguments) -> None:
    """Turns a stage's checked arguments into those of a run of three steps, in a folder of its own, and says so."""
    small = _small_pretraining if hasattr(arguments, "block_size") else _small_chat_stage
    made = small(arguments)
    _own_folders(arguments)
    if os.environ.get("RANK", "0") == "0":
        print(f"smoke: {made}; everything else as configured, into {arguments.output_dir}", file=sys.stderr)  # noqa: T201


def _small_pretraining(arguments) -> str:
    """A small model with random weights and short rows; says what for what."""
    before = {name: getattr(arguments, name) for name in ("size", "model", "block_size", "max_steps")}
    before |= {"global_batch_tokens": arguments.global_batch_tokens}
    if arguments.model:  # a checkpoint has the shape that it has: its tokenizer stays, its weights do not
        arguments.tokenizer, arguments.model = resolve_model_path(_made_in_the_small(arguments.model)), None
    arguments.size = SIZE
    arguments.block_size = min(BLOCK_SIZE, arguments.block_size)
    _smaller_batch(arguments, ROWS, ACCUMULATED)
    _fewer_steps(arguments)
    arguments.global_batch_tokens = _rows_a_step(arguments) * arguments.block_size
    arguments.train_tokens = arguments.max_steps * arguments.global_batch_tokens
    return (
        f"{arguments.size} with random weights for {before['model'] or before['size']}, rows of "
        f"{arguments.block_size} tokens for {before['block_size']:,}, steps of {arguments.global_batch_tokens:,} "
        f"for {before['global_batch_tokens']:,}, {arguments.max_steps} of them for {before['max_steps']:,}"
    )


def _small_chat_stage(arguments) -> str:
    """The model as it is, on few rows; says what for what."""
    rows, steps = _rows_a_step(arguments), arguments.max_steps
    length = f"{steps:,}" if steps > 0 else f"num_train_epochs {arguments.num_train_epochs:g}"
    arguments.model = _made_in_the_small(arguments.model)
    arguments.validation_share = max(HELD_OUT, arguments.validation_share)
    samples = hasattr(arguments, "num_generations")
    _smaller_batch(arguments, REPLIES if samples else CHAT_ROWS, CHAT_ACCUMULATED)
    if samples:
        _one_question_a_step(arguments)
    _fewer_steps(arguments)
    return (
        f"{arguments.model} on the first {ROWS_PER_SOURCE} rows of each source, {arguments.validation_share:.0%} of "
        f"them held out, steps of {_rows_a_step(arguments)} rows for {rows}, {arguments.max_steps} of them for {length}"
    )


def _one_question_a_step(arguments) -> None:
    """A step's replies, all to one question, are short; whether there is anything to learn is not looked at."""
    arguments.num_generations = arguments.generation_batch_size = _rows_a_step(arguments)
    arguments.steps_per_generation = arguments.gradient_accumulation_steps
    arguments.max_completion_length = min(REPLY_TOKENS, arguments.max_completion_length or REPLY_TOKENS)
    arguments.readiness_questions = 0


def _made_in_the_small(model: str) -> str:
    """The model of the stage before, where that has been run in the small alone."""
    small = model.rstrip("/") + SUFFIX
    return small if not Path(model).exists() and Path(small).is_dir() else model


def _rows_a_step(arguments) -> int:
    return arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps


def _smaller_batch(arguments, rows: int, accumulated: int) -> None:
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        setattr(arguments, name, min(rows, getattr(arguments, name)))
    arguments.gradient_accumulation_steps = min(accumulated, arguments.gradient_accumulation_steps)


def _fewer_steps(arguments) -> None:
    """Three steps, in which everything that the run does every so many steps is done at least once."""
    if arguments.warmup_steps >= 1:  # the same share of the steps, where their number is known
        known = arguments.max_steps > 0
        arguments.warmup_steps = min(0.999, arguments.warmup_steps / arguments.max_steps) if known else 1
    arguments.max_steps = min(STEPS, arguments.max_steps) if arguments.max_steps > 0 else STEPS
    arguments.logging_steps = 1
    for name in ("eval_steps", "save_steps"):
        if (getattr(arguments, name) or 0) > arguments.max_steps:
            setattr(arguments, name, arguments.max_steps)


def _own_folders(arguments) -> None:
    """Nothing of the real run is written: another output folder, and another token store where there is none yet."""
    arguments.mirror = None
    if arguments.output_dir.endswith(SUFFIX):  # its own config.yaml, run again
        return
    if hasattr(arguments, "token_store"):
        store = Path(arguments.token_store or Path(arguments.output_dir) / TOKENS)
        if store.is_dir():
            arguments.token_store = str(store)
        elif arguments.token_store:
            arguments.token_store += SUFFIX
    arguments.output_dir = arguments.output_dir.rstrip("/") + SUFFIX
