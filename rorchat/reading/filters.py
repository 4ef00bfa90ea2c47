"""Light filters of documents by their characters: length, letters, script and repeated lines. All are off by default.

They are for corpora of which nobody looked at every document. What each document shows is a share, so that a threshold
means the same for a tale and for a book.
"""

import math
import unicodedata
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from rorchat.errors import UsageError
from rorchat.rows import RejectedRow

_ASCII = bytes(range(128))
_ASCII_LETTERS = bytes(byte for byte in _ASCII if chr(byte).isalpha())
_LETTERS_AND_BLANKS = _ASCII_LETTERS + b" \t\n\r\v\f"
_BLANK, _OTHER, _LETTER, _LATIN = 1, 0, 2, 3  # what a character is


@dataclass(frozen=True)
class Filters:
    """What a document must be to be kept; 0 switches a filter off.

    Attributes:
        min_characters: a shorter text is "too short".
        max_characters: a longer one is "over-long".
        max_repetition: the largest share of a text's characters in lines that stood in it before: "repetition". Empty
            lines do not count. Gopher allows 0.2 (Rae et al. 2021, arXiv:2112.11446, table A1).
        min_letters: the smallest share of its characters that are letters or white space, else "few letters".
            Prose has 0.95, source code 0.8, a table of numbers 0.4.
        min_latin: the smallest share of its letters that are of the Latin script, else "other script". A text without
            a letter passes.

    Raises:
        UsageError: a setting is out of its range.
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
                raise UsageError(f"{name} is {value!r}; it is a number of characters, 0 for no limit.")
        for name in ("max_repetition", "min_letters", "min_latin"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise UsageError(f"{name} is {value!r}; it is a share between 0 and 1, 0 for no limit.")
        if 0 < self.max_characters < self.min_characters:
            raise UsageError(
                f"min_characters is {self.min_characters:,} and max_characters {self.max_characters:,}: no text fits."
            )

    @property
    def active(self) -> bool:
        return bool(self.describe())

    def describe(self) -> dict[str, int | float]:
        """The filters that are on, for a manifest."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}

    def check(self, text: str) -> None:
        """Raises Reject for the first filter that a text does not pass."""
        if len(text) < self.min_characters:
            raise RejectedRow("too short", f"{len(text):,} characters, fewer than {self.min_characters:,}")
        if 0 < self.max_characters < len(text):
            raise RejectedRow("over-long", f"{len(text):,} characters, more than {self.max_characters:,}")
        if self.min_letters and text and (share := letters(text)) < self.min_letters:
            raise RejectedRow(
                "few letters", f"{_percent(share)} letters and white space, less than {self.min_letters:.0%}"
            )
        if self.min_latin and (share := latin(text)) < self.min_latin:
            raise RejectedRow(
                "other script", f"{_percent(share)} of the letters are Latin, less than {self.min_latin:.0%}"
            )
        if self.max_repetition and (share := repetition(text)) > self.max_repetition:
            raise RejectedRow(
                "repetition", f"{_percent(share)} in lines that stood before, over {self.max_repetition:.0%}"
            )


def _percent(share: float) -> str:
    return f"{math.floor(share * 1000) / 10:g}%"  # never rounded up to the threshold it misses


def letters(text: str) -> float:
    """The share of the characters of a text that are letters (with their accents) or white space."""
    encoded = text.encode(errors="surrogatepass")
    ascii_only = encoded.translate(None, _LETTERS_AND_BLANKS)
    fitting = len(encoded) - len(ascii_only)
    if not text.isascii():
        fitting += int(np.count_nonzero(_beyond_ascii(encoded)))
    return fitting / len(text)


def latin(text: str) -> float:
    """The share of the letters of a text that are of the Latin script; 1 where there is no letter."""
    if text.isascii():
        return 1.0
    encoded = text.encode(errors="surrogatepass")
    ascii_letters = len(encoded) - len(encoded.translate(None, _ASCII_LETTERS))
    kinds = _beyond_ascii(encoded)
    found = ascii_letters + int(np.count_nonzero(kinds == _LATIN))
    every = ascii_letters + int(np.count_nonzero(kinds >= _LETTER))
    return found / every if every else 1.0


def repetition(text: str) -> float:
    """The share of the characters of a text, line ends aside, in lines that stood in it before."""
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    every = sum(map(len, lines))
    return (every - sum(map(len, set(lines)))) / every if every else 0.0


def _beyond_ascii(encoded: bytes) -> np.ndarray:
    """What each character beyond ASCII is: (C,) uint8."""
    rest = encoded.translate(None, _ASCII).decode(errors="surrogatepass")
    return _kinds()[np.frombuffer(rest.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)]


@lru_cache(maxsize=1)
def _kinds() -> np.ndarray:
    """What each of Unicode's characters is: 1.1 MB, made in half a second when the first one beyond ASCII is met."""
    return np.fromiter(map(_kind, map(chr, range(0x110000))), dtype=np.uint8, count=0x110000)


def _kind(character: str) -> int:
    if unicodedata.category(character)[0] in "LM":
        return _LATIN if "LATIN" in unicodedata.name(character, "") else _LETTER
    return _BLANK if character.isspace() else _OTHER
