"""FineWeb-Edu: 1.3 trillion tokens of educational web pages. Penedo et al. 2024, arXiv:2406.17557.

`HUB` has the published random sample of 10 billion tokens, about 28 GB of Parquet.
"""

from rorchat.sources import text

KIND = "document"
LICENCE = "ODC-BY 1.0; the texts are bound by Common Crawl's terms of use too"
SIZE = "1.3 trillion tokens, of which HUB is the sample of 10 billion"
HUB = {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "split": "train"}
FILES = ("sample/10BT/*.parquet", "data/*/*.parquet", "*.parquet", "*.jsonl", "*.csv")
RAW = [
    {
        "text": "The Independent Jane\nFor all the love in Jane Austen's books, what they are about is freedom.",
        "id": "<urn:uuid:0d8a309d-25c5-405d-a08a-c11239f0d717>",
        "dump": "CC-MAIN-2013-20",
        "url": "http://example.com/austen",
        "language": "en",
        "language_score": 0.97,
        "token_count": 20,
        "score": 2.75,
        "int_score": 3,
    }
]
convert = text.convert
