"""Malformed rows and garbage files cost only themselves, in bounded memory."""

import copy
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support import CONVERTING

from rorchat.chatml import END_OF_TEXT
from rorchat.errors import DataError, RorchatError
from rorchat.inspection import check_source
from rorchat.inspection.guess import guess_row_format
from rorchat.rows import CHECKS
from rorchat.sources.registry import find_source, load_rows

GATHERING = [name for name in CONVERTING if find_source(name).gather]  # their rows are not lines


# -- rows ------------------------------------------------------------------------------------------------------------

REPLACEMENTS = [
    None, 0, -1, 7, 1e308, float("nan"), 10**400, True, False,
    "", " \n\t", "\0", "a\x07b\x9fc", "\x1b[31mred", "\ud83d", "a\udfff", "b'a literal'", 'b"' + "\\xff" * 9 + '"',
    "﻿mark", "x" * 60_000, "<|endoftext|>", "robot", "\r\n", "é" * 3,
    [], [None], [[]], [{}], ["a", 5], [{"role": "robot", "content": "a"}], [{"from": "gpt"}],
    {}, {"a": 1}, {"": None}, {"role": "user"}, {"text": "a"}, {"content": {"parts": ["a"]}},
]  # fmt: skip


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def places_in(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The key path of every part of a raw row, beginning with the row itself."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield from places_in(part, (*path, key))


def replaced(row: object, path: tuple, value: object) -> object:
    if not path:
        return value
    row = copy.deepcopy(row)
    part = row
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return row


def without(row: object, path: tuple) -> object:
    row = copy.deepcopy(row)
    part = row
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return row


def malformed(raw: object, rng: random.Random) -> Iterator[str | bytes]:
    """Lines made from a valid raw row: with parts replaced, missing or duplicated, and with damaged JSON."""
    good = json.dumps(raw)
    for path in places_in(raw):
        for value in [*REPLACEMENTS, nested(50)]:
            yield json.dumps(replaced(raw, path, value))
        if path:
            yield json.dumps(without(raw, path))
    for key in raw if isinstance(raw, dict) else ():
        yield good[:-1] + f", {json.dumps(key)}: {json.dumps(raw[key])}" + "}"
        yield json.dumps({f"{key}\n\x1b[31m" * 1000: raw[key]})
    yield from (good[:cut] for cut in range(1, len(good), max(1, len(good) // 12)))
    yield from (good + tail for tail in ("}", "]", ",", " trailing", "\0", good))
    yield from (good.encode()[:9] + bytes(rng.choices(range(128, 256), k=5)) + good.encode()[9:] for _ in range(3))
    yield from (b"\xef\xbb\xbf" + good.encode(), good.encode("utf-16"), b"\xff", b"\0" * 20)
    yield from ("NaN", "-Infinity", "1" * 5000, "[" * 5000, '{"a":' * 5000, '"\\ud800"', "'single'", "# comment")


def hostile_lines(name: str) -> list[bytes]:
    rng = random.Random(name)
    lines = list(chain.from_iterable(malformed(raw, rng) for raw in find_source(name).raw))
    lines = [line if isinstance(line, bytes) else line.encode() for line in lines]
    lines = [line.replace(b"\n", b" ").replace(b"\r", b" ") for line in lines]
    rng.shuffle(lines)
    return [line for line in lines if line.strip()]


def check_counts(path: Path, name: str) -> tuple[object, list[dict]]:
    """(statistics of `check`, rejected rows that it wrote), after comparing their counts."""
    rejects = io.StringIO()
    stats = check_source(str(path), row_format=name, rejects=rejects).stats
    rejected_rows = [json.loads(line) for line in rejects.getvalue().splitlines()]
    assert stats.rows_in == stats.kept + sum(stats.rejects.values())
    assert len(rejected_rows) == sum(stats.rejects.values())
    assert {rejected_row["reason"] for rejected_row in rejected_rows} == set(stats.rejects)
    str(stats).encode()
    return stats, rejected_rows


@pytest.mark.parametrize("name", CONVERTING)
def test_no_malformed_row_is_lost_or_stops_reading(name, tmp_path):
    lines = hostile_lines(name)
    lines += [json.dumps(next(raw for raw in find_source(name).raw if not isinstance(raw, str))).encode()]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    stats, rejected_rows = check_counts(path, name)
    assert len(lines) > 100 and stats.kept > 0
    assert stats.rejects["not JSON"] > 10 and stats.rejects["invalid UTF-8"] > 4
    if name not in GATHERING:
        assert stats.rows_in == len(lines)
        assert len({rejected_row["place"] for rejected_row in rejected_rows}) == len(rejected_rows)
    else:
        with open(path, "rb") as file:
            assert file.read().count(b"\n") == len(lines)
        kind = find_source(name).kinds[0]
        assert stats.rows_in == sum(1 for _ in load_rows(f"{name}={path}", kind).raw)
    for row in load_rows(f"{name}={path}", find_source(name).kinds[0]):
        CHECKS[find_source(name).kinds[0]](row)
        json.dumps(row, ensure_ascii=False).encode()


def test_there_are_thousands_of_malformed_rows():
    counts = {name: len(hostile_lines(name)) for name in CONVERTING}
    assert len(counts) >= 30 and sum(counts.values()) > 10_000 and min(counts.values()) > 100


@pytest.mark.parametrize("name", CONVERTING)
def test_malformed_rows_in_arrays_and_tables_are_counted(name, tmp_path):
    rows = []
    for line in hostile_lines(name):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    objects = [row for row in rows if isinstance(row, dict)][:300]
    assert len(objects) > 40
    (tmp_path / "rows.json").write_text("[\n  " + ",\n  ".join(map(json.dumps, objects)) + "\n]")
    texts = [{key: json.dumps(value)[:1000] for key, value in row.items()} for row in objects]
    columns = sorted({key for row in texts for key in row if len(key) < 100 and key.isprintable()})
    table = pyarrow.Table.from_pylist([{key: row.get(key) for key in columns} for row in texts])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for file in ("rows.json", "rows.parquet"):
        stats, _ = check_counts(tmp_path / file, name)
        if name not in GATHERING:
            assert (file, stats.rows_in) == (file, len(objects))


ROWS = 120


# Damage to the bytes of one row, by format; it never splits or joins rows
DAMAGE = {
    "jsonl": [
        (b'"text"', b'"text'),
        (b'"text"', b'"text": "a", "text"'),
        (b"}", b""),
        (b"It", b"\xff"),
        (b'"}', b'",}'),
    ],
    "csv": [(b"It", b"\xff"), (b'"It', b'"I"t'), (b'"It', b'It"'), (b'"\n', b'"x\n')],
    "txt": [(b"It", b"\x81"), (b"It", b"\xe9\x81t"), (b"It", b"\0\xff")],  # no text in Windows-1252 either
}
DAMAGE |= {"array.json": DAMAGE["jsonl"], "one-line.json": DAMAGE["jsonl"]}


def written_rows(form: str) -> list[bytes]:
    """The bytes of the rows of a file with ROWS documents of two lines, including separators."""
    texts = [f"It was number {number},\nthe best of times." for number in range(ROWS)]
    if form == "csv":
        return [f'{number},"{text}"\n'.encode() for number, text in enumerate(texts)]
    if form == "txt":
        return [f"{text}\n<|endoftext|>".encode() for text in texts]
    objects = [json.dumps({"id": number, "text": text}) for number, text in enumerate(texts)]
    return [(row + {"jsonl": "\n", "array.json": ",\n", "one-line.json": ", "}[form]).encode() for row in objects]


@pytest.mark.parametrize("form", DAMAGE)
def test_only_damaged_rows_of_a_file_are_lost(form, tmp_path):
    """The expected number of rows is that of the written file."""
    rng, harmed, path = random.Random(form), 0, tmp_path / f"rows.{form}"
    for _ in range(60):
        rows = written_rows(form)
        bad = sorted(rng.sample(range(0, ROWS, 2), rng.randrange(1, 9)))  # never two consecutive rows
        for number in bad:
            old, new = rng.choice(DAMAGE[form])
            assert old in rows[number]
            rows[number] = rows[number].replace(old, new, 1)
        content = b"".join(rows)
        if form.endswith("json"):
            content = b"[" + (b"\n" if form == "array.json" else b"") + content.rstrip(b", \n") + b"]"
        path.write_bytes((b"id,text\n" if form == "csv" else b"") + content)
        stats, rejected_rows = check_counts(path, "text")
        good = [f"It was number {number},\nthe best of times." for number in range(ROWS) if number not in bad]
        assert [row["text"] for row in load_rows(f"text={path}", "document")] == good
        # if a CSV row is cut short, its second line may be read as a row, which is rejected
        assert stats.rows_in == ROWS if form != "csv" else ROWS <= stats.rows_in <= ROWS + len(bad)
        harmed += len(bad)
    assert harmed > 200


def garbage(rng: random.Random, size: int) -> bytes:
    """Bytes like those of a broken download: text, marks of all formats, control bytes and no UTF-8."""
    pieces = [
        b"It was the best of times.", b"\n", b"\n\n", b"\r\n", b"\0", b"\xff\xfe", b"\xc3\xa9", b"<|endoftext|>", b"'",
        b'"', b"{", b"[", b",", b"\t", b" __eou__ ", b"L1044 +++$+++ u0 +++$+++ m0", b" = Title = ", b"+++$+++",
        b"*** START OF THE PROJECT GUTENBERG EBOOK A ***\n", b"End of Project Gutenberg", b"b'a'", b"\x1b[31m", b"PAR1",
        b"What is 1?", b"\n-6\n", b"\x80\x81", b"\xf0\x9f\x99", b"['L1', 'L2']", b"#### 12", b"\xe2\x80\xa8",
    ]  # fmt: skip
    return b"".join(rng.choices(pieces, k=size))


SUFFIXES = [".txt", ".md", ".py", ".tokens", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".zip"]
PACKINGS = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True)}


@pytest.mark.parametrize("name", CONVERTING)
def test_garbage_files_are_counted_or_raise_one_line(name, tmp_path):
    rng, read = random.Random(name), 0
    for suffix in SUFFIXES:
        for packing, pack in PACKINGS.items():
            data = pack(garbage(rng, 300))
            for content in (data, data[: len(data) // 2], b""):
                path = tmp_path / f"movie_conversations{suffix}{packing}"
                path.write_bytes(content)
                try:
                    check_counts(path, name)
                    read += 1
                except RorchatError as error:
                    assert str(error).count("\n") == 0 and error.exit_code == 65
    assert read > 60


def test_an_archive_of_garbage_is_counted(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("train/dialogues_train.txt", b"a __eou__ b __eou__\n" + garbage(random.Random(0), 500))
    stats, _ = check_counts(tmp_path / "train.zip", "dailydialog")
    assert stats.rows_in > 20 and stats.kept > 0


def test_garbage_is_assigned_a_format_or_raises(tmp_path):
    rng, guessed = random.Random(1), 0
    text = b"It was the best of times, it was the worst of times.\n" * 500
    for number, suffix in enumerate(SUFFIXES * 2):
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(garbage(rng, 200) + (text if number < len(SUFFIXES) else b""))
        try:
            assert guess_row_format(path) in CONVERTING
            guessed += 1
        except DataError as error:
            assert error.exit_code == 65
    assert guessed >= 2


def test_brackets_of_any_depth_are_one_row(tmp_path):
    depths = [*range(850, 1010, 3), 5000, 200_000]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join('{"text": ' + "[" * depth + "]" * depth + "}\n" for depth in depths))
    stats, rejected_rows = check_counts(path, "text")
    assert stats.rows_in == len(depths) == len(rejected_rows)
    assert set(stats.rejects) <= {"wrong type", "not JSON"}


# -- memory ----------------------------------------------------------------------------------------------------------

# VmHWM, not ru_maxrss, which includes the memory of the parent when it started the child
MEASURED = """
import sys
from rorchat.cli import main

code = 0
sys.argv = ["rorchat", "data", *sys.argv[1:]]
try:
    main()
except SystemExit as stopped:
    code = stopped.code
print(code, int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024)
"""
LARGE = 30_000_000  # bytes of a line
LINE = "once upon a time there was a small model that wanted to talk. "


def peak(*words: object) -> int:
    """Bytes of memory that `rorchat data ...` took at most."""
    done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, words)], capture_output=True, text=True)
    code, taken = done.stdout.splitlines()[-1].split()
    assert (done.returncode, code) == (0, "0"), done.stderr
    return int(taken)


def write_texts(path: Path, texts: list[str]) -> None:
    form = path.name.partition(".")[2]
    if form == "arrow":
        batches = pyarrow.Table.from_pylist([{"text": text} for text in texts]).to_batches()
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, batches[0].schema) as stream:
            stream.write_batch(batches[0])
    elif form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("texts.txt", END_OF_TEXT.join(texts))
    else:
        with lzma.open(path, "wt", preset=0) if form.endswith(".xz") else path.open("w", encoding="utf-8") as file:
            for text in texts:
                file.write(text + END_OF_TEXT if form == "txt" else json.dumps({"text": text}) + "\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "command"),
    [("txt", "check"), ("jsonl", "prepare"), ("jsonl.xz", "check"), ("arrow", "check"), ("zip", "check")],
)
def test_a_line_takes_less_than_three_times_its_size(form, command, saved, tmp_path):
    taken = {}
    for size in (1, LARGE):
        texts = [
            (LINE * (size // len(LINE) + 1))[:size],
            *(f"A story of {number} small words." for number in range(99)),
        ]
        path = tmp_path / f"{size}.{form}"
        write_texts(path, texts)
        texts.clear()
        options = ["--tokenizer", saved, "--out", tmp_path / f"{size}", "--workers", 1]
        options += ["--validation_share", 0.2]
        taken[size] = peak(command, f"text={path}", *(options if command == "prepare" else []))
    smallest, largest = taken.values()
    if form in ("txt", "zip"):  # read and cut in pieces
        assert largest - smallest < 0.5 * LARGE
    else:
        assert LARGE < largest - smallest < 3 * LARGE
