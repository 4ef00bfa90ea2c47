"""Every file of a folder is listed once, links included; what is left out is named."""

import os
import zipfile
from pathlib import Path

import pytest
from support import read_source, succeeded, write

from rorchat.reading.listing import READ_ALREADY, list_files


def names_of(folder: Path) -> tuple[list[str], dict[str, str]]:
    listing = list_files(folder)
    left_out = {str(path.relative_to(folder)): why for path, why in listing.left_out.items()}
    return [str(path.relative_to(folder)) for path in listing.files], left_out


def texts_of(spec: object) -> list[str]:
    return [row["text"] for row in read_source(f"text={spec}", "document")[0]]


def test_links_to_folders_and_files_are_followed(tmp_path):
    write(tmp_path, "elsewhere/deep/a.txt", "A")
    write(tmp_path, "other/b.txt", "B")
    folder = tmp_path / "data"
    write(folder, "c.txt", "C")
    (folder / "linked").symlink_to("../elsewhere")
    (folder / "b.txt").symlink_to(tmp_path / "other" / "b.txt")
    assert names_of(folder) == (["b.txt", "c.txt", "linked/deep/a.txt"], {})
    assert texts_of(folder) == ["B", "C", "A"]
    whole = tmp_path / "link to all"
    whole.symlink_to(folder)
    assert texts_of(whole) == ["B", "C", "A"]


@pytest.mark.parametrize("target", [".", "..", "../..", "inner", "a.txt", "inner/b.txt", "loop", "nowhere.txt"])
def test_a_link_that_would_repeat_files_or_leads_nowhere_is_named(target, tmp_path):
    folder = tmp_path / "around" / "data"
    write(folder, "a.txt", "A")
    write(folder, "inner/b.txt", "B")
    write(tmp_path, "around/outside.txt", "not read")
    (folder / "loop").symlink_to(target)
    files, left_out = names_of(folder)
    assert files == ["a.txt", "inner/b.txt"] and list(left_out) == ["loop"]
    reasons = {
        ".": READ_ALREADY, "inner": READ_ALREADY, "a.txt": READ_ALREADY, "inner/b.txt": READ_ALREADY,
        "..": "a link to a folder around it", "../..": "a link to a folder around it",
    }  # fmt: skip
    assert left_out["loop"] == reasons.get(target, f"a link to {target}, which does not exist")
    assert f"1 file not read (0% of the bytes): loop ({left_out['loop']})" in succeeded("check", f"text={folder}")


def test_folders_that_link_to_each_other_end(tmp_path):
    for name, other in (("one", "two"), ("two", "one")):
        write(tmp_path, f"{name}/{name}.txt", name)
        (tmp_path / name / "next").symlink_to(f"../{other}")
    assert names_of(tmp_path / "one") == (["next/two.txt", "one.txt"], {"next/next": READ_ALREADY})
    assert len(texts_of(tmp_path)) == 2


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", "A")
    write(tmp_path, "closed/b.txt", "B")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may open every folder
    assert names_of(tmp_path) == (["a.txt"], {"closed": "no permission to open it"})


def test_a_zip_archive_is_listed_like_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        for name in ("b/c.txt", "a.txt", ".hidden", "__MACOSX/._a.txt", "/etc/d.txt", "../e.txt"):
            archive.writestr(name, name)
        archive.mkdir("empty")
    files, left_out = names_of(tmp_path / "texts.zip")
    assert (files, left_out) == (["a.txt", "b/c.txt", "e.txt", "etc/d.txt"], {})
    assert names_of(tmp_path)[0] == [f"texts.zip/{name}" for name in files]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["TOP.TXT", "a.txt", "b.txt.GZ"]),
        ("**/*.txt", ["TOP.TXT", "a.txt", "b.txt.GZ", "deep/er/C.Txt.bz2", "deep/d.txt"]),
        ("**/d.txt", ["deep/d.txt"]),
        ("*/*.txt", ["deep/d.txt"]),
        ("deep/**/*", ["deep/d.txt", "deep/er/C.Txt.bz2"]),
        ("[a-b].*", ["a.txt", "b.txt.GZ"]),
        ("train-*.parquet", []),
    ],
)
def test_patterns_match_compressed_files_and_capitals(pattern, expected, tmp_path):
    for name in ("a.txt", "TOP.TXT", "b.txt.GZ", "deep/d.txt", "deep/er/C.Txt.bz2", "x.md"):
        write(tmp_path, name, "x")
    assert [str(file.relative_to(tmp_path)) for file in list_files(tmp_path).match(pattern)] == sorted(expected)


def test_files_with_capitals_in_their_suffix_are_read_by_every_source(tmp_path):
    write(tmp_path, "A.TXT", "Text.")
    write(tmp_path, "B.JSONL", '{"text": "Line."}\n')
    write(tmp_path, "C.Csv", "text\nCell.\n")
    assert texts_of(tmp_path) == ["Text.", "Line.", "Cell."]
    for source, name in (("books", "A.TXT"), ("prose", "B.JSONL"), ("tiny_shakespeare", "A.TXT")):
        rows, loaded = read_source(f"{source}={tmp_path}", "document")
        assert len(rows) == 1 and name not in str(loaded.stats.reading.unread)


def test_two_kinds_of_files_are_read_or_named_with_their_share(tmp_path):
    write(tmp_path, "a.json", '[{"instruction": "Say A.", "output": "A"}]')
    write(tmp_path, "b.jsonl", '{"instruction": "Say B.", "output": "B"}\n' * 20)
    kept, loaded = read_source(f"messages={tmp_path}", "conversation")
    assert len(kept) == 21 and loaded.stats.reading.unread == {}
    kept, loaded = read_source(f"alpaca={tmp_path}", "conversation")
    assert len(kept) == 1
    assert "1 file not read (95% of the bytes): b.jsonl (not one of the files of alpaca)" in str(loaded.stats)
