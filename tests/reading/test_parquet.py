"""A damaged row group rejects only its rows, a bad value only its row."""

import random

from support import json_lines, read_source, write


def bad_strings() -> object:
    """A column of three strings, the second of which is not UTF-8."""
    import pyarrow

    return pyarrow.Array.from_buffers(pyarrow.binary(), 3, pyarrow.array([b"good", b"bad\xff", b"fine"]).buffers())


def test_a_parquet_value_without_python_type_rejects_at_most_its_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    dates = pyarrow.array([0, 2**62, 0], type=pyarrow.timestamp("us"))
    table = pyarrow.table({"text": bad_strings().view(pyarrow.string()), "date": dates})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows, loaded = read_source(f"text={tmp_path / 'a.parquet'}", "document")
    assert rows == [{"text": "good"}, {"text": "fine"}]
    assert loaded.stats.places == {"invalid UTF-8": [f"{tmp_path / 'a.parquet'}, row 1 (in 'text')"]}
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "date": dates}), tmp_path / "b.parquet")
    assert len(read_source(f"text={tmp_path / 'b.parquet'}", "document")[0]) == 3
    pyarrow.parquet.write_table(pyarrow.table({"text": dates}), tmp_path / "c.parquet")
    _, loaded = read_source(f"text={tmp_path / 'c.parquet'}", "document", allow_empty=True)
    assert loaded.stats.rejects == {"wrong type": 2, "missing field": 1}


def test_a_damaged_row_group_rejects_only_its_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rng = random.Random(0)
    table = pyarrow.table({"text": [rng.randbytes(40).hex() for _ in range(1000)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=100, use_dictionary=False)
    place = pyarrow.parquet.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    rows, loaded = read_source(f"text={path}", "document")
    assert len(rows) == 900 and loaded.stats.rejects == {"not Parquet": 1}
    assert loaded.stats.places["not Parquet"][0].startswith(f"{path}, row 300 (")
    assert loaded.stats.places["not Parquet"][0].endswith("; rows 300 to 399 are lost)")


def test_a_damaged_parquet_file_is_one_rejected_row(tmp_path):
    write(tmp_path, "a.parquet", b"PAR1 this is none")
    write(tmp_path, "b.jsonl", json_lines({"text": "good"}))
    rows, loaded = read_source(f"text={tmp_path}", "document")
    assert rows == [{"text": "good"}]
    assert loaded.stats.rejects == {"not Parquet": 1}
