"""Compressed files have the rows of the plain ones, and an archive that is not damaged is not called damaged."""

import bz2
import gzip
import lzma
import random
import struct

import pyarrow
import pytest
from support import as_jsonl, read_source, refused, succeeded, write

from rorchat.errors import DataError
from rorchat.reading.encodings import open_bytes

RNG = random.Random(0)
ROWS = [{"text": f"Row {number}, {RNG.random()}."} for number in range(2000)]
LINES = as_jsonl(ROWS)
PACK = {
    "gz": gzip.compress,
    "zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
NAMES = {"gz": "gzip", "zst": "zstd", "bz2": "bzip2", "xz": "xz"}


@pytest.mark.parametrize("capitals", [False, True])
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("form", ["jsonl", "txt", "csv", "json"])
def test_compressed_files_have_the_rows_of_plain_ones(suffix, form, capitals, tmp_path):
    content = {
        "jsonl": LINES, "txt": b"One.<|endoftext|>Two.", "csv": b"text\nOne.\nTwo.\n", "json": b'[{"text": "One."}]',
    }[form]  # fmt: skip
    plain = read_source(f"text={write(tmp_path, f'plain.{form}', content)}", "document")[0]
    name = f"a.{form}.{suffix}"
    path = write(tmp_path, name.upper() if capitals else name, PACK[suffix](content))
    assert read_source(f"text={path}", "document")[0] == plain
    assert read_source(f"{'books' if form == 'txt' else 'prose'}={path}", "document")[1].stats.kept > 0


@pytest.mark.parametrize("suffix", PACK)
def test_all_streams_of_a_file_are_read(suffix, tmp_path):
    half = len(ROWS) // 2
    pack = PACK[suffix]
    path = write(tmp_path, f"a.jsonl.{suffix}", pack(as_jsonl(ROWS[:half])) + pack(b"") + pack(as_jsonl(ROWS[half:])))
    assert read_source(f"text={path}", "document")[0] == ROWS
    for size in (1, 7, 10_000_000):
        with open_bytes(path) as file:
            assert b"".join(iter(lambda: file.read(size), b"")) == LINES  # noqa: B023


@pytest.mark.parametrize(
    ("suffix", "harm"),
    # zstd has no checksum by default
    [(s, h) for s in PACK for h in ("cut", "cut second", "junk after", "bytes") if (s, h) != ("zst", "bytes")],
)
def test_a_damaged_archive_is_called_damaged(suffix, harm, tmp_path):
    packed = PACK[suffix](LINES)
    content = {
        "cut": packed[: len(packed) * 2 // 3],
        "cut second": packed + packed[: len(packed) // 2],
        "junk after": packed + b"this is no stream",
        "bytes": packed[: len(packed) // 2] + b"\xff" * 40 + packed[len(packed) // 2 + 40 :],
    }[harm]
    rows, loaded = read_source(f"text={write(tmp_path, f'a.jsonl.{suffix}', content)}", "document", allow_empty=True)
    assert loaded.stats.rejects[f"damaged {NAMES[suffix]}"] == 1
    assert "is lost" in str(loaded.stats) and "unsupported" not in str(loaded.stats)
    if harm in ("cut second", "junk after") and suffix != "zst":  # of which the block before the damage is lost
        assert rows[: len(ROWS)] == ROWS


@pytest.mark.parametrize("suffix", PACK)
def test_empty_archives_are_empty(suffix, tmp_path):
    for content in (b"", PACK[suffix](b"")):
        path = write(tmp_path, f"a.jsonl.{suffix}", content)
        with pytest.raises(DataError, match="is empty: it has no rows"):
            read_source(f"text={path}", "document")


def zstd_frame(content: bytes, log: int = 20, descriptor: int = 0, extra: bytes = b"") -> bytes:
    """A frame with a window of 2**log bytes whose only block is not compressed (RFC 8878)."""
    window = b"" if descriptor & 0x20 else bytes([(log - 10) << 3])
    header = struct.pack("<IB", 0xFD2FB528, descriptor) + window + extra
    return header + (len(content) << 3 | 1).to_bytes(3, "little") + content


def skippable_frame(content: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A50, len(content)) + content


ROW = b'{"text": "It was."}\n'


@pytest.mark.parametrize(
    "content",
    [
        zstd_frame(ROW, log=27),  # the largest window without --long
        zstd_frame(ROW) + zstd_frame(b""),
        skippable_frame(b"abcd") + zstd_frame(ROW),  # pzstd
        zstd_frame(ROW) + skippable_frame(b"a table of contents"),  # the seekable format
        zstd_frame(ROW, descriptor=0x20, extra=bytes([len(ROW)])),
    ],
    ids=["largest", "empty second", "skippable first", "skippable last", "single segment"],
)
def test_zstd_frames_of_all_kinds_are_read(content, tmp_path):
    assert read_source(f"text={write(tmp_path, 'a.jsonl.zst', content)}", "document")[0] == [{"text": "It was."}]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            zstd_frame(ROW, log=28),
            "zstd with a window of 256 MiB, but at most 128 MiB are kept in memory: recompress it",
        ),
        (zstd_frame(ROW, log=31), "zstd with a window of 2,048 MiB"),
        (zstd_frame(ROW, descriptor=0xE0, extra=(2**30).to_bytes(8, "little")), "zstd with a window of 1,024 MiB"),
        (zstd_frame(ROW, descriptor=1, extra=b"\x07"), "zstd: it needs the dictionary that it was compressed with"),
        (gzip.compress(ROW), "not zstd, as its name says, but gzip: rename it"),
        (ROW, "not zstd, as its name says: rename it"),
    ],
    ids=["256 MiB", "2 GiB", "single segment", "dictionary", "gzip", "plain"],
)
def test_what_is_not_damaged_is_named_as_what_it_is(content, why, tmp_path):
    path = write(tmp_path, "a.jsonl.zst", content)
    reason = refused(65, "check", f"text={path}").partition(" cannot be read: ")[2]
    assert why in reason and "damaged" not in reason and "supported are" not in reason
    write(tmp_path, "b.txt", "It was.")
    assert f"a.jsonl.zst ({why}" in succeeded("check", f"text={tmp_path}")


def test_a_later_frame_with_a_large_window_is_not_called_damaged(tmp_path):
    path = write(tmp_path, "a.jsonl.zst", zstd_frame(ROW) + zstd_frame(ROW, log=31))
    _, loaded = read_source(f"text={path}", "document", allow_empty=True)
    assert loaded.stats.rejects == {"unsupported zstd": 1}
    assert "its window is larger than 128 MiB: recompress it without --long" in str(loaded.stats)


def test_an_xz_archive_that_takes_much_memory_is_not_called_damaged(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**28}]
    path = write(tmp_path, "a.jsonl.xz", lzma.compress(ROW, filters=filters))
    loaded = read_source(f"text={path}", "document", allow_empty=True)[1]
    assert loaded.stats.rejects == {"unsupported xz": 1} and "takes more than 128 MiB" in str(loaded.stats)
    path = write(tmp_path, "a.txt.xz", lzma.compress(ROW, filters=filters))
    with pytest.raises(DataError, match="has no rows. Not read: .*takes more than 128 MiB"):
        read_source(f"text={path}", "document")


@pytest.mark.parametrize(("suffix", "other"), [("gz", "bz2"), ("bz2", "xz"), ("xz", "zst")])
def test_an_archive_with_the_suffix_of_another_is_named(suffix, other, tmp_path):
    path = write(tmp_path, f"a.jsonl.{suffix}", PACK[other](LINES))
    expected = f"not {NAMES[suffix]}, as its name says, but {NAMES[other]}: rename it"
    assert expected in refused(65, "check", f"text={path}")


def test_an_error_of_the_disk_is_no_damage(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl.gz", gzip.compress(LINES))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(gzip.GzipFile, "readline", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read_source(f"text={path}", "document")
