"""Opens compressed files and decodes their text."""

import gzip
import io
import re
import zlib
from pathlib import Path
from typing import IO, cast

from rorchat.rows import RejectedRow

LONGEST_LINE = 2**27  # bytes; a longer line is rejected, which bounds the memory that one line can take
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
DECOMPRESSION_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error, OSError)  # OSError: a damaged zstd stream in pyarrow
# Characters that `errors="surrogateescape"` substitutes for invalid bytes. Valid UTF-8 never decodes to them.
BAD_BYTE = re.compile("[\udc80-\udcff]")


def content_suffix(path: Path) -> str:
    """The lower-case suffix of a file name without the suffix of the compression: ".json" for "a.json.gz"."""
    return (Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix).lower()


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file for reading and decompresses it if its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def reject_damaged_archive(path: Path, error: Exception) -> RejectedRow:
    """The rejected row that stands for the unreadable rest of a compressed file.

    Raises:
        error: the file is not compressed, so the disk failed.
    """
    if path.suffix not in COMPRESSIONS:
        raise error
    return RejectedRow(f"damaged {COMPRESSIONS[path.suffix]}", f"{error}; the rest of the file is lost")


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
