"""TinyStories: 2.1 million stories in a child's vocabulary by GPT-3.5 and GPT-4. Eldan & Li 2023, arXiv:2305.07759.

The original text files have `<|endoftext|>` after every story, including the last. If a file ends without it, its last
story is incomplete and rejected.
"""

from rorchat.rows import RejectedRow, get_text

KIND = "document"
LICENCE = "CDLA-Sharing-1.0"
SIZE = "2,119,719 stories"
HUB = {"path": "roneneldan/TinyStories", "split": "train"}
FILES = ("TinyStories-train.txt", "*train*.txt", "train-*.parquet", "data/train-*.parquet", "*sample*.txt")
RAW = [{"text": "One day, a little girl named Lily found a needle in her room."}]


def convert(row: dict) -> dict:
    """{"text"} -> {"text"}."""
    text = get_text(row, "text")
    if row.get("unclosed"):
        raise RejectedRow("cut off", "the file ends inside this story, without <|endoftext|>")
    return {"text": text}
