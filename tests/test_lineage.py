"""The runs behind a model: their sources and their persona."""

import json
from pathlib import Path

import pytest
from support import write

from rorchat.errors import DataError
from rorchat.files import file_sha256
from rorchat.lineage import find_persona, fingerprint_model, list_trained_sources

BIBO = "name: Bibo\nmaker: Tom\nfacts: {}\nunknowns: {}\n"


def write_run(folder: Path, start: Path | None = None, data: tuple[str, ...] = (), **settings) -> Path:
    """A run folder with a model; `start` is the run that it started from."""
    write(folder / "model", "model.safetensors", f"the weights of {folder}")
    write(folder / "model", "config.json", "{}")
    inputs = {"sources": dict.fromkeys(settings.get("sources", ()), "digest")}
    if start:
        settings["model"] = str(start)
        inputs["start"] = fingerprint_model(str(start / "model"))
    if "persona" in settings:
        inputs["persona"] = file_sha256(Path(settings["persona"]))
    record = {"stage": "sft", "settings": settings, "inputs": inputs}
    record |= {"data": [{"source": source} for source in data]} if data else {}
    write(folder, "run.json", json.dumps(record))
    return folder


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model-00002-of-00003.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"],
)
def test_weights_of_every_form_are_part_of_a_models_fingerprint(name, tmp_path):
    write(tmp_path, "config.json", "{}")
    write(tmp_path, name, "weights")
    before = fingerprint_model(str(tmp_path))
    assert fingerprint_model(str(tmp_path)) == before
    write(tmp_path, name, "weights that were trained anew")
    assert fingerprint_model(str(tmp_path)) != before


def test_the_fingerprint_of_a_plain_adapter_covers_its_base(tmp_path):
    write(tmp_path / "base", "model.safetensors", "weights")
    adapter = tmp_path / "adapter"
    write(adapter, "adapter_model.safetensors", "adapter")
    write(adapter, "adapter_config.json", json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    before = fingerprint_model(str(adapter))
    write(tmp_path / "base", "model.safetensors", "weights that were trained anew")
    assert fingerprint_model(str(adapter)) != before
    write(adapter, "base.json", "{}")  # rorchat's record of the base, which is compared when the adapter is read
    assert "base" not in fingerprint_model(str(adapter))


@pytest.fixture
def persona_file(tmp_path) -> str:
    return str(write(tmp_path, "bibo.yaml", BIBO))


def test_sources_are_those_of_all_runs_whether_finished_or_not(tmp_path):
    base = write_run(tmp_path / "pretrain", data=("tinytown=30", "text=books/"))  # a store of tinytown
    chat = write_run(tmp_path / "sft", base, sources=["chat:alpaca=a.json", "persona=5"])  # without data: unfinished
    assert list_trained_sources(str(base)) == {"tinytown", "text"}
    assert list_trained_sources(str(chat)) == {"tinytown", "text", "alpaca", "persona"}
    assert list_trained_sources(str(chat / "model")) == list_trained_sources(str(chat))
    write(base / "model", "model.safetensors", "other weights")  # no longer what the later run started from
    assert list_trained_sources(str(chat)) == {"alpaca", "persona"}
    assert list_trained_sources("gpt2") == set()


def test_the_persona_is_that_of_the_nearest_run_that_names_one(tmp_path, persona_file):
    base = write_run(tmp_path / "pretrain")
    sft = write_run(tmp_path / "sft", base, persona=persona_file)
    dpo = write_run(tmp_path / "dpo", sft)
    for model in (sft, sft / "model", dpo):
        found = find_persona(str(model))
        assert (found.persona.name, found.origin) == ("Bibo", f"{persona_file}, from {sft / 'run.json'}")
    assert find_persona(str(base)).persona.name == "RorChat"
    assert "no run of the model names" in find_persona(str(base)).origin


def test_a_relative_persona_is_found_from_another_folder(tmp_path, monkeypatch):
    """As in a project, whose commands ran in its own folder."""
    project = tmp_path / "bot"
    (project / "runs").mkdir(parents=True)
    write(project, "persona.yaml", BIBO)
    monkeypatch.chdir(project)
    write_run(project / "runs" / "sft", persona="persona.yaml")
    monkeypatch.chdir(tmp_path)
    found = find_persona("bot/runs/sft")
    assert found.persona.name == "Bibo" and found.origin == f"{project / 'persona.yaml'}, from bot/runs/sft/run.json"


def test_a_given_persona_takes_precedence(tmp_path, persona_file):
    other = str(write(tmp_path, "momo.yaml", BIBO.replace("Bibo", "Momo")))
    sft = write_run(tmp_path / "sft", persona=persona_file)
    found = find_persona(str(sft), other)
    assert (found.persona.name, found.origin) == ("Momo", f"{other}, as given")


def test_a_changed_persona_file_is_mentioned_and_a_missing_one_is_an_error(tmp_path, persona_file):
    sft = write_run(tmp_path / "sft", persona=persona_file)
    Path(persona_file).write_text(BIBO + "# changed\n", encoding="utf-8")
    assert find_persona(str(sft)).origin.endswith("run.json, which has changed since then")
    Path(persona_file).unlink()
    with pytest.raises(DataError, match="there is no such file here: give it with --persona") as failure:
        find_persona(str(sft))
    assert persona_file in str(failure.value)
