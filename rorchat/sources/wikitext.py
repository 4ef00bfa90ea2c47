"""WikiText: Wikipedia's good and featured articles. Merity et al. 2016, arXiv:1609.07843.

A document is an article. The files have one paragraph per line, and ` = Title = ` between two empty lines begins an
article. The tokenization is reverted: `2 @.@ 7 – 3 kg ( 1 @,@ 500 )` becomes 2.7–3 kg (1,500). The word-level files
(*.tokens) contain `<unk>` for rare words; for training, use the raw files, such as those of `HUB`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from rorchat.reading.encodings import content_suffix
from rorchat.reading.formats import read_rows
from rorchat.reading.text import read_lines
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

TITLE = re.compile(r" ?= (?!=).*[^=] = ?")
_DETOKENIZE = (  # (pattern, replacement)
    (r" @([-,.])@(?: |$)", r"\1"),
    (r'(^|\s|\()" ([^"\n]+) "(?=\s|$)', r'\1"\2"'),
    (r" '(?=(?:s|t|m|d|re|ve|ll)\b)|(?<=s) '(?= )", "'"),
    (r"([(\[$£€]) ", r"\1"),
    (r" ([,.;:!?%)\]′″])", r"\1"),
    (r"(?<=\d) – (?=\d)", "–"),
    (r" / ", "/"),
)


def read(path: Path) -> Iterator[tuple[str, object]]:
    """The lines of an original file, including empty ones, or the rows of another format."""
    if path.name.startswith("wiki.") or content_suffix(path) in (".tokens", ".raw", ".txt"):
        lines = read_lines(path, keep_empty=True)
        return ((place, {"text": line} if isinstance(line, str) else line) for place, line in lines)
    return read_rows(path)


def gather(rows: Iterator[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Joins lines into articles. A line that looks like a title begins an article only between two empty lines."""
    article: list[str] = []
    first_place, title, after_empty = "", None, True
    for place, row in rows:
        lines = _split_lines(row)
        if lines is None:
            yield place, row  # rejected by `convert`
            continue
        for line in lines:
            if line.strip():
                article += [title[1]] if title else []
                title = (place, line) if after_empty and TITLE.fullmatch(line) else None
                article += [] if title else [line]
                first_place = first_place or place
            elif title:
                if article:
                    yield first_place, {"text": "\n".join(article)}
                article, first_place, title = [title[1]], title[0], None
            after_empty = not line.strip()
    article += [title[1]] if title else []
    if article:
        yield first_place, {"text": "\n".join(article)}


def _split_lines(row: object) -> list[str] | None:
    """The lines of a text row, with an empty line before and after if there are several."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return None
    lines = row["text"].splitlines()
    return ["", *lines, ""] if len(lines) > 1 else lines or [""]


def convert(row: dict) -> dict:
    """An article -> its detokenized headings and paragraphs, separated by empty lines."""
    paragraphs = [re.sub(r"^(= )+(.*?)( =)+$", r"\2", line.strip()) for line in get_text(row, "text").splitlines()]
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    for pattern, replacement in _DETOKENIZE:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return {"text": text}
