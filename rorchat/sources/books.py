"""Books as Project Gutenberg gives them: 48,284 in English on the Hub, or your own .txt files, one book each.

A book is one document, not a chapter: windows of 1,024 tokens cut either, and only whole books keep the validation text
free of the training text's people and places. The header and the licence around `*** START OF` and `*** END OF` go.
Hard-wrapped lines become paragraphs; verse, tables, lists and headings keep their lines.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rorchat.reading.encodings import read_text
from rorchat.reading.formats import FileSlice
from rorchat.rows import RejectedRow, RepairedRow, get_text

KIND = "document"
LICENCE = "public domain in the USA; with Project Gutenberg's name and header: the Project Gutenberg License"
SIZE = "48,284 books"
HUB = {"path": "sedthh/gutenberg_english", "split": "train"}
FILES = ("*.txt", "*/*.txt", "train-*.parquet", "data/train-*.parquet", "*.parquet", "*.jsonl")
RAW = [
    {
        "text": "Title: A Book\n\n*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\n\nProduced by A. Reader\n\n"
        "I\n\nIt was the best of times, it was the worst of times, it was the age\nof wisdom, of foolishness.\n"
        "\n*** END OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\nSection 1. General Terms of Use"
    },
    {"TEXT": "CHAPTER 1\r\n\r\nIt was the best of times.", "SOURCE": "gutenberg", "METADATA": "{}"},
]

_START = re.compile(r"^ *\*\*\* ?START OF TH(?:IS|E) PROJECT GUTENBERG[^*]{0,300}\*\*\*.*\n", re.MULTILINE)
_END = re.compile(r"^(?: *\*\*\* ?END OF TH(?:IS|E) PROJECT GUTENBERG|End of (?:The )?Project Gutenberg)", re.M | re.I)
_CREDITS = re.compile(r"\s*(?:This e-?book was |E-?text )?(?:produced|prepared) by .*(?:\n.+)*", re.IGNORECASE)
_WRAPPED_FROM = 50  # characters; the lines of a hard-wrapped paragraph have about 70, those of verse about 40


def read(path: Path) -> Iterator[tuple[str, object]]:
    """The whole text of a .txt file, in UTF-8 or else ISO-8859-1, or the rows of other formats."""
    if ".txt" not in path.suffixes:
        yield from FileSlice(path)
        return
    text, encoding = read_text(path), "UTF-8"
    if isinstance(text, RejectedRow) and text.reason == "invalid UTF-8":
        text, encoding = read_text(path, "iso-8859-1"), "ISO-8859-1"
    yield str(path), text if isinstance(text, RejectedRow) else {"text": text, "encoding": encoding}


def convert(row: dict) -> dict | RepairedRow:
    """A book in one string, "text" or the Hub's "TEXT" -> its own words, a paragraph a line, empty lines between."""
    text = get_text(row, "TEXT" if isinstance(row, dict) and "TEXT" in row else "text")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    start = _START.search(text)
    text = text[start.end() :] if start else text
    end = _END.search(text)
    text = text[: end.start()] if end else text
    text = text[credit.end() :] if (credit := _CREDITS.match(text)) else text
    blocks = (_unwrapped(block) for block in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")))
    book = {"text": "\n\n".join(block for block in blocks if block)}
    return RepairedRow(book, "ISO-8859-1 text") if row.get("encoding") == "ISO-8859-1" else book


def _unwrapped(block: str) -> str:
    """A paragraph's lines joined; lines of anything else as they stand.

    A paragraph is a block whose lines, but for the first, begin at the margin, and, but for the last, are mostly long.
    """
    lines = [line.rstrip() for line in block.split("\n") if line.strip()]
    if len(lines) < 2 or any(line.startswith(("  ", "\t")) for line in lines[1:]):
        return "\n".join(lines)
    if median(len(line) for line in lines[:-1]) < _WRAPPED_FROM:
        return "\n".join(lines)
    return "".join(line.strip() + ("" if line.endswith(("-", "—")) else " ") for line in lines).rstrip()
