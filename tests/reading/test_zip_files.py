"""The files of a zip archive are read like those of a folder; one that cannot be is named with the reason."""

import gzip
import json
import random
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from support import SENTENCES, as_jsonl, chat_row, read_source, refused, succeeded, write

from rorchat.errors import DataError
from rorchat.inspection.guess import guess_row_format
from rorchat.reading import parts
from rorchat.sources.registry import load_rows, source_digest, source_parts

TEXT = " ".join(SENTENCES)


def write_zip(path: Path, contents: dict[str, str | bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


CONTENTS = {
    "a.txt": "One.<|endoftext|>Two.",
    "b/c.md": "Three.",
    "d.jsonl": as_jsonl([{"text": "Four."}, {"text": "Five."}]),
    "e.csv": "text\nSix.\n",
    "f.json": json.dumps([{"text": "Seven."}]),
    "g.txt.gz": gzip.compress(b"Eight.", mtime=0),
    "h": "Nine in UTF-16.".encode("utf-16"),
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_has_the_rows_of_its_unpacked_folder(compression, tmp_path):
    path = write_zip(tmp_path / "texts.zip", CONTENTS, compression)
    for name, content in CONTENTS.items():
        write(tmp_path / "folder", name, content)
    packed, loaded = read_source(f"text={path}", "document")
    unpacked, _ = read_source(f"text={tmp_path / 'folder'}", "document")
    assert packed == unpacked and len(packed) == 9
    assert loaded.stats.reading.files == len(CONTENTS)
    places = [place for place, _ in load_rows(f"text={path}", "document").raw]
    assert places[0] == f"{path}/a.txt:1" and f"{path}/d.jsonl:2" in places


def test_every_part_of_an_archive_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SMALLEST_PART", 300)
    path = write_zip(tmp_path / "texts.zip", {f"{n}.txt": f"{n}. {TEXT}" for n in range(9)} | CONTENTS)
    divided = source_parts(f"text={path}")
    assert len(divided) > 3
    rows = [row for part in divided for row in load_rows(f"text={path}", "document", part=part)]
    assert rows == read_source(f"text={path}", "document")[0]


def test_chats_and_datasets_are_read_from_archives(tmp_path):
    path = write_zip(tmp_path / "chats.zip", {"a.jsonl": as_jsonl([chat_row(f"Say {n}", f"{n}") for n in range(3)])})
    assert len(read_source(f"messages={path}", "conversation")[0]) == 3 and guess_row_format(path) == "messages"
    path = write_zip(tmp_path / "books.zip", {"one.txt": TEXT, "two/three.txt": TEXT})
    assert len(read_source(f"books={path}", "document")[0]) == 1
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "texts.ZIP")
    assert len(read_source(f"text={tmp_path / 'folder'}", "document")[0]) == 2


def test_a_file_in_an_archive_can_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_zip(tmp_path / "texts.zip", CONTENTS | {"README": "Read me."})
    assert "text=texts.zip/d.jsonl: 2 of 2 rows kept" in succeeded("check", "texts.zip/d.jsonl", "--as", "text")
    assert "1 of 1 rows kept" in succeeded("check", "text=texts.zip/README")  # not the dataset of this name
    assert "No file or folder texts.zip/none.txt" in refused(65, "check", "texts.zip/none.txt")


def set_flags(path: Path, flags: int, method: int | None = None) -> None:
    """Sets the flags, and the compression, of the only file of an archive."""
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.find(mark) + offset
        content[at] |= flags
        if method is not None:
            content[at + 2 : at + 4] = method.to_bytes(2, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("flags", "method", "why"),
    [
        (1, None, "encrypted: unpack the archive with its password"),
        (1, 99, "encrypted: unpack the archive with its password"),  # AES
        (0, 9, "compressed with deflate64, which cannot be read: unpack the archive"),
        (0, 93, "compressed with zstd, which cannot be read: unpack the archive"),
        (0, 14 + 50, "compressed with method 64, which cannot be read: unpack the archive"),
    ],
)
def test_a_file_that_cannot_be_unpacked_is_named_as_what_it_is(flags, method, why, tmp_path):
    path = write_zip(tmp_path / "closed.zip", {"a.jsonl": as_jsonl([{"text": TEXT}])})
    set_flags(path, flags, method)
    for spec in (f"text={path}", f"prose={path}", f"books={path}"):
        with pytest.raises(DataError) as failure:
            list(load_rows(spec, "document"))
        assert f"only a.jsonl ({why})." in str(failure.value) and "damaged" not in str(failure.value)
    write(tmp_path, "b.txt", "It was.")
    output = succeeded("check", f"text={tmp_path}")
    assert "1 of 1 rows kept" in output and f"closed.zip/a.jsonl ({why})" in output and "% of the bytes" in output


def test_what_cannot_be_read_inside_an_archive_is_named(tmp_path):
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("inner.zip", "rows.parquet", "rows.arrow", "table.parquet.gz", "cover.png", "old.tar.gz"):
            archive.writestr(name, b"\x89PNG")
        archive.writestr(link, "/etc/passwd")
        archive.writestr("good.txt", "It was.")
    rows, loaded = read_source(f"text={tmp_path}", "document")
    assert rows == [{"text": "It was."}]
    unread = {name.rpartition("/")[2]: why for name, why in loaded.stats.reading.unread.items()}
    assert unread == {
        "inner.zip": "an archive inside an archive: unpack it",
        "rows.parquet": "Parquet inside an archive: unpack it",
        "rows.arrow": "Arrow inside an archive: unpack it",
        "table.parquet.gz": "Parquet inside an archive: unpack it",
        "cover.png": "unknown suffix .png, not text: a PNG picture",
        "old.tar.gz": "an archive: unpack it",
        "link.txt": "a link inside an archive: unpack it",
    }


def test_a_damaged_archive_costs_only_what_is_damaged(tmp_path):
    rng = random.Random(0)
    lines = as_jsonl([{"text": f"{rng.random()}"} for _ in range(3000)])
    contents = {"a.jsonl": lines, "b.txt": "It was.", "c.csv": "text\nOne.\n"}
    whole = write_zip(tmp_path / "whole.zip", contents).read_bytes()
    damaged = {
        "cut": (whole[: len(whole) // 2], 1, 0, "File is not a zip file"),
        "inside": (whole[:9000] + bytes(9) + whole[9009:], 1, 100, "a.jsonl:"),
        "header": (whole.replace(b"PK\3\4", b"PK\3\5", 2), 2, 1, "Bad magic number for file header"),
        "headers": (whole.replace(b"PK\3\4", b"PK\3\5"), 3, 0, "Bad magic number for file header"),
    }
    for name, (content, rejects, least, detail) in damaged.items():
        path = write(tmp_path, f"{name}.zip", content)
        rows, loaded = read_source(f"text={path}", "document", allow_empty=True)
        assert loaded.stats.rejects["damaged zip"] == rejects and detail in str(loaded.stats)
        assert len(rows) >= least and ({"text": "One."} in rows) == (least > 0)


def test_an_archive_that_is_none_or_has_several_parts_is_not_damaged(tmp_path):
    page = write(tmp_path, "page.zip", "<html>Not found</html>")
    assert "not a zip archive, as its name says" in refused(65, "check", f"text={page}")
    path = write_zip(tmp_path / "many.zip", {"a.txt": "It was."})
    content, end = path.read_bytes(), 22
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 2)  # of a list of files, in the first of two files
    path.write_bytes(content[:-end] + locator + content[-end:])
    assert "a part of a zip archive in several files: unpack it" in refused(65, "check", f"text={path}")


def test_the_digest_of_an_archive_changes_with_its_content(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.txt": "It was."})
    before = source_digest(f"text={path}")
    assert before and before == source_digest(f"text={path}")
    write_zip(path, {"a.txt": "It is."})
    assert source_digest(f"text={path}") != before


def test_flipped_bytes_cost_at_most_the_archive(tmp_path):
    whole = write_zip(
        tmp_path / "whole.zip", {"a.jsonl": as_jsonl([{"text": TEXT}] * 3), "ü.txt": TEXT, "c.csv": "text\nOne.\n"}
    )
    content, rng, outcomes = whole.read_bytes(), random.Random(0), set()
    for number in range(80):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path = write(tmp_path, f"{number}.zip", bytes(damaged))
        try:
            _, loaded = read_source(f"text={path}", "document", allow_empty=True)
            outcomes |= {*loaded.stats.rejects, *loaded.stats.reading.unread.values()}
        except DataError as error:
            assert "\n" not in str(error)
    assert "damaged zip" in outcomes and len(outcomes) > 2
