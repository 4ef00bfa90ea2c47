"""Validation loss in nats per token, and bits per byte, which compares across tokenizers and with a file compressor."""

import gzip
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

POSITIONS_AT_ONCE = 1024  # logits held at a time: 1,024 x 50,304 x 4 bytes = 206 MB


@dataclass(frozen=True)
class Loss:
    """Sums over predicted tokens, so that parts add up and averages weigh tokens, not rows.

    `nats`, `tokens`: over all labelled tokens. `text_nats`, `utf8_bytes`: over those that stand for text, without
    control tokens, which have no bytes.
    """

    nats: float = 0.0
    tokens: int = 0
    text_nats: float = 0.0
    utf8_bytes: int = 0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.text_nats + other.text_nats,
            self.utf8_bytes + other.utf8_bytes,
        )

    @property
    def per_token(self) -> float:
        """Nats per token; nan when nothing was counted."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits the model needs per byte of UTF-8; nan when nothing was counted."""
        return self.text_nats / math.log(2) / self.utf8_bytes if self.utf8_bytes else math.nan


@torch.no_grad()
def compute_batch_loss(model: torch.nn.Module, batch: dict[str, Tensor], bytes_of: Tensor) -> Loss:
    """The loss of one batch, with the vocabulary head on labelled positions only.

    Args:
        model: a stock GPT-2.
        batch: `input_ids` (B, T), `labels` (B, T) with -100 where nothing is asked, perhaps `attention_mask` (B, T).
        bytes_of: (V,) UTF-8 bytes of each token, 0 for control tokens.
    """
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "position_ids")}
    hidden = model.transformer(**inputs, use_cache=False).last_hidden_state[:, :-1]  # (B, T, D) -> (B, T-1, D)
    labels = batch["labels"][:, 1:]
    asked = labels != -100
    hidden, labels = hidden[asked], labels[asked]  # (N, D), (N,)
    nats = (
        torch.cat(
            [
                F.cross_entropy((part @ model.lm_head.weight.T.to(part.dtype)).float(), wanted, reduction="none")
                for part, wanted in zip(hidden.split(POSITIONS_AT_ONCE), labels.split(POSITIONS_AT_ONCE), strict=True)
            ]
        )
        .cpu()
        .double()
    )  # Apple's GPUs have no float64
    utf8_bytes = bytes_of[labels].cpu()
    return Loss(float(nats.sum()), labels.numel(), float(nats[utf8_bytes > 0].sum()), int(utf8_bytes.sum()))


def compute_dataset_loss(
    model: torch.nn.Module,
    rows: Sequence[dict[str, Tensor]],
    collate: Callable[[list[dict]], dict[str, Tensor]],
    bytes_of: Tensor,
    batch_size: int,
) -> Loss:
    """The loss over all rows, in order."""
    device = next(model.parameters()).device
    bytes_of = bytes_of.to(device)
    total = Loss()
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        total += compute_batch_loss(model, {key: value.to(device) for key, value in batch.items()}, bytes_of)
    return total


def gzip_bits_per_byte(text: bytes) -> float:
    """What `gzip -9` needs for the same bytes: the figure that a language model must beat."""
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)
