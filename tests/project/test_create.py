"""`rorchat new`: from data and hours to a project's folder."""

import functools
import itertools
import json
import math
from pathlib import Path

import pytest
from project_support import make_machine, make_survey, write_data
from support import json_lines

from rorchat.device import find_device
from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.model import build_model, flops_per_token, parse_shape, save_model
from rorchat.plan.budget import make_plan
from rorchat.project import create, timing
from rorchat.project.create import create_project, warn_about_long_rows
from rorchat.project.sizing import SHAPES
from rorchat.project.timing import choose_rows, measure_machine, measure_seconds_per_token, request_steps
from rorchat.project.vocabulary import VOCABULARIES

#: The trial tokenizers are the same in most tests.
try_vocabularies_once = functools.cache(create.try_vocabularies)


@pytest.fixture
def known_speed(monkeypatch):
    """A slow machine that need not be measured; the chosen size is half as fast as interpolated."""
    machine = make_machine(0.06)
    monkeypatch.setattr(create, "measure_machine", lambda block_size: make_machine(0.06, block_size=block_size))

    def measure(device, shape, vocabulary, block_size, optimizer="muon"):
        return 2 * machine.seconds_per_token(shape, vocabulary)

    monkeypatch.setattr(create, "measure_seconds_per_token", measure)
    monkeypatch.setattr(create, "try_vocabularies", try_vocabularies_once)


@pytest.fixture
def given(tmp_path):
    return write_data(tmp_path)


def test_a_project_is_planned_for_the_measured_speed(known_speed, given, tmp_path):
    project = create_project(tmp_path / "bot", **given, hours=0.06)
    assert project.schedule.total_seconds == pytest.approx(216, rel=0.1)
    plan = json.loads((tmp_path / "bot" / "plan.json").read_text())
    assert sum(stage["seconds"] for stage in plan["stages"]) == pytest.approx(project.schedule.total_seconds, abs=1)
    assert [source["stats"]["kept"] for source in plan["sources"][:3]] == [400, 60, 50]
    assert [row[0] for row in project.stage_rows()][-1] == "total"
    assert len(project.source_rows()) == len(plan["sources"])


def test_the_notes_say_what_would_make_the_model_better(known_speed, given, tmp_path):
    little = create_project(tmp_path / "one", **given, hours=2.0).notes
    assert any("Little text" in note and "Four times the text" in note for note in little)
    assert any("more passes over this text would make the model worse" in note for note in little)
    assert any("Twice the time" in note for note in create_project(tmp_path / "short", **given, hours=0.05).notes)
    without_chats = create_project(
        tmp_path / "two", documents=given["documents"], conversations=[], preferences=[], hours=0.25
    )
    assert any("tinytown" in note and "none were given" in note for note in without_chats.notes)
    assert any(note.startswith("The model will call itself Two, made by ") for note in without_chats.notes)


def test_more_hours_give_a_larger_model_or_more_tokens(known_speed, given, tmp_path):
    short, long = (create_project(tmp_path / str(hours), **given, hours=hours).schedule.size for hours in (0.05, 5))
    assert long.bits_per_byte < short.bits_per_byte and long.parameters >= short.parameters


def test_rows_are_long_enough_for_the_conversations(known_speed, given, tmp_path):
    assert create_project(tmp_path / "short", **given, hours=0.2).settings.block_size == 256
    long = tmp_path / "long.jsonl"
    messages = [{"role": "user", "content": "a b c " * 200}, {"role": "assistant", "content": "Yes."}]
    long.write_text(json.dumps({"messages": messages}) + "\n")
    given["conversations"] = [f"messages={long}"]
    assert create_project(tmp_path / "long", **given, hours=0.2).settings.block_size == 512


def test_wrong_requests_are_refused_before_anything_is_read(tmp_path, given):
    nothing = {"documents": [], "conversations": [], "preferences": []}
    with pytest.raises(UsageError, match="No data: give --documents"):
        create_project(tmp_path / "bot", **nothing, hours=1)
    for hours in (0.0, -1, math.inf, math.nan):
        with pytest.raises(UsageError, match="--hours is"):
            create_project(tmp_path / "bot", **given, hours=hours)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(UsageError, match="not an empty folder"):
        create_project(tmp_path / "full", **given, hours=1)
    with pytest.raises(DataError, match="persona"):
        create_project(tmp_path / "bot", **given, hours=1, persona=tmp_path / "nobody.yaml")
    assert not (tmp_path / "bot").exists()


def test_a_model_to_start_from_is_described_by_its_files(known_speed, given, tmp_path, tokenizer):
    model = build_model("2x2x32", tokenizer, n_positions=128)
    save_model(model, tokenizer, tmp_path / "base")
    project = create_project(tmp_path / "bot", **given, hours=0.2, base=str(tmp_path / "base"))
    assert project.settings.block_size == 128
    assert project.settings.stages()["midtrain"].values["model"] == str((tmp_path / "base").resolve())
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="llama"):
        create_project(tmp_path / "other", **given, hours=0.2, base=str(tmp_path / "base"))


