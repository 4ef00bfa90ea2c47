"""Rows out of CSV and Parquet files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorchat.reading.encodings import BAD_BYTE, DAMAGED, LONGEST_LINE, content_suffix, damaged_archive, open_bytes
from rorchat.rows import RejectedRow

if TYPE_CHECKING:
    from rorchat.reading.formats import FileSlice, Row

ROWS_AT_ONCE = 256  # of Parquet


class _Lines:
    """The lines of a table one by one, which knows where a row begins and can go back to its second line."""

    def __init__(self, file):
        self.file, self.number = file, 0  # of lines before the row that is being read
        self.again: list[str] = []  # to be read before the rest of the file
        self.row: list[str] = []  # the lines of the row

    def __iter__(self) -> Iterator[str]:
        while line := self.again.pop() if self.again else next(self.file, ""):
            self.row.append(line)
            yield line

    def begin_row(self) -> None:
        self.number += len(self.row)
        self.row = []

    def back_to_second(self) -> None:
        """A quotation mark that nothing closes swallows the rows behind it: only the line that has it is no row."""
        self.again += reversed(self.row[1:])
        self.row = self.row[:1]

    def bad_byte(self) -> bool:
        """Whether there is one in the row that was read."""
        try:
            "".join(self.row).encode()
            return False
        except UnicodeEncodeError:
            return True


def read_csv(stretch: FileSlice) -> Iterator[Row]:
    """Rows under a header line, as objects; commas, or tabs in .tsv. Holds one row of the file."""
    path = stretch.path
    csv.field_size_limit(LONGEST_LINE)
    with open_bytes(path) as raw:
        lines = _Lines(io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=""))
        try:
            yield from _csv_rows(path, lines, "\t" if content_suffix(path) == ".tsv" else ",")
        except DAMAGED as error:
            yield f"{path}:{lines.number + len(lines.row) + 1}", damaged_archive(path, error)


def _csv_rows(path: Path, lines: _Lines, delimiter: str) -> Iterator[Row]:
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header = None
    while True:
        lines.begin_row()
        place = f"{path}:{lines.number + 1}"
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            lines.back_to_second()
            rows = csv.reader(lines, delimiter=delimiter, strict=True)  # the old one is inside of a field
            yield place, RejectedRow("not CSV", str(error))
            continue
        if header is None:
            header = values
            if lines.bad_byte():
                yield place, RejectedRow("invalid UTF-8", "in the header; the rest of the file is lost")
                return
        elif values:
            yield place, _csv_row(header, values, lines)


def _csv_row(header: list[str], values: list[str], lines: _Lines) -> dict | RejectedRow:
    if lines.bad_byte():
        return RejectedRow("invalid UTF-8", f"field {next(n for n, v in enumerate(values) if BAD_BYTE.search(v))}")
    if len(values) != len(header):
        over = f", over {len(lines.row):,} lines" if len(lines.row) > 1 else ""
        return RejectedRow("not CSV", f"{len(values)} fields under a header of {len(header)}{over}")
    row = dict(zip(header, values, strict=True))
    if len(row) < len(header):
        twice = next((name for name in header if name and header.count(name) > 1), None)
        if twice is not None:  # columns without a name are nobody's, spreadsheets write many
            return RejectedRow("duplicate keys", f"{twice!r} in the header")
    return row


def read_parquet(stretch: FileSlice) -> Iterator[Row]:
    """The rows of some row groups. A damaged group costs that group: its reject says how many rows it had."""
    import pyarrow
    import pyarrow.parquet

    path, first = stretch.path, stretch.first
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        yield str(path), _not_parquet(error)
        return
    for group in range(file.metadata.num_row_groups)[stretch.start : stretch.stop]:
        number, end = first, first + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group]):
                for row in _rows_of(batch):
                    yield f"{path}, row {number}", row
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            yield f"{path}, row {number}", _not_parquet(error, f"; rows {number} to {end - 1} are lost")
        first = end


def _not_parquet(error: Exception, lost: str = "") -> RejectedRow:
    if getattr(error, "errno", None):
        raise error  # a disk that fails is not a bad row
    return RejectedRow("not Parquet", (str(error).splitlines() or [type(error).__name__])[0] + lost)


def _rows_of(batch) -> list[Any]:
    import pyarrow

    try:
        return batch.to_pylist()
    except (ValueError, ArithmeticError, LookupError, pyarrow.ArrowException):  # of one value, and all rows are lost
        return [_row_of(batch.slice(number, 1)) for number in range(batch.num_rows)]


def _row_of(one) -> dict | RejectedRow:
    """The row of a batch of one. What Python has no value for, as a date after the year 9999, is left out of it."""
    import pyarrow

    row = {}
    for name, column in zip(one.schema.names, one.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except UnicodeDecodeError:
            return RejectedRow("invalid UTF-8", f"in {name!r}")
        except (ValueError, ArithmeticError, LookupError, pyarrow.ArrowException):
            continue  # a source that wants it says "missing field"
    return row
