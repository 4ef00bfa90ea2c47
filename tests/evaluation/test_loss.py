"""Loss and bits per byte equal a plain computation."""

import copy
import gzip
import math
import random

import pytest
import torch
from evaluation_support import assert_losses_close, compute_plain_loss
from torch.nn import functional as F

from rorchat.chatml import IGNORE_INDEX, encode_conversation
from rorchat.evaluation import loss as loss_module
from rorchat.evaluation.loss import Loss, compute_batch_loss, compute_dataset_loss, gzip_bits_per_byte
from rorchat.mixture.collators import collate_padded
from rorchat.tokenizer import token_bytes


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[dict]:
    """Encoded conversations of many lengths, with labels on the replies only."""
    talk = ["Hi", "What is 12 plus 3?", "It is 15.", "naïve café", "你好 🙂", "Yes", "The kite was at the mill."]
    pairs = [{"role": role, "content": text} for text in talk for role in ("user", "assistant")]
    conversations = [pairs[start : start + length] for start in range(0, 12, 2) for length in (2, 4)]
    system = {"role": "system", "content": "Be kind."}
    encoded = [encode_conversation(tokenizer, [system, *messages], max_length=128) for messages in conversations]
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]
    assert len({len(row["input_ids"]) for row in rows}) >= 5
    return rows


@pytest.fixture(scope="module")
def utf8_lengths(tokenizer) -> torch.Tensor:
    """(V,) UTF-8 bytes of each token."""
    return torch.tensor(token_bytes(tokenizer))


def test_averages_of_a_loss_equal_a_hand_computation():
    # 3 tokens of text, which cost 2, 3 and 5 nats and have 1, 4 and 2 bytes, and a control token at 7 nats
    loss = Loss(nats=2 + 3 + 5 + 7, tokens=4, text_nats=2 + 3 + 5, utf8_bytes=1 + 4 + 2)
    assert loss.per_token == 17 / 4
    assert loss.bits_per_byte == pytest.approx(10 / 0.6931471805599453 / 7)
    # a uniform distribution over bytes
    assert Loss(0, 0, 100 * math.log(256), 100).bits_per_byte == pytest.approx(8.0)


def test_a_uniform_model_has_the_loss_of_its_vocabulary_size(chat, utf8_lengths):
    model = copy.deepcopy(chat.model)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()  # tied to the head: all logits are zero
    ids = chat.tokenizer("naïve café", add_special_tokens=False)["input_ids"]
    batch = {"input_ids": torch.tensor([[0, *ids]]), "labels": torch.tensor([[0, *ids]])}
    loss = compute_batch_loss(model, batch, utf8_lengths)
    assert loss.tokens == len(ids)
    assert loss.utf8_bytes == len("naïve café".encode()) == 12
    assert loss.per_token == pytest.approx(math.log(384), rel=1e-6)
    assert loss.bits_per_byte == pytest.approx(len(ids) * math.log2(384) / 12, rel=1e-6)


def test_an_empty_loss_is_nan_and_losses_add_up(lively, utf8_lengths):
    assert math.isnan(Loss().per_token) and math.isnan(Loss().bits_per_byte)
    assert Loss(1, 2, 3, 4) + Loss(10, 20, 30, 40) == Loss(11, 22, 33, 44)
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, IGNORE_INDEX]])}
    assert compute_batch_loss(lively.model, batch, utf8_lengths) == Loss()


def test_the_loss_equals_a_plain_computation(lively, rows, utf8_lengths):
    pad = lively.tokenizer.pad_token_id
    expected = compute_plain_loss(lively, rows)
    loss = compute_dataset_loss(
        lively.model,
        rows,
        lambda batch: collate_padded(batch, pad),
        utf8_lengths,
        batch_size=4,
    )
    assert_losses_close(loss, expected)
    assert expected.tokens < sum(len(row["labels"]) for row in rows) / 2  # only replies are counted


def test_the_loss_weighs_tokens_and_not_rows(lively, rows, utf8_lengths):
    pad = lively.tokenizer.pad_token_id
    short, long = min(rows, key=lambda row: len(row["labels"])), max(rows, key=lambda row: len(row["labels"]))
    one, other = compute_plain_loss(lively, [short]), compute_plain_loss(lively, [long])
    both = compute_dataset_loss(
        lively.model,
        [short, long],
        lambda batch: collate_padded(batch, pad),
        utf8_lengths,
        2,
    )
    assert both.per_token == pytest.approx((one.nats + other.nats) / (one.tokens + other.tokens), rel=1e-5)
    assert abs(both.per_token - (one.per_token + other.per_token) / 2) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_padding_and_batch_size_do_not_change_the_loss(batch_size, lively, rows, utf8_lengths):
    pad = lively.tokenizer.pad_token_id
    expected = compute_dataset_loss(lively.model, rows, lambda batch: collate_padded(batch, pad), utf8_lengths, 1)

    def wider(batch):
        rows = collate_padded(batch, pad)
        return {
            "input_ids": F.pad(rows["input_ids"], (0, 9), value=pad),
            "labels": F.pad(rows["labels"], (0, 9), value=IGNORE_INDEX),
        }

    for collate in (lambda batch: collate_padded(batch, pad), wider):
        assert_losses_close(
            compute_dataset_loss(lively.model, rows, collate, utf8_lengths, batch_size),
            expected,
        )


def test_left_padding_does_not_change_the_loss(lively, rows, utf8_lengths):
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    batch = {
        "input_ids": torch.tensor([[lively.tokenizer.pad_token_id] * 5 + ids]),
        "labels": torch.tensor([[IGNORE_INDEX] * 5 + labels]),
        "attention_mask": torch.tensor([[0] * 5 + [1] * len(ids)]),
        "position_ids": torch.tensor([[0] * 5 + list(range(len(ids)))]),
    }
    assert_losses_close(
        compute_batch_loss(lively.model, batch, utf8_lengths),
        compute_plain_loss(lively, rows[:1]),
    )


def test_the_chunk_size_does_not_change_the_loss(lively, rows, monkeypatch, utf8_lengths):
    pad = lively.tokenizer.pad_token_id
    batch = collate_padded(rows, pad)
    whole = compute_batch_loss(lively.model, batch, utf8_lengths)
    monkeypatch.setattr(loss_module, "TOKENS_PER_CHUNK", 7)
    assert whole.tokens > 70
    assert_losses_close(compute_batch_loss(lively.model, batch, utf8_lengths), whole)


def test_token_bytes_add_up_to_the_text(tokenizer):
    for text in ("Hello, world!", "naïve café 你好 🙂 👩‍🔬", "\ttabs\n\n", "123 + 456"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sum(token_bytes(tokenizer)[token] for token in ids) == len(text.encode())
    assert [token_bytes(tokenizer)[token] for token in tokenizer.all_special_ids] == [0] * 16


def test_gzip_bits_per_byte_counts_the_compressed_file():
    text = b"the quick brown fox jumps over the lazy dog. " * 50
    assert gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9)) / len(text) < 0.5
    noise = random.Random(0).randbytes(10_000)
    assert 8.0 < gzip_bits_per_byte(noise) < 8.1
