"""Makes what all sides of a chat work share: rows of random tokens with real lengths, weights, and a proof.

    python scripts/bench/chat_material.py WORK_JSON FOLDER

FOLDER/rows.json            conversations (input_ids, labels) or pairs (prompt_ids, chosen_ids, rejected_ids)
FOLDER/weights.safetensors  initial weights with GPT-2's names
FOLDER/proof.json           sha256 of rows and weights, number of parameters, and the expected first step: losses in
                            nats per supervised token and the gradient norm, from float32 passes of a stock model over
                            one row at a time, without padding and without other rows
"""

import json
import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from material import SEED, build_stock_model, make_tokenizer, save_weights, weights_sha256
from torch import Tensor
from transformers import GPT2LMHeadModel
from works import Work

from rorchat.chatml import IGNORE_INDEX, IM_START

BETA = 0.1  # of DPO, the default of TRL and rorchat


def make_rows(work: Work) -> list[dict[str, list[int]]]:
    """Random tokens. `<|im_start|>` occurs only at the beginning of a row, so that packed rows can be separated."""
    draw = np.random.default_rng(SEED)
    start = make_tokenizer(work).convert_tokens_to_ids(IM_START)

    def tokens(number: int) -> list[int]:
        return draw.integers(256, work.vocabulary, number).tolist()

    rows = []
    for lengths in work.lengths():
        if work.data == "pairs":
            prompt, chosen, rejected = map(tokens, lengths)
            rows.append({"prompt_ids": [start, *prompt[1:]], "chosen_ids": chosen, "rejected_ids": rejected})
        else:
            ids = [start, *tokens(sum(lengths) - 1)]
            supervised = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
            rows.append({"input_ids": ids, "labels": np.where(supervised, ids, IGNORE_INDEX).tolist()})
    order = draw.permutation(len(rows))  # the lengths are sorted
    return [rows[number] for number in order]


def label(row: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of a conversation, or of both sides of a pair."""
    if "input_ids" in row:
        return [(row["input_ids"], row["labels"])]
    prompt = row["prompt_ids"]
    return [
        (prompt + reply, [IGNORE_INDEX] * len(prompt) + reply) for reply in (row["chosen_ids"], row["rejected_ids"])
    ]


def rows_sha256(batches: Iterable[Tensor], start: int) -> str:
    """Hash of the rows in batches of ids and labels (2, N) without padding, independent of order and packing."""
    read = torch.cat([batch.cpu() for batch in batches], dim=1)
    start = (read[0] == start).nonzero().flatten().tolist()
    parts = read.tensor_split(start, dim=1)  # including tokens before the first row
    digests = sorted(sha256(part.numpy().astype("<i8").tobytes()).hexdigest() for part in parts)
    return sha256(" ".join(digests).encode()).hexdigest()


def summed_loss(model: GPT2LMHeadModel, ids: list[int], labels: list[int]) -> Tensor:
    """Negative log-probability of the supervised tokens of one row, in nats."""
    row = {name: torch.tensor([values]) for name, values in (("input_ids", ids), ("labels", labels))}
    return model(**row, num_items_in_batch=1, use_cache=False).loss


def count_supervised(rows: Iterable[tuple[list[int], list[int]]]) -> int:
    return sum(label != IGNORE_INDEX for _, labels in rows for label in labels)


def first_step_of_conversations(model: GPT2LMHeadModel, rows: list[dict]) -> dict[str, float]:
    conversations = [conversation for row in rows for conversation in label(row)]
    tokens, total = count_supervised(conversations), 0.0
    for ids, labels in conversations:
        loss = summed_loss(model, ids, labels) / tokens
        loss.backward()
        total += loss.item()
    return {"first_loss": total}


def first_step_of_pairs(model: GPT2LMHeadModel, rows: list[dict]) -> dict[str, float]:
    """Losses of the chosen and the rejected replies: the DPO loss of the first step is log 2 for any rows."""
    sides = list(zip(*(label(row) for row in rows), strict=True))
    losses = []
    for of_side, sign in zip(sides, (1, -1), strict=True):
        total = 0.0
        for ids, labels in of_side:
            loss = summed_loss(model, ids, labels)
            total += loss.item()
            # the derivative of -log sigmoid(beta x margin) at a margin of 0 is -beta / 2
            (sign * BETA / 2 / len(rows) * loss).backward()
        losses.append(total / count_supervised(of_side))
    return {"first_chosen_loss": losses[0], "first_rejected_loss": losses[1], "first_reward": 0.0}


def make(work: Work, folder: Path) -> None:
    rows = make_rows(work)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    model = build_stock_model(work)
    first = first_step_of_pairs if work.data == "pairs" else first_step_of_conversations
    first_step = first(model, rows)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    batch = torch.cat([torch.tensor(part) for row in rows for part in label(row)], dim=1)
    proof = {
        "tokens_sha256": rows_sha256([batch], rows[0].get("input_ids", rows[0].get("prompt_ids"))[0]),
        "weights_sha256": weights_sha256(save_weights(model, folder)),
        "parameters": model.num_parameters(),
        "first_gradient_norm": norm,
    }
    (folder / "proof.json").write_text(json.dumps(proof | first_step), encoding="utf-8")


if __name__ == "__main__":
    make(Work.read(sys.argv[1]), Path(sys.argv[2]))
