"""What was noticed while files were read: how many, in which encodings, and which were not read."""

from dataclasses import dataclass, field

SHOWN_FILES = 10  # unread files that are printed by name


@dataclass
class ReadingNotes:
    """Counts of the files of a source.

    Attributes:
        files: files that were read.
        decoded: files in an encoding other than UTF-8, by its name.
        long_texts: texts that were cut into several documents.
        unread: path of a file -> why it was not read.
    """

    files: int = 0
    decoded: dict[str, int] = field(default_factory=dict)
    long_texts: int = 0
    unread: dict[str, str] = field(default_factory=dict)

    def add(self, other: "ReadingNotes") -> None:
        """Adds the counts of a later part of the same source."""
        self.files, self.long_texts = self.files + other.files, self.long_texts + other.long_texts
        for name, count in other.decoded.items():
            self.decoded[name] = self.decoded.get(name, 0) + count
        self.unread |= other.unread

    def describe_unread(self, folder: str = "") -> str:
        """The files that were not read, with the reasons; their names are relative to `folder`."""
        names = [f"{name.removeprefix(folder.rstrip('/') + '/')} ({why})" for name, why in sorted(self.unread.items())]
        more = f", and {len(names) - SHOWN_FILES:,} more" if names[SHOWN_FILES:] else ""
        return ", ".join(names[:SHOWN_FILES]) + more
