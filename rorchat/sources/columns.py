"""Which columns of a row hold its text, messages or replies: known names, or those that the user gives.

Columns are given as ROLE=COLUMN, in `--columns user=question assistant=answer`, in a mixture file, or at the end of a
spec (`messages=pairs.csv:user=question:assistant=answer`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from rorchat.errors import DataError, UsageError, did_you_mean
from rorchat.reading.chat_logs import PAUSE_HOURS, LoggedChat
from rorchat.reading.turns import TURN_COLUMNS, are_usual, assign_roles, find_pair, find_turn_column, read_turns
from rorchat.rows import RejectedRow, exchange, get_text, message
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
MAX_LISTED = 12  # columns that an error message names

Columns = Mapping[str, str]  # role -> column


@dataclass(frozen=True)
class Picked:
    """A raw row in the form that a source reads.

    Attributes:
        rule: which columns were taken, and who of the speakers is the user; empty in the source's usual form.
        repairs: what was changed in the row.
    """

    row: Any
    rule: str = ""
    repairs: tuple[str, ...] = ()


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


def pick_columns(name: str, columns: Columns, row: Any) -> Picked:
    """A raw row in the form that the source `name` reads. A row that is not an object or a list is unchanged.

    Args:
        columns: those that the user gave; if empty, columns with known names are used.

    Raises:
        RejectedRow: a given column is missing, its value has the wrong type, or the speakers' roles cannot be known.
    """
    if name not in ROLES or not isinstance(row, dict | list):
        return Picked(row)
    if name == "messages" and (isinstance(row, list) or not set(columns) - {"messages", ASSISTANT_NAME}):
        return _pick_turns(row, columns)
    if not isinstance(row, dict):
        return Picked(row)
    if not columns:
        return Picked(_pick_known(name, row))
    _require_present(columns, row)
    if "user" in columns:
        question, answer = (get_text(row, columns[role]) for role in ("user", "assistant"))
        system = [message("system", get_text(row, columns["system"]))] if "system" in columns else []
        return Picked({"messages": [*system, *exchange(question, answer)["messages"]]})
    return Picked({role: row[columns[role]] for role in columns})


def _require_present(columns: Columns, row: dict) -> None:
    for role, column in columns.items():
        if role != ASSISTANT_NAME and column not in row:
            raise RejectedRow("missing field", f"no column {column!r} among {_list_columns(list(map(str, row)))}")


def _pick_known(name: str, row: dict) -> dict:
    if name == "text":
        return _pick_text(row)
    return _pick_preference(row) if name == "preference" else row


def _pick_text(row: dict) -> dict:
    column = next((column for column in TEXT_COLUMNS if column in row), "text")
    return row if column == "text" else {**row, "text": row[column]}


def _pick_turns(row: dict | list, columns: Columns) -> Picked:
    """A conversation from a log, from a list of turns, or from a question and its answer."""
    if not columns and are_usual(row if isinstance(row, list) else row.get("messages")):
        return Picked(row)
    assistant_name = columns.get(ASSISTANT_NAME, "")
    if isinstance(row, LoggedChat):
        return _pick_logged(row, assistant_name)
    if isinstance(row, list):
        column, turns = "", row
    else:
        _require_present(columns, row)
        named = columns.get("messages") or _find_turns(row)
        if not named:
            return _pick_pair(row)
        column, turns = named, row[named]
    chat = read_turns(turns, column, assistant_name)
    if chat is None:
        is_named = isinstance(row, list) or column in TURN_COLUMNS[:2]
        return Picked(row if is_named else {"messages": turns})
    label = {"label": row["label"]} if isinstance(row, dict) and "label" in row else {}
    return Picked({"messages": chat.messages, **label}, chat.rule, chat.repairs)


def _pick_logged(row: LoggedChat, assistant_name: str) -> Picked:
    turns = [(turn["speaker"], turn["text"]) for turn in row["messages"]]
    where = f"chats from {row.program}, a new one after each pause of {PAUSE_HOURS} hours"
    chat = assign_roles(turns, where, speakers=row.speakers, assistant_name=assistant_name)
    repairs = ("messages without text left out",) if row.without_text else ()
    return Picked({"messages": chat.messages}, chat.rule, (*chat.repairs, *repairs))


def _find_turns(row: dict) -> str | None:
    """The column of turns. Without a usual name, it must not stand beside a text or a question with its answer."""
    column = find_turn_column(row)
    if column is None or column.strip().lower() in TURN_COLUMNS:
        is_beside_pair = column is not None and "history" in column.lower() and find_pair(row) is not None
        return None if is_beside_pair else column
    is_beside = find_pair(row) is not None or any(isinstance(row.get(name), str) for name in TEXT_COLUMNS)
    return None if is_beside or column in ("prompt", "completion", "chosen", "rejected") else column


def _pick_pair(row: dict) -> Picked:
    """A question and its answer, if their columns have known names."""
    if "instruction" in row and ("output" in row or "instances" in row):
        return Picked(alpaca.convert(row), "'instruction' (and 'input') is the user, 'output' the assistant")
    if "prompt" in row and ("completion" in row or "response" in row):
        reply = "completion" if "completion" in row else "response"
        return Picked(prompt_completion.convert(row), f"'prompt' is the user, {reply!r} the assistant")
    pair = find_pair(row)
    if pair is None:
        return Picked(row)
    rule = f"{pair[0]!r} is the user, {pair[1]!r} the assistant"
    return Picked(exchange(get_text(row, pair[0]), get_text(row, pair[1])), rule)


def _pick_preference(row: dict) -> dict:
    if "instruction" in row or "conversations" in row:
        return row
    column = next((column for column in PROMPT_COLUMNS if column in row), "prompt")
    return row if column == "prompt" else {**row, "prompt": row[column]}


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
    if set(columns) - {ASSISTANT_NAME}:
        found = not missing
    elif name == "messages":
        names = {column.strip().lower() for column in present}
        found = not names.isdisjoint(TURN_COLUMNS) or find_pair(row) is not None or "instances" in names
    elif name == "text":
        found = any(column in row for column in TEXT_COLUMNS)
    elif name == "preference":
        found = "chosen" in row and "rejected" in row
    else:
        found = any(set(form) <= set(present) for form in ROLES[name]) or bool({"instances", "response"} & set(row))
    if not found:
        lacks = f"no column {missing[0]!r}" if missing else f"no columns of a known name for {name}"
        raise DataError(f"{where} has {lacks}, only {_list_columns(present)}. {suggest_columns(name, present)}")


def text_columns(row: Any) -> list[str]:
    """The columns of a row that hold text; empty if the row has no columns."""
    return [str(column) for column, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []


def suggest_pair(spec: str, columns: Sequence[str]) -> str:
    """The two ways to read the only two text columns of a source as question and answer."""
    first, second = map(quote_column, columns)
    return (
        f"Say which column is whose: {spec}:user={first}:assistant={second}, or the other way round, "
        f"{spec}:user={second}:assistant={first}."
    )


def quote_column(column: str) -> str:
    """A column as a spec names it: `:`, `@`, `=` and `%` would end its name there."""
    return quote(column, safe=" -_.()'")


def suggest_columns(name: str, present: Sequence[str] = ()) -> str:
    """A sentence that says how to name the columns of a source, with an example from those present."""
    roles = ROLES[name][0]
    examples = {"text": "body", "user": "question", "assistant": "answer", "chosen": "good", "rejected": "bad"}
    known = [column for column in present if " " not in column][: len(roles)]
    chosen = known if len(known) == len(roles) else [examples.get(role, role) for role in roles]
    pairs = " ".join(f"{role}={column}" for role, column in zip(roles, chosen, strict=True))
    return f"Name the columns, as in --columns {pairs}"


def _list_columns(columns: Sequence[str]) -> str:
    return ", ".join(columns[:MAX_LISTED]) + (", ..." if columns[MAX_LISTED:] else "") or "none"
