"""Text files of any certain encoding give the same documents, each with its line, in bounded memory."""

import gzip
import random
import re

import pytest
from support import SENTENCES, read_source, write

from rorchat.reading import plain_texts
from rorchat.reading.long_texts import Limits, cut
from rorchat.sources.registry import load_rows, note_unread

TEXT = "\n\n".join(f"{number}. " + " ".join(SENTENCES[:20]) for number in range(60)) + "\n"


def texts_of(path) -> list[str]:
    return [row["text"] for row in read_source(f"text={path}", "document")[0]]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_all_encodings_give_the_same_documents(encoding, tmp_path):
    ascii_text = "".join(character for character in TEXT if ord(character) < 256)
    expected = texts_of(write(tmp_path, "a.txt", ascii_text.encode()))
    assert len(expected) > 5
    rows, loaded = read_source(f"text={write(tmp_path, 'b.txt', ascii_text.encode(encoding))}", "document")
    assert [row["text"] for row in rows] == expected
    assert len(loaded.stats.reading.decoded) == (encoding != "utf-8-sig")


@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_line_ends_of_windows_and_macs_become_those_of_unix(block, tmp_path, monkeypatch):
    monkeypatch.setattr(plain_texts, "BLOCK_BYTES", block)
    path = write(tmp_path, "a.txt", b"one\r\n\r\ntwo\rthree\n\xc3\xa9\r\n")
    assert texts_of(path) == ["one\n\ntwo\nthree\n\u00e9"]


def test_files_in_other_encodings_are_counted(tmp_path):
    for number, encoding in enumerate(["cp1252", "latin-1", "utf-8", "utf-16"]):
        write(tmp_path, f"{number}.txt", f"Die Gäste aus Österreich, {number}.".encode(encoding))
    rows, loaded = read_source(f"text={tmp_path}", "document")
    assert [row["text"] for row in rows] == [f"Die Gäste aus Österreich, {number}." for number in range(4)]
    assert str(loaded.stats).splitlines()[1:] == [
        "  1 file decoded as UTF-16: 3.txt", "  2 files decoded as Windows-1252: 0.txt, 1.txt",
    ]  # fmt: skip


