"""CHAT: who the model is, taught in some wordings and probed in others."""

import re
from dataclasses import replace

import pytest
import yaml

from rorchat.errors import DataError
from rorchat.persona import DEFAULT_PERSONA, conversations, load_persona, probes
from rorchat.sources import CHECKS, load

PERSONA = load_persona()


@pytest.fixture(scope="module")
def trained() -> list[list[dict]]:
    return list(conversations(PERSONA, 20_000))


def test_no_wording_of_a_probe_occurs_in_20000_trained_conversations(trained):
    assert len(trained) == 20_000
    spoken = {turn["content"].lower() for messages in trained for turn in messages}
    everything = "\n".join(spoken)
    asked = [probe.question.lower() for probe in probes(PERSONA)]
    assert len(asked) >= len(PERSONA.topics)
    assert [question for question in asked if question in everything] == []


def test_every_topic_has_a_probe_and_no_probe_is_asked_twice():
    found = probes(PERSONA)
    assert {probe.topic for probe in found} == set(PERSONA.topics)
    assert len({probe.question for probe in found}) == len(found)


def test_each_probe_passes_on_each_reply_of_its_own_topic_in_any_case():
    tried = 0
    for probe in probes(PERSONA):
        for reply in PERSONA.topics[probe.topic]["replies"]:
            tried += 1
            assert probe.passes(reply) and probe.passes(reply.upper()), (probe, reply)
    assert tried >= 2 * len(PERSONA.topics)


def test_a_probe_fails_on_silence_and_on_what_has_nothing_to_do_with_it():
    for probe in probes(PERSONA):
        for reply in ("", "No.", "Yes.", "12 plus 34 is 46.", "I am a baker and I live by the river."):
            assert not probe.passes(reply), (probe, reply)


def test_every_plain_question_is_trained_with_each_of_its_replies(trained):
    pairs = {(a["content"], b["content"]) for turns in trained for a, b in zip(turns, turns[1:], strict=False)}
    expected = {
        (question[0].upper() + question[1:] + "?", reply)
        for topic in PERSONA.topics.values()
        for question in topic["questions"]
        for reply in topic["replies"]
    }
    assert len(expected) >= 8
    assert expected - pairs == set()


def test_conversations_are_a_pure_function_of_the_seed_and_valid_rows():
    first = list(conversations(PERSONA, 200, seed=3))
    assert first == list(conversations(PERSONA, 300, seed=3))[:200]
    assert first != list(conversations(PERSONA, 200, seed=4))
    assert len(first) == 200
    for messages in first:
        CHECKS["conversation"]({"messages": messages})
        assert messages[0]["role"] == "user"  # the chat template adds the system message


def test_the_source_tells_of_the_persona_it_is_given_and_of_the_default_one_without(tmp_path):
    assert [row["messages"] for row in load("persona=50", "conversation")] == list(conversations(PERSONA, 50))
    values = yaml.safe_load(re.sub("RorChat", "Bibo", DEFAULT_PERSONA.read_text()))
    path = tmp_path / "bibo.yaml"
    path.write_text(yaml.safe_dump(values))
    rows = list(load("persona=2000", "conversation", persona=load_persona(path)))
    spoken = " ".join(turn["content"] for row in rows for turn in row["messages"])
    assert (spoken.count("Bibo") > 100, spoken.count("RorChat")) == (True, 0)
    asked = [probe.question for probe in probes(load_persona(path))]
    assert len(asked) > 0 and not [question for question in asked if "RorChat" in question]


def test_the_system_message_is_in_the_chat_template_of_a_tokenizer(tokenizer):
    from rorchat.chatml import system_message

    assert system_message(tokenizer) == PERSONA.system


def test_a_missing_persona_file_is_one_line_that_names_one_to_copy(tmp_path):
    with pytest.raises(DataError, match=f"No persona file {tmp_path / 'no.yaml'}. Copy .*persona.yaml") as failure:
        load_persona(tmp_path / "no.yaml")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "content",
    ["", "just words", "- a\n- list", "name: [unclosed", "name: X\n", "{name: X, surprise: 1}", b"name: \xff", "5"],
)
def test_a_file_that_is_no_persona_is_one_line_that_names_it(content, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=f"{path} is no persona file") as failure:
        load_persona(path)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("part", ["questions", "replies", "expect"])
@pytest.mark.parametrize("value", ["gone", None, [], "a string", [5], [""]])
def test_a_topic_that_lacks_a_part_or_has_an_empty_one_is_named(part, value, tmp_path):
    values = yaml.safe_load(DEFAULT_PERSONA.read_text())
    name = next(iter(values["topics"]))
    values["topics"][name][part] = value
    if value == "gone":
        del values["topics"][name][part]
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(DataError, match=f"{path}: topic '{name}' lacks {part}"):
        load_persona(path)


@pytest.mark.parametrize("value", [None, [], {}, "a string", {"one": None}])
def test_a_persona_without_topics_is_refused(value, tmp_path):
    values = yaml.safe_load(DEFAULT_PERSONA.read_text())
    values["topics"] = value
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(DataError, match=f"^{path}: ") as failure:
        load_persona(path)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("section", ["greetings", "farewells"])
def test_greetings_and_farewells_need_questions_and_replies(section, tmp_path):
    path = tmp_path / "bad.yaml"
    for value in (None, {}, {"questions": ["hello"]}):
        path.write_text(yaml.safe_dump({**yaml.safe_load(DEFAULT_PERSONA.read_text()), section: value}))
        with pytest.raises(DataError, match=f"{path}: {section} lacks .*replies"):
            load_persona(path)


def test_a_greeting_or_a_farewell_may_be_changed_and_is_what_is_said():
    persona = replace(PERSONA, greetings={"questions": ["ahoy"], "replies": ["Ahoy, sailor!"]})
    rows = list(conversations(persona, 300))
    greeted = [turns for turns in rows if turns[0]["content"] in ("Ahoy!", "Ahoy.")]
    assert 60 < len(greeted) < 120  # three in ten
    assert {turns[1]["content"] for turns in greeted} == {"Ahoy, sailor!"}
