"""A changed mixture is appended to a run that stopped: the past stays, and a kill in between changes nothing."""

import json
import shutil
import signal

import numpy as np
import pytest
from faults.comparison import flipped, log_of
from faults.harness import verified_steps, weights

from rorchat.hub import build_model_card
from rorchat.jsonl import read_json_lines
from rorchat.report import drop_superseded_lines
from rorchat.tokenizer import load_tokenizer
from rorchat.tokens.import_shards import import_shards
from rorchat.training.checkpointing.checkpoint import Checkpoints

STEPS, STOP = 12, 5  # steps in all and before the mixture changes; a step has four rows of 32 tokens
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
def phases(bench):
    """`run(out, MIXTURE, ...)` for mixtures in files of one name each, with a token store of their own."""

    def run(out, text: str, fault: dict | None = None, **flags):
        name = {OLD: "old", NEW: "new", THIRD: "third"}.get(text, "other")
        path = bench.folder / f"{name}.yaml"
        path.write_text(text.replace("OLD", str(bench.folder / "old.jsonl")))
        given = {"sources": None, "mixture": str(path), "token_store": str(bench.folder / "phases"), "max_steps": STEPS}
        return bench.run(out, fault, **given | flags)

    return run


@pytest.fixture(scope="module")
def stopped(bench, phases):
    """A run of the old mixture that was stopped; then the data that only it has are deleted."""
    text = [f"Document {number} says hello to the old mill by the river." for number in range(200)]
    (bench.folder / "old.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in text))
    out = bench.fresh()
    done = phases(out, OLD, SIGTERM | {"at": STOP - 1})
    assert done.code == 75 and verified_steps(out)[0] == STOP, done.said
    (bench.folder / "old.jsonl").unlink()
    shutil.rmtree(bench.folder / "phases" / "old")
    return out


@pytest.fixture(scope="module")
def whole(bench, phases, stopped):
    """The run with the new mixture appended, and nothing that went wrong."""
    out = bench.fresh(stopped)
    done = phases(out, NEW, new_phase=True)
    assert done.code == 0, done.said
    return out


def test_another_mixture_is_refused_with_a_table_and_the_flag_is_named(bench, phases, stopped):
    out = bench.fresh(stopped)
    done = phases(out, NEW.replace("ramp_to", "weights"))
    assert done.code == 78 and "Traceback" not in done.said, done.said
    lines = done.said.splitlines()
    assert any(line.startswith("inputs.mixture.sources.self") and "another run" in line for line in lines)
    assert "Give --new_phase to go on with another mixture" in lines[-1] and "\n" not in lines[-1]
    done = phases(out, NEW, new_phase=True, learning_rate=1e-4)
    assert done.code == 78 and "learning_rate default, now 0.0001. Choose another place" in done.said
    assert verified_steps(out)[0] == STOP


def test_with_the_flag_it_goes_on_and_all_of_it_is_told(bench, phases, stopped, whole):
    out = bench.fresh(stopped)
    said = phases(out, NEW, new_phase=True).said
    assert any(
        line.startswith("inputs.mixture.sources.self") and line.endswith("new phase") for line in said.splitlines()
    )
    told = [" ".join(line.split()) for line in said.splitlines() if line.startswith("  phase")]
    assert told == [
        "phase 1: 640 tokens, rows 0 to 19",
        "phase 2, new phase: 448 tokens, rows 20 to 33",
        "phase 3, new phase: 448 tokens, rows 34 to 47",
    ]
    assert weights(out) == weights(whole)
    events = [line for line in read_json_lines(out / "metrics.jsonl") if line.get("event") == "new phase"]
    assert [(line["step"], line["tokens"], line["sources"]) for line in events] == [(STOP, 640, ["town", "self"])]
    record = json.loads((out / "run.json").read_text())
    assert [source["source"].partition("=")[0] for source in record["data"]] == ["tinytown", "text", "persona"]
    card = build_model_card(out / "model", "me/model")
    assert all(f"| {source['source'].partition('=')[0]} | {source['licence']} |" in card for source in record["data"])
    assert [part["until"] for part in record["past"]] == [20]
    assert [phase["rows"] for phase in record["plan"]["phases"]] == [[0, 20], [20, 34], [34, 48]]
    shares = [line["mixture"] for line in log_of(out) if "mixture" in line][-1]
    assert shares["old"] == 0 and shares["self"] > shares["town"] > 0


@pytest.mark.parametrize("fault", [{"kill_at": 1, "during": 6}, {"kill_at": 9, "during": 8}, SIGTERM | {"at": 8}])
def test_killed_and_given_again_it_ends_the_same(bench, phases, stopped, whole, fault):
    """Before the first checkpoint of the new phase, and behind it, where the flag may be left out."""
    out = bench.fresh(stopped)
    assert phases(out, NEW, fault, new_phase=True).code in (-9, 75)
    behind = verified_steps(out)[0] > STOP
    done = phases(out, NEW, **{} if behind else {"new_phase": True})
    assert done.code == 0, done.said
    assert weights(out) == weights(whole) and log_of(out) == log_of(whole)
    records = drop_superseded_lines(read_json_lines(out / "metrics.jsonl"))
    assert [each["step"] for each in records if each.get("event") == "new phase"] == [STOP]
    assert json.loads((out / "run.json").read_text())["past"] == json.loads((whole / "run.json").read_text())["past"]


def test_when_the_only_checkpoint_behind_the_seam_is_damaged_the_flag_appends_again(bench, phases, stopped, whole):
    out = bench.fresh(stopped)
    assert phases(out, NEW, {"kill_at": 1, "during": 8}, new_phase=True).code == -9
    assert verified_steps(out) == [6, STOP]
    flipped(0.5)(out / "checkpoint-6" / "model.safetensors")
    done = phases(out, NEW)
    assert done.code == 78 and "Give --new_phase" in done.said and verified_steps(out) == [STOP], done.said
    assert phases(out, NEW, new_phase=True).code == 0
    assert weights(out) == weights(whole) and log_of(out) == log_of(whole)


def test_a_finished_run_with_the_flag_is_finished_and_takes_no_other_mixture(bench, phases, whole):
    assert phases(whole, NEW, new_phase=True).code == 0
    done = phases(whole, THIRD, new_phase=True)
    assert done.code == 78 and "holds another run" in done.said and "--new_phase" not in done.said


def test_several_in_a_row(bench, phases, stopped):
    out, again = bench.fresh(stopped), bench.fresh(stopped)
    for folder, fault in ((out, None), (again, {"kill_at": 3, "during": 10})):
        assert phases(folder, NEW, SIGTERM | {"at": 7}, new_phase=True).code == 75
        assert phases(folder, THIRD, fault, new_phase=True).code == (-9 if fault else 0)
    assert phases(again, THIRD, new_phase=True).code == 0
    assert weights(out) == weights(again)
    record = json.loads((out / "run.json").read_text())
    assert [part["until"] for part in record["past"]] == [20, 32]
    assert [phase["rows"] for phase in record["plan"]["phases"]] == [[0, 20], [20, 32], [32, 48]]
    assert [source["source"].partition("=")[0] for source in record["data"]] == ["tinytown", "text", "persona"]
    town = record["plan"]["sources"][0]
    assert town["epochs"] * Checkpoints(out).committed()[0].about["identity"]["windows"]["town"] == town["tokens"] / 32


def test_a_source_of_the_same_name_must_be_the_same_data(bench, phases, stopped):
    out = bench.fresh(stopped)
    for other in (
        NEW.replace("tinytown=60", "tinytown=61"),
        NEW.replace("town: tinytown=60", "town: {from: tinytown=60, filters: {min_characters: 9}}"),
    ):
        done = phases(out, other, new_phase=True)
        assert done.code == 78 and "Source 'town' was tinytown=60" in done.said, done.said
        assert "Give it another name" in done.said.splitlines()[-1]
    named = NEW.replace("town: tinytown=60", "village: tinytown=61")
    assert (
        phases(
            bench.fresh(stopped), named.replace(" replay: 20%", "").replace("ramp_to", "weights"), new_phase=True
        ).code
        == 0
    )
    capped = NEW.replace("tinytown=60", "{from: tinytown=60, max_epochs: 50}")
    assert phases(out, capped, new_phase=True).code == 0


def test_there_must_be_a_checkpoint_and_tokens_that_are_left(bench, phases, stopped, whole):
    done = phases(bench.fresh(), NEW.replace("ramp_to", "weights"), new_phase=True)
    assert done.code == 78 and "has no checkpoint, so that there is nothing to go on with" in done.said
    done = phases(bench.fresh(), NEW)
    assert done.code == 2 and "phase 1: ramp_to goes on from the phase before, and this is the first" in done.said
    out = bench.fresh(stopped)
    done = phases(out, NEW, SIGTERM | {"at": STEPS - 1}, new_phase=True)
    assert done.code == 75, done.said
    done = phases(out, THIRD, new_phase=True)
    assert done.code == 78 and "there are no tokens left for a new phase" in done.said
    done = phases(out, NEW)
    assert done.code == 0 and weights(out) == weights(whole), done.said


def test_a_store_that_was_replaced_by_another_of_its_size_is_refused_and_one_that_was_moved_goes_on(bench):
    tokenizer = load_tokenizer(str(bench.tokenizer))
    for name, word in (("a", "river"), ("b", "ocean")):
        folder = bench.folder / f"shards-{name}"
        folder.mkdir()
        ids = tokenizer(f"<|endoftext|>{word} {word} {word} {word} {word}")["input_ids"][:12]
        for split in ("train", "val"):
            np.save(folder / f"{split}.npy", np.array(ids * 90, dtype=np.uint16))
        import_shards(folder, tokenizer, bench.folder / name)
    place = bench.folder / "place"
    shutil.copytree(bench.folder / "a", place)
    out, flags = bench.fresh(), {"sources": [f"store={place}"]}
    assert bench.run(out, SIGTERM | {"at": 3}, **flags).code == 75
    shutil.rmtree(place)
    shutil.copytree(bench.folder / "b", place)
    done = bench.run(out, **flags)
    assert done.code == 78 and "holds another run: inputs.sources.store " in done.said, done.said
    assert done.said.endswith("Choose another place, or delete the folder.\n")
    done = bench.run(out, new_phase=True, **flags)
    assert done.code == 78 and f"Source 'store' was store={place}" in done.said, done.said
    done = bench.run(out, sources=[f"store={bench.folder / 'a'}"])
    assert done.code == 0, done.said
