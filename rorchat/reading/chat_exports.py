"""Reads the JSON exports of ChatGPT, Telegram, Discord (DiscordChatExporter), Messenger and Instagram."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rorchat.reading.chat_logs import LogMessage, place_of, split_log
from rorchat.reading.slices import Row
from rorchat.reading.turns import is_chat, join_text
from rorchat.rows import RejectedRow, message


def read_export(place: str, row: dict) -> Iterator[Row] | None:
    """The conversations of an export; None if the row is not one."""
    if isinstance(row.get("mapping"), dict) and "current_node" in row:
        return iter([(place, _read_chatgpt(row))])
    if _is_telegram(row):
        return _read_telegram(place, row)
    chats = row.get("chats")
    if isinstance(chats, dict) and isinstance(chats.get("list"), list):
        return _read_telegram_chats(place, chats["list"])
    if _is_meta(row):
        return _read_meta(place, row)
    if _is_discord(row):
        return _read_discord(place, row)
    return None


def expand_container(place: str, row: dict) -> Iterator[Row] | None:
    """The conversations of an object with one list of them, or of one by its names; None for other objects."""
    if is_chat(row):
        return None
    lists = [(key, value) for key, value in row.items() if isinstance(value, list) and value]
    if len(lists) == 1 and all(isinstance(value, dict | list) for value in lists[0][1]) and is_chat(lists[0][1][0]):
        key, values = lists[0]
        return ((f"{place}, {key}[{number}]", value) for number, value in enumerate(values))
    if row and all(is_chat(value) for value in row.values()):
        return ((f"{place}, {key!r}", value) for key, value in row.items())
    return None


# -- ChatGPT ---------------------------------------------------------------------------------------------------------


def _read_chatgpt(row: dict) -> dict | RejectedRow:
    """The messages on the path from the root of the tree to its current node: the replies that were last shown.

    Messages of tools and those that call them are left out. A message of the user that is not only text is an error.
    """
    nodes, node = row["mapping"], row["current_node"]
    path: list[Any] = []
    while isinstance(node, str) and isinstance(nodes.get(node), dict) and len(path) < len(nodes):
        path.append(nodes[node].get("message"))
        node = nodes[node].get("parent")
    turns: list[dict[str, str]] = []
    for entry in filter(None, reversed(path)):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), dict) for key in ("author", "content")):
            return RejectedRow("wrong type", "a message of the tree has no author or content")
        role, content = str(entry["author"].get("role")), entry["content"]
        text = join_text(content.get("parts")) if content.get("content_type") in ("text", "multimodal_text") else None
        if role == "user" and text is None and content.get("content_type") != "user_editable_context":
            return RejectedRow("not text", f"a message of the user is {content.get('content_type')}")
        is_shown = role == "user" or (role == "assistant" and entry.get("recipient", "all") == "all")
        if is_shown and text and text.strip():
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += f"\n\n{text}"
            else:
                turns.append(message(role, text))
    return {"messages": turns}


# -- Telegram --------------------------------------------------------------------------------------------------------


def _is_telegram(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        return False
    return "type" in row and any(
        isinstance(m, dict) and m.get("type") == "message" and "date" in m for m in row["messages"]
    )


def _read_telegram_chats(place: str, chats: list) -> Iterator[Row]:
    for number, chat in enumerate(chats):
        if _is_telegram(chat):
            yield from _read_telegram(f"{place}, chat {number}", chat)


def _read_telegram(place: str, row: dict) -> Iterator[Row]:
    """Service messages (calls, pinned messages) are left out."""
    messages = []
    for number, entry in enumerate(row["messages"]):
        if isinstance(entry, dict) and entry.get("type") == "message":
            where, time = place_of(place, number), _parse_time(entry.get("date"))
            speaker = entry.get("from") or entry.get("from_id")
            if time is None or not isinstance(speaker, str):
                yield where, RejectedRow("missing field", "a message needs 'date' and 'from'")
            else:
                messages.append(
                    LogMessage(where, time, speaker, join_text(entry.get("text", entry.get("text_entities"))) or "")
                )
    yield from split_log("Telegram", messages)


# -- Messenger and Instagram -----------------------------------------------------------------------------------------


def _is_meta(row: dict) -> bool:
    messages = row.get("messages")
    return isinstance(messages, list) and any(isinstance(m, dict) and "timestamp_ms" in m for m in messages)


def _read_meta(place: str, row: dict) -> Iterator[Row]:
    """The newest message is first in these files, and the bytes of UTF-8 are written as characters."""
    messages = []
    for number, entry in enumerate(row["messages"]):
        where, milliseconds = place_of(place, number), entry.get("timestamp_ms") if isinstance(entry, dict) else None
        speaker = _decode(entry.get("sender_name")) if isinstance(entry, dict) else ""
        if type(milliseconds) is not int or not speaker or not 0 <= milliseconds < 2**42:
            yield where, RejectedRow("missing field", "a message needs 'timestamp_ms' and 'sender_name'")
            continue
        time = datetime.fromtimestamp(milliseconds / 1000, UTC)
        messages.append(LogMessage(where, time, speaker, _decode(entry.get("content"))))
    yield from split_log("Messenger", sorted(messages, key=lambda message: message.time))


def _decode(text: object) -> str:
    """A text whose characters may be the bytes of UTF-8; empty if it is not a text."""
    if not isinstance(text, str):
        return ""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


# -- Discord ---------------------------------------------------------------------------------------------------------


def _is_discord(row: dict) -> bool:
    if not isinstance(row.get("channel"), dict) or not isinstance(row.get("messages"), list):
        return False
    return any(isinstance(m, dict) and "timestamp" in m and "author" in m for m in row["messages"])


def _read_discord(place: str, row: dict) -> Iterator[Row]:
    """Messages other than `Default` and `Reply` are notes of Discord and left out."""
    messages = []
    for number, entry in enumerate(row["messages"]):
        if isinstance(entry, dict) and entry.get("type", "Default") in ("Default", "Reply"):
            where, time = place_of(place, number), _parse_time(entry.get("timestamp"))
            author = entry["author"] if isinstance(entry.get("author"), dict) else {}
            speaker = author.get("name")
            if speaker and author.get("isBot"):
                speaker = f"{speaker} (bot)"  # the name then says who the assistant is
            if time is None or not isinstance(speaker, str):
                yield where, RejectedRow("missing field", "a message needs 'timestamp' and 'author'")
            else:
                messages.append(LogMessage(where, time, speaker, join_text(entry.get("content")) or ""))
    yield from split_log("Discord", messages)


def _parse_time(value: object) -> datetime | None:
    """The local time of ISO 8601; its offset is dropped, because pauses are measured to hours."""
    try:
        return datetime.fromisoformat(value).replace(tzinfo=None) if isinstance(value, str) else None
    except ValueError:
        return None
