"""The number of steps of a chat stage, and the order of its rows."""

import math
from collections.abc import Sequence

import numpy as np

from rorchat.errors import UsageError

BATCHES_PER_POOL = 50  # rows of similar length are grouped within pools of this many batches
MAX_ROWS = 10_000_000  # of a run, whose order is in memory; it takes a minute to compute


def count_steps(arguments, rows: int) -> int:
    """Optimizer steps of a run of a chat stage: `max_steps`, or as many as `num_train_epochs` over all rows take.

    Args:
        rows: of an epoch, counted as in `per_device_train_batch_size`.

    Raises:
        UsageError: the run would read too many rows.
    """
    rows_per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps, setting = arguments.max_steps, "max_steps"
    if steps <= 0:
        steps, setting = max(1, math.ceil(rows * arguments.num_train_epochs / rows_per_step)), "num_train_epochs"
    if steps * rows_per_step > MAX_ROWS:
        raise UsageError(
            f"{setting} is {getattr(arguments, setting):,}, so that the run would read {steps * rows_per_step:,} rows: "
            f"a run of a chat stage has at most {MAX_ROWS:,} rows. Give fewer, {MAX_ROWS // rows_per_step:,} steps at "
            "most."
        )
    return steps


def training_order(lengths: Sequence[int], rows: int, batch_size: int, seed: int) -> np.ndarray:
    """Row numbers in training order: epochs in random order, with rows of similar length in the same micro-batch.

    No batch contains a row twice, unless it is larger than an epoch. A batch that an epoch leaves incomplete is filled
    with the first rows of the next epoch that it does not contain yet.

    Args:
        lengths: Tokens of each row.
        rows: Number of rows to return, a multiple of `batch_size`.
        batch_size: Rows of a micro-batch.
    """
    row_tokens = np.asarray(lengths)
    batches, remainder = [], np.empty(0, int)
    for epoch in range(-(-rows // len(lengths))):
        generator = np.random.default_rng([seed, epoch])
        order = generator.permutation(len(lengths))
        fill = np.flatnonzero(~np.isin(order, remainder))[: batch_size - len(remainder)]
        stream = np.concatenate([remainder, order[fill], np.delete(order, fill)])
        end = len(stream) // batch_size * batch_size
        start_of_epoch = batch_size if len(remainder) else 0  # after the batch that belongs to two epochs
        batches.append(stream[: min(start_of_epoch, end)])
        for start in range(start_of_epoch, end, batch_size * BATCHES_PER_POOL):
            pool = stream[start : min(start + batch_size * BATCHES_PER_POOL, end)]
            pool = pool[np.argsort(row_tokens[pool], kind="stable")].reshape(-1, batch_size)
            batches.append(generator.permutation(pool).reshape(-1))
        remainder = stream[end:]
    return np.concatenate(batches)[:rows]
