"""DeepMind mathematics: school mathematics by the million, written by a program. Saxton et al. 2019, arXiv:1904.01557.

The release has a text file for each module, question and answer on alternating lines, in folders `train-easy`,
`train-medium` and `train-hard`; `interpolate` and `extrapolate` are the test sets. The Hub's rows spell Python byte
literals, `b'Solve ... for p.\\n'`, and are one of the modules.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from rorchat.reading.encodings import read_text
from rorchat.reading.formats import FileSlice
from rorchat.rows import RejectedRow, RepairedRow, decode_byte_literal, exchange, get_text

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

_ASKS = re.compile(r"[.?]\s*$|\(a\) ")  # no answer looks like this, but some questions do not: `267 divided by -171`


def read(path: Path) -> Iterator[tuple[str, object]]:
    """The pairs of a text file, each at its question's line; other formats as usual.

    A question that another question follows, or nothing, has no answer; pairing goes on with the second.
    """
    if not re.search(r"\.txt(\.(gz|zst))?$", path.name):
        yield from FileSlice(path)
        return
    text = read_text(path)
    if isinstance(text, RejectedRow):
        yield str(path), text
        return
    place, question = "", None
    for number, line in enumerate(text.split("\n"), start=1):
        if question is not None and not _ASKS.search(line):
            if question.strip() or line.strip():
                yield place, {"question": question, "answer": line}
            question = None
            continue
        if question is not None and question.strip():
            yield place, {"question": question, "answer": ""}
        place, question = f"{path}:{number}", line
    if question is not None and question.strip():
        yield place, {"question": question, "answer": ""}


def convert(row: dict) -> dict | RepairedRow:
    """{"question", "answer"} -> one exchange, out of the byte literals if they are some."""
    said = [get_text(row, "question").strip(), get_text(row, "answer").strip()]
    decoded = [decode_byte_literal(text) for text in said]
    if decoded == [None, None]:
        return exchange(*said)
    return RepairedRow(exchange(*((d or s).strip() for d, s in zip(decoded, said, strict=True))), "byte literal")
