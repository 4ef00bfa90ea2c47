"""How many steps a chat stage has, and which of its rows comes when."""

import math
from collections.abc import Sequence

import numpy as np

BATCHES_PER_POOL = 50  # rows of similar length are looked for among so many batches


def steps_of(arguments, rows: int) -> int:
    """Optimizer steps of a fine-tuning run: `max_steps`, or as many as `num_train_epochs` over all rows take."""
    rows_per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps > 0:
        return arguments.max_steps
    return max(1, math.ceil(rows * arguments.num_train_epochs / rows_per_step))


def training_order(lengths: Sequence[int], rows: int, batch_size: int, seed: int) -> np.ndarray:
    """Which row comes when: epoch after epoch in random order, rows of similar length in one batch.

    A batch holds no row twice, unless it is larger than an epoch: what an epoch leaves over is filled up with the first
    rows of the next that it does not have.

    Args:
        lengths: tokens of each row.
        rows: how many to place; a multiple of `batch_size`.
        batch_size: rows of a micro-batch.
    """
    lengths = np.asarray(lengths)
    batches, left = [], np.empty(0, int)
    for epoch in range(-(-rows // len(lengths))):
        draw = np.random.default_rng([seed, epoch])
        order = draw.permutation(len(lengths))
        others = np.flatnonzero(~np.isin(order, left))[: batch_size - len(left)]
        stream = np.concatenate([left, order[others], np.delete(order, others)])
        end = len(stream) // batch_size * batch_size
        own = batch_size if len(left) else 0  # behind the batch that belongs to two epochs
        batches.append(stream[: min(own, end)])
        for start in range(own, end, batch_size * BATCHES_PER_POOL):
            pool = stream[start : min(start + batch_size * BATCHES_PER_POOL, end)]
            pool = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, batch_size)
            batches.append(draw.permutation(pool).reshape(-1))
        left = stream[end:]
    return np.concatenate(batches)[:rows]
