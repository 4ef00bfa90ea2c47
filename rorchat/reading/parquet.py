"""Reads rows of Parquet files. Damage rejects only its row group, a bad value only its row."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rorchat.reading.slices import FileSlice, Row
from rorchat.rows import RejectedRow

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 256


def read_parquet(file_slice: FileSlice) -> Iterator[Row]:
    """Yields (place, row) of each row of the row groups in a slice."""
    import pyarrow
    import pyarrow.parquet

    path, first = file_slice.path, file_slice.first
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        yield str(path), reject_table("Parquet", error)
        return
    for group in range(file.metadata.num_row_groups)[file_slice.start : file_slice.stop]:
        number, end = first, first + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group]):
                for row in convert_batch(batch):
                    yield f"{path}, row {number}", row
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            yield f"{path}, row {number}", reject_table("Parquet", error, f"; rows {number} to {end - 1} are lost")
        first = end


def reject_table(form: str, error: Exception, lost: str = "") -> RejectedRow:
    """The rejected row that stands for rows of a damaged table.

    Raises:
        error: the disk failed.
    """
    if isinstance(error, OSError) and error.errno:
        raise error
    return RejectedRow(f"not {form}", (str(error).splitlines() or [type(error).__name__])[0] + lost)


def convert_batch(batch: "pyarrow.RecordBatch") -> list[Any]:
    """The rows of a batch; those with a value that has no form in Python lack it, or are rejected."""
    import pyarrow

    try:
        return batch.to_pylist()
    except (ValueError, ArithmeticError, LookupError, pyarrow.ArrowException):  # one bad value fails the whole batch
        return [_convert_row(batch.slice(number, 1)) for number in range(batch.num_rows)]


def _convert_row(row_batch: "pyarrow.RecordBatch") -> dict | RejectedRow:
    """The row of a batch of one, without values that Python cannot represent, such as a date after the year 9999."""
    import pyarrow

    row = {}
    for name, column in zip(row_batch.schema.names, row_batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except UnicodeDecodeError:
            return RejectedRow("invalid UTF-8", f"in {name!r}")
        except (ValueError, ArithmeticError, LookupError, pyarrow.ArrowException):
            continue  # if the source needs this value, it rejects the row as "missing field"
    return row
