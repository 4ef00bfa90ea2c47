"""Columns beside the turns of a row: marks of bad replies, system messages, earlier turns, and what cannot be used."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rorchat.reading.messages import MEDIA_KEYS, is_empty, normalize_messages, read_flag
from rorchat.reading.turns import (
    HISTORY_COLUMNS,
    TURN_COLUMNS,
    are_usual,
    by_lower_name,
    find_pair,
    find_turn_column,
    pair_texts,
    parse_list,
)
from rorchat.rows import RejectedRow, alternate_turns, message, row_text
from rorchat.sources.base import Source
from rorchat.sources.columns import ASSISTANT_NAME, KNOWN_COLUMNS, PREFERENCE_COLUMNS

MARK_COLUMNS = ("label", "kto_tag")  # false for a bad reply: of TRL (KTO), of LLaMA-Factory
UNLEARNED_COLUMNS = ("weight", "train", "trainable")  # false for a row that is not learned, as on a turn
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "system_instruction")
INSTRUCTION = "instruction"  # a system message, unless it is the question
TOOL_COLUMNS = ("tools", "functions")
SECOND_SYSTEM = "a second system message left out"
#: A text of at least so many characters and words is long. An unread column is reported if most rows have a long text.
LONG_CHARACTERS, LONG_WORDS = 40, 6
_KNOWN = (
    *MARK_COLUMNS, *UNLEARNED_COLUMNS, *SYSTEM_COLUMNS, INSTRUCTION, *TOOL_COLUMNS, *MEDIA_KEYS, *HISTORY_COLUMNS,
)  # fmt: skip

Extra = Mapping[str, str]  # lower name -> column


def find_extra_columns(row: Any, given: Mapping[str, str]) -> Extra:
    """The columns of a raw row that say something about its turns, except those that the user has named."""
    return _find(tuple(row), tuple(given.values())) if isinstance(row, dict) else {}


@lru_cache(maxsize=256)  # most rows of a source have the same columns
def _find(names: tuple[object, ...], given: tuple[str, ...]) -> dict[str, str]:
    lower = {name.strip().lower(): name for name in reversed(names) if isinstance(name, str) and name not in given}
    return {name: lower[name] for name in _KNOWN if name in lower}


def refuse_marked(row: dict, extra: Extra) -> None:
    """Raises RejectedRow if a row is marked as a bad reply, or as one that is not learned."""
    for name in MARK_COLUMNS:
        if name in extra and read_flag(row[extra[name]]) is False:
            value = str(row[extra[name]]).strip().lower()
            raise RejectedRow("marked as bad", f"{extra[name]!r} is {value}, as for bad replies in KTO")
    for name in UNLEARNED_COLUMNS:
        if name in extra and read_flag(row[extra[name]]) is False:
            raise RejectedRow("marked as not learned", f"{extra[name]!r} is {str(row[extra[name]]).strip().lower()}")


def refuse_unusable(row: dict, extra: Extra) -> None:
    """Raises RejectedRow if a row has tools or pictures beside its turns, without which these are only half of it."""
    for name in (*TOOL_COLUMNS, *MEDIA_KEYS):
        if name in extra and not is_empty(row[extra[name]]):
            what = "the calls of tools" if name in TOOL_COLUMNS else "what is not text"
            raise RejectedRow(f"{extra[name]!r} cannot be used", f"{what} cannot be learned")


def add_extra_turns(row: dict, extra: Extra, given: Mapping[str, str], converted: dict) -> tuple[dict, tuple[str, ...]]:
    """The converted row with the system message and the earlier turns of its raw row, and what was left out.

    A system message among the turns takes precedence over that of a column.

    Raises:
        RejectedRow: a column has another form.
    """
    turns = "prompt" if "prompt" in converted else "messages"
    own = [turn for turn in converted[turns][:1] if turn["role"] == "system"]
    contents = [*(turn["content"].strip() for turn in own), *_system_messages(row, extra, converted[turns])]
    contents = list(dict.fromkeys(filter(None, contents)))
    system = [message("system", content) for content in contents[:1]]
    earlier, others = _earlier_turns(row, extra, given), converted[turns][len(own) :]
    if [turn["content"] for turn in others[: len(earlier)]] == [turn["content"] for turn in earlier]:
        earlier = []  # the turns begin with them
    repairs = (SECOND_SYSTEM,) if len(contents) > 1 else ()
    return {**converted, turns: [*system, *earlier, *others]}, repairs


def _system_messages(row: dict, extra: Extra, turns: list[dict]) -> list[str]:
    values = {extra[name]: row[extra[name]] for name in (*SYSTEM_COLUMNS, INSTRUCTION) if name in extra}
    for column, value in values.items():
        if value is not None and not isinstance(value, str):
            raise RejectedRow("no system message", f"{column!r} is of type {type(value).__name__}, expected a string")
    texts = {column: value.strip() for column, value in values.items() if value}
    question = texts.get(extra.get(INSTRUCTION, ""), "")
    if question and any(question in turn["content"] for turn in turns):
        del texts[extra[INSTRUCTION]]
    return list(texts.values())


def _earlier_turns(row: dict, extra: Extra, given: Mapping[str, str]) -> list[dict]:
    """The turns of `history` beside a question and its answer, or beside the list of the last turns."""
    turns: list[dict] = []
    for column in (extra[name] for name in HISTORY_COLUMNS if name in extra):
        history = parse_list(row[column])
        if is_empty(history) or (not _has_pair(row, given) and find_turn_column(row) == column):
            continue
        if are_usual(history):
            turns += normalize_messages(history)
            continue
        texts = pair_texts(history) if isinstance(history, list) else None
        if texts is None:
            raise RejectedRow(f"unknown {column!r}", "earlier turns must be a list of messages or [question, answer]")
        turns += alternate_turns(texts)
    return turns


def _has_pair(row: dict, given: Mapping[str, str]) -> bool:
    """Whether the turns of a row are a question and its answer, or those of a preference."""
    names = by_lower_name(row).keys()
    is_preference = any(names >= set(pair) for pair in PREFERENCE_COLUMNS)
    is_named = bool(set(given) - {ASSISTANT_NAME})
    return is_named or is_preference or find_pair(row) is not None or "instances" in names


def _list_prose(value: object) -> list[str]:
    """A long text, or texts that are long together; otherwise an empty list."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if not all(isinstance(text, str) for text in texts) or sum(map(len, texts)) < LONG_CHARACTERS:
        return []
    is_structure = texts[0].lstrip().startswith(("[", "{"))
    return [] if is_structure or len(" ".join(texts).split(None, LONG_WORDS)) < LONG_WORDS else texts


def list_known_columns(source: Source) -> frozenset[str]:
    """The columns that a source reads, in lower case: those of its example rows, and others with usual names."""
    examples = (column.lower() for row in source.raw if isinstance(row, dict) for column in row)
    return frozenset((*examples, *KNOWN_COLUMNS.get(source.name, ()), *TURN_COLUMNS, *_KNOWN))


def list_unread_columns(known: frozenset[str], row: dict, given: Mapping[str, str], converted: dict) -> list[str]:
    """The columns of a raw row whose long text is in none of the turns, except those that the source knows."""
    texts = {column: texts for column, value in row.items() if (texts := _list_prose(value))}
    if not texts:
        return []
    read = {*given.values(), *(find_pair(row) or ())}
    words = row_text(converted)
    contents = [turn["content"].strip() for part in converted.values() for turn in part]
    return [
        column
        for column, parts in texts.items()
        if column not in read
        and str(column).strip().lower() not in known
        and not all(part.strip() in words for part in parts)
        and not all(any(content in part for part in parts) for content in contents)  # the whole row once more
    ]
