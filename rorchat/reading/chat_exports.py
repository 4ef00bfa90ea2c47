"""Reads the JSON exports of ChatGPT, Telegram, Discord (DiscordChatExporter), Messenger and Instagram."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rorchat.reading.chat_logs import ExportedChat, LogMessage, place_of, split_log
from rorchat.reading.messages import join_text
from rorchat.reading.slices import Row
from rorchat.reading.turns import JOINED, is_chat
from rorchat.rows import RejectedRow, message

NOT_SHOWN = "messages of tools and thoughts left out"


def read_export(place: str, row: dict) -> Iterator[Row] | None:
    """The conversations of an export; None if the row is not one."""
    if isinstance(row.get("mapping"), dict) and "current_node" in row:
        return iter([(place, _read_chatgpt(row))])
    if _is_telegram(row):
        return _read_telegram(place, row)
    if chats := _list_telegram_chats(row):
        return _read_telegram_chats(place, chats)
    if _is_meta(row):
        return _read_meta(place, row)
    if _is_discord(row):
        return _read_discord(place, row)
    return None


def expand_container(place: str, row: dict) -> Iterator[Row] | None:
    """The conversations of an object that holds one list of them, or one conversation under each key.

    None for other objects.
    """
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


def _read_chatgpt(row: dict) -> ExportedChat | RejectedRow:
    """The messages on the path from the root of the tree to its current node: the replies that were last shown.

    Messages of tools and those that call them are left out. A message of the user that is not only text is an error.
    """
    nodes, node = row["mapping"], row["current_node"]
    path: list[Any] = []
    while isinstance(node, str) and isinstance(nodes.get(node), dict) and len(path) < len(nodes):
        path.append(nodes[node].get("message"))
        node = nodes[node].get("parent")
    if node is not None or not path:
        return RejectedRow("damaged tree", f"no way from the last message to the first: {node!r} is not a message")
    turns: list[dict[str, str]] = []
    repairs: dict[str, None] = {}
    for entry in filter(None, reversed(path)):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), dict) for key in ("author", "content")):
            return RejectedRow("wrong type", "a message of the tree has no author or content")
        role, content = str(entry["author"].get("role")), entry["content"]
        text = join_text(content.get("parts")) if content.get("content_type") in ("text", "multimodal_text") else None
        if role == "user" and text is None and content.get("content_type") != "user_editable_context":
            return RejectedRow("not text", f"a message of the user is {content.get('content_type')}")
        is_shown = role == "user" or (role == "assistant" and entry.get("recipient", "all") == "all")
        if is_shown and text and text.strip():
            repairs |= dict.fromkeys([JOINED] if _append(turns, role, text) else [])
        elif role in ("assistant", "tool") and text != "":
            repairs[NOT_SHOWN] = None
    return ExportedChat(turns, "ChatGPT", repairs=list(repairs))


def _append(turns: list[dict[str, str]], role: str, text: str) -> bool:
    """Appends a message, or joins it with the one before it. Returns whether it was joined."""
    if not turns or turns[-1]["role"] != role:
        turns.append(message(role, text))
        return False
    turns[-1]["content"] += f"\n\n{text}"
    return True


# -- Telegram --------------------------------------------------------------------------------------------------------


def _is_telegram(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        return False
    return "type" in row and any(
        isinstance(m, dict) and m.get("type") == "message" and "date" in m for m in row["messages"]
    )


def _list_telegram_chats(row: dict) -> list[tuple[str, object]]:
    """(the place in the export, chat) of all chats, those that were left included; empty if it is not an export."""
    kinds = {"chats": "chat", "left_chats": "left chat"}
    exported = {name: row[key].get("list") for key, name in kinds.items() if isinstance(row.get(key), dict)}
    lists = {name: chats for name, chats in exported.items() if isinstance(chats, list)}
    return [(f"{name} {number}", chat) for name, chats in lists.items() for number, chat in enumerate(chats)]


def _read_telegram_chats(place: str, chats: list[tuple[str, object]]) -> Iterator[Row]:
    for name, chat in chats:
        if isinstance(chat, dict) and _is_telegram(chat):
            yield from _read_telegram(f"{place}, {name}", chat)
        else:
            yield f"{place}, {name}", RejectedRow("no messages", "no message of a person in the chat")


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
    return isinstance(messages, list) and any(
        isinstance(m, dict) and m.keys() >= {"timestamp_ms", "sender_name"} for m in messages
    )


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
    yield from split_log("Messenger", sorted(reversed(messages), key=lambda message: message.time))


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
    """The time of ISO 8601, in UTC if it has an offset."""
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else None
        return time.astimezone(UTC).replace(tzinfo=None) if time and time.tzinfo else time
    except (ValueError, OverflowError):
        return None
