"""Finds the data files of a folder and computes a digest of them."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from rorchat.errors import DataError
from rorchat.reading.compression import COMPRESSIONS, HEADER_BYTES, refuse_header
from rorchat.reading.encodings import compression_suffix, content_suffix
from rorchat.reading.formats import READERS
from rorchat.reading.listing import Listing, is_folder, list_files
from rorchat.reading.saved_datasets import ARROW
from rorchat.reading.text_encodings import detect_encoding
from rorchat.reading.zip_files import (
    ARCHIVE,
    file_exists,
    file_size,
    find_archive,
    is_archive,
    open_file,
    refuse_archive,
    refuse_member,
)
from rorchat.rows import RejectedRow

SAMPLES, SAMPLE_BYTES = 16, 2**16  # samples per file, for the digest, and their size
UNPACKED_FIRST = {".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"}  # archives that are not read
#: Read at any position, so only as files of their own.
NOT_STREAMED = {".parquet": "Parquet", ARROW: "Arrow", ARCHIVE: "an archive"}
#: The files of a saved dataset, whose names say nothing about their source.
SAVED_DATASET = f"**/*{ARROW}"
SHOWN_FILES = 8  # in an error message


def refuse_packing(path: Path) -> str:
    """Why an archive, or a file in one, cannot be opened, though it need not be damaged; empty if it can."""
    suffix, compression = content_suffix(path), compression_suffix(path)
    if why := refuse_member(path):
        return why
    if suffix in UNPACKED_FIRST:
        return "an archive: unpack it"
    if suffix in NOT_STREAMED and (compression or find_archive(path)):
        return f"{NOT_STREAMED[suffix]} inside an archive: unpack it"
    if compression:
        with open_file(path) as file:
            return refuse_header(file.read(HEADER_BYTES), compression)
    return refuse_archive(path) if is_archive(path) else ""


def refuse_unknown_suffix(path: Path) -> str:
    """Why there is no reader for a file, by its suffix; empty if there is one."""
    if why := refuse_packing(path):
        return why
    suffix = content_suffix(path)
    if suffix in READERS:
        return ""
    return f"unknown suffix {suffix}" if suffix else "no suffix"


def refuse_other_than_text(path: Path) -> str:
    """As `refuse_unknown_suffix`, but a file whose content is certainly text is accepted, whatever its name."""
    if why := refuse_packing(path):
        return why
    why = refuse_unknown_suffix(path)
    if not why:
        return ""
    if not file_size(path):
        return f"{why}, empty"
    encoding = detect_encoding(path)
    if isinstance(encoding, RejectedRow):
        return f"{why}, {encoding}"
    return "" if encoding.is_certainly_text else f"{why}, not certainly text"


def find_files(
    path: Path, patterns: tuple[str, ...], refuse: Callable[[Path], str] = refuse_unknown_suffix
) -> list[Path]:
    """The file at `path`, or the files of a folder or zip archive that match, sorted by name.

    Hidden files are ignored.

    Args:
        patterns: glob patterns inside the folder. The first that matches any file is used; a file may be compressed,
            and its name may have capitals. A saved dataset matches if no pattern does.
        refuse: says why a file cannot be read; empty if it can.

    Raises:
        DataError: the path does not exist, the file cannot be read, or no file of the folder matches.
    """
    if not is_folder(path):
        return [_require_readable(path, refuse)]
    listing = list_files(path)
    for pattern in (*patterns, SAVED_DATASET):
        if files := [file for file in listing.match(pattern) if not refuse(file)]:
            return files
    raise DataError(_describe_no_match(listing, patterns, refuse))


def _require_readable(path: Path, refuse: Callable[[Path], str]) -> Path:
    if not file_exists(path):
        raise DataError(f"No file or folder {path}.")
    if why := refuse(path):
        supported = f"; supported are {', '.join(READERS)}, optionally with {', '.join(COMPRESSIONS)}"
        raise DataError(f"{path} cannot be read: {why}{'' if refuse_packing(path) else supported}.")
    return path


def _describe_no_match(listing: Listing, patterns: tuple[str, ...], refuse: Callable[[Path], str]) -> str:
    wanted = f"file that matches {', '.join(patterns)}"
    reasons = {file: refuse(file) for file in listing.files[:SHOWN_FILES]} | listing.left_out
    if not reasons:
        is_empty = listing.folder.is_file() or not any(listing.folder.iterdir())
        kind = "an empty folder" if is_empty else "a folder of hidden files and empty folders"
        return f"{listing.folder} is {kind}: it has no {wanted}."
    names = [f"{file.relative_to(listing.folder)}{f' ({why})' if why else ''}" for file, why in sorted(reasons.items())]
    return f"{listing.folder} has no {wanted}, only {', '.join(names[:SHOWN_FILES])}."


def files_digest(files: Iterable[Path], root: Path) -> str:
    """sha256 of the names of files below `root`, their sizes and samples of their bytes.

    Every start of a run computes it, also for corpora that take minutes to read. Therefore only SAMPLES pieces of a
    large file are hashed, the first and the last bytes among them. A copy of the folder has the same digest, which it
    would not have if modification times were used. An edit that keeps the size and falls between two samples is not
    detected. Of files in a zip archive, the archive is hashed.
    """
    sha256 = hashlib.sha256()
    for file in dict.fromkeys(find_archive(file) or file for file in files):
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
