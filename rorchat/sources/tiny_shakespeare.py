"""Tiny Shakespeare: 40,000 lines of his plays in one file of 1.1 MB. Karpathy 2015.

A document is twenty speeches, because a single document could not be split into training and validation.
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
SPEECHES_PER_DOCUMENT = 20


def gather(rows: Iterator[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Splits the whole file, or the single row on the Hub, into documents."""
    for place, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            yield place, row  # rejected by the caller
            continue
        speeches = row["text"].split("\n\n")
        for start in range(0, len(speeches), SPEECHES_PER_DOCUMENT):
            document = "\n\n".join(speeches[start : start + SPEECHES_PER_DOCUMENT])
            yield f"{place}, speech {start}", {"text": document}


def convert(row: dict) -> dict:
    """{"text"} -> {"text"}."""
    return {"text": get_text(row, "text")}
