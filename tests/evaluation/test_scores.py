"""SCORES: every number equals what a hand or a plain computation gives."""

import copy
import gzip
import math
import random

import pytest
import torch
from torch.nn import functional as F

from rorchat.chatml import END_OF_TEXT, IGNORE_INDEX, IM_END, encode_conversation
from rorchat.errors import DataError
from rorchat.evaluation import compare, scores
from rorchat.evaluation.compare import compute_document_loss, load_validation_documents
from rorchat.evaluation.loss import Loss, compute_batch_loss, compute_dataset_loss, gzip_bits_per_byte
from rorchat.evaluation.scores import Rate, Scores, read_scores, score_chat, write_scores
from rorchat.inference.engine import ChatModel, Reply
from rorchat.mixture.collators import collate_padded
from rorchat.model import save_model
from rorchat.persona import build_probes, load_persona
from rorchat.sources.registry import load_rows
from rorchat.sources.tinytown import Question, held_out_questions
from rorchat.tokenizer import token_bytes
from rorchat.tokens.prepare import prepare


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[dict]:
    """Encoded conversations of many lengths, labels on the replies alone."""
    talk = ["Hi", "What is 12 plus 3?", "It is 15.", "naïve café", "你好 🙂", "Yes", "The kite was at the mill."]
    pairs = [{"role": role, "content": text} for text in talk for role in ("user", "assistant")]
    conversations = [pairs[start : start + length] for start in range(0, 12, 2) for length in (2, 4)]
    system = {"role": "system", "content": "Be kind."}
    encoded = [encode_conversation(tokenizer, [system, *messages], max_length=128) for messages in conversations]
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]
    assert len({len(row["input_ids"]) for row in rows}) >= 5
    return rows


def plain_loss(chat: ChatModel, rows: list[dict]) -> Loss:
    """One row at a time, all logits, in double precision, token by token."""
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


def assert_same(loss: Loss, expected: Loss) -> None:
    assert (loss.tokens, loss.utf8_bytes) == (expected.tokens, expected.utf8_bytes)
    assert loss.nats == pytest.approx(expected.nats, rel=1e-5)
    assert loss.text_nats == pytest.approx(expected.text_nats, rel=1e-5)


def bytes_of(chat: ChatModel) -> torch.Tensor:
    return torch.tensor(token_bytes(chat.tokenizer))


def test_bits_per_byte_is_what_a_hand_computes():
    # 3 tokens of text, which cost 2, 3 and 5 nats and have 1, 4 and 2 bytes, and a control token at 7 nats
    loss = Loss(nats=2 + 3 + 5 + 7, tokens=4, text_nats=2 + 3 + 5, utf8_bytes=1 + 4 + 2)
    assert loss.per_token == 17 / 4
    assert loss.bits_per_byte == pytest.approx(10 / 0.6931471805599453 / 7)
    # A model that knows nothing of bytes needs 8 bits for each
    assert Loss(0, 0, 100 * math.log(256), 100).bits_per_byte == pytest.approx(8.0)


def test_a_uniform_model_needs_the_bits_of_its_vocabulary_for_every_token(chat):
    model = copy.deepcopy(chat.model)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()  # tied to the head: all logits are zero
    ids = chat.tokenizer("naïve café", add_special_tokens=False)["input_ids"]
    batch = {"input_ids": torch.tensor([[0, *ids]]), "labels": torch.tensor([[0, *ids]])}
    loss = compute_batch_loss(model, batch, bytes_of(chat))
    assert loss.tokens == len(ids)
    assert loss.utf8_bytes == len("naïve café".encode()) == 12
    assert loss.per_token == pytest.approx(math.log(384), rel=1e-6)
    assert loss.bits_per_byte == pytest.approx(len(ids) * math.log2(384) / 12, rel=1e-6)


def test_nothing_counted_is_not_a_number_and_parts_add_up(lively):
    assert math.isnan(Loss().per_token) and math.isnan(Loss().bits_per_byte)
    assert Loss(1, 2, 3, 4) + Loss(10, 20, 30, 40) == Loss(11, 22, 33, 44)
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, IGNORE_INDEX]])}
    assert compute_batch_loss(lively.model, batch, bytes_of(lively)) == Loss()


def test_the_loss_equals_a_plain_computation_over_all_logits(lively, rows):
    pad = lively.tokenizer.pad_token_id
    expected = plain_loss(lively, rows)
    loss = compute_dataset_loss(
        lively.model, rows, lambda batch: collate_padded(batch, pad), bytes_of(lively), batch_size=4
    )
    assert_same(loss, expected)
    assert expected.tokens < sum(len(row["labels"]) for row in rows) / 2  # replies alone are counted


