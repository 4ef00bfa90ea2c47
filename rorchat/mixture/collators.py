"""Rows -> a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from rorchat.chatml import IGNORE_INDEX


def collate_padded(rows: Sequence[dict], pad_id: int) -> dict[str, Tensor]:
    """Rows of different length as one batch: `input_ids` and `labels`, each (B, T), padded on the right.

    There is no attention mask: a causal model never looks to the right, and without a mask its fast kernel runs.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    width = max(lengths)

    def stacked(key: str, value: int) -> Tensor:
        parts = [torch.as_tensor(row[key]) for row in rows]
        if min(lengths) < width:
            parts = [F.pad(part, (0, width - len(part)), value=value) for part in parts]
        return torch.stack(parts)

    return {"input_ids": stacked("input_ids", pad_id), "labels": stacked("labels", IGNORE_INDEX)}


def collate_packed(rows: Sequence[Sequence[dict]], pad_id: int) -> dict[str, Tensor]:
    """Packed rows as one batch, padded on the right: `input_ids`, `labels` and `position_ids`, each (B, T).

    Positions begin anew with each sequence. `sequence_lengths` (B, S) says where: the tokens of each sequence of a row,
    0 where another row has more of them.
    """
    joined = [{key: torch.cat([one[key] for one in row]) for key in ("input_ids", "labels")} for row in rows]
    lengths = [torch.tensor([len(one["input_ids"]) for one in row]) for row in rows]
    positions = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
    return collate_padded(joined, pad_id) | {
        "position_ids": pad_sequence(positions, batch_first=True),
        "sequence_lengths": pad_sequence(lengths, batch_first=True),
    }
