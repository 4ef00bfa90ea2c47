"""The Pile: 825 GiB of English text out of 22 sets, from arXiv to Wikipedia. Gao et al. 2020, arXiv:2101.00027.

On the Hub is what is left without the sets that infringe copyright (Books3, BookCorpus2, OpenSubtitles,
YoutubeSubtitles, OpenWebText2); `HUB` takes the first of its 30 shards. A folder's val and test shards stay out.
"""

from rorchat.rows import get_text

KIND = "document"
LICENCE = "unstated: each text has the licence of its own source, and many have none"
SIZE = "825 GiB, 22 sets"
HUB = {"path": "monology/pile-uncopyrighted", "data_files": "train/00.jsonl.zst", "split": "train"}
FILES = ("[0-9][0-9].jsonl", "train/[0-9][0-9].jsonl", "train*.jsonl", "train*.parquet", "*sample*.jsonl")
RAW = [{"text": "It is done, and submitted.", "meta": {"pile_set_name": "Pile-CC"}}]


def convert(row: dict) -> dict:
    """{"text", "meta"} -> {"text"}."""
    return {"text": get_text(row, "text")}