def test_the_loss_weighs_tokens_and_not_rows(lively, rows):
    pad = lively.tokenizer.pad_token_id
    short, long = min(rows, key=lambda row: len(row["labels"])), max(rows, key=lambda row: len(row["labels"]))
    one, other = plain_loss(lively, [short]), plain_loss(lively, [long])
    both = compute_dataset_loss(
        lively.model, [short, long], lambda batch: collate_padded(batch, pad), bytes_of(lively), 2
    )
    assert both.per_token == pytest.approx((one.nats + other.nats) / (one.tokens + other.tokens), rel=1e-5)
    assert abs(both.per_token - (one.per_token + other.per_token) / 2) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_padding_and_the_size_of_batches_change_nothing(batch_size, lively, rows):
    pad = lively.tokenizer.pad_token_id
    expected = compute_dataset_loss(lively.model, rows, lambda batch: collate_padded(batch, pad), bytes_of(lively), 1)

    def wider(batch):
        rows = collate_padded(batch, pad)
        return {
            "input_ids": F.pad(rows["input_ids"], (0, 9), value=pad),
            "labels": F.pad(rows["labels"], (0, 9), value=IGNORE_INDEX),
        }

    for collate in (lambda batch: collate_padded(batch, pad), wider):
        assert_same(compute_dataset_loss(lively.model, rows, collate, bytes_of(lively), batch_size), expected)


def test_padding_on_the_left_with_an_attention_mask_changes_nothing_either(lively, rows):
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    batch = {
        "input_ids": torch.tensor([[lively.tokenizer.pad_token_id] * 5 + ids]),
        "labels": torch.tensor([[IGNORE_INDEX] * 5 + labels]),
        "attention_mask": torch.tensor([[0] * 5 + [1] * len(ids)]),
        "position_ids": torch.tensor([[0] * 5 + list(range(len(ids)))]),
    }
    assert_same(compute_batch_loss(lively.model, batch, bytes_of(lively)), plain_loss(lively, rows[:1]))


def test_more_tokens_than_are_computed_at_once_give_the_same_sum(lively, rows, monkeypatch):
    from rorchat.evaluation import loss

    pad = lively.tokenizer.pad_token_id
    batch = collate_padded(rows, pad)
    whole = compute_batch_loss(lively.model, batch, bytes_of(lively))
    monkeypatch.setattr(loss, "POSITIONS_AT_ONCE", 7)
    assert whole.tokens > 70
    assert_same(compute_batch_loss(lively.model, batch, bytes_of(lively)), whole)


def test_the_bytes_of_tokens_add_up_to_those_of_the_text(tokenizer):
    for text in ("Hello, world!", "naïve café 你好 🙂 👩‍🔬", "\ttabs\n\n", "123 + 456"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sum(token_bytes(tokenizer)[token] for token in ids) == len(text.encode())
    assert [token_bytes(tokenizer)[token] for token in tokenizer.all_special_ids] == [0] * 16


def test_gzip_needs_what_the_gzip_file_has():
    text = b"the quick brown fox jumps over the lazy dog. " * 50
    assert gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9)) / len(text) < 0.5
    noise = random.Random(0).randbytes(10_000)
    assert 8.0 < gzip_bits_per_byte(noise) < 8.1