def test_speeds_between_measured_sizes_are_interpolated():
    machine = make_machine(0.02)
    shape = parse_shape("4x4x128")
    flops = flops_per_token(shape, 1024, machine.block_size)
    assert machine.seconds_per_token(shape, 1024) == pytest.approx(flops / 1e9 * 0.02, rel=1e-6)
    machine.points[-1] = (1e7, machine.points[-1][1])  # the largest measured size is small: proportional beyond it
    large = parse_shape("124m")
    flops = flops_per_token(large, 1024, machine.block_size)
    assert machine.seconds_per_token(large, 1024) == pytest.approx(machine.points[-1][1] * flops / 1e7)


def test_every_size_that_can_be_planned_can_be_measured():
    """The micro-batch of the measurement must divide the rows of a step, or the plan is refused."""
    device, chosen = find_device("cpu"), set()
    for shape, vocabulary, block_size in itertools.product(SHAPES, VOCABULARIES, (256, 512)):
        rows = choose_rows(device, shape, vocabulary, block_size)
        assert make_plan(request_steps(device, shape, vocabulary, block_size, rows)).micro_batch == rows
        chosen.add(rows)
    assert chosen == {1, 2, 4, 8}


@pytest.mark.slow
def test_a_larger_model_is_measured_to_be_slower(monkeypatch):
    monkeypatch.setattr(timing, "PROBED_SIZES", {True: ("2x2x64", "4x4x256"), False: ("4x4x256",)})
    machine = measure_machine(128)
    (small_flops, small), (large_flops, large) = machine.points
    assert small_flops < large_flops and 0 < small < large and machine.startup_seconds > 0.5
    seconds = measure_seconds_per_token(find_device("cpu"), parse_shape("2x2x64"), 2048, 128)
    assert 0.2 < seconds / small < 5


def test_the_package_writes_where_it_was_told(known_speed, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_project(Path("bot"), **given, hours=0.2)
    written = {path.name for path in Path("bot").iterdir()}
    stages = ("tokenizer", "pretrain", "midtrain", "sft", "dpo")
    assert written == {*(f"{stage}.yaml" for stage in stages), "persona.yaml", "plan.json", "run.sh"}


def test_gpt2_is_preferred_on_a_gpu_that_cannot_pretrain_it_in_the_time():
    assert not create.prefers_gpt2(find_device("cpu"), 0.5)
    assert create.prefers_gpt2(find_device("T4"), 2)
    assert not create.prefers_gpt2(find_device("H100"), 24)


def test_the_plan_says_how_data_are_read_and_its_settings_name_the_columns(known_speed, given, tmp_path):
    turns = [{"speaker": "Anna", "text": "Hello"}, {"speaker": "Ben", "text": "Hi!"}]
    (tmp_path / "dialogues.jsonl").write_text(json_lines(*({"id": n, "dialogue": turns} for n in range(30))))
    (tmp_path / "faq.csv").write_text("q,a\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(30)))
    chats = [str(tmp_path / "dialogues.jsonl"), f"messages={tmp_path / 'faq.csv'}:user=q:assistant=a"]
    project = create_project(tmp_path / "bot", **{**given, "conversations": chats}, hours=0.06)
    read = project.describe_reading()
    assert len(read) == 4 and read[1].splitlines() == [
        f"messages={tmp_path / 'dialogues.jsonl'}: 30 of 30 rows kept",
        "  30 rows read as turns from 'dialogue' ('speaker' and 'text'); two speakers: the first is the user",
    ]
    assert f"messages={tmp_path / 'faq.csv'}:user=q:assistant=a" in (tmp_path / "bot" / "sft.yaml").read_text()


@pytest.mark.parametrize(("long_pairs", "share"), [(30, "half"), (8, "a tenth"), (3, None)])
def test_pairs_and_conversations_that_exceed_the_window_are_told(long_pairs, share, given, tmp_path):
    pairs = [
        {"prompt": "Tell me.", "chosen": "No.", "rejected": "word " * (80 if n < long_pairs else 1)} for n in range(50)
    ]
    (tmp_path / "pairs.jsonl").write_text(json_lines(*pairs), encoding="utf-8")
    survey = make_survey({**given, "preferences": [f"preference={tmp_path / 'pairs.jsonl'}"]})
    notes = warn_about_long_rows(survey, 70, 4.0)  # a window of 280 bytes; a long pair has 410
    about_pairs = [note for note in notes if "preferences" in note]
    assert about_pairs == [note for note in notes if "exceed 70 tokens" in note]  # the conversations fit
    if share:
        assert about_pairs[0].startswith(f"More than {share} of the preferences of preference=")
    else:
        assert not about_pairs
    assert [note for note in warn_about_long_rows(survey, 40, 4.0) if "More than half of the conversations" in note]
