"""Several models side by side: what is asked of which, and the loss on which text."""

import json
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from evaluation_support import assert_losses_close, compute_plain_loss
from support import write

from rorchat.errors import DataError
from rorchat.evaluation import compare
from rorchat.evaluation.behaviour import MEASURES, Behaviour, Value
from rorchat.evaluation.compare import compare_models, compute_document_loss, load_validation_documents
from rorchat.evaluation.loss import gzip_bits_per_byte
from rorchat.evaluation.scores import Rate, Scores, gate_row
from rorchat.mixture.dataset import ValidationRows
from rorchat.model import save_model
from rorchat.persona import load_persona
from rorchat.sources.registry import load_rows
from rorchat.tokenizer import load_tokenizer
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
        [("mine", str(tmp_path / "run"))], untrained=True, text=f"text={tmp_path / 'a.jsonl'}", ask=False
    )
    assert [column.name for column in columns] == ["untrained", "mine"]
    text = "\n".join(["Once upon a time there was a small model."] * 3)
    expected = compute_document_loss(lively, text.split("\n"))
    assert columns[1].loss == pytest.approx(expected.per_token, rel=1e-5)
    assert columns[1].bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)
    # small random weights: the loss of a uniform distribution
    assert columns[0].loss == pytest.approx(math.log(384), abs=0.05)
    assert {"loss, nats/token", "bits per byte"} == columns[1].rows().keys()
    figure = gzip_bits_per_byte(text.encode())
    assert notes == [f"validation text: 3 documents, {len(text)} bytes; gzip -9 needs {figure:.3f} bits per byte"]


def save_run(folder: Path, model, tokenizer, stage: str, *sources: str, **settings) -> Path:
    """A run folder with a model and a record of its data."""
    save_model(model, tokenizer, folder / "model")
    inputs = {"sources": dict.fromkeys(sources, "digest"), "mixture": settings.pop("mixture", {})}
    data = [{"source": source} for source in sources]
    write(folder, "run.json", json.dumps({"stage": stage, "settings": settings, "inputs": inputs, "data": data}))
    return folder


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str, str]]:
    """Replaces the questions: what was asked of which model, about which persona."""
    calls = []

    def score(chat, name, folder, persona):
        calls.append(("tinytown", name, persona.name))
        return Scores(name, folder, Rate(1, 2))

    def measure(chat, name, persona):
        calls.append(("gate", name, persona.name))
        values = {measure: Value(None if measure == "language" else 0.25, 9) for measure in MEASURES}
        return Behaviour(name, 9, 0, values, persona.name)

    monkeypatch.setattr(compare, "score_chat", score)
    monkeypatch.setattr(compare, "measure_behaviour", measure)
    return calls


@pytest.fixture
def models(lively, tmp_path, persona_path) -> dict[str, str]:
    bibo = load_tokenizer_with_persona(lively.tokenizer, persona_path)
    runs = {
        "town": save_run(tmp_path / "town", lively.model, lively.tokenizer, "pretrain", "tinytown=9"),
        "base": save_run(tmp_path / "base", lively.model, lively.tokenizer, "pretrain", "text=a/"),
        "talk": save_run(tmp_path / "talk", lively.model, bibo, "sft", "messages=a.jsonl", persona=str(persona_path)),
    }
    save_model(lively.model, lively.tokenizer, tmp_path / "stranger")
    return {name: str(run) for name, run in runs.items()} | {"stranger": str(tmp_path / "stranger")}


def load_tokenizer_with_persona(tokenizer, persona_path):
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return load_tokenizer(folder, load_persona(persona_path))


def test_tinytown_is_asked_of_models_that_were_trained_on_it(models, asked):
    columns, notes = compare_models(list(models.items()))
    assert asked == [("tinytown", "town", "RorChat"), ("gate", "talk", "Bibo"), ("gate", "stranger", "RorChat")]
    town, base, talk, stranger = notes
    assert town.startswith("town: asked Tinytown's questions (it was trained on tinytown) and the probes of RorChat (")
    left_out = "not asked Tinytown's questions (it was not trained on tinytown; --tinytown asks them)"
    assert base.startswith(f"base: {left_out}, and no others, because it is a base model; no loss, because ")
    assert talk.startswith(f"talk: {left_out}, but the gate's prompts, the probes of Bibo (")
    assert "there is no record of its training" in stranger
    assert columns[0].rows() == {"held-out questions": "50.0 % (1/2)"} and columns[1].rows() == {}
    assert columns[2].rows() == {gate_row(name): "25.0 %" for name in MEASURES if name != "language"}


def test_a_flag_decides_for_all_models_and_a_persona_is_not_asked_of_another(models, asked, persona_path):
    named = list(models.items())[:2]
    _, notes = compare_models(named, tinytown=True, persona=str(persona_path))
    assert asked == [("tinytown", "town", "Bibo"), ("tinytown", "base", "Bibo")]
    assert "base: asked Tinytown's questions (--tinytown was given) and the probes of Bibo (" in notes[1]
    asked.clear()
    _, notes = compare_models(named, tinytown=False)
    assert asked == [] and all("(--no_tinytown was given), and no others" in note for note in notes)
    columns, notes = compare_models([("talk", models["talk"])], persona=None)
    assert "gate: persona" in columns[0].rows()
    columns, notes = compare_models([("stranger", models["stranger"])], persona=str(persona_path))
    assert "gate: persona" not in columns[0].rows() and "gate: stop rate" in columns[0].rows()
    assert "without the probes of Bibo" in notes[0] and "whose system message is not the model's" in notes[0]


def test_the_default_text_is_the_validation_split_of_the_models_own_pretraining(lively, tmp_path, store, asked):
    mixture = {"sources": {"mine": {"spec": f"store={store.folder}"}}}
    run = save_run(tmp_path / "run", lively.model, lively.tokenizer, "pretrain", "text=a/", mixture=mixture)
    (column,), (note,) = compare_models([("mine", str(run))], ask=False)
    rows = [ValidationRows(store, lively.n_positions)[n] for n in range(len(ValidationRows(store, lively.n_positions)))]
    plain = compute_plain_loss(lively, [{key: value.tolist() for key, value in row.items()} for row in rows])
    assert column.loss == pytest.approx(plain.per_token, rel=1e-5)
    assert column.bits_per_byte == pytest.approx(plain.bits_per_byte, rel=1e-5)
    assert column.rows().keys() == {"base validation loss, nats/token", "base validation, bits per byte"}
    assert note == f"mine: loss on {plain.tokens:,} held-out tokens of {store.folder}"
    (column,), (note,) = compare_models([("mine", str(run))], text=f"store={store.folder}", ask=False)
    assert column.rows().keys() == {"loss, nats/token", "bits per byte"}
    shutil.rmtree(store.folder)
    (column,), (note,) = compare_models([("mine", str(run))], ask=False)
    assert (
        column.rows() == {} and "no loss, because no pretraining run with token stores was found: give --text" in note
    )
