"""Training text that holds a piece of an evaluation set: found by the runs of 13 words that the two have in common.

As in GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C) n is 13, the most that it uses; unlike there, one such run
rejects the whole document (GPT-3 takes out 200 characters on either side of it and drops what would fall into more than
ten pieces), runs that are frequent in the training text count too, and n is not lowered, to 8 at least, for evaluation
sets of short strings. Words are lower-cased runs of letters and digits, so neither punctuation nor the kind of
apostrophe hides a copy. Every string anywhere in a row of an evaluation set counts, by itself; one of fewer than n
words is passed over: it cannot be told from chance. A row that has no longer one is not compared at all, and `told`
says how many there are: three of four questions of OpenBookQA.

A word of the evaluation sets has a number; a window with another word in it cannot be theirs. Windows of n numbers are
hashed to 64 bits and looked up in a sorted array, and each hit is compared word by word with the place it was hashed
from: there are no false positives. (Two evaluation windows of one hash, of which one is missed: 3 in a million chances
for 10^7 words.)
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np

from rorchat.errors import DataError, UsageError
from rorchat.reading.encodings import LONGEST_LINE, content_suffix, read_text
from rorchat.reading.folders import files_digest, find_files, is_hidden
from rorchat.reading.formats import READERS, read_rows
from rorchat.rows import RejectedRow
from rorchat.sources.registry import find_source, list_sources, load_rows, source_digest

N = 13
_BETWEEN = -1  # stands between two strings, and for a word that no evaluation set has
_PIECE = 2**22  # characters of a text that are looked at together, so that a book takes no more memory than that
_TABLES = {".csv", ".tsv"}  # read without a header: MMLU has none
_READ = {*READERS, ".arrow"}
# Files beside the questions that may be left alone: what goes with them, and holds no text of theirs
_COMPANIONS = {"", ".lst", ".yaml", ".yml", ".png", ".jpg", ".pdf", ".html", ".sh", ".cff", ".bib"}
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
    """What a text has in common with an evaluation set.

    Attributes:
        ngrams: how many of its windows of n words are the evaluation sets' too.
        share: of all its windows.
        words: those of the first such window.
        place: where that stands: the file and, counted from 0, the row.
    """

    ngrams: int
    share: float
    words: str
    place: str

    def reject(self) -> RejectedRow:
        return RejectedRow("contaminated", f"{len(self.words.split())} words of {self.place}: {self.words}")


@dataclass
class EvaluationText:
    """The windows of n words of some evaluation sets.

    Takes at most 24 bytes a word (its number; the hash, position and marks of its window) and about 110 bytes a
    distinct word; can be pickled.
    """

    n: int
    numbers: dict[bytes, int] = field(repr=False)  # word -> its number
    text: np.ndarray = field(repr=False)  # (W,) int32: the numbers of all words, with _BETWEEN after each string
    hashes: np.ndarray = field(repr=False)  # (H,) uint64, sorted, unique
    positions: np.ndarray = field(repr=False)  # (H,) uint32: where in `text` the window of each hash begins
    files: list[tuple[str, np.ndarray]] = field(repr=False)  # (name, where in `text` each of its rows begins)
    short: int = 0  # strings passed over because they have fewer than n words
    sets: list["EvaluationSet"] = field(default_factory=list)  # what was read, in the order given

    def __post_init__(self):
        # Which beginnings of a hash occur: tells most windows of a text apart five times faster than the sorted array
        bits = max(1, int(len(self.hashes) * 4 - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._marks = np.zeros(2**bits, dtype=bool)
        self._marks[self.hashes >> self._shift] = True

    @classmethod
    def read(cls, evaluation: list[str], n: int = N) -> "EvaluationText":
        """The evaluation text of files, folders (every file in them that can be read) or specs of sources.

        Raises:
            UsageError: n is no number of words.
            DataError: there is no such path, a file or a row of one cannot be read, or a set has no window of n words:
                a check that misses rows is none.
        """
        if not isinstance(n, int) or n < 2:
            raise UsageError(f"An n-gram of {n!r} words tells nothing: n is 13 in GPT-3, and at least 2.")
        numbers: dict[bytes, int] = {}
        text: list[np.ndarray] = []
        files: list[tuple[str, np.ndarray]] = []
        length = short = 0
        sets = [EvaluationSet(given) for given in evaluation]
        for one in sets:
            for name, rows in one.files():
                begins: list[int] = []
                for row in rows:
                    begins.append(length)
                    for found in map(words, _strings(row)):
                        if len(found) < n:
                            short += bool(found)
                            continue
                        ids = [numbers.setdefault(word, len(numbers)) for word in found]
                        text.append(np.array([*ids, _BETWEEN], np.int32))
                        length += len(found) + 1
                        one.words += len(found)
                    one.compared += length > begins[-1]
                one.rows += len(begins)
                files.append((name, np.array(begins, np.int64)))
            one.require_text(n)
        whole = np.concatenate(text) if text else np.empty(0, np.int32)
        windows = _windows(whole, n)
        hashes, first = np.unique(_hashes(whole, windows, n), return_index=True)
        return cls(n, numbers, whole, hashes, windows[first].astype(np.uint32), files, short, sets)

    def describe(self) -> str:
        """What there is to compare with, a line a set, with what of it cannot be compared."""
        return "\n".join(one.describe(self.n) for one in self.sets)

    def find(self, text: str) -> Match | None:
        """What a text has in common with the evaluation sets, or None."""
        ngrams = every = 0
        first = None
        for piece in _pieces(text, self.n):
            found = words(piece)
            every += max(0, len(found) - self.n + 1)
            begins, positions = self._common(found)
            if len(begins) and first is None:
                first = b" ".join(found[begins[0] : begins[0] + self.n]).decode(errors="replace"), positions[0]
            ngrams += len(begins)
        return Match(ngrams, ngrams / every, first[0], self._place(first[1])) if first else None

    def check(self, text: str) -> None:
        """Raises Reject, "contaminated", for a text that has a window of n words in common with an evaluation set."""
        if match := self.find(text):
            raise match.reject()

    def _common(self, found: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Where the windows begin that are evaluation text too, and where they begin there."""
        ids = np.fromiter(map(self.numbers.get, found, repeat(_BETWEEN)), dtype=np.int32, count=len(found))
        windows = _windows(ids, self.n)
        if not len(windows) or not len(self.hashes):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        hashes = _hashes(ids, windows, self.n)
        marked = self._marks[hashes >> self._shift]
        hashes, windows = hashes[marked], windows[marked]
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        hits = self.hashes[at] == hashes
        begins, positions = windows[hits], self.positions[at[hits]].astype(np.int64)
        span = np.arange(self.n)
        same = (ids[begins[:, None] + span] == self.text[positions[:, None] + span]).all(axis=1)
        return begins[same], positions[same]

    def _place(self, position: int) -> str:
        name, begins = next(file for file in reversed(self.files) if len(file[1]) and file[1][0] <= position)
        return f"{name}, row {np.searchsorted(begins, position, side='right') - 1}"


