"""Sequences of various lengths -> rows of one length, with next to nothing left empty.

Row after row: the longest sequence that is left, then what fills the row to the last token, alone or as one of two,
else the longest that fits. Best-fit decreasing (Johnson 1973), which looks at one sequence at a time, leaves five times
as much empty on real conversations. No sequence is cut.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rorchat.chatml import IGNORE_INDEX


def pack(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Which sequences share a row.

    Args:
        lengths: tokens of each sequence; of equal ones, the first come first.
        window: tokens a row holds.

    Returns:
        The numbers of the sequences in each row; each stands in one.

    Raises:
        ValueError: a sequence is empty or longer than the window.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not (1 <= lengths.min() and lengths.max() <= window):
        raise ValueError(
            f"Sequences of {lengths.min()} to {lengths.max()} tokens do not all fit into rows of {window}."
        )
    waiting: list[list[int]] = [[] for _ in range(window + 1)]  # the sequences of each length, the first one last
    for index in range(len(lengths) - 1, -1, -1):
        waiting[lengths[index]].append(index)
    # Of which lengths there are any: as bits, counted from 0 up and from the window down. A length n has a partner that
    # fills the room together with it where both have a bit: the second is shifted so that n stands for room - n.
    there = sum(1 << length for length in range(window + 1) if waiting[length])
    mirrored = sum(1 << (window - length) for length in range(window + 1) if waiting[length])
    rows = []
    while there:
        row, room = [], window
        while fitting := there & ((2 << room) - 1):
            of_two = fitting & (mirrored >> (window - room)) if row else 0
            length = room if fitting >> room else (of_two or fitting).bit_length() - 1
            row.append(waiting[length].pop())
            room -= length
            if not waiting[length]:
                there ^= 1 << length
                mirrored ^= 1 << (window - length)
        rows.append(row)
    return rows


class Sequences:
    """Encoded sequences side by side in three flat arrays, of 6 bytes a token.

    Args:
        encoded: (ids, labels) of each; labels are the ids or -100.
    """

    def __init__(self, encoded: Iterable[tuple[Sequence[int], Sequence[int]]]):
        ids, asked, lengths = [np.zeros(0, np.int32)], [np.zeros(0, bool)], [0]
        for input_ids, labels in encoded:
            ids.append(np.asarray(input_ids, np.int32))
            asked.append(np.asarray(labels) != IGNORE_INDEX)
            asked[-1][:1] = False  # the first token is no target: what stands before it in a row is another sequence
            lengths.append(len(input_ids))
        self.input_ids, self.asked = np.concatenate(ids), np.concatenate(asked)
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
        return {"input_ids": input_ids, "labels": input_ids.where(torch.from_numpy(self.asked[span]), IGNORE_INDEX)}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.__getitem__, range(len(self)))


class PackedRows(Dataset):
    """Rows of packed sequences, epoch after epoch: packed anew for each, and in random order.

    Args:
        window: tokens a row holds.
        count: how many rows; it may end within an epoch.
    """

    def __init__(self, sequences: Sequences, window: int, count: int, seed: int):
        self.sequences, self.rows = sequences, []
        epoch = 0
        while len(self.rows) < count:
            draw = np.random.default_rng([seed, epoch])
            order = draw.permutation(len(sequences))  # who shares a row with whom, where lengths leave it open
            rows = pack(sequences.lengths[order], window)
            self.rows += [order[rows[number]].tolist() for number in draw.permutation(len(rows))]
            epoch += 1
        del self.rows[count:]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each row, (R,)."""
        lengths = self.sequences.lengths
        return np.array([lengths[row].sum() for row in self.rows])

    def __getitem__(self, number: int) -> list[dict[str, Tensor]]:
        """The sequences of a row."""
        return [self.sequences[index] for index in self.rows[number]]
