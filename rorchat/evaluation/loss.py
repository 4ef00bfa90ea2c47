"""Validation loss in nats per token, and bits per byte, which is comparable between tokenizers and with gzip."""

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rorchat.chatml import IGNORE_INDEX
from rorchat.evaluation.text_measures import bits_per_byte

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

TOKENS_PER_CHUNK = 1024  # logits held at once: 1,024 x 50,304 x 4 bytes = 206 MB


@dataclass(frozen=True)
class Loss:
    """Sums over predicted tokens. Losses can be added, so an average gives each token, not each row, the same weight.

    Attributes:
        nats, tokens: over all labelled tokens.
        text_nats, utf8_bytes: over labelled tokens that stand for text, i.e. without control tokens.
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
        """Nats per token; NaN for no tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of text; NaN for no bytes."""
        return bits_per_byte(self.text_nats, self.utf8_bytes)


class Rows(Protocol):
    """Rows with `input_ids` and `labels`, read by index, such as a list or a torch `Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@torch.no_grad()
def compute_batch_loss(model: "GPT2LMHeadModel", batch: dict[str, Tensor], token_bytes: Tensor) -> Loss:
    """The loss of one batch; the language-model head runs on labelled positions only.

    Args:
        model: a stock GPT-2.
        batch: `input_ids` (B, T), `labels` (B, T) with -100 at positions without a label, optionally
            `attention_mask` and `position_ids` (B, T).
        token_bytes: (V,) UTF-8 length of each token, 0 for control tokens.
    """
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "position_ids")}
    hidden = model.transformer(**inputs, use_cache=False).last_hidden_state[:, :-1]  # (B, T, D) -> (B, T-1, D)
    labels = batch["labels"][:, 1:]
    labelled = labels != IGNORE_INDEX
    hidden, labels = hidden[labelled], labels[labelled]  # (B, T-1, D) -> (N, D), (B, T-1) -> (N,)
    chunks = zip(hidden.split(TOKENS_PER_CHUNK), labels.split(TOKENS_PER_CHUNK), strict=True)
    losses = [
        F.cross_entropy((chunk @ model.lm_head.weight.T.to(chunk.dtype)).float(), targets, reduction="none")
        for chunk, targets in chunks
    ]
    nats = torch.cat(losses).cpu().double()  # on the CPU: Apple's GPUs have no float64
    utf8_bytes = token_bytes[labels].cpu()
    return Loss(float(nats.sum()), labels.numel(), float(nats[utf8_bytes > 0].sum()), int(utf8_bytes.sum()))


def compute_dataset_loss(
    model: "GPT2LMHeadModel",
    rows: Rows,
    collate: Callable[[list[dict]], dict[str, Tensor]],
    token_bytes: Tensor,
    batch_size: int,
) -> Loss:
    """The loss over all rows, in batches of consecutive rows."""
    device = next(model.parameters()).device
    token_bytes = token_bytes.to(device)
    total = Loss()
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        total += compute_batch_loss(model, {key: value.to(device) for key, value in batch.items()}, token_bytes)
    return total


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits per byte of `gzip -9`: a baseline that every language model should beat."""
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)
