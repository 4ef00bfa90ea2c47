"""The kinds of rows that later stages use, and the checks that every row must pass.

document      {"text": str}
conversation  {"messages": [{"role": "system"|"user"|"assistant", "content": str}, ...]}; a message with
              `"train": False` is read by the model, but not learned
preference    {"prompt": [messages], "chosen": [message], "rejected": [message]}
question      {"messages": [messages], "answer": str, "alternatives": [str], "topic": str}. A reply that contains one of
              the alternatives is wrong. The topic decides how replies are scored (rorchat/training/rewards.py).
"""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
# Role names in published datasets, mostly those in ShareGPT's format
ROLE_NAMES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "bot": "assistant",
    "model": "assistant", "ai": "assistant",
}  # fmt: skip
MAX_DETAIL_CHARACTERS = 300  # a detail may quote a key, which can have any length

_BYTE_LITERAL = re.compile(r"""\s*b(['"])(?:[^\\]|\\.)*?\1\s*""", re.DOTALL)
# C0 without the white space (tab, line feed, vertical tab, form feed, carriage return), and DEL
_CONTROL_BYTES = bytes(set(range(32)) - {9, 10, 11, 12, 13} | {127})
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # the same, and C1 except U+0085, which is a line end
_PIECE = 2**20  # characters checked at a time, so that a text of 100 MB is not copied as a whole


class RejectedRow(ValueError):
    """A row that cannot be used. Rows are counted by `reason`; `detail` says which part of the row is wrong."""

    def __init__(self, reason: str, detail: str = ""):
        detail = _to_one_line(detail)
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def describe_place(self, place: str) -> str:
        """The place of the row, followed by the detail in parentheses."""
        return f"{place} ({self.detail})" if self.detail else place


def _to_one_line(text: str) -> str:
    """Shortens a text and escapes line ends and other unprintable characters."""
    cut = text if len(text) <= MAX_DETAIL_CHARACTERS else text[:MAX_DETAIL_CHARACTERS] + "..."
    return cut if cut.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


@dataclass(slots=True)
class ConvertedRow:
    """A row in the form that the next step reads. Rows are counted by `rule` and by each of `repairs`.

    Attributes:
        rule: where its turns or columns were found, and who is the user; empty for the usual form.
        repairs: what was corrected or left out.
        is_by_order: whether only the order of its texts says who is the user, or a source of its own reads it as well.
    """

    row: Any
    rule: str = ""
    repairs: tuple[str, ...] = ()
    is_by_order: bool = False


def get_text(row: object, key: str) -> str:
    """Returns `row[key]`, which must be a string.

    Raises:
        RejectedRow: the row is not an object, the key is missing, or its value is not a string.
    """
    if not isinstance(row, dict):
        raise RejectedRow("wrong type", f"a row is a {type(row).__name__}, expected an object with {key!r}")
    if key not in row:
        raise RejectedRow("missing field", f"no key {key!r} among {', '.join(map(str, list(row)[:8]))}")
    if row[key] is None:
        raise RejectedRow("empty text", f"{key!r} is null")
    if not isinstance(row[key], str):
        raise RejectedRow("wrong type", f"{key!r} is of type {type(row[key]).__name__}, expected a string")
    return row[key]


def message(role: str, content: str, *, train: bool = True) -> dict[str, Any]:
    """A message. Only one that is not learned has the key `train`."""
    turn = {"role": role, "content": content}
    return turn if train else {**turn, "train": False}


def is_trained(turn: dict) -> bool:
    """Whether a message is learned."""
    return turn.get("train", True)


def exchange(question: str, answer: str) -> dict:
    """A conversation of one question and one answer."""
    return {"messages": [message("user", question), message("assistant", answer)]}


