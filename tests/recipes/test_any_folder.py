"""Any folder of files trains, or is refused in one line that is true; no file and no character of a text vanishes."""

import gzip
import json
import os
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from recipe_commands import inside, metrics_of
from support import SENTENCES, read_source

from rorchat.inspection import check_source
from rorchat.reading.long_texts import divide
from rorchat.tokens.store import TokenStore

BLOCK_SIZE = 64
SAMPLE, GROUP = 8, 16
#: Seeds of the slow test; RANDOM_FOLDERS=200 in the environment tries as many as the first report did (three minutes).
FOLDERS = int(os.environ.get("RANDOM_FOLDERS", "24"))
FOLDER_BYTES = 3_000_000
LATIN = [sentence for sentence in SENTENCES if all(ord(character) < 256 for character in sentence)]
SUFFIXES = [".txt", ".txt", ".md", "", ".log", ".rst"]

Content = Callable[[random.Random, int], tuple[str, bytes, str | None]]


def prose(rng: random.Random, size: int, sentences: list[str] = SENTENCES) -> str:
    """About `size` characters, at least one sentence, in paragraphs."""
    parts, length = [], 0
    while length < size or not parts:
        parts.append(
            rng.choice(sentences).replace("1", str(rng.randrange(10_000))) + rng.choice([" ", " ", "\n", "\n\n"])
        )
        length += len(parts[-1])
    return "".join(parts)


def png(rng: random.Random, size: int) -> bytes:
    data = zlib.compress(rng.randbytes(size))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(data)) + b"IDAT" + data


def separated(rng: random.Random, size: int) -> tuple[str, bytes, str]:
    text = prose(rng, size)
    return ".txt", text.replace("\n\n", "<|endoftext|>").encode(), text


