"""Columns beside the turns of a row: a mark that its reply is bad, a system message, and earlier turns."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rorchat.reading.turns import (
    HISTORY_COLUMNS,
    TURN_COLUMNS,
    by_lower_name,
    find_pair,
    find_turn_column,
    pair_texts,
    parse_list,
)
from rorchat.rows import RejectedRow, alternate_turns, message
from rorchat.sources.columns import ASSISTANT_NAME

MARK_COLUMNS = ("label", "kto_tag")  # false for a bad reply: of TRL (KTO), of LLaMA-Factory
SYSTEM_COLUMNS = ("system", "system_prompt")
SECOND_SYSTEM = "a second system message left out"
_KNOWN = (*MARK_COLUMNS, *SYSTEM_COLUMNS, *HISTORY_COLUMNS)

Extra = Mapping[str, str]  # lower name -> column


def find_extra_columns(row: Any, given: Mapping[str, str]) -> Extra:
    """The columns of a raw row that say something about its turns, except those that the user has named."""
    return _find(tuple(row), tuple(given.values())) if isinstance(row, dict) else {}


@lru_cache(maxsize=256)  # most rows of a source have the same columns
def _find(names: tuple[object, ...], given: tuple[str, ...]) -> dict[str, str]:
    lower = {name.strip().lower(): name for name in reversed(names) if isinstance(name, str) and name not in given}
    return {name: lower[name] for name in _KNOWN if name in lower}


def refuse_marked(row: dict, extra: Extra) -> None:
    """Raises RejectedRow if a row is marked as a bad reply, which must not be learned."""
    for name in MARK_COLUMNS:
        if name in extra:
            value = row[extra[name]]
            if value == 0 or (isinstance(value, str) and value.strip().lower() in ("false", "0")):
                detail = f"{extra[name]!r} is {str(value).lower()}, as for bad replies in KTO"
                raise RejectedRow("marked as bad", detail)


def add_extra_turns(row: dict, extra: Extra, given: Mapping[str, str], converted: dict) -> tuple[dict, tuple[str, ...]]:
    """The converted row with the system message and the earlier turns of its raw row, and what was left out.

    A system message among the turns takes precedence over that of a column.

    Raises:
        RejectedRow: a column has another form.
    """
    turns = "prompt" if "prompt" in converted else "messages"
    own = [turn for turn in converted[turns][:1] if turn["role"] == "system"]
    contents = [*(turn["content"].strip() for turn in own), *_system_messages(row, extra)]
    contents = list(dict.fromkeys(filter(None, contents)))
    system = [message("system", content) for content in contents[:1]]
    earlier, others = _earlier_turns(row, extra, given), converted[turns][len(own) :]
    repairs = (SECOND_SYSTEM,) if len(contents) > 1 else ()
    return {**converted, turns: [*system, *earlier, *others]}, repairs


def _system_messages(row: dict, extra: Extra) -> list[str]:
    values = {extra[name]: row[extra[name]] for name in SYSTEM_COLUMNS if name in extra}
    for column, value in values.items():
        if value is not None and not isinstance(value, str):
            raise RejectedRow("no system message", f"{column!r} is of type {type(value).__name__}, expected a string")
    return [value.strip() for value in values.values() if value]


def _earlier_turns(row: dict, extra: Extra, given: Mapping[str, str]) -> list[dict[str, str]]:
    """The turns of `history` beside a question and its answer; none if the turns of the row are a list."""
    columns = [extra[name] for name in HISTORY_COLUMNS if name in extra]
    if not columns or not _has_pair({name: value for name, value in row.items() if name not in columns}, given):
        return []
    turns: list[dict[str, str]] = []
    for column in columns:
        history = parse_list(row[column])
        if history is None or history == [] or history == "":
            continue
        texts = pair_texts(history) if isinstance(history, list) else None
        if texts is None:
            raise RejectedRow(f"unknown {column!r}", "earlier turns must be a list of [question, answer]")
        turns += alternate_turns(texts)
    return turns


def _has_pair(row: dict, given: Mapping[str, str]) -> bool:
    if roles := set(given) - {ASSISTANT_NAME}:
        return "messages" not in roles
    column = find_turn_column(row)
    has_turns = column is not None and column.strip().lower() in TURN_COLUMNS
    names = by_lower_name(row)
    return not has_turns and (find_pair(row) is not None or "instances" in names or "chosen" in names)
