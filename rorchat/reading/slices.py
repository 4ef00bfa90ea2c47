"""A contiguous range of the rows of a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = tuple[str, Any]  # (place, raw row or RejectedRow); a place is "file:line" or "file, row number"


@dataclass(frozen=True)
class FileSlice:
    """A range of a file that contains whole rows.

    Attributes:
        start, stop: range of bytes, or of row groups in a Parquet file. None as `stop` means the end of the file.
        first: number of lines (of rows in a Parquet file) before the slice.
        bytes: compressed size on disk.
    """

    path: Path
    start: int = 0
    stop: int | None = None
    first: int = 0
    bytes: int = 0
