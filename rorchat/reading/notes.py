"""What was noticed while files were read: how many, in which encodings, and which were not read."""

from dataclasses import dataclass, field

SHOWN_FILES = 10  # that are printed by name


@dataclass
class ReadingNotes:
    """Counts of the files of a source.

    Attributes:
        files: files that were read.
        decoded: the paths of files in an encoding other than UTF-8, by its name.
        long_texts: texts that were cut into several documents.
        unread: path of a file -> why it was not read.
    """

    files: int = 0
    decoded: dict[str, list[str]] = field(default_factory=dict)
    long_texts: int = 0
    unread: dict[str, str] = field(default_factory=dict)

    def add(self, other: "ReadingNotes") -> None:
        """Adds the counts of a later part of the same source."""
        self.files, self.long_texts = self.files + other.files, self.long_texts + other.long_texts
        for name, paths in other.decoded.items():
            self.decoded.setdefault(name, []).extend(paths)
        self.unread |= other.unread

    def describe_decoded(self, folder: str = "") -> list[str]:
        """A line for each encoding other than UTF-8; the names of files are relative to `folder`."""
        return [
            f"{count_files(len(paths))} decoded as {name}: {_list_names([_relative(path, folder) for path in paths])}"
            for name, paths in sorted(self.decoded.items())
        ]

    def describe_unread(self, folder: str = "") -> str:
        """The files that were not read, with the reasons; their names are relative to `folder`."""
        return _list_names([f"{_relative(path, folder)} ({why})" for path, why in sorted(self.unread.items())])


def count_files(number: int) -> str:
    """A number of files in words: 1 file, 2 files."""
    return f"{number:,} file{'s' if number != 1 else ''}"


def _relative(path: str, folder: str) -> str:
    return path.removeprefix(folder.rstrip("/") + "/")


def _list_names(names: list[str]) -> str:
    more = f", and {len(names) - SHOWN_FILES:,} more" if names[SHOWN_FILES:] else ""
    return ", ".join(names[:SHOWN_FILES]) + more
