"""BookCorpus: 74 million sentences of 11,038 unpublished novels, lower-cased and tokenized. Zhu et al. 2015.

Its files have one sentence per line and do not mark where a book ends. A document is 100 consecutive sentences, about
1,500 tokens: a single sentence has no context, and its neighbours would be in the other split.
"""

from collections.abc import Iterator
from pathlib import Path

from rorchat.reading.formats import read_rows
from rorchat.reading.text import read_lines
from rorchat.rows import CHECKS, RejectedRow, get_text

KIND = "document"
LICENCE = "unstated: novels that their authors gave away on smashwords.com, gathered without asking them"
SIZE = "74,004,228 sentences"
HUB = {"path": "bookcorpus/bookcorpus", "name": "plain_text", "split": "train", "revision": "refs/convert/parquet"}
FILES = ("books_large_p*.txt", "plain_text/train-*.parquet", "train-*.parquet", "*.parquet", "*.txt")
RAW = [{"text": "usually , he would be tearing around the living room , playing with his toys ."}]

RESTARTS_PER_FILE = True
SENTENCES_PER_DOCUMENT = 100


def read(path: Path) -> Iterator[tuple[str, object]]:
    """The lines of the original files, or the rows of other formats."""
    if ".txt" in Path(path.name.lower()).suffixes:
        return ((place, {"text": line} if isinstance(line, str) else line) for place, line in read_lines(path))
    return read_rows(path)


def gather(rows: Iterator[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Joins sentences into documents. A bad sentence is yielded separately, so that it is rejected with its place."""
    sentences, first_place = [], ""
    for place, row in rows:
        try:
            CHECKS[KIND](sentence := {"text": get_text(row, "text").strip()})
        except RejectedRow:
            yield place, row
            continue
        first_place = first_place or place
        sentences.append(sentence["text"])
        if len(sentences) == SENTENCES_PER_DOCUMENT:
            yield first_place, {"text": "\n".join(sentences)}
            sentences, first_place = [], ""
    if sentences:
        yield first_place, {"text": "\n".join(sentences)}


def convert(row: dict) -> dict:
    """{"text"} -> {"text"}."""
    return {"text": get_text(row, "text")}
