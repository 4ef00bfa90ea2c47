"""Finds training text that contains a passage of an evaluation set: 13 consecutive words in common.

As in GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C), n is 13, the largest value used there. Differences to
GPT-3: one match rejects the whole document (GPT-3 removes 200 characters on each side), n-grams that are frequent in
the training text count as well, and n is not lowered for evaluation sets with short strings.

Words are lower-cased runs of letters and digits, so punctuation and the kind of apostrophe do not hide a copy. Every
string in a row of an evaluation set is compared separately. Strings of fewer than n words are skipped, because they may
match by chance. `EvaluationText.describe` reports how many rows have no longer string: three of four in OpenBookQA.

Algorithm. Every word of the evaluation sets gets a number. All windows of n numbers are hashed to 64 bits, and the
hashes are sorted. In a training text, windows with an unknown word are skipped and the others are looked up by their
hash. Each hit is compared word by word, so there are no false positives. If two evaluation windows have the same hash,
one of them is missed: 3 chances in a million for 10^7 words.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np

from rorchat.errors import UsageError
from rorchat.rows import RejectedRow
from rorchat.tokens.evaluation_sets import EvaluationSet

N = 13
CHUNK_CHARACTERS = 2**22  # long texts are compared in chunks, to bound memory
_SEPARATOR = -1  # between two strings, and for words that occur in no evaluation set
_NOT_WORD = re.compile(r"[^\x00-\x7f\w]+")
_WORD_BYTES = bytes(byte if chr(byte).isalnum() or byte >= 128 else 32 for byte in range(256))


def words(text: str) -> list[bytes]:
    """The words of a text in UTF-8: lower-cased runs of letters and digits."""
    text = text.lower()
    if not text.isascii():
        text = _NOT_WORD.sub(" ", text)
    return text.encode(errors="surrogatepass").translate(_WORD_BYTES).split()


@dataclass(frozen=True)
class Match:
    """What a text has in common with evaluation sets.

    Attributes:
        ngrams: number of its windows of n words that occur in an evaluation set.
        share: their share of all its windows.
        words: the words of the first such window.
        place: file and row (counted from 0) of the evaluation set in which this window occurs.
    """

    ngrams: int
    share: float
    words: str
    place: str


@dataclass
class EvaluationText:
    """The windows of n words of evaluation sets.

    Takes at most 24 bytes per word (number, hash, position and marks) and about 110 bytes per distinct word. It can be
    pickled.
    """

    n: int
    numbers: dict[bytes, int] = field(repr=False)  # word -> its number
    text: np.ndarray = field(repr=False)  # (W,) int32: the numbers of all words, with _SEPARATOR after each string
    hashes: np.ndarray = field(repr=False)  # (H,) uint64, sorted, unique
    positions: np.ndarray = field(repr=False)  # (H,) uint32: the start in `text` of the window with each hash
    files: list[tuple[str, np.ndarray]] = field(repr=False)  # (name, the start in `text` of each row)
    short: int = 0  # strings that were skipped because they have fewer than n words
    sets: list[EvaluationSet] = field(default_factory=list)  # in the order given

    def __post_init__(self):
        # Marks the leading bits of all hashes: rejects most windows five times as fast as the sorted array
        bits = max(1, int(len(self.hashes) * 4 - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._marks = np.zeros(2**bits, dtype=bool)
        self._marks[self.hashes >> self._shift] = True

    @property
    def nbytes(self) -> int:
        """The bytes of its arrays."""
        return sum(array.nbytes for array in (self.text, self.hashes, self.positions, self._marks))

    @classmethod
    def read(cls, evaluation: list[str], n: int = N) -> "EvaluationText":
        """Reads evaluation sets: files, folders (all readable files in them) or specs of sources.

        Raises:
            UsageError: n is less than 2.
            DataError: a path does not exist, a file or row cannot be read, or a set has no string of n words.
        """
        if not isinstance(n, int) or n < 2:
            raise UsageError(f"n is {n!r}: n is 13 in GPT-3 and must be at least 2.")
        numbers: dict[bytes, int] = {}
        text: list[np.ndarray] = []
        files: list[tuple[str, np.ndarray]] = []
        length = short = 0
        sets = [EvaluationSet(given) for given in evaluation]
        for evaluation_set in sets:
            for name, rows in evaluation_set.files():
                starts: list[int] = []
                for row in rows:
                    starts.append(length)
                    for string in map(words, _strings(row)):
                        if len(string) < n:
                            short += bool(string)
                            continue
                        ids = [numbers.setdefault(word, len(numbers)) for word in string]
                        text.append(np.array([*ids, _SEPARATOR], np.int32))
                        length += len(string) + 1
                        evaluation_set.words += len(string)
                    evaluation_set.compared += length > starts[-1]
                evaluation_set.rows += len(starts)
                files.append((name, np.array(starts, np.int64)))
            evaluation_set.require_text(n)
        joined = np.concatenate(text) if text else np.empty(0, np.int32)
        windows = _find_windows(joined, n)
        hashes, first = np.unique(_hash_windows(joined, windows, n), return_index=True)
        return cls(n, numbers, joined, hashes, windows[first].astype(np.uint32), files, short, sets)

    def describe(self) -> str:
        """What is compared, one line per set, followed by what cannot be compared."""
        return "\n".join(evaluation_set.describe(self.n) for evaluation_set in self.sets)

    def find(self, text: str) -> Match | None:
        """What a text has in common with the evaluation sets; None if nothing."""
        ngrams = total = 0
        first = None
        for chunk in _chunks(text, self.n):
            chunk_words = words(chunk)
            total += max(0, len(chunk_words) - self.n + 1)
            starts, positions = self._common_windows(chunk_words)
            if len(starts) and first is None:
                passage = b" ".join(chunk_words[starts[0] : starts[0] + self.n])
                first = passage.decode(errors="replace"), positions[0]
            ngrams += len(starts)
        return Match(ngrams, ngrams / total, first[0], self._place(first[1])) if first else None

    def check(self, text: str) -> None:
        """Raises RejectedRow if a text has a window of n words in common with an evaluation set."""
        if match := self.find(text):
            raise RejectedRow("contaminated", f"{len(match.words.split())} words of {match.place}: {match.words}")

    def _common_windows(self, text: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The starts of the windows that are also evaluation text, in the text and in `self.text`: (M,) and (M,)."""
        ids = np.fromiter(map(self.numbers.get, text, repeat(_SEPARATOR)), dtype=np.int32, count=len(text))
        windows = _find_windows(ids, self.n)
        if not len(windows) or not len(self.hashes):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        hashes = _hash_windows(ids, windows, self.n)
        marked = self._marks[hashes >> self._shift]
        hashes, windows = hashes[marked], windows[marked]
        index = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        hits = self.hashes[index] == hashes
        starts, positions = windows[hits], self.positions[index[hits]].astype(np.int64)
        span = np.arange(self.n)
        equal = (ids[starts[:, None] + span] == self.text[positions[:, None] + span]).all(axis=1)
        return starts[equal], positions[equal]

    def _place(self, position: int) -> str:
        name, starts = next(file for file in reversed(self.files) if len(file[1]) and file[1][0] <= position)
        return f"{name}, row {np.searchsorted(starts, position, side='right') - 1}"


