"""How many steps a chat stage has, and which of its rows comes when."""

from collections.abc import Sequence

import numpy as np

BATCHES_PER_POOL = 50  # rows of similar length are looked for among so many batches


def steps_of(arguments, rows: int) -> int:
    """Optimizer steps of a fine-tuning run: `max_steps`, or what `num_train_epochs` over the rows come to."""
    rows_per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return (
        arguments.max_steps
        if arguments.max_steps > 0
        else max(1, round(rows * arguments.num_train_epochs / rows_per_step))
    )


def training_order(lengths: Sequence[int], rows: int, batch_size: int, seed: int) -> np.ndarray:
    """Which row comes when: epoch after epoch in random order, rows of similar length in one batch.

    Args:
        lengths: tokens of each row.
        rows: how many to place; a multiple of `batch_size`.
        batch_size: rows of a micro-batch.
    """
    lengths = np.asarray(lengths)
    order: list[np.ndarray] = []
    epochs = -(-rows // len(lengths))
    for epoch in range(epochs):
        order.append(np.random.default_rng([seed, epoch]).permutation(len(lengths)))
    stream = np.concatenate(order)[:rows]
    pools = []
    draw = np.random.default_rng([seed, epochs, 1])
    for start in range(0, rows, batch_size * BATCHES_PER_POOL):
        pool = stream[start : start + batch_size * BATCHES_PER_POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, batch_size)
        pools.append(draw.permutation(pool).reshape(-1))
    return np.concatenate(pools)
