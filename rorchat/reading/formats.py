"""Rows out of files: text, JSON lines, JSON arrays, CSV and Parquet, compressed or not, one row at a time.

`datasets.load_dataset` reads the same formats, but fails on the first bad row without naming it, and copies everything
into its cache first. Here a bad row costs that row, and every row knows where it stands.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorchat.errors import DataError
from rorchat.reading.encodings import (
    BAD_BYTE,
    DAMAGED,
    LONGEST_LINE,
    content_suffix,
    damaged_archive,
    decode,
    open_bytes,
    read_text,
)
from rorchat.reading.tables import read_csv, read_parquet
from rorchat.rows import RejectedRow

DOCUMENT_SEPARATOR = "<|endoftext|>"  # between the documents of one text file, as TinyStories has it
_BLOCK = 2**20  # bytes of a text file that are read at a time
# Not JSONDecodeError alone: a number of 5,000 digits is a plain ValueError, brackets 100,000 deep a RecursionError
_NOT_JSON = (ValueError, RecursionError)

Row = tuple[str, Any]  # (place, raw row or Reject)


@dataclass(frozen=True)
class FileSlice:
    """A file, or a piece of one: the bytes of whole lines or documents, or row groups of Parquet.

    `first` is the number of the line or row with which it begins, `bytes` what it takes on disk.
    """

    path: Path
    start: int = 0
    stop: int | None = None
    first: int = 0
    bytes: int = 0

    def __iter__(self) -> Iterator[Row]:
        """(place, raw row) of each row. A text gives {"text"}; a row that cannot be read comes as a `Reject`."""
        reader = READERS.get(content_suffix(self.path))
        if reader is None:
            raise DataError(f"{self.path}: cannot read this kind of file; known are {', '.join(READERS)}.")
        return reader(self)


def _between_separators(stretch: FileSlice) -> Iterator[tuple[bytes | bytearray, bool]]:
    """The bytes of each document of a text file and whether a separator closes it.

    Holds one document and one block of the file. A long document comes as a bytearray, to be cleared when decoded.
    Only a .txt holds several: in the source code and the notes of others `<|endoftext|>` is a word.
    """
    separator = DOCUMENT_SEPARATOR.encode()
    several = content_suffix(stretch.path) == ".txt"
    held = bytearray()
    with open_bytes(stretch.path) as file:
        if stretch.start:  # a packed file is one stretch, and cannot seek
            file.seek(stretch.start)
        while block := file.read(_BLOCK if stretch.stop is None else min(_BLOCK, stretch.stop - file.tell())):
            overlap = max(0, len(held) - len(separator) + 1)  # a separator may lie across two blocks
            held += block
            end = held.find(separator, overlap) if several else -1
            if end < 0:
                continue
            *whole, rest = bytes(memoryview(held)[end + len(separator) :]).split(separator)
            del held[end:]
            yield held, True
            yield from ((document, True) for document in whole)
            held = bytearray(rest)
    yield held, False


def _read_text(stretch: FileSlice) -> Iterator[Row]:
    """Documents between separators, one at a time, so that a file of 2 GB needs the memory of its longest document.

    A last document that no separator closes although separators stand before it has "unclosed": True beside its text.
    """
    path, line, byte = stretch.path, stretch.first + 1, stretch.start
    try:
        for document, closed in _between_separators(stretch):
            size, newlines = len(document), document.count(b"\n")
            text = decode(document, "utf-8-sig" if byte == 0 else "utf-8", first_byte=byte)
            if isinstance(document, bytearray):
                document.clear()  # a book of 100 MB need not be held twice
            if isinstance(text, RejectedRow):
                yield str(path), text
            elif closed or (text and not text.isspace()):  # a separator also closes the last document of TinyStories
                length = len(text)
                text = text.lstrip("\r\n")
                blank = newlines - text.count("\n") if text and len(text) < length else 0
                row = {"text": text.rstrip("\r\n")}
                del text
                yield f"{path}:{line + blank}", row if closed or not byte else {**row, "unclosed": True}
            line, byte = line + newlines, byte + size + len(DOCUMENT_SEPARATOR)
    except DAMAGED as error:
        yield f"{path}:{line}", damaged_archive(path, error)


def read_lines(
    source: Path | FileSlice, encoding: str = "utf-8-sig", *, empty: bool = False
) -> Iterator[tuple[str, str | RejectedRow]]:
    """(file:line, line) of a text file or a stretch of one; empty lines are passed over unless `empty`."""
    stretch = source if isinstance(source, FileSlice) else FileSlice(source)
    path, number = stretch.path, stretch.first
    try:
        with open_bytes(path) as file:
            if stretch.start:
                file.seek(stretch.start)
            while (stretch.stop is None or file.tell() < stretch.stop) and (raw := file.readline(LONGEST_LINE)):
                number += 1
                whole = len(raw) < LONGEST_LINE or raw.endswith(b"\n")
                line = decode(raw, encoding)
                del raw  # while a long line is parsed it need not be held as bytes too
                if not whole:
                    line = RejectedRow("over-long", f"a line of more than {LONGEST_LINE:,} bytes")
                    while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                if isinstance(line, str):
                    line = line.rstrip("\r\n")
                lines = [line] if empty or isinstance(line, RejectedRow) or (line and not line.isspace()) else []
                del line
                while lines:
                    yield f"{path}:{number}", lines.pop()  # what is given is not held here as well
    except DAMAGED as error:
        yield f"{path}:{number + 1}", damaged_archive(path, error)


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
# Finds where a value ends that the other refuses for what is in it: a key twice, or a number of 5,000 digits
_ENDS = json.JSONDecoder(parse_int=len)


def _not_json(error: Exception) -> RejectedRow:
    if isinstance(error, _DuplicateKey):
        return RejectedRow("duplicate keys", repr(str(error)))
    if isinstance(error, json.JSONDecodeError):
        return RejectedRow("not JSON", f"{error.msg} at line {error.lineno}, column {error.colno}")
    return RejectedRow("not JSON", str(error).partition(";")[0])


def _read_json_lines(stretch: FileSlice) -> Iterator[Row]:
    for place, line in read_lines(stretch):
        if isinstance(line, RejectedRow):
            yield place, line
            continue
        try:
            row = _DECODER.decode(line)
        except _NOT_JSON as error:
            row = _not_json(error)
        del line
        yield place, row


def _is_json_lines(path: Path) -> bool:
    """Whether the first line of a file is a whole object, as in the shards of C4, which are named .json.gz."""
    line = next((line for _, line in read_lines(path)), "")
    if isinstance(line, RejectedRow) or not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except _NOT_JSON:
        return False


def _read_json(stretch: FileSlice) -> Iterator[Row]:
    path = stretch.path
    if _is_json_lines(path):
        yield from _read_json_lines(FileSlice(path))
        return
    text = read_text(path)
    bad = text if isinstance(text, RejectedRow) else None
    if bad and bad.reason == "invalid UTF-8":  # of one row, as a rule: the others are good
        text = read_text(path, errors="surrogateescape")
    if isinstance(text, RejectedRow):
        yield str(path), text
    elif text.lstrip().startswith("["):
        yield from _json_array(path, text, bad is not None)
    else:
        yield from _json_object(path, text, bad)


def _json_object(path: Path, text: str, bad: RejectedRow | None) -> Iterator[Row]:
    """One object over many lines, or JSON lines under another name."""
    failure = bad
    if not bad:
        try:
            yield f"{path}, row 0", _DECODER.decode(text)
            return
        except _NOT_JSON as error:
            failure = _not_json(error)
    lines = list(_read_json_lines(FileSlice(path)))
    if any(isinstance(row, dict | list) for _, row in lines):
        yield from lines
    else:
        yield str(path), failure


_BETWEEN = re.compile(r"\s*,?\s*")
_OPENING = re.compile(r'[{\[]\s*"(?:[^"\\\n]|\\.)*"')  # of an object with its first key, or a list with its first text


def _json_array(path: Path, text: str, bad: bool) -> Iterator[Row]:
    """The elements of an array, one at a time. After a damaged one comes the next that begins as elements begin.

    Args:
        bad: some of its bytes are no UTF-8: the elements that have them are rejected.
    """
    at = _BETWEEN.match(text, text.index("[") + 1).end()
    beginning = _beginning(text, at)
    number = 0
    while at < len(text) and text[at] != "]":
        place, start = f"{path}, row {number}", at
        number += 1
        try:
            row, at = _DECODER.raw_decode(text, at)
        except _NOT_JSON as error:
            reject = _not_json(error)
            at = _next_element(text, at, beginning)
            yield place, reject if at else RejectedRow(reject.reason, f"{reject.detail}; the rest of the file is lost")
            if at is None:
                return
        else:
            yield place, RejectedRow("invalid UTF-8") if bad and BAD_BYTE.search(text, start, at) else row
        at = _BETWEEN.match(text, at).end()
    if text[at:].strip() != "]":
        said = "the array does not end" if at >= len(text) else "something follows the array"
        yield f"{path}, row {number}", RejectedRow("not JSON", f"{said}, at line {text.count(chr(10), 0, at) + 1}")


def _beginning(text: str, at: int) -> re.Pattern | None:
    """How elements begin, by the first, at `at`: on a line of their own, or else with the same key.

    Quotation marks inside of a string are escaped, so that `{"key"` is never found within one.
    """
    column = at - (text.rfind("\n", 0, at) + 1)
    if "\n" in text[:at]:
        return re.compile(r"\n" + " " * column + r"(?=[\[{])")
    first = _OPENING.match(text, at) or (_OPENING.search(text, at) if text[at : at + 1] == "{" else None)
    return re.compile(r",\s*(?=" + re.escape(first[0]) + ")") if first else None


def _next_element(text: str, at: int, beginning: re.Pattern | None) -> int | None:
    """Where reading goes on after an element that cannot be decoded: behind it, or at the next; None: nobody knows."""
    try:
        return _ENDS.raw_decode(text, at)[1]
    except _NOT_JSON:
        found = beginning.search(text, at + 1) if beginning else None
        return found.end() if found else None


READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".tokens": _read_text,
    ".py": _read_text,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
