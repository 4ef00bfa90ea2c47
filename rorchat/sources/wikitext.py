"""WikiText: Wikipedia's good and featured articles. Merity et al. 2016, arXiv:1609.07843.

An article is a document; its files have one paragraph a line, and begin an article with ` = Title = ` between two empty
lines. The tokenisation is taken back: `2 @.@ 7 – 3 kg ( 1 @,@ 500 )` is 2.7–3 kg (1,500) again. `<unk>` stays in the
word-level files (*.tokens), where nobody knows the word; the raw ones, such as HUB, have none: train on those.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from rorchat.reading.formats import FileSlice, read_lines
from rorchat.rows import get_text

KIND = "document"
LICENCE = "CC BY-SA 3.0 and GFDL"
SIZE = "28,475 articles (WikiText-103), 600 (WikiText-2) for training"
HUB = {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1", "split": "train"}
FILES = ("wiki.train.*", "train-*.parquet", "wikitext-103-raw-v1/train-*.parquet", "wiki.valid.*", "wiki.test.*")
RAW = [
    {
        "text": " = Homarus gammarus = \n \n Homarus gammarus , known as the European lobster , weighs 0 @.@ 7 kg . \n"
        ' \n = = Name = = \n \n It is the " common lobster " ( since 1758 ) . \n \n'
    }
]

_TITLE = re.compile(r" ?= (?!=).*[^=] = ?")
_JOINS = (
    (r" @([-,.])@(?: |$)", r"\1"),
    (r'(^|\s|\()" ([^"\n]+) "(?=\s|$)', r'\1"\2"'),
    (r" '(?=(?:s|t|m|d|re|ve|ll)\b)|(?<=s) '(?= )", "'"),
    (r"([(\[$£€]) ", r"\1"),
    (r" ([,.;:!?%)\]′″])", r"\1"),
    (r"(?<=\d) – (?=\d)", "–"),
    (r" / ", "/"),
)


def read(path: Path) -> Iterator[tuple[str, object]]:
    """The lines of the original files, empty ones too, or the rows of other formats."""
    if path.name.startswith("wiki.") or path.suffix in (".tokens", ".raw", ".txt"):
        lines = read_lines(path, empty=True)
        return ((place, {"text": line} if isinstance(line, str) else line) for place, line in lines)
    return iter(FileSlice(path))


def gather(rows: Iterator[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Lines -> articles. Not every line like a title is one: some stand inside a table or a formula."""
    article, begin, title, after_empty = [], "", None, True
    for place, row in rows:
        lines = _lines(row)
        if lines is None:
            yield place, row  # for `convert` to reject
            continue
        for line in lines:
            if line.strip():
                article += [title[1]] if title else []
                title = (place, line) if after_empty and _TITLE.fullmatch(line) else None
                article += [] if title else [line]
                begin = begin or place
            elif title:
                if article:
                    yield begin, {"text": "\n".join(article)}
                article, begin, title = [title[1]], title[0], None
            after_empty = not line.strip()
    article += [title[1]] if title else []
    if article:
        yield begin, {"text": "\n".join(article)}


def _lines(row: object) -> list[str] | None:
    """The lines of a row that is a text: one as it stands, several with an empty one around them."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return None
    lines = row["text"].splitlines()
    return ["", *lines, ""] if len(lines) > 1 else lines or [""]


def convert(row: dict) -> dict:
    """An article -> its headings and paragraphs with an empty line between, in ordinary spelling."""
    paragraphs = [re.sub(r"^(= )+(.*?)( =)+$", r"\2", line.strip()) for line in get_text(row, "text").splitlines()]
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    for pattern, joined in _JOINS:
        text = re.sub(pattern, joined, text, flags=re.MULTILINE)
    return {"text": text}
