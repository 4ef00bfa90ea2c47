"""The parts of a source have the rows of the whole source."""

import random

import pytest
from support import CONVERTING, write

from rorchat.reading import parts
from rorchat.sources.registry import find_source, load_rows, source_parts


def test_a_damaged_parquet_footer_gives_one_part_and_one_rejected_row(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(parts, "SMALLEST_PART", 300)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {n}" for n in range(1000)]}), path, row_group_size=100)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[-8:-4], "little")
    content[-8 - length : -8 - length + 200] = b"\xff" * 200
    path.write_bytes(content)
    (part,) = source_parts(f"text={path}")
    loaded = load_rows(f"text={path}", "document", part=part)
    assert list(loaded) == [] and loaded.stats.rejects == {"not Parquet": 1}


@pytest.mark.parametrize("name", CONVERTING)
def test_parts_have_the_same_rows_as_the_whole_source(name, tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    module = find_source(name)
    monkeypatch.setattr(parts, "SMALLEST_PART", 300)
    monkeypatch.setattr(f"rorchat.sources.{name}.FILES", ("*.parquet",))
    raw = next(row for row in module.raw if isinstance(row, dict))
    for number in range(3):
        rows = [raw] * (150 + number)
        if name == "wikitext":  # an article continues in the next file
            rows = [{"text": line} for line in ["words", "", " = A title = ", "", *["words"] * 9] * 9]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=50)
    whole = list(load_rows(f"{name}={tmp_path}", module.kinds[0]).raw)
    pieces = source_parts(f"{name}={tmp_path}")
    divided = [row for part in pieces for row in load_rows(f"{name}={tmp_path}", module.kinds[0], part=part).raw]
    assert divided == whole and len(whole) >= 6
    assert len(pieces) == 1 if name in ("wikitext", "oasst") else len(pieces) >= 3


@pytest.mark.parametrize("end", ["<|endoftext|>\n", "cut off", "<|endoftext|>", "\n\n"])
def test_parts_of_a_large_text_have_the_same_documents(end, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SMALLEST_PART", 500)
    monkeypatch.setattr(parts, "BLOCK_BYTES", 64)
    rng = random.Random(0)
    stories = ["".join(rng.choices("ab \né<|\ufeff", k=rng.randrange(400))) for _ in range(120)]
    path = write(tmp_path, "a.txt", "<|endoftext|>".join(stories) + end)
    whole = list(load_rows(f"text={path}", "document").raw)
    pieces = source_parts(f"text={path}")
    assert len(pieces) > 20 and len(whole) >= 118
    parts_rows = [load_rows(f"text={path}", "document", part=part) for part in pieces]
    assert [row for rows in parts_rows for row in rows.raw] == whole
    assert sum(rows.stats.reading.files for rows in parts_rows) == 1


def test_a_text_without_separator_is_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SMALLEST_PART", 500)
    path = write(tmp_path, "a.txt", "It was the best of times. " * 1000)
    assert len(source_parts(f"text={path}")) == 1
