"""Document sources read exactly the documents of real files."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest

from rorchat.errors import DataError
from rorchat.reading.formats import read_rows
from rorchat.sources import tiny_shakespeare, wikitext
from rorchat.sources.registry import SourceRows, find_source, list_sources, load_rows

MEBIBYTE = 2**20
SIZE = 25_000_000  # of a large document, in bytes
ZSTD_WINDOW = 8 * MEBIBYTE  # what a decompressor keeps
ROOT = Path(__file__).resolve().parents[2]


def read(spec: str) -> tuple[list[str], SourceRows]:
    """The texts of a source of documents, after checking that every raw row is counted."""
    rows = load_rows(spec, "document")
    kept = [row["text"] for row in rows]
    assert len(kept) == rows.stats.kept
    assert rows.stats.rows_in == rows.stats.kept + sum(rows.stats.rejects.values())
    return kept, rows


def test_bookcorpus_joins_100_sentences_to_a_document(tmp_path):
    sentences = [f"he said that it was {number} ." for number in range(250)]
    (tmp_path / "books_large_p1.txt").write_text("\n".join(sentences[:130]) + "\n")
    (tmp_path / "books_large_p2.txt").write_text("\n".join(sentences[130:]) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences))
    for path, lengths in ((tmp_path, [100, 30, 100, 20]), (tmp_path / "train.jsonl", [100, 100, 50])):
        texts, _ = read(f"bookcorpus={path}")
        assert [len(text.split("\n")) for text in texts] == lengths  # a file begins a document
        assert "\n".join(texts).split("\n") == sentences


# (source, path under shared/data, rows in, rejects, repairs, characters kept)
REAL = [
    ("pile", "pile", 1, {}, {}, 13_274),
    ("pile", "pile/pile_sample.jsonl", 146, {"control character": 1}, {}, 2_447_151),
    ("pile", "pile/pile_sample.jsonl.zst", 146, {"control character": 1}, {}, 2_447_151),
    ("c4", "c4", 3, {}, {}, 2_558),
    ("c4", "c4/c4-sample.00000-of-00001.json.gz", 1000, {"control character": 2}, {}, 2_157_622),
    ("c4", "c4/c4_demo.jsonl", 300, {}, {}, 737_161),
    ("fineweb_edu", "fineweb_edu", 150, {}, {}, 411_422),
    ("fineweb_edu", "fineweb_edu/training_data.csv", 150, {}, {}, 411_422),
    ("tinystories", "tinystories", 2322, {"cut off": 1}, {}, 2_061_669),
    ("tinystories", "tinystories/tinystories_sample.txt", 5, {}, {}, 3_709),
    ("wikitext", "wikitext2", 60, {}, {}, 1_073_153),
    ("wikitext", "wikitext2/wiki.test.tokens", 60, {}, {}, 1_200_537),
    ("books", "books", 4, {}, {"ISO-8859-1 text": 1}, 1_812_120),
    ("code_search_net", "python_code", 5, {}, {}, 395),
    ("code_search_net", "python_code/cosqa-dev.json", 604, {}, {}, 162_635),
]


@pytest.mark.parametrize(
    ("name", "path", "rows_in", "rejects", "repairs", "characters"),
    REAL,
    ids=[f"{name} {path}" for name, path, *_ in REAL],
)
def test_real_files_have_the_documented_documents(name, path, rows_in, rejects, repairs, characters, shared_data):
    texts, loaded = read(f"{name}={shared_data / path}")
    assert (loaded.stats.rows_in, loaded.stats.rejects, loaded.stats.repairs) == (rows_in, rejects, repairs)
    assert sum(map(len, texts)) == characters


def test_hub_datasets_need_no_loading_script():
    sources = [find_source(name) for name in list_sources()]
    hubs = [source.hub for source in sources if source.hub and source.kinds[0] == "document"]
    assert len(hubs) >= 9
    for hub in hubs:
        assert "/" in hub["path"] and hub["split"] == "train"
        assert "trust_remote_code" not in hub


def test_pile_reads_only_numbered_training_shards(shared_data, tmp_path):
    _, loaded = read(f"pile={shared_data / 'pile'}")
    assert [place for place, _ in load_rows(f"pile={shared_data / 'pile'}", "document").raw] == [
        f"{shared_data / 'pile' / '00.jsonl.zst'}:1"
    ]
    for name in ("val.jsonl.zst", "test.jsonl.zst"):
        (tmp_path / name).write_bytes((shared_data / "pile" / name).read_bytes())
    with pytest.raises(DataError, match=r"has no file that matches .*, only test\.jsonl\.zst, val\.jsonl\.zst"):
        read(f"pile={tmp_path}")


def test_pile_documents_are_complete_and_the_bad_one_is_reported(shared_data):
    path = shared_data / "pile" / "pile_sample.jsonl"
    texts, loaded = read(f"pile={path}")
    raw = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == raw[:118] + raw[119:]
    assert max(map(len, texts)) == 301_525
    assert loaded.stats.places == {"control character": [f"{path}:119 (the text has U+0082 at character 4720)"]}


def test_c4_reads_only_the_training_shard(shared_data):
    places = [place for place, _ in load_rows(f"c4={shared_data / 'c4'}", "document").raw]
    shard = shared_data / "c4" / "en" / "c4-train.00000-of-01024.json.gz"
    assert places == [f"{shard}:{line}" for line in (1, 2, 3)]


def test_json_lines_named_json_gz_are_read_line_by_line(tmp_path):
    path = tmp_path / "c4-train.00000-of-01024.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": \n\n{"text": "two"}\n'))
    texts, loaded = read(f"c4={tmp_path}")
    assert texts == ["one", "two"]
    assert loaded.stats.places["not JSON"][0].startswith(f"{path}:2 ")


def test_fineweb_edu_is_equal_in_parquet_and_csv(shared_data):
    texts, _ = read(f"fineweb_edu={shared_data / 'fineweb_edu' / 'sample.parquet'}")
    assert texts == read(f"fineweb_edu={shared_data / 'fineweb_edu' / 'training_data.csv'}")[0]
    assert texts[0].startswith("The Independent Jane\nFor all the love, romance and scandal")


def test_an_incomplete_last_story_is_rejected_at_its_line(shared_data):
    path = shared_data / "tinystories" / "tinystories_sample_2mb.txt"
    texts, loaded = read(f"tinystories={path}")
    raw = path.read_text().split("<|endoftext|>")
    assert texts == [story.strip("\r\n") for story in raw[:-1]]
    line = path.read_text()[: -len(raw[-1].lstrip("\n"))].count("\n") + 1
    assert loaded.stats.places["cut off"][0].startswith(f"{path}:{line} ")


def test_a_single_story_without_separator_is_complete(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time.\n")
    assert read(f"tinystories={path}")[0] == ["Once upon a time."]


@pytest.mark.parametrize("block", [1, 7, 13, 14, 100, 2**20])
def test_documents_do_not_depend_on_the_block_size(block, tmp_path, monkeypatch):
    rng = random.Random(block)
    parts = ["".join(rng.choices("ab\n<|é", k=rng.randrange(60))) for _ in range(40)] + ["end"]
    text = "<|endoftext|>".join(parts)
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr("rorchat.reading.text.BLOCK_BYTES", block)
    rows = list(read_rows(tmp_path / "a.txt"))
    assert [row["text"] for _, row in rows] == [part.strip("\n") for part in parts]
    lines, at = text.split("\n"), 0
    for place, row in rows:
        line = int(place.rpartition(":")[2])
        if row["text"]:
            assert row["text"].split("\n")[0] in lines[line - 1]
            assert line >= at
            at = line
    assert [row.get("unclosed", False) for _, row in rows] == [False] * 40 + [True]


def test_an_undecodable_document_is_rejected_with_its_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"o\xc3\xb1e<|endoftext|>Gr\xfc\xdfe<|endoftext|>three, and many more words<|endoftext|>")
    texts, loaded = read(f"text={path}")
    assert texts == ["oñe", "three, and many more words"]
    assert loaded.stats.places == {"invalid UTF-8": [f"{path}:1 (byte 19)"]}


def test_a_truncated_archive_yields_the_documents_before_the_damage(tmp_path):
    rng = random.Random(0)
    stories = [str(rng.random()) for _ in range(200_000)]
    whole = gzip.compress("<|endoftext|>".join(stories).encode())
    path = tmp_path / "a.txt.gz"
    path.write_bytes(whole[: len(whole) // 2])
    texts, loaded = read(f"text={path}")
    assert loaded.stats.rejects == {"damaged gzip": 1}
    assert len(texts) > 10_000 and texts == stories[: len(texts)]


def test_wikitext_articles_are_detokenized(shared_data):
    texts, _ = read(f"wikitext={shared_data / 'wikitext2'}")
    assert texts[0].startswith(
        "Homarus gammarus\n\nHomarus gammarus, known as the European lobster or common lobster, is a species of <unk> "
        "lobster from the eastern Atlantic Ocean, Mediterranean Sea and parts of the Black Sea. It is closely related "
        "to the American lobster, H. americanus. It may grow to a length of 60 cm (24 in) and a mass of 6 kilograms "
        "(13 lb), and bears a conspicuous pair of claws. In life, the lobsters are blue, only becoming "
        '"lobster red" on cooking.'
    )
    assert "up to 5–6 kilograms (11–13 lb)" in texts[0] and "weigh 0.7–2.2 kg (1.5–4.9 lb)" in texts[0]
    every = "\n".join(texts)
    assert not [mark for mark in ("@-@", "@,@", "@.@", " ,", "( ", " )", "= =") if mark in every]
    assert every.count("\n\nDescription\n\n") >= 1


def test_title_like_lines_in_a_formula_begin_no_article(shared_data):
    """62 lines of wiki.test.tokens look like titles, but two are pieces of a formula."""
    path = shared_data / "wikitext2" / "wiki.test.tokens"
    texts, _ = read(f"wikitext={path}")
    assert len([line for line in path.read_text().splitlines() if wikitext.TITLE.fullmatch(line)]) == 62
    (article,) = [text for text in texts if text.startswith("Constant k filter\n")]
    assert "\n\n1 <unk>/s and a nominal <unk> k\n\n" in article


def test_a_title_needs_an_empty_line_before_and_after(tmp_path):
    path = tmp_path / "wiki.train.tokens"
    path.write_text(" \n = One = \n \n Words . \n = x = \n \n = y = \n z \n \n = Two = \n \n More words . \n")
    assert read(f"wikitext={path}")[0] == ["One\n\nWords.\n\nx\n\ny\n\nz", "Two\n\nMore words."]
    assert [place for place, _ in load_rows(f"wikitext={path}", "document").raw] == [f"{path}:2", f"{path}:10"]


def test_wikitext_rows_of_the_hub_give_the_same_articles(shared_data, tmp_path):
    path = shared_data / "wikitext2" / "wiki.valid.tokens"
    rows = [{"text": "" if not line.strip() else line} for line in path.read_text().splitlines(keepends=True)]
    (tmp_path / "train-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(f"wikitext={tmp_path / 'train-00000.jsonl'}")[0] == read(f"wikitext={path}")[0]


def test_books_are_unwrapped_and_keep_all_their_words(shared_data):
    alice, pride, holmes, frankenstein = read(f"books={shared_data / 'books'}")[0]
    every = "\n".join((alice, pride, holmes, frankenstein))
    assert not [mark for mark in ("Gutenberg", "\r", "\ufeff", "***", "Produced by A") if mark in every]
    assert alice.startswith(
        "ALICE’S ADVENTURES IN WONDERLAND\n\nLewis Carroll\n\nTHE MILLENNIUM FULCRUM EDITION 3.0\n\n"
        "CHAPTER I. Down the Rabbit-Hole\n\nAlice was beginning to get very tired of sitting by her sister on the "
        "bank, and of having nothing to do: once or twice she had peeped into the book her sister was reading,"
    )
    assert pride.endswith("by bringing her into Derbyshire, had been the means of uniting them.")
    assert '"IRENE NORTON, née ADLER."' in holmes  # ISO-8859-1
    raw = (shared_data / "books" / "84-0.txt").read_text("utf-8-sig")
    book = raw[raw.index("Frankenstein;\n") : raw.index("End of the Project Gutenberg")]
    assert frankenstein.split() == book.split()


def test_verse_and_tables_of_contents_keep_their_lines(shared_data):
    alice, pride, holmes, _ = read(f"books={shared_data / 'books'}")[0]
    assert "\n\n     ‘How doth the little crocodile\n      Improve his shining tail,\n" in alice
    assert "\n   I. A Scandal in Bohemia\n  II. The Red-headed League\n" in holmes
    assert "“If I can but see one of my daughters happily settled at Netherfield,” said Mrs. Bennet to her" in pride


def test_cosqa_functions_are_documents(shared_data):
    texts, _ = read(f"code_search_net={shared_data / 'python_code' / 'cosqa-dev.json'}")
    assert texts == [row["code"] for row in json.loads((shared_data / "python_code" / "cosqa-dev.json").read_text())]
    assert texts[1].startswith('def split_multiline(value):\n    """Split a multiline string into a list')


