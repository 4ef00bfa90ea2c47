"""Documents of text files know their lines and lose nothing but separators."""

import pytest
from support import read_source, write

from rorchat.sources.registry import load_rows


def test_documents_know_their_lines(tmp_path):
    text = "one\ntwo\n<|endoftext|>\n\nthree\n<|endoftext|>\n \n<|endoftext|>four\n<|endoftext|>\n"
    path = write(tmp_path, "a.txt", text)
    loaded = load_rows(f"text={path}", "document")
    assert list(loaded.raw) == [
        (f"{path}:1", {"text": "one\ntwo"}),
        (f"{path}:5", {"text": "three"}),
        (f"{path}:7", {"text": " "}),
        (f"{path}:8", {"text": "four"}),
    ]
    rows, loaded = read_source(f"text={path}", "document")
    assert [row["text"] for row in rows] == ["one\ntwo", "three", "four"]
    assert loaded.stats.rejects == {"empty text": 1}


def test_byte_order_mark_and_windows_line_ends_are_removed(tmp_path):
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n")
    rows, _ = read_source(f"text={path}", "document")
    assert rows == [{"text": "one"}, {"text": "two"}]


def test_a_damaged_text_is_rejected_with_its_line_and_first_bad_byte(tmp_path):
    write(tmp_path, "a.txt", "\nIt was. It went. It came, and then it was over. Gr\u00fc\u00dfe".encode() + b"\xff")
    write(tmp_path, "b.txt", "Gr\u00fc\u00dfe")
    rows, loaded = read_source(f"text={tmp_path}", "document")
    assert rows == [{"text": "Grüße"}]
    assert loaded.stats.places == {"invalid UTF-8": [f"{tmp_path / 'a.txt'}:2 (byte 56)"]}


@pytest.mark.parametrize("suffix", ["py", "md"])
def test_a_separator_in_code_or_markdown_is_ordinary_text(suffix, tmp_path):
    code = 'END = "<|endoftext|>"\n\ndef end():\n    return END'
    rows, _ = read_source(f"text={write(tmp_path, f'a.{suffix}', code)}", "document")
    assert rows == [{"text": code}]
