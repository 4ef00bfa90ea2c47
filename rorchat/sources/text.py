"""Your own texts: .txt or .md files with one document each, or JSON Lines and Parquet with a `text` column.

In a .txt file, `<|endoftext|>` separates documents, as in TinyStories. In other files it is ordinary text.
"""

from rorchat.rows import get_text

KIND = "document"
LICENCE = "that of your files"
SIZE = "your files"
HUB = None
FILES = ("**/*",)
RAW = [{"text": "Once upon a time there was a small model."}]


def convert(row: dict) -> dict:
    """{"text", ...} -> {"text"}."""
    return {"text": get_text(row, "text")}
