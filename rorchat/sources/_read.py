"""Rows out of files: text, JSON lines, JSON arrays, CSV and Parquet, compressed or not, one row at a time.

`datasets.load_dataset` reads the same formats, but fails on the first bad row without naming it, and copies everything
into its cache first. Here a bad row costs that row, and every row knows where it stands.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rorchat.errors import DataError
from rorchat.sources._rows import Reject

DOCUMENT_SEPARATOR = "<|endoftext|>"  # between the documents of one text file, as TinyStories has it
_BLOCK = 2**20  # bytes of a text file that are read at a time
LONGEST_LINE = 2**27  # bytes; a longer line is a reject, so that no line can take more memory than a few times this
PARTS = 64  # a source is read in about so many parts, within these bounds of bytes on disk
SMALLEST_PART, LARGEST_PART = 4 * 2**20, 64 * 2**20
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error, OSError)  # pyarrow says OSError of a damaged zstd stream
# Not JSONDecodeError alone: a number of 5,000 digits is a plain ValueError, brackets 100,000 deep a RecursionError
_NOT_JSON = (ValueError, RecursionError)
_PACKED = {".gz": "gzip", ".zst": "zstd"}

Row = tuple[str, Any]  # (place, raw row or Reject)


@dataclass(frozen=True)
class Stretch:
    """A file, or a piece of one: the bytes of whole lines, or row groups of Parquet.

    `first` is the number of the line or row with which it begins, `bytes` what it takes on disk.
    """

    path: Path
    start: int = 0
    stop: int | None = None
    first: int = 0
    bytes: int = 0

    def __iter__(self) -> Iterator[Row]:
        """(place, raw row) of each row. A text gives {"text"}; a row that cannot be read comes as a `Reject`."""
        reader = _READERS.get(_suffix(self.path))
        if reader is None:
            raise DataError(f"{self.path}: cannot read this kind of file; known are {', '.join(_READERS)}.")
        return reader(self)


def parts_of(files: list[Path], *, divide: bool) -> list[tuple[Stretch, ...]]:
    """Files in parts that can be read apart, in their order: files, groups of small ones, pieces of large ones.

    Where the parts begin depends on the files alone. `divide` says whether a file may be read in pieces.
    """
    target = min(max(sum(file.stat().st_size for file in files) // PARTS, SMALLEST_PART), LARGEST_PART)
    parts: list[tuple[Stretch, ...]] = []
    gathered: list[Stretch] = []
    size = 0
    for stretch, stretch_bytes in (piece for file in files for piece in _pieces(file, target, divide)):
        gathered.append(replace(stretch, bytes=stretch_bytes))
        size += stretch_bytes
        if size >= target:
            parts.append(tuple(gathered))
            gathered, size = [], 0
    return [*parts, tuple(gathered)] if gathered else parts


def _pieces(file: Path, target: int, divide: bool) -> Iterator[tuple[Stretch, int]]:
    size = file.stat().st_size
    if not divide or size <= target:
        yield Stretch(file), size
    elif file.suffix == ".parquet":
        yield from _parquet_pieces(file, target)
    elif file.suffix in (".jsonl", ".ndjson"):
        yield from _line_pieces(file, target)
    else:
        yield Stretch(file), size


def _parquet_pieces(file: Path, target: int) -> Iterator[tuple[Stretch, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(file).metadata
    except pyarrow.ArrowInvalid:
        yield Stretch(file), file.stat().st_size  # its reader says what is wrong
        return
    start = first = size = rows = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        rows += group.num_rows
        if size >= target or number + 1 == metadata.num_row_groups:
            yield Stretch(file, start, number + 1, first), size
            start, first, size = number + 1, rows, 0


def _line_pieces(file: Path, target: int) -> Iterator[tuple[Stretch, int]]:
    """Pieces of about `target` bytes that begin at a line; their lines are counted, so that a place can be told."""
    with file.open("rb") as lines:
        start = first = 0
        while block := lines.read(target):
            newlines = block.count(b"\n")
            while not block.endswith(b"\n") and (rest := lines.readline(LARGEST_PART)):
                block = rest
                newlines += rest.count(b"\n")
            yield Stretch(file, start, lines.tell(), first), lines.tell() - start
            start, first = lines.tell(), first + newlines


def files_of(path: Path, patterns: tuple[str, ...], *, any_suffix: bool = False) -> list[Path]:
    """A file, or the files of a folder that fit one of `patterns`, in the order of names.

    Args:
        patterns: glob patterns inside a folder, with or without .gz or .zst; the first that matches anything decides.
        any_suffix: the caller has a reader of its own; otherwise only files count that are read here.

    Raises:
        DataError: there is no such path, it cannot be read, or nothing in the folder fits.
    """
    if path.is_file():
        if not any_suffix and _suffix(path) not in _READERS:
            raise DataError(
                f"{path}: cannot read {path.suffix or 'a file without suffix'}; "
                f"known are {', '.join(_READERS)}, also with {' or '.join(_PACKED)}."
            )
        return [path]
    if not path.is_dir():
        raise DataError(f"No file or folder {path}.")
    for pattern in patterns:
        found = sorted(
            {
                file
                for form in (pattern, *(pattern + packed for packed in _PACKED))
                for file in path.glob(form)
                if file.is_file() and (any_suffix or _suffix(file) in _READERS)
            }
        )
        if found:
            return found
    there = sorted(entry.name for entry in path.iterdir())
    raise DataError(f"{path} holds none of {', '.join(patterns)} but {', '.join(there[:8]) or 'nothing'}.")


def _suffix(path: Path) -> str:
    return (Path(path.stem).suffix if path.suffix in _PACKED else path.suffix).lower()


def open_bytes(path: Path):
    """The bytes of a file, unpacked if its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _damaged(path: Path, error: Exception) -> Reject:
    if path.suffix not in _PACKED:
        raise error  # a disk that fails is not a bad row
    return Reject(f"damaged {_PACKED[path.suffix]}", f"{error}; the rest of the file is lost")


