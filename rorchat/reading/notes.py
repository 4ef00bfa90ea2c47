"""What was noticed while files were read: how many, in which encodings, and which were not read."""

from dataclasses import dataclass, field
from pathlib import Path

SHOWN_FILES = 10  # that are printed by name


@dataclass
class ReadingNotes:
    """Counts of the files of a source.

    Attributes:
        files: files that were read.
        decoded: the paths of files in an encoding other than UTF-8, by its name.
        long_texts: texts that were cut into several documents.
        unread: path of a file -> why it was not read.
        unread_bytes: path of such a file -> its size on disk.
        total_bytes: size on disk of all files of the source's folder, read or not; 0 if there is no folder.
    """

    files: int = 0
    decoded: dict[str, list[str]] = field(default_factory=dict)
    long_texts: int = 0
    unread: dict[str, str] = field(default_factory=dict)
    unread_bytes: dict[str, int] = field(default_factory=dict)
    total_bytes: int = 0

    def add(self, other: "ReadingNotes") -> None:
        """Adds the counts of a later part of the same source."""
        self.files, self.long_texts = self.files + other.files, self.long_texts + other.long_texts
        for name, paths in other.decoded.items():
            self.decoded.setdefault(name, []).extend(paths)
        self.unread |= other.unread
        self.unread_bytes |= other.unread_bytes
        self.total_bytes += other.total_bytes

    def add_unread(self, path: Path, why: str, size: int) -> None:
        """Notes that a file of this size was not read. The first reason counts."""
        self.unread.setdefault(str(path), why)
        self.unread_bytes[str(path)] = size

    def describe_decoded(self, folder: str = "") -> list[str]:
        """A line for each encoding other than UTF-8; the names of files are relative to `folder`."""
        return [
            f"{count_files(len(paths))} decoded as {name}: {_list_names([_relative(path, folder) for path in paths])}"
            for name, paths in sorted(self.decoded.items())
        ]

    def describe_unread(self, folder: str = "") -> str:
        """The files that were not read, the largest first, with the reasons; names are relative to `folder`."""
        files = sorted(self.unread.items(), key=lambda item: (-self.unread_bytes.get(item[0], 0), item[0]))
        return _list_names([f"{_relative(path, folder)} ({why})" for path, why in files])

    def describe_share(self) -> str:
        """The share of the bytes of a folder that were not read, in parentheses; empty without a folder."""
        if not self.total_bytes:
            return ""
        share = sum(self.unread_bytes.values()) / self.total_bytes
        return f" ({'less than 1%' if 0 < share < 0.01 else f'{share:.0%}'} of the bytes)"


def count_files(number: int) -> str:
    """A number of files in words: 1 file, 2 files."""
    return f"{number:,} file{'s' if number != 1 else ''}"


def _relative(path: str, folder: str) -> str:
    return path.removeprefix(folder.rstrip("/") + "/")


def _list_names(names: list[str]) -> str:
    more = f", and {len(names) - SHOWN_FILES:,} more" if names[SHOWN_FILES:] else ""
    return ", ".join(names[:SHOWN_FILES]) + more
