"""Every format gives the same rows, and only damaged rows are rejected."""

import gzip
import json
import random
import re

import pytest
from support import CONVERTING, json_lines, read_source, write

from rorchat.sources.registry import find_source


@pytest.mark.parametrize("name", [name for name in CONVERTING if name not in ("dailydialog", "bookcorpus")])
@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet", "lines.json", "ndjson", "object.json"]
)
def test_every_format_gives_the_same_rows(name, form, tmp_path):
    module = find_source(name)
    raw = [row for row in module.raw if isinstance(row, dict)][:1] * (1 if form == "object.json" else 3)
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(raw), path)
    elif "jsonl" in form or form in ("lines.json", "ndjson"):
        content = json_lines(*raw).encode()
        path.write_bytes(gzip.compress(content, mtime=0) if form.endswith("gz") else content)
    else:
        content = json.dumps(raw if form != "object.json" else raw[0], indent=1).encode()
        path.write_bytes(gzip.compress(content, mtime=0) if form.endswith("gz") else content)
    rows, _ = read_source(f"{name}={path}", module.kinds[0])
    assert rows == [module.convert(row) for row in raw]
    assert len(rows) == len(raw) >= 1


BAD_BYTES = {
    "lines.json": '{{"text": "row {}"}}\n',
    "array.json": ',\n{{"text": "row {}"}}',
    "one-line.json": ', {{"text": "row {}"}}',
    "rows.jsonl": '{{"text": "row {}"}}\n',
    "rows.csv": "row {}\n",
    "rows.tsv": "row {}\n",
    "rows.csv.gz": "row {}\n",
    "rows.txt": "row {}<|endoftext|>",
}


@pytest.mark.parametrize("bad", [0, 500, 999])
@pytest.mark.parametrize("name", BAD_BYTES)
def test_an_invalid_byte_rejects_only_its_row(name, bad, tmp_path):
    content = "".join(BAD_BYTES[name].format(number) for number in range(1000))
    if name.endswith(("csv", "tsv", "csv.gz")):
        content = "text\n" + content
    elif name in ("array.json", "one-line.json"):
        content = f"[{content[1:]}]"
    content = re.sub(rb"row %d\b" % bad, b"row \x81", content.encode())  # undefined in Windows-1252, too
    path = write(tmp_path, name, gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    rows, loaded = read_source(f"text={path}", "document")
    assert (loaded.stats.rows_in, loaded.stats.rejects) == (1000, {"invalid UTF-8": 1})
    assert [row["text"] for row in rows] == [f"row {number}" for number in range(1000) if number != bad]


@pytest.mark.parametrize("form", ["txt", "jsonl", "json"])
def test_a_truncated_gzip_file_is_counted(form, tmp_path):
    rng = random.Random(0)
    lines = json_lines(*({"text": str(rng.random())} for _ in range(2000)))
    whole = gzip.compress(lines.encode() if form != "json" else json.dumps(lines).encode())
    write(tmp_path, f"a.{form}.gz", whole[: len(whole) // 2])
    write(tmp_path, "b.txt", "good")
    rows, loaded = read_source(f"text={tmp_path}", "document")
    assert loaded.stats.rejects == {"damaged gzip": 1}
    assert rows[-1] == {"text": "good"}
    assert (len(rows) > 500) == (form == "jsonl")  # lines before the damage are good