def decoded(raw: bytes | bytearray, encoding: str = "utf-8-sig", first_byte: int = 0) -> str | Reject:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        return Reject("invalid UTF-8", f"byte {first_byte + error.start}")


def whole_text(path: Path, encoding: str = "utf-8-sig") -> str | Reject:
    """All text of a file, or why there is none."""
    try:
        with open_bytes(path) as file:
            return decoded(file.read(), encoding)
    except _DAMAGED as error:
        return _damaged(path, error)


def _between_separators(path: Path) -> Iterator[tuple[bytes | bytearray, bool]]:
    """The bytes of each document of a text file and whether a separator closes it.

    Holds one document and one block of the file. A long document comes as a bytearray, to be cleared when decoded.
    """
    separator = DOCUMENT_SEPARATOR.encode()
    held = bytearray()
    with open_bytes(path) as file:
        while block := file.read(_BLOCK):
            overlap = max(0, len(held) - len(separator) + 1)  # a separator may lie across two blocks
            held += block
            end = held.find(separator, overlap)
            if end < 0:
                continue
            *whole, rest = bytes(memoryview(held)[end + len(separator) :]).split(separator)
            del held[end:]
            yield held, True
            yield from ((document, True) for document in whole)
            held = bytearray(rest)
    yield held, False


def _read_text(stretch: Stretch) -> Iterator[Row]:
    """Documents between separators, one at a time, so that a file of 2 GB needs the memory of its longest document.

    A last document that no separator closes although separators stand before it has "unclosed": True beside its text.
    """
    path, line, byte = stretch.path, 1, 0
    try:
        for document, closed in _between_separators(path):
            size, newlines = len(document), document.count(b"\n")
            text = decoded(document, "utf-8-sig" if byte == 0 else "utf-8", first_byte=byte)
            if isinstance(document, bytearray):
                document.clear()  # a book of 100 MB need not be held twice
            if isinstance(text, Reject):
                yield str(path), text
            elif closed or (text and not text.isspace()):  # a separator also closes the last document of TinyStories
                length = len(text)
                text = text.lstrip("\r\n")
                blank = newlines - text.count("\n") if text and len(text) < length else 0
                row = {"text": text.rstrip("\r\n")}
                del text
                yield f"{path}:{line + blank}", row if closed or not byte else {**row, "unclosed": True}
            line, byte = line + newlines, byte + size + len(DOCUMENT_SEPARATOR)
    except _DAMAGED as error:
        yield f"{path}:{line}", _damaged(path, error)


