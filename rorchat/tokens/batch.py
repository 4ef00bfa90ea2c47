"""Rows -> a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rorchat.chatml import IGNORED


def padded(rows: Sequence[dict], pad_id: int) -> dict[str, Tensor]:
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

    return {"input_ids": stacked("input_ids", pad_id), "labels": stacked("labels", IGNORED)}
