"""Rewards of replies, and the errors of rewards that cannot be used."""

import math

import numpy as np
import pytest
import torch

from rorchat.errors import DataError, UsageError
from rorchat.inference.engine import Reply
from rorchat.rows import CHECKS, RejectedRow
from rorchat.sources.gsm8k import RAW, to_question
from rorchat.sources.registry import load_rows
from rorchat.training.rewards import (
    ANSWERED,
    REWARDS,
    ROW,
    WEIGHTS,
    Scorer,
    answer,
    compute_reward,
    find_reward,
    format,
    is_right,
    length,
    repetition,
    stop,
)


def row(topic="number", answer="24", alternatives=(), asked="How many?", **more) -> dict:
    messages = [{"role": "user", "content": asked}]
    return {"messages": messages, "answer": answer, "alternatives": list(alternatives), "topic": topic} | more


PETS = row("fact", "dog", ("cat", "dog", "mouse"), "Which pet does Mia have?")
SUM = row("sum", "17", (), "What is 12 plus 5?")


@pytest.mark.parametrize(
    ("about", "reply", "reward"),
    [
        (PETS, "Mia has a dog.", 1.0),
        (PETS, "Mia has a cat.", ANSWERED),
        (PETS, "Mia has a dog. Mia has a cat.", ANSWERED),
        (PETS, "Mia is dogged.", 0.0),
        (PETS, "", 0.0),
        (SUM, "12 plus 5 is 17.", 1.0),
        (SUM, "12 plus 5 is 16.", ANSWERED),
        (SUM, "17, or 18.", ANSWERED),
        (SUM, "I do not know.", 0.0),
        (row(), "3 * 8 = 24.\nThe answer is 24.", 1.0),
        (row(), "It is 24 or 25.", ANSWERED),
        (row(), "Many.", 0.0),
        (row(answer="1200"), "She pays $1,200.", 1.0),
        (row(answer="1200"), "She pays 1200.00 dollars", 1.0),
        (row(answer="-3"), "That is 3.", ANSWERED),
        (row(answer="-3"), "That is -3.", 1.0),
        (row(), "It takes 20-24.", 1.0),
        (row(), "They are 1,2,24.", 1.0),
        (row(answer="1224"), "They are 1,2,24.", ANSWERED),
        (row(answer="1224"), "That makes 1,224.50 less 0.5, or 1,224.", 1.0),
    ],
)
def test_answer_rewards_right_answers_and_the_right_kind(about, reply, reward):
    assert answer(reply, about) == reward
    assert is_right(reply, about) == (reward == 1.0)


def test_answers_of_tinytown_are_right():
    rows = list(load_rows("tinytown=300", "question"))
    assert {row["topic"] for row in rows} == {"fact", "sum", "story"}
    for about in rows:
        assert answer(about["answer"], about) == 1.0
        assert answer("I like it.", about) == 0.0


def test_stop_rewards_replies_that_end():
    assert (stop("", {"stopped": True}), stop("", {"stopped": False})) == (0.0, -1.0)


@pytest.mark.parametrize(("tokens", "reward"), [(1, 0.0), (16, 0.0), (24, -0.5), (31, -0.9375), (32, -1.0)])
def test_length_falls_towards_the_limit(tokens, reward):
    assert length("", {"tokens": tokens, "limit": 32}) == reward


@pytest.mark.parametrize(
    ("reply", "reward"),
    [("", 0.0), ("one two three", 0.0), ("a b c d e f g", 0.0), ("a b c d a b c d", -0.2), ("the " * 13, -0.9)],
)
def test_repetition_is_the_share_of_repeated_4_grams(reply, reward):
    assert repetition(reply, {}) == pytest.approx(reward)


@pytest.mark.parametrize(
    "reply", ["", " \n", "Fine.<|im_end|>", "Yes.\nuser\nAnd you?", "User: hello", "<|im_start|>user"]
)
def test_format_penalizes_empty_replies_and_template_leaks(reply):
    assert format(reply, {"leaks": False}) == -1.0


@pytest.mark.parametrize("reply", ["Yes.", "The user is here.", "a < b | c", "My assistant: a robot."])
def test_format_accepts_other_replies(reply):
    assert format(reply, {"leaks": False}) == 0.0


class TestSampledReplies:
    """TRL's replies, whose texts have no control tokens, and the engine's get the same reward."""

    END, START = 2, 1

    def score(self, name: str, text: str, ids: list[int]) -> float:
        columns = {column: [value] for column, value in (row() | {"place": "row 0"}).items() if column in ROW}
        scorer = Scorer(name, limit=8, stop_ids={self.END}, control_ids={self.START, self.END})
        (sampled,) = scorer([text], [ids], **columns)
        stopped = ids[-1] == self.END
        reply = Reply(text, stopped, len(ids) - stopped, ids=tuple(ids))  # as `generate_replies` counts
        assert scorer.score([row(place="row 0")], [reply]) == [sampled]
        return sampled

    def test_control_token_within_a_reply_is_a_leak(self):
        assert self.score("format", "Yes.user\nAnd you?", [5, self.START, 6, 7]) == -1.0
        assert self.score("format", "Yes.", [5, 6, self.END]) == 0.0

    def test_length_counts_the_token_that_ends_a_reply(self):
        assert self.score("length", "Yes, yes.", [5, 6, 7, 8, 9, self.END]) == -0.5


