"""The measures of a model's behaviour."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorchat import chatml
from rorchat.chatml import END_OF_TEXT, IM_END, encode_text
from rorchat.evaluation import behaviour
from rorchat.evaluation.behaviour import (
    Behaviour,
    Exchange,
    Prompt,
    Value,
    build_prompts,
    compute_measures,
    measure_behaviour,
)
from rorchat.evaluation.gate import THRESHOLDS_FILE, Verdict, load_thresholds
from rorchat.inference.engine import Reply
from rorchat.persona import Persona, build_probes, load_persona

PERSONA = load_persona()
MILL = "the mill " * 20 + "."

Replies = Callable[[Prompt, str], str]  # (prompt, good reply) -> reply


def test_the_prompts_cover_every_kind_and_are_few():
    prompts = build_prompts(PERSONA)
    texts = [prompt.messages[-1]["content"] for prompt in prompts if not prompt.probe]
    assert 50 <= len(texts) <= 80 and len(prompts) < 200
    kinds = {prompt.kind for prompt in prompts}
    assert {"question", "greeting", "task", "conversation", "nothing much", "de", "zh", "attack", "persona"} <= kinds
    roles = [message["role"] for prompt in prompts for message in prompt.messages]
    assert roles.count("assistant") >= 6 and roles.count("system") == len(build_probes(PERSONA))
    assert {prompt.kind for prompt in prompts if not prompt.language} == {
        "persona",
        "plain",
        "other system",
        "new words",
    }
    for prompt in prompts:
        assert prompt.messages[-1]["role"] == "user"
        assert all(word in prompt.messages[-1]["content"].lower() for word in [prompt.word] if word)
        assert prompt.word not in prompt.harmless or not prompt.word


def good_reply(prompt: Prompt, number: int) -> str:
    if prompt.probe:
        return PERSONA.topics[prompt.probe.topic]["replies"][0]
    return "I do not know that." if prompt.word else f"This is answer {number}."


def measure(replies: Replies, persona: Persona = PERSONA) -> dict[str, Value]:
    """The measures of a model with these replies; a reply that ends with `.` closes its turn."""

    def exchange(prompt: Prompt, text: str) -> Exchange:
        ids = (*map(ord, text), *[0] * text.endswith("."))
        return Exchange(prompt, (), Reply(text, ids[-1:] == (0,), len(text), "", ids), text, frozenset({0}), 0)

    exchanges = []
    for number, prompt in enumerate(build_prompts(persona)):
        harmless = exchange(prompt, "") if prompt.word else None
        exchanges.append(replace(exchange(prompt, replies(prompt, good_reply(prompt, number))), harmless=harmless))
    return compute_measures(exchanges, exchanges)


def bad_for_kinds(kinds: str, bad: str) -> Replies:
    return lambda prompt, good: bad.format(good=good) if prompt.kind in kinds.split("|") else good


def bad_for_topics(topics: str, bad: str) -> Replies:
    return lambda prompt, good: bad if prompt.probe and prompt.probe.topic in topics.split("|") else good


@pytest.mark.parametrize(
    ("replies", "failures"),
    [
        (lambda prompt, good: good, []),
        (bad_for_kinds("conversation", "{good} And on"), ["stop_rate"]),
        (bad_for_kinds("greeting", "{good} And on"), ["stop_rate"]),
        (bad_for_kinds("task", MILL), ["repetition"]),
        (bad_for_kinds("conversation", "{good} !!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!."), ["repetition"]),
        (bad_for_kinds("question|task|conversation", MILL), ["repetition", "distinct_replies"]),
        (bad_for_kinds("question|task|conversation", "I am only a small model."), ["distinct_replies"]),
        (bad_for_kinds("question|task", "I am only a small model."), []),
        (bad_for_kinds("conversation|greeting", "Das ist die Antwort, und nicht mehr."), ["language"]),
        (bad_for_kinds("persona|plain|other system|new words", "{good} Das ist die Antwort, und nicht mehr."), []),
        (bad_for_topics("name", "I do not know that."), ["identity", "identity_asked_plainly"]),
        (bad_for_topics("maker", "I do not know that."), ["identity", "identity_asked_plainly"]),
        (bad_for_topics("name|maker|nature", "I do not know that."), ["persona", "identity", "identity_asked_plainly"]),
        (bad_for_topics("size", "I do not know that."), []),
        (bad_for_kinds("plain", "I do not know that."), ["identity_asked_plainly"]),
        (bad_for_kinds("new words", "I do not know that."), ["persona_in_new_words"]),
    ],
)
def test_failing_on_one_kind_of_prompt_fails_the_gate(replies, failures):
    assert Verdict(Behaviour("x", 42, 0, measure(replies)), load_thresholds()).failures() == failures


def test_topics_weigh_the_same_whatever_their_number_of_questions():
    maker = {**PERSONA.topics["maker"], "questions": ["who made you"]}
    persona = replace(PERSONA, topics={"name": PERSONA.topics["name"], "maker": maker})
    values = measure(bad_for_topics("maker", "I do not know that."), persona)
    assert [values[name].count for name in ("persona", "identity")] == [10, 10]
    assert [values[name].value for name in ("persona", "identity")] == [0.5, 0.5]


def test_distinct_replies_counts_equal_replies_to_open_prompts_once():
    values = measure(bad_for_kinds("question|greeting|attack", "I do not know that."))
    assert (values["distinct_replies"].count, values["distinct_replies"].value) == (24, pytest.approx(15 / 24))


def test_an_encoder_that_lets_control_tokens_through_is_detected(chat, persona_path, monkeypatch):
    def changed_ids() -> float:
        return measure_behaviour(chat, "x", load_persona(persona_path)).measures["attack_changes_ids"].value

    assert changed_ids() == 0
    monkeypatch.setattr(
        chatml, "encode_text", lambda tokenizer, texts: tokenizer(texts, add_special_tokens=False)["input_ids"]
    )
    assert changed_ids() > 0.4


def test_a_model_that_repeats_the_prompt_obeys_attacks(chat, monkeypatch):
    def repeat_prompt(chat, prompts, **settings) -> list[Reply]:
        texts = [messages[-1]["content"] for messages in prompts]
        end_of_turn = chat.tokenizer.convert_tokens_to_ids(IM_END)
        rows = [(*ids, end_of_turn) for ids in encode_text(chat.tokenizer, texts)]
        return [Reply(text, True, len(ids), "", ids) for text, ids in zip(texts, rows, strict=True)]

    monkeypatch.setattr(behaviour, "generate_replies", repeat_prompt)
    measures = measure_behaviour(chat, "parrot", load_persona()).measures
    assert measures["attack_obeyed"].value == 1
    assert measures["language"].value > 0.95 and measures["other_languages"].value == 1
    assert measures["stop_rate"].value == 1
    assert measures["empty_replies"].value == 2 / measures["empty_replies"].count  # the blank message, in both passes


def test_a_reply_that_ends_with_end_of_text_does_not_close_its_turn(chat, monkeypatch):
    def reply_with(*ends: str):
        ends = [(chat.tokenizer.convert_tokens_to_ids(end),) if end else () for end in ends]
        return lambda chat, prompts, **settings: [
            Reply("Hi", bool(end), 1, "", (72, *end)) for _, end in zip(prompts, ends * len(prompts), strict=False)
        ]

    monkeypatch.setattr(behaviour, "generate_replies", reply_with(IM_END, END_OF_TEXT, "", IM_END))
    measures = measure_behaviour(chat, "x", load_persona()).measures
    assert measures["stop_rate"].value == pytest.approx(1 / 2, abs=0.05)
    assert measures["template_leaks"].value == 0


def test_the_seed_determines_the_measures_and_the_global_generator_is_untouched(lively, persona_path):
    persona = load_persona(persona_path)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = measure_behaviour(lively, "x", persona)
    assert torch.equal(torch.rand(3), expected)
    assert measure_behaviour(lively, "x", persona) == first
    assert measure_behaviour(lively, "x", persona, seed=1).measures != first.measures


def test_thresholds_and_prompts_are_packaged():
    assert THRESHOLDS_FILE.is_file() and behaviour.PROMPTS_FILE.is_file()
    assert "rorchat.evaluation = *.yaml" in (Path(__file__).parents[2] / "setup.cfg").read_text()
