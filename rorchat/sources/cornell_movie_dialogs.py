"""Cornell Movie-Dialogs: 83k conversations out of 617 film scripts. Danescu-Niculescu-Mizil and Lee 2011.

`movie_conversations.txt` has the ids of each conversation's lines, `movie_lines.txt` beside it their texts, in
ISO-8859-1 with some characters of Windows-1252. Of a file of lines alone (Kaggle's .tsv, too) the rows are the
conversations that have a line in it; `movie_conversations.txt` is then sought beside it and one folder above.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rorchat.errors import DataError
from rorchat.reading.encodings import read_text
from rorchat.reading.formats import FileSlice, open_bytes
from rorchat.rows import RejectedRow, RepairedRow, get_text, message

KIND = "conversation"
LICENCE = "unstated (distributed by Cornell for research)"
SIZE = "83,097 conversations of 304,713 lines"
HUB = None
FILES = ("movie_conversations.t*", "**/movie_conversations.t*", "movie_lines*.t*", "*.jsonl", "*.json", "*.parquet")
BESIDE = ("movie_conversations.t*", "movie_lines.t*")
RAW = [
    {"lines": [{"speaker": "u0", "text": "They do not!"}, {"speaker": "u2", "text": "They do to!"}]},
    {"movieID": "m0", "utterance": {"text": ["They do not!", "They do to!"], "LineID": ["L1044", "L1045"]}},
]

_FIELD_END = re.compile(r" ?\+\+\+\$\+\+\+ ?|\t")
_C1 = re.compile("[\x80-\x9f]")


def read(path: Path) -> Iterator[tuple[str, object]]:
    """One raw row a conversation, with the texts of its lines; formats other than .txt and .tsv as usual."""
    if not re.search(r"\.(txt|tsv)(\.(gz|zst))?$", path.name):
        yield from FileSlice(path)
        return
    whole = "conversations" in path.name
    conversations = path if whole else _near(path, "movie_conversations")
    lines = {}
    for place, fields in _fields(_near(path, "movie_lines") if whole else path):
        if isinstance(fields, RejectedRow):
            yield place, fields
        elif len(fields) == 5:
            lines[fields[0]] = {"speaker": fields[1], "text": fields[4]}
    for place, fields in _fields(conversations):
        ids = re.findall(r"\bL\d+", fields[-1]) if isinstance(fields, list) else []
        missing = [line for line in ids if line not in lines]
        if not ids:
            yield place, fields if isinstance(fields, RejectedRow) else RejectedRow("missing field", "no ids of lines")
        elif missing and (whole or len(missing) < len(ids)):
            yield place, RejectedRow("lines missing", ", ".join(missing))
        elif not missing:
            yield place, {"lines": [lines[line] for line in ids]}


def _near(path: Path, name: str) -> Path:
    found = [file for folder in (path.parent, path.parent.parent) for file in sorted(folder.glob(f"{name}.t*"))]
    if not found:
        raise DataError(f"{path} is one half of the corpus: put {name}.txt beside it.")
    return found[0]


def _fields(path: Path) -> Iterator[tuple[str, list[str] | RejectedRow]]:
    text = read_text(path)
    if isinstance(text, RejectedRow) and text.reason == "invalid UTF-8":
        with open_bytes(path) as file:
            text = file.read().decode("latin-1")
    if isinstance(text, RejectedRow):
        yield str(path), text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if line.startswith('"') and line.endswith('"'):  # Kaggle's form quotes a line that has a quotation mark
            line = line[1:-1].replace('""', '"')
        if line.strip():
            yield f"{path}:{number}", _FIELD_END.split(line, 4)


def convert(row: dict) -> dict | RepairedRow:
    """Lines -> messages: what one speaker says in a row is one message; a last one nobody answers is left out."""
    said = _said(row)
    mended = [(speaker, _from_windows(text)) for speaker, text in said]
    turns = []
    for _, lines in groupby(mended, key=lambda line: line[0]):
        turns.append(" ".join(" ".join(re.sub("\xad|</?[a-z]>", "", text).split()) for _, text in lines).strip())
    turns = turns[: len(turns) // 2 * 2]
    messages = [message(("user", "assistant")[number % 2], turn) for number, turn in enumerate(turns)]
    if any("�" in turn for turn in turns):
        raise RejectedRow("replacement character", "a byte was lost when the file was written anew")
    return {"messages": messages} if mended == said else RepairedRow({"messages": messages}, "Windows-1252 character")


def _said(row: dict) -> list[tuple[str, str]]:
    """(speaker, text) of each line, from our own form or from the Hub's, which says no more than that there are two."""
    if not isinstance(row, dict):
        raise RejectedRow("wrong type", f"a row is a {type(row).__name__}, expected an object")
    if isinstance(row.get("utterance"), dict):
        lines = row["utterance"].get("text")
        if isinstance(lines, list):
            return [(str(number % 2), get_text({"text": text}, "text")) for number, text in enumerate(lines)]
    lines = row.get("lines")
    if not isinstance(lines, list):
        raise RejectedRow("missing field", f"no list of lines among {', '.join(map(str, list(row)[:8]))}")
    return [(get_text(line, "speaker"), get_text(line, "text")) for line in lines]


def _from_windows(text: str) -> str:
    try:
        return text.encode("latin-1").decode("cp1252") if _C1.search(text) else text
    except UnicodeError:  # five bytes of Windows-1252 mean nothing, and other texts are no ISO-8859-1: see check_text
        return text
