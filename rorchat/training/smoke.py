"""`--smoke`: the same run in the small, to see it begin, step, evaluate, sample and end before a GPU is rented for it.

Made smaller are the model, the rows, the batch and the number of steps. All else is the run's own: sources, mixture and
tokenizer, optimizer and schedule, precision, accumulation (up to four micro-batches), evaluation, samples, checkpoints.
Sources are prepared whole; a store that the real run has prepared is read, never written.
"""

import os
import sys
from pathlib import Path

from rorchat.inference.engine import model_folder
from rorchat.training.run import TOKENS

STEPS = 3
SIZE = "2x4x64"  # large enough for heads of 16, small enough for a vocabulary of 65,536 on a CPU
BLOCK_SIZE, ROWS, ACCUMULATED = 64, 2, 4  # at most
SUFFIX = "-smoke"


def make_small(arguments) -> None:
    """Turns checked `PretrainArguments` into those of a run of three steps, in a folder of its own, and says so."""
    before = {name: getattr(arguments, name) for name in ("size", "model", "block_size", "max_steps")}
    before |= {"global_batch_tokens": arguments.global_batch_tokens}
    if arguments.model:  # a checkpoint has the shape that it has: its tokenizer stays, its weights do not
        arguments.tokenizer, arguments.model = model_folder(arguments.model), None
    arguments.size = SIZE
    arguments.block_size = min(BLOCK_SIZE, arguments.block_size)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        setattr(arguments, name, min(ROWS, getattr(arguments, name)))
    _fewer_steps(arguments)
    arguments.gradient_accumulation_steps = min(ACCUMULATED, arguments.gradient_accumulation_steps)
    rows = arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    arguments.global_batch_tokens = rows * arguments.block_size
    arguments.train_tokens = arguments.max_steps * arguments.global_batch_tokens
    _own_folders(arguments)
    if os.environ.get("RANK", "0") == "0":
        print(_told(arguments, before), file=sys.stderr)  # noqa: T201


def _fewer_steps(arguments) -> None:
    """Three steps, in which everything that the run does every so many steps is done at least once."""
    if arguments.warmup_steps >= 1:
        arguments.warmup_steps = min(0.999, arguments.warmup_steps / arguments.max_steps)  # the same share of the steps
    arguments.max_steps = min(STEPS, arguments.max_steps)
    arguments.logging_steps = 1
    for name in ("eval_steps", "save_steps"):
        if (getattr(arguments, name) or 0) > arguments.max_steps:
            setattr(arguments, name, arguments.max_steps)


def _own_folders(arguments) -> None:
    """Nothing of the real run is written: another output folder, and another token store where there is none yet."""
    arguments.mirror = None
    if arguments.output_dir.endswith(SUFFIX):  # its own config.yaml, run again
        return
    store = Path(arguments.token_store or Path(arguments.output_dir) / TOKENS)
    if store.is_dir():
        arguments.token_store = str(store)
    elif arguments.token_store:
        arguments.token_store += SUFFIX
    arguments.output_dir = arguments.output_dir.rstrip("/") + SUFFIX


def _told(arguments, before: dict) -> str:
    return (
        f"smoke: {arguments.size} with random weights for {before['model'] or before['size']}, rows of "
        f"{arguments.block_size} tokens for {before['block_size']:,}, steps of {arguments.global_batch_tokens:,} "
        f"for {before['global_batch_tokens']:,}, {arguments.max_steps} of them for {before['max_steps']:,}; everything "
        f"else as configured, into {arguments.output_dir}"
    )
