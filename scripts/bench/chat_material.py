"""What all sides of a chat work are given: rows of random tokens with real lengths, initial weights, and a proof.

    python scripts/bench/chat_material.py WORK_JSON FOLDER

FOLDER/rows.json            conversations (input_ids, labels) or pairs (prompt_ids, chosen_ids, rejected_ids)
FOLDER/weights.safetensors  the initial weights, in GPT-2's names
FOLDER/proof.json           sha256 of the rows and of the weights, parameters, and what the first step must find: losses
                            in nats a supervised token and the norm of the gradient, by plain float32 passes of a stock
                            model over one row at a time, so that no row can have seen another, or any padding
"""

import json
import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from material import SEED, save_weights, stock_model, tokenizer_of, weights_sha256
from torch import Tensor
from transformers import GPT2LMHeadModel
from works import Work

from rorchat.chatml import IGNORE_INDEX, IM_START

BETA = 0.1  # of DPO: TRL's default and rorchat's


def rows_of(work: Work) -> list[dict[str, list[int]]]:
    """Random tokens; a row begins with `<|im_start|>`, which stands nowhere else, so that rows can be told apart."""
    draw = np.random.default_rng(SEED)
    start = tokenizer_of(work).convert_tokens_to_ids(IM_START)

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
    order = draw.permutation(len(rows))  # they come sorted by length
    return [rows[number] for number in order]


def labelled(row: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of a conversation, or of both sides of a pair."""
    if "input_ids" in row:
        return [(row["input_ids"], row["labels"])]
    prompt = row["prompt_ids"]
    return [
        (prompt + reply, [IGNORE_INDEX] * len(prompt) + reply) for reply in (row["chosen_ids"], row["rejected_ids"])
    ]


def rows_sha256(batches: Iterable[Tensor], start: int) -> str:
    """Of the rows in batches of ids and labels (2, N) without padding, whatever their order and their packing."""
    read = torch.cat([batch.cpu() for batch in batches], dim=1)
    begins = (read[0] == start).nonzero().flatten().tolist()
    parts = read.tensor_split(begins, dim=1)  # what stands before the first row, too
    digests = sorted(sha256(part.numpy().astype("<i8").tobytes()).hexdigest() for part in parts)
    return sha256(" ".join(digests).encode()).hexdigest()


def summed_loss(model: GPT2LMHeadModel, ids: list[int], labels: list[int]) -> Tensor:
    """-log p of the supervised tokens of one row, in nats."""
    row = {name: torch.tensor([values]) for name, values in (("input_ids", ids), ("labels", labels))}
    return model(**row, num_items_in_batch=1, use_cache=False).loss


def supervised(rows: Iterable[tuple[list[int], list[int]]]) -> int:
    return sum(label != IGNORE_INDEX for _, labels in rows for label in labels)


def first_of_conversations(model: GPT2LMHeadModel, rows: list[dict]) -> dict[str, float]:
    conversations = [row for each in rows for row in labelled(each)]
    tokens, total = supervised(conversations), 0.0
    for ids, labels in conversations:
        loss = summed_loss(model, ids, labels) / tokens
        loss.backward()
        total += loss.item()
    return {"first_loss": total}


def first_of_pairs(model: GPT2LMHeadModel, rows: list[dict]) -> dict[str, float]:
    """Where the model is still the reference, the loss is log 2 whatever the rows are; so this is of both sides."""
    sides = list(zip(*(labelled(row) for row in rows), strict=True))
    losses = []
    for of_side, sign in zip(sides, (1, -1), strict=True):
        total = 0.0
        for ids, labels in of_side:
            loss = summed_loss(model, ids, labels)
            total += loss.item()
            # the derivative of -log sigmoid(beta x margin) at a margin of 0 is -beta / 2
            (sign * BETA / 2 / len(rows) * loss).backward()
        losses.append(total / supervised(of_side))
    return {"first_chosen_loss": losses[0], "first_rejected_loss": losses[1], "first_reward": 0.0}


def make(work: Work, folder: Path) -> None:
    rows = rows_of(work)
    (folder / "rows.json").write_text(json.dumps(rows))
    model = stock_model(work)
    first = first_of_pairs if work.data == "pairs" else first_of_conversations
    found = first(model, rows)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    batch = torch.cat([torch.tensor(row) for each in rows for row in labelled(each)], dim=1)
    proof = {
        "tokens_sha256": rows_sha256([batch], rows[0].get("input_ids", rows[0].get("prompt_ids"))[0]),
        "weights_sha256": weights_sha256(save_weights(model, folder)),
        "parameters": model.num_parameters(),
        "first_gradient_norm": norm,
    }
    (folder / "proof.json").write_text(json.dumps(proof | found))


if __name__ == "__main__":
    make(Work.read(sys.argv[1]), Path(sys.argv[2]))