def alternate_turns(contents: Sequence[str]) -> list[dict[str, str]]:
    """Messages of the user and the assistant in alternation, starting with the user."""
    return [message(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]


def get_instruction(row: dict) -> str:
    """The question of an Alpaca row: its instruction and, after an empty line, its input.

    Raises:
        RejectedRow: the instruction is missing or empty.
    """
    instruction = get_text(row, "instruction").strip()
    context = get_text(row, "input").strip() if row.get("input") is not None else ""
    # Instead of an empty input, 59 of 5,000 Alpaca rows have "<noinput>", "No input.", "[noinput]", ...
    if "".join(filter(str.isalpha, context)).lower() in ("noinput", "noinputneeded", "noinputrequired"):
        context = ""
    if not instruction:
        raise RejectedRow("empty question", "instruction")
    return f"{instruction}\n\n{context}" if context else instruction


def unknown_role(number: int, role: object, known: Sequence[str] | dict[str, str]) -> RejectedRow:
    return RejectedRow("unknown role", f"message {number} has the role {role!r}; allowed are {', '.join(known)}")


def decode_byte_literal(text: str) -> str | None:
    """The UTF-8 text of a Python byte literal such as `b'Solve 2*x = 4.\\n'`; None if `text` is not one.

    The whole text must be one literal: `b'a' + b'b'` is an expression.
    """
    if not text.lstrip().startswith(("b'", 'b"')) or not _BYTE_LITERAL.fullmatch(text):
        return None
    try:
        value = ast.literal_eval(text.strip())
        return value.decode() if isinstance(value, bytes) else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None


def check_text(text: str, part: str) -> None:
    """Raises RejectedRow if a text contains lone surrogates or control characters, or is a byte literal.

    Args:
        text: the text to check.
        part: the part of the row that the text comes from; quoted in the detail.
    """
    for start in range(0, len(text), _PIECE):
        _check_characters(text[start : start + _PIECE] if len(text) > _PIECE else text, part, start)
    if text[:200].lstrip()[:2] in ("b'", 'b"') and decode_byte_literal(text) is not None:
        raise RejectedRow("byte literal", f"{part} is {text.strip()[:40]!r}")


def _check_characters(text: str, part: str, start: int) -> None:
    encoded = _encode(text, part)
    # Deleting bytes and comparing lengths is thirty times faster than searching with a regular expression
    if len(encoded.translate(None, _CONTROL_BYTES)) != len(encoded) or (not text.isascii() and b"\xc2" in encoded):
        control = _CONTROL.search(text)
        if control:
            place = f"U+{ord(control[0]):04X} at character {start + control.start()}"
            raise RejectedRow("control character", f"{part} has {place}")


def _encode(text: str, part: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # JSON can contain a lone surrogate
        raise RejectedRow("invalid Unicode", f"{part} has a lone surrogate") from None


def check_messages(messages: Sequence[dict]) -> None:
    """Raises RejectedRow unless user and assistant alternate, after an optional system message."""
    if not messages:
        raise RejectedRow("no messages")
    offset = 1 if messages[0].get("role") == "system" else 0
    for number, turn in enumerate(messages):
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise unknown_role(number, role, ROLES)
        if not isinstance(content, str):
            raise RejectedRow("wrong type", f"message {number} ({role}) has content of type {type(content).__name__}")
        _encode(content, f"message {number}")
        expected = ("user", "assistant")[(number - offset) % 2]
        if number >= offset and role != expected:
            raise RejectedRow("wrong order", f"message {number} is from {role!r}, expected {expected!r}")


def _check_document(row: dict) -> None:
    if not row["text"] or row["text"].isspace():
        raise RejectedRow("empty text")
    check_text(row["text"], "the text")


def _check_conversation(row: dict) -> None:
    _check_turns(row["messages"])
    if not any(turn["role"] == "assistant" and is_trained(turn) for turn in row["messages"]):
        raise RejectedRow("no reply is learned", "the marks on the turns leave out all of them")


def _check_turns(messages: Sequence[dict]) -> None:
    check_messages(messages)
    if not any(turn["role"] == "assistant" for turn in messages):
        raise RejectedRow("no assistant turn")
    for number, turn in enumerate(messages):
        if turn["role"] != "system" and not turn["content"].strip():
            raise RejectedRow("empty reply" if turn["role"] == "assistant" else "empty question", f"message {number}")
        check_text(turn["content"], f"message {number} ({turn['role']})")


def _check_preference(row: dict) -> None:
    prompt = row["prompt"]
    for side in ("chosen", "rejected"):
        try:
            _check_turns([*prompt, *row[side]])
            if not all(map(is_trained, row[side])):
                raise RejectedRow("no reply is learned", "the marks on the turns leave it out")
        except RejectedRow as rejected_row:
            detail = f"{side}: {rejected_row.detail}" if rejected_row.detail else side
            raise RejectedRow(rejected_row.reason, detail) from None
    if not prompt or prompt[-1]["role"] != "user" or len(row["chosen"]) != 1 or len(row["rejected"]) != 1:
        raise RejectedRow("wrong order", "expected a prompt that ends with the user, one chosen and one rejected reply")
    if row["chosen"][0]["content"].strip() == row["rejected"][0]["content"].strip():
        raise RejectedRow("identical chosen and rejected")


def _check_question(row: dict) -> None:
    _check_turns([*row["messages"], message("assistant", row["answer"])])


#: For each kind of row, the function that raises RejectedRow if a row cannot be used.
CHECKS: dict[str, Callable[[dict], None]] = {
    "document": _check_document,
    "conversation": _check_conversation,
    "preference": _check_preference,
    "question": _check_question,
}


def row_text(row: dict) -> str:
    """The whole text of a row of any kind, for hashing and filtering."""
    if "text" in row:
        return row["text"]
    parts = [row["messages"]] if "messages" in row else row.values()
    return "\n".join(turn["content"] for part in parts for turn in part)
