"""Turns in the usual formats -> messages: their texts, whether they are learned, and what is not text.

A mark on a turn says whether it is learned, under one of the names in LEARNED_KEYS or MASKED_KEYS. A turn without a
mark is learned. Words that are not in the text of a turn, such as the call of a tool, reject the row.
"""

from collections.abc import Sequence
from typing import Any

from rorchat.rows import ROLE_NAMES, RejectedRow, get_text, message, unknown_role

#: Keys that say that a turn is learned: of OpenAI and Mistral (weight), LLaMA-Factory (loss_weight), axolotl (train,
#: training), ChatGLM, XTuner and SWIFT (loss, loss_scale), and others.
LEARNED_KEYS = ("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_mask", "loss_scale")
#: Keys that say that it is not: of torchtune.
MASKED_KEYS = ("masked",)
#: Marks that are refused: of parts of a turn (axolotl), and one that is read in both senses.
UNCLEAR_KEYS = ("train_detail", "mask")
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
MEDIA_KEYS = ("images", "image", "audios", "audio", "videos", "video")
#: Words in the names of speakers that are no people.
TOOL_WORDS = {"tool", "tools", "function", "functions", "observation", "environment", "ipython"}
TEXT_TYPES = (None, "text", "input_text", "output_text")  # of parts
_KEYS_BESIDE_TEXT = frozenset((*LEARNED_KEYS, *MASKED_KEYS, *UNCLEAR_KEYS, *TOOL_KEYS, *MEDIA_KEYS))
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def normalize_messages(turns: object) -> list[dict[str, Any]]:
    """Converts turns in the form `[{"role", "content"}]` or ShareGPT's `[{"from", "value"}]` to messages.

    Raises:
        RejectedRow: a turn has neither form or an unknown role, or it is more than a text.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RejectedRow("wrong type", f"messages are of type {type(turns).__name__}, expected a list")
    messages = []
    for number, turn in enumerate(turns):
        name = _get_field(turn, "role" if isinstance(turn, dict) and "role" in turn else "from", number)
        role = ROLE_NAMES.get(name) or ROLE_NAMES.get(name.lower())
        if role is None and is_tool(name):
            raise RejectedRow("tool call", f"message {number} has the role {name!r}")
        learned = is_learned(turn, number)
        content = read_content(turn, "content" if "content" in turn else "value", number)
        if role is None:
            raise unknown_role(number, name, ROLE_NAMES)
        messages.append(message(role, content, train=learned))
    return messages


def _get_field(turn: object, key: str, number: int) -> str:
    if isinstance(turn, dict) and isinstance(turn.get(key), str):
        return turn[key]
    try:
        return get_text(turn, key)
    except RejectedRow as rejected_row:
        raise RejectedRow(rejected_row.reason, f"message {number}: {rejected_row.detail}") from None


def is_tool(speaker: str) -> bool:
    """Whether a turn is the call of a tool or what it returned, by its role: tool, function_call, observation, ..."""
    return not TOOL_WORDS.isdisjoint(speaker.strip().lower().replace("-", "_").split("_"))


def is_learned(turn: dict, number: int) -> bool:
    """Whether a turn is learned, by the marks beside its text.

    Raises:
        RejectedRow: a mark is neither true nor false, or the turn has a tool call or a picture beside its text.
    """
    if _KEYS_BESIDE_TEXT.isdisjoint(turn):
        return True
    for key in TOOL_KEYS:
        if not is_empty(turn.get(key)):
            raise RejectedRow("tool call", f"message {number} has {key!r}")
    for key in MEDIA_KEYS:
        if not is_empty(turn.get(key)):
            raise RejectedRow("not text", f"message {number} has {key!r}")
    for key in UNCLEAR_KEYS:
        if turn.get(key) is not None:
            raise RejectedRow(f"unknown mark {key!r}", f"message {number}: use 'weight', 0 or 1, for a whole turn")
    marks = [_read_mark(turn, key, number) for key in LEARNED_KEYS if turn.get(key) is not None]
    marks += [not _read_mark(turn, key, number) for key in MASKED_KEYS if turn.get(key) is not None]
    return all(marks)


def _read_mark(turn: dict, key: str, number: int) -> bool:
    flag = read_flag(turn[key])
    if flag is None:
        raise RejectedRow(f"unknown mark {key!r}", f"message {number}: it is {turn[key]!r}, expected 0 or 1")
    return flag


def read_flag(value: object) -> bool | None:
    """The truth of a bool, of 0 and 1, and of these as texts; None for any other value."""
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, NaN, an empty text, list or object, or one that has only nulls."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "[]", "{}", "null", "none", "nan")
    if isinstance(value, dict | list):
        return all(part is None for part in (value.values() if isinstance(value, dict) else value))
    return not value or value != value


def read_content(turn: dict, key: str, number: int) -> str:
    """The text of a turn, or the texts of its parts, with a line break where two words would become one.

    Raises:
        RejectedRow: a part is not a text, or there is none.
    """
    parts = turn.get(key)
    if isinstance(parts, str):
        return parts
    if not isinstance(parts, list) or not parts:
        return _get_field(turn, key, number)
    joined = ""
    for part in parts:
        has_other_type = isinstance(part, dict) and part.get("type") not in TEXT_TYPES
        text = None if has_other_type else join_text([part])
        if text is None:
            raise RejectedRow("not text", f"message {number}: {key!r} has the part {_name_part(part)!r}")
        touches = joined and text and not joined[-1].isspace() and not text[0].isspace()
        joined += f"\n{text}" if touches else text
    return joined


def _name_part(part: object) -> str:
    """The type, or the first key, of a part that is not a text."""
    return str(part.get("type") or next(iter(part), "")) if isinstance(part, dict) else type(part).__name__


def join_text(value: object) -> str | None:
    """A text, or the texts of a list of parts such as {"type": "text", "text": ...}; None for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return None
    parts = [_get_part_text(part) if isinstance(part, dict) else part for part in value]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else None


def _get_part_text(part: dict) -> object:
    return part["text"] if part.get("text") is not None else part.get("value")  # `value` of LLaMA-Factory
