"""RAW DATA: every row is kept or counted as rejected with its place, whatever the files hold."""

import dataclasses
import gzip
import json
import os
import random
import re
import shutil
import tracemalloc
from pathlib import Path

import pytest

from rorchat.errors import DataError, RemoteError, UsageError
from rorchat.persona import load_persona
from rorchat.sources import (
    CHECKS,
    Reject,
    Repaired,
    Rows,
    _parts,
    available,
    digest,
    digest_of,
    exact_digest,
    find,
    in_validation,
    load,
    parts,
    texts,
    unread,
    words_of,
)

CONVERTING = [name for name in available() if hasattr(find(name), "convert")]
GENERATING = [name for name in available() if hasattr(find(name), "generate")]


def kinds_of(name: str) -> tuple[str, ...]:
    kind = find(name).KIND
    return kind if isinstance(kind, tuple) else (kind,)


def read(spec: str, kind: str) -> tuple[list[dict], Rows]:
    """All rows of a source, after checking that every row that came in is accounted for."""
    rows = load(spec, kind)
    kept = list(rows)
    tally = rows.tally
    assert len(kept) == tally.kept
    assert tally.rows_in == tally.kept + sum(tally.rejects.values())
    return kept, rows


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def exchange(question: object = "Hello", reply: object = "Hi!") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


GOOD_ROW = {"document": {"text": "It was."}, "conversation": exchange(), "preference": find("preference").RAW[0]}


def test_there_are_sources_of_every_kind():
    assert len(CONVERTING) >= 6 and len(GENERATING) >= 2
    assert {kind for name in available() for kind in kinds_of(name)} == set(CHECKS)


@pytest.mark.parametrize("name", available())
def test_every_source_names_its_licence_and_turns_its_own_raw_rows_into_valid_ones(name):
    module = find(name)
    assert isinstance(module.LICENCE, str) and module.LICENCE
    if hasattr(module, "generate"):
        converted = [(kind, row) for kind in kinds_of(name) for row in load(f"{name}=7", kind)]
        assert len(converted) == 7 * len(kinds_of(name))
    else:
        converted = [(module.KIND, module.convert(raw)) for raw in module.RAW]
        converted = [(kind, row.row if isinstance(row, Repaired) else row) for kind, row in converted]
        assert len(converted) >= 1
    for kind, row in converted:
        CHECKS[kind](row)


