"""Every format gives the same rows, and damage costs only the damaged rows."""

import gzip
import json
import random
import re
import tracemalloc

import pytest
from support import CONVERTING, exchange, json_lines, read, written

from rorchat.reading import parts
from rorchat.sources.registry import SourceRows, find_source, load_rows, source_parts


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
    rows, _ = read(f"{name}={path}", module.kinds[0])
    assert rows == [module.convert(row) for row in raw]
    assert len(rows) == len(raw) >= 1


def test_an_object_over_many_lines_is_one_row(tmp_path):
    row = {**exchange(), "tags": ["chat", "short"]}
    path = written(tmp_path, "row.json", json.dumps(row, indent=2))
    rows, loaded = read(f"messages={path}", "conversation")
    assert (rows, loaded.stats.rows_in) == ([exchange()], 1)


def test_a_truncated_array_gives_the_rows_before_the_damage(tmp_path):
    text = json.dumps([exchange(), exchange()], indent=1)
    written(tmp_path, "a.json", text[: text.rindex("assistant") - 2])
    written(tmp_path, "b.json", json.dumps([exchange()]))
    rows, loaded = read(f"messages={tmp_path}", "conversation")
    assert (len(rows), loaded.stats.rejects) == (2, {"not JSON": 1})
    (place,) = loaded.stats.places["not JSON"]
    assert (
        place.startswith(f"{tmp_path / 'a.json'}, row 1 (")
        and f"line {text[: text.rindex('assistant')].count(chr(10)) + 1}," in place
    )


def damaged_array(damage: str, between: str, rows: int = 1000) -> str:
    """An array of {"text": "row N"} with one damaged element, row 10."""
    elements = [f'{{"text": "row {number}"}}' for number in range(rows)]
    elements[10] = {
        "duplicate keys": '{"text": "row 10", "text": "again"}',
        "trailing comma": '{"text": "row 10", }',
        "unclosed text": '{"text": "row 10}',
        "missing brace": '{"text": "row 10"',
        "many digits": '{"text": ' + "1" * 5000 + "}",
        "deep": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "no quotation marks": '{text: "row 10"}',
    }[damage]
    return f"[{between[1:]}{between.join(elements)}]"


DAMAGES = (
    "duplicate keys", "trailing comma", "unclosed text", "missing brace", "many digits", "deep", "no quotation marks",
)  # fmt: skip


