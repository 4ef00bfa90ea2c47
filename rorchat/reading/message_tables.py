"""Tables with one message in each row -> conversations: trees of OpenAssistant, utterances of EmpatheticDialogues.

A tree becomes one conversation: the path of best-ranked replies that begins with its root. Messages that were deleted,
rejected by reviewers or mostly labelled as spam are skipped together with their replies.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rorchat.reading.chat_logs import ExportedChat
from rorchat.reading.messages import is_empty, read_flag
from rorchat.reading.slices import Row
from rorchat.reading.text import read_lines
from rorchat.rows import RejectedRow, get_text, message

TREE_COLUMNS = ("message_id", "role", "text")
PARENT_COLUMNS = ("parent_id", "message_tree_id")  # one of them is in every message
TREES = "trees of OpenAssistant"
UTTERANCE_COLUMNS = ("conv_id", "utterance_idx", "speaker_idx", "utterance")
_SCORES = re.compile(r"[\d|_]+")  # in the column after the utterance


def is_tree_message(row: object) -> bool:
    """Whether a row is one message of a tree."""
    if not isinstance(row, dict) or not any(column in row for column in PARENT_COLUMNS):
        return False
    return all(column in row for column in TREE_COLUMNS)


def is_tree(row: dict) -> bool:
    """Whether a row is a tree of messages, as in OpenAssistant's release."""
    return isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]


def is_utterance(row: object) -> bool:
    """Whether a row is one utterance of a numbered dialogue."""
    return isinstance(row, dict) and all(column in row for column in UTTERANCE_COLUMNS)


def gather_trees(rows: Iterable[Row]) -> Iterator[Row]:
    """Joins the messages of a tree, which need not be adjacent, into one list at the place of the first.

    Other rows are unchanged, and come first.
    """
    placed: list[Row] = []
    for row in rows:
        if is_tree_message(row[1]):
            placed.append(row)
        else:
            yield row
    parents = {_get_name(row, "message_id"): _get_name(row, "parent_id") for _, row in placed}
    roots: dict[str, str] = {}
    trees: dict[str, tuple[str, list[dict]]] = {}
    for place, row in placed:
        tree = _get_name(row, "message_tree_id") or _find_root(_get_name(row, "message_id"), parents, roots)
        trees.setdefault(tree, (place, []))[1].append(row)
    yield from trees.values()


def _get_name(row: dict, key: str) -> str:
    """The id of a message; empty if it is missing. Tables write numbers beside missing ones as 5.0."""
    value = row.get(key)
    return "" if is_empty(value) else str(value).strip().removesuffix(".0")


def _find_root(name: str, parents: dict[str, str], roots: dict[str, str]) -> str:
    """The first of the ancestors of a message. Those that are known are in `roots`."""
    path: dict[str, None] = {}
    while name not in roots and name not in path and parents.get(name):
        path[name] = None
        name = parents[name]
    root = roots.get(name, name)
    roots.update(dict.fromkeys(path, root))
    return root


def read_tree(row: dict | list) -> list[dict[str, Any]]:
    """The turns of the best path in a tree, or in a list of all messages of a tree.

    Raises:
        RejectedRow: no usable message is at the root, or one lacks its role or text.
    """
    replies_to: dict[str, list] = {}
    if isinstance(row, list):
        for reply in row:
            if not isinstance(reply, dict):
                raise RejectedRow("wrong type", f"a message of a tree is a {type(reply).__name__}, expected an object")
            replies_to.setdefault(_get_name(reply, "parent_id"), []).append(reply)
    else:
        replies_to[""] = [row.get("prompt")]
    reply, turns = _choose_best(replies_to.get("")), []
    while reply:
        turns.append(message(get_text(reply, "role"), get_text(reply, "text")))
        # pop, because a cycle of parent ids would never end otherwise
        replies = reply["replies"] if "replies" in reply else replies_to.pop(_get_name(reply, "message_id"), None)
        reply = _choose_best(replies)
    if not turns:
        raise RejectedRow("missing field", "no usable message at the root of the tree")
    return turns


def _choose_best(replies: object) -> dict | None:
    usable = [reply for reply in replies if _is_usable(reply)] if isinstance(replies, list) else []
    return min(usable, key=lambda reply: _get_rank(reply, len(usable)), default=None)


