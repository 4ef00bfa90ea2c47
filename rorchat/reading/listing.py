"""Lists the files of a folder or of a zip archive."""

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from rorchat.reading.encodings import compression_suffix
from rorchat.reading.saved_datasets import choose_files
from rorchat.reading.zip_files import is_archive, list_members

READ_ALREADY = "a link to what is read already"


@dataclass
class Listing:
    """The files of a folder or zip archive and of everything below, sorted by name, without hidden ones.

    Attributes:
        left_out: links that lead nowhere or to what is listed already, folders that cannot be opened, and copies of
            rows -> the reason.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)

    def match(self, pattern: str) -> list[Path]:
        """The files that match a glob pattern inside the folder, in capitals or not, compressed or not."""
        parts = pattern.lower().split("/")
        return [file for file in self.files if any(_matches(names, parts) for names in self._names(file))]

    def _names(self, file: Path) -> Iterator[list[str]]:
        """The parts of the path of a file, with and without the suffix of its compression."""
        *folders, name = (part.lower() for part in file.relative_to(self.folder).parts)
        yield [*folders, name]
        if suffix := compression_suffix(file):
            yield [*folders, name.removesuffix(suffix)]


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, in which `**` stands for any number of folders."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_matches(names[start:], pattern[1:]) for start in range(len(names)))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, or a zip archive that can be listed."""
    return path.is_dir() or (is_archive(path) and path.is_file() and _list_archive(path) != [path])


def list_files(folder: Path, *, every_split: bool = False) -> Listing:
    """The files of a folder or zip archive. Links are followed, but nothing is listed twice.

    Args:
        every_split: list all files of datasets that `datasets` has saved, not only those with the rows to train on.
    """
    listing = Listing(folder)
    if folder.is_dir():
        _Walk(listing).run()
    else:
        listing.files = _list_archive(folder)
    listing.files.sort()
    if not every_split:
        listing.files, copies = choose_files(listing.files)
        listing.left_out |= copies
    return listing


def _list_archive(archive: Path) -> list[Path]:
    """The files in a zip archive; the archive itself if they cannot be listed, which its reader reports."""
    try:
        members = list_members(archive)
    except (zipfile.BadZipFile, NotImplementedError):
        return [archive]
    return [file for file in members if not any(name.startswith(".") for name in file.relative_to(archive).parts)]


class _Walk:
    """Adds the files below a folder to a listing: first those that no link leads to, then those behind links."""

    def __init__(self, listing: Listing):
        self.listing = listing
        self._real: set[Path] = set()  # real paths of what was listed
        self._around: set[Path] = set()  # folders around those that were entered
        self._links: list[Path] = []

    def run(self) -> None:
        self._enter(self.listing.folder, self.listing.folder.resolve())
        while self._links:
            self._follow(self._links.pop(0))

    def _enter(self, folder: Path, real: Path) -> None:
        self._around.update(real.parents)
        folders = [(folder, real)]
        while folders:
            folder, real = folders.pop()
            self._real.add(real)
            folders += self._list(folder, real)

    def _list(self, folder: Path, real_folder: Path) -> Iterator[tuple[Path, Path]]:
        """Adds the files of a folder; yields (path, real path) of each folder in it."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError:
            if folder == self.listing.folder:
                raise
            self.listing.left_out[folder] = "no permission to open it"
            return
        for entry in entries:
            path, real = folder / entry.name, real_folder / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                self._links.append(path)
            elif real in self._real:
                self.listing.left_out[path] = READ_ALREADY
            elif entry.is_dir():
                yield path, real
            else:
                self._add(path, real)

    def _follow(self, link: Path) -> None:
        try:
            real = Path(os.path.realpath(link, strict=True))
        except OSError:  # it leads nowhere, or to itself
            self.listing.left_out[link] = f"a link to {os.readlink(link)}, which does not exist"
            return
        if real in self._real:
            self.listing.left_out[link] = READ_ALREADY
        elif real in self._around:
            self.listing.left_out[link] = "a link to a folder around it"
        elif real.is_dir():
            self._enter(link, real)
        else:
            self._add(link, real)

    def _add(self, path: Path, real: Path) -> None:
        self._real.add(real)
        if not path.is_file():
            self.listing.left_out[path] = "neither a file nor a folder"
        elif is_archive(path):
            self.listing.files += _list_archive(path)
        else:
            self.listing.files.append(path)