@pytest.mark.parametrize("between", [", ", ",", ",\n", ",\n  "], ids=["one line", "compact", "lines", "indented"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_element_costs_only_itself(damage, between, tmp_path):
    path = written(tmp_path, "rows.json", damaged_array(damage, between))
    rows, loaded = read(f"text={path}", "document")
    reason = "duplicate keys" if damage == "duplicate keys" else "not JSON"
    assert (loaded.stats.rows_in, loaded.stats.rejects) == (1000, {reason: 1})
    assert [row["text"] for row in rows] == [f"row {number}" for number in range(1000) if number != 10]
    assert loaded.stats.places[reason][0].startswith(f"{path}, row 10 (")


def test_a_nested_object_is_not_taken_for_the_next_element(tmp_path):
    rows = [json.dumps(exchange(f"question {number}")) for number in range(50)]
    rows[7] = rows[7].replace('{"messages"', '{"messages":, "messages"')
    path = written(tmp_path, "rows.json", f"[{', '.join(rows)}]")
    kept, loaded = read(f"messages={path}", "conversation")
    assert (len(kept), loaded.stats.rows_in, loaded.stats.rejects) == (49, 50, {"not JSON": 1})


def test_an_array_without_a_next_element_reports_the_lost_rest(tmp_path):
    path = written(tmp_path, "rows.json", '[["a"], [7, ], ["b"]]')
    _, loaded = read_all(f"text={path}")
    assert loaded.stats.rejects == {"wrong type": 1, "not JSON": 1}
    assert loaded.stats.places["not JSON"][0].endswith("; the rest of the file is lost)")


def read_all(spec: str) -> tuple[list[dict], SourceRows]:
    rows = load_rows(spec, "document", allow_empty=True)
    return list(rows), rows


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
def test_an_invalid_byte_costs_only_its_row(name, bad, tmp_path):
    content = "".join(BAD_BYTES[name].format(number) for number in range(1000))
    if name.endswith(("csv", "tsv", "csv.gz")):
        content = "text\n" + content
    elif name in ("array.json", "one-line.json"):
        content = f"[{content[1:]}]"
    content = re.sub(rb"row %d\b" % bad, b"row \xff", content.encode())
    path = written(tmp_path, name, gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    rows, loaded = read(f"text={path}", "document")
    assert (loaded.stats.rows_in, loaded.stats.rejects) == (1000, {"invalid UTF-8": 1})
    assert [row["text"] for row in rows] == [f"row {number}" for number in range(1000) if number != bad]


@pytest.mark.parametrize("bad", [[0], [10], [10, 11, 500], [999]])
def test_an_unclosed_quotation_mark_costs_only_its_row(bad, tmp_path):
    lines = [f'{number},"row {number},\n""two"" lines"' for number in range(1000)]
    for number in bad:
        lines[number] = f'{number},"row'
    path = written(tmp_path, "rows.csv", "id,text\n" + "\n".join(lines) + "\n")
    _, loaded = read_all(f"text={path}")
    assert loaded.stats.rejects.keys() == {"not CSV"} and loaded.stats.kept >= 1000 - 2 * len(bad)
    lines = [f"row {number}" for number in range(1000)]
    for number in bad:
        lines[number] = f'"row {number}'
    path = written(tmp_path, "plain.csv", "text\n" + "\n".join(lines) + "\n")
    rows, loaded = read_all(f"text={path}")
    if len(bad) == 1:
        assert (loaded.stats.rows_in, loaded.stats.rejects) == (1000, {"not CSV": 1})
        assert loaded.stats.places["not CSV"][0].startswith(f"{path}:{bad[0] + 2} (")
    else:
        assert loaded.stats.rows_in == 1000 and loaded.stats.rejects == {"not CSV": 3}


def test_duplicate_columns_are_rejected_but_unnamed_ones_are_not(tmp_path):
    twice = written(tmp_path, "twice.csv", "text,text\na,b\nc,d\n")
    _, loaded = read_all(f"text={twice}")
    assert (loaded.stats.rows_in, loaded.stats.rejects) == (2, {"duplicate keys": 2})
    blank = written(tmp_path, "blank.csv", "text,,\na,b,c\n")
    assert read(f"text={blank}", "document")[0] == [{"text": "a"}]
    latin = written(tmp_path, "latin.csv", b"text,na\xefve\na,b\n")
    _, loaded = read_all(f"text={latin}")
    assert loaded.stats.places == {
        "invalid UTF-8": [f"{tmp_path / 'latin.csv'}:1 (in the header; the rest of the file is lost)"]
    }


def test_csv_is_read_in_the_memory_of_one_row(tmp_path):
    path = written(tmp_path, "rows.csv", "text\n" + "".join(f"{'a story ' * 100}{n}\n" for n in range(10_000)))
    assert path.stat().st_size > 8_000_000
    tracemalloc.start()
    rows = load_rows(f"text={path}", "document")
    assert sum(1 for _ in rows) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def bad_strings() -> object:
    """A column of three strings, the second of which is no UTF-8."""
    import pyarrow

    return pyarrow.Array.from_buffers(pyarrow.binary(), 3, pyarrow.array([b"good", b"bad\xff", b"fine"]).buffers())


def test_a_parquet_value_without_python_type_costs_at_most_its_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    dates = pyarrow.array([0, 2**62, 0], type=pyarrow.timestamp("us"))
    table = pyarrow.table({"text": bad_strings().view(pyarrow.string()), "date": dates})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows, loaded = read(f"text={tmp_path / 'a.parquet'}", "document")
    assert rows == [{"text": "good"}, {"text": "fine"}]
    assert loaded.stats.places == {"invalid UTF-8": [f"{tmp_path / 'a.parquet'}, row 1 (in 'text')"]}
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "date": dates}), tmp_path / "b.parquet")
    assert len(read(f"text={tmp_path / 'b.parquet'}", "document")[0]) == 3
    pyarrow.parquet.write_table(pyarrow.table({"text": dates}), tmp_path / "c.parquet")
    _, loaded = read_all(f"text={tmp_path / 'c.parquet'}")
    assert loaded.stats.rejects == {"wrong type": 2, "missing field": 1}


