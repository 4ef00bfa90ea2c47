"""Reads conversations of files in any shape: rows, exports of chat programs, tables of messages, lists in an object."""

from collections.abc import Callable, Iterator
from itertools import chain, islice

from rorchat.reading.chat_exports import expand_container, read_export
from rorchat.reading.encodings import content_suffix
from rorchat.reading.formats import TEXT_SUFFIXES, read_rows
from rorchat.reading.message_tables import (
    is_tree,
    is_tree_message,
    is_utterance,
    join_utterances,
    read_best_path,
    read_trees,
    read_utterances,
)
from rorchat.reading.parlai import begins_dialogue, read_parlai
from rorchat.reading.slices import FileSlice, Row
from rorchat.reading.text import read_lines
from rorchat.reading.whatsapp import match_start, read_whatsapp
from rorchat.reading.zip_files import file_size
from rorchat.rows import RejectedRow


def read_chats(file_slice: FileSlice) -> Iterator[Row]:
    """As `read_rows`, but an export or a table of messages has a row for each conversation.

    Text files must be exports of WhatsApp, or dialogues in ParlAI's format.
    """
    suffix = content_suffix(file_slice.path)
    if suffix in TEXT_SUFFIXES:
        return _read_text(file_slice)
    utterances = read_utterances(file_slice.path) if suffix == ".csv" else None
    if utterances:
        return join_utterances(utterances)
    head, rows = _read_head(FileSlice(file_slice.path))
    if join := _find_join(head):  # a table of messages is read as a whole, with its first slice
        return iter([]) if file_slice.start else join(_put_back(head, rows))
    is_same = not file_slice.start and file_slice.stop is None
    rows = _put_back(head, rows) if is_same else read_rows(file_slice)
    return _read_json(file_slice, rows) if suffix in (".json", ".jsonl", ".ndjson") else rows


def _read_head(file_slice: FileSlice) -> tuple[list[Row], Iterator[Row]]:
    """The rows up to the first that can be read, and the others."""
    rows, head = read_rows(file_slice), list[Row]()
    for row in rows:
        head.append(row)
        if not isinstance(row[1], RejectedRow):
            break
    return head, rows


def _put_back(head: list[Row], rows: Iterator[Row]) -> Iterator[Row]:
    while head:
        yield head.pop(0)  # pop: keep no reference to a yielded row
    yield from rows


def _find_join(head: list[Row]) -> Callable[[Iterator[Row]], Iterator[Row]] | None:
    """The function that joins the rows of a table of messages; None for another file."""
    if head and is_tree_message(head[-1][1]):
        return read_trees
    return join_utterances if head and is_utterance(head[-1][1]) else None


def _read_text(file_slice: FileSlice) -> Iterator[Row]:
    path = file_slice.path
    if file_slice.start:  # a log is read as a whole, with its first slice
        return
    place, line = next(read_lines(path), (str(path), ""))
    if isinstance(line, RejectedRow) or match_start(line):
        yield from read_whatsapp(path)
    elif begins_dialogue(line):
        yield from read_parlai(path)
    elif line:
        programs = "a chat that WhatsApp has exported, or a dialogue in ParlAI's format"
        yield place, RejectedRow("not a dialogue", f"the text does not begin as {programs}")


def _read_json(file_slice: FileSlice, rows: Iterator[Row]) -> Iterator[Row]:
    """The conversations of the values of a JSON file. Only a value that is the whole file may hold a list of them."""
    first = list(islice(rows, 2))
    is_whole = len(first) == 1 and not file_slice.start and file_slice.stop in (None, file_size(file_slice.path))
    while first:
        yield from _expand(*first.pop(0), is_whole=is_whole)  # pop: keep no reference to a yielded row
    yield from chain.from_iterable(_expand(place, row, is_whole=False) for place, row in rows)


def _expand(place: str, row: object, *, is_whole: bool) -> Iterator[Row]:
    rows = None
    if isinstance(row, dict) and is_tree(row):
        row = read_best_path(row)
    elif isinstance(row, dict):
        rows = read_export(place, row) or (expand_container(place, row) if is_whole else None)
    yield from rows or [(place, row)]
