"""`--new_phase` appends a changed mixture to a stopped run; its history stays, and kills change nothing."""

import json
import shutil
import signal

import numpy as np
import pytest
from faults.comparison import flip_bit, read_log
from faults.harness import verified_steps, weights_sha256
from support import json_lines

from rorchat.hub import build_model_card
from rorchat.jsonl import read_json_lines
from rorchat.reporting.runs import drop_superseded_lines
from rorchat.reporting.tables import OWN_FILES_IN_PUBLIC
from rorchat.sources.base import OWN_FILES
from rorchat.tokenizer import load_tokenizer
from rorchat.tokens.import_shards import import_shards
from rorchat.training.checkpointing.recovery import Checkpoints

STEPS, STOP = 12, 5  # in total, and before the mixture changes; a step has four rows of 32 tokens
OLD = """\
sources: {town: tinytown=60, old: text=OLD}
phases: [{share: 100%, weights: {town: 1, old: 1}}]
"""
NEW = """\
sources: {town: tinytown=60, self: persona=60}
phases: [{share: 100%, ramp_to: {self: 1}, replay: 20%}, {tokens: 448}]
"""
THIRD = "sources: {town: tinytown=60}\n"
SIGTERM = {"signal": int(signal.SIGTERM), "where": "forward"}


@pytest.fixture(scope="module")
def phases(sandbox):
    """A function `run(out, mixture, ...)` for mixtures given as text, with a token store for this file only."""

    def run(out, text: str, fault: dict | None = None, **flags):
        name = {OLD: "old", NEW: "new", THIRD: "third"}.get(text, "other")
        path = sandbox.folder / f"{name}.yaml"
        path.write_text(text.replace("OLD", str(sandbox.folder / "old.jsonl")))
        defaults = {
            "sources": None,
            "mixture": str(path),
            "token_store": str(sandbox.folder / "phases"),
            "max_steps": STEPS,
        }
        return sandbox.run(out, fault, **defaults | flags)

    return run


@pytest.fixture(scope="module")
def stopped(sandbox, phases):
    """A stopped run of the old mixture. The data and the store that only the old mixture reads are deleted."""
    text = [f"Document {number} says hello to the old mill by the river." for number in range(200)]
    (sandbox.folder / "old.jsonl").write_text(json_lines(*({"text": line} for line in text)))
    out = sandbox.new_folder()
    result = phases(out, OLD, SIGTERM | {"at": STOP - 1})
    assert result.code == 75 and verified_steps(out)[0] == STOP, result.output
    (sandbox.folder / "old.jsonl").unlink()
    shutil.rmtree(sandbox.folder / "phases" / "old")
    return out


@pytest.fixture(scope="module")
def complete(sandbox, phases, stopped):
    """The run with the new mixture appended and no interruption."""
    out = sandbox.new_folder(stopped)
    result = phases(out, NEW, new_phase=True)
    assert result.code == 0, result.output
    return out


def test_another_mixture_is_refused_with_a_table_that_names_the_flag(sandbox, phases, stopped):
    out = sandbox.new_folder(stopped)
    result = phases(out, NEW.replace("ramp_to", "weights"))
    assert result.code == 78 and "Traceback" not in result.output, result.output
    lines = result.output.splitlines()
    assert any(line.startswith("inputs.mixture.sources.self") for line in lines)
    assert "--new_phase" in lines[-1]
    result = phases(out, NEW, new_phase=True, learning_rate=1e-4)
    assert result.code == 78 and "learning_rate default, now 0.0001" in result.output
    assert verified_steps(out)[0] == STOP


def test_a_new_phase_is_reported_logged_and_recorded(sandbox, phases, stopped, complete):
    out = sandbox.new_folder(stopped)
    lines = phases(out, NEW, new_phase=True).output.splitlines()
    assert any(line.startswith("inputs.mixture.sources.self") and line.endswith("new phase") for line in lines)
    assert [" ".join(line.split()) for line in lines if line.startswith("  phase")] == [
        "phase 1: 640 tokens, rows 0 to 19",
        "phase 2, new phase: 448 tokens, rows 20 to 33",
        "phase 3, new phase: 448 tokens, rows 34 to 47",
    ]
    assert weights_sha256(out) == weights_sha256(complete)
    events = [line for line in read_json_lines(out / "metrics.jsonl") if line.get("event") == "new phase"]
    assert [(line["step"], line["tokens"], line["sources"]) for line in events] == [(STOP, 640, ["town", "self"])]
    record = json.loads((out / "run.json").read_text())
    assert [source["source"].partition("=")[0] for source in record["data"]] == ["tinytown", "text", "persona"]
    card = build_model_card(out / "model", "me/model")
    licences = [source["licence"].replace(OWN_FILES, OWN_FILES_IN_PUBLIC) for source in record["data"]]
    names = [source["source"].partition("=")[0] for source in record["data"]]
    assert all(f"| {name} | {licence} |" in card for name, licence in zip(names, licences, strict=True))
    assert [part["until"] for part in record["past"]] == [20]
    assert [phase["rows"] for phase in record["plan"]["phases"]] == [[0, 20], [20, 34], [34, 48]]
    shares = [line["mixture"] for line in read_log(out) if "mixture" in line][-1]
    assert shares["old"] == 0 and shares["self"] > shares["town"] > 0