def read_lines(
    source: Path | Stretch, encoding: str = "utf-8-sig", *, empty: bool = False
) -> Iterator[tuple[str, str | Reject]]:
    """(file:line, line) of a text file or a stretch of one; empty lines are passed over unless `empty`."""
    stretch = source if isinstance(source, Stretch) else Stretch(source)
    path, number = stretch.path, stretch.first
    try:
        with open_bytes(path) as file:
            if stretch.start:
                file.seek(stretch.start)
            while (stretch.stop is None or file.tell() < stretch.stop) and (raw := file.readline(LONGEST_LINE)):
                number += 1
                whole = len(raw) < LONGEST_LINE or raw.endswith(b"\n")
                line = decoded(raw, encoding)
                del raw  # while a long line is parsed it need not be held as bytes too
                if not whole:
                    line = Reject("over-long", f"a line of more than {LONGEST_LINE:,} bytes")
                    while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                if isinstance(line, str):
                    line = line.rstrip("\r\n")
                lines = [line] if empty or isinstance(line, Reject) or (line and not line.isspace()) else []
                del line
                while lines:
                    yield f"{path}:{number}", lines.pop()  # what is given is not held here as well
    except _DAMAGED as error:
        yield f"{path}:{number + 1}", _damaged(path, error)


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _not_json(error: Exception, text: str = "", start: int = 0) -> Reject:
    if isinstance(error, _DuplicateKey):
        return Reject("duplicate keys", repr(str(error)))
    if isinstance(error, json.JSONDecodeError):
        return Reject("not JSON", f"{error.msg} at line {error.lineno}, column {error.colno}")
    return Reject("not JSON", str(error).partition(";")[0])


def _read_json_lines(stretch: Stretch) -> Iterator[Row]:
    for place, line in read_lines(stretch):
        if isinstance(line, Reject):
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
    if isinstance(line, Reject) or not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except _NOT_JSON:
        return False


def _read_json(stretch: Stretch) -> Iterator[Row]:
    path = stretch.path
    if _is_json_lines(path):
        yield from _read_json_lines(Stretch(path))
        return
    text = whole_text(path)
    if isinstance(text, Reject):
        yield str(path), text
    elif text.lstrip().startswith("["):
        yield from _json_array(path, text)
    else:
        yield from _json_object(path, text)


def _json_object(path: Path, text: str) -> Iterator[Row]:
    """One object over many lines, or JSON lines under another name."""
    try:
        yield f"{path}, row 0", _DECODER.decode(text)
        return
    except _NOT_JSON as error:
        failure = _not_json(error)
    lines = list(_read_json_lines(Stretch(path)))
    if any(isinstance(row, dict | list) for _, row in lines):
        yield from lines
    else:
        yield str(path), failure


_BETWEEN = re.compile(r"\s*,?\s*")


def _json_array(path: Path, text: str) -> Iterator[Row]:
    """The elements of an array, one at a time. After a damaged one comes the next that begins where elements begin."""
    at = _BETWEEN.match(text, text.index("[") + 1).end()
    column = at - (text.rfind("\n", 0, at) + 1)
    number = 0
    begin = re.compile(r"\n" + " " * column + r"(?=[\[{])") if "\n" in text[:at] else None
    while at < len(text) and text[at] != "]":
        place = f"{path}, row {number}"
        number += 1
        try:
            row, at = _DECODER.raw_decode(text, at)
        except _NOT_JSON as error:
            yield place, _not_json(error)
            found = begin.search(text, max(at + 1, getattr(error, "pos", 0))) if begin else None
            # A duplicate key or a number too long does not say where it stands: go on with the next element
            if found is None:
                return
            at = found.end()
        else:
            yield place, row
        at = _BETWEEN.match(text, at).end()
    if text[at:].strip() != "]":
        said = "the array does not end" if at >= len(text) else "something follows the array"
        yield f"{path}, row {number}", Reject("not JSON", f"{said}, at line {text.count(chr(10), 0, at) + 1}")


def _read_csv(stretch: Stretch) -> Iterator[Row]:
    """Rows under a header line, as objects; commas, or tabs in .tsv."""
    path = stretch.path
    text = whole_text(path)
    if isinstance(text, Reject):
        yield str(path), text
        return
    csv.field_size_limit(LONGEST_LINE)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if _suffix(path) == ".tsv" else ",", strict=True)
    header = None
    while True:
        place = f"{path}:{rows.line_num + 1}"
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, Reject("not CSV", str(error))
            continue
        if header is None:
            header = values
        elif len(values) == len(header):
            yield place, dict(zip(header, values, strict=True))
        elif values:
            yield place, Reject("not CSV", f"{len(values)} fields under a header of {len(header)}")


def _read_parquet(stretch: Stretch) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    path, number = stretch.path, stretch.first
    try:
        file = pyarrow.parquet.ParquetFile(path)
        groups = range(file.metadata.num_row_groups)[stretch.start : stretch.stop]
        for batch in file.iter_batches(batch_size=256, row_groups=list(groups)):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        where = f"{path}, row {number}" if number else str(path)
        yield where, Reject("not Parquet", (str(error).splitlines() or [type(error).__name__])[0])


_READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".tokens": _read_text,
    ".py": _read_text,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
