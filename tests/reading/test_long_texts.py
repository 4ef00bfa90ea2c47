"""Long texts are cut between chapters, paragraphs or sentences, and no character is lost."""

import random

import pytest
from support import SENTENCES, json_lines, read_source, write

from rorchat.reading.long_texts import DIVIDED_INTO, Cutter, Limits, cut, divide
from rorchat.sources.registry import load_rows

SMALL = Limits(100)
ALPHABETS = (
    "xyz",
    "ab ",
    "ab\n",
    "ab \r\n",
    "Ab. \n",
    "aé你。！ \n",
    "a.B!?\n\r\t \xa0",
    "e\u0301 \u200d👩🔬 ",
    "\n \t\r",
)


def random_text(rng: random.Random) -> str:
    words = rng.choices(ALPHABETS, k=rng.randint(1, 4))
    return "".join("".join(rng.choices(alphabet, k=rng.randint(0, 800))) for alphabet in words)


def test_the_pieces_of_random_texts_are_the_text():
    rng, cuts = random.Random(0), 0
    for _ in range(400):
        text = random_text(rng)
        pieces = cut(text, SMALL)
        assert "".join(pieces) == text and (all(pieces) or pieces == [""])
        cuts += len(pieces) - 1
        assert (len(pieces) == 1) or len(text) > SMALL.maximum
        assert "".join(divide(text)) == text
    assert cuts > 1000


def test_random_texts_are_never_cut_inside_a_word_or_a_character():
    rng, longest = random.Random(1), 0
    for _ in range(400):
        pieces = cut(random_text(rng), SMALL)
        for before, after in zip(pieces, pieces[1:], strict=False):
            assert before[-1].isspace() or before[-1] in "。！？"  # noqa: RUF001
            assert before[-1] != "\xa0" and (before[-1] in "\r\n" or after[0] not in "\u0301\u200d")
            assert len(before) <= SMALL.maximum or not before[: SMALL.maximum - 1].strip() or len(before.split()) == 1
            longest = max(longest, len(before))
    assert longest > SMALL.maximum  # words that are longer are pieces of their own


@pytest.mark.parametrize("size", [1, 7, 99, 100_000])
def test_the_pieces_do_not_depend_on_how_the_text_arrives(size):
    rng = random.Random(size)
    for _ in range(60):
        text = random_text(rng)
        cutter = Cutter(SMALL)
        pieces = [piece for at in range(0, len(text), size) for piece in cutter.feed(text[at : at + size])]
        assert [*pieces, cutter.finish()] == cut(text, SMALL)


PROSE = "He went on. " * 400  # 4,800 characters
CUTS = [
    ("headings", (PROSE * 2 + "\n\nCHAPTER II\n\n") * 4, "CHAPTER"),
    ("Markdown headings", (PROSE * 2 + "\n\n## Another part\n\n") * 4, "#"),
    ("headings after Windows line ends", (PROSE * 2 + "\r\n\r\nChapter 2\r\n\r\n") * 4, "Chapter 2"),
    ("empty lines", ("He went on. He came\nback " * 20 + "\n\nSo it began: ") * 60, "So it began"),
    ("empty lines with blanks", ("He went on, and\r\nhe " * 20 + "\r\n \r\nSo it began: ") * 60, "So it began"),
    ("line ends", "".join(f"line {n} has no end of a sentence\n" for n in range(900)), "line"),
    ("line ends of sentences", ("and he went on\nand on. And\non.\nSo it was\n" * 700), "So it was"),
    (
        "sentences",
        "Mr. B. Smith (the “Oh! no!” man) met Dr. Who at 3.15 p.m. alone. So he said. " * 400,
        "So he|Mr. B",
    ),
    (
        "sentences, not exclamations",
        "He said oh! no! no! no! no! no! no! and left. So he said. " * 700,
        "So he|He said",
    ),
    ("Chinese sentences", "今天天气很好，我们去公园散步。" * 2000, "今天"),  # noqa: RUF001
    ("white space", "word " * 8000, "word"),
]


