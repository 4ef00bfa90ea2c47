"""Zip archives as folders: the files in `texts.zip` have paths such as `texts.zip/poems/1.txt`.

So every reader, pattern and message works with them. Nothing is unpacked: a file is decompressed while it is read.
"""

import errno
import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from rorchat.reading.slices import FileSlice, Row
from rorchat.rows import RejectedRow

ARCHIVE = ".zip"
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
_OTHER_METHODS = {9: "deflate64", 93: "zstd", 95: "xz", 98: "PPMd"}
_ENCRYPTED, _PATCHED = 0x41, 0x20  # bits of the flags of a file
_SEVERAL_DISKS = "span multiple disks"  # in an error of `zipfile`, which is none about damage
_START = b"PK"


@dataclass(frozen=True)
class _Archive:
    zip_file: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]  # by their paths inside the archive


def is_archive(path: Path) -> bool:
    """Whether a path has the name of a zip archive."""
    return path.suffix.lower() == ARCHIVE


def find_archive(path: Path) -> Path | None:
    """The zip archive that contains a file; None for a file of the file system."""
    if ARCHIVE not in str(path).lower():
        return None
    return next((parent for parent in path.parents if is_archive(parent) and parent.is_file()), None)


def list_members(archive: Path) -> list[Path]:
    """The files in a zip archive.

    Raises:
        zipfile.BadZipFile: the list of files is damaged.
        NotImplementedError: the archive has a newer format.
    """
    return [archive / name for name in _open(archive).members]


def file_exists(path: Path) -> bool:
    """Whether there is a file or folder, or such a file in a zip archive."""
    archive = find_archive(path)
    if archive is None:
        return path.exists()
    try:
        return _name_in(archive, path) in _open(archive).members
    except (zipfile.BadZipFile, NotImplementedError):
        return False


def file_size(path: Path) -> int:
    """The bytes of a file on disk, which may be compressed; 0 if it has no content."""
    archive = find_archive(path)
    if archive is None:
        return path.stat().st_size
    member = _find_member(archive, path)
    return member.compress_size if member.file_size else 0


def stat_file(path: Path) -> os.stat_result:
    """Size and times of a file, or of the zip archive that contains it."""
    return (find_archive(path) or path).stat()


def open_file(path: Path) -> IO[bytes]:
    """Opens a file, or a file in a zip archive, whose bytes are decompressed once."""
    archive = find_archive(path)
    if archive is None:
        return path.open("rb")
    member = _find_member(archive, path)
    with _damage_as_bad_zip():
        file = _open(archive).zip_file.open(member)
    return file


def refuse_member(path: Path) -> str:
    """Why a file in a zip archive cannot be opened; empty if it can."""
    archive = find_archive(path)
    if archive is None:
        return ""
    member = _find_member(archive, path)
    if is_archive(path):
        return "an archive inside an archive: unpack it"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "a link inside an archive: unpack it"
    if member.flag_bits & _ENCRYPTED:
        return "encrypted: unpack the archive with its password"
    if member.compress_type not in _METHODS or member.flag_bits & _PATCHED:
        method = _OTHER_METHODS.get(member.compress_type, f"method {member.compress_type}")
        return f"compressed with {method}, which cannot be read: unpack the archive"
    return ""


def refuse_archive(archive: Path) -> str:
    """Why a zip archive cannot be listed, if it is not damaged; otherwise empty."""
    try:
        _open(archive)
    except zipfile.BadZipFile as error:
        if _SEVERAL_DISKS in str(error):
            return "a part of a zip archive in several files: unpack it"
        with archive.open("rb") as file:
            return "" if file.read(len(_START)) == _START else "not a zip archive, as its name says"
    except NotImplementedError as error:
        return f"{error}: unpack it with another program"
    return ""


def reject_archive(file_slice: FileSlice) -> Iterator[Row]:
    """The rejected row of a damaged zip archive, whose files cannot be listed."""
    archive = file_slice.path
    try:
        _open(archive)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        yield str(archive), RejectedRow("damaged zip", str(error))


def _open(archive: Path) -> _Archive:
    status = archive.stat()
    return _open_version(archive, status.st_size, status.st_mtime_ns, os.getpid())


@lru_cache(maxsize=8)  # an archive of 100,000 files would take a second for each of them
def _open_version(archive: Path, size: int, modified: int, process: int) -> _Archive:
    """An open archive. Forked processes share the position in an open file, so each opens its own."""
    with _damage_as_bad_zip():
        file = zipfile.ZipFile(archive)
    members = {_clean(info.filename): info for info in file.infolist() if not info.is_dir()}
    return _Archive(file, {name: info for name, info in members.items() if name})


@contextmanager
def _damage_as_bad_zip() -> Iterator[None]:
    """`zipfile` raises other errors than BadZipFile if a name is not text, or a position is not in the archive."""
    try:
        yield
    except (ValueError, LookupError, struct.error) as error:
        raise zipfile.BadZipFile(str(error)) from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise zipfile.BadZipFile("a file begins outside of the archive") from None


def _clean(name: str) -> str:
    """The path of a file inside an archive, which cannot lead out of it."""
    return "/".join(part for part in PurePosixPath(name).parts if part not in ("/", "//", ".."))


def _name_in(archive: Path, path: Path) -> str:
    return path.relative_to(archive).as_posix()


def _find_member(archive: Path, path: Path) -> zipfile.ZipInfo:
    member = _open(archive).members.get(_name_in(archive, path))
    if member is None:
        raise FileNotFoundError(2, "no such file in the archive", str(path))
    return member
