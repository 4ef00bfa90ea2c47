"""Reads the rows of CSV files one at a time. A damaged row does not affect the rows after it."""

import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rorchat.reading.encodings import (
    BAD_BYTE,
    DECOMPRESSION_ERRORS,
    LONGEST_LINE,
    content_suffix,
    open_bytes,
    reject_damaged_archive,
)
from rorchat.reading.slices import FileSlice, Row
from rorchat.rows import RejectedRow


class _Lines:
    """Iterates over the lines of a file. Records the lines of the current row and can rewind to the second of them."""

    def __init__(self, file: TextIO):
        self.file = file
        self.lines_before = 0  # number of lines before the current row
        self.row_lines: list[str] = []
        self.pushed_back: list[str] = []  # to be read before the rest of the file, in reverse order

    def __iter__(self) -> Iterator[str]:
        while line := self.pushed_back.pop() if self.pushed_back else next(self.file, ""):
            self.row_lines.append(line)
            yield line

    def begin_row(self) -> None:
        self.lines_before += len(self.row_lines)
        self.row_lines = []

    def return_to_second_line(self) -> None:
        """Rewinds to the line after the first line of the current row.

        An unclosed quotation mark makes the CSV reader consume the rows after it. Only the line with the mark should be
        rejected.
        """
        self.pushed_back += reversed(self.row_lines[1:])
        self.row_lines = self.row_lines[:1]

    def has_bad_byte(self) -> bool:
        try:
            "".join(self.row_lines).encode()
            return False
        except UnicodeEncodeError:
            return True


def read_csv(file_slice: FileSlice) -> Iterator[Row]:
    """Yields (file:line, {column: value}) for each row after the header line. In .tsv files, tabs separate values.

    Only one row is in memory at a time.
    """
    path = file_slice.path
    csv.field_size_limit(LONGEST_LINE)
    try:
        file = open_bytes(path)
    except zipfile.BadZipFile as error:  # already the header of the file in the archive is damaged
        yield str(path), reject_damaged_archive(path, error)
        return
    with file as raw:
        lines = _Lines(io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=""))
        try:
            yield from _read_rows(path, lines, "\t" if content_suffix(path) == ".tsv" else ",")
        except DECOMPRESSION_ERRORS as error:
            line = lines.lines_before + len(lines.row_lines) + 1
            yield f"{path}:{line}", reject_damaged_archive(path, error)


def _read_rows(path: Path, lines: _Lines, delimiter: str) -> Iterator[Row]:
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header = None
    while True:
        lines.begin_row()
        place = f"{path}:{lines.lines_before + 1}"
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            lines.return_to_second_line()
            rows = csv.reader(lines, delimiter=delimiter, strict=True)  # the old reader is still inside a field
            yield place, RejectedRow("not CSV", str(error))
            continue
        if header is None:
            header = values
            if lines.has_bad_byte():
                yield place, RejectedRow("invalid UTF-8", "in the header; the rest of the file is lost")
                return
        elif values:
            yield place, _build_row(header, values, lines)


def _build_row(header: list[str], values: list[str], lines: _Lines) -> dict | RejectedRow:
    if lines.has_bad_byte():
        field = next(number for number, value in enumerate(values) if BAD_BYTE.search(value))
        return RejectedRow("invalid UTF-8", f"field {field}")
    if len(values) != len(header):
        extent = f"; the row spans {len(lines.row_lines):,} lines" if len(lines.row_lines) > 1 else ""
        return RejectedRow("not CSV", f"{len(values)} fields, but the header has {len(header)}{extent}")
    row = dict(zip(header, values, strict=True))
    if len(row) < len(header):
        duplicate = next((name for name in header if name and header.count(name) > 1), None)
        if duplicate is not None:  # several columns without a name are allowed, because spreadsheets write them
            return RejectedRow("duplicate keys", f"{duplicate!r} in the header")
    return row
