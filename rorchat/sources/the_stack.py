"""The Stack, its Python files: permissively licensed code, near-deduplicated. Kocetkov et al. 2022, arXiv:2211.15533.

Gated on the Hub: accept its terms of use there and log in first (`hf auth login`). `HUB` has the first Parquet file of
the deduplicated Python part. A document is a source file; its licences are in the column `max_stars_repo_licenses`.
"""

from rorchat.rows import get_text

KIND = "document"
LICENCE = "that of each file, all permissive; on the Hub's terms of use, which bind who passes it on"
SIZE = "6 TB in 358 languages before deduplication"
HUB = {"path": "bigcode/the-stack-dedup", "data_files": "data/python/data-00000-of-*.parquet", "split": "train"}
FILES = ("data/python/*.parquet", "python/*.parquet", "*.parquet", "*.jsonl", "*.json")
RAW = [
    {
        "content": "def add(a, b):\n    return a + b\n",
        "ext": "py",
        "lang": "Python",
        "max_stars_repo_name": "someone/sums",
        "max_stars_repo_licenses": ["MIT"],
    }
]


def convert(row: dict) -> dict:
    """{"content", ...} -> {"text"}."""
    return {"text": get_text(row, "content")}
