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
    width = max(len(row["input_ids"]) for row in rows)

    def stacked(key: str, value: int) -> Tensor:
        return torch.stack([F.pad(torch.as_tensor(row[key]), (0, width - len(row[key])), value=value) for row in rows])

    return {"input_ids": stacked("input_ids", pad_id), "labels": stacked("labels", IGNORED)}
