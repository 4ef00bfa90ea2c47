"""Collators: rows of different length -> one batch of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from rorchat.chatml import IGNORE_INDEX


def collate_padded(rows: Sequence[dict], pad_id: int) -> dict[str, Tensor]:
    """One batch of `input_ids` and `labels`, each (B, T), padded on the right.

    There is no attention mask: a causal model never attends to the right, and its fastest kernel needs no mask.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    width = max(lengths)

    def stack(key: str, value: int) -> Tensor:
        tensors = [torch.as_tensor(row[key]) for row in rows]
        if min(lengths) < width:
            tensors = [F.pad(tensor, (0, width - len(tensor)), value=value) for tensor in tensors]
        return torch.stack(tensors)

    return {"input_ids": stack("input_ids", pad_id), "labels": stack("labels", IGNORE_INDEX)}


def collate_packed(rows: Sequence[Sequence[dict]], pad_id: int) -> dict[str, Tensor]:
    """One batch of packed rows, padded on the right: `input_ids`, `labels` and `position_ids`, each (B, T).

    Positions restart at every sequence. `sequence_lengths` (B, S) are the lengths of the sequences in each row, padded
    with 0 for rows with fewer sequences.
    """
    joined = [{key: torch.cat([sequence[key] for sequence in row]) for key in ("input_ids", "labels")} for row in rows]
    lengths = [torch.tensor([len(sequence["input_ids"]) for sequence in row]) for row in rows]
    positions = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
    return collate_padded(joined, pad_id) | {
        "position_ids": pad_sequence(positions, batch_first=True),
        "sequence_lengths": pad_sequence(lengths, batch_first=True),
    }
