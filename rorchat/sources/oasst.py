"""OpenAssistant (OASST1): 10k conversation trees by volunteers in 35 languages. Köpf et al. 2023, arXiv:2304.07327.

A conversation is the path of best-ranked replies that begins with the prompt of a tree. Messages that were deleted,
rejected by reviewers or mostly labelled as spam are skipped together with their replies. Reads the release (one tree
per line), the Hub's messages (those of one tree are adjacent) and Tulu's conversations.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby

from rorchat.rows import RejectedRow, get_text, message
from rorchat.sources import messages

KIND = "conversation"
LICENCE = "Apache-2.0"
SIZE = "88,838 messages (84,437 of them for training) in 10,364 trees"
HUB = {"path": "OpenAssistant/oasst1", "split": "train"}
FILES = ("*ready.trees.jsonl", "*.trees.jsonl", "*ready.messages.jsonl", "**/train-*.parquet", "*.jsonl")
RAW = [
    {
        "message_tree_id": "a",
        "tree_state": "ready_for_export",
        "prompt": {
            "message_id": "a",
            "text": "What is red?",
            "role": "prompter",
            "replies": [
                {"message_id": "b", "text": "No.", "role": "assistant", "rank": 1, "replies": []},
                {"message_id": "c", "text": "A colour.", "role": "assistant", "rank": 0, "replies": []},
            ],
        },
    },
    [
        {"message_id": "a", "message_tree_id": "a", "parent_id": None, "text": "What is red?", "role": "prompter"},
        {"message_id": "b", "message_tree_id": "a", "parent_id": "a", "text": "A colour.", "role": "assistant"},
    ],
    {"messages": [{"content": "What is red?", "role": "user"}, {"content": "A colour.", "role": "assistant"}]},
]


def gather(rows: Iterable[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Joins the messages of a tree into one list, with the place of the first message. Other rows are unchanged."""
    for tree, group in groupby(rows, key=_get_tree_id):
        if tree is None:
            yield from group
        else:
            places, flat = zip(*group, strict=True)
            yield places[0], list(flat)


def _get_tree_id(row: tuple[str, object]) -> str | None:
    tree = row[1].get("message_tree_id") if isinstance(row[1], dict) and "message_id" in row[1] else None
    return tree if isinstance(tree, str) else None


def convert(row: dict | list) -> dict:
    """A tree, the messages of a tree, or a conversation -> messages, without an unanswered question at the end."""
    if isinstance(row, dict) and "messages" in row:
        return messages.convert(row)
    replies_to: dict[str | None, list] = {}
    if isinstance(row, list):
        for reply in row:
            parent = (
                None if isinstance(reply, dict) and reply.get("parent_id") is None else get_text(reply, "parent_id")
            )
            replies_to.setdefault(parent, []).append(reply)
    elif isinstance(row, dict):
        replies_to[None] = [row.get("prompt")]
    else:
        raise RejectedRow("wrong type", f"a row is a {type(row).__name__}, expected a tree")
    reply, turns = _choose_best(replies_to.get(None)), []
    while reply:
        turns.append(message(get_text(reply, "role"), get_text(reply, "text")))
        # pop, because a cycle of parent ids would never end otherwise
        replies = reply["replies"] if "replies" in reply else replies_to.pop(get_text(reply, "message_id"), None)
        reply = _choose_best(replies)
    if not turns:
        raise RejectedRow("missing field", "no usable message at the root of the tree")
    return messages.convert(turns)


def _choose_best(replies: object) -> dict | None:
    usable = [reply for reply in replies if _is_usable(reply)] if isinstance(replies, list) else []
    return min(usable, key=lambda reply: reply["rank"] if type(reply.get("rank")) is int else len(usable), default=None)


def _is_usable(reply: object) -> bool:
    if not isinstance(reply, dict) or reply.get("deleted") or reply.get("review_result") is False:
        return False
    labels = reply.get("labels")
    if not isinstance(labels, dict):
        return True
    if isinstance(labels.get("name"), list) and isinstance(labels.get("value"), list):  # on the Hub
        spam = [value for name, value in zip(labels["name"], labels["value"], strict=False) if name == "spam"]
    else:
        spam = [labels["spam"].get("value")] if isinstance(labels.get("spam"), dict) else []
    return not any(isinstance(value, int | float) and value >= 0.5 for value in spam)
