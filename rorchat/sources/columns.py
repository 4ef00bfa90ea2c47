"""Which columns of a row hold its text, messages or replies: known names, or those that the user gives.

Columns are given as ROLE=COLUMN, in `--columns user=question assistant=answer`, in a mixture file, or at the end of a
spec (`messages=pairs.csv:user=question:assistant=answer`).
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any
from urllib.parse import quote

from rorchat.errors import DataError, UsageError, did_you_mean
from rorchat.reading.chat_logs import PAUSE_HOURS, ExportedChat
from rorchat.reading.message_tables import TREES
from rorchat.reading.messages import is_empty
from rorchat.reading.turns import (
    HISTORY_COLUMNS,
    TURN_COLUMNS,
    Turn,
    are_usual,
    assign_roles,
    by_lower_name,
    decide_roles,
    find_pair,
    find_turn_column,
    parse_list,
    read_turns,
    refuse_name,
)
from rorchat.rows import ConvertedRow, RejectedRow, exchange, get_text, message
from rorchat.sources import alpaca, prompt_completion

#: For each source of your own rows, the complete sets of roles that columns can have; those after the first are
#: alternatives.
ROLES: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("text",),),
    "messages": (("user", "assistant"), ("messages",)),
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"),),
}
#: The role whose value is not a column, but the name of the speaker who is the assistant.
ASSISTANT_NAME = "assistant_name"
#: Roles that may be added to a complete set.
OPTIONAL_ROLES = {"messages": ("system", ASSISTANT_NAME), "alpaca": ("input",)}
#: Names of the column of texts, and of that of prompts, the usual ones first.
TEXT_COLUMNS = ("text", "content", "document", "article")
PROMPT_COLUMNS = ("prompt", "question", "input", "query")
#: Names of the columns of the better and the worse reply, the usual ones first: others are of TRL's reward modelling on
#: Stack Exchange, and of OpenAI.
PREFERENCE_COLUMNS = (
    ("chosen", "rejected"), ("response_j", "response_k"), ("preferred_output", "non_preferred_output"),
)  # fmt: skip
#: The columns that each source reads, which may have capitals.
KNOWN_COLUMNS = {
    "text": TEXT_COLUMNS,
    "messages": (),
    "preference": (*PROMPT_COLUMNS, *chain.from_iterable(PREFERENCE_COLUMNS), "instruction", "conversations"),
    "alpaca": ("instruction", "input", "output", "instances"),
    "prompt_completion": ("prompt", "completion", "response"),
}
#: Columns of what an instruction is about.
CONTEXT_COLUMNS = ("input", "context")
MAX_LISTED = 12  # columns that an error message names

Columns = Mapping[str, str]  # role -> column


def all_roles(name: str) -> tuple[str, ...]:
    """The roles that columns of a source can have; empty if its columns cannot be named."""
    return tuple(dict.fromkeys(role for form in ROLES.get(name, ()) for role in form)) + OPTIONAL_ROLES.get(name, ())


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """{role: column} of ROLE=COLUMN words.

    Raises:
        UsageError: a word has another form or an unknown role, or a role is given twice.
    """
    columns: dict[str, str] = {}
    known = sorted({role for name in ROLES for role in all_roles(name)})
    for pair in pairs:
        role, _, column = pair.partition("=")
        if not column:
            raise UsageError(f"columns: {pair!r} is not ROLE=COLUMN, as in --columns user=question assistant=answer.")
        if role not in known:
            raise UsageError(f"columns: no role {role!r}.{did_you_mean(role, known)} Roles: {', '.join(known)}.")
        if columns.setdefault(role, column) != column:
            raise UsageError(f"columns: {role!r} is given twice, as {columns[role]!r} and {column!r}.")
    return columns


def check_roles(name: str, columns: Columns) -> None:
    """Raises UsageError unless a source takes these columns: a complete set, and only those."""
    if not takes_columns(name, columns):
        forms = " or ".join(" and ".join(form) for form in ROLES.get(name, ()))
        optional = "".join(f", optionally {role}" for role in OPTIONAL_ROLES.get(name, ()))
        allowed = f"it takes {forms}{optional}" if forms else f"only {', '.join(ROLES)} take columns"
        raise UsageError(f"Source {name!r} cannot read the columns {', '.join(columns)}: {allowed}.")


def takes_columns(name: str, columns: Columns) -> bool:
    """Whether these roles are a complete set of a source, beside optional ones."""
    required = set(columns) - set(OPTIONAL_ROLES.get(name, ()))
    if name == "messages" and ASSISTANT_NAME in columns:  # columns of a question and its answer have no speakers
        return required <= {"messages"} and "system" not in columns
    return any(required == set(form) for form in ROLES.get(name, ()))


def source_for_columns(columns: Columns) -> str:
    """The name of the source that takes these columns.

    Raises:
        UsageError: no source does.
    """
    for name in ROLES:
        if takes_columns(name, columns):
            return name
    forms = "; ".join(f"{name}: {' or '.join(' and '.join(form) for form in forms)}" for name, forms in ROLES.items())
    raise UsageError(f"No source takes the columns {', '.join(columns)} together. Possible are {forms}.")


def pick_columns(name: str, columns: Columns, row: Any) -> ConvertedRow:
    """A raw row in the form that the source `name` reads. A row that is not an object or a list is unchanged.

    Args:
        columns: those that the user gave; if empty, columns with known names are used.

    Raises:
        RejectedRow: a given column is missing, its value has the wrong type, or the speakers' roles cannot be known.
    """
    if name not in ROLES or not isinstance(row, dict | list):
        return ConvertedRow(row)
    if name == "messages" and (isinstance(row, list) or not set(columns) - {"messages", ASSISTANT_NAME}):
        return _pick_turns(row, columns)
    if not isinstance(row, dict):
        return ConvertedRow(row)
    if not columns:
        return ConvertedRow(_pick_known(name, row))
    _require_present(columns, row)
    if "user" in columns:
        question, answer = (get_text(row, columns[role]) for role in ("user", "assistant"))
        system = [message("system", get_text(row, columns["system"]))] if "system" in columns else []
        return ConvertedRow({"messages": [*system, *exchange(question, answer)["messages"]]})
    return ConvertedRow({role: row[columns[role]] for role in columns})


def _require_present(columns: Columns, row: dict) -> None:
    for role, column in columns.items():
        if role != ASSISTANT_NAME and column not in row:
            raise RejectedRow("missing field", f"no column {column!r} among {_list_columns(list(map(str, row)))}")


def _pick_known(name: str, row: dict) -> dict:
    lower = by_lower_name(row)
    known = {column: row[lower[column]] for column in KNOWN_COLUMNS[name] if column in lower and column not in row}
    row = {**row, **known} if known else row
    if name == "text":
        return _pick_text(row)
    return _pick_preference(row) if name == "preference" else row


def _pick_text(row: dict) -> dict:
    column = next((column for column in TEXT_COLUMNS if column in row), "text")
    return row if column == "text" else {**row, "text": row[column]}


def _pick_turns(row: dict | list, columns: Columns) -> ConvertedRow:
    """A conversation from a log, from a list of turns, or from a question and its answer."""
    assistant_name = columns.get(ASSISTANT_NAME, "")
    if isinstance(row, ExportedChat):
        return _pick_exported(row, assistant_name)
    if not columns and are_usual(row if isinstance(row, list) else row.get("messages")):
        return ConvertedRow(row)
    if isinstance(row, list):
        return read_turns(row, "", assistant_name) or ConvertedRow(row)
    _require_present(columns, row)
    column = columns.get("messages") or _find_turns(row)
    if not column:
        return _pick_pair(row, assistant_name)
    turns = parse_list(row[column])
    chat = read_turns(turns, column, assistant_name, is_named="messages" in columns)
    return chat or ConvertedRow({"messages": turns})


def _pick_exported(row: ExportedChat, assistant_name: str) -> ConvertedRow:
    if not row.speakers:  # the roles are those of the program
        chat = read_turns(row["messages"], "messages", assistant_name) or ConvertedRow(dict(row))
        if row.program == TREES:  # which `oasst` reads as well
            chat.rule, chat.is_by_order = f"the best-ranked replies in {TREES}", True
    else:
        turns = [Turn(turn["speaker"], turn["text"]) for turn in row["messages"]]
        where = f"chats from {row.program}, a new one after each pause of {PAUSE_HOURS} hours"
        chat = assign_roles(turns, where, speakers=row.speakers, assistant_name=assistant_name)
        chat.rule += f" ({_describe_roles(row.speakers, assistant_name)})"
    return ConvertedRow(chat.row, chat.rule, (*chat.repairs, *row.repairs), chat.is_by_order)


def _describe_roles(speakers: Sequence[str], assistant_name: str) -> str:
    """Who of the two speakers of a log is the user, and how to swap them. In a dataset, every row has other names."""
    roles, _ = decide_roles(speakers, assistant_name)
    user, assistant = sorted(speakers, key=lambda name: roles[name] == "assistant")
    option = shlex.quote(f":{ASSISTANT_NAME}={quote_column(user)}")
    return f"{user!r} is the user, {assistant!r} the assistant; {option} after the source swaps them"


def _find_turns(row: dict) -> str | None:
    """The column of turns. Without a usual name, it must not stand beside a text or a question with its answer."""
    column = find_turn_column(row)
    name = column.strip().lower() if column else ""
    if column is None or (name in HISTORY_COLUMNS and find_pair(row)):
        return None
    if name in TURN_COLUMNS:
        return column
    is_beside = find_pair(row) is not None or any(isinstance(row.get(name), str) for name in TEXT_COLUMNS)
    return None if is_beside or name in ("prompt", "completion", "chosen", "rejected") else column


def _pick_pair(row: dict, assistant_name: str) -> ConvertedRow:
    """A question and its answer, if their columns have known names."""
    columns, pair = by_lower_name(row), find_pair(row)
    if "instruction" in columns and "instances" in columns:
        refuse_name(assistant_name, "a question and its answer")
        rule = "question and answer: 'instruction' (and 'input') is the user, 'output' the assistant"
        return ConvertedRow(alpaca.convert(_pick_known("alpaca", row)), rule)
    if pair is None:
        return ConvertedRow(row)
    refuse_name(assistant_name, f"{pair[0]!r} and {pair[1]!r}")
    question, answer = pair
    kind, contexts = question.strip().lower(), [columns[name] for name in CONTEXT_COLUMNS if name in columns]
    if kind == "instruction":
        beside = f" (and {' and '.join(map(repr, contexts))})" if contexts else ""
        rule = f"question and answer: {question!r}{beside} is the user, {answer!r} the assistant"
        return ConvertedRow(_convert_instruction(row, pair, contexts), rule)
    rule = f"question and answer: {question!r} is the user, {answer!r} the assistant"
    if kind == "prompt" and answer.strip().lower() in ("completion", "response"):
        chat = prompt_completion.convert({"prompt": row[question], "completion": row[answer]})
        return replace(chat, rule=rule) if isinstance(chat, ConvertedRow) else ConvertedRow(chat, rule)
    return ConvertedRow(exchange(get_text(row, question), get_text(row, answer)), rule)


def _convert_instruction(row: dict, pair: tuple[str, str], contexts: Sequence[str]) -> dict:
    """An instruction with what it is about, as the source `alpaca` reads it."""
    texts = [get_text(row, column).strip() for column in contexts if row[column] is not None]
    about = "\n\n".join(filter(None, texts))
    question, answer = (get_text(row, column) for column in pair)
    return alpaca.convert({"instruction": question, "input": about, "output": answer})


def _pick_preference(row: dict) -> dict:
    better, worse = next((pair for pair in PREFERENCE_COLUMNS if row.keys() >= set(pair)), PREFERENCE_COLUMNS[0])
    if better != "chosen":
        row = {**row, "chosen": row[better], "rejected": row[worse]}
    if isinstance(row.get("input"), dict) and "messages" in row["input"]:  # OpenAI
        if not is_empty(row["input"].get("tools")):
            raise RejectedRow("'tools' cannot be used", "the calls of tools cannot be learned")
        return {**row, "prompt": row["input"]["messages"]}
    if "conversations" in row:
        return row
    is_known = "instruction" in row  # and `input` is what it is about
    column = next((column for column in PROMPT_COLUMNS if column in row and not (is_known and column == "input")), "")
    return {**row, "prompt": row[column]} if column else row


def require_columns(name: str, columns: Columns, present: Sequence[str], where: str) -> None:
    """Checks the columns of a dataset before its rows are downloaded.

    Args:
        present: all columns of the dataset.
        where: the dataset, for the error message.

    Raises:
        DataError: a given column is missing, or none has a known name.
    """
    if name not in ROLES:
        return
    missing = [column for role, column in columns.items() if role != ASSISTANT_NAME and column not in present]
    row = dict.fromkeys(present)
    names = set(by_lower_name(row))
    if set(columns) - {ASSISTANT_NAME}:
        found = not missing
    elif name == "messages":
        found = not names.isdisjoint(TURN_COLUMNS) or find_pair(row) is not None or "instances" in names
    elif name == "text":
        found = not names.isdisjoint(TEXT_COLUMNS)
    elif name == "preference":
        found = any(names >= set(pair) for pair in PREFERENCE_COLUMNS)
    else:
        found = any(names >= set(form) for form in ROLES[name]) or not names.isdisjoint(("instances", "response"))
    if not found:
        lacks = f"no column {missing[0]!r}" if missing else f"no columns of a known name for {name}"
        raise DataError(f"{where} has {lacks}, only {_list_columns(present)}. {suggest_columns(name, present)}")


def text_columns(row: Any) -> list[str]:
    """The columns of a row that hold text; empty if the row has no columns."""
    return [str(column) for column, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []


def suggest_pair(spec: str, columns: Sequence[str]) -> str:
    """The two ways to read the only two text columns of a source as question and answer."""
    first, second = map(quote_column, columns)
    given, swapped = (
        shlex.quote(f"{spec}:user={user}:assistant={assistant}")
        for user, assistant in ((first, second), (second, first))
    )
    return f"Name the columns of the question and the answer: {given}; or, the other way round, {swapped}."


def quote_column(column: str) -> str:
    """A column as a spec names it: `:`, `@`, `=` and `%` would end its name there."""
    return quote(column, safe=" -_.()'")


def suggest_columns(name: str, present: Sequence[str] = ()) -> str:
    """A sentence that says how to name the columns of a source, with an example from those present."""
    roles = ROLES[name][0]
    examples = {"text": "body", "user": "question", "assistant": "answer", "chosen": "good", "rejected": "bad"}
    known = [column for column in present if " " not in column][: len(roles)]
    chosen = known if len(known) == len(roles) else [examples.get(role, role) for role in roles]
    pairs = " ".join(shlex.quote(f"{role}={column}") for role, column in zip(roles, chosen, strict=True))
    return f"Name the columns, as in --columns {pairs}"


def _list_columns(columns: Sequence[str]) -> str:
    return ", ".join(columns[:MAX_LISTED]) + (", ..." if columns[MAX_LISTED:] else "") or "none"
