"""C4: the English web of April 2019, cleaned. Raffel et al. 2020, arXiv:1910.10683.

`HUB` has the first 10 of 1,024 shards, about 3 GB compressed. To use more, download the files and give `c4=FOLDER`.
"""

from rorchat.sources import text

KIND = "document"
LICENCE = "ODC-BY 1.0; the texts are bound by Common Crawl's terms of use too"
SIZE = "364,868,892 documents in 1,024 shards"
HUB = {"path": "allenai/c4", "data_files": "en/c4-train.0000?-of-01024.json.gz", "split": "train"}
FILES = ("c4-train.*.json", "en/c4-train.*.json", "c4-sample.*.json", "*train*.jsonl", "*.parquet", "c4*.jsonl")
RAW = [
    {
        "text": "Beginners BBQ Class Taking Place in Missoula!\nDo you want to get better at making delicious BBQ?",
        "url": "https://klyq.com/beginners-bbq-class-taking-place-in-missoula/",
        "timestamp": "2019-04-25T12:57:54Z",
    }
]
convert = text.convert
