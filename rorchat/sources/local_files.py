"""The files that a source reads, those that it does not, and the rows of a file."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rorchat.reading.folders import find_files, refuse_other_than_text, refuse_packing, refuse_unknown_suffix
from rorchat.reading.formats import read_any_text
from rorchat.reading.listing import Listing, list_files
from rorchat.reading.notes import ReadingNotes
from rorchat.reading.slices import FileSlice
from rorchat.reading.zip_files import file_size
from rorchat.sources.base import PlacedRow, RowStats, Source


def find_source_files(source: Source, path: Path) -> list[Path]:
    """The files of a local source, in order.

    Raises:
        DataError: the path does not exist, or has no file that the source can read.
    """
    return find_files(path, source.files, _refusal(source))


def _refusal(source: Source) -> Callable[[Path], str]:
    """The function that says why a source cannot read a file."""
    if source.read:
        return refuse_packing
    return refuse_other_than_text if source.long_texts else refuse_unknown_suffix


def find_beside_files(source: Source, listing: Listing) -> list[Path]:
    """The files of a folder that a source reads together with its own."""
    return [file for name in source.beside for file in listing.match(f"**/{name}")]


def note_unread_files(source: Source, folder: Path) -> ReadingNotes:
    """Notes about the files of a folder that the source does not read, such as matches of a later pattern in `FILES`.

    Raises:
        DataError: the folder has no file that the source can read.
    """
    listing, refuse, notes = list_files(folder), _refusal(source), ReadingNotes()
    read = {*find_source_files(source, folder), *find_beside_files(source, listing)}
    for path, why in listing.left_out.items():
        notes.add_unread(path, why, 0 if path.is_symlink() or path.is_dir() else file_size(path))
    for file in listing.files:
        if file not in read:
            size = file_size(file)
            why = refuse(file) if size else "empty"
            notes.add_unread(file, why or f"not one of the files of {source.name}", size)
    notes.total_bytes = sum(notes.unread_bytes.values()) + sum(map(file_size, read))
    return notes


def read_slice(source: Source, file_slice: FileSlice, stats: RowStats) -> Iterator[PlacedRow]:
    """The rows of a slice of a file. Files are counted in `stats`, and one without rows is noted as unread."""
    path = file_slice.path
    if source.long_texts:
        rows = read_any_text(file_slice, source.long_texts, stats.reading)
    else:
        rows = iter(source.read(path)) if source.read else source.read_slice(file_slice)
    first = [row for row in [next(rows, None)] if row is not None]
    if first:
        stats.reading.files += not file_slice.start
    elif not file_slice.start and file_slice.stop is None:
        size = file_size(path)
        stats.reading.add_unread(path, "only white space" if size else "empty", size)
    while first:
        yield first.pop()  # pop: keep no reference to a yielded row
    yield from rows
