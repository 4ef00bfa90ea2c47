"""The files that a source reads, those that it does not, and the rows of a file."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rorchat.reading.folders import find_files, is_hidden, refuse_other_than_text, refuse_unknown_suffix
from rorchat.reading.formats import read_any_text
from rorchat.reading.slices import FileSlice
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
        return lambda path: ""
    return refuse_other_than_text if source.long_texts else refuse_unknown_suffix


def find_unread_files(source: Source, folder: Path) -> dict[str, str]:
    """The files of a folder that the source does not read, such as matches of a later pattern in `FILES`.

    Returns:
        path -> the reason.
    """
    known = {*find_source_files(source, folder), *(file for name in source.beside for file in folder.rglob(name))}
    others = sorted(
        file for file in folder.rglob("*") if file.is_file() and not is_hidden(file, folder) and file not in known
    )
    refuse = _refusal(source)
    return {
        str(file): ("empty" if not file.stat().st_size else refuse(file)) or f"not one of the files of {source.name}"
        for file in others
    }


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
        stats.reading.unread.setdefault(str(path), "only white space" if path.stat().st_size else "empty")
    while first:
        yield first.pop()  # pop: keep no reference to a yielded row
    yield from rows
