"""OpenAssistant (OASST1): 10k trees of conversation by volunteers, 35 languages. Köpf et al. 2023, arXiv:2304.07327.

A conversation is the path of best-ranked replies from a tree's prompt down; messages that were deleted, that reviewers
refused or that most of them called spam are passed over, with all that answers them. Read are the release (a tree a
line), the Hub's messages, of which those of one tree follow one another, and Tulu's conversations.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby

from rorchat.rows import RejectedRow, get_text
from rorchat.sources import messages

KIND = "conversation"
LICENCE = "Apache-2.0"
SIZE = "88,838 messages in 10,364 trees, 84,437 of them for training"
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
    """The flat messages of a tree as one list, at the place of the first; anything else as it is."""
    for tree, group in groupby(rows, key=_tree_of):
        if tree is None:
            yield from group
        else:
            places, flat = zip(*group, strict=True)
            yield places[0], list(flat)


def _tree_of(row: tuple[str, object]) -> str | None:
    tree = row[1].get("message_tree_id") if isinstance(row[1], dict) and "message_id" in row[1] else None
    return tree if isinstance(tree, str) else None


def convert(row: dict | list) -> dict:
    """A tree, the messages of one, or a conversation -> messages; a last question nobody answers is left out."""
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
    best, turns = _best(replies_to.get(None)), []
    while best:
        turns.append({"role": get_text(best, "role"), "content": get_text(best, "text")})
        # A flat message is taken out when it is asked for, so that no circle of parents can be walked twice
        best = _best(best["replies"] if "replies" in best else replies_to.pop(get_text(best, "message_id"), None))
    if not turns:
        raise RejectedRow("missing field", "no usable message that begins the tree")
    return messages.convert(turns)


def _best(replies: object) -> dict | None:
    usable = [reply for reply in replies if _usable(reply)] if isinstance(replies, list) else []
    return min(usable, key=lambda reply: reply["rank"] if type(reply.get("rank")) is int else len(usable), default=None)


def _usable(reply: object) -> bool:
    if not isinstance(reply, dict) or reply.get("deleted") or reply.get("review_result") is False:
        return False
    labels = reply.get("labels")
    if not isinstance(labels, dict):
        return True
    if isinstance(labels.get("name"), list) and isinstance(labels.get("value"), list):  # the Hub's columns
        spam = [value for name, value in zip(labels["name"], labels["value"], strict=False) if name == "spam"]
    else:
        spam = [labels["spam"].get("value")] if isinstance(labels.get("spam"), dict) else []
    return not any(isinstance(value, int | float) and value >= 0.5 for value in spam)
