"""Opens files, compressed or not, and decodes their text."""

import lzma
import re
import zipfile
import zlib
from pathlib import Path
from typing import IO

from rorchat.reading.compression import COMPRESSIONS, describe_unsupported, open_compressed
from rorchat.reading.zip_files import find_archive, open_file
from rorchat.rows import RejectedRow

LONGEST_LINE = 2**27  # bytes; a longer line is rejected, which bounds the memory that one line can take
# OSError: a damaged gzip or bzip2 stream, and a damaged zstd stream in pyarrow
DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError)
# Characters that `errors="surrogateescape"` substitutes for invalid bytes. Valid UTF-8 never decodes to them.
BAD_BYTE = re.compile("[\udc80-\udcff]")


def compression_suffix(path: Path) -> str:
    """The lower-case suffix of the compression of a file; empty if it has none."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def content_suffix(path: Path) -> str:
    """The lower-case suffix of a file name without the suffix of the compression: ".json" for "a.json.gz"."""
    return (Path(path.stem).suffix if compression_suffix(path) else path.suffix).lower()


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file for reading and decompresses it, if its name says that it is compressed, or it is in an archive."""
    suffix = compression_suffix(path)
    if not suffix:
        return open_file(path)
    return open_compressed(open_file(path) if find_archive(path) else str(path), suffix)


def reject_damaged_archive(path: Path, error: Exception) -> RejectedRow:
    """The rejected row that stands for the unreadable rest of a compressed file.

    Raises:
        error: the file is not compressed, or the disk failed.
    """
    name = COMPRESSIONS.get(compression_suffix(path), "")
    if find_archive(path) and (not name or isinstance(error, zipfile.BadZipFile)):
        name = "zip"
    if not name or (isinstance(error, OSError) and error.errno):
        raise error
    if unsupported := describe_unsupported(error):
        return RejectedRow(f"unsupported {name}", f"{unsupported}; the rest of the file is not read")
    return RejectedRow(f"damaged {name}", f"{error}; the rest of the file is lost")


def decode(
    raw: bytes | bytearray, encoding: str = "utf-8-sig", first_byte: int = 0, errors: str = "strict"
) -> str | RejectedRow:
    """Decoded text, or a rejected row with the position of the first invalid byte.

    Args:
        first_byte: position of `raw` in its file.
        errors: as for `bytes.decode`.
    """
    try:
        return raw.decode(encoding, errors)
    except UnicodeDecodeError as error:
        return RejectedRow("invalid UTF-8", f"byte {first_byte + error.start}")


def read_text(path: Path, encoding: str = "utf-8-sig", errors: str = "strict") -> str | RejectedRow:
    """The whole text of a file, or a rejected row if it cannot be decompressed or decoded."""
    try:
        with open_bytes(path) as file:
            return decode(file.read(), encoding, errors=errors)
    except DECOMPRESSION_ERRORS as error:
        return reject_damaged_archive(path, error)
