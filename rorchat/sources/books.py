"""Books of Project Gutenberg: 48,284 in English on the Hub, or your own .txt files with one book each.

A document is a whole book, not a chapter: then the validation split has no characters and places of the training split.
The header before `*** START OF` and the licence after `*** END OF` are removed. Hard-wrapped lines are joined to
paragraphs; verse, tables, lists and headings keep their lines.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rorchat.reading.encodings import read_text
from rorchat.reading.formats import read_rows
from rorchat.rows import ConvertedRow, RejectedRow, get_text

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
_MIN_WRAPPED_LENGTH = 50  # characters; lines of hard-wrapped prose have about 70, lines of verse about 40


def read(path: Path) -> Iterator[tuple[str, object]]:
    """The whole text of a .txt file, in UTF-8 or else ISO-8859-1, or the rows of another format."""
    if ".txt" not in Path(path.name.lower()).suffixes:
        yield from read_rows(path)
        return
    text, encoding = read_text(path), "UTF-8"
    if isinstance(text, RejectedRow) and text.reason == "invalid UTF-8":
        text, encoding = read_text(path, "iso-8859-1"), "ISO-8859-1"
    yield str(path), text if isinstance(text, RejectedRow) else {"text": text, "encoding": encoding}


def convert(row: dict) -> dict | ConvertedRow:
    """{"text"} or the Hub's {"TEXT"} -> the text of the book with one line per paragraph and empty lines between."""
    text = get_text(row, "TEXT" if isinstance(row, dict) and "TEXT" in row else "text")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    start = _START.search(text)
    text = text[start.end() :] if start else text
    end = _END.search(text)
    text = text[: end.start()] if end else text
    text = text[credit.end() :] if (credit := _CREDITS.match(text)) else text
    blocks = (_unwrap(block) for block in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")))
    book = {"text": "\n\n".join(block for block in blocks if block)}
    return ConvertedRow(book, repairs=("ISO-8859-1 text",)) if row.get("encoding") == "ISO-8859-1" else book


def _unwrap(block: str) -> str:
    """Joins the lines of a hard-wrapped paragraph and leaves other blocks as they are.

    In a paragraph, no line but the first is indented, and most lines but the last are long.
    """
    lines = [line.rstrip() for line in block.split("\n") if line.strip()]
    if len(lines) < 2 or any(line.startswith(("  ", "\t")) for line in lines[1:]):
        return "\n".join(lines)
    if median(len(line) for line in lines[:-1]) < _MIN_WRAPPED_LENGTH:
        return "\n".join(lines)
    return "".join(line.strip() + ("" if line.endswith(("-", "—")) else " ") for line in lines).rstrip()
