"""Your own texts: .txt or .md files, one document each, or JSON lines and Parquet with a `text` column.

Inside a .txt file `<|endoftext|>` stands between documents, as in the files of TinyStories; elsewhere it is a word.
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
