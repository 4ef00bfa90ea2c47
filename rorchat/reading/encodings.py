"""The bytes of a file, unpacked, and the text in them."""

import gzip
import io
import re
import zlib
from pathlib import Path

from rorchat.rows import RejectedRow

LONGEST_LINE = 2**27  # bytes; a longer line is a reject, so that no line can take more memory than a few times this
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error, OSError)  # pyarrow says OSError of a damaged zstd stream
PACKED = {".gz": "gzip", ".zst": "zstd"}
# What `errors="surrogateescape"` makes of a byte that is no UTF-8. UTF-8 itself can spell none of these
BAD_BYTE = re.compile("[\udc80-\udcff]")


def content_suffix(path: Path) -> str:
    """The suffix that says what is in a file, whatever packs it: ".json" of "a.json.gz"."""
    return (Path(path.stem).suffix if path.suffix in PACKED else path.suffix).lower()


def open_bytes(path: Path):
    """The bytes of a file, unpacked if its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def damaged_archive(path: Path, error: Exception) -> RejectedRow:
    """The reject that stands for what a damaged archive hides; any other failure of reading is raised again."""
    if path.suffix not in PACKED:
        raise error  # a disk that fails is not a bad row
    return RejectedRow(f"damaged {PACKED[path.suffix]}", f"{error}; the rest of the file is lost")


def decode(
    raw: bytes | bytearray, encoding: str = "utf-8-sig", first_byte: int = 0, errors: str = "strict"
) -> str | RejectedRow:
    try:
        return raw.decode(encoding, errors)
    except UnicodeDecodeError as error:
        return RejectedRow("invalid UTF-8", f"byte {first_byte + error.start}")


def read_text(path: Path, encoding: str = "utf-8-sig", errors: str = "strict") -> str | RejectedRow:
    """All text of a file, or why there is none. `errors` as of `bytes.decode`."""
    try:
        with open_bytes(path) as file:
            return decode(file.read(), encoding, errors=errors)
    except DAMAGED as error:
        return damaged_archive(path, error)
