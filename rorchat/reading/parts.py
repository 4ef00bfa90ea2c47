"""Splits files into parts that several processes can read."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rorchat.reading.slices import FileSlice
from rorchat.reading.text import DOCUMENT_SEPARATOR
from rorchat.reading.zip_files import file_size, find_archive

PARTS = 64  # target number of parts, if their size stays within the next two bounds
SMALLEST_PART, LARGEST_PART = 4 * 2**20, 64 * 2**20  # bytes on disk, which may be compressed
BLOCK_BYTES = 2**20  # bytes read at a time


def split_files(files: list[Path], *, divide: bool) -> list[tuple[FileSlice, ...]]:
    """Returns parts in the order of the files. Small files are grouped, and large files are sliced.

    The boundaries of the parts depend only on the files.

    Args:
        divide: whether a file may be sliced.
    """
    target = min(max(sum(map(file_size, files)) // PARTS, SMALLEST_PART), LARGEST_PART)
    parts: list[tuple[FileSlice, ...]] = []
    group: list[FileSlice] = []
    group_bytes = 0
    for file_slice in (file_slice for file in files for file_slice in _slice_file(file, target, divide)):
        group.append(file_slice)
        group_bytes += file_slice.bytes
        if group_bytes >= target:
            parts.append(tuple(group))
            group, group_bytes = [], 0
    return [*parts, tuple(group)] if group else parts


def _slice_file(file: Path, target: int, divide: bool) -> Iterator[FileSlice]:
    size, suffix = file_size(file), file.suffix.lower()
    if divide and size > target and not find_archive(file):
        if suffix == ".parquet":
            return _slice_row_groups(file, target)
        if suffix in (".jsonl", ".ndjson"):
            return _slice_at_lines(file, target)
        if suffix == ".txt":
            return _slice_at_documents(file, target)
    return iter([FileSlice(file, bytes=size)])


def _slice_row_groups(file: Path, target: int) -> Iterator[FileSlice]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(file).metadata
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # an error of the disk, not of the content
        yield FileSlice(file, bytes=file.stat().st_size)  # the reader will report the damage
        return
    start = first = size = rows = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        rows += group.num_rows
        if size >= target or number + 1 == metadata.num_row_groups:
            yield FileSlice(file, start, number + 1, first, size)
            start, first, size = number + 1, rows, 0


def _slice_at_lines(file: Path, target: int) -> Iterator[FileSlice]:
    """Slices of about `target` bytes that end at a line end. Lines are counted, so that errors can name a line."""
    with file.open("rb") as data:
        start = first = 0
        while block := data.read(target):
            newlines = block.count(b"\n")
            while not block.endswith(b"\n") and (rest := data.readline(LARGEST_PART)):
                block = rest
                newlines += rest.count(b"\n")
            yield FileSlice(file, start, data.tell(), first, data.tell() - start)
            start, first = data.tell(), first + newlines


def _slice_at_documents(file: Path, target: int) -> Iterator[FileSlice]:
    """Slices of about `target` bytes that end after a document separator."""
    with file.open("rb") as data:
        start = first = 0
        while block := data.read(target):
            newlines = block.count(b"\n") + _skip_past_separator(data, block)
            yield FileSlice(file, start, data.tell(), first, data.tell() - start)
            start, first = data.tell(), first + newlines


def _skip_past_separator(file: BinaryIO, before: bytes) -> int:
    """Moves past the next separator, which may begin at the end of `before`. Returns the number of newlines skipped."""
    separator = DOCUMENT_SEPARATOR.encode()
    tail, newlines = before[1 - len(separator) :], 0
    while block := file.read(BLOCK_BYTES):
        at = (tail + block).find(separator)
        if at >= 0:
            end = at + len(separator) - len(tail)
            file.seek(end - len(block), os.SEEK_CUR)
            return newlines + block.count(b"\n", 0, end)
        newlines += block.count(b"\n")
        tail = (tail + block)[1 - len(separator) :]
    return newlines
