"""What a reply is worth: small pure functions `(reply, row) -> float`, and how a user's own one is found.

A row is what the source gave (`messages`, `answer`, `alternatives`, `topic`) with what is known of the reply: `stopped`
by itself and not by the limit, its `tokens` with the one that ends it, the `limit`, and whether it `leaks`: control
tokens are not in its text. An answer is worth up to 1; the others take away up to 1.
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
from rorchat.persona import says
from rorchat.sources.tinytown import Question

Reward = Callable[[str, dict], float]

ANSWERED = 0.2  # what a wrong answer of the right kind is worth
NGRAM = 4  # words
ROW = ("messages", "answer", "alternatives", "topic", "place")  # what a reward is told of a question
#: A minus behind a digit is a dash or takes away; commas group three digits, or stand between numbers.
_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_TURN = re.compile(r"^\s*(user|assistant|system)\s*(:|$)", re.IGNORECASE | re.MULTILINE)


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(text)]


def is_right(reply: str, row: dict) -> bool:
    """Whether a reply has the known answer and no other one.

    Of topic "number" the last number counts, as steps of reasoning stand before it; Tinytown judges its own topics.
    """
    if row["topic"] == "number":
        return _numbers(reply)[-1:] == _numbers(row["answer"])[-1:]
    asked = row["messages"][-1]["content"]
    return Question(row["topic"], asked, row["answer"], tuple(row["alternatives"])).is_right(reply)


def answer(reply: str, row: dict) -> float:
    """1 for the right answer, ANSWERED for a wrong one of the right kind, 0 for none.

    Of the right kind is a number where a number is asked for, else one of the alternatives. So a model that never
    answers is told first what an answer looks like; a guess earns little, for most guesses are wrong.
    """
    if is_right(reply, row):
        return 1.0
    named = any(says(reply, other) for other in (row["answer"], *row["alternatives"]))
    return ANSWERED if named or (not row["alternatives"] and _NUMBER.search(reply)) else 0.0


def stop(reply: str, row: dict) -> float:
    """0 for a reply that ends by itself, -1 for one that the limit cuts off."""
    return 0.0 if row["stopped"] else -1.0


def length(reply: str, row: dict) -> float:
    """0 up to half of the limit of tokens, from there down to -1 at the limit.

    The soft punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, equation 13), with half of the limit as its interval.
    """
    free = row["limit"] / 2
    return -max(0.0, min(1.0, (row["tokens"] - free) / free))


def repetition(reply: str, row: dict) -> float:
    """Minus the share of 4-grams of words that the reply had before; 0 for a reply of fewer words.

    As the penalty of Yeo et al. 2025, arXiv:2502.03373, appendix C.2, which counts tokens.
    """
    words = reply.lower().split()
    ngrams = [tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)]
    return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0


def format(reply: str, row: dict) -> float:  # noqa: A001
    """-1 for a reply that is empty, has or spells out a control token or speaks for somebody else; 0 for any other."""
    leaks = row["leaks"] or any(token in reply for token in CONTROL_TOKENS)
    return -1.0 if leaks or not reply.strip() or _TURN.search(reply) else 0.0


REWARDS: dict[str, Reward] = {function.__name__: function for function in (answer, stop, length, repetition, format)}
#: What rewards weigh where `reward_weights` says nothing: a user's own weighs as much as the answer.
WEIGHTS = dict.fromkeys(REWARDS, 0.5) | {"answer": 1.0}


def find_reward(name: str) -> Reward:
    """A reward by its name, or a user's own one as FILE.py:FUNCTION.

    Raises:
        UsageError: there is no such reward, file or function, or the file does not load.
    """
    if name in REWARDS:
        return REWARDS[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise UsageError(
            f"No reward {name!r}.{did_you_mean(name, REWARDS)} Known: {', '.join(REWARDS)}, or a function "
            "(reply: str, row: dict) -> float of yours as my_rewards.py:my_function."
        )
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"No file {path} with a reward.")
    found = getattr(_module(file.resolve(), file_sha256(file)), function, None)
    if not callable(found):
        has = f", but {type(found).__name__} of that name" if found is not None else ""
        raise UsageError(f"{path} has no function {function!r}{has}, which the reward {name!r} asks for.")
    return found


@functools.cache
def _module(path: Path, sha256: str) -> ModuleType:
    """A file executed once, however many rewards are in it, and again when its content has changed."""
    name = str(path)  # which no other module has
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look for themselves there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file does
        del sys.modules[name]
        raise UsageError(f"{path} with a reward does not load: {_said(error)}.") from None
    return module


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def scored(name: str, function: Reward, reply: str, row: dict) -> float:
    """What a reward gives for a reply.

    Raises:
        DataError: the function raises, or gives what is no finite number; names it and the row.
    """
    where = f"The reward {name} for {row['place']}, reply {reply[:60]!r},"
    try:
        value = function(reply, row)
    except Exception as error:  # whatever a user's function does
        raise DataError(f"{where} raised {_said(error)}. Mend the function, or leave it out of `rewards`.") from None
    if math.isfinite(number := _number(value)):
        return number
    told = " ".join(repr(value).split())[:60]
    raise DataError(f"{where} is {told}, and no finite number. Mend the function, or leave it out of `rewards`.")


def _number(value: object) -> float:
    """The number that Python, NumPy or torch holds; nan for what is none, or several."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


class Scorer:
    """A reward for many replies, and as TRL calls it.

    Args:
        limit: the most tokens of a reply.
        stops: the ids of which one ends a reply.
        control: the ids that no text has.
    """

    def __init__(self, name: str, limit: int, stops: set[int], control: set[int]):
        self.__name__, self.function, self.limit = name, find_reward(name), limit
        self.stops, self.leaks = stops, control - stops

    def worth(self, rows: Sequence[dict], replies: Sequence[Reply]) -> list[float]:
        """What each reply is worth to its row."""
        return [
            scored(self.__name__, self.function, reply.text, {**row, **self._about(reply)})
            for row, reply in zip(rows, replies, strict=True)
        ]

    def _about(self, reply: Reply) -> dict:
        leaks = not self.leaks.isdisjoint(reply.ids)
        return {"stopped": reply.stopped, "tokens": len(reply.ids), "limit": self.limit, "leaks": leaks}

    def __call__(self, completions: list[str], completion_ids: list[list[int]], **columns) -> list[float]:
        rows = [dict(zip(ROW, values, strict=True)) for values in zip(*(columns[name] for name in ROW), strict=True)]
        return self.worth(rows, as_replies(completions, completion_ids, self.stops))


def as_replies(texts: Sequence[str], ids: Sequence[list[int]], stops: set[int]) -> list[Reply]:
    """Sampled replies, whose ids end with what stopped them."""
    return [
        Reply(text, stopped := own[-1] in stops, len(own) - stopped, ids=tuple(own))
        for text, own in zip(texts, ids, strict=True)
    ]
