"""Preference pairs, as one batch of rorchat and as padded rows, and their log-probabilities by stock Transformers."""

import numpy as np
import torch

from rorchat.chatml import IGNORE_INDEX
from rorchat.training.dpo import PAIR_COLUMNS, collate_pairs

VOCABULARY = 199


def random_pairs(count: int = 5, vocabulary: int = VOCABULARY) -> list[dict[str, list[int]]]:
    generator = np.random.default_rng(2)
    sizes = generator.integers([2, 1, 1], [20, 14, 14], (count, 3)).tolist()
    return [
        {name: generator.integers(1, vocabulary, size).tolist() for name, size in zip(PAIR_COLUMNS, row, strict=True)}
        for row in sizes
    ]


def pair_batch(pairs: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return collate_pairs(pairs, pad_id=0)


def padded_sides(pairs: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` (2 B, T): all chosen sides, then all rejected ones."""
    sides = [(pair["prompt_ids"], pair[name]) for name in PAIR_COLUMNS[1:] for pair in pairs]
    width = max(len(prompt) + len(reply) for prompt, reply in sides)

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    return {
        "input_ids": pad([prompt + reply for prompt, reply in sides], 0),
        "attention_mask": pad([[1] * len(prompt + reply) for prompt, reply in sides], 0),
        "labels": pad([[IGNORE_INDEX] * len(prompt) + reply for prompt, reply in sides], IGNORE_INDEX),
    }


def plain_log_probabilities(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(2 B, T - 1) for a batch of `padded_sides`, 0 where there is no label."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return log_probs.masked_fill(labels == IGNORE_INDEX, 0)