# What a reader may meet where a row should stand; no source may answer with anything but a row or a Reject.
NOT_ROWS = [
    None, 5, 2.5, True, "", "a string", [], {}, [1], [None], [[]], ["user", "hi"], {"a": 1}, {"": None},
    {"text": None}, {"text": 5}, {"text": ["a"]},
    {"messages": None}, {"messages": 5}, {"messages": "hi"}, {"messages": [None]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": None, "content": "a"}]}, {"messages": [{"role": "user", "content": None}]},
    {"messages": {"role": "user", "content": "a"}}, {"conversations": [{"from": "human", "value": 5}]},
    {"instruction": None, "input": None, "output": None}, {"instruction": "a", "input": 5, "output": "b"},
    {"instruction": "a", "input": "", "output": None}, {"instruction": " ", "input": "", "output": "b"},
    {"utterances": None}, {"utterances": [1, 2]}, {"dialog": "a string"}, {"dialog": []}, {"dialog": ["alone"]},
    {"prompt": None, "chosen": "a", "rejected": "b"}, {"prompt": [], "chosen": "a", "rejected": "b"},
    {"prompt": "a", "chosen": None, "rejected": "b"}, {"prompt": "a", "chosen": [], "rejected": []},
    {"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, {"prompt": "a", "chosen": "b", "rejected": ["c"]},
    {"prompt": [], "chosen": exchange("a", "b")["messages"], "rejected": exchange("a", "c")["messages"]},
    {"prompt": 5, "chosen": exchange("a", "b")["messages"], "rejected": exchange("x", "c")["messages"]},
    {"instruction": "a", "input": 5, "chosen": "b", "rejected": "c"},
    {"instruction": None, "chosen": "b", "rejected": "c"},
    {"conversations": None, "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}},
    {"conversations": [], "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}},
    {"conversations": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": None},
    {"text": "half a pair \ud800"}, exchange("\udfff", "a"), exchange("a", "\ud83d"),
]  # fmt: skip


@pytest.mark.parametrize("name", CONVERTING)
def test_whatever_stands_where_a_row_should_be_is_kept_or_rejected_and_never_a_traceback(name, tmp_path):
    module = find(name)
    good = next(raw for raw in module.RAW if not isinstance(raw, str))
    path = written(tmp_path, "rows.jsonl", json_lines(*NOT_ROWS, good))
    rows, loaded = read(f"{name}={path}", module.KIND)
    assert loaded.tally.rows_in == len(NOT_ROWS) + 1
    assert loaded.tally.rejects["wrong type"] >= 3
    for row in rows:
        CHECKS[module.KIND](row)
        json.dumps(row, ensure_ascii=False).encode()  # what a tokenizer needs: text that has UTF-8


@pytest.mark.parametrize("name", CONVERTING)
def test_a_row_cut_to_pieces_is_kept_or_rejected(name):
    """Every raw row with any part of it missing, null, a number, a list or empty."""
    draw, module, tried = random.Random(0), find(name), 0

    def damaged(value):
        if draw.random() < 0.15:
            return draw.choice([None, 7, [], {}, "", [value], {"role": value}])
        if isinstance(value, dict):
            return {key: damaged(part) for key, part in value.items() if draw.random() > 0.1}
        return [damaged(part) for part in value if draw.random() > 0.1] if isinstance(value, list) else value

    for _ in range(300):
        for raw in module.RAW:
            tried += 1
            try:
                CHECKS[module.KIND](module.convert(damaged(raw)))
            except Reject as reject:
                assert reject.reason
    assert tried == 300 * len(module.RAW)


# One line of bad bytes, one of bad JSON, and rows that are unusable in one way each, with the reason for each.
BAD_CONVERSATIONS = [
    (b'{"messages": [{"role": "user", "content": "\xff"}]}\n', "invalid UTF-8"),
    (b'{"messages": [\n', "not JSON"),
    (json_lines({"messages": [{"role": "pirate", "content": "a"}]}).encode(), "unknown role"),
    (json_lines(exchange("a", " \n")).encode(), "empty reply"),
    (json_lines(exchange(" ", "a")).encode(), "empty question"),
    (json_lines({"messages": exchange()["messages"][::-1] * 2}).encode(), "wrong order"),
    (json_lines({"messages": exchange()["messages"][:1]}).encode(), "no assistant turn"),
    (json_lines({"messages": []}).encode(), "no assistant turn"),
    (json_lines({"messages": [{"role": "user", "content": 5}]}).encode(), "wrong type"),
    (json_lines({"messages": None}).encode(), "wrong type"),
    (json_lines({"turns": []}).encode(), "missing field"),
    (json_lines({"messages": [{"role": "user"}]}).encode(), "missing field"),
    (json_lines(17).encode(), "wrong type"),
    (json_lines(exchange("a", "\ud800")).encode(), "invalid Unicode"),
    (b"1" * 5000 + b"\n", "not JSON"),  # Python refuses so many digits with another error than bad JSON
    (b"[" * 200_000 + b"\n", "not JSON"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_CONVERSATIONS)
def test_a_bad_row_costs_that_row_and_its_line_is_named(bad, reason, tmp_path):
    good = json_lines(exchange()).encode()
    path = written(tmp_path, "rows.jsonl", good + b"\n" + bad + good)  # good, empty line, bad, good
    rows, loaded = read(f"messages={path}", "conversation")
    assert (len(rows), loaded.tally.rejects) == (2, {reason: 1})
    assert loaded.tally.places[reason][0].split(" ")[0] == f"{path}:3"


def test_a_bare_list_of_messages_is_a_row_like_any_other(tmp_path):
    path = written(tmp_path, "rows.jsonl", json_lines(exchange()["messages"], exchange()))
    rows, loaded = read(f"messages={path}", "conversation")
    assert rows == [exchange(), exchange()]


def test_a_last_question_that_nobody_answers_is_left_out(tmp_path):
    row = {"messages": [*exchange()["messages"], {"role": "user", "content": "And you?"}]}
    rows, _ = read(f"messages={written(tmp_path, 'rows.jsonl', json_lines(row))}", "conversation")
    assert rows == [exchange()]


PREFERENCES = [
    ({"prompt": "q", "chosen": "a", "rejected": " a\n"}, "identical chosen and rejected"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty reply"),
    ({"prompt": "q", "chosen": "a"}, "missing field"),
    ({"prompt": "q", "chosen": "a", "rejected": 5}, "wrong type"),
    ({"prompt": [], "chosen": exchange()["messages"], "rejected": exchange("Hello", "No.")["messages"]}, "wrong order"),
    ({"chosen": exchange("a", "b")["messages"], "rejected": exchange("x", "c")["messages"]}, "different prompts"),
    ({"prompt": [{"role": "pirate", "content": "q"}], "chosen": "a", "rejected": "b"}, "unknown role"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "reason"), PREFERENCES)
def test_a_preference_that_prefers_nothing_is_rejected_with_its_reason(bad, reason, tmp_path):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = written(tmp_path, "rows.jsonl", json_lines(good, bad))
    rows, loaded = read(f"preference={path}", "preference")
    assert loaded.tally.rejects == {reason: 1}
    assert loaded.tally.places[reason][0].startswith(f"{path}:2")
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
    ]


@pytest.mark.parametrize("name", [name for name in CONVERTING if name not in ("dailydialog", "bookcorpus")])
@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet", "lines.json", "ndjson", "object.json"]
)
def test_the_same_rows_come_out_of_every_format(name, form, tmp_path):
    module = find(name)
    raw = [row for row in module.RAW if isinstance(row, dict)][:1] * (1 if form == "object.json" else 3)
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
    rows, _ = read(f"{name}={path}", module.KIND)
    assert rows == [module.convert(row) for row in raw]
    assert len(rows) == len(raw) >= 1


def test_one_object_over_many_lines_is_one_row_although_some_of_its_lines_are_json_too(tmp_path):
    row = {**exchange(), "tags": ["chat", "short"]}
    path = written(tmp_path, "row.json", json.dumps(row, indent=2))
    rows, loaded = read(f"messages={path}", "conversation")
    assert (rows, loaded.tally.rows_in) == ([exchange()], 1)


def test_a_damaged_json_array_gives_the_rows_before_the_damage_and_one_reject(tmp_path):
    text = json.dumps([exchange(), exchange()], indent=1)
    written(tmp_path, "a.json", text[: text.rindex("assistant") - 2])
    written(tmp_path, "b.json", json.dumps([exchange()]))
    rows, loaded = read(f"messages={tmp_path}", "conversation")
    assert (len(rows), loaded.tally.rejects) == (2, {"not JSON": 1})
    (place,) = loaded.tally.places["not JSON"]
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
def test_a_damaged_element_of_an_array_costs_itself_alone(damage, between, tmp_path):
    path = written(tmp_path, "rows.json", damaged_array(damage, between))
    rows, loaded = read(f"text={path}", "document")
    reason = "duplicate keys" if damage == "duplicate keys" else "not JSON"
    assert (loaded.tally.rows_in, loaded.tally.rejects) == (1000, {reason: 1})
    assert [row["text"] for row in rows] == [f"row {number}" for number in range(1000) if number != 10]
    assert loaded.tally.places[reason][0].startswith(f"{path}, row 10 (")


def test_no_nested_object_is_taken_for_the_next_element_of_an_array_on_one_line(tmp_path):
    rows = [json.dumps(exchange(f"question {number}")) for number in range(50)]
    rows[7] = rows[7].replace('{"messages"', '{"messages":, "messages"')
    path = written(tmp_path, "rows.json", f"[{', '.join(rows)}]")
    kept, loaded = read(f"messages={path}", "conversation")
    assert (len(kept), loaded.tally.rows_in, loaded.tally.rejects) == (49, 50, {"not JSON": 1})


def test_where_nobody_knows_how_to_go_on_the_reject_says_that_the_rest_is_lost(tmp_path):
    path = written(tmp_path, "rows.json", '[["a"], [7, ], ["b"]]')
    _, loaded = read_all(f"text={path}")
    assert loaded.tally.rejects == {"wrong type": 1, "not JSON": 1}
    assert loaded.tally.places["not JSON"][0].endswith("; the rest of the file is lost)")


def read_all(spec: str) -> tuple[list[dict], Rows]:
    rows = load(spec, "document")
    rows.whole = False
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
def test_a_byte_that_is_no_utf8_costs_its_row_in_every_format(name, bad, tmp_path):
    content = "".join(BAD_BYTES[name].format(number) for number in range(1000))
    if name.endswith(("csv", "tsv", "csv.gz")):
        content = "text\n" + content
    elif name in ("array.json", "one-line.json"):
        content = f"[{content[1:]}]"
    content = re.sub(rb"row %d\b" % bad, b"row \xff", content.encode())
    path = written(tmp_path, name, gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    rows, loaded = read(f"text={path}", "document")
    assert (loaded.tally.rows_in, loaded.tally.rejects) == (1000, {"invalid UTF-8": 1})
    assert [row["text"] for row in rows] == [f"row {number}" for number in range(1000) if number != bad]


@pytest.mark.parametrize("bad", [[0], [10], [10, 11, 500], [999]])
def test_a_quotation_mark_that_nothing_closes_costs_its_row_of_a_table(bad, tmp_path):
    lines = [f'{number},"row {number},\n""two"" lines"' for number in range(1000)]
    for number in bad:
        lines[number] = f'{number},"row'
    path = written(tmp_path, "rows.csv", "id,text\n" + "\n".join(lines) + "\n")
    _, loaded = read_all(f"text={path}")
    assert loaded.tally.rejects.keys() == {"not CSV"} and loaded.tally.kept >= 1000 - 2 * len(bad)
    lines = [f"row {number}" for number in range(1000)]
    for number in bad:
        lines[number] = f'"row {number}'
    path = written(tmp_path, "plain.csv", "text\n" + "\n".join(lines) + "\n")
    rows, loaded = read_all(f"text={path}")
    if len(bad) == 1:
        assert (loaded.tally.rows_in, loaded.tally.rejects) == (1000, {"not CSV": 1})
        assert loaded.tally.places["not CSV"][0].startswith(f"{path}:{bad[0] + 2} (")
    else:
        assert loaded.tally.rows_in == 1000 and loaded.tally.rejects == {"not CSV": 3}


def test_a_header_that_names_a_column_twice_rejects_its_rows_and_columns_without_a_name_do_not(tmp_path):
    twice = written(tmp_path, "twice.csv", "text,text\na,b\nc,d\n")
    _, loaded = read_all(f"text={twice}")
    assert (loaded.tally.rows_in, loaded.tally.rejects) == (2, {"duplicate keys": 2})
    blank = written(tmp_path, "blank.csv", "text,,\na,b,c\n")
    assert read(f"text={blank}", "document")[0] == [{"text": "a"}]
    latin = written(tmp_path, "latin.csv", b"text,na\xefve\na,b\n")
    _, loaded = read_all(f"text={latin}")
    assert loaded.tally.places == {
        "invalid UTF-8": [f"{tmp_path / 'latin.csv'}:1 (in the header; the rest of the file is lost)"]
    }


def test_a_table_is_read_row_by_row_and_not_held(tmp_path):
    path = written(tmp_path, "rows.csv", "text\n" + "".join(f"{'a story ' * 100}{n}\n" for n in range(10_000)))
    assert path.stat().st_size > 8_000_000
    tracemalloc.start()
    rows = load(f"text={path}", "document")
    assert sum(1 for _ in rows) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def bad_strings() -> object:
    """A column of three strings, the second of which is no UTF-8."""
    import pyarrow

    return pyarrow.Array.from_buffers(pyarrow.binary(), 3, pyarrow.array([b"good", b"bad\xff", b"fine"]).buffers())


def test_a_value_of_parquet_that_cannot_be_had_costs_its_row_or_nothing_where_nobody_wants_it(tmp_path):
    import pyarrow
    import pyarrow.parquet

    dates = pyarrow.array([0, 2**62, 0], type=pyarrow.timestamp("us"))
    table = pyarrow.table({"text": bad_strings().view(pyarrow.string()), "date": dates})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows, loaded = read(f"text={tmp_path / 'a.parquet'}", "document")
    assert rows == [{"text": "good"}, {"text": "fine"}]
    assert loaded.tally.places == {"invalid UTF-8": [f"{tmp_path / 'a.parquet'}, row 1 (in 'text')"]}
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "date": dates}), tmp_path / "b.parquet")
    assert len(read(f"text={tmp_path / 'b.parquet'}", "document")[0]) == 3
    pyarrow.parquet.write_table(pyarrow.table({"text": dates}), tmp_path / "c.parquet")
    _, loaded = read_all(f"text={tmp_path / 'c.parquet'}")
    assert loaded.tally.rejects == {"wrong type": 2, "missing field": 1}


def test_a_damaged_row_group_costs_its_rows_alone_and_says_how_many(tmp_path):
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
    assert len(rows) == 900 and loaded.tally.rejects == {"not Parquet": 1}
    assert loaded.tally.places["not Parquet"][0].startswith(f"{path}, row 300 (")
    assert loaded.tally.places["not Parquet"][0].endswith("; rows 300 to 399 are lost)")


def test_a_large_parquet_file_with_a_damaged_end_has_one_part_that_is_one_reject(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(_parts, "SMALLEST_PART", 300)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {n}" for n in range(1000)]}), path, row_group_size=100)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[-8:-4], "little")
    content[-8 - length : -8 - length + 200] = b"\xff" * 200
    path.write_bytes(content)
    (part,) = parts(f"text={path}")
    loaded = load(f"text={path}", "document", part=part)
    assert list(loaded) == [] and loaded.tally.rejects == {"not Parquet": 1}


@pytest.mark.parametrize("name", CONVERTING)
def test_a_source_in_parts_gives_the_rows_that_it_gives_in_one_piece(name, tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    module = find(name)
    monkeypatch.setattr(_parts, "SMALLEST_PART", 300)
    monkeypatch.setattr(module, "FILES", ("*.parquet",))
    raw = next(row for row in module.RAW if isinstance(row, dict))
    for number in range(3):
        rows = [raw] * (150 + number)
        if name == "wikitext":  # an article goes on in the next file
            rows = [{"text": line} for line in ["words", "", " = A title = ", "", *["words"] * 9] * 9]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=50)
    whole = list(load(f"{name}={tmp_path}", module.KIND).raw)
    pieces = parts(f"{name}={tmp_path}")
    divided = [row for part in pieces for row in load(f"{name}={tmp_path}", module.KIND, part=part).raw]
    assert divided == whole and len(whole) >= 6
    assert len(pieces) == 1 if name in ("wikitext", "oasst") else len(pieces) >= 3


def test_a_damaged_parquet_file_is_one_reject_beside_the_good_ones(tmp_path):
    written(tmp_path, "a.parquet", b"PAR1 this is none")
    written(tmp_path, "b.jsonl", json_lines({"text": "good"}))
    rows, loaded = read(f"text={tmp_path}", "document")
    assert rows == [{"text": "good"}]
    assert loaded.tally.rejects == {"not Parquet": 1}


@pytest.mark.parametrize("form", ["txt", "jsonl", "json"])
def test_a_gzip_file_that_was_cut_short_is_counted_and_not_a_traceback(form, tmp_path):
    draw = random.Random(0)
    lines = json_lines(*({"text": str(draw.random())} for _ in range(2000)))
    whole = gzip.compress(lines.encode() if form != "json" else json.dumps(lines).encode())
    written(tmp_path, f"a.{form}.gz", whole[: len(whole) // 2])
    written(tmp_path, "b.txt", "good")
    rows, loaded = read(f"text={tmp_path}", "document")
    assert loaded.tally.rejects == {"damaged gzip": 1}
    assert rows[-1] == {"text": "good"}
    assert (len(rows) > 500) == (form == "jsonl")  # lines before the damage are good


def test_documents_of_a_text_file_stand_between_separators_and_know_their_lines(tmp_path):
    text = "one\ntwo\n<|endoftext|>\n\nthree\n<|endoftext|>\n \n<|endoftext|>four\n<|endoftext|>\n"
    path = written(tmp_path, "a.txt", text)
    loaded = load(f"text={path}", "document")
    assert list(loaded.raw) == [
        (f"{path}:1", {"text": "one\ntwo"}),
        (f"{path}:5", {"text": "three"}),
        (f"{path}:7", {"text": " "}),
        (f"{path}:8", {"text": "four"}),
    ]
    rows, loaded = read(f"text={path}", "document")
    assert [row["text"] for row in rows] == ["one\ntwo", "three", "four"]
    assert loaded.tally.rejects == {"empty text": 1}


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_text(tmp_path):
    path = written(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n")
    rows, _ = read(f"text={path}", "document")
    assert rows == [{"text": "one"}, {"text": "two"}]


def test_a_text_that_is_not_utf8_is_rejected_with_its_first_bad_byte(tmp_path):
    written(tmp_path, "a.txt", "Gr\u00fc\u00dfe".encode("latin-1"))
    written(tmp_path, "b.txt", "Gr\u00fc\u00dfe")
    rows, loaded = read(f"text={tmp_path}", "document")
    assert rows == [{"text": "Grüße"}]
    assert loaded.tally.places == {"invalid UTF-8": [f"{tmp_path / 'a.txt'} (byte 2)"]}


@pytest.mark.parametrize("end", ["<|endoftext|>\n", "cut off", "<|endoftext|>", "\n\n"])
def test_a_large_text_is_read_in_parts_that_begin_behind_separators_and_know_their_lines(end, tmp_path, monkeypatch):
    monkeypatch.setattr(_parts, "SMALLEST_PART", 500)
    monkeypatch.setattr(_parts, "_BLOCK", 64)
    draw = random.Random(0)
    stories = ["".join(draw.choices("ab \né<|\ufeff", k=draw.randrange(400))) for _ in range(120)]
    path = written(tmp_path, "a.txt", "<|endoftext|>".join(stories) + end)
    whole = list(load(f"text={path}", "document").raw)
    pieces = parts(f"text={path}")
    assert len(pieces) > 20 and len(whole) >= 118
    assert [row for part in pieces for row in load(f"text={path}", "document", part=part).raw] == whole


def test_a_text_without_a_separator_is_one_part_however_large(tmp_path, monkeypatch):
    monkeypatch.setattr(_parts, "SMALLEST_PART", 500)
    path = written(tmp_path, "a.txt", "It was the best of times. " * 1000)
    assert len(parts(f"text={path}")) == 1


@pytest.mark.parametrize("suffix", ["py", "md"])
def test_a_separator_inside_source_code_or_notes_is_a_word_of_theirs(suffix, tmp_path):
    code = 'END = "<|endoftext|>"\n\ndef end():\n    return END'
    rows, _ = read(f"text={written(tmp_path, f'a.{suffix}', code)}", "document")
    assert rows == [{"text": code}]


def test_what_is_hidden_in_a_folder_is_not_read(tmp_path):
    for name in (".git", ".store.unfinished/deep", "shown"):
        (tmp_path / name).mkdir(parents=True)
        written(tmp_path / name, "a.json", '{"text": "good"}')
    written(tmp_path, ".hidden.txt", "bad")
    rows, loaded = read(f"text={tmp_path}", "document")
    assert (rows, loaded.tally.rows_in) == ([{"text": "good"}], 1) and unread(loaded.spec) == []


def test_a_folder_is_read_in_the_order_of_names_and_other_files_are_left_alone(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.txt", "a.md", "inner/c.txt", "d.png", "e.csv"):
        written(tmp_path, name, name)
    rows, loaded = read(f"text={tmp_path}", "document")
    assert [row["text"] for row in rows] == ["a.md", "b.txt", "inner/c.txt"]


def test_only_the_first_places_of_a_reason_are_kept_but_all_are_counted(tmp_path):
    path = written(tmp_path, "a.jsonl", json_lines(*[5] * 50, {"text": "good"}))
    _, loaded = read(f"text={path}", "document")
    assert loaded.tally.rejects == {"wrong type": 50}
    assert [place.split(" ")[0] for place in loaded.tally.places["wrong type"]] == [f"{path}:{n}" for n in (1, 2, 3)]
    first, second = str(loaded.tally).splitlines()
    assert first == f"text={path}: 1 of 51 rows kept"
    assert second.startswith(f"  50 rejected: wrong type, first at {path}:1 ")


def test_an_unknown_source_suggests_its_neighbour():
    with pytest.raises(UsageError, match=r"No source named 'alpacca'\. Did you mean 'alpaca'\? Available: .*tinytown"):
        load("alpacca", "conversation")


def test_a_source_of_another_kind_says_which_ones_fit():
    with pytest.raises(UsageError, match="'alpaca' gives conversations, but here go documents: .*text"):
        load("alpaca=x", "document")


@pytest.mark.parametrize("amount", ["", "0", "-3", "many", "1e3"])
def test_a_generated_source_wants_an_amount(amount):
    with pytest.raises(UsageError, match="is generated: say how many rows, as in tinytown=1000"):
        load(f"tinytown={amount}", "document")


def test_a_source_without_a_home_on_the_hub_wants_a_path():
    with pytest.raises(UsageError, match="text=PATH"):
        load("text", "document")


def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_local_way(monkeypatch):
    import datasets

    def unreachable(**arguments):
        raise ConnectionError("first line\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(RemoteError, match=r"tatsu-lab/alpaca .*first line second line.* alpaca=PATH") as failure:
        load("alpaca", "conversation")
    assert "\n" not in str(failure.value)


NOTHING_TO_READ = [
    ("empty.txt", b"", "is empty: there is no row in it"),
    ("empty.jsonl", b"", "is empty: there is no row in it"),
    ("blank.jsonl", b"\n \n\n", "is empty: there is no row in it"),
    ("empty.json", b"", "No row of .* can be used"),
    ("array.json", b"[]", "is empty: there is no row in it"),
    ("empty.txt.gz", gzip.compress(b"", mtime=0), "is empty: there is no row in it"),
    ("numbers.jsonl", b"1\n2\n", "No row of .* can be used: 2 wrong type, first at"),
    ("table.xml", b"a,b\n", r"cannot read \.xml; known are \.txt"),
    ("plain", b"a", "cannot read a file without suffix"),
]


@pytest.mark.parametrize(("name", "content", "said"), NOTHING_TO_READ)
def test_a_file_without_a_usable_row_is_a_data_error_of_one_line(name, content, said, tmp_path):
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match=said) as failure:
        list(load(f"text={path}", "document"))
    assert str(path) in str(failure.value) and "\n" not in str(failure.value)
    assert failure.value.exit_code == 65


@pytest.mark.parametrize("name", CONVERTING)
def test_a_missing_path_or_a_folder_with_nothing_fitting_is_a_data_error_of_one_line(name, tmp_path):
    with pytest.raises(DataError, match=f"No file or folder {tmp_path / 'nowhere'}") as failure:
        list(load(f"{name}={tmp_path / 'nowhere'}", find(name).KIND))
    assert "\n" not in str(failure.value)
    with pytest.raises(DataError, match="but nothing"):
        list(load(f"{name}={tmp_path}", find(name).KIND))
    written(tmp_path, "picture.png", "")
    with pytest.raises(DataError, match=r"holds none of .* but picture\.png") as failure:
        list(load(f"{name}={tmp_path}", find(name).KIND))
    assert "\n" not in str(failure.value)


def test_a_summary_remembers_licence_and_counts(tmp_path):
    _, loaded = read(f"text={written(tmp_path, 'a.jsonl', json_lines(5, {'text': 'good'}))}", "document")
    assert loaded.tally.summary() == {
        "source": loaded.spec,
        "licence": find("text").LICENCE,
        "rows_in": 2,
        "kept": 1,
        "rejects": {"wrong type": 1},
        "repairs": {},
        "cut": 0,
    }


def test_texts_gives_the_words_of_every_kind_of_source(tmp_path):
    documents = written(tmp_path, "a.jsonl", json_lines({"text": "a document"}))
    conversations = written(tmp_path, "b.jsonl", json_lines(exchange("a question", "an answer")))
    preferences = written(tmp_path, "c.jsonl", json_lines({"prompt": "p", "chosen": "c", "rejected": "r"}))
    specs = [f"text={documents}", f"messages={conversations}", f"preference={preferences}"]
    assert list(texts(specs)) == ["a document", "a question", "an answer", "p", "c", "r"]


def test_the_hold_out_takes_its_share_and_looks_at_words_alone():
    held_out = [in_validation(f"document {number}", 0.1) for number in range(20_000)]
    assert 0.09 < sum(held_out) / len(held_out) < 0.11
    assert not any(in_validation(f"document {number}", 0.0) for number in range(100))
    assert all(in_validation(f"document {number}", 1.0) for number in range(100))
    for number, held in enumerate(held_out[:500]):
        assert in_validation(f"  DOCUMENT\n\t{number} ", 0.1) == held
        assert not held or in_validation(f"document {number}", 0.2)  # a larger share only adds


DIFFERENT = [
    ({"text": "if x:\n    a()\n    b()"}, {"text": "if x:\n    a()\nb()"}),
    ({"text": "Polish"}, {"text": "polish"}),
    (exchange("Sort 1 23.", "1 23"), exchange("Sort 12 3.", "12 3")),
    (exchange("Say a", "b c"), exchange("Say a b", "c")),
    ({"messages": exchange("a", "b")["messages"] * 2}, {"messages": exchange("a", "b\na\nb")["messages"]}),
    (
        {"messages": [{"role": "system", "content": "a"}, *exchange("b", "c")["messages"]]},
        {"messages": [{"role": "user", "content": "a"}, *exchange("b", "c")["messages"]]},
    ),
]


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_texts_that_differ_are_no_duplicates_although_they_are_held_out_together(first, second):
    loose = [digest(words_of(row)) for row in (first, second)]
    assert loose[0] == loose[1]
    assert exact_digest(first, loose[0]) != exact_digest(second, loose[1])
    again = json.loads(json.dumps(first))
    assert exact_digest(again, loose[0]) == exact_digest(first, loose[0]) and len(exact_digest(first, loose[0])) == 16


@pytest.mark.parametrize("length", [10, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_white_space_around_a_document_makes_it_no_other_whatever_its_length(length):
    text = ("It was the best of times. " * (length // 26 + 1))[: length - 1] + "x"
    bare, padded = ({"text": form} for form in (text, f"\n {text}\r\n"))
    assert exact_digest(bare, digest(text)) == exact_digest(padded, digest(padded["text"]))
    assert exact_digest(bare, digest(text)) != exact_digest({"text": text.replace("was", "Was", 1)}, digest(text))


def test_the_digest_of_a_source_knows_a_copy_of_its_files_and_notices_another_content_name_or_file(tmp_path):
    first, copy = tmp_path / "first", tmp_path / "copy"
    first.mkdir()
    for name, rows in (("a.jsonl", 20), ("b.jsonl", 100_000)):  # one of 0.5 MB, one of more than 2
        written(first, name, json_lines(*({"text": f"document {name} {number:09d}"} for number in range(rows))))
    digest_before = digest_of(f"text={first}")
    shutil.copytree(first, copy)
    for file in copy.iterdir():
        os.utime(file, (0, 0))
    assert digest_of(f"text={copy}") == digest_before != ""
    written(copy, ".DS_Store", b"\0")
    written(copy, "notes.doc", b"\0")
    assert digest_of(f"text={copy}") == digest_before
    for name in ("a.jsonl", "b.jsonl"):
        content = (copy / name).read_bytes()
        end = content[:-9] + b'so"}\n\n\n\n\n'
        assert len(end) == len(content)
        for changed in (content.replace(b"document", b"DOCUMENT"), end, content + b"\n", content[:-1]):
            (copy / name).write_bytes(changed)
            assert digest_of(f"text={copy}") != digest_before
        (copy / name).write_bytes(content)
    (copy / "a.jsonl").rename(copy / "c.jsonl")
    assert digest_of(f"text={copy}") != digest_before
    assert digest_of(f"text={tmp_path / 'nowhere'}") == ""


def test_the_files_beside_those_of_a_source_are_part_of_its_digest(tmp_path):
    separator = " +++$+++ "
    written(tmp_path, "movie_conversations.txt", separator.join(("u0", "u2", "m0", "['L1', 'L2']")) + "\n")
    lines = [separator.join((f"L{n}", f"u{n}", "m0", "A", f"Line {n}.")) for n in (1, 2)]
    written(tmp_path, "movie_lines.txt", "\n".join(lines))
    spec = f"cornell_movie_dialogs={tmp_path}"
    assert len(read(spec, "conversation")[0]) == 1
    before = digest_of(spec)
    written(tmp_path, "movie_lines.txt", "\n".join(lines).replace("Line 2", "Else 2"))
    assert digest_of(spec) != before


def test_the_persona_is_part_of_what_is_generated_about_it_and_of_nothing_else():
    other = dataclasses.replace(load_persona(), name="Zebulon")
    assert digest_of("persona=60") != digest_of("persona=60", other)
    assert digest_of("tinytown=60") == digest_of("tinytown=60", other)


def test_alpaca_puts_the_input_after_the_instruction_and_knows_its_spellings_of_none():
    convert = find("alpaca").convert
    for nothing in ("", None, "<noinput>", "noinput", "No input", "<no input>", "< noinput >", "\\<noinput\\>"):
        row = {"instruction": "Do it.", "input": nothing, "output": "Done."}
        assert convert(row) == exchange("Do it.", "Done.")
    assert convert({"instruction": "Do it.", "input": "now", "output": "Done."}) == exchange("Do it.\n\nnow", "Done.")


def test_dailydialog_drops_the_empty_part_after_the_last_mark_and_takes_back_the_blanks():
    convert = find("dailydialog").convert
    row = "Hey John , how are you ? __eou__ I ’ m fine , thanks . __eou__ Good ! __eou__\n"
    assert convert(row) == exchange("Hey John, how are you?", "I'm fine, thanks.")


def test_dailydialog_reads_its_text_files_gzipped_and_other_formats_too(tmp_path):
    path = tmp_path / "dialogues_text.txt.gz"
    path.write_bytes(gzip.compress(b"Hello . __eou__ Hi ! __eou__\n5 6 7\n", mtime=0))
    rows, loaded = read(f"dailydialog={path}", "conversation")
    assert rows == [exchange("Hello.", "Hi!")]
    assert loaded.tally.places["not a dialogue"][0].startswith(f"{path}:2")
    path = written(tmp_path, "rows.jsonl", json_lines({"dialog": ["Hello .", "Hi !"]}))
    assert read(f"dailydialog={path}", "conversation")[0] == [exchange("Hello.", "Hi!")]


# (source, path under shared/data, kind, rows in, rejects): the traps that data/SOURCES.md lists
REAL = [
    ("alpaca", "alpaca/alpaca_5000.json", 5000, {"empty reply": 2}),
    ("alpaca", "alpaca/alpaca_en_demo.json", 999, {}),
    ("alpaca", "alpaca/alpaca_tiny.json", 100, {}),
    ("alpaca", "code_alpaca", 2017, {"empty reply": 2}),
    ("messages", "preference/kto_en_demo.json", 300, {"marked as bad": 150}),
    ("dailydialog", "dailydialog/dialogues_text.txt", 2000, {}),
    ("dailydialog", "dailydialog", 2000, {}),
    ("messages", "chat/axolotl_sharegpt_conversation.json", 1, {}),
    ("messages", "chat/deita_subset_test_sft.parquet", 5, {}),
    ("messages", "chat/moss003_messages.jsonl", 224, {}),
    ("messages", "chat/openai_sft.jsonl", 128, {}),
    ("messages", "chat/tulu3_oasst1_sft_sample.jsonl", 100, {}),
    ("preference", "preference/dpo_en_demo.json", 300, {"control character": 1}),
    ("preference", "preference/instruction-data-with-preference.json", 1100, {"identical chosen and rejected": 6}),
    ("preference", "preference/tulu3_preference_sample.jsonl", 100, {}),
    ("preference", "preference/ultrafeedback_eval_200.jsonl", 200, {"identical chosen and rejected": 1}),
    (
        "preference",
        "preference/ultrafeedback_train_1000.jsonl",
        1000,
        {"identical chosen and rejected": 4, "empty reply": 2, "control character": 1},
    ),
    ("prose", "corpus_prose", 3412, {"control character": 1}),
    ("prose", "corpus_prose/val.jsonl", 45, {}),
    ("text", "tinystories/tinystories_sample.txt", 5, {}),
    ("text", "tinystories/tinystories_sample_2mb.txt", 2317, {}),
    ("text", "books", 4, {"invalid UTF-8": 1}),
]


@pytest.mark.parametrize(("name", "path", "rows_in", "rejects"), REAL, ids=[path for _, path, *_ in REAL])
def test_real_files_give_exactly_the_rows_that_are_in_them(name, path, rows_in, rejects, shared_data):
    rows, loaded = read(f"{name}={shared_data / path}", find(name).KIND)
    assert loaded.tally.rejects == rejects
    assert loaded.tally.rows_in == rows_in
    assert len(rows) == loaded.tally.rows_in - sum(rejects.values())


# Real files of shapes that no source of ours reads yet: one line each, never a traceback.
UNREAD = [
    ("messages", "chat/dolly_hhrlhf_train_small.jsonl", 1000),
    ("messages", "chat/moss003_original_example.json", 1),
    ("messages", "chat/mt_bench_question.jsonl", 80),
    ("preference", "preference/hh_rlhf_harmless_base_test.jsonl.gz", 2312),
    ("preference", "preference/kto_en_demo.json", 300),
]


@pytest.mark.parametrize(("name", "path", "rows_in"), UNREAD, ids=[path for _, path, _ in UNREAD])
def test_a_real_file_of_another_shape_is_refused_as_a_whole_in_one_line(name, path, rows_in, shared_data):
    said = f"can be used: {rows_in:,} missing field, first at .*(:1|row 0) "
    with pytest.raises(DataError, match=said) as failure:
        list(load(f"{name}={shared_data / path}", find(name).KIND))
    assert "\n" not in str(failure.value)


def test_alpaca_says_in_59_rows_that_there_is_no_input_and_none_of_it_reaches_a_question(shared_data):
    path = shared_data / "alpaca" / "alpaca_5000.json"
    says_so = re.compile(r"\W*no ?input( needed| required)?\W*", re.IGNORECASE)
    raw = json.loads(path.read_text())
    without = [row["instruction"].strip() for row in raw if says_so.fullmatch(row["input"]) and row["output"]]
    assert len(without) == 59
    questions = [row["messages"][0]["content"] for row in read(f"alpaca={path}", "conversation")[0]]
    assert set(without) <= set(questions)
    assert not [question for question in questions if says_so.fullmatch(question.rpartition("\n\n")[2])]


def test_no_mark_of_dailydialog_is_left_and_every_utterance_has_words(shared_data):
    path = shared_data / "dailydialog" / "dialogues_text.txt"
    rows, _ = read(f"dailydialog={path}", "conversation")
    contents = [turn["content"] for row in rows for turn in row["messages"]]
    marks = [line.count("__eou__") for line in path.read_text().splitlines()]
    assert len(contents) == sum(count // 2 * 2 for count in marks)  # a last utterance nobody answers is left out
    assert not [content for content in contents if "__eou__" in content or not content.strip() or " ," in content]


def test_system_turns_of_a_preference_file_stay_at_the_head_of_the_prompt(shared_data):
    rows, _ = read(f"preference={shared_data / 'preference' / 'dpo_en_demo.json'}", "preference")
    assert sum(row["prompt"][0]["role"] == "system" for row in rows) == 79  # of 80: row 15 has a control character
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
