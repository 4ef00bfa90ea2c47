"""BookCorpus: 74 million sentences of 11,038 unpublished novels, in small letters, tokens apart. Zhu et al. 2015.

Its files have one sentence a line and do not say where a book ends, so a document is a hundred sentences in a row, some
1,500 tokens: of one sentence a model learns no context, and a held-out one would have its neighbours in training.
"""

from collections.abc import Iterator
from pathlib import Path

from rorchat.reading.formats import FileSlice, read_lines
from rorchat.rows import CHECKS, RejectedRow, get_text

KIND = "document"
LICENCE = "unstated: novels that their authors gave away on smashwords.com, gathered without asking them"
SIZE = "74,004,228 sentences"
HUB = {"path": "bookcorpus/bookcorpus", "name": "plain_text", "split": "train", "revision": "refs/convert/parquet"}
FILES = ("books_large_p*.txt", "plain_text/train-*.parquet", "train-*.parquet", "*.parquet", "*.txt")
RAW = [{"text": "usually , he would be tearing around the living room , playing with his toys ."}]

RESTARTS_PER_FILE = True
SENTENCES = 100


def read(path: Path) -> Iterator[tuple[str, object]]:
    """The lines of the original files, or the rows of other formats."""
    if ".txt" in path.suffixes:
        return ((place, {"text": line} if isinstance(line, str) else line) for place, line in read_lines(path))
    return iter(FileSlice(path))


def gather(rows: Iterator[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Sentences -> a hundred at a time; a bad one goes alone, to be rejected by its own place."""
    sentences, begin = [], ""
    for place, row in rows:
        try:
            CHECKS[KIND](sentence := {"text": get_text(row, "text").strip()})
        except RejectedRow:
            yield place, row
            continue
        begin = begin or place
        sentences.append(sentence["text"])
        if len(sentences) == SENTENCES:
            yield begin, {"text": "\n".join(sentences)}
            sentences, begin = [], ""
    if sentences:
        yield begin, {"text": "\n".join(sentences)}


def convert(row: dict) -> dict:
    """{"text"} -> {"text"}."""
    return {"text": get_text(row, "text")}
