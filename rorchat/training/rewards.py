"""Rewards of replies: pure functions `(reply, row) -> float`, and how a user's own function is loaded.

A row has the fields of the question (`messages`, `answer`, `alternatives`, `topic`, `place`) and of the reply: whether
it `stopped` before the limit, its number of `tokens` including the one that ends it, the `limit`, and whether it
`leaks` control tokens, which its text does not show. `answer` is between 0 and 1, the others between -1 and 0.
"""

import functools
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import SupportsFloat

from rorchat.chatml import CONTROL_TOKENS
from rorchat.errors import DataError, UsageError, did_you_mean
from rorchat.files import file_sha256
from rorchat.inference.engine import Reply
from rorchat.persona import contains_phrase
from rorchat.sources.tinytown import Question

Reward = Callable[[str, dict], float]

ANSWERED = 0.2  # reward of a wrong answer of the right kind
NGRAM_WORDS = 4
ROW = ("messages", "answer", "alternatives", "topic", "place")  # columns of a question that a reward receives
#: A minus after a digit is a dash or a subtraction. A comma before exactly three digits groups them;
#: other commas separate numbers.
_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_TURN = re.compile(r"^\s*(user|assistant|system)\s*(:|$)", re.IGNORECASE | re.MULTILINE)


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(text)]


def is_right(reply: str, row: dict) -> bool:
    """Whether a reply contains the known answer and no other one.

    For the topic "number" the last number counts, because steps of reasoning precede it; the other topics are
    those of Tinytown.
    """
    if row["topic"] == "number":
        return _numbers(reply)[-1:] == _numbers(row["answer"])[-1:]
    question = row["messages"][-1]["content"]
    return Question(row["topic"], question, row["answer"], tuple(row["alternatives"])).is_right(reply)


def answer(reply: str, row: dict) -> float:
    """1 for the right answer, ANSWERED for a wrong answer of the right kind, 0 without an answer.

    The right kind is a number if the answer is one, otherwise one of the alternatives. ANSWERED rewards a model for
    giving an answer at all. Guessing earns little, because most guesses are wrong.
    """
    if is_right(reply, row):
        return 1.0
    named = any(contains_phrase(reply, other) for other in (row["answer"], *row["alternatives"]))
    return ANSWERED if named or (not row["alternatives"] and _NUMBER.search(reply)) else 0.0


def stop(reply: str, row: dict) -> float:
    """0 for a reply that ends before the limit, -1 for one that the limit cuts off."""
    return 0.0 if row["stopped"] else -1.0


def length(reply: str, row: dict) -> float:
    """0 up to half of the token limit, then linearly down to -1 at the limit.

    The soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, equation 13) over the second half
    of the limit.
    """
    free = row["limit"] / 2
    return -max(0.0, min(1.0, (row["tokens"] - free) / free))


def repetition(reply: str, row: dict) -> float:
    """Minus the share of word 4-grams that repeat an earlier one; 0 for a reply of fewer than 4 words.

    Like the penalty of Yeo et al. 2025 (arXiv:2502.03373, appendix C.2), which uses n-grams of tokens.
    """
    words = reply.lower().split()
    ngrams = [tuple(words[at : at + NGRAM_WORDS]) for at in range(len(words) - NGRAM_WORDS + 1)]
    return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0


def format(reply: str, row: dict) -> float:  # noqa: A001
    """-1 for a reply that is empty, contains or spells out a control token, or writes another turn; 0 otherwise."""
    leaks = row["leaks"] or any(token in reply for token in CONTROL_TOKENS)
    return -1.0 if leaks or not reply.strip() or _TURN.search(reply) else 0.0


REWARDS: dict[str, Reward] = {function.__name__: function for function in (answer, stop, length, repetition, format)}
#: Default weights; a user's own reward weighs 1, as much as the answer.
WEIGHTS = dict.fromkeys(REWARDS, 0.5) | {"answer": 1.0}


