"""The persona is trained in some wordings and probed in others."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from rorchat.errors import DataError
from rorchat.persona import (
    DEFAULT_PERSONA,
    FOREIGN_NAMES,
    NEW_OPENINGS,
    build_new_wording_probes,
    build_probes,
    contains_phrase,
    generate_conversations,
    generate_preferences,
    load_persona,
    probe_system_messages,
)
from rorchat.rows import CHECKS
from rorchat.sources.registry import load_rows

PERSONA = load_persona()


def persona_file(folder: Path, **values: object) -> Path:
    path = folder / "persona.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def error_of(path: Path) -> str:
    """The one-line message of the error that a persona file raises."""
    with pytest.raises(DataError) as failure:
        load_persona(path)
    assert "\n" not in str(failure.value)
    return str(failure.value)


@pytest.fixture(scope="module")
def trained() -> list[list[dict]]:
    return list(generate_conversations(PERSONA, 20_000))


def words(text: str) -> str:
    """A question in lower case without its end mark."""
    return text.lower().rstrip("?!.")


def test_no_probe_wording_is_trained(trained):
    assert len(trained) == 20_000
    trained_texts = {words(turn["content"]) for messages in trained for turn in messages}
    assert len(build_probes(PERSONA)) >= len(PERSONA.topics)
    asked = [probe.question for probe in build_probes(PERSONA) + build_new_wording_probes(PERSONA)]
    assert [question for question in asked if words(question) in trained_texts] == []
    openings = tuple(opening.lower() for opening in NEW_OPENINGS)
    assert all(probe.question.lower().startswith(openings) for probe in build_new_wording_probes(PERSONA))
    assert not [text for text in trained_texts if text.startswith(openings)]


@pytest.mark.parametrize("kind", [build_probes, build_new_wording_probes])
def test_topics_have_equally_many_probes_that_do_not_contain_the_answer(kind):
    probes = kind(PERSONA)
    topics = [probe.topic for probe in probes]
    assert {topics.count(topic) for topic in PERSONA.topics} == {len(probes) // len(PERSONA.topics)}
    assert len({probe.question for probe in probes}) == len(probes)
    assert not [probe for probe in probes if probe.passes(probe.question)]


def test_some_questions_and_probes_are_in_lower_case_without_mark(trained):
    plain = {words("What is your name?"), words("Who made you?")}
    asked = [turn["content"] for turns in trained for turn in turns if words(turn["content"]) in plain]
    assert {"What is your name?", "What is your name", "what is your name?", "what is your name"} <= set(asked)
    assert 0.75 < sum(text.endswith("?") for text in asked) / len(asked) < 0.85
    assert {question for question, _, _ in generate_preferences(PERSONA, 400)} >= {"Who made you?", "who made you?"}
    for kind in (build_probes, build_new_wording_probes):
        informal = [probe.question for probe in kind(PERSONA) if not probe.question.endswith("?")]
        assert len(informal) == len(kind(PERSONA)) // 4 and [text.lower() for text in informal] == informal


@pytest.mark.parametrize(
    ("reply", "phrase", "expected"),
    [
        ("I cannot say that.", "Ann", False),
        ("I also think so.", "Al", False),
        ("Ann's model", "ann", True),
        ("I am C-3PO!", "C 3PO", True),
        ("It is 146.", "46", False),
        ("Я Бобик.", "Боб", False),
        ("我是小明。", "小明", True),
        ("Hi🙂", "🙂", True),
        ("", "🙂", False),
    ],
)
def test_contains_phrase_matches_whole_words(reply, phrase, expected):
    assert contains_phrase(reply, phrase) is expected


def test_probes_pass_on_every_reply_of_their_topic():
    tried = 0
    for probe in build_probes(PERSONA):
        for reply in PERSONA.topics[probe.topic]["replies"]:
            tried += 1
            assert probe.passes(reply) and probe.passes(reply.upper()), (probe, reply)
    assert tried >= 2 * len(PERSONA.topics)


def test_probes_fail_on_unrelated_replies():
    for probe in build_probes(PERSONA):
        for reply in ("", "No.", "Yes.", "12 plus 34 is 46.", "I am a baker and I live by the river."):
            assert not probe.passes(reply), (probe, reply)


def test_every_plain_question_is_trained_with_every_reply(trained):
    pairs = {(a["content"], b["content"]) for turns in trained for a, b in zip(turns, turns[1:], strict=False)}
    expected = {
        (question[0].upper() + question[1:] + "?", reply)
        for topic in PERSONA.topics.values()
        for question in topic["questions"]
        for reply in topic["replies"]
    }
    assert len(expected) >= 8
    assert expected - pairs == set()


def test_conversations_are_valid_rows_that_depend_only_on_the_seed():
    first = list(generate_conversations(PERSONA, 200, seed=3))
    assert first == list(generate_conversations(PERSONA, 300, seed=3))[:200]
    assert first != list(generate_conversations(PERSONA, 200, seed=4))
    assert len(first) == 200
    for messages in first:
        CHECKS["conversation"]({"messages": messages})


def test_foreign_system_messages_do_not_change_the_replies(trained):
    plain = [turns for turns in trained if turns[0]["role"] == "user"]  # the chat template adds the persona's
    foreign = [turns for turns in trained if turns[0]["role"] == "system"]
    assert 0.29 < len(foreign) / len(trained) < 0.31

    def replies(conversations: list) -> set[str]:
        return {turn["content"] for turns in conversations for turn in turns if turn["role"] == "assistant"}

    assert replies(foreign) == replies(plain)
    systems = {turns[0]["content"] for turns in foreign}
    assert PERSONA.system not in systems and "" in systems and not [text for text in systems if "{" in text]
    assert {other for other in FOREIGN_NAMES if any(other in text for text in systems)} == set(FOREIGN_NAMES)


def test_probe_system_messages_are_never_trained(trained):
    probed = probe_system_messages(PERSONA)
    systems = {turns[0]["content"] for turns in trained if turns[0]["role"] == "system"}
    assert len(probed) == 6 and not systems & {text for text, _ in probed}
    named = [(text, other) for text, other in probed if other]
    assert len(named) == 3 and all(other in text and "{" not in text for text, other in named)
    assert not [other for _, other in named if any(other in text for text in systems)]


def test_foreign_names_differ_from_those_of_the_persona():
    persona = replace(PERSONA, name="Nova", system="You are Nova.")
    assert "Nova" not in {other for _, other in probe_system_messages(persona)}
    persona = replace(PERSONA, name="Nova AI", maker="Zara Orlov", system="You are Nova AI.")
    assert {other for _, other in probe_system_messages(persona)} == {"", "Orion"}
    assert len(probe_system_messages(replace(persona, maker="Zara Orion"))) == 6
    persona = replace(PERSONA, name="Max", maker="Ada", system="You are Max.")
    systems = [turns[0]["content"] for turns in generate_conversations(persona, 2000) if turns[0]["role"] == "system"]
    assert not [text for text in systems if ("Max" in text or "Ada" in text) and "Labs" in text]


def test_name_and_maker_are_a_complete_persona_file(tmp_path):
    persona = load_persona(persona_file(tmp_path, name="Bibo", maker="Ann"))
    assert persona.system == "You are Bibo, a small and friendly chat model made by Ann."
    assert list(persona.topics) == list(PERSONA.topics)
    dumped = json.dumps(asdict(persona))
    assert "Bibo" in dumped and "Ann" in dumped and not re.search("RorChat|Rory|[{](name|maker|manner)[}]", dumped)
    assert {probe.topic for probe in build_probes(persona)} == set(persona.topics)
    assert len({str(turns) for turns in generate_conversations(persona, 500)}) > 400


def test_manner_facts_and_unknowns_are_trained(tmp_path):
    reef = {"questions": ["where do you live"], "replies": ["{name} lives in a reef."], "expect": ["reef"]}
    path = persona_file(
        tmp_path,
        name="Uma",
        maker="Ann",
        manner="open and brief",
        facts={"home": reef},
        unknowns={"price": {"questions": ["how much do you cost"]}},
    )
    persona = load_persona(path)
    assert persona.system == "You are Uma, an open and brief chat model made by Ann."
    assert list(persona.topics) == ["name", "maker", "home", "price"]  # name and maker are always present
    replies = {
        turn["content"]
        for turns in generate_conversations(persona, 500)
        for turn in turns
        if turn["role"] == "assistant"
    }
    assert {
        "Uma lives in a reef.",
        "I am sorry, I do not know.",
        "I am Uma! I am a small chat model made by Ann.",
    } <= replies
    home = next(probe for probe in build_probes(persona) if probe.topic == "home")
    price = next(probe for probe in build_probes(persona) if probe.topic == "price")
    assert home.passes("In the reef.") and price.passes("That I do not know.") and not price.passes("Ten dollars.")


def test_a_topic_of_one_question_has_a_probe(tmp_path):
    facts = {
        f"fact {n}": {"questions": [f"what is fact {n}"], "replies": ["It is so."], "expect": ["so"]} for n in range(50)
    }
    persona = load_persona(persona_file(tmp_path, name="Bibo", maker="Ann", facts=facts))
    assert {probe.topic for probe in build_probes(persona)} == set(persona.topics) and len(persona.topics) > 50


def test_a_file_may_redefine_its_name_topic(tmp_path):
    name = {"questions": ["who are you"], "replies": ["Bibo it is."], "expect": ["{name}"]}
    persona = load_persona(
        persona_file(tmp_path, name="Bibo", maker="Ann", system="", facts={"name": name}, unknowns={})
    )
    assert (persona.system, list(persona.topics)) == ("", ["name", "maker"])
    assert persona.topics["name"]["replies"] == ["Bibo it is."]


def test_the_source_uses_the_given_persona_or_the_default(tmp_path):
    assert [row["messages"] for row in load_rows("persona=50", "conversation")] == list(
        generate_conversations(PERSONA, 50)
    )
    values = yaml.safe_load(re.sub("RorChat", "Bibo", DEFAULT_PERSONA.read_text()))
    path = tmp_path / "bibo.yaml"
    path.write_text(yaml.safe_dump(values))
    rows = list(load_rows("persona=2000", "conversation", persona=load_persona(path)))
    trained_text = " ".join(turn["content"] for row in rows for turn in row["messages"])
    assert (trained_text.count("Bibo") > 100, trained_text.count("RorChat")) == (True, 0)
    asked = [probe.question for probe in build_probes(load_persona(path))]
    assert len(asked) > 0 and not [question for question in asked if "RorChat" in question]


def test_the_chat_template_contains_the_system_message(tokenizer):
    from rorchat.chatml import system_message

    assert system_message(tokenizer) == PERSONA.system


def test_questions_are_normalized(tmp_path):
    asked = [
        "Where do you live?",
        "where do you live",
        "I am lost.",
        "Bibo, where are you?",
        "AI or not!",
        "¿Dónde vives?",
    ]
    home = {"questions": asked, "replies": ["In a reef."], "expect": ["reef"]}
    persona = load_persona(persona_file(tmp_path, name="Bibo", maker="Ann", facts={"home": home}, unknowns={}))
    kept = ["where do you live", "I am lost", "Bibo, where are you", "AI or not", "¿Dónde vives"]
    assert persona.topics["home"]["questions"] == kept
    trained_texts = {turn["content"] for turns in generate_conversations(persona, 500) for turn in turns}
    assert "Where do you live?" in trained_texts and not [
        text for text in trained_texts if "??" in text or ", Where" in text
    ]


def test_a_missing_persona_file_names_an_example(tmp_path):
    path = tmp_path / "no.yaml"
    assert error_of(path) == (
        f"Cannot read the persona file {path}: No such file or directory. Copy {DEFAULT_PERSONA} and change it."
    )


def test_topics_of_the_file_replace_default_topics(tmp_path):
    job = {"questions": ["what is the job of {maker}"], "replies": ["{maker} is a doctor."], "expect": ["doctor"]}
    unknowns = {"size": {"questions": ["how tall are you"]}}
    persona = load_persona(persona_file(tmp_path, name="Bibo", maker="Ann", facts={"about_maker": job}))
    assert list(persona.topics) == ["name", "maker", "about_maker", "today"]
    assert persona.topics["about_maker"]["replies"] == ["Ann is a doctor."]
    persona = load_persona(persona_file(tmp_path, name="Bibo", maker="Ann", unknowns=unknowns))
    assert set(persona.topics) == set(PERSONA.topics) - {"about_maker", "today"}
    assert persona.topics["size"]["expect"] == ["do not know"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", " is not a persona file: it must contain `key: value` lines, but contains nothing. Copy "),
        ("- a\n- list", " is not a persona file: it must contain `key: value` lines, but contains a list. Copy "),
        ("just words", " is not a persona file: it must contain `key: value` lines, but contains a str. Copy "),
        ("name: a\nmaker: [unclosed", ":2 is not YAML: while parsing a flow sequence, expected ',' or ']', but got "),
        ("name: \x00", " is not YAML: unacceptable character "),
        (
            "name: a\nmanner: 2024-13-45",
            ":2: '2024-13-45' is not a valid value (month must be in 1..12): put it in quotes.",
        ),
        ("name: a\nmaker: b\nname: c", ":3: duplicate key 'name': remove one."),
        ("facts: {home: {expect: [a], expect: [b]}}", ":1: duplicate key 'expect': remove one."),
        ("name: !!timestamp x", ":1: 'x' is not a valid value"),
        ("name: !!map x", ":1: expected a mapping node, but found scalar."),
    ],
)
def test_an_invalid_file_raises_one_line_with_its_place(content, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert error_of(path).startswith(f"{path}{message}")


def test_yaml_anchors_can_be_merged(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text(
        "name: Bibo\nmaker: Ann\nunknowns:\n  a: &a {questions: [how old is a tree], expect: [know]}\n"
        "  b: {<<: *a, questions: [how tall is a tree]}\n  c: {<<: *a, <<: *a, questions: [how thick is a tree]}\n"
    )
    assert [load_persona(path).topics[topic]["expect"] for topic in "abc"] == [["know"]] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"maker": "Ann"}, "'name' is missing; it must be text, as in `name: RorChat`"),
        ({"name": "Bibo"}, "'maker' is missing; it must be text, as in `maker: Rory`"),
        ({"name": "", "maker": "Ann"}, "'name' is ''; it must be text"),
        ({"name": "  ", "maker": "Ann"}, "'name' is '  '; it must be text"),
        ({"name": True, "maker": "Ann"}, "'name' is True; it must be text"),
        ({"name": "Bibo", "maker": 5}, "'maker' is 5; it must be text"),
        ({"manner": ["kind"]}, "'manner' is ['kind']; it must be text"),
        ({"system": None}, "'system' is missing; it must be text"),
        ({"fact": {}}, "unknown key 'fact'. Did you mean 'facts'? Allowed are name, maker, manner, "),
        ({3: 4}, "unknown key 3. Allowed are name, "),
        ({"facts": None}, "'facts' is None, expected topics with their questions"),
        ({"unknowns": ["what time is it"]}, "'unknowns' is ['what time is it'], expected topics"),
        ({"facts": {"name": None}}, "'name' is None, expected its questions and replies"),
        ({"unknowns": {"name": {"questions": ["x"]}, "maker": "y"}}, "'maker' is 'y', expected its questions"),
        ({"facts": {"x": {}}, "unknowns": {"x": {}}}, "the topic 'x' is in both facts and unknowns: remove one"),
        (
            {"unknowns": {"x": {"question": ["x"]}}},
            "'x' has 'question'. Did you mean 'questions'? Allowed are questions",
        ),
        ({"unknowns": {"x": {}}}, "topic 'x' lacks questions: give a list of texts"),
        (
            {"system": "You are {nmae}."},
            "'{nmae}' is not a placeholder. Did you mean 'name'? Allowed are {name}, {maker}",
        ),
        (
            {"unknowns": {"x": {"questions": ["x"], "replies": ["No idea."]}}},
            "topic 'x' expects one of 'do not know', but its reply 'No idea.' contains none of them",
        ),
        (
            {"unknowns": {"x": {"questions": ["Who made you?"]}}},
            "the question 'who made you' is in both 'maker' and 'x', so replies would contradict each other",
        ),
        (
            {"unknowns": {"x": {"questions": ["Hello!"]}}},
            "the question 'hello' is in both 'x' and 'greetings', so",
        ),
        ({"unknowns": {"x": {"questions": ["?"]}}}, "'x' has a question without words: remove it"),
        (
            {"unknowns": {"x": {"questions": ["what do you not know", "do you do not know"], "expect": ["know"]}}},
            "topic 'x' expects one of 'know', but all of its questions contain it",
        ),
    ],
    ids=str,
)
def test_an_invalid_value_raises_one_line_with_file_and_key(values, message, tmp_path):
    names = {} if "name" in values or "maker" in values else {"name": "Bibo", "maker": "Ann"}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({**names, **values}))
    assert error_of(path).startswith(f"{path}: {message}")


@pytest.mark.parametrize("part", ["questions", "replies", "expect"])
@pytest.mark.parametrize("value", ["gone", None, [], "a string", [5], [""]])
def test_an_incomplete_topic_is_named(part, value, tmp_path):
    values = yaml.safe_load(DEFAULT_PERSONA.read_text())
    values["facts"]["name"][part] = value
    if value == "gone":
        del values["facts"]["name"][part]
    assert error_of(persona_file(tmp_path, **values)).endswith(f"topic 'name' lacks {part}: give a list of texts.")


@pytest.mark.parametrize("section", ["greetings", "farewells"])
def test_greetings_and_farewells_need_questions_and_replies(section, tmp_path):
    for value in ({}, {"questions": ["hello"]}):
        message = error_of(persona_file(tmp_path, name="Bibo", maker="Ann", **{section: value}))
        assert re.search(f": {section} lacks .*replies", message)


def test_greetings_can_be_replaced():
    persona = replace(PERSONA, greetings={"questions": ["ahoy"], "replies": ["Ahoy, sailor!"]})
    rows = list(generate_conversations(persona, 300))
    rows = [[turn for turn in turns if turn["role"] != "system"] for turns in rows]
    greeted = [turns for turns in rows if words(turns[0]["content"]) == "ahoy"]
    assert 60 < len(greeted) < 120  # three in ten
    assert {turns[1]["content"] for turns in greeted} == {"Ahoy, sailor!"}
