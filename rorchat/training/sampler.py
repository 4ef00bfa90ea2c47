"""The number of steps of a chat stage, and the order of its rows."""

import math
from collections.abc import Sequence

import numpy as np

BATCHES_PER_POOL = 50  # rows of similar length are grouped within pools of this many batches


def count_steps(arguments, rows: int) -> int:
    """Optimizer steps of a fine-tuning run: `max_steps`, or as many as `num_train_epochs` over all rows take."""
    rows_per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps > 0:
        return arguments.max_steps
    return max(1, math.ceil(rows * arguments.num_train_epochs / rows_per_step))


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
