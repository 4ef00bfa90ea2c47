"""JSON Lines files."""

import json

from rorchat.jsonl import read_json_lines


def test_strings_with_any_line_end_are_one_record(tmp_path):
    rows = [{"text": f"a{end}b"} for end in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\r", "\n", "\r\n")]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), newline="\n")
    assert read_json_lines(path) == rows


def test_a_missing_file_has_no_records(tmp_path):
    assert read_json_lines(tmp_path / "missing.jsonl") == []
