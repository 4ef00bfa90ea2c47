"""Clean English prose: Parquet or JSON lines with a `text` column, such as books chapter by chapter.

A folder's `train-*` files are its documents; a `val.jsonl` beside them stays out, for `rorchat evaluate --text`.
"""

from rorchat.rows import get_text

KIND = "document"
LICENCE = "that of your files"
SIZE = "your files"
HUB = None
FILES = ("train-*.parquet", "train*.jsonl", "*.parquet", "*.jsonl")
RAW = [{"text": "CHAPTER 1\n\nIt was the best of times.", "source": "a book", "license": "public domain"}]


def convert(row: dict) -> dict:
    """{"text", ...} -> {"text"}."""
    return {"text": get_text(row, "text")}