def _get_rank(reply: dict, last: int) -> float:
    """The rank of a reply, from 0 for the best; `last` without one."""
    rank = reply.get("rank")
    try:
        number = float(rank) if isinstance(rank, int | float | str) and not isinstance(rank, bool) else float("nan")
    except (ValueError, OverflowError):
        return last
    return number if number >= 0 else last


def _is_usable(reply: object) -> bool:
    if not isinstance(reply, dict) or read_flag(reply.get("deleted")) or read_flag(reply.get("review_result")) is False:
        return False
    labels = reply.get("labels")
    if not isinstance(labels, dict):
        return True
    if isinstance(labels.get("name"), list) and isinstance(labels.get("value"), list):  # on the Hub
        spam = [value for name, value in zip(labels["name"], labels["value"], strict=False) if name == "spam"]
    else:
        spam = [labels["spam"].get("value")] if isinstance(labels.get("spam"), dict) else []
    return not any(isinstance(value, int | float) and value >= 0.5 for value in spam)


def read_trees(rows: Iterable[Row]) -> Iterator[Row]:
    """The conversations of a table of messages with their parents."""
    for place, row in gather_trees(rows):
        yield place, read_best_path(row) if isinstance(row, list) else row


def read_best_path(tree: dict | list) -> ExportedChat | RejectedRow:
    """The conversation that a tree becomes, or the reason to reject it."""
    try:
        return ExportedChat(read_tree(tree), TREES)
    except RejectedRow as rejected_row:
        return rejected_row


# -- utterances ------------------------------------------------------------------------------------------------------


def read_utterances(path: Path) -> Iterator[Row] | None:
    """The rows of a CSV file as EmpatheticDialogues has it; None for another file.

    It is not CSV: commas in texts are written as `_comma_`, and quotation marks are part of the texts. Copies that were
    written by a table program are read as well.
    """
    lines = read_lines(path)
    _, header = next(lines, ("", ""))
    columns = header.strip().split(",") if isinstance(header, str) else []
    if not set(UTTERANCE_COLUMNS) <= set(columns):
        return None
    return ((place, _split_utterance(line, columns)) for place, line in lines)


def _split_utterance(line: str | RejectedRow, columns: list[str]) -> dict | RejectedRow:
    if isinstance(line, RejectedRow):
        return line
    values, as_table = line.split(","), next(csv.reader([line]), [])
    is_quoted = any(value.startswith('"') and value.endswith('"') for value in values)
    if len(as_table) == len(columns) and (is_quoted or len(values) != len(columns)):
        values = as_table
    row = dict(zip(columns, values, strict=False))
    has_replies = len(values) == len(columns) + 1 and _SCORES.fullmatch(row.get("selfeval", ""))  # in the test set
    if len(values) == len(columns) or has_replies:
        return row
    return RejectedRow("not CSV", f"{len(values)} fields, but the header has {len(columns)}")


def join_utterances(rows: Iterable[Row]) -> Iterator[Row]:
    """The dialogues of utterances in order, at the place of the first."""
    for name, group in groupby(rows, key=lambda row: row[1]["conv_id"] if is_utterance(row[1]) else None):
        if name is None:
            yield from group
        else:
            places, utterances = zip(*group, strict=True)
            yield places[0], _join_dialogue(list(utterances))


def _join_dialogue(utterances: list[dict]) -> dict | RejectedRow:
    try:
        numbers = [int(row["utterance_idx"]) for row in utterances]
    except (ValueError, TypeError, OverflowError):
        return RejectedRow("wrong type", "'utterance_idx' is not a number")
    if sorted(numbers) != list(range(1, len(numbers) + 1)):
        return RejectedRow("utterance missing", f"the utterances have the numbers {', '.join(map(str, numbers))}")
    ordered = sorted(utterances, key=lambda row: int(row["utterance_idx"]))
    turns = [{"speaker": row["speaker_idx"], "text": _restore_commas(row["utterance"])} for row in ordered]
    about = {name: _restore_commas(ordered[0][name]) for name in ("context", "prompt") if name in ordered[0]}
    return {"turns": turns, **about}


def _restore_commas(text: object) -> object:
    return text.replace("_comma_", ",") if isinstance(text, str) else text
