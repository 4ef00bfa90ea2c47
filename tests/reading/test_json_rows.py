"""A damaged JSON row does not affect the others."""

import json

import pytest
from support import chat_row, read_source, write


def test_an_object_over_many_lines_is_one_row(tmp_path):
    row = {**chat_row(), "tags": ["chat", "short"]}
    path = write(tmp_path, "row.json", json.dumps(row, indent=2))
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert (rows, loaded.stats.rows_in) == ([chat_row()], 1)


def test_a_truncated_array_gives_the_rows_before_the_damage(tmp_path):
    text = json.dumps([chat_row(), chat_row()], indent=1)
    write(tmp_path, "a.json", text[: text.rindex("assistant") - 2])
    write(tmp_path, "b.json", json.dumps([chat_row()]))
    rows, loaded = read_source(f"messages={tmp_path}", "conversation")
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
def test_a_damaged_array_element_does_not_affect_the_others(damage, between, tmp_path):
    path = write(tmp_path, "rows.json", damaged_array(damage, between))
    rows, loaded = read_source(f"text={path}", "document")
    reason = "duplicate keys" if damage == "duplicate keys" else "not JSON"
    assert (loaded.stats.rows_in, loaded.stats.rejects) == (1000, {reason: 1})
    assert [row["text"] for row in rows] == [f"row {number}" for number in range(1000) if number != 10]
    assert loaded.stats.places[reason][0].startswith(f"{path}, row 10 (")


def test_a_nested_object_is_not_taken_for_the_next_element(tmp_path):
    rows = [json.dumps(chat_row(f"question {number}")) for number in range(50)]
    rows[7] = rows[7].replace('{"messages"', '{"messages":, "messages"')
    path = write(tmp_path, "rows.json", f"[{', '.join(rows)}]")
    kept, loaded = read_source(f"messages={path}", "conversation")
    assert (len(kept), loaded.stats.rows_in, loaded.stats.rejects) == (49, 50, {"not JSON": 1})


def test_an_array_without_a_next_element_reports_the_lost_rest(tmp_path):
    path = write(tmp_path, "rows.json", '[["a"], [7, ], ["b"]]')
    _, loaded = read_source(f"text={path}", "document", allow_empty=True)
    assert loaded.stats.rejects == {"wrong type": 1, "not JSON": 1}
    assert loaded.stats.places["not JSON"][0].endswith("; the rest of the file is lost)")
