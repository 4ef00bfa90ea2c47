"""Reads rows of JSON files: JSON Lines, arrays and single objects. A damaged row does not affect the others."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rorchat.reading.encodings import BAD_BYTE, read_text
from rorchat.reading.slices import FileSlice, Row
from rorchat.reading.text import read_lines
from rorchat.rows import RejectedRow

# More than JSONDecodeError: a number of 5,000 digits raises ValueError, and 100,000 nested brackets RecursionError
_JSON_ERRORS = (ValueError, RecursionError)
_BETWEEN_ELEMENTS = re.compile(r"\s*,?\s*")
_FIRST_KEY = re.compile(r'[{\[]\s*"(?:[^"\\\n]|\\.)*"')  # up to the first key of an object or first string of a list


class _DuplicateKey(ValueError):
    pass


def _build_object(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_build_object)
# Finds the end of a value that _DECODER rejects because of a duplicate key or a number with too many digits
_LENIENT_DECODER = json.JSONDecoder(parse_int=len)


def _reject_json(error: Exception) -> RejectedRow:
    if isinstance(error, _DuplicateKey):
        return RejectedRow("duplicate keys", repr(str(error)))
    if isinstance(error, json.JSONDecodeError):
        return RejectedRow("not JSON", f"{error.msg} at line {error.lineno}, column {error.colno}")
    return RejectedRow("not JSON", str(error).partition(";")[0])


def read_json_lines(file_slice: FileSlice) -> Iterator[Row]:
    """Yields ("file:line", value) for each line."""
    for place, line in read_lines(file_slice):
        if isinstance(line, RejectedRow):
            yield place, line
            continue
        try:
            row = _DECODER.decode(line)
        except _JSON_ERRORS as error:
            row = _reject_json(error)
        del line
        yield place, row


def read_json(file_slice: FileSlice) -> Iterator[Row]:
    """Yields the elements of a JSON array, the rows of a JSON Lines file named .json, or a single object."""
    path = file_slice.path
    if _is_json_lines(path):
        yield from read_json_lines(FileSlice(path))
        return
    text = read_text(path)
    bad_encoding = text if isinstance(text, RejectedRow) else None
    if bad_encoding and bad_encoding.reason == "invalid UTF-8":  # usually in one row: the others can still be read
        text = read_text(path, errors="surrogateescape")
    if isinstance(text, RejectedRow):
        yield str(path), text
    elif text.lstrip().startswith("["):
        yield from _read_array(path, text, has_bad_bytes=bad_encoding is not None)
    else:
        yield from _read_object(path, text, bad_encoding)


def _is_json_lines(path: Path) -> bool:
    """Whether the first line of a file is a complete object, as in C4, whose JSON Lines files are named .json.gz."""
    line = next((line for _, line in read_lines(path)), "")
    if isinstance(line, RejectedRow) or not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except _JSON_ERRORS:
        return False


def _read_object(path: Path, text: str, rejected_row: RejectedRow | None) -> Iterator[Row]:
    """Yields a single object that spans several lines, or the rows of JSON Lines whose first line is damaged.

    Args:
        rejected_row: why the text could not be decoded; None if it could.
    """
    if rejected_row is None:
        try:
            yield f"{path}, row 0", _DECODER.decode(text)
            return
        except _JSON_ERRORS as error:
            rejected_row = _reject_json(error)
    lines = list(read_json_lines(FileSlice(path)))
    if any(isinstance(row, dict | list) for _, row in lines):
        yield from lines
    else:
        yield str(path), rejected_row


def _read_array(path: Path, text: str, *, has_bad_bytes: bool) -> Iterator[Row]:
    """Yields the elements of an array, decoded one at a time.

    After a damaged element, reading continues at the next position that looks like the start of the first element.
    """
    at = _skip_comma(text, text.index("[") + 1)
    element_start = _build_element_pattern(text, at)
    number = 0
    while at < len(text) and text[at] != "]":
        place, start = f"{path}, row {number}", at
        number += 1
        try:
            row, at = _DECODER.raw_decode(text, at)
        except _JSON_ERRORS as error:
            rejected_row = _reject_json(error)
            next_at = _find_next_element(text, at, element_start)
            if next_at is None:
                yield place, RejectedRow(rejected_row.reason, f"{rejected_row.detail}; the rest of the file is lost")
                return
            yield place, rejected_row
            at = next_at
        else:
            yield place, RejectedRow("invalid UTF-8") if has_bad_bytes and BAD_BYTE.search(text, start, at) else row
        at = _skip_comma(text, at)
    if text[at:].strip() != "]":
        problem = "the array does not end" if at >= len(text) else "extra data after the array"
        line = text.count("\n", 0, at) + 1
        yield f"{path}, row {number}", RejectedRow("not JSON", f"{problem}, at line {line}")


def _skip_comma(text: str, at: int) -> int:
    between = _BETWEEN_ELEMENTS.match(text, at)
    return between.end() if between else at


def _build_element_pattern(text: str, at: int) -> re.Pattern | None:
    """A pattern for the start of an element, taken from the first element at `at`: its indentation, or its first key.

    Quotation marks inside strings are escaped, so `{"key"` cannot occur within a string.
    """
    column = at - (text.rfind("\n", 0, at) + 1)
    if "\n" in text[:at]:
        return re.compile(r"\n" + " " * column + r"(?=[\[{])")
    first = _FIRST_KEY.match(text, at) or (_FIRST_KEY.search(text, at) if text[at : at + 1] == "{" else None)
    return re.compile(r",\s*(?=" + re.escape(first[0]) + ")") if first else None


def _find_next_element(text: str, at: int, element_start: re.Pattern | None) -> int | None:
    """The position of the next element after one that cannot be decoded, or None if there is no other."""
    try:
        return _LENIENT_DECODER.raw_decode(text, at)[1]
    except _JSON_ERRORS:
        match = element_start.search(text, at + 1) if element_start else None
        return match.end() if match else None