def test_rewards_of_any_text_are_between_minus_1_and_1():
    about = row(stopped=False, tokens=9, limit=8, leaks=False, place="row 0")
    for name, function in REWARDS.items():
        for reply in ("", " ", "\x00", "9" * 400, "é " * 500, "<|im_start|>", "-,.", "1e999 - 1,,,2"):
            assert -1 <= compute_reward(name, function, reply, about) <= 1
    assert WEIGHTS.keys() == REWARDS.keys()


def test_gsm8k_answer_is_the_number_after_its_mark():
    question = to_question(RAW[0])
    assert question["answer"] == "12" and is_right("She has 12 pens.", question)
    assert to_question({"question": "How much?", "answer": "It is\n#### 1,234"})["answer"] == "1234"
    with pytest.raises(RejectedRow, match="####"):
        to_question({"question": "How much?", "answer": "It is 12."})


def test_gsm8k_solutions_are_right_answers(shared_data):
    path = shared_data / "gsm8k" / "train.jsonl"
    rows = load_rows(f"gsm8k={path}", "question")
    questions = list(rows)
    assert (rows.stats.rows_in, rows.stats.kept) == (7473, 7473)
    solutions = [row["messages"][1]["content"] for row in load_rows(f"gsm8k={path}", "conversation")]
    for question, solution in zip(questions, solutions, strict=True):
        CHECKS["question"](question)
        assert is_right(solution, question), question
    assert sum(is_right(solution, question) for question, solution in zip(questions, solutions[1:], strict=False)) < 300


class TestUserReward:
    def write(self, tmp_path, body: str) -> str:
        (tmp_path / "mine.py").write_text(body)
        return f"{tmp_path / 'mine.py'}:short"

    def test_found_by_file_and_name(self, tmp_path):
        reward = find_reward(self.write(tmp_path, "def short(reply, row):\n    return -len(reply) / 10\n"))
        assert compute_reward("mine", reward, "hello", row(place="row 3")) == -0.5

    def test_file_is_executed_once_until_it_changes(self, tmp_path, capsys):
        body = "print('loaded')\ndef short(reply, row): return 1\ndef long(reply, row): return 2\n"
        name = self.write(tmp_path, body)
        assert find_reward(name)("", {}) == 1
        assert find_reward(name.replace("short", "long"))("", {}) == 2
        self.write(tmp_path, body.replace("1", "3"))
        assert find_reward(name)("", {}) == 3
        assert capsys.readouterr().out.count("loaded") == 2

    def test_file_may_define_a_dataclass(self, tmp_path):
        lines = [
            "from __future__ import annotations",
            "from dataclasses import dataclass",
            "@dataclass",
            "class Score:",
        ]
        lines += ["    value: float", "def short(reply, row): return Score(2.0).value"]
        assert find_reward(self.write(tmp_path, "\n".join(lines)))("", {}) == 2.0

    @pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5])])
    def test_may_return_numpy_or_torch_numbers(self, value):
        assert compute_reward("mine", lambda reply, row: value, "hello", row(place="row 3")) == 0.5
        assert compute_reward("mine", lambda reply, row: np.int64(1), "hello", row(place="row 3")) == 1.0

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("def other(reply, row): return 0\n", "no function 'short'"),
            ("short = 3\n", "no function 'short'"),
            ("import nothing_of_this_name\n", "ModuleNotFoundError"),
            ("def short(:\n", "SyntaxError"),
        ],
    )
    def test_unloadable_file_raises_in_one_line(self, tmp_path, body, message):
        with pytest.raises(UsageError, match=message) as error:
            find_reward(self.write(tmp_path, body))
        assert "mine.py" in str(error.value) and "\n" not in str(error.value)

    def test_missing_file_raises(self, tmp_path):
        with pytest.raises(UsageError, match="none.py does not exist"):
            find_reward(f"{tmp_path / 'none.py'}:short")

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("None", "None"),
            ("math.nan", "nan"),
            ("math.inf", "inf"),
            ("'0.5'", "'0.5'"),
            ("10**400", "not a finite number"),
            ("torch.zeros(2, 2)", r"tensor\(\[\[0., 0.\], \[0., 0.\]\]\)"),
            ("1 / 0", "ZeroDivisionError"),
        ],
    )
    def test_value_that_is_not_a_number_names_reward_and_row(self, value, message):
        function = eval(f"lambda reply, row: {value}", {"math": math, "torch": torch})
        with pytest.raises(DataError, match=message) as error:
            compute_reward("mine.py:short", function, "hello", row(place="gsm8k/train.jsonl:7"))
        assert "mine.py:short" in str(error.value) and "gsm8k/train.jsonl:7" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"), [("anwser", "Did you mean 'answer'"), ("mine.txt:f", "FILE|my_rewards.py")]
)
def test_unknown_reward_names_the_known_ones(name, message):
    with pytest.raises(UsageError, match=message):
        find_reward(name)
