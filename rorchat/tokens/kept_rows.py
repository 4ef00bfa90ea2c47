"""Which rows of a source are kept: the same in `rorchat data check` and in a token store, with any tokenizer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rorchat.reading.filters import Filters
from rorchat.rows import RejectedRow, row_text
from rorchat.sources.registry import SourceRows
from rorchat.tokens.decontamination import EvaluationText
from rorchat.tokens.encode import MAX_WORD_BYTES, word_lengths
from rorchat.validation_split import exact_digest, text_digest

_BLANK, _NOT_BLANK = re.compile(r"\s"), re.compile(r"\S")
_SUSPICIOUS = MAX_WORD_BYTES // 4  # characters of a word that may have too many bytes; a character has at most four


@dataclass(frozen=True)
class KeptRow:
    """A row that is kept, unless it is a duplicate: see `exact_digest`."""

    place: str
    row: dict
    text: str
    digest: bytes  # `text_digest`

    @property
    def exact_digest(self) -> bytes:
        return exact_digest(self.row, self.digest)


@dataclass(frozen=True)
class RowFilter:
    """Decides which usable rows are kept, and counts the others as rejected.

    Attributes:
        kind: "document", "conversation" or "preference". Conversations may have words of any length.
    """

    kind: str
    filters: Filters
    evaluation: EvaluationText | None = None

    def check(self, place: str, row: dict, rows: SourceRows) -> KeptRow | None:
        """The row, or None if it was rejected."""
        text = row_text(row)
        try:
            self.filters.check(text)
            if self.evaluation is not None:
                self.evaluation.check(text)
            if self.kind == "document":
                check_words(text)
        except RejectedRow as rejected_row:
            rows.withdraw(place, rejected_row, row)
            return None
        return KeptRow(place, row, text, text_digest(text))


def check_words(text: str) -> None:
    """Raises RejectedRow if a text has a word of more than MAX_WORD_BYTES bytes, which takes too long to encode."""
    for start, end in _long_runs(text):
        longest = max(word_lengths(text[max(0, start - 1) : end + 1]))
        if longest > MAX_WORD_BYTES:
            raise RejectedRow("over-long", f"a word of {longest:,} bytes; the limit is {MAX_WORD_BYTES:,}")


def _long_runs(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of the runs of white space, and of other characters, that are long enough for a suspicious word.

    Such a run contains one of every _SUSPICIOUS characters, so only these are looked at, and what is around them.
    """
    end = 0
    for at in range(_SUSPICIOUS - 1, len(text), _SUSPICIOUS):
        if at < end:
            continue
        other = _NOT_BLANK if text[at].isspace() else _BLANK
        after = other.search(text, at)
        end = after.start() if after else len(text)
        start = at
        while start and not other.match(text, start - 1):
            start -= 1
        if end - start >= _SUSPICIOUS:
            yield start, end
