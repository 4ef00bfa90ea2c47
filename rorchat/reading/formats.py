"""Reads the rows of a file with the reader for its suffix."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rorchat.errors import DataError
from rorchat.reading.arrow import read_arrow
from rorchat.reading.csv_rows import read_csv
from rorchat.reading.encodings import content_suffix
from rorchat.reading.json_rows import read_json, read_json_lines
from rorchat.reading.long_texts import Limits
from rorchat.reading.notes import ReadingNotes
from rorchat.reading.parquet import read_parquet
from rorchat.reading.plain_texts import read_plain_text
from rorchat.reading.slices import FileSlice, Row
from rorchat.reading.text import read_documents
from rorchat.reading.zip_files import ARCHIVE, reject_archive

READERS: dict[str, Callable[[FileSlice], Iterator[Row]]] = {
    ".txt": read_documents,
    ".md": read_documents,
    ".tokens": read_documents,
    ".py": read_documents,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ARCHIVE: reject_archive,  # the files of an archive that is not damaged are read one by one
}
TEXT_SUFFIXES = {suffix for suffix, reader in READERS.items() if reader is read_documents}


def read_any_text(file_slice: FileSlice, limits: Limits, notes: ReadingNotes) -> Iterator[Row]:
    """As `read_rows`, but text files may have any encoding and name, and their long texts are several rows."""
    suffix = content_suffix(file_slice.path)
    if suffix in TEXT_SUFFIXES or suffix not in READERS:
        return read_plain_text(file_slice, limits, notes)
    return read_rows(file_slice)


def read_rows(source: Path | FileSlice) -> Iterator[Row]:
    """Yields (place, raw row) of a file or of a slice of it. A row that cannot be read is a `RejectedRow`.

    Raises:
        DataError: no reader for files with this suffix.
    """
    file_slice = source if isinstance(source, FileSlice) else FileSlice(source)
    reader = READERS.get(content_suffix(file_slice.path))
    if reader is None:
        raise DataError(f"{file_slice.path}: unknown file type; supported are {', '.join(READERS)}.")
    return reader(file_slice)
