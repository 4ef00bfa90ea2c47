"""The Pile: 825 GiB of English text from 22 datasets, from arXiv to Wikipedia. Gao et al. 2020, arXiv:2101.00027.

The version on the Hub omits the datasets that infringe copyright (Books3, BookCorpus2, OpenSubtitles, YoutubeSubtitles,
OpenWebText2); `HUB` has the first of its 30 shards. The val and test shards of a folder are not read.
"""

from rorchat.sources import text

KIND = "document"
LICENCE = "unstated: each text has the licence of its own source, and many have none"
SIZE = "825 GiB, 22 datasets"
HUB = {"path": "monology/pile-uncopyrighted", "data_files": "train/00.jsonl.zst", "split": "train"}
FILES = ("[0-9][0-9].jsonl", "train/[0-9][0-9].jsonl", "train*.jsonl", "train*.parquet", "*sample*.jsonl")
RAW = [{"text": "It is done, and submitted.", "meta": {"pile_set_name": "Pile-CC"}}]
convert = text.convert
