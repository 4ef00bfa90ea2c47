"""Which files a source has, what they are made of, and the parts in which they are read."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from rorchat.errors import DataError
from rorchat.reading.encodings import PACKED, content_suffix
from rorchat.reading.formats import DOCUMENT_SEPARATOR, READERS, FileSlice

PARTS = 64  # a source is read in about so many parts, within these bounds of bytes on disk
SMALLEST_PART, LARGEST_PART = 4 * 2**20, 64 * 2**20
_BLOCK = 2**20  # bytes
SAMPLES, SAMPLE_BYTES = 16, 2**16  # of a file, to tell it from another


def split_files(files: list[Path], *, divide: bool) -> list[tuple[FileSlice, ...]]:
    """Files in parts that can be read apart, in their order: files, groups of small ones, pieces of large ones.

    Where the parts begin depends on the files alone. `divide` says whether a file may be read in pieces.
    """
    target = min(max(sum(file.stat().st_size for file in files) // PARTS, SMALLEST_PART), LARGEST_PART)
    parts: list[tuple[FileSlice, ...]] = []
    gathered: list[FileSlice] = []
    size = 0
    for stretch, stretch_bytes in (piece for file in files for piece in _pieces(file, target, divide)):
        gathered.append(replace(stretch, bytes=stretch_bytes))
        size += stretch_bytes
        if size >= target:
            parts.append(tuple(gathered))
            gathered, size = [], 0
    return [*parts, tuple(gathered)] if gathered else parts


def _pieces(file: Path, target: int, divide: bool) -> Iterator[tuple[FileSlice, int]]:
    size = file.stat().st_size
    if not divide or size <= target:
        yield FileSlice(file), size
    elif file.suffix == ".parquet":
        yield from _parquet_pieces(file, target)
    elif file.suffix in (".jsonl", ".ndjson"):
        yield from _line_pieces(file, target)
    elif file.suffix == ".txt":
        yield from _document_pieces(file, target)
    else:  # one after the other: what is packed, and what can only be read from its beginning
        yield FileSlice(file), size


def _parquet_pieces(file: Path, target: int) -> Iterator[tuple[FileSlice, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(file).metadata
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise  # a disk that fails
        yield FileSlice(file), file.stat().st_size  # its reader says what is wrong
        return
    start = first = size = rows = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        rows += group.num_rows
        if size >= target or number + 1 == metadata.num_row_groups:
            yield FileSlice(file, start, number + 1, first), size
            start, first, size = number + 1, rows, 0


def _line_pieces(file: Path, target: int) -> Iterator[tuple[FileSlice, int]]:
    """Pieces of about `target` bytes that begin at a line; their lines are counted, so that a place can be told."""
    with file.open("rb") as lines:
        start = first = 0
        while block := lines.read(target):
            newlines = block.count(b"\n")
            while not block.endswith(b"\n") and (rest := lines.readline(LARGEST_PART)):
                block = rest
                newlines += rest.count(b"\n")
            yield FileSlice(file, start, lines.tell(), first), lines.tell() - start
            start, first = lines.tell(), first + newlines


def _document_pieces(file: Path, target: int) -> Iterator[tuple[FileSlice, int]]:
    """Pieces of about `target` bytes that begin behind a separator; their lines are counted too."""
    with file.open("rb") as text:
        start = first = 0
        while block := text.read(target):
            newlines = block.count(b"\n") + _past_separator(text, block)
            yield FileSlice(file, start, text.tell(), first), text.tell() - start
            start, first = text.tell(), first + newlines


def _past_separator(text: BinaryIO, before: bytes) -> int:
    """Goes on in a file to the end of the next separator, one that `before` may begin; the lines passed over."""
    separator = DOCUMENT_SEPARATOR.encode()
    tail, newlines = before[1 - len(separator) :], 0
    while block := text.read(_BLOCK):
        found = (tail + block).find(separator)
        if found >= 0:
            end = found + len(separator) - len(tail)
            text.seek(end - len(block), os.SEEK_CUR)
            return newlines + block.count(b"\n", 0, end)
        newlines += block.count(b"\n")
        tail = (tail + block)[1 - len(separator) :]
    return newlines


def find_files(path: Path, patterns: tuple[str, ...], *, any_suffix: bool = False) -> list[Path]:
    """A file, or the files of a folder that fit one of `patterns`, in the order of names.

    What is hidden, as `.git/` or a store that is being made, is nobody's data.

    Args:
        patterns: glob patterns inside a folder, with or without .gz or .zst; the first that matches anything decides.
        any_suffix: the caller has a reader of its own; otherwise only files count that are read here.

    Raises:
        DataError: there is no such path, it cannot be read, or nothing in the folder fits.
    """
    if path.is_file():
        if not any_suffix and content_suffix(path) not in READERS:
            raise DataError(
                f"{path}: cannot read {path.suffix or 'a file without suffix'}; "
                f"known are {', '.join(READERS)}, also with {' or '.join(PACKED)}."
            )
        return [path]
    if not path.is_dir():
        raise DataError(f"No file or folder {path}.")
    for pattern in patterns:
        found = sorted(
            {
                file
                for form in (pattern, *(pattern + packed for packed in PACKED))
                for file in path.glob(form)
                if file.is_file() and not is_hidden(file, path) and (any_suffix or content_suffix(file) in READERS)
            }
        )
        if found:
            return found
    there = sorted(entry.name for entry in path.iterdir())
    raise DataError(f"{path} holds none of {', '.join(patterns)} but {', '.join(there[:8]) or 'nothing'}.")


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether a file in a folder, or a folder between the two, has a name that begins with a dot."""
    return any(name.startswith(".") for name in file.relative_to(folder).parts)


def files_digest(files: Iterable[Path], root: Path) -> str:
    """sha256 of the names of files below `root`, their sizes and samples of their bytes.

    It is asked for at every start of a run, over corpora that take minutes to read, so of a file of more than a
    megabyte SAMPLES pieces count, the first and the last bytes among them. A copy of the folder has the same digest,
    which times of change would not give; another file of the same size has another one. What is missed is an edit in
    place that keeps the size and lies between two samples.
    """
    sha256 = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        sha256.update(os.fsencode(os.path.relpath(file, root)) + f"\0{size}\0".encode())
        with file.open("rb") as data:
            if size <= SAMPLES * SAMPLE_BYTES:
                sha256.update(data.read())
                continue
            for number in range(SAMPLES):
                data.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                sha256.update(data.read(SAMPLE_BYTES))
    return sha256.hexdigest()