@pytest.mark.parametrize("block", [1, 13, 1000, 2**20])
@pytest.mark.parametrize("suffix", ["txt", "md"])
def test_documents_are_cut_as_their_texts_and_named_by_their_lines(block, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(plain_texts, "BLOCK_BYTES", block)
    rng = random.Random(block)
    parts = [
        "".join(rng.choices(["It was. ", "so\n", "\n\n", "é", "<|", "\r\n"], k=rng.randrange(12_000))) for _ in range(4)
    ]
    text = "<|endoftext|>".join([*parts, "the end"])
    path = write(tmp_path, f"a.{suffix}", text)
    documents = text.split("<|endoftext|>") if suffix == "txt" else [text]
    expected = []
    for document in documents:
        pieces = cut(document.lstrip("\r\n"))
        stripped = [piece.lstrip("\r\n").rstrip() for piece in pieces[:-1]] + [pieces[-1].strip("\r\n")]
        expected += [piece.replace("\r\n", "\n") for piece in stripped if piece.strip()] or [""]
    loaded = list(load_rows(f"text={path}", "document").raw)
    assert [row["text"] for _, row in loaded] == expected and len(loaded) > len(documents)
    lines = text.split("\n")
    for place, row in loaded:
        line = int(place.rpartition(":")[2])
        assert row["text"].split("\n")[0].rstrip("\r") in lines[line - 1]
    assert re.sub(r"\s|<\|endoftext\|>", "", text) == re.sub(
        r"\s|<\|endoftext\|>", "", "".join(row["text"] for _, row in loaded)
    )


def test_only_the_damaged_piece_of_a_long_text_is_rejected(tmp_path):
    content = TEXT.encode()
    at = content.index("Bäcker".encode(), len(content) // 2)
    path = write(tmp_path, "a.txt", content[:at] + b"\xff" + content[at:])
    rows, loaded = read_source(f"text={path}", "document")
    whole = texts_of(write(tmp_path, "whole.txt", content))
    assert loaded.stats.rejects == {"invalid UTF-8": 1} and len(rows) == len(whole) - 1 > 5
    assert set(row["text"] for row in rows) < set(whole)
    (place,) = loaded.stats.places["invalid UTF-8"]
    line = int(place.rpartition(" (")[0].rpartition(":")[2])
    assert place.endswith(f" (byte {at})")
    assert 0 <= content[:at].count(b"\n") + 1 - line < 60


def test_files_without_text_are_named_with_the_reason(tmp_path):
    contents = {
        "a.txt": b"It was. It went.", "b.txt": b"", "c.txt": b" \n\n ", "d.txt": b"\x89PNG\r\n\x1a\n",
        "e.png": b"\x89PNG\n",
        "f.docx": b"PK\x03\x04" + bytes(50), "README": b"It was read.", "g.rst": "Grüße.\n".encode("latin-1"),
        "h.bin": b"\xff\x00\xfe" * 50, "i.log": b"It was\x1b[31m red. It was the best of times. " * 9,
        "k.md": "Привет".encode("cp1251"),
        "l.empty": b"", ".hidden": b"It is not seen.",
    }  # fmt: skip
    for name, content in contents.items():
        write(tmp_path, name, content)
    rows, loaded = read_source(f"text={tmp_path}", "document")
    assert [row["text"] for row in rows] == ["It was read.", "It was. It went.", "Grüße.\n".strip()]
    unread = {name.removeprefix(f"{tmp_path}/"): why for name, why in loaded.stats.reading.unread.items()}
    assert unread == {
        "b.txt": "empty", "c.txt": "only white space", "d.txt": "a PNG picture",
        "e.png": "unknown suffix .png, not text: a PNG picture",
        "f.docx": "unknown suffix .docx, not text: a ZIP archive, as .docx, .odt and .epub files are",
        "h.bin": "unknown suffix .bin, not text: 33% of its bytes are control characters",
        "i.log": "unknown suffix .log, not certainly text",
        "k.md": "100% of its bytes are invalid UTF-8: convert it to UTF-8", "l.empty": "empty",
    }  # fmt: skip
    assert len(rows) + len(unread) == len(contents) - 1 == loaded.stats.reading.files + len(unread)
    line = str(loaded.stats).splitlines()[-1]
    assert re.match(r"  9 files not read \(\d\d% of the bytes\): ", line)  # the largest first
    assert line.endswith(", b.txt (empty), l.empty (empty)")
    assert set(note_unread(loaded.spec).unread) < set(loaded.stats.reading.unread)


def test_only_ten_unread_files_are_printed(tmp_path):
    write(tmp_path, "a.txt", "It was.")
    for number in range(12):
        write(tmp_path, f"{number:02d}.png", b"\x89PNG")
    _, loaded = read_source(f"text={tmp_path}", "document")
    line = str(loaded.stats).splitlines()[-1]
    assert line.startswith("  12 files not read (87% of the bytes): 00.png (") and line.endswith("), and 2 more")


def test_a_damaged_archive_is_rejected_after_its_readable_text(tmp_path):
    content = gzip.compress(random.Random(0).randbytes(200).hex().encode() * 3 + TEXT.encode() * 30, mtime=0)
    path = write(tmp_path, "a.txt.gz", content[: len(content) // 2])
    rows, loaded = read_source(f"text={path}", "document", allow_empty=True)
    assert loaded.stats.rejects == {"damaged gzip": 1}


def test_texts_up_to_the_maximum_are_not_cut(tmp_path):
    text = ("It was. " * 2000)[: Limits().maximum - 1]
    assert texts_of(write(tmp_path, "a.txt", f"\n\n{text}\n")) == [text]
    loaded = load_rows(f"text={tmp_path / 'a.txt'}", "document")
    assert [place for place, _ in loaded.raw] == [f"{tmp_path / 'a.txt'}:3"]
