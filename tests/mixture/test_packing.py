"""Packing loses no sequence, fills rows, and does not change loss or gradients."""

import copy
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from support import ROOT
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from rorchat.chatml import IGNORE_INDEX, encode_conversations
from rorchat.mixture.collators import collate_packed, collate_padded
from rorchat.mixture.packing import PackedRows, Sequences, pack
from rorchat.sources.registry import load_rows
from rorchat.training.kernels import attention as attention_module
from rorchat.training.kernels.lm_head_loss import patch_lm_head_loss

sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import lengths as chat_files  # noqa: E402

WINDOW, PAD, VOCABULARY = 48, 0, 199


def drawn(count: int, most: int = WINDOW, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, most + 1, count).tolist()


def count_best_fit_decreasing_rows(lengths: list[int], window: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(window - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_in_one_row_and_rows_are_full(seed):
    lengths = drawn(300, seed=seed)
    rows = pack(lengths, WINDOW)
    assert sorted(index for row in rows for index in row) == list(range(300))
    for number, row in enumerate(rows):
        room = WINDOW - sum(lengths[index] for index in row)
        assert 0 <= room < min((lengths[index] for later in rows[number + 1 :] for index in later), default=WINDOW + 1)
    assert len(rows) <= count_best_fit_decreasing_rows(lengths, WINDOW)


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([10], [[0]]), ([4, 10, 6], [[1], [2, 0]]), ([7, 2, 2, 1], [[0, 1, 3], [2]]), ([6, 3, 2, 2], [[0, 2, 3], [1]])],
    ids=["full", "one that fills", "of equal ones the first", "two that fill before a longer one"],
)
def test_rows_are_filled_exactly_if_one_or_two_sequences_fit(lengths, rows):
    assert pack(lengths, 10) == rows


def test_empty_and_overlong_sequences_are_errors():
    assert pack([], WINDOW) == []
    for lengths in ([3, WINDOW + 1], [0, 3]):
        with pytest.raises(ValueError, match=f"do not all fit into rows of {WINDOW}"):
            pack(lengths, WINDOW)


def sequences(count: int = 40, most: int = 30) -> Sequences:
    rng = np.random.default_rng(1)
    rows = []
    for length in drawn(count, most):
        ids = rng.integers(1, VOCABULARY, length)
        rows.append((ids, np.where(rng.random(length) < 0.5, ids, IGNORE_INDEX)))
    return Sequences(rows)


def test_sequences_are_returned_without_their_first_label():
    rows = [([5, 6, 7], [5, IGNORE_INDEX, 7]), ([8], [8]), ([9, 10], [IGNORE_INDEX, 10])]
    given = Sequences(rows)
    assert given.lengths.tolist() == [3, 1, 2]
    for (ids, labels), row in zip(rows, given, strict=True):
        assert row["input_ids"].tolist() == ids
        assert row["labels"].tolist() == [IGNORE_INDEX, *labels[1:]]


def test_every_epoch_packs_all_sequences_in_a_new_seeded_order():
    given = sequences()
    epoch = len(pack(given.lengths, WINDOW))
    rows = PackedRows(given, WINDOW, 2 * epoch + 3, seed=0).rows
    assert len(rows) == 2 * epoch + 3
    first, second = rows[:epoch], rows[epoch : 2 * epoch]
    for part in (first, second):
        assert sorted(index for row in part for index in row) == list(range(len(given)))
    assert first != second and {frozenset(row) for row in first} != {frozenset(row) for row in second}
    assert rows == PackedRows(given, WINDOW, 2 * epoch + 3, seed=0).rows
    assert rows != PackedRows(given, WINDOW, 2 * epoch + 3, seed=1).rows


@pytest.fixture(scope="module")
def stock() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=WINDOW, n_layer=2, n_head=2, n_embd=32, **quiet)
    )


def separate_loss_and_gradients(model: GPT2LMHeadModel, given: Sequences) -> dict[str, torch.Tensor]:
    """Mean loss over all labels and its gradients by plain Transformers, one sequence at a time."""
    model = copy.deepcopy(model).train()
    asked, total = 0, torch.zeros(())
    for row in given:
        logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, row["labels"][1:], ignore_index=IGNORE_INDEX, reduction="sum")
        asked += int((row["labels"][1:] != IGNORE_INDEX).sum())
    (total / asked).backward()
    return {"loss": (total / asked).detach()} | {name: p.grad for name, p in model.named_parameters()}


