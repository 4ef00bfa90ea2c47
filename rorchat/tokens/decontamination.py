"""Finds training text that contains a passage of an evaluation set: 13 consecutive words in common.

As in GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C), documents are compared by n-grams of words with n = 13.
Differences from GPT-3: one match rejects the whole document (GPT-3 removes 200 characters on each side), n-grams that
are frequent in the training text count as well, and n is not lowered for evaluation sets with short strings.

Words are lower-cased runs of letters and digits, so punctuation and the kind of apostrophe do not hide a copy. Every
string in a row of an evaluation set is compared separately. Strings of fewer than n words are skipped, because they may
match by chance. `EvaluationText.describe` reports how many rows contain only such strings: three of four in OpenBookQA.

Algorithm: Every word of the evaluation sets is mapped to an integer id. All n-grams of ids are hashed to 64 bits, and
the hashes are sorted. In a training text, n-grams with an unknown word are skipped, and the others are looked up by
their hash. Each hit is compared word by word, so there are no false positives. If two n-grams of the evaluation sets
have the same hash, one of them is missed: the probability is 3 in a million for 10^7 words.
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
_SEPARATOR = -1  # id between two strings, and of words that occur in no evaluation set
_NOT_WORD = re.compile(r"[^\x00-\x7f\w]+")
_WORD_BYTES = bytes(byte if chr(byte).isalnum() or byte >= 128 else 32 for byte in range(256))


def words(text: str) -> list[bytes]:
    """Splits a text into words: lower-cased runs of letters and digits, in UTF-8."""
    text = text.lower()
    if not text.isascii():
        text = _NOT_WORD.sub(" ", text)
    return text.encode(errors="surrogatepass").translate(_WORD_BYTES).split()


@dataclass(frozen=True)
class Match:
    """The overlap between a text and the evaluation sets.

    Attributes:
        ngrams: number of the text's n-grams that occur in an evaluation set.
        share: share of the text's n-grams that occur in an evaluation set.
        words: the words of the first such n-gram.
        place: file and row (counted from 0) of the evaluation set that contains this n-gram.
    """

    ngrams: int
    share: float
    words: str
    place: str


@dataclass
class EvaluationText:
    """An index of all n-grams of the evaluation sets.

    It needs at most 24 bytes of memory per word (id, hash, position and marks) and about 110 bytes per distinct word.
    It can be pickled.
    """

    n: int
    word_ids: dict[bytes, int] = field(repr=False)  # word -> id
    text: np.ndarray = field(repr=False)  # (W,) int32: the ids of all words, with _SEPARATOR after each string
    hashes: np.ndarray = field(repr=False)  # (H,) uint64, sorted, unique
    positions: np.ndarray = field(repr=False)  # (H,) uint32: the start in `text` of the n-gram with each hash
    files: list[tuple[str, np.ndarray]] = field(repr=False)  # (name, (rows,) int64: the start of each row in `text`)
    short: int = 0  # strings that were skipped because they have fewer than n words
    sets: list[EvaluationSet] = field(default_factory=list)  # in the order given

    def __post_init__(self):
        # A table of the leading bits of all hashes. It rejects most n-grams five times as fast as the binary search.
        bits = max(1, int(len(self.hashes) * 4 - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._marks = np.zeros(2**bits, dtype=bool)
        self._marks[self.hashes >> self._shift] = True

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        return sum(array.nbytes for array in (self.text, self.hashes, self.positions, self._marks))

    @classmethod
    def read(cls, evaluation: list[str], n: int = N) -> "EvaluationText":
        """Reads evaluation sets, given as files, folders (all readable files in them) or specs of sources.

        Raises:
            UsageError: n is less than 2.
            DataError: a path does not exist, a file or row cannot be read, or a set has no string of n words.
        """
        if not isinstance(n, int) or n < 2:
            raise UsageError(f"n is {n!r}: it must be an integer of at least 2 (GPT-3 uses 13).")
        word_ids: dict[bytes, int] = {}
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
                        ids = [word_ids.setdefault(word, len(word_ids)) for word in string]
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
        return cls(n, word_ids, joined, hashes, windows[first].astype(np.uint32), files, short, sets)

    def describe(self) -> str:
        """Describes for each evaluation set what is compared, and in further lines what cannot be compared."""
        return "\n".join(evaluation_set.describe(self.n) for evaluation_set in self.sets)

    def find(self, text: str) -> Match | None:
        """Returns the overlap between a text and the evaluation sets, or None if they have no n-gram in common."""
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
        """Raises RejectedRow if a text has an n-gram in common with an evaluation set."""
        if match := self.find(text):
            raise RejectedRow("contaminated", f"{len(match.words.split())} words of {match.place}: {match.words}")

    def _common_windows(self, text: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Finds the n-grams that also occur in an evaluation set.

        Returns:
            The starts of these n-grams in the text and in `self.text`, both (M,) int64.
        """
        ids = np.fromiter(map(self.word_ids.get, text, repeat(_SEPARATOR)), dtype=np.int32, count=len(text))
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
        equal = (ids[starts[:, None] + span] == self.text[positions[:, None] + span]).all(axis=1)  # (M, n) -> (M,)
        return starts[equal], positions[equal]

    def _place(self, position: int) -> str:
        name, starts = next(file for file in reversed(self.files) if len(file[1]) and file[1][0] <= position)
        return f"{name}, row {np.searchsorted(starts, position, side='right') - 1}"


def _find_windows(ids: np.ndarray, n: int) -> np.ndarray:
    """Returns the starts of all n-grams that contain no separator, (X,) int64."""
    if len(ids) < n:
        return np.empty(0, np.int64)
    separators = np.concatenate([[0], np.cumsum(ids == _SEPARATOR)])
    return np.flatnonzero(separators[n:] == separators[:-n])


def _hash_windows(ids: np.ndarray, windows: np.ndarray, n: int) -> np.ndarray:
    """Computes a 64-bit polynomial hash over the scrambled word ids of each n-gram: (X,) -> (X,) uint64."""
    scrambled = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    scrambled ^= scrambled >> np.uint64(29)
    hashes = np.zeros(max(0, len(ids) - n + 1), np.uint64)
    for offset in range(n):
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes += scrambled[offset : offset + len(hashes)]
    return hashes[windows]


def _chunks(text: str, n: int) -> Iterator[str]:
    """Splits a long text into chunks that overlap by n - 1 words, so that every n-gram is in exactly one chunk.

    N-grams that are as long as a chunk are not found.
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
    """Yields all strings in a row. Keys are included: in a table without a header, they contain the first row."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, dict):
        for key, value in row.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(row, list | tuple):
        for value in row:
            yield from _strings(value)