def test_long_documents_are_read_in_windows_that_predict_every_token_once(lively):
    documents = ["short", "Once upon a time there was a small model. " * 12, "你好 " * 40, ""]
    ids = [lively.tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    assert max(map(len, ids)) > 2 * lively.n_positions
    loss = compute_document_loss(lively, documents)
    assert loss.tokens == sum(map(len, ids))
    assert loss.utf8_bytes == sum(len(text.encode()) for text in documents)
    rows = []
    for tokens in ids:
        tokens = [lively.tokenizer.convert_tokens_to_ids("<|endoftext|>"), *tokens]
        for start in range(0, len(tokens) - 1, 127):
            rows.append({"input_ids": tokens[start : start + 128], "labels": tokens[start : start + 128]})
    assert_same(loss, plain_loss(lively, rows))


def test_the_held_out_documents_of_a_store_are_its_validation_texts(tokenizer, tmp_path):
    store = prepare("tinytown=200", tokenizer, tmp_path / "store", validation_share=0.2)
    texts = [row["text"] for row in load_rows("tinytown=200", "document")]
    found = load_validation_documents(str(store.folder), tokenizer)
    assert len(found) == store.manifest.total("validation", "documents") > 20
    assert set(found) <= set(texts)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert load_validation_documents(f"text={path}", tokenizer) == ["one", "two"]
    with pytest.raises(DataError, match="No file or folder"):
        load_validation_documents(f"text={tmp_path / 'nowhere'}", tokenizer)


def answering(answer, monkeypatch) -> list[dict]:
    """Replaces the model by a function from a prompt to a reply; gives the settings that it was asked with."""
    seen = []

    def replies(chat, prompts, **settings):
        seen.append(settings)
        return [answer(prompt) for prompt in prompts]

    monkeypatch.setattr(scores, "generate_replies", replies)
    return seen


def test_a_model_that_knows_everything_scores_everything(chat, monkeypatch):
    persona = load_persona()
    known = {question.text: question.answer for question in held_out_questions()}
    known |= {probe.question: probe.expect[0] for probe in build_probes(persona)}
    end = chat.tokenizer.convert_tokens_to_ids(IM_END)
    seen = answering(lambda prompt: Reply(f"It is {known[prompt]}.", True, 3, ids=(7, end)), monkeypatch)
    found = score_chat(chat, "all", "folder", persona)
    asked = len(build_probes(persona))
    assert found.questions == Rate(200, 200)
    assert found.persona == Rate(asked, asked) and asked > 5
    assert found.stops == Rate(200 + asked, 200 + asked)
    assert sum(rate.asked for rate in found.kinds.values()) == 200
    assert len(found.examples) == len(found.kinds) == 3
    assert seen == [{"max_new_tokens": 128 // 3, "temperature": 0}]


def test_a_model_that_is_silent_scores_nothing(chat, monkeypatch):
    answering(lambda prompt: Reply("", False, 0), monkeypatch)
    found = score_chat(chat, "none", "folder", load_persona())
    assert (found.questions.right, found.persona.right, found.stops.right) == (0, 0, 0)
    assert found.questions.asked == 200


def test_each_kind_of_question_is_counted_apart(chat, monkeypatch):
    asked = [Question("sum", f"{n}?", str(n)) for n in range(10)] + [Question("fact", f"f{n}", "yes") for n in range(6)]
    im_end, end_of_text = chat.tokenizer.convert_tokens_to_ids([IM_END, END_OF_TEXT])
    answering(
        lambda prompt: Reply(
            "3" if prompt.endswith("?") else "yes", True, 1, ids=(7, im_end if prompt == "3?" else end_of_text)
        ),
        monkeypatch,
    )
    found = score_chat(chat, "some", "folder", load_persona(), asked)
    assert found.kinds == {"sum": Rate(1, 10), "fact": Rate(6, 6)}
    assert found.questions == Rate(7, 16)
    assert found.stops.right == 1  # as the gate counts: a document's end closes no turn
    assert found.rows()["held-out questions"] == "43.8 % (7/16)"
    assert found.rows()["- sum"] == "10.0 % (1/10)"


def test_scores_are_read_as_they_were_written(tmp_path):
    column = Scores("a", "folder", Rate(1, 3), {"sum": Rate(0, 1)}, Rate(2, 2), Rate(0, 5), 1.25, 0.5, [("你", "好")])
    empty = Scores("b", "folder")
    write_scores([column, empty], tmp_path / "scores.json")
    assert read_scores(tmp_path / "scores.json") == [column, empty]
    assert column.rows()["bits per byte"] == "0.500" and column.rows()["loss, nats/token"] == "1.250"
    assert "bits per byte" not in empty.rows() and empty.rows()["held-out questions"] == "-"


def test_models_are_compared_on_the_same_text_with_an_untrained_one_before_them(lively, tmp_path):
    save_model(lively.model, lively.tokenizer, tmp_path / "run" / "model")
    (tmp_path / "a.jsonl").write_text('{"text": "Once upon a time there was a small model."}\n' * 3)
    columns, notes = compare.compare(
        [("mine", str(tmp_path / "run"))], untrained=True, text=f"text={tmp_path / 'a.jsonl'}", ask=False, persona=None
    )
    assert [column.name for column in columns] == ["untrained", "mine"]
    text = "\n".join(["Once upon a time there was a small model."] * 3)
    expected = compute_document_loss(lively, text.split("\n"))
    assert columns[1].loss == pytest.approx(expected.per_token, rel=1e-5)
    assert columns[1].bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)
    # Small random weights know nothing: their loss is that of the uniform distribution
    assert columns[0].loss == pytest.approx(math.log(384), abs=0.05)
    figure = gzip_bits_per_byte(text.encode())
    assert notes == [f"held-out text: 3 documents, {len(text)} bytes; gzip -9 needs {figure:.3f} bits per byte"]
