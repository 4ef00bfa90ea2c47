"""The measures of one reply."""

import math

import pytest

from rorchat.evaluation.text_measures import (
    STOP_WORDS,
    bits_per_byte,
    closes_turn,
    is_in_language,
    is_repetitive,
    leaks_template,
    repetition_rate,
    speaks_for_user,
    strip_end_token,
)


def test_bits_per_byte_equals_a_hand_computation():
    assert bits_per_byte(2 + 3 + 5, 1 + 4 + 2) == pytest.approx(10 / 0.6931471805599453 / 7)
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8.0)  # a uniform distribution over bytes
    assert math.isnan(bits_per_byte(0.0, 0))


def test_only_the_end_of_turn_token_closes_a_turn():
    assert closes_turn("Hi<|im_end|>") and closes_turn([7, 2], 2) and closes_turn((2,), 2)
    assert not closes_turn("Hi<|endoftext|>") and not closes_turn([2, 7], 2) and not closes_turn([], 2)


def test_the_token_that_ended_a_reply_is_stripped_once():
    assert [strip_end_token(text) for text in ("a<|im_end|>", "a<|endoftext|>", "a", "a<|endoftext|><|im_end|>")] == [
        "a",
        "a",
        "a",
        "a<|endoftext|>",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Hi!<|im_start|>",
        "Hi!<|im_end|> there",
        "Hi <|im_",
        "im_start",
        "<|endoftext|>",
        "<|reserved_3|>",
        "Hello.\nassistant\nHello.",
        "assistant\nHello.",
        "Hello.\n system \nBe kind.",
        "[/INST] Hello.",
        "### Response:\nHello.",
    ],
)
def test_template_parts_are_leaks(text):
    assert leaks_template(text)


@pytest.mark.parametrize("text", ["", "Hello.", "I am your assistant.", "a <| b |> c", "The user asks.", "# Response"])
def test_plain_text_is_no_leak_but_a_control_id_is(text):
    assert not leaks_template(text, [7, 8], {1, 2})
    assert leaks_template(text, [7, 2, 8], {1, 2})


@pytest.mark.parametrize(
    ("text", "speaks"),
    [
        ("It is 5.\nuser\nThank you", True),
        ("It is 5. User: Thank you", True),
        ("It is 5.\nuser: thank you", True),
        ("Human: Hello", True),
        ("It is 5.<|im_start|>user\nThank you", True),
        ("It is 5.\nuser", True),
        ("The user said: hello.", False),
        ("A human being", False),
        ("user", False),
        ("You: me", False),
        ("", False),
    ],
)
def test_the_start_of_a_user_turn_is_detected(text, speaks):
    assert speaks_for_user(text) is speaks


def test_repetition_rate_is_the_share_of_repeated_4_grams():
    assert repetition_rate("one two three four") == 0
    assert repetition_rate("a b c d a b c d") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repetition_rate("la " * 23) == pytest.approx(19 / 20)
    assert repetition_rate("one two three", range(3)) is None
    assert repetition_rate("") is None


def test_repetition_rate_takes_the_larger_of_words_and_tokens():
    assert repetition_rate("你好世界你好世界", [5, 6, 7, 8, 5, 6, 7, 8]) == pytest.approx(1 / 5)
    assert repetition_rate("Yes " + "!" * 23, [1, *[5] * 23]) == pytest.approx(19 / 21)
    assert repetition_rate("I am very well " + "哈" * 23, [1, 2, 3, 4, *[5] * 23]) == pytest.approx(19 / 24)
    assert repetition_rate("la " * 23, range(20)) == pytest.approx(19 / 20)
    assert [is_repetitive(text) for text in ("la " * 23, "one two three four", "Hi")] == [True, False, None]


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "The capital of France is Paris."),
        ("de", "Die Hauptstadt von Deutschland ist Berlin."),
        ("fr", "La capitale de la France est Paris."),
        ("es", "La capital de España es Madrid, y no es muy grande."),
        ("it", "La capitale della Francia è Parigi, che non è molto grande."),
        ("ru", "Столица России это Москва."),
        ("zh", "中国的首都是北京。"),
    ],
)
def test_a_sentence_is_in_exactly_one_language(language, text):
    assert [other for other in (*STOP_WORDS, "ru", "zh") if is_in_language(text, other)] == [language]


@pytest.mark.parametrize(
    "text",
    ["", "12", "🙂!", "Paris", "Bonjour", "No.", "No, sorry.", "No problem!", "They die.", "Come here!", "Per person"],
)
def test_a_text_without_evidence_has_no_language(text):
    assert is_in_language(text, "en") is None


def test_a_language_needs_two_stop_words():
    assert is_in_language("No, I do not know.", "en") is True
    assert is_in_language("La bamba!", "en") is None
    assert is_in_language("Es la bamba!", "en") is False