def json_lines_of(rng: random.Random, size: int) -> tuple[str, bytes, str]:
    rows = [prose(rng, size // 3) for _ in range(3)]
    return ".jsonl", "".join(json.dumps({"text": row}) + "\n" for row in rows).encode(), "".join(rows)


def compressed(rng: random.Random, size: int) -> tuple[str, bytes, str]:
    text = prose(rng, size)
    return ".txt.gz", gzip.compress(text.encode(), mtime=0), text


def encoded(encoding: str, sentences: list[str] = SENTENCES, change=str) -> Content:
    """Text in an encoding, after a change of its line ends, in a file with any name."""

    def content(rng: random.Random, size: int) -> tuple[str, bytes, str]:
        text = change(prose(rng, size, sentences))
        return rng.choice(SUFFIXES), text.encode(encoding), text

    return content


def unread(make: Callable[[random.Random, int], bytes], *suffixes: str) -> Content:
    return lambda rng, size: (rng.choice(suffixes or SUFFIXES), make(rng, size), None)


def one_word(rng: random.Random, size: int) -> tuple[str, bytes, str]:
    return ".txt", b"x" * size, "x" * size


def cyrillic(rng: random.Random, size: int) -> bytes:
    return ("Привет, мир! Как дела сегодня? " * (size // 30 + 1)).encode("cp1251")


#: Each kind of file gives (suffix, bytes, the text that must be read; None if the file must not be read).
KINDS: list[Content] = [
    encoded("utf-8"),
    encoded("utf-8"),
    encoded("utf-8-sig"),
    encoded("utf-16"),
    encoded("utf-32"),
    encoded("utf-16-le", LATIN),  # without a mark, only Latin script is certain
    encoded("utf-16-be", LATIN),
    encoded("cp1252", LATIN),
    encoded("cp1252", LATIN),
    encoded("utf-8", change=lambda text: text.replace("\n", "\r\n")),
    encoded("utf-8", change=lambda text: text.replace("\n", " ")),  # one line
    one_word,
    compressed,
    json_lines_of,
    separated,
    unread(lambda rng, size: b""),
    unread(lambda rng, size: b" \n" * (size // 2 + 1), ".txt", ".md"),
    unread(cyrillic),
    unread(png, ".png", ".txt", ""),
    unread(lambda rng, size: b"\0\xff\x81" + rng.randbytes(size), ".bin", ".txt", ""),
]


def write_folder(folder: Path, seed: int) -> dict[str, str | None]:
    """Writes random files; returns the text of each file that must be read (None: the file must not be)."""
    rng, expected, left = random.Random(seed), {}, FOLDER_BYTES
    folder.mkdir()
    for number in range(rng.choice([1, 1, 1, 2, 3, 4, 8, 20, 50])):
        size = min(int(10 ** rng.uniform(1, 6.3)), left)
        suffix, content, text = rng.choice(KINDS)(rng, max(10, size))
        (folder / f"{number:02d}{suffix}").write_bytes(content)
        expected[f"{number:02d}{suffix}"], left = text, max(10, left - len(content))
    return expected


def without_space(text: str) -> str:
    return re.sub(r"\s+|<\|endoftext\|>", "", text)


def require_nothing_lost(folder: Path, expected: dict[str, str | None]) -> list[str]:
    """Compares what is read with what was written, file by file; returns the documents."""
    rows, loaded = read_source(f"text={folder}", "document", allow_empty=True)
    stats = loaded.stats
    assert stats.rejects == {}
    unread = {name.removeprefix(f"{folder}/") for name in stats.reading.unread}
    assert unread == {name for name, text in expected.items() if text is None}
    assert all(stats.reading.unread.values()) and stats.reading.files == len(expected) - len(unread)
    texts = [text for name, text in sorted(expected.items()) if text is not None]
    assert without_space("".join(row["text"] for row in rows)) == without_space("".join(texts))
    checked = check_source(f"text={folder}").stats
    assert checked.rows_in == stats.rows_in == checked.kept + sum(checked.rejects.values())
    assert checked.reading == stats.reading
    return [row["text"] for row in rows]


def require_true(line: str, documents: list[str], store: Path) -> None:
    """Asserts that the reason of a refusal is true."""
    short = re.search(r"has ([\d,]+) training tokens, less than one row of 64", line)
    if short:
        manifest = TokenStore(store).manifest
        assert int(short[1].replace(",", "")) == manifest.total("train", "tokens") < BLOCK_SIZE
        assert sum(map(len, documents)) < 1000 or any(len(document) > 2**16 for document in documents)
    elif "has one document, which cannot be divided" in line:
        kept = {document for document in documents if len(document) <= 2**16}
        assert len(kept) == 1 and len({piece.strip() for piece in divide(kept.pop())}) == 1
    elif "No row of" in line:
        assert documents and all(len(document) > 2**16 for document in documents)
    else:
        assert "is empty: it has no rows. Not read: 0" in line or "has no file that matches **/*, only 00" in line
        assert not documents


def train(seed: int, tokenizer: Path, out: Path) -> Iterator[str]:
    """Trains three steps on a random folder; yields "trained", or the reason of the refusal."""
    folder = out / f"texts-{seed}"
    expected = write_folder(folder, seed)
    try:
        documents = require_nothing_lost(folder, expected)
    except Exception as error:
        assert "has no file that matches" in str(error), (seed, expected)
        assert all(text is None for text in expected.values())
        documents = []
    run = out / f"run-{seed}"
    done = inside(
        "pretrain", "--sources", f"text={folder}", "--tokenizer", tokenizer, "--size", "2x2x32", "--block_size",
        BLOCK_SIZE, "--per_device_train_batch_size", 2, "--global_batch_tokens", 2 * BLOCK_SIZE, "--max_steps", 3,
        "--logging_steps", 1, "--save_strategy", "no", "--output_dir", run,
    )  # fmt: skip
    if done.returncode:
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 65 and "Traceback" not in done.stderr, (seed, done.stderr[-2000:])
        require_true(line, documents, run / "tokens" / "text")
        yield line
        return
    assert len([record for record in metrics_of(run) if "loss" in record]) == 3, seed
    manifest = TokenStore(run / "tokens" / "text").manifest
    assert manifest.total("train", "documents") > 0 and manifest.total("validation", "documents") > 0
    assert manifest.rows_in == manifest.kept + sum(manifest.rejects.values())
    if not manifest.rejects:
        stored = manifest.total("train", "utf8_bytes") + manifest.total("validation", "utf8_bytes")
        written = sum(len(document.encode()) for document in documents)
        if len(documents) > 1:
            assert stored == written
        else:  # divided, without the white space between its pieces
            assert stored <= written <= stored + 40
    for name, text in expected.items():
        assert text is not None or f"{name} (" in done.stderr or ", and " in done.stderr, (seed, name)
    yield "trained"


def run_folders(seeds: range, tokenizer: Path, out: Path) -> list[str]:
    return [outcome for seed in seeds for outcome in train(seed, tokenizer, out)]


def test_a_sample_of_random_folders_trains_or_is_refused(saved, tmp_path):
    outcomes = run_folders(range(SAMPLE), saved, tmp_path)
    assert len(outcomes) == SAMPLE and outcomes.count("trained") > SAMPLE // 2


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SAMPLE, FOLDERS, GROUP))
def test_random_folders_train_or_are_refused(first, saved, tmp_path):
    outcomes = run_folders(range(first, first + GROUP), saved, tmp_path)
    assert len(outcomes) == GROUP and outcomes.count("trained") > GROUP // 2