def _find_windows(ids: np.ndarray, n: int) -> np.ndarray:
    """The starts of all windows of n words without a separator: (X,) int64."""
    if len(ids) < n:
        return np.empty(0, np.int64)
    separators = np.concatenate([[0], np.cumsum(ids == _SEPARATOR)])
    return np.flatnonzero(separators[n:] == separators[:-n])


def _hash_windows(ids: np.ndarray, windows: np.ndarray, n: int) -> np.ndarray:
    """64-bit polynomial hashes of windows, over scrambled word numbers: (X,) -> (X,) uint64."""
    scrambled = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    scrambled ^= scrambled >> np.uint64(29)
    hashes = np.zeros(max(0, len(ids) - n + 1), np.uint64)
    for offset in range(n):
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes += scrambled[offset : offset + len(hashes)]
    return hashes[windows]


def _chunks(text: str, n: int) -> Iterator[str]:
    """A long text in chunks that overlap by n - 1 words, so that every window of n words is in exactly one chunk.

    Windows as long as a chunk are not found.
    """
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        cut = start + CHUNK_CHARACTERS
        while cut < len(text) and text[cut].isalnum():
            cut += 1
        yield text[start:cut]
        back = cut
        for _ in range(n - 1):
            while back > start and not text[back - 1].isalnum():
                back -= 1
            while back > start and text[back - 1].isalnum():
                back -= 1
        start = back if back > start else cut
    yield text[start:] if start else text


def _strings(row: object) -> Iterator[str]:
    """All strings in a row, including keys, which are the first line of a file without a header."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, dict):
        for key, value in row.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(row, list | tuple):
        for value in row:
            yield from _strings(value)
