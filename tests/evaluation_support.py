"""A plain computation of the loss, which the evaluation is compared with."""

import pytest
import torch
from torch.nn import functional as F

from rorchat.chatml import IGNORE_INDEX
from rorchat.evaluation.loss import Loss
from rorchat.inference.engine import ChatModel


def compute_plain_loss(chat: ChatModel, rows: list[dict]) -> Loss:
    """The loss computed row by row from all logits, in double precision."""
    nats = tokens = text_nats = utf8_bytes = 0
    for row in rows:
        with torch.no_grad():
            logits = chat.model(torch.tensor([row["input_ids"]])).logits[0].double()
        for position, label in enumerate(row["labels"][1:]):
            if label != IGNORE_INDEX:
                cost = -F.log_softmax(logits[position], dim=-1)[label].item()
                nats, tokens = nats + cost, tokens + 1
                if label not in chat.tokenizer.all_special_ids:
                    text_nats += cost
                    utf8_bytes += len(chat.tokenizer.convert_ids_to_tokens(label))  # one character a byte
    return Loss(nats, tokens, text_nats, utf8_bytes)


def assert_losses_close(loss: Loss, expected: Loss) -> None:
    assert (loss.tokens, loss.utf8_bytes) == (expected.tokens, expected.utf8_bytes)
    assert loss.nats == pytest.approx(expected.nats, rel=1e-5)
    assert loss.text_nats == pytest.approx(expected.text_nats, rel=1e-5)