# Growth of memory, not the peak: `ru_maxrss` includes the memory of the parent when it started the child.
MEASURE = """
import sys
from pathlib import Path
import pyarrow
from rorchat.sources.registry import load_rows

def bytes_of(field):
    status = open("/proc/self/status").read()
    return int(status.partition(field + ":")[2].split()[0]) * 1024

load_rows(sys.argv[1], "document")
before, characters = bytes_of("VmRSS"), 0
for _, row in load_rows(sys.argv[1], "document").raw:
    characters += len(row["text"])
    del row
read = bytes_of("VmHWM") - before
for row in load_rows(sys.argv[1], "document"):
    del row
print(characters, read, bytes_of("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("form", ["txt", "closed.txt", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "json.gz"])
def test_a_document_takes_less_than_three_times_its_size(form, tmp_path):
    text = (b"once upon a time there was a small model that wanted to talk. " * (SIZE // 60))[:SIZE]
    content = text if "txt" in form else b'{"text": "' + text + b'"}\n'
    path = tmp_path / f"a.{form}"
    if form.endswith(".gz"):
        path.write_bytes(gzip.compress(content, compresslevel=1))
    elif form.endswith(".zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(content + (b"<|endoftext|>" if form == "closed.txt" else b""))
    done = subprocess.run([sys.executable, "-c", MEASURE, f"text={path}"], capture_output=True, text=True, check=True)
    characters, reading, checking = map(int, done.stdout.split())
    if "txt" in form:  # read and cut in pieces, without the spaces between them
        assert 0.999 * SIZE < characters < SIZE
        assert max(reading, checking) < 0.5 * SIZE + ZSTD_WINDOW
    else:
        assert characters == SIZE
        assert SIZE < reading < 3 * SIZE + ZSTD_WINDOW
        assert checking < 3 * SIZE + ZSTD_WINDOW


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("form", ["txt", "json.gz"])
def test_memory_does_not_grow_with_the_number_of_documents(form, tmp_path):
    path = tmp_path / f"a.{form}"
    story = "A dog went to the market to buy some bread. " * 100
    if form == "txt":
        path.write_text(f"{story}<|endoftext|>\n" * 20_000)
    else:
        path.write_bytes(gzip.compress((json.dumps({"text": story}) + "\n").encode() * 20_000, compresslevel=1))
    done = subprocess.run([sys.executable, "-c", MEASURE, f"text={path}"], capture_output=True, text=True, check=True)
    characters, _, growth = map(int, done.stdout.split())
    assert characters == 20_000 * len(story) > 80 * MEBIBYTE
    assert growth < 20 * MEBIBYTE


def test_the_documentation_shows_tiny_shakespeare(shared_data):
    written = Path(tiny_shakespeare.__file__).read_text(encoding="utf-8")
    assert f"```python\n{written}```" in (ROOT / "docs" / "add_a_dataset.md").read_text()
    assert written.count("\n") < 40
    folder = shared_data / "tinyshakespeare"
    rows = load_rows(f"tiny_shakespeare={folder}", "document")
    texts = [row["text"] for row in rows]
    assert (rows.stats.rows_in, rows.stats.kept, len(texts)) == (362, 362, 362)
    assert "\n\n".join(texts) == (folder / "input.txt").read_text().rstrip("\n")
