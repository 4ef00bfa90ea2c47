"""Packed batches, preference pairs and their log-probabilities by stock Transformers."""

import numpy as np
import torch

from rorchat.chatml import IGNORE_INDEX

VOCABULARY = 199


def pairs(count: int = 5) -> list[tuple[list[int], list[int], list[int]]]:
    draw = np.random.default_rng(2)
    sizes = draw.integers([2, 1, 1], [20, 14, 14], (count, 3))
    return [tuple(draw.integers(1, VOCABULARY, size).tolist() for size in each) for each in sizes.tolist()]


def batch_of(given) -> dict[str, torch.Tensor]:
    """As TRL's collator has it: chosen sides before rejected ones."""
    rows = [(prompt, chosen) for prompt, chosen, _ in given] + [(prompt, rejected) for prompt, _, rejected in given]
    width = max(len(prompt) + len(reply) for prompt, reply in rows)

    def filled(parts) -> torch.Tensor:
        return torch.tensor([part + [0] * (width - len(part)) for part in parts])

    input_ids = filled([prompt + reply for prompt, reply in rows])
    asked = filled([[0] * len(prompt) + [1] * len(reply) for prompt, reply in rows])
    mask = filled([[1] * (len(prompt) + len(reply)) for prompt, reply in rows])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(asked == 0, IGNORE_INDEX)}


def plain_log_probabilities(model, batch) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    found = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(labels == IGNORE_INDEX, 0)