@pytest.mark.parametrize("fault", [{"kill_at": 1, "during": 6}, {"kill_at": 9, "during": 8}, SIGTERM | {"at": 8}])
def test_a_kill_in_the_new_phase_changes_nothing(sandbox, phases, stopped, complete, fault):
    """Before the first checkpoint of the new phase, and after it, when the flag is no longer needed."""
    out = sandbox.new_folder(stopped)
    assert phases(out, NEW, fault, new_phase=True).code in (-9, 75)
    has_new_checkpoint = verified_steps(out)[0] > STOP
    result = phases(out, NEW, **{} if has_new_checkpoint else {"new_phase": True})
    assert result.code == 0, result.output
    assert weights_sha256(out) == weights_sha256(complete) and read_log(out) == read_log(complete)
    records = drop_superseded_lines(read_json_lines(out / "metrics.jsonl"))
    assert [line["step"] for line in records if line.get("event") == "new phase"] == [STOP]
    assert json.loads((out / "run.json").read_text())["past"] == json.loads((complete / "run.json").read_text())["past"]


def test_a_damaged_checkpoint_of_the_new_phase_needs_the_flag_again(sandbox, phases, stopped, complete):
    out = sandbox.new_folder(stopped)
    assert phases(out, NEW, {"kill_at": 1, "during": 8}, new_phase=True).code == -9
    assert verified_steps(out) == [6, STOP]
    flip_bit(0.5)(out / "checkpoint-6" / "model.safetensors")
    result = phases(out, NEW)
    assert result.code == 78 and "--new_phase" in result.output and verified_steps(out) == [STOP], result.output
    assert phases(out, NEW, new_phase=True).code == 0
    assert weights_sha256(out) == weights_sha256(complete) and read_log(out) == read_log(complete)


def test_a_finished_run_accepts_no_new_phase(sandbox, phases, complete):
    assert phases(complete, NEW, new_phase=True).code == 0
    result = phases(complete, THIRD, new_phase=True)
    assert result.code == 78 and "--new_phase" not in result.output


def test_two_new_phases_in_a_row(sandbox, phases, stopped):
    out, again = sandbox.new_folder(stopped), sandbox.new_folder(stopped)
    for folder, fault in ((out, None), (again, {"kill_at": 3, "during": 10})):
        assert phases(folder, NEW, SIGTERM | {"at": 7}, new_phase=True).code == 75
        assert phases(folder, THIRD, fault, new_phase=True).code == (-9 if fault else 0)
    assert phases(again, THIRD, new_phase=True).code == 0
    assert weights_sha256(out) == weights_sha256(again)
    record = json.loads((out / "run.json").read_text())
    assert [part["until"] for part in record["past"]] == [20, 32]
    assert [phase["rows"] for phase in record["plan"]["phases"]] == [[0, 20], [20, 32], [32, 48]]
    assert [source["source"].partition("=")[0] for source in record["data"]] == ["tinytown", "text", "persona"]
    town = record["plan"]["sources"][0]
    assert town["epochs"] * Checkpoints(out).committed()[0].metadata["windows"]["town"] == town["tokens"] / 32


def test_a_source_name_must_keep_its_data(sandbox, phases, stopped):
    out = sandbox.new_folder(stopped)
    for other in (
        NEW.replace("tinytown=60", "tinytown=61"),
        NEW.replace("town: tinytown=60", "town: {from: tinytown=60, filters: {min_characters: 9}}"),
    ):
        result = phases(out, other, new_phase=True)
        assert result.code == 78 and "Source 'town' was tinytown=60" in result.output, result.output
    named = NEW.replace("town: tinytown=60", "village: tinytown=61")
    named = named.replace(" replay: 20%", "").replace("ramp_to", "weights")
    assert phases(sandbox.new_folder(stopped), named, new_phase=True).code == 0
    capped = NEW.replace("tinytown=60", "{from: tinytown=60, max_epochs: 50}")
    assert phases(out, capped, new_phase=True).code == 0


def test_a_new_phase_needs_a_checkpoint_and_remaining_tokens(sandbox, phases, stopped, complete):
    result = phases(sandbox.new_folder(), NEW.replace("ramp_to", "weights"), new_phase=True)
    assert result.code == 78 and "has no checkpoint" in result.output
    result = phases(sandbox.new_folder(), NEW)
    assert result.code == 2 and "phase 1: ramp_to" in result.output
    out = sandbox.new_folder(stopped)
    result = phases(out, NEW, SIGTERM | {"at": STEPS - 1}, new_phase=True)
    assert result.code == 75, result.output
    result = phases(out, THIRD, new_phase=True)
    assert result.code == 78 and "no tokens are left" in result.output
    result = phases(out, NEW)
    assert result.code == 0 and weights_sha256(out) == weights_sha256(complete), result.output


def test_a_replaced_store_is_refused_and_a_moved_one_accepted(sandbox):
    tokenizer = load_tokenizer(str(sandbox.tokenizer))
    for name, word in (("a", "river"), ("b", "ocean")):
        folder = sandbox.folder / f"shards-{name}"
        folder.mkdir()
        ids = tokenizer(f"<|endoftext|>{word} {word} {word} {word} {word}")["input_ids"][:12]
        for split in ("train", "val"):
            np.save(folder / f"{split}.npy", np.array(ids * 90, dtype=np.uint16))
        import_shards(folder, tokenizer, sandbox.folder / name)
    place = sandbox.folder / "place"
    shutil.copytree(sandbox.folder / "a", place)
    out, flags = sandbox.new_folder(), {"sources": [f"store={place}"]}
    assert sandbox.run(out, SIGTERM | {"at": 3}, **flags).code == 75
    shutil.rmtree(place)
    shutil.copytree(sandbox.folder / "b", place)
    result = sandbox.run(out, **flags)
    assert result.code == 78 and "inputs.sources.store " in result.output, result.output
    result = sandbox.run(out, new_phase=True, **flags)
    assert result.code == 78 and f"Source 'store' was store={place}" in result.output, result.output
    result = sandbox.run(out, sources=[f"store={sandbox.folder / 'a'}"])
    assert result.code == 0, result.output
