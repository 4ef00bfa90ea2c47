"""DailyDialog: 13k everyday multi-turn dialogues. Li et al. 2017, arXiv:1710.03957.

The original release has one dialogue per line, ` __eou__` after every utterance and spaces around punctuation. Two
people speak in turn; the second becomes the assistant.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from rorchat.reading.encodings import content_suffix
from rorchat.reading.formats import read_rows
from rorchat.reading.text import read_lines
from rorchat.rows import ConvertedRow, RejectedRow, alternate_turns
from rorchat.sources.messages import trim

KIND = "conversation"
LICENCE = "CC BY-NC-SA 4.0 (not for commercial use)"
HUB = {"path": "roskoN/dailydialog", "split": "train", "revision": "refs/convert/parquet"}
SIZE = "13,118 dialogues"
FILES = (
    "dialogues_text.txt", "dialogues_train.txt", "train/dialogues_train.txt", "train.zip/**/dialogues_train.txt",
    "**/dialogues_[tv]*.txt",
)  # fmt: skip
RAW = [
    "Hey John , how are you ? __eou__ I ’ m fine , thanks . __eou__ Good ! __eou__",
    {"utterances": ["Say , Jim , how about a beer ?", "Sure ."]},
    {"dialog": ["Say , Jim , how about a beer ?", "Sure ."]},
]

_END_OF_UTTERANCE = "__eou__"


def read(path: Path) -> Iterator[tuple[str, object]]:
    """The lines of an original text file, or the rows of another format."""
    yield from read_lines(path) if content_suffix(path) == ".txt" else read_rows(path)


def convert(row: str | dict) -> dict | ConvertedRow:
    """A dialogue -> messages, without an unanswered utterance at the end."""
    if isinstance(row, dict):
        utterances = row.get("utterances") or row.get("dialog")
        if not isinstance(utterances, list):
            raise RejectedRow("missing field", f"no list 'utterances' or 'dialog' among {', '.join(map(str, row))}")
    elif not isinstance(row, str):
        raise RejectedRow("wrong type", f"a row is a {type(row).__name__}, expected a line of text or an object")
    elif _END_OF_UTTERANCE in row:
        utterances = [part for part in row.split(_END_OF_UTTERANCE) if part.strip()]
    else:
        raise RejectedRow("not a dialogue", f"no {_END_OF_UTTERANCE} in the line")
    if not all(isinstance(utterance, str) for utterance in utterances):
        raise RejectedRow("wrong type", "an utterance is not text")
    return trim(alternate_turns([_join_punctuation(utterance) for utterance in utterances]))


def _join_punctuation(utterance: str) -> str:
    """Removes the spaces around punctuation: `I ’ m fine , thanks .` -> `I'm fine, thanks.`"""
    text = utterance.strip().replace("’", "'")
    text = re.sub(r"(\w) ?' ?(s|m|t|d|re|ve|ll)\b", r"\1'\2", text)
    text = re.sub(r" +([,.;:!?%)])", r"\1", text)
    return re.sub(r"(?<=[a-z][.!?])(?=[A-Z])", " ", text)