def _windows(ids: np.ndarray, n: int) -> np.ndarray:
    """Where n words stand in a row that all have numbers: (X,) int64."""
    if len(ids) < n:
        return np.empty(0, np.int64)
    unknown = np.concatenate([[0], np.cumsum(ids == _BETWEEN)])
    return np.flatnonzero(unknown[n:] == unknown[:-n])


def _hashes(ids: np.ndarray, windows: np.ndarray, n: int) -> np.ndarray:
    """64 bits of each window: a polynomial of its words' numbers, which are scattered first. (X,) -> (X,) uint64"""
    scattered = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    scattered ^= scattered >> np.uint64(29)
    hashes = np.zeros(max(0, len(ids) - n + 1), np.uint64)
    for offset in range(n):
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes += scattered[offset : offset + len(hashes)]
    return hashes[windows]


def _pieces(text: str, n: int) -> Iterator[str]:
    """A long text in pieces that share n - 1 words, so that every window of n words is in exactly one of them.

    But for windows as long as a piece: they are not looked for.
    """
    start = 0
    while len(text) - start > _PIECE:
        cut = start + _PIECE
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
    """Every string anywhere in a row; keys too, which are a file's first line where it has no header."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, dict):
        for key, value in row.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(row, list | tuple):
        for value in row:
            yield from _strings(value)


@dataclass
class EvaluationSet:
    """An evaluation set as it is given: a file, a folder or a spec of a source; and what was found in it."""

    given: str
    rows: int = 0
    compared: int = 0  # rows that have a string of n words
    words: int = 0  # in such strings

    def paths(self) -> tuple[list[Path], list[Path]]:
        """(files that are read, other files beside them); none where it is a source."""
        path = Path(self.given).expanduser()
        if self.is_source:
            return [], []
        if not path.is_dir():
            return ([path] if path.suffix == ".arrow" and path.is_file() else find_files(path, ("**/*",))), []
        there = sorted(file for file in path.rglob("*") if file.is_file() and not is_hidden(file, path))
        return [f for f in there if content_suffix(f) in _READ], [f for f in there if content_suffix(f) not in _READ]

    @property
    def is_source(self) -> bool:
        return self.given.partition("=")[0] in list_sources() and not Path(self.given).expanduser().exists()

    def files(self) -> Iterator[tuple[str, Iterable[object]]]:
        """(name, rows) of every file, or of a source."""
        if self.is_source:
            yield self.given, _readable(load_rows(self.given, find_source(self.given.partition("=")[0]).kinds[0]).raw)
            return
        read, others = self.paths()
        unknown = [str(file) for file in others if content_suffix(file) not in _COMPANIONS]
        if unknown:
            more = f", nor that of {len(unknown) - 1} other files" if unknown[1:] else ""
            raise DataError(
                f"The evaluation text of {unknown[0]} cannot be read{more}: name the files that can be one by one, or "
                f"write it as one of {', '.join(sorted(_READ))}."
            )
        for file in read:
            yield "/".join(file.parts[-2:]), _rows_of(file)

    def require_text(self, n: int) -> None:
        if not self.words:
            raise DataError(
                f"{self.given} has no string of {n} words in its {self.rows:,} rows: nothing would be compared with it."
            )

    def describe(self, n: int) -> str:
        lines = [f"against {self.given}: {self.words:,} words of {self.compared:,} rows"]
        if self.compared < self.rows:
            lines.append(
                f"  {self.rows - self.compared:,} of {self.rows:,} rows have no string of {n} words: not compared"
            )
        others = [file.name for file in self.paths()[1]]
        if others:
            lines.append(f"  not read: {', '.join(others[:5])}{', ...' if others[5:] else ''}")
        return "\n".join(lines)


def evaluation_digests(evaluation: list[str]) -> dict[str, str]:
    """The digest of each evaluation set, as `registry.source_digest` computes it; "" if its files are missing."""
    return {given: _digest_of(EvaluationSet(given)) for given in sorted(evaluation)}


def _digest_of(one: EvaluationSet) -> str:
    if one.is_source:
        return source_digest(one.given)
    path = Path(one.given).expanduser()
    if not path.exists():
        return ""
    return files_digest(one.paths()[0], path if path.is_dir() else path.parent)


def _rows_of(file: Path) -> Iterator[object]:
    kind = content_suffix(file)
    return _table(file) if kind in _TABLES else _arrow(file) if kind == ".arrow" else _readable(read_rows(file))


def _readable(rows: Iterable[tuple[str, object]]) -> Iterator[object]:
    for place, row in rows:
        if isinstance(row, RejectedRow):
            raise DataError(f"The evaluation text at {place} cannot be read: {row}.")
        yield row


def _table(file: Path) -> Iterator[list[str]]:
    text = read_text(file)
    if isinstance(text, RejectedRow):
        raise DataError(f"The evaluation text of {file} cannot be read: {text}.")
    csv.field_size_limit(LONGEST_LINE)
    try:
        yield from csv.reader(io.StringIO(text, newline=""), delimiter="\t" if content_suffix(file) == ".tsv" else ",")
    except csv.Error as error:
        raise DataError(f"The evaluation text of {file} cannot be read: {error}.") from None


def _arrow(file: Path) -> Iterator[dict]:
    """The rows of a file of `datasets.Dataset.save_to_disk`."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as data, pyarrow.ipc.open_stream(data) as batches:
            for batch in batches:
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(
            f"The evaluation text of {file} cannot be read: {' '.join(str(error).split())[:120]}."
        ) from None
