"""Several models on the same text."""

import math

import pytest
from evaluation_support import assert_losses_close, compute_plain_loss

from rorchat.errors import DataError
from rorchat.evaluation.compare import compare_models, compute_document_loss, load_validation_documents
from rorchat.evaluation.loss import gzip_bits_per_byte
from rorchat.model import save_model
from rorchat.sources.registry import load_rows
from rorchat.tokens.prepare import prepare


def test_every_token_of_a_long_document_is_predicted_once(lively):
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
    assert_losses_close(loss, compute_plain_loss(lively, rows))


def test_a_token_store_gives_its_validation_documents(tokenizer, tmp_path):
    store = prepare("tinytown=200", tokenizer, tmp_path / "store", validation_share=0.2)
    texts = [row["text"] for row in load_rows("tinytown=200", "document")]
    documents = load_validation_documents(str(store.folder), tokenizer)
    assert len(documents) == store.manifest.total("validation", "documents") > 20
    assert set(documents) <= set(texts)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert load_validation_documents(f"text={path}", tokenizer) == ["one", "two"]
    with pytest.raises(DataError, match="No file or folder"):
        load_validation_documents(f"text={tmp_path / 'nowhere'}", tokenizer)


def test_models_are_compared_on_the_same_text(lively, tmp_path):
    save_model(lively.model, lively.tokenizer, tmp_path / "run" / "model")
    (tmp_path / "a.jsonl").write_text('{"text": "Once upon a time there was a small model."}\n' * 3)
    columns, notes = compare_models(
        [("mine", str(tmp_path / "run"))], untrained=True, text=f"text={tmp_path / 'a.jsonl'}", ask=False, persona=None
    )
    assert [column.name for column in columns] == ["untrained", "mine"]
    text = "\n".join(["Once upon a time there was a small model."] * 3)
    expected = compute_document_loss(lively, text.split("\n"))
    assert columns[1].loss == pytest.approx(expected.per_token, rel=1e-5)
    assert columns[1].bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)
    # small random weights: the loss of a uniform distribution
    assert columns[0].loss == pytest.approx(math.log(384), abs=0.05)
    figure = gzip_bits_per_byte(text.encode())
    assert notes == [f"validation text: 3 documents, {len(text)} bytes; gzip -9 needs {figure:.3f} bits per byte"]
