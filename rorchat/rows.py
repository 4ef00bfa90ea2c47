"""The four rows that pass from here to every later stage, and what makes a row unusable.

document      {"text": str}
conversation  {"messages": [{"role": "system"|"user"|"assistant", "content": str}, ...]}
preference    {"prompt": [messages], "chosen": [message], "rejected": [message]}
question      {"messages": [messages], "answer": str, "alternatives": [str], "topic": str}: a reply that says one of the
              alternatives to the answer is wrong; the topic says how replies are judged (rorchat/training/rewards.py)
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

ROLES = ("system", "user", "assistant")
KINDS = ("document", "conversation", "preference", "question")
DETAIL = 300  # characters of a reject's detail: a key may be as long as a file
# What datasets call the three roles; ShareGPT's files alone use most of these.
ROLE_NAMES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "bot": "assistant",
    "model": "assistant",
}  # fmt: skip

_BYTE_LITERAL = re.compile(r"""\s*b(['"])(?:[^\\]|\\.)*?\1\s*""", re.DOTALL)
# C0 but for tab, line feed, vertical tab, form feed and carriage return, which are white space; and DEL
_CONTROL_BYTES = bytes(set(range(32)) - {9, 10, 11, 12, 13} | {127})
_PIECE = 2**20  # characters
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # the same and C1, without U+0085, a line end


class RejectedRow(ValueError):
    """A row that cannot be used. `reason` is counted, `detail` says which part of the row it is about."""

    def __init__(self, reason: str, detail: str = ""):
        detail = _one_line(detail)
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def _one_line(text: str) -> str:
    """A text that may hold anything as one line of at most DETAIL characters that a terminal can take."""
    cut = text if len(text) <= DETAIL else text[:DETAIL] + "..."
    return cut if cut.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


@dataclass
class RepairedRow:
    """What a source's `convert` returns for a row that it had to mend: the row, and what was done, which is counted."""

    row: dict
    repair: str


def get_text(row: object, key: str) -> str:
    """`row[key]`, which must be a string.

    Raises:
        Reject: the row is no object, has no such key, or holds something else there.
    """
    if not isinstance(row, dict):
        raise RejectedRow("wrong type", f"a row is a {type(row).__name__}, expected an object with {key!r}")
    if key not in row:
        raise RejectedRow("missing field", f"no {key!r} among {', '.join(map(str, list(row)[:8]))}")
    if row[key] is None:
        raise RejectedRow("empty text", f"{key!r} is null")
    if not isinstance(row[key], str):
        raise RejectedRow("wrong type", f"{key!r} is of type {type(row[key]).__name__}, expected text")
    return row[key]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def exchange(question: str, answer: str) -> dict:
    """A conversation of one question and one answer."""
    return {"messages": [message("user", question), message("assistant", answer)]}


def get_instruction(row: dict) -> str:
    """The question of an Alpaca row: its instruction and, after an empty line, its input.

    Raises:
        Reject: there is no instruction.
    """
    instruction = get_text(row, "instruction").strip()
    # 59 of 5,000 Alpaca rows say so where others leave it empty: "<noinput>", "No input.", "[noinput]", ...
    given = get_text(row, "input").strip() if row.get("input") is not None else ""
    if "".join(filter(str.isalpha, given)).lower() in ("noinput", "noinputneeded", "noinputrequired"):
        given = ""
    if not instruction:
        raise RejectedRow("empty question", "instruction")
    return f"{instruction}\n\n{given}" if given else instruction


def normalize_messages(turns: object) -> list[dict[str, str]]:
    """Messages from `[{"role", "content"}]` or ShareGPT's `[{"from", "value"}]`.

    Raises:
        Reject: a turn has neither form or a role of no known name.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RejectedRow("wrong type", f"messages are of type {type(turns).__name__}, expected a list")
    messages = []
    for number, turn in enumerate(turns):
        try:
            role = get_text(turn, "role" if isinstance(turn, dict) and "role" in turn else "from")
            content = get_text(turn, "content" if "content" in turn else "value")
        except RejectedRow as reject:
            raise RejectedRow(reject.reason, f"message {number}: {reject.detail}") from None
        if role.lower() not in ROLE_NAMES:
            raise RejectedRow(
                "unknown role", f"message {number} has the role {role!r}; known are {', '.join(ROLE_NAMES)}"
            )
        messages.append(message(ROLE_NAMES[role.lower()], content))
    return messages


def decode_byte_literal(text: str) -> str | None:
    """What a Python byte literal such as `b'Solve 2*x = 4.\\n'` spells, decoded as UTF-8; None if `text` is none.

    Only a text that is one literal from end to end counts: `b'a' + b'b'` is an expression, and stays as it is.
    """
    if not text.lstrip().startswith(("b'", 'b"')) or not _BYTE_LITERAL.fullmatch(text):
        return None
    try:
        value = ast.literal_eval(text.strip())
        return value.decode() if isinstance(value, bytes) else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None


def check_text(text: str, where: str) -> None:
    """Raises Reject for what no tokenizer takes or no reader wants: half characters, control characters, byte literals.

    Args:
        where: the part of the row that it is, for the reject's detail.
    """
    for start in range(0, len(text), _PIECE):  # so that a text of 100 MB is not copied whole
        _check_characters(text[start : start + _PIECE] if len(text) > _PIECE else text, where, start)
    if text[:200].lstrip()[:2] in ("b'", 'b"') and decode_byte_literal(text) is not None:
        raise RejectedRow("byte literal", f"{where} is {text.strip()[:40]!r}")


def _check_characters(text: str, where: str, first: int) -> None:
    """Raises Reject for what no text should have, in a piece of one that begins at character `first`."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise RejectedRow("invalid Unicode", f"{where} has half of a surrogate pair") from None
    # Deleting bytes and looking at the length is thirty times faster than a search by a regular expression
    if len(encoded.translate(None, _CONTROL_BYTES)) != len(encoded) or (not text.isascii() and b"\xc2" in encoded):
        found = _CONTROL.search(text)
        if found:
            raise RejectedRow(
                "control character", f"{where} has U+{ord(found[0]):04X} at character {first + found.start()}"
            )


def check_messages(messages: Sequence[dict]) -> None:
    """Raises Reject unless `messages` is an optional system message and then user and assistant in turn."""
    if not messages:
        raise RejectedRow("no messages")
    offset = 1 if messages[0].get("role") == "system" else 0
    for number, turn in enumerate(messages):
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise RejectedRow("unknown role", f"message {number} has the role {role!r}; allowed are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise RejectedRow("wrong type", f"message {number} ({role}) has content of type {type(content).__name__}")
        check_unicode(content, f"message {number}")
        expected = ("user", "assistant")[(number - offset) % 2]
        if number >= offset and role != expected:
            raise RejectedRow("wrong order", f"message {number} is from {role!r}, expected {expected!r}")


def check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RejectedRow("invalid Unicode", f"{where} has half of a surrogate pair") from None


def check_document(row: dict) -> None:
    if not row["text"] or row["text"].isspace():
        raise RejectedRow("empty text")
    check_text(row["text"], "the text")


def check_conversation(row: dict) -> None:
    messages = row["messages"]
    check_messages(messages)
    if not any(turn["role"] == "assistant" for turn in messages):
        raise RejectedRow("no assistant turn")
    for number, turn in enumerate(messages):
        if turn["role"] != "system" and not turn["content"].strip():
            raise RejectedRow("empty reply" if turn["role"] == "assistant" else "empty question", f"message {number}")
        check_text(turn["content"], f"message {number} ({turn['role']})")


def check_preference(row: dict) -> None:
    prompt = row["prompt"]
    for side in ("chosen", "rejected"):
        try:
            check_conversation({"messages": [*prompt, *row[side]]})
        except RejectedRow as reject:
            raise RejectedRow(reject.reason, f"{side}: {reject.detail}" if reject.detail else side) from None
    if not prompt or prompt[-1]["role"] != "user" or len(row["chosen"]) != 1 or len(row["rejected"]) != 1:
        raise RejectedRow("wrong order", "a preference is a prompt that ends with the user and one reply on each side")
    if row["chosen"][0]["content"].strip() == row["rejected"][0]["content"].strip():
        raise RejectedRow("identical chosen and rejected")


def check_question(row: dict) -> None:
    check_conversation({"messages": [*row["messages"], message("assistant", row["answer"])]})


CHECKS = {
    "document": check_document,
    "conversation": check_conversation,
    "preference": check_preference,
    "question": check_question,
}


def row_text(row: dict) -> str:
    """All text of a row of any kind: what a hash of it is taken of, and what filters look at."""
    if "text" in row:
        return row["text"]
    parts = [row["messages"]] if "messages" in row else row.values()
    return "\n".join(turn["content"] for part in parts for turn in part)
