"""Tiny Shakespeare: 40,000 lines of his plays in one file of 1.1 MB. Karpathy 2015.

A document is twenty speeches: of one document nothing could be held out.
"""

from collections.abc import Iterator

from rorchat.rows import get_text

KIND = "document"
LICENCE = "public domain"
SIZE = "7,222 speeches"
HUB = {"path": "karpathy/tiny_shakespeare", "split": "train", "revision": "refs/convert/parquet"}
FILES = ("input.txt", "*.txt", "*.parquet")
RAW = [{"text": "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak."}]

RESTARTS_PER_FILE = True
SPEECHES = 20


def gather(rows: Iterator[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """The whole file, or the Hub's one row -> twenty speeches at a time."""
    for place, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            yield place, row  # what cannot be read is counted by whoever asked
            continue
        speeches = row["text"].split("\n\n")
        for start in range(0, len(speeches), SPEECHES):
            yield f"{place}, speech {start}", {"text": "\n\n".join(speeches[start : start + SPEECHES])}


def convert(row: dict) -> dict:
    """{"text"} -> {"text"}."""
    return {"text": get_text(row, "text")}
