"""Reads rows of Arrow files, as `datasets.Dataset.save_to_disk` and Feather write them.

`datasets` itself is not used: it reads a whole folder, and a bad value is the end of it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rorchat.reading.parquet import ROWS_AT_ONCE, convert_batch, reject_table
from rorchat.reading.slices import FileSlice, Row

if TYPE_CHECKING:
    import pyarrow

_RANDOM_ACCESS = b"ARROW1"  # first bytes of a file with a footer; those of `datasets` are streams


def read_arrow(file_slice: FileSlice) -> Iterator[Row]:
    """Yields (place, row) of each row. Damage rejects the rest of the file."""
    import pyarrow

    path, number = file_slice.path, 0
    try:
        for batch in _read_batches(path):
            batch.validate(full=True)  # positions outside of a damaged batch would end this process
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                for row in convert_batch(batch.slice(start, ROWS_AT_ONCE)):
                    yield f"{path}, row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last in the name of a column
        yield f"{path}, row {number}", reject_table("Arrow", error, "; the rest of the file is lost")


def _read_batches(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    """Not from a memory map, whose pages would count as memory of this process until all of the file is read."""
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        start = file.read(len(_RANDOM_ACCESS))
        file.seek(0)
        if start == _RANDOM_ACCESS:
            with pyarrow.ipc.open_file(file) as batches:
                yield from (batches.get_batch(number) for number in range(batches.num_record_batches))
        else:
            with pyarrow.ipc.open_stream(file) as batches:
                yield from batches
