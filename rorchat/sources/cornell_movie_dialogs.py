"""Cornell Movie-Dialogs: 83k conversations from 617 film scripts. Danescu-Niculescu-Mizil and Lee 2011.

`movie_conversations.txt` lists the line ids of each conversation, and `movie_lines.txt` in the same folder contains
their texts. Both are in ISO-8859-1 with some Windows-1252 characters. The path may also be a lines file, including
Kaggle's .tsv. Then only conversations with lines in this file are read, and `movie_conversations.txt` is looked up in
the same folder and in its parent folder.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rorchat.errors import DataError
from rorchat.reading.encodings import content_suffix, open_bytes, read_text
from rorchat.reading.formats import read_rows
from rorchat.rows import ConvertedRow, RejectedRow, alternate_turns, get_text
from rorchat.sources.messages import UNANSWERED

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

_FIELD_SEPARATOR = re.compile(r" ?\+\+\+\$\+\+\+ ?|\t")
_C1 = re.compile("[\x80-\x9f]")  # control characters: Windows-1252 characters that were read as ISO-8859-1


def read(path: Path) -> Iterator[tuple[str, object]]:
    """Yields one raw row per conversation with its lines. Formats other than .txt and .tsv are read as they are."""
    if content_suffix(path) not in (".txt", ".tsv"):
        yield from read_rows(path)
        return
    is_complete = "conversations" in path.name
    conversations_path = path if is_complete else _find_beside(path, "movie_conversations")
    lines_path = _find_beside(path, "movie_lines") if is_complete else path
    lines = {}
    for place, fields in _read_fields(lines_path):
        if isinstance(fields, RejectedRow):
            yield place, fields
        elif len(fields) == 5:
            lines[fields[0]] = {"speaker": fields[1], "text": fields[4]}
    for place, fields in _read_fields(conversations_path):
        ids = re.findall(r"\bL\d+", fields[-1]) if isinstance(fields, list) else []
        missing = [line for line in ids if line not in lines]
        if not ids:
            yield place, fields if isinstance(fields, RejectedRow) else RejectedRow("missing field", "no line ids")
        elif missing and (is_complete or len(missing) < len(ids)):
            yield place, RejectedRow("lines missing", ", ".join(missing))
        elif not missing:
            yield place, {"lines": [lines[line] for line in ids]}


def _find_beside(path: Path, name: str) -> Path:
    files = [file for folder in (path.parent, path.parent.parent) for file in sorted(folder.glob(f"{name}.t*"))]
    if not files:
        raise DataError(f"{path} is only half of the corpus: put {name}.txt in the same folder.")
    return files[0]


def _read_fields(path: Path) -> Iterator[tuple[str, list[str] | RejectedRow]]:
    """Yields (place, fields) for each line of a file."""
    text = read_text(path)
    if isinstance(text, RejectedRow) and text.reason == "invalid UTF-8":
        with open_bytes(path) as file:
            text = file.read().decode("latin-1")
    if isinstance(text, RejectedRow):
        yield str(path), text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if line.startswith('"') and line.endswith('"'):  # Kaggle quotes lines that contain a quotation mark
            line = line[1:-1].replace('""', '"')
        if line.strip():
            yield f"{path}:{number}", _FIELD_SEPARATOR.split(line, 4)


def convert(row: dict) -> dict | ConvertedRow:
    """Converts lines to messages. Consecutive lines of one speaker are joined; an unanswered last turn is dropped."""
    lines = _get_lines(row)
    repaired = [(speaker, _decode_windows(text)) for speaker, text in lines]
    turns = []
    for _, group in groupby(repaired, key=lambda line: line[0]):
        turns.append(" ".join(" ".join(re.sub("\xad|</?[a-z]>", "", text).split()) for _, text in group).strip())
    answered = turns[: len(turns) // 2 * 2]
    if any("�" in turn for turn in answered):
        raise RejectedRow("replacement character", "a byte was lost when the file was converted")
    repairs = ["Windows-1252 character"] * (repaired != lines) + [UNANSWERED] * (len(answered) < len(turns))
    conversation = {"messages": alternate_turns(answered)}
    return ConvertedRow(conversation, repairs=tuple(repairs)) if repairs else conversation


def _get_lines(row: dict) -> list[tuple[str, str]]:
    """Returns (speaker, text) for each line of a row from `read`, or from the Hub, where two speakers alternate."""
    if not isinstance(row, dict):
        raise RejectedRow("wrong type", f"a row is a {type(row).__name__}, expected an object")
    if isinstance(row.get("utterance"), dict):
        lines = row["utterance"].get("text")
        if isinstance(lines, list):
            return [(str(number % 2), get_text({"text": text}, "text")) for number, text in enumerate(lines)]
    lines = row.get("lines")
    if not isinstance(lines, list):
        raise RejectedRow("missing field", f"no list of lines; the fields are {', '.join(map(str, list(row)[:8]))}")
    return [(get_text(line, "speaker"), get_text(line, "text")) for line in lines]


def _decode_windows(text: str) -> str:
    """Decodes Windows-1252 characters that were read as ISO-8859-1."""
    try:
        return text.encode("latin-1").decode("cp1252") if _C1.search(text) else text
    except UnicodeError:  # not ISO-8859-1, or one of the five bytes undefined in Windows-1252: `check_text` rejects it
        return text
