"""Rows out of files: plain text, JSON lines, JSON arrays and Parquet, gzipped or not, one row at a time.

`datasets.load_dataset` reads the same formats, but fails on the first bad row without naming it, and copies everything
into its cache first. Here a bad row costs that row, and every row knows where it stands.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rorchat.errors import DataError
from rorchat.sources._rows import Reject

DOCUMENT_SEPARATOR = "<|endoftext|>"  # between the documents of one text file, as TinyStories has it
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)
# Not JSONDecodeError alone: a number of 5,000 digits is a plain ValueError, brackets 100,000 deep a RecursionError
_NOT_JSON = (ValueError, RecursionError)
SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet")


def read_rows(path: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(place, raw row) of a file, or of every file of a folder that fits one of `patterns`, in the order of names.

    Text files give {"text"}. A row that cannot be read comes as a `Reject` instead of the row.

    Args:
        patterns: glob patterns inside a folder; the first one that matches anything decides.

    Raises:
        DataError: there is no such path, or nothing in the folder fits.
    """
    for file in files_of(path, patterns):
        yield from _READERS[_suffix(file)](file)


def files_of(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        if _suffix(path) not in _READERS:
            raise DataError(
                f"{path}: cannot read {path.suffix or 'a file without suffix'}; "
                f"known are {', '.join(SUFFIXES)}, also with .gz."
            )
        return [path]
    if not path.is_dir():
        raise DataError(f"No file or folder {path}.")
    for pattern in patterns:
        found = sorted(file for file in path.glob(pattern) if file.is_file() and _suffix(file) in _READERS)
        if found:
            return found
    there = sorted(entry.name for entry in path.iterdir())
    raise DataError(f"{path} holds none of {', '.join(patterns)} but {', '.join(there[:8]) or 'nothing'}.")


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _bytes(path: Path):
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _decoded(raw: bytes) -> str | Reject:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Reject("invalid UTF-8", f"byte {error.start}")


def _whole(path: Path) -> str | Reject:
    try:
        with _bytes(path) as file:
            return _decoded(file.read())
    except _DAMAGED as error:
        return Reject("damaged gzip", str(error))


def _read_text(path: Path) -> Iterator[tuple[str, Any]]:
    text = _whole(path)
    if isinstance(text, Reject):
        yield str(path), text
        return
    parts = text.split(DOCUMENT_SEPARATOR)
    if not parts[-1].strip():  # the separator also closes the last document, as in the files of TinyStories
        parts.pop()
    line = 1
    for part in parts:
        words = part.lstrip("\r\n")
        blank = part[: len(part) - len(words)].count("\n") if words else 0
        yield f"{path}:{line + blank}", {"text": words.rstrip("\r\n")}
        line += part.count("\n")


def read_lines(path: Path) -> Iterator[tuple[str, str | Reject]]:
    """(file:line, line) of a text file; empty lines are passed over."""
    number = 0
    try:
        with _bytes(path) as file:
            for number, raw in enumerate(file, start=1):
                line = _decoded(raw)
                if isinstance(line, Reject) or line.strip():
                    yield f"{path}:{number}", line if isinstance(line, Reject) else line.rstrip("\r\n")
    except _DAMAGED as error:
        yield f"{path}:{number + 1}", Reject("damaged gzip", str(error))


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for place, line in read_lines(path):
        if isinstance(line, Reject):
            yield place, line
            continue
        try:
            row = json.loads(line)
        except _NOT_JSON as error:
            row = _not_json(error)
        yield place, row


def _not_json(error: Exception) -> Reject:
    if isinstance(error, json.JSONDecodeError):
        return Reject("not JSON", f"{error.msg} at line {error.lineno}, column {error.colno}")
    return Reject("not JSON", str(error).partition(";")[0])


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    text = _whole(path)
    if isinstance(text, str):
        try:
            rows = json.loads(text)
        except _NOT_JSON as error:
            failure = _not_json(error)
        else:
            for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
                yield f"{path}, row {number}", row
            return
    else:
        failure = text
    lines = list(_read_json_lines(path))  # JSON lines under another name
    if any(isinstance(row, dict | list) for _, row in lines):
        yield from lines
    else:
        yield str(path), failure


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        yield str(path), Reject("not Parquet", str(error).splitlines()[0])
        return
    number = 0
    for batch in file.iter_batches(batch_size=256):
        for row in batch.to_pylist():
            yield f"{path}, row {number}", row
            number += 1


_READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