@pytest.mark.parametrize(("text", "starts"), [case[1:] for case in CUTS], ids=[case[0] for case in CUTS])
def test_texts_are_cut_at_the_best_boundary(text, starts):
    pieces = cut(text)
    assert len(pieces) > 2 and "".join(pieces) == text
    for piece in pieces[1:]:
        assert piece.startswith(tuple(starts.split("|"))), piece[:60]
    assert all(Limits().minimum <= len(piece) <= Limits().maximum for piece in pieces[:-1])


def test_a_text_is_cut_only_above_the_maximum():
    words = "word " * 4000
    assert cut(words[:16_000]) == [words[:16_000]]
    assert len(cut(words[:16_001])) == 2


def test_a_word_longer_than_the_maximum_is_a_piece_of_its_own():
    text = "Before it. " + "x" * 40_000 + " And after. " * 2000
    before, word, *_ = cut(text)
    assert (before, word) == ("Before it. ", "x" * 40_000 + " ")


def test_real_books_are_cut_between_paragraphs(shared_data):
    for name, encoding, fewest in (("11-0", "utf-8", 12), ("1342-0", "utf-8", 60), ("1661-8", "latin-1", 60)):
        text = (shared_data / "books" / f"{name}.txt").read_bytes().decode(encoding)
        pieces = cut(text)
        assert "".join(pieces) == text and len(pieces) >= fewest
        for piece in pieces[:-1]:
            assert piece.endswith("\r\n\r\n") and Limits().minimum <= len(piece) <= Limits().maximum
    headings = sum(piece.startswith("Chapter ") for piece in cut((shared_data / "books/1342-0.txt").read_text("utf-8")))
    assert headings > 30


DIVIDED = [
    ("paragraphs", "\n\n".join(SENTENCES), DIVIDED_INTO),
    ("sentences", " ".join(SENTENCES[:13]), DIVIDED_INTO),
    ("two sentences", "It was. It went.", 2),
    ("wrapped sentences", "It was the best\nof times, it was\nthe worst of times. " * 20, DIVIDED_INTO),
    ("two lines", "roses are red\nviolets are blue", 2),
    ("words without sentences", "word " * 100, DIVIDED_INTO),
    ("one sentence", "It was the best of times.", 1),
    ("few words", "word " * 20, 1),
    ("one word", "x" * 5000, 1),
    ("blank", " \n \n ", 1),
]


@pytest.mark.parametrize(("text", "pieces"), [case[1:] for case in DIVIDED], ids=[case[0] for case in DIVIDED])
def test_an_only_document_is_divided_between_sentences(text, pieces):
    divided = divide(text)
    assert "".join(divided) == text and len(divided) == pieces
    if "." in text:
        assert all(piece.rstrip()[-1] in ".!?;。🔬," for piece in divided)


def test_only_long_rows_of_tables_are_cut_and_named_by_row_and_piece(tmp_path):
    rows = [{"text": "It was short."}, {"text": "It was long. " * 2000}, {"text": "x" * 16_000}, {"text": " " * 20_000}]
    path = write(tmp_path, "rows.jsonl", json_lines(*rows, 5))
    loaded = load_rows(f"text={path}", "document")
    places, texts = zip(*((loaded.place, row["text"]) for row in loaded), strict=True)
    assert places == (f"{path}:1", *(f"{path}:2, piece {n}" for n in (1, 2, 3)), f"{path}:3")
    assert " ".join(texts[1:4]) == "It was long. " * 2000
    _, loaded = read_source(f"text={path}", "document")
    assert loaded.stats.rejects == {"empty text": 1, "wrong type": 1} and loaded.stats.reading.long_texts == 1
    assert str(loaded.stats).splitlines()[1] == (
        "  1 file, 7 documents, which are the rows: 1 of more than 16,000 characters was cut into documents of "
        "about 8,000, at chapter headings, else empty lines, line ends, sentence ends or white space"
    )


def test_other_sources_keep_their_long_documents(tmp_path):
    path = write(tmp_path, "rows.jsonl", json_lines({"text": "It was long. " * 2000}))
    rows, _ = read_source(f"prose={path}", "document")
    assert [len(row["text"]) for row in rows] == [26_000]
