"""Finds the data files of a folder and computes a digest of them."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from rorchat.errors import DataError
from rorchat.reading.encodings import COMPRESSIONS, content_suffix
from rorchat.reading.formats import READERS
from rorchat.reading.text_encodings import detect_encoding
from rorchat.rows import RejectedRow

SAMPLES, SAMPLE_BYTES = 16, 2**16  # samples per file, for the digest, and their size


def refuse_unknown_suffix(path: Path) -> str:
    """Why there is no reader for a file, by its suffix; empty if there is one."""
    if content_suffix(path) in READERS:
        return ""
    return f"unknown suffix {path.suffix}" if path.suffix else "no suffix"


def refuse_other_than_text(path: Path) -> str:
    """As `refuse_unknown_suffix`, but a file whose content is certainly text is accepted, whatever its name."""
    why = refuse_unknown_suffix(path)
    if not why:
        return ""
    if not path.stat().st_size:
        return f"{why}, empty"
    encoding = detect_encoding(path)
    if isinstance(encoding, RejectedRow):
        return f"{why}, {encoding}"
    return "" if encoding.is_certainly_text else f"{why}, not certainly text"


def find_files(
    path: Path, patterns: tuple[str, ...], refuse: Callable[[Path], str] = refuse_unknown_suffix
) -> list[Path]:
    """The file at `path`, or the files of a folder that match, sorted by name. Hidden files are ignored.

    Args:
        patterns: glob patterns inside the folder. The first that matches any file is used, with and without .gz or
            .zst.
        refuse: says why a file cannot be read; empty if it can.

    Raises:
        DataError: the path does not exist, the file cannot be read, or no file of the folder matches.
    """
    if path.is_file():
        if why := refuse(path):
            raise DataError(
                f"{path} cannot be read: {why}; "
                f"supported are {', '.join(READERS)}, optionally with {' or '.join(COMPRESSIONS)}."
            )
        return [path]
    if not path.is_dir():
        raise DataError(f"No file or folder {path}.")
    for pattern in patterns:
        files = {
            file
            for suffix in ("", *COMPRESSIONS)
            for file in path.glob(pattern + suffix)
            if file.is_file() and not is_hidden(file, path) and not refuse(file)
        }
        if files:
            return sorted(files)
    names = [
        f"{entry.name} ({why})" if entry.is_file() and (why := refuse(entry)) else entry.name
        for entry in sorted(path.iterdir())
    ]
    if not names:
        raise DataError(f"{path} is an empty folder: it has no file that matches {', '.join(patterns)}.")
    raise DataError(f"{path} has no file that matches {', '.join(patterns)}, only {', '.join(names[:8])}.")


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether the name of a file, or of a folder between `folder` and the file, begins with a dot."""
    return any(name.startswith(".") for name in file.relative_to(folder).parts)


def files_digest(files: Iterable[Path], root: Path) -> str:
    """sha256 of the names of files below `root`, their sizes and samples of their bytes.

    Every start of a run computes it, also for corpora that take minutes to read. Therefore only SAMPLES pieces of a
    large file are hashed, the first and the last bytes among them. A copy of the folder has the same digest, which it
    would not have if modification times were used. An edit that keeps the size and falls between two samples is not
    detected.
    """
    sha256 = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        sha256.update(os.fsencode(os.path.relpath(file, root)) + f"\0{size}\0".encode())
        with file.open("rb") as data:
            if size <= SAMPLES * SAMPLE_BYTES:
                sha256.update(data.read())
                continue
            for number in range(SAMPLES):
                data.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                sha256.update(data.read(SAMPLE_BYTES))
    return sha256.hexdigest()
