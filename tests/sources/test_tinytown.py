"""Tinytown depends only on its seed, and held-out questions never occur in training.

Texts are parsed with the regular expressions of this file, not with the code of the generator, which could hide a leak.
A wording that they do not match fails the test: extend them.
"""

import itertools
import re
from collections import Counter

import pytest

from rorchat.rows import CHECKS
from rorchat.sources import tinytown
from rorchat.sources.registry import load_rows

AMOUNT = 20_000
OPERATIONS = (
    ("+", re.compile(r"\b(plus|add|added|and|sum|together)\b|\+", re.IGNORECASE)),
    ("-", re.compile(r"\b(minus|take|taken|from|less|subtract|away)\b|-", re.IGNORECASE)),
)
NAME = re.compile(rf"\b(?:{'|'.join(tinytown.NAMES)})\b")
THING = re.compile(rf"\b(?:{'|'.join(tinytown.OBJECTS)})\b")
PLACE = re.compile(rf"\b(?:{'|'.join(tinytown.PLACES)})\b")


def contents(kind: str, row: dict) -> list[str]:
    """The texts of a row: the document, or the contents of its messages."""
    if kind == "document":
        return [row["text"]]
    parts = [row["messages"]] if kind == "question" else row.values()
    return [turn["content"] for turns in parts for turn in turns]


@pytest.fixture(scope="module")
def training() -> dict[str, list[str]]:
    """The distinct texts of 20,000 training rows of each kind."""
    texts = {}
    for kind in tinytown.KIND:
        rows = list(load_rows(f"tinytown={AMOUNT}", kind))
        assert len(rows) == AMOUNT
        texts[kind] = list(dict.fromkeys(text for row in rows for text in contents(kind, row)))
    return texts


@pytest.fixture(scope="module")
def held_out() -> list[tinytown.Question]:
    """The 200 questions that a model is asked, and those of other seeds."""
    return list(
        {question.text: question for seed in range(10) for question in tinytown.held_out_questions(200, seed)}.values()
    )


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?!])\s+", text)


def sums_in(text: str) -> list[tuple[int, str, int]]:
    """Every (a, operation, b) in a text; the numbers of an addition are sorted."""
    equations = []
    for sentence in sentences(text):
        numbers = [int(number) for number in re.findall(r"\d+", sentence)]
        if len(numbers) < 2:
            continue
        operations = [operation for operation, pattern in OPERATIONS if pattern.search(sentence)]
        assert len(operations) == 1, f"unknown wording: {sentence!r}"
        (operation,) = operations
        # Results are never negative, so the larger number is the minuend
        low, high = sorted(numbers[:2])
        equations.append((low, "+", high) if operation == "+" else (high, "-", low))
        if len(numbers) > 2:
            assert len(numbers) == 3, f"unknown wording: {sentence!r}"
            assert numbers[2] == (low + high if operation == "+" else high - low), f"wrong: {sentence!r}"
    return equations


def stories_in(text: str) -> list[tuple[str, str, str, str]]:
    """(finder, thing, place, receiver) of the story in a text, in order of their occurrence."""
    names, things, places = (list(dict.fromkeys(pattern.findall(text))) for pattern in (NAME, THING, PLACE))
    if not things or len(names) < 2 or not places:
        return []
    assert (len(names), len(things), len(places)) == (2, 1, 2), f"unknown wording: {text!r}"
    return [(names[0], things[0], places[0], names[1])]


def test_the_parsers_of_this_file_find_sums_and_stories():
    assert sums_in("What is 12 plus 3? 12 plus 3 is 15. 9 - 4 = 5.") == [(3, "+", 12), (3, "+", 12), (9, "-", 4)]
    assert sums_in("Can you take 4 from 9? Can you add 4 and 9?") == [(9, "-", 4), (4, "+", 9)]
    with pytest.raises(AssertionError, match="wrong"):
        sums_in("12 plus 3 is 16.")
    story = "Uma found a red kite in Hillside. Uma gave the kite to Ben. Ben took the kite to Oldtown."
    assert stories_in(story) == [("Uma", "kite", "Hillside", "Ben")]


@pytest.mark.parametrize("kind", tinytown.KIND)
def test_rows_depend_only_on_the_seed(kind):
    first, again, longer, other = (
        list(load_rows(f"tinytown={amount}", kind, seed=seed))
        for amount, seed in ((300, 5), (300, 5), (400, 5), (300, 6))
    )
    assert first == again == longer[:300]
    assert sum(row in other for row in first) < 100
    assert len(first) == 300
    for row in first:
        CHECKS[kind](row)


@pytest.mark.parametrize("kind", tinytown.KIND)
def test_generators_do_not_share_random_state(kind):
    separate = list(tinytown.generate(kind, 50, 1))
    mixed = zip(tinytown.generate(kind, 50, 1), tinytown.generate(kind, 50, 2), strict=True)
    assert [row for row, _ in mixed] == separate


@pytest.mark.parametrize("kind", tinytown.KIND)
def test_no_held_out_question_occurs_in_training(kind, training, held_out):
    assert len(held_out) > 800
    everything = "\n".join(training[kind]).lower()
    assert [question.text for question in held_out if question.text.lower() in everything] == []


@pytest.mark.parametrize("kind", tinytown.KIND)
def test_no_held_out_sum_occurs_in_training_and_all_sums_are_true(kind, training, held_out):
    asked = {item for question in held_out if question.kind == "sum" for item in sums_in(question.text)}
    assert len(asked) > 100
    trained = [item for text in training[kind] for item in sums_in(text)]
    assert len(set(trained)) > 500 and {operation for _, operation, _ in trained} == {"+", "-"}
    assert asked & set(trained) == set()


