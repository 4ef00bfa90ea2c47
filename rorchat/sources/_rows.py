"""The three rows that pass from here to every later stage, and what makes a row unusable.

document      {"text": str}
conversation  {"messages": [{"role": "system"|"user"|"assistant", "content": str}, ...]}
preference    {"prompt": [messages], "chosen": [message], "rejected": [message]}
"""

from collections.abc import Sequence

ROLES = ("system", "user", "assistant")
KINDS = ("document", "conversation", "preference")
# What datasets call the three roles; ShareGPT's files alone use most of these.
ROLE_NAMES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip


class Reject(ValueError):
    """A row that cannot be used. `reason` is counted, `detail` says which part of the row it is about."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def text_of(row: object, key: str) -> str:
    """`row[key]`, which must be a string.

    Raises:
        Reject: the row is no object, has no such key, or holds something else there.
    """
    if not isinstance(row, dict):
        raise Reject("wrong type", f"a row is a {type(row).__name__}, expected an object with {key!r}")
    if key not in row:
        raise Reject("missing field", f"no {key!r} among {', '.join(map(str, list(row)[:8]))}")
    if not isinstance(row[key], str):
        raise Reject("wrong type", f"{key!r} is of type {type(row[key]).__name__}, expected text")
    return row[key]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def messages_of(turns: object) -> list[dict[str, str]]:
    """Messages from `[{"role", "content"}]` or ShareGPT's `[{"from", "value"}]`.

    Raises:
        Reject: a turn has neither form or a role of no known name.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise Reject("wrong type", f"messages are of type {type(turns).__name__}, expected a list")
    messages = []
    for number, turn in enumerate(turns):
        role = text_of(turn, "role" if isinstance(turn, dict) and "role" in turn else "from")
        content = text_of(turn, "content" if "content" in turn else "value")
        if role.lower() not in ROLE_NAMES:
            raise Reject("unknown role", f"message {number} has the role {role!r}; known are {', '.join(ROLE_NAMES)}")
        messages.append(message(ROLE_NAMES[role.lower()], content))
    return messages


def _check_unicode(text: str, detail: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no tokenizer takes it
        raise Reject("invalid Unicode", f"{detail} half of a surrogate pair") from None


def check_messages(messages: Sequence[dict]) -> None:
    """Raises Reject unless `messages` is an optional system message and then user and assistant in turn."""
    if not messages:
        raise Reject("no messages")
    offset = 1 if messages[0].get("role") == "system" else 0
    for number, turn in enumerate(messages):
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise Reject("unknown role", f"message {number} has the role {role!r}; allowed are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise Reject("wrong type", f"message {number} ({role}) has content of type {type(content).__name__}")
        _check_unicode(content, f"message {number} has")
        expected = ("user", "assistant")[(number - offset) % 2]
        if number >= offset and role != expected:
            raise Reject("wrong order", f"message {number} is from {role!r}, expected {expected!r}")


def check_document(row: dict) -> None:
    if not row["text"].strip():
        raise Reject("empty text")
    _check_unicode(row["text"], "the text has")


def check_conversation(row: dict) -> None:
    messages = row["messages"]
    check_messages(messages)
    if not any(turn["role"] == "assistant" for turn in messages):
        raise Reject("no assistant turn")
    for number, turn in enumerate(messages):
        if turn["role"] != "system" and not turn["content"].strip():
            raise Reject("empty reply" if turn["role"] == "assistant" else "empty question", f"message {number}")


def check_preference(row: dict) -> None:
    prompt = row["prompt"]
    for side in ("chosen", "rejected"):
        check_conversation({"messages": [*prompt, *row[side]]})
    if not prompt or prompt[-1]["role"] != "user" or len(row["chosen"]) != 1 or len(row["rejected"]) != 1:
        raise Reject("wrong order", "a preference is a prompt that ends with the user and one reply on each side")
    if row["chosen"][0]["content"].strip() == row["rejected"][0]["content"].strip():
        raise Reject("identical chosen and rejected")


CHECKS = {"document": check_document, "conversation": check_conversation, "preference": check_preference}
