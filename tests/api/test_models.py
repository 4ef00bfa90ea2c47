"""The functions about finished models: talk to them, score, judge, report and publish them."""

import json
import os
import shutil

import preloaded
import pytest
import yaml

import rorchat
from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.inference.engine import continue_texts, generate_replies
from rorchat.model import save_model


@pytest.fixture(scope="module")
def folder(lively, tmp_path_factory):
    """The model folder of a chat model with random weights."""
    path = tmp_path_factory.mktemp("model") / "lively"
    save_model(lively.model, lively.tokenizer, path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return rorchat.load(folder, device="cpu")


def test_a_loaded_model_replies_and_continues(model, lively):
    conversation = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Who are you?"},
    ]
    for prompt in ("Hello", conversation):
        (expected,) = generate_replies(lively, [prompt], max_new_tokens=9, temperature=0)
        assert model.chat(prompt, max_new_tokens=9, temperature=0) == expected.text != ""
    assert model.complete("Once upon", max_new_tokens=9) == continue_texts(lively, ["Once upon"], 9)[0] != ""
    assert model.chat("Hello") is not None and len(model.complete("Once")) > 0  # with the default lengths
    assert model.tokenizer.chat_template and model.model.config.n_layer == 2
    assert repr(model) == f"ChatModel({model.model.num_parameters():,} parameters, 128 positions, on cpu)"


def test_wrong_sampling_settings_and_folders_are_refused(model, tmp_path):
    for settings, message in (({"temperature": -1}, "temperature is -1"), ({"top_p": 2}, "top_p is 2")):
        with pytest.raises(UsageError, match=message):
            model.chat("Hello", **settings)
        with pytest.raises(UsageError, match=message):
            model.complete("Hello", **settings)
    with pytest.raises(DataError, match="No model folder"):
        rorchat.load(tmp_path / "none")


def test_evaluate_returns_the_table_of_the_command(folder, tmp_path):
    (tmp_path / "text.txt").write_text("The model lived in a house by the river.\n")
    text = f"text={tmp_path / 'text.txt'}"
    result = rorchat.evaluate({"mine": folder}, untrained=True, text=text, chat=False, out=tmp_path / "scores.json")
    assert [score.name for score in result.scores] == ["untrained", "mine"]
    assert result.scores[1].loss > result.scores[0].loss  # large random weights
    assert "bits per byte" in str(result) and "gzip" in str(result) and result._repr_markdown_() == str(result)
    assert [score["name"] for score in json.loads((tmp_path / "scores.json").read_text())] == ["untrained", "mine"]
    assert rorchat.evaluate(folder, chat=False).scores[0].name == "lively"
    with pytest.raises(UsageError, match="No models"):
        rorchat.evaluate([])
    with pytest.raises(UsageError, match="does not exist"):
        rorchat.evaluate(folder, out=tmp_path / "none" / "scores.json")


def test_gate_returns_a_verdict_and_does_not_raise_if_the_model_fails(folder, tmp_path):
    verdict = rorchat.gate(folder, thresholds=write_thresholds(tmp_path), out=tmp_path / "behaviour.json")
    assert verdict.failures() == ["stop_rate"]
    assert json.loads((tmp_path / "behaviour.json").read_text())["thresholds"] == {"stop_rate": 1.0}


def write_thresholds(folder):
    path = folder / "thresholds.yaml"
    path.write_text(yaml.safe_dump({"stop_rate": {"min": 1.0}}))
    return path


def test_gate_refuses_another_file_before_it_asks(folder, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        rorchat.gate(folder, out=tmp_path / "none" / "behaviour.json")
    with pytest.raises(DataError):
        rorchat.gate(folder, thresholds=tmp_path / "none.yaml")


def test_report_returns_the_paths_of_its_files(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    record = {"stage": "pretrain", "rorchat": "0", "versions": {}, "device": "cpu", "parameters": 1, "metrics": {}}
    (run / "run.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 1, "loss": 2.0}) + "\n")
    paths = rorchat.report(tmp_path)
    assert paths == (tmp_path / "report.md", tmp_path / "curves.png")
    assert paths.report.read_text().startswith(f"# {tmp_path.name}") and paths.curves.stat().st_size > 1000
    with pytest.raises(DataError, match="contains no run"):
        rorchat.report(tmp_path / "none")


@pytest.mark.slow
def test_a_dry_run_of_push_verifies_and_shows_the_card_without_a_network(folder, tmp_path, monkeypatch):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    done = rorchat.push(folder, "you/your-model", dry_run=True)
    assert done.startswith(f"verified  {folder}: ") and "nothing was uploaded" in done
    assert "# your-model" in done and "There is no record of its training." in done
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "chat_template.jinja").unlink()
    monkeypatch.setattr("sys.executable", preloaded.client("python"))
    with pytest.raises((DataError, MismatchError)):
        rorchat.push(broken, "you/your-model", dry_run=True)
    with pytest.raises(UsageError, match="not a valid name"):
        rorchat.push(folder, "no name", dry_run=True)
