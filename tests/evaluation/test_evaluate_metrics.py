"""The `evaluate` metrics work offline, agree with the scores of rorchat and leave no files."""

import doctest
import subprocess
import sys

import evaluate
import preloaded
import pytest
import torch
from evaluation_support import compute_plain_loss
from transformers import Trainer, TrainingArguments

from rorchat.chatml import END_OF_TEXT, IM_END, encode_text
from rorchat.evaluation import evaluate_metrics
from rorchat.evaluation.behaviour import measure_behaviour
from rorchat.evaluation.compare import compute_document_loss
from rorchat.evaluation.evaluate_metrics import BitsPerByte, ExactAnswer, Repetition, StopRate, TemplateLeaks
from rorchat.evaluation.scores import score_chat
from rorchat.inference.engine import generate_replies
from rorchat.mixture.collators import collate_padded
from rorchat.persona import load_persona
from rorchat.sources.tinytown import Question

CLASSES = [getattr(evaluate_metrics, name) for name in evaluate_metrics.__all__]
REPLIES = ["The mill.<|im_end|>", "The mill or the lake.<|im_end|> user", "la " * 20 + "<|im_end|>", "Hi"]
RESULTS = {
    "stop_rate": 0.5,
    "template_leaks": 0.25,
    "repetition": 0.5,
    "seq_rep_4": 0.5 * 16 / 17,
    "exact_answer": 0.75,
}


def combine_reply_metrics():
    return evaluate.combine([StopRate(), TemplateLeaks(), Repetition(), ExactAnswer()])


@pytest.mark.parametrize("metric", CLASSES)
def test_the_example_of_every_metric_is_true(metric):
    info = metric().info
    assert info.description and info.citation and info.features
    tests = doctest.DocTestParser().get_doctest(info.inputs_description, {}, metric.__name__, None, 0)
    assert len(tests.examples) >= 2
    assert doctest.DocTestRunner(verbose=False).run(tests).failed == 0


def test_combined_metrics_are_computed_at_once_and_in_batches():
    references = ["mill", "mill", "la", "lake"]
    assert combine_reply_metrics().compute(predictions=REPLIES, references=references) == pytest.approx(RESULTS)
    combined = combine_reply_metrics()
    for start in (0, 1):
        combined.add_batch(predictions=REPLIES[start::2], references=references[start::2])
    assert combined.compute() == pytest.approx(RESULTS)


def test_an_answer_with_an_alternative_is_wrong():
    question = {"kind": "place", "text": "Where?", "answer": "mill", "alternatives": ["mill", "lake"]}
    result = ExactAnswer().compute(predictions=REPLIES[:2], references=[question] * 2)
    assert result == {"exact_answer": 0.5}


@pytest.mark.parametrize("metric", CLASSES)
def test_evaluate_load_finds_the_metric_of_a_file(metric, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    package = tmp_path / f"modules_of_{metric.__name__}"  # imported modules are cached by name
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr("evaluate.loading.init_dynamic_modules", lambda: str(package))
    monkeypatch.syspath_prepend(tmp_path)
    loaded = evaluate.load(sys.modules[metric.__module__].__file__)
    assert (type(loaded).__name__, loaded.inputs_description) == (metric.__name__, metric().inputs_description)


def test_metrics_write_no_files(tmp_path):
    code = (
        "from rorchat.evaluation.evaluate_metrics import StopRate\n"
        "print(StopRate().compute(predictions=['a<|im_end|>']))\n"
        "assert StopRate(cache_dir='cache').compute(predictions=['a']) == {'stop_rate': 0.0}"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [preloaded.client("python"), "-c", code], env=environment, cwd=home, capture_output=True, text=True
    )
    assert done.stdout == "{'stop_rate': 1.0}\n", done.stderr
    assert list(home.rglob("*")) == []


def test_only_the_metrics_import_evaluate():
    code = (
        "import sys, rorchat.evaluation.compare, rorchat.evaluation.gate, rorchat.reporting.write\n"
        "assert 'evaluate' not in sys.modules\n"
        "import rorchat.evaluation.evaluate_metrics\n"
        "assert 'evaluate' in sys.modules"
    )
    assert subprocess.run([preloaded.client("python"), "-c", code]).returncode == 0


def test_metrics_agree_with_the_gate_and_the_scores(lively, persona_path):
    """On the greedy replies of a model with random weights, some of which stop, leak and repeat."""
    persona = load_persona(persona_path)
    asked = [Question("fact", f"{n}?", "e") for n in range(12)]
    scores = score_chat(lively, "x", "x", persona, asked)
    prompts = [question.text for question in asked]
    replies = generate_replies(lively, prompts, max_new_tokens=lively.n_positions // 3, temperature=0)
    texts = [lively.tokenizer.decode(reply.ids, skip_special_tokens=False) for reply in replies]
    references = [{"kind": q.kind, "text": q.text, "answer": q.answer, "alternatives": []} for q in asked]
    assert ExactAnswer().compute(predictions=texts, references=references)["exact_answer"] == pytest.approx(
        scores.questions.right / scores.questions.asked
    )
    end_of_turn = lively.tokenizer.convert_tokens_to_ids(IM_END)
    by_ids = StopRate(end_of_turn=end_of_turn).compute(predictions=[list(reply.ids) for reply in replies])
    assert by_ids == StopRate().compute(predictions=texts)
    leaks = measure_behaviour(lively, "x", persona).measures["template_leaks"]
    assert leaks.value is not None and 0 < TemplateLeaks().compute(predictions=texts)["template_leaks"] <= 1


def test_bits_per_byte_of_a_trainer_equals_a_plain_computation(lively, tmp_path):
    """A stock Trainer takes the metric in `compute_metrics`."""
    documents = ["Once upon a time there was a small model.", "The mill is by the river.", "Hello"]
    tokenizer = lively.tokenizer
    start = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    rows = [{"input_ids": [start, *ids], "labels": [start, *ids]} for ids in encode_text(tokenizer, documents)]

    def compute_nats(logits, labels):
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return losses.sum(dim=1)  # (B, T, V) -> (B, T-1) -> (B,)

    def compute_metrics(prediction):
        texts = [
            tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in torch.tensor(prediction.label_ids)
        ]
        return BitsPerByte().compute(predictions=prediction.predictions, references=texts)

    trainer = Trainer(
        lively.model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to="none", use_cpu=True),
        data_collator=lambda batch: dict(collate_padded(batch, tokenizer.pad_token_id)),
        eval_dataset=rows,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=compute_nats,
    )
    expected = compute_document_loss(lively, documents).bits_per_byte
    assert trainer.evaluate()["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert compute_plain_loss(lively, rows).bits_per_byte == pytest.approx(expected, rel=1e-5)