def test_a_damaged_row_group_costs_only_its_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    draw = random.Random(0)
    table = pyarrow.table({"text": [draw.randbytes(40).hex() for _ in range(1000)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=100, use_dictionary=False)
    place = pyarrow.parquet.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    rows, loaded = read(f"text={path}", "document")
    assert len(rows) == 900 and loaded.stats.rejects == {"not Parquet": 1}
    assert loaded.stats.places["not Parquet"][0].startswith(f"{path}, row 300 (")
    assert loaded.stats.places["not Parquet"][0].endswith("; rows 300 to 399 are lost)")


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
        if name == "wikitext":  # an article goes on in the next file
            rows = [{"text": line} for line in ["words", "", " = A title = ", "", *["words"] * 9] * 9]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=50)
    whole = list(load_rows(f"{name}={tmp_path}", module.kinds[0]).raw)
    pieces = source_parts(f"{name}={tmp_path}")
    divided = [row for part in pieces for row in load_rows(f"{name}={tmp_path}", module.kinds[0], part=part).raw]
    assert divided == whole and len(whole) >= 6
    assert len(pieces) == 1 if name in ("wikitext", "oasst") else len(pieces) >= 3


def test_a_damaged_parquet_file_is_one_rejected_row(tmp_path):
    written(tmp_path, "a.parquet", b"PAR1 this is none")
    written(tmp_path, "b.jsonl", json_lines({"text": "good"}))
    rows, loaded = read(f"text={tmp_path}", "document")
    assert rows == [{"text": "good"}]
    assert loaded.stats.rejects == {"not Parquet": 1}


@pytest.mark.parametrize("form", ["txt", "jsonl", "json"])
def test_a_truncated_gzip_file_is_counted(form, tmp_path):
    draw = random.Random(0)
    lines = json_lines(*({"text": str(draw.random())} for _ in range(2000)))
    whole = gzip.compress(lines.encode() if form != "json" else json.dumps(lines).encode())
    written(tmp_path, f"a.{form}.gz", whole[: len(whole) // 2])
    written(tmp_path, "b.txt", "good")
    rows, loaded = read(f"text={tmp_path}", "document")
    assert loaded.stats.rejects == {"damaged gzip": 1}
    assert rows[-1] == {"text": "good"}
    assert (len(rows) > 500) == (form == "jsonl")  # lines before the damage are good


def test_documents_know_their_lines(tmp_path):
    text = "one\ntwo\n<|endoftext|>\n\nthree\n<|endoftext|>\n \n<|endoftext|>four\n<|endoftext|>\n"
    path = written(tmp_path, "a.txt", text)
    loaded = load_rows(f"text={path}", "document")
    assert list(loaded.raw) == [
        (f"{path}:1", {"text": "one\ntwo"}),
        (f"{path}:5", {"text": "three"}),
        (f"{path}:7", {"text": " "}),
        (f"{path}:8", {"text": "four"}),
    ]
    rows, loaded = read(f"text={path}", "document")
    assert [row["text"] for row in rows] == ["one\ntwo", "three", "four"]
    assert loaded.stats.rejects == {"empty text": 1}


def test_byte_order_mark_and_windows_line_ends_are_removed(tmp_path):
    path = written(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n")
    rows, _ = read(f"text={path}", "document")
    assert rows == [{"text": "one"}, {"text": "two"}]


def test_a_text_that_is_not_utf8_is_rejected_with_its_first_bad_byte(tmp_path):
    written(tmp_path, "a.txt", "Gr\u00fc\u00dfe".encode("latin-1"))
    written(tmp_path, "b.txt", "Gr\u00fc\u00dfe")
    rows, loaded = read(f"text={tmp_path}", "document")
    assert rows == [{"text": "Grüße"}]
    assert loaded.stats.places == {"invalid UTF-8": [f"{tmp_path / 'a.txt'} (byte 2)"]}


@pytest.mark.parametrize("end", ["<|endoftext|>\n", "cut off", "<|endoftext|>", "\n\n"])
def test_parts_of_a_large_text_have_the_same_documents(end, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SMALLEST_PART", 500)
    monkeypatch.setattr(parts, "BLOCK_BYTES", 64)
    draw = random.Random(0)
    stories = ["".join(draw.choices("ab \né<|\ufeff", k=draw.randrange(400))) for _ in range(120)]
    path = written(tmp_path, "a.txt", "<|endoftext|>".join(stories) + end)
    whole = list(load_rows(f"text={path}", "document").raw)
    pieces = source_parts(f"text={path}")
    assert len(pieces) > 20 and len(whole) >= 118
    assert [row for part in pieces for row in load_rows(f"text={path}", "document", part=part).raw] == whole


def test_a_text_without_separator_is_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SMALLEST_PART", 500)
    path = written(tmp_path, "a.txt", "It was the best of times. " * 1000)
    assert len(source_parts(f"text={path}")) == 1


@pytest.mark.parametrize("suffix", ["py", "md"])
def test_a_separator_in_code_or_markdown_is_ordinary_text(suffix, tmp_path):
    code = 'END = "<|endoftext|>"\n\ndef end():\n    return END'
    rows, _ = read(f"text={written(tmp_path, f'a.{suffix}', code)}", "document")
    assert rows == [{"text": code}]