def packed_loss_and_gradients(
    model: GPT2LMHeadModel, given: Sequences, checkpointing: bool = False
) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    patch_lm_head_loss(model)
    rows = PackedRows(given, WINDOW, len(pack(given.lengths, WINDOW)), seed=0)
    loss = model(**collate_packed(rows, PAD)).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_equal_separate_rows(stock, checkpointing):
    given = sequences()
    expected, actual = separate_loss_and_gradients(stock, given), packed_loss_and_gradients(stock, given, checkpointing)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-4, atol=1e-5), name
        assert (actual[name] - value).norm() <= 1e-5 * value.norm(), name


def test_hidden_states_do_not_depend_on_other_sequences(stock):
    """The hidden states are bit-identical with any other sequences in the row."""
    model = copy.deepcopy(stock).eval()
    patch_lm_head_loss(model)
    given = [row for row in sequences(6, 12)]
    other = [dict(row, input_ids=row["input_ids"].flip(0) + (number != 2)) for number, row in enumerate(given)]
    other[2] = given[2]
    hidden_states = []
    for rows in (given, other):
        hidden = []
        hook = model.transformer.ln_f.register_forward_hook(lambda *call, into=hidden: into.append(call[-1]))
        with torch.no_grad():
            model(**collate_packed([rows], PAD))
        hook.remove()
        start = sum(len(row["input_ids"]) for row in rows[:2])
        hidden_states.append(hidden[0][0, start : start + len(rows[2]["input_ids"])])
    assert torch.equal(*hidden_states)


def test_attention_needs_no_mask_and_stays_within_sequences(stock, monkeypatch):
    model = copy.deepcopy(stock)
    patch_lm_head_loss(model)
    seen = []

    def attend(query, key, value, attn_mask=None, **options):
        assert attn_mask is None and options["is_causal"]
        seen.append(query.size(2))
        return stock_attention(query, key, value, **options)

    stock_attention = F.scaled_dot_product_attention
    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", attend)
    given = sequences(8, 20)
    model(**collate_packed(PackedRows(given, WINDOW, 1, seed=0), PAD))
    assert seen and max(seen) <= 20


def test_a_patched_model_generates_and_reads_padded_batches(stock):
    ready = copy.deepcopy(stock).eval()
    patch_lm_head_loss(ready)
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(ready.generate(ids, **options), stock.eval().generate(ids, **options))
    batch = collate_padded(list(sequences(5)), PAD)
    plain = copy.deepcopy(stock)(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(plain, batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    assert torch.allclose(ready(**batch).loss, expected, atol=1e-5)


# Real conversations


CHAT_FILES = chat_files.CHAT | {name: name for name in ("math_dataset", "mbpp", "natural_questions", "openbookqa")}


@pytest.mark.parametrize("path", CHAT_FILES)
def test_in_real_conversations_only_replies_have_labels(path, gpt2_tokenizer, shared_data):
    rows = load_rows(f"{CHAT_FILES[path]}={shared_data / path}", "conversation")
    conversations = [row["messages"] for row in islice(rows, 400)]
    encoded = encode_conversations(gpt2_tokenizer, conversations, 1024)
    expected = Counter()
    for messages, encoding in zip(conversations, encoded, strict=True):
        turns = messages[: len(messages) - encoding.dropped_turns] if encoding else []
        expected.update(turn["content"].strip() + "<|im_end|>" for turn in turns if turn["role"] == "assistant")
    given = Sequences((encoding.input_ids, encoding.labels) for encoding in encoded if encoding)
    batch = collate_packed(PackedRows(given, 1024, len(pack(given.lengths, 1024)), seed=0), gpt2_tokenizer.pad_token_id)
    actual = Counter()
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], (labels != IGNORE_INDEX).numpy(), [False]])))
        actual.update(gpt2_tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True))
    assert actual == expected and expected


def test_packed_real_conversations_fill_their_rows(gpt2_tokenizer, shared_data):
    lengths, window = [], 1024
    for name, path in (("alpaca", "alpaca/alpaca_5000.json"), ("dailydialog", "dailydialog")):
        rows = load_rows(f"{name}={shared_data / path}", "conversation")
        conversations = [row["messages"] for row in islice(rows, 2000)]
        encoded = encode_conversations(gpt2_tokenizer, conversations, window)
        lengths += [len(each.input_ids) for each in encoded if each]
    rows = pack(lengths, window)
    assert sum(lengths) / (len(rows) * window) > 0.995
