"""Your own texts: text files with any name, or JSON Lines, CSV and Parquet with a `text` column.

In a .txt file, `<|endoftext|>` separates documents, as in TinyStories. In other files it is ordinary text.
A text of more than 16,000 characters is cut into documents (rorchat/reading/long_texts.py), so that a part of every
book can be held out; to keep books whole, read them as `books`. Text files may be in UTF-8, UTF-16 or Windows-1252.
"""

from rorchat.reading.long_texts import Limits
from rorchat.rows import get_text
from rorchat.sources.base import OWN_FILES

KIND = "document"
LICENCE = OWN_FILES
SIZE = "your files"
HUB = None
FILES = ("**/*",)
LONG_TEXTS = Limits()
RAW = [{"text": "Once upon a time there was a small model."}]


def convert(row: dict) -> dict:
    """{"text", ...} -> {"text"}."""
    return {"text": get_text(row, "text")}
