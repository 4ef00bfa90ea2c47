"""Reads conversations of files in any shape: rows, exports of chat programs, and objects that hold a list of them."""

from collections.abc import Iterator
from itertools import chain, islice

from rorchat.reading.chat_exports import expand_container, read_export
from rorchat.reading.encodings import content_suffix
from rorchat.reading.formats import TEXT_SUFFIXES, read_rows
from rorchat.reading.slices import FileSlice, Row
from rorchat.reading.text import read_lines
from rorchat.reading.whatsapp import match_start, read_whatsapp
from rorchat.rows import RejectedRow


def read_chats(file_slice: FileSlice) -> Iterator[Row]:
    """As `read_rows`, but an export has a row for each conversation, and text files must be exports of WhatsApp."""
    suffix = content_suffix(file_slice.path)
    if suffix in TEXT_SUFFIXES:
        return _read_text(file_slice)
    rows = read_rows(file_slice)
    return _read_json(file_slice, rows) if suffix in (".json", ".jsonl", ".ndjson") else rows


def _read_text(file_slice: FileSlice) -> Iterator[Row]:
    path = file_slice.path
    if file_slice.start:  # a log is read as a whole, with its first slice
        return
    place, line = next(read_lines(path), (str(path), ""))
    if isinstance(line, RejectedRow) or match_start(line):
        yield from read_whatsapp(path)
    elif line:
        yield place, RejectedRow("not a dialogue", "the text does not begin as a chat that WhatsApp has exported")


def _read_json(file_slice: FileSlice, rows: Iterator[Row]) -> Iterator[Row]:
    """The conversations of the values of a JSON file. Only a value that is the whole file may hold a list of them."""
    first = list(islice(rows, 2))
    is_whole = len(first) == 1 and not file_slice.start and file_slice.stop in (None, file_slice.path.stat().st_size)
    while first:
        yield from _expand(*first.pop(0), is_whole=is_whole)  # pop: keep no reference to a yielded row
    yield from chain.from_iterable(_expand(place, row, is_whole=False) for place, row in rows)


def _expand(place: str, row: object, *, is_whole: bool) -> Iterator[Row]:
    rows = None
    if isinstance(row, dict):
        rows = read_export(place, row) or (expand_container(place, row) if is_whole else None)
    yield from rows or [(place, row)]
