"""Packs sequences of different lengths into rows of equal length, with almost no padding. No sequence is truncated.

Every row starts with the longest remaining sequence. The remaining room is filled exactly by one sequence, or by two,
if there are any of these lengths; otherwise the longest sequence that fits is added. Best-fit decreasing (Johnson
1973), which considers one sequence at a time, leaves five times as much padding on real conversations.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rorchat.chatml import IGNORE_INDEX


def pack(lengths: Sequence[int] | np.ndarray, window: int) -> list[list[int]]:
    """Assigns sequences to rows.

    Args:
        lengths: number of tokens of each sequence. Sequences of equal length are used in order.
        window: number of tokens in a row.

    Returns:
        The indices of the sequences in each row. Every index occurs exactly once.

    Raises:
        ValueError: a sequence is empty or longer than the window.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not (1 <= lengths.min() and lengths.max() <= window):
        raise ValueError(
            f"Sequences of {lengths.min()} to {lengths.max()} tokens do not all fit into rows of {window}."
        )
    waiting: list[list[int]] = [[] for _ in range(window + 1)]  # indices by length, in reverse order for `pop`
    for index in range(len(lengths) - 1, -1, -1):
        waiting[lengths[index]].append(index)
    # Two integers serve as bit sets of the remaining lengths: bit n of `available` stands for length n, and bit n of
    # `mirrored` for length window - n. After a right shift by window - room, bit n of `mirrored` stands for length
    # room - n. If bit n is set in both, a sequence of length n and one of length room - n fill the room exactly.
    available = sum(1 << length for length in range(window + 1) if waiting[length])
    mirrored = sum(1 << (window - length) for length in range(window + 1) if waiting[length])
    rows = []
    while available:
        row: list[int] = []
        room = window
        while fitting := available & ((2 << room) - 1):
            pairs = fitting & (mirrored >> (window - room)) if row else 0
            length = room if fitting >> room else (pairs or fitting).bit_length() - 1
            row.append(waiting[length].pop())
            room -= length
            if not waiting[length]:
                available ^= 1 << length
                mirrored ^= 1 << (window - length)
        rows.append(row)
    return rows


class Sequences:
    """Encoded sequences in flat arrays, with 5 bytes per token.

    Args:
        encoded: (input_ids, labels) of each sequence. A label equals its input id or is -100.
    """

    def __init__(self, encoded: Iterable[tuple[Sequence[int], Sequence[int]]]):
        ids, is_target, lengths = [np.zeros(0, np.int32)], [np.zeros(0, bool)], [0]
        for input_ids, labels in encoded:
            ids.append(np.asarray(input_ids, np.int32))
            is_target.append(np.asarray(labels) != IGNORE_INDEX)
            is_target[-1][:1] = False  # in a packed row, the token before the first one belongs to another sequence
            lengths.append(len(input_ids))
        self.input_ids, self.is_target = np.concatenate(ids), np.concatenate(is_target)
        self.starts = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` (T,) and `labels` (T,) of one sequence."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        span = slice(self.starts[index], self.starts[index + 1])
        input_ids = torch.from_numpy(self.input_ids[span].astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids.where(torch.from_numpy(self.is_target[span]), IGNORE_INDEX)}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.__getitem__, range(len(self)))


class PackedRows(Dataset):
    """A dataset of packed rows. Every epoch is shuffled and packed again.

    Args:
        window: number of tokens in a row.
        count: number of rows in total; the last epoch may be incomplete.
    """

    def __init__(self, sequences: Sequences, window: int, count: int, seed: int):
        self.sequences = sequences
        self.rows: list[list[int]] = []
        epoch = 0
        while len(self.rows) < count:
            generator = np.random.default_rng([seed, epoch])
            order = generator.permutation(len(sequences))  # varies which sequences of equal length share a row
            rows = pack(sequences.lengths[order], window)
            self.rows += [order[rows[number]].tolist() for number in generator.permutation(len(rows))]
            epoch += 1
        del self.rows[count:]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> np.ndarray:
        """The number of tokens in each row, (R,)."""
        lengths = self.sequences.lengths
        return np.array([lengths[row].sum() for row in self.rows])

    def __getitem__(self, number: int) -> list[dict[str, Tensor]]:
        """The sequences of a row."""
        return [self.sequences[index] for index in self.rows[number]]