@pytest.mark.parametrize("kind", tinytown.KIND)
def test_no_held_out_story_occurs_in_training(kind, training, held_out):
    asked = {item for question in held_out if question.kind == "story" for item in stories_in(question.text)}
    assert len(asked) > 400
    trained = [item for text in training[kind] for item in stories_in(text)]
    assert len(trained) > 4000
    assert asked & set(trained) == set()


@pytest.mark.parametrize("kind", tinytown.KIND)
def test_training_asks_questions_that_are_not_held_out(kind, training, held_out):
    """The tests above must not pass because training asks nothing."""
    everything = "\n".join(training[kind])
    wordings = [
        (name, wording.format(name=name))
        for name, attribute in itertools.product(tinytown.NAMES, tinytown.ATTRIBUTES)
        for wording in tinytown.QUESTIONS[attribute]
    ]
    never = {question.text for question in held_out if question.kind == "fact"}
    asked = [text for _, text in wordings if text in everything]
    assert len(never) > 30
    assert len(asked) > 0.9 * (len(wordings) - len(never))
    assert never.isdisjoint(asked)


def test_held_out_facts_are_stated_in_documents(training, held_out):
    counts = Counter(sentence for text in training["document"] for sentence in sentences(text))
    facts = [question for question in held_out if question.kind == "fact"]
    assert len(facts) > 30
    for question in facts:
        (name,) = NAME.findall(question.text)
        assert sum(n for text, n in counts.items() if name in text and question.answer in text) >= 20, question


def test_held_out_questions_are_a_third_of_each_kind():
    asked = tinytown.held_out_questions()
    assert asked == tinytown.held_out_questions()
    assert len(asked) == len({question.text for question in asked}) == 200
    by_kind = {kind: sum(question.kind == kind for question in asked) for kind in ("fact", "sum", "story")}
    assert sum(by_kind.values()) == 200
    assert all(66 <= count <= 67 for count in by_kind.values()), by_kind
    assert tinytown.held_out_questions(200, seed=1) != asked


def test_answers_to_sums_are_correct(held_out):
    asked = [question for question in held_out if question.kind == "sum"]
    assert len(asked) > 100
    for question in asked:
        ((a, operation, b),) = sums_in(question.text)
        assert int(question.answer) == (a + b if operation == "+" else a - b)


def test_the_answer_passes_alone_in_a_sentence_and_in_capitals(held_out):
    for question in held_out:
        for reply in (question.answer, f"It is {question.answer}.", question.answer.upper(), f"\n {question.answer}!"):
            assert question.is_right(reply), (question, reply)


def test_a_wrong_answer_fails_even_beside_the_right_one(held_out):
    for question in held_out:
        wrong = [str(int(question.answer) + 1)] if question.kind == "sum" else question.alternatives
        wrong = [other for other in wrong if other != question.answer]
        assert wrong
        for other in wrong:
            assert not question.is_right(f"It is {other}."), (question, other)
            assert not question.is_right(f"It is {question.answer}. It is {other}."), (question, other)


def test_a_reply_that_lists_every_alternative_fails(held_out):
    for question in held_out:
        everything = map(str, range(250)) if question.kind == "sum" else question.alternatives
        assert not question.is_right(", ".join(everything)), question


@pytest.mark.parametrize(
    "garbage",
    ["", " ", "?!", "I do not know.", "the the the the", "<|im_end|>", "\ufffd\ufffd", "1 2 3 4 5 6 7 8", "é"],
)
def test_garbage_fails(garbage, held_out):
    right = [question for question in held_out if question.is_right(garbage)]
    # A sum may come to 8 by chance, the last of the numbers in one of these
    assert [question for question in right if question.answer != "8"] == []


def test_answers_to_training_questions_match_the_conversations():
    rows = [(row["messages"][0]["content"], row) for row in load_rows("tinytown=3000", "question")]
    replies = {}
    for row in load_rows("tinytown=20000", "conversation"):
        asked, replied = row["messages"][0]["content"], row["messages"][1]["content"]
        replies[asked] = replied
    known = [(row, text, replies[text]) for text, row in rows if text in replies]
    assert {row["topic"] for row, _, _ in known} >= {"fact", "sum"} and len(known) > 500
    for row, text, reply in known:
        question = tinytown.Question(row["topic"], text, row["answer"], tuple(row["alternatives"]))
        assert question.is_right(reply), (text, reply)


def test_a_part_of_a_word_is_not_an_answer(held_out):
    for question in held_out:
        before, after = ("1", "0") if question.kind == "sum" else ("un", "s")
        assert not question.is_right(before + question.answer), question
        assert not question.is_right(question.answer + after), question


def test_chosen_replies_match_the_conversations(training):
    """Chosen replies consist of sentences that conversations teach, so that the two stages agree."""
    taught = {sentence for text in training["conversation"] for sentence in sentences(text)}
    asked = set(training["conversation"])
    rows = [row for row in load_rows("tinytown=2000", "preference") if row["prompt"][-1]["content"] in asked]
    assert len(rows) > 400
    for row in rows:
        assert [text for text in sentences(row["chosen"][0]["content"]) if text not in taught] == []
        assert row["rejected"][0]["content"] != row["chosen"][0]["content"]
