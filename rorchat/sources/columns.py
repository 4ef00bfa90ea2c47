"""Which columns of a row hold its text, messages or replies: known names, or those that the user gives.

Columns are given as ROLE=COLUMN, in `--columns user=question assistant=answer`, in a mixture file, or at the end of a
spec (`messages=pairs.csv:user=question:assistant=answer`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rorchat.errors import DataError, UsageError, did_you_mean
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
#: Roles that may be added to a complete set.
OPTIONAL_ROLES = {"messages": ("system",), "alpaca": ("input",)}
#: Names of the column of texts, and of those of questions and answers, the usual ones first.
TEXT_COLUMNS = ("text", "content", "document", "article")
PAIR_COLUMNS = (("question", "answer"), ("user", "assistant"), ("query", "response"), ("input", "output"))
PROMPT_COLUMNS = ("prompt", "question", "input", "query")
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


def pick_columns(name: str, columns: Columns, row: Any) -> Any:
    """A raw row in the form that the source `name` reads. A row that is not an object is returned unchanged.

    Args:
        columns: those that the user gave; if empty, columns with known names are used.

    Raises:
        RejectedRow: a given column is missing, or its value has the wrong type.
    """
    if name not in ROLES or not isinstance(row, dict):
        return row
    if not columns:
        return _pick_known(name, row)
    for column in columns.values():
        if column not in row:
            raise RejectedRow("missing field", f"no column {column!r} among {_list_columns(list(map(str, row)))}")
    if "user" in columns:
        question, answer = (get_text(row, columns[role]) for role in ("user", "assistant"))
        system = [message("system", get_text(row, columns["system"]))] if "system" in columns else []
        return {"messages": [*system, *exchange(question, answer)["messages"]]}
    return {role: row[columns[role]] for role in columns}


def _pick_known(name: str, row: dict) -> dict:
    if name == "text":
        return _pick_text(row)
    if name == "messages":
        return _pick_messages(row)
    if name == "preference":
        return _pick_preference(row)
    return row


def _pick_text(row: dict) -> dict:
    column = next((column for column in TEXT_COLUMNS if column in row), "text")
    return row if column == "text" else {**row, "text": row[column]}


def _pick_messages(row: dict) -> dict:
    if convert := _pair_converter(row):
        return convert(row)
    return row


def _pair_converter(row: Mapping) -> Callable[[dict], dict] | None:
    """The function that makes a conversation of a row without messages but with a question and an answer."""
    if "messages" in row or "conversations" in row:
        return None
    if "instruction" in row and ("output" in row or "instances" in row):
        return alpaca.convert
    if "prompt" in row and ("completion" in row or "response" in row):
        return prompt_completion.convert
    pairs = (*PAIR_COLUMNS, ("instruction", "response"))
    pair = next((pair for pair in pairs if pair[0] in row and pair[1] in row), None)
    return (lambda row: exchange(get_text(row, pair[0]), get_text(row, pair[1]))) if pair else None


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
    missing = [column for column in columns.values() if column not in present]
    row = dict.fromkeys(present)
    if columns:
        found = not missing
    elif name == "messages":
        found = "messages" in row or "conversations" in row or _pair_converter(row) is not None
    elif name == "text":
        found = any(column in row for column in TEXT_COLUMNS)
    elif name == "preference":
        found = "chosen" in row and "rejected" in row
    else:
        found = any(set(form) <= set(present) for form in ROLES[name]) or bool({"instances", "response"} & set(row))
    if not found:
        lacks = f"no column {missing[0]!r}" if missing else f"no columns of a known name for {name}"
        raise DataError(f"{where} has {lacks}, only {_list_columns(present)}. {suggest_columns(name, present)}")


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
