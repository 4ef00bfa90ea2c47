"""Your own prose with a separate validation file: Parquet or JSON Lines with a `text` column.

Of a folder, the `train-*` files are read. A `val.jsonl` beside them is not, so it can be used with `rorchat evaluate
--text`.
"""

from rorchat.sources import text
from rorchat.sources.base import OWN_FILES

KIND = "document"
LICENCE = OWN_FILES
SIZE = "your files"
HUB = None
FILES = ("train-*.parquet", "train*.jsonl", "*.parquet", "*.jsonl")
RAW = [{"text": "CHAPTER 1\n\nIt was the best of times.", "source": "a book", "license": "public domain"}]
convert = text.convert
