"""Reads the rows of evaluation sets: files, folders, or sources."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rorchat.errors import DataError
from rorchat.reading.encodings import LONGEST_LINE, content_suffix, read_text
from rorchat.reading.folders import files_digest, find_files, refuse_unknown_suffix
from rorchat.reading.formats import READERS, read_rows
from rorchat.reading.listing import READ_ALREADY, is_folder, list_files
from rorchat.reading.zip_files import file_exists
from rorchat.rows import RejectedRow
from rorchat.sources.registry import find_source, list_sources, load_rows, source_digest

_TABLES = {".csv", ".tsv"}  # read without a header, because MMLU's files have none
# Files that accompany an evaluation set and contain no text of it
_COMPANIONS = {"", ".lst", ".yaml", ".yml", ".png", ".jpg", ".pdf", ".html", ".sh", ".cff", ".bib"}


@dataclass
class EvaluationSet:
    """An evaluation set, given as a file, a folder or a spec of a source, and what was read from it."""

    given: str
    rows: int = 0
    compared: int = 0  # rows with a string of at least n words
    words: int = 0  # words in such strings

    @property
    def is_source(self) -> bool:
        return self.given.partition("=")[0] in list_sources() and not file_exists(Path(self.given).expanduser())

    def paths(self) -> tuple[list[Path], list[Path]]:
        """(files that are read, other files in the folder); both are empty for a source."""
        path = Path(self.given).expanduser()
        if self.is_source:
            return [], []
        if not is_folder(path):
            return find_files(path, ("**/*",)), []
        listing = list_files(path, every_split=True)
        others = {file for file in listing.files if refuse_unknown_suffix(file)}
        missing = {link for link, why in listing.left_out.items() if why != READ_ALREADY}
        return [file for file in listing.files if file not in others], sorted(others | missing)

    def files(self) -> Iterator[tuple[str, Iterable[object]]]:
        """(name, rows) of every file, or of the source.

        Raises:
            DataError: a file cannot be read: an incomplete comparison would be worthless.
        """
        if self.is_source:
            kind = find_source(self.given.partition("=")[0]).kinds[0]
            yield self.given, _require_readable(load_rows(self.given, kind).raw)
            return
        readable, others = self.paths()
        unknown = [str(file) for file in others if content_suffix(file) not in _COMPANIONS]
        if unknown:
            more = f" ({len(unknown) - 1} other files cannot be read either)" if unknown[1:] else ""
            raise DataError(
                f"The evaluation text of {unknown[0]} cannot be read{more}: name the readable files one by one, or "
                f"convert it to one of {', '.join(sorted(READERS))}."
            )
        for file in readable:
            yield "/".join(file.parts[-2:]), _read_rows(file)

    def require_text(self, n: int) -> None:
        """Raises DataError if nothing can be compared with this set."""
        if not self.words:
            raise DataError(
                f"{self.given} has no string of {n} words in its {self.rows:,} rows: nothing would be compared. Remove "
                "it, or give another file."
            )

    def describe(self, n: int) -> str:
        """What is compared and what cannot be, in lines for the user."""
        lines = [f"against {self.given}: {self.words:,} words of {self.compared:,} rows"]
        if self.compared < self.rows:
            lines.append(
                f"  {self.rows - self.compared:,} of {self.rows:,} rows have no string of {n} words: not compared"
            )
        others = [file.name for file in self.paths()[1]]
        if others:
            lines.append(f"  not read: {', '.join(others[:5])}{', ...' if others[5:] else ''}")
        return "\n".join(lines)

    def digest(self) -> str:
        """A digest of the content, as `rorchat.sources.registry.source_digest`; empty if the files are missing."""
        if self.is_source:
            return source_digest(self.given)
        path = Path(self.given).expanduser()
        if not file_exists(path):
            return ""
        return files_digest(self.paths()[0], path if path.is_dir() else path.parent)


def evaluation_digests(evaluation: list[str]) -> dict[str, str]:
    """evaluation set -> its digest."""
    return {given: EvaluationSet(given).digest() for given in sorted(evaluation)}


def _read_rows(file: Path) -> Iterator[object]:
    suffix = content_suffix(file)
    if suffix in _TABLES:
        return _read_table(file)
    return _require_readable(read_rows(file))


def _require_readable(rows: Iterable[tuple[str, object]]) -> Iterator[object]:
    for place, row in rows:
        if isinstance(row, RejectedRow):
            raise DataError(f"The evaluation text at {place} cannot be read: {row}.")
        yield row


def _read_table(file: Path) -> Iterator[list[str]]:
    text = read_text(file)
    if isinstance(text, RejectedRow):
        raise DataError(f"The evaluation text of {file} cannot be read: {text}.")
    csv.field_size_limit(LONGEST_LINE)
    try:
        yield from csv.reader(io.StringIO(text, newline=""), delimiter="\t" if content_suffix(file) == ".tsv" else ",")
    except csv.Error as error:
        raise DataError(f"The evaluation text of {file} cannot be read: {error}.") from None