def find_reward(name: str) -> Reward:
    """A reward by name, or a user's function as FILE.py:FUNCTION.

    Raises:
        UsageError: there is no such reward, file or function, or the file cannot be executed.
    """
    if name in REWARDS:
        return REWARDS[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise UsageError(
            f"No reward {name!r}.{did_you_mean(name, REWARDS)} Known: {', '.join(REWARDS)}, or your own function "
            "(reply: str, row: dict) -> float as my_rewards.py:my_function."
        )
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"reward {name!r}: the file {path} does not exist.")
    reward = getattr(_load_module(file.resolve(), file_sha256(file)), function, None)
    if not callable(reward):
        existing = f", but a value of type {type(reward).__name__} with this name" if reward is not None else ""
        raise UsageError(f"reward {name!r}: {path} has no function {function!r}{existing}.")
    return reward


@functools.cache
def _load_module(path: Path, sha256: str) -> ModuleType:
    """Executes a file once for all of its rewards, and again when its content has changed."""
    name = str(path)  # no other module has this name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader, "a file that ends with .py has a loader"
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        del sys.modules[name]
        raise UsageError(f"The reward file {path} cannot be loaded: {_one_line(error)}.") from None
    return module


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def compute_reward(name: str, function: Reward, reply: str, row: dict) -> float:
    """The value of a reward for a reply.

    Raises:
        DataError: the function raises, or does not return a finite number; the message names the reward and the row.
    """
    where = f"The reward {name} for {row['place']}, reply {reply[:60]!r},"
    try:
        value = function(reply, row)
    except Exception as error:  # a user's function may raise anything
        raise DataError(
            f"{where} raised {_one_line(error)}. Correct the function, or remove it from `rewards`."
        ) from None
    if math.isfinite(number := _as_float(value)):
        return number
    raise DataError(
        f"{where} is {' '.join(repr(value).split())[:60]}, not a finite number. Correct the function, or remove it "
        "from `rewards`."
    )


def _as_float(value: object) -> float:
    """The number in a Python, NumPy or torch scalar; NaN for anything else."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


class Scorer:
    """A reward for many replies, callable as TRL calls reward functions.

    Args:
        limit: maximum number of tokens of a reply.
        stop_ids: ids of the tokens that end a reply.
        control_ids: ids of the control tokens.
    """

    def __init__(self, name: str, limit: int, stop_ids: set[int], control_ids: set[int]):
        self.__name__, self.function, self.limit = name, find_reward(name), limit
        self.stop_ids, self.leak_ids = stop_ids, control_ids - stop_ids

    def score(self, rows: Sequence[dict], replies: Sequence[Reply]) -> list[float]:
        """The reward of each reply to its row."""
        return [
            compute_reward(self.__name__, self.function, reply.text, {**row, **self._describe(reply)})
            for row, reply in zip(rows, replies, strict=True)
        ]

    def _describe(self, reply: Reply) -> dict:
        leaks = not self.leak_ids.isdisjoint(reply.ids)
        return {"stopped": reply.stopped, "tokens": len(reply.ids), "limit": self.limit, "leaks": leaks}

    def __call__(self, completions: list[str], completion_ids: list[list[int]], **columns) -> list[float]:
        rows = [dict(zip(ROW, values, strict=True)) for values in zip(*(columns[name] for name in ROW), strict=True)]
        return self.score(rows, as_replies(completions, completion_ids, self.stop_ids))


def as_replies(texts: Sequence[str], ids: Sequence[list[int]], stop_ids: set[int]) -> list[Reply]:
    """Sampled replies from their texts and token ids, the latter including the token that ended generation."""
    return [
        Reply(text, stopped := reply_ids[-1] in stop_ids, len(reply_ids) - stopped, ids=tuple(reply_ids))
        for text, reply_ids in zip(texts, ids, strict=True)
    ]
