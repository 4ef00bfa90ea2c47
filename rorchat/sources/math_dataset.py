"""DeepMind mathematics: millions of generated school mathematics problems. Saxton et al. 2019, arXiv:1904.01557.

The release has one text file per module with questions and answers on alternating lines, in the folders `train-easy`,
`train-medium` and `train-hard`; `interpolate` and `extrapolate` are the test sets. `HUB` has one of the modules. Its
rows contain Python byte literals: `b'Solve ... for p.\\n'`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from rorchat.reading.encodings import content_suffix, read_text
from rorchat.reading.formats import read_rows
from rorchat.rows import ConvertedRow, RejectedRow, decode_byte_literal, exchange, get_text

KIND = "conversation"
LICENCE = "Apache-2.0"
SIZE = "about 2 million questions in each of 56 modules"
HUB = {
    "path": "deepmind/math_dataset",
    "data_dir": "algebra__linear_1d",
    "split": "train",
    "revision": "refs/convert/parquet",
}
FILES = ("**/train-*/*.txt", "**/train/*.parquet", "**/train-*.parquet", "*.txt", "*.jsonl")
RAW = [{"question": "Solve 24 = 1601*c - 1605*c for c.", "answer": "-6"}]

_QUESTION = re.compile(r"[.?]\s*$|\(a\) ")  # never matches an answer, but not every question: `267 divided by -171`


def read(path: Path) -> Iterator[tuple[str, object]]:
    """The pairs of a text file with the line of the question, or the rows of another format.

    A question that is followed by another question, or by nothing, gets an empty answer.
    """
    if content_suffix(path) != ".txt":
        yield from read_rows(path)
        return
    text = read_text(path)
    if isinstance(text, RejectedRow):
        yield str(path), text
        return
    place, question = "", None
    for number, line in enumerate(text.split("\n"), start=1):
        if question is not None and not _QUESTION.search(line):
            if question.strip() or line.strip():
                yield place, {"question": question, "answer": line}
            question = None
            continue
        if question is not None and question.strip():
            yield place, {"question": question, "answer": ""}
        place, question = f"{path}:{number}", line
    if question is not None and question.strip():
        yield place, {"question": question, "answer": ""}


def convert(row: dict) -> dict | ConvertedRow:
    """{"question", "answer"} -> one question and answer, decoded if they are byte literals."""
    texts = [get_text(row, "question").strip(), get_text(row, "answer").strip()]
    decoded = [decode_byte_literal(text) for text in texts]
    if decoded == [None, None]:
        return exchange(*texts)
    pair = ((new or old).strip() for new, old in zip(decoded, texts, strict=True))
    return ConvertedRow(exchange(*pair), repairs=("byte literal",))
