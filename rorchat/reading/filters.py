"""Filters documents by length, share of letters, script and repeated lines. All filters are off by default.

Except for the length, thresholds are relative to the length of a document, so they apply equally to a short story and
to a book.
"""

import math
import unicodedata
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from rorchat.errors import UsageError
from rorchat.rows import RejectedRow

#: The reasons for which rows are rejected here; "over-long" is also that of other limits.
FILTER_REASONS = {"too short", "over-long", "few letters", "other script", "repetition"}
_ASCII = bytes(range(128))
_ASCII_LETTERS = bytes(byte for byte in _ASCII if chr(byte).isalpha())
_LETTERS_AND_WHITE_SPACE = _ASCII_LETTERS + b" \t\n\r\v\f"
_OTHER, _WHITE_SPACE, _LETTER, _LATIN = range(4)  # character classes; every class from _LETTER on is a letter


@dataclass(frozen=True)
class Filters:
    """Thresholds for documents; 0 turns a filter off.

    Attributes:
        min_characters: minimum length; shorter documents are rejected as "too short".
        max_characters: maximum length; longer documents are rejected as "over-long".
        max_repetition: maximum share of characters in repeated lines, not counting empty lines. Documents above it are
            rejected as "repetition". Gopher uses 0.2 (Rae et al. 2021, arXiv:2112.11446, table A1).
        min_letters: minimum share of letters and white space among the characters. Documents below it are rejected as
            "few letters". Typical values: prose 0.95, source code 0.8, a table of numbers 0.4.
        min_latin: minimum share of Latin letters among the letters. Documents below it are rejected as "other script".
            Documents without letters pass.

    Raises:
        UsageError: a threshold is out of range.
    """

    min_characters: int = 0
    max_characters: int = 0
    max_repetition: float = 0.0
    min_letters: float = 0.0
    min_latin: float = 0.0

    def __post_init__(self):
        for name in ("min_characters", "max_characters"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UsageError(f"{name} is {value!r}; it must be a number of characters, or 0 for no limit.")
        for name in ("max_repetition", "min_letters", "min_latin"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise UsageError(f"{name} is {value!r}; it must be a share between 0 and 1, or 0 for no limit.")
        if 0 < self.max_characters < self.min_characters:
            raise UsageError(
                f"min_characters is {self.min_characters:,} and max_characters {self.max_characters:,}: no text fits."
            )

    @property
    def active(self) -> bool:
        return bool(self.describe())

    def describe(self) -> dict[str, int | float]:
        """Returns the thresholds of the active filters, as written to a manifest."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}

    def check(self, text: str) -> None:
        """Raises RejectedRow with the first filter that rejects a text."""
        if len(text) < self.min_characters:
            raise RejectedRow("too short", f"{len(text):,} characters, fewer than {self.min_characters:,}")
        if 0 < self.max_characters < len(text):
            raise RejectedRow("over-long", f"{len(text):,} characters, more than {self.max_characters:,}")
        if self.min_letters and text and (share := letter_share(text)) < self.min_letters:
            raise RejectedRow(
                "few letters", f"{_percent(share)} letters and white space, less than {self.min_letters:.0%}"
            )
        if self.min_latin and (share := latin_share(text)) < self.min_latin:
            raise RejectedRow(
                "other script", f"{_percent(share)} of the letters are Latin, less than {self.min_latin:.0%}"
            )
        if self.max_repetition and (share := repetition_share(text)) > self.max_repetition:
            raise RejectedRow("repetition", f"{_percent(share)} in repeated lines, over {self.max_repetition:.0%}")


def _percent(share: float) -> str:
    return f"{math.floor(share * 1000) / 10:g}%"  # rounded down: 79.96% must not read as 80%


def letter_share(text: str) -> float:
    """Returns the share of letters (including combining accents) and white space among the characters of a text."""
    encoded = text.encode(errors="surrogatepass")
    count = len(encoded) - len(encoded.translate(None, _LETTERS_AND_WHITE_SPACE))
    if not text.isascii():
        count += int(np.count_nonzero(_classify_non_ascii(encoded)))
    return count / len(text)


def latin_share(text: str) -> float:
    """Returns the share of Latin letters among the letters of a text; 1 if it has no letters."""
    if text.isascii():
        return 1.0
    encoded = text.encode(errors="surrogatepass")
    ascii_letters = len(encoded) - len(encoded.translate(None, _ASCII_LETTERS))
    classes = _classify_non_ascii(encoded)
    latin_letters = ascii_letters + int(np.count_nonzero(classes == _LATIN))
    letters = ascii_letters + int(np.count_nonzero(classes >= _LETTER))
    return latin_letters / letters if letters else 1.0


def repetition_share(text: str) -> float:
    """Returns the share of characters in lines that repeat an earlier line. Line breaks are not counted."""
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    total = sum(map(len, lines))
    return (total - sum(map(len, set(lines)))) / total if total else 0.0


def _classify_non_ascii(encoded: bytes) -> np.ndarray:
    """Returns the class of each non-ASCII character of a UTF-8 text, (C,) uint8."""
    rest = encoded.translate(None, _ASCII).decode(errors="surrogatepass")
    return _build_class_table()[np.frombuffer(rest.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)]


@lru_cache(maxsize=1)
def _build_class_table() -> np.ndarray:
    """Returns the class of every Unicode character: 1.1 MB, built in half a second on first use."""
    return np.fromiter(map(_classify, map(chr, range(0x110000))), dtype=np.uint8, count=0x110000)


def _classify(character: str) -> int:
    if unicodedata.category(character)[0] in "LM":
        return _LATIN if "LATIN" in unicodedata.name(character, "") else _LETTER
    return _WHITE_SPACE if character.isspace() else _OTHER
