"""Documents -> ids, each distinct word encoded once.

A byte-level BPE first splits a text into words and then merges the bytes of each word by itself. Text repeats its words
(a book of 170,000 words has 10,000 different ones), so what costs time is the splitting. Here it is done in numpy, for
about a million characters at once: runs of letters, of digits, of other signs and of white space are found where the
class of a byte changes, the pattern's exceptions (the blank before a word, contractions, the last blank of several)
move a few of these bounds, Arrow numbers the words, and each new one is given to the tokenizer itself.

The ids are those of the tokenizer, for every text. Two splitting patterns are known, GPT-2's and ours; with any other,
the tokenizer does all of the work.
"""

import json
import random
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np

from rorchat.chatml import END_OF_TEXT, encode_text
from rorchat.tokenizer import SPLIT_PATTERN

CHARACTERS_AT_ONCE = 2**20  # the arrays of so much text stay near the processor's cache
LONGEST_WORD = 2**16  # bytes; merging takes longer than in proportion to a word's length
WORDS_KEPT = 2_000_000  # distinct words are forgotten beyond so many, which bounds memory

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_LETTER, _NUMBER, _OTHER, _BLANK, _END, _UNKNOWN = 1, 2, 3, 4, 5, 255
_NUL = b"\0"  # stands before every document, where <|endoftext|> goes; no document has one
_INSIDE = 0x80  # a byte inside a character of UTF-8: byte & 0xC0 == _INSIDE


def _ascii_classes() -> bytes:
    classes = bytearray([_OTHER] * 128 + [_UNKNOWN] * 128)
    for byte in range(128):
        if chr(byte).isalpha():
            classes[byte] = _LETTER
        elif chr(byte).isdigit():
            classes[byte] = _NUMBER
    for byte in b"\t\n\v\f\r ":
        classes[byte] = _BLANK
    classes[0] = _END
    return bytes(classes)


_ASCII = _ascii_classes()
# A word begins here whatever stands around, so that a long text may be cut: where the class of the character changes
# and what stands before is no white space. Only characters of which every version of Unicode thinks alike.
_SAFE_CUT = re.compile(
    r"(?<=[^\W\d_]) (?=[^\W\d_])|(?<=[A-Za-z])(?=[\r\n0-9.,;:+/=])|(?<=[0-9])(?=[\r\nA-Za-z.,;:+/=])"
    r"|(?<=[\u4e00-\u9fff\u3041-\u3096\u30a1-\u30fa])(?=[\n，。、；：？！])"
)


class TooLong(ValueError):
    """A text holds a word of more than LONGEST_WORD bytes."""


class Encoder:
    """`encode(texts)` gives the ids of documents, each behind an `<|endoftext|>`, as numpy arrays.

    Args:
        tokenizer: one of `rorchat.load_tokenizer`.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        self.pattern = splitting_pattern(backend)
        self._merger, self._id_of_rank = merger_of(tokenizer, backend["model"]) if self.pattern else (None, None)
        self._classes = np.full(0x110000, _UNKNOWN, dtype=np.uint8)
        self._classes[:128] = np.frombuffer(_ASCII, dtype=np.uint8)[:128]
        self._forget()

    def _forget(self) -> None:
        self._number: dict[bytes, int] = {_NUL: 0}
        self._ids = np.array([self.end_of_text], dtype=self.dtype)  # of all words known, one after the other
        self._starts = np.array([0], dtype=np.int32)
        self._counts = np.array([1], dtype=np.int32)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids (T,) of all texts together, lengths (N,) of each with its `<|endoftext|>`).

        Raises:
            TooLong: one of the texts has a word of more than LONGEST_WORD bytes.
            ValueError: one of the texts has a NUL.
        """
        if not texts:
            return np.empty(0, dtype=self.dtype), np.empty(0, dtype=np.int64)
        if self.pattern is None:
            return self._encode_slowly(texts)
        ids, starts, total = bytearray(), [], 0  # grown in place: joining arrays would hold all ids twice
        for chunk in _chunks(texts):
            chunk_ids, chunk_starts = self._encode_chunk(chunk)
            ids += chunk_ids.data.cast("B")
            starts.append(chunk_starts.astype(np.int64) + total)
            total += len(chunk_ids)
        all_starts = np.concatenate([*starts, [total]])
        if len(all_starts) != len(texts) + 1:
            raise ValueError("a text holds a NUL character")
        return np.frombuffer(ids, dtype=self.dtype), np.diff(all_starts)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, nothing before them: what `encode_text` gives."""
        try:
            ids, lengths = self.encode(texts)
        except ValueError:  # an endless word or a NUL, which the tokenizer can take
            return encode_text(self.tokenizer, list(texts))
        ends = np.cumsum(lengths).tolist()
        flat = ids.tolist()
        return [flat[start + 1 : end] for start, end in zip([0, *ends], ends, strict=False)]

    def _encode_slowly(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = encode_text(self.tokenizer, list(texts))
        flat = [token for ids in encoded for token in (self.end_of_text, *ids)]
        return np.array(flat, dtype=self.dtype), np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)

    def _encode_chunk(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids, where documents begin among them) of texts that each stand behind a NUL."""
        import pyarrow

        data = (text + "\0").encode()
        offsets = self._split(data)  # of the words, and last of the closing NUL
        words = pyarrow.Array.from_buffers(
            pyarrow.binary(), len(offsets) - 1, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(data)]
        ).dictionary_encode()
        distinct = self._numbers(words.dictionary.to_pylist())
        which = words.indices.to_numpy()
        counts = self._counts[distinct][which]
        ends = np.cumsum(counts, dtype=np.int32)
        starts = ends - counts
        shift = self._starts[distinct][which] - starts  # from a word's place in the text to its place among the known
        ids = self._ids[np.arange(ends[-1], dtype=np.int32) + np.repeat(shift, counts)]
        nul = np.flatnonzero(distinct == 0)  # none, where a long text goes on
        return ids, starts[which == nul[0]] if len(nul) else starts[:0]

    def _numbers(self, words: list[bytes]) -> np.ndarray:
        """The number of each word, under which its ids are known."""
        if len(self._number) > WORDS_KEPT:
            self._forget()
        numbers = [self._number.get(word, -1) for word in words]
        new = [word for word, number in zip(words, numbers, strict=True) if number < 0]
        if new:
            longest = max(map(len, new))
            if longest > LONGEST_WORD:
                raise TooLong(f"a word of {longest:,} bytes; the limit is {LONGEST_WORD:,}")
            self._learn(new)
            numbers = [self._number[word] for word in words]
        return np.array(numbers, dtype=np.int32)

    def _learn(self, words: list[bytes]) -> None:
        if self._merger is None:
            encoded = encode_text(self.tokenizer, [word.decode() for word in words])
        else:
            encoded = [self._merger.encode_ordinary(word.decode()) for word in words]
        counts = np.fromiter(map(len, encoded), dtype=np.int32, count=len(encoded))
        flat = np.fromiter(chain.from_iterable(encoded), dtype=np.int64, count=counts.sum())
        flat = (flat if self._merger is None else self._id_of_rank[flat]).astype(self.dtype)
        self._number.update(zip(words, range(len(self._counts), len(self._counts) + len(words)), strict=True))
        begins = len(self._ids) + np.cumsum(counts, dtype=np.int32) - counts
        self._starts = np.concatenate([self._starts, begins])
        self._counts = np.concatenate([self._counts, counts])
        self._ids = np.concatenate([self._ids, flat])

    def _split(self, data: bytes) -> np.ndarray:
        """Where each word of UTF-8 text begins, int32. The text begins and ends with a NUL, as does every document."""
        text = np.frombuffer(data, dtype=np.uint8)
        classes = self._class_of_each_byte(data, text)
        begins = np.empty(len(text), dtype=bool)
        begins[0] = True
        np.not_equal(classes[1:], classes[:-1], out=begins[1:])
        runs = np.flatnonzero(begins)
        kinds = classes[runs]
        one_by_one = (_END, _NUMBER) if self.pattern == SPLIT_PATTERN else (_END,)

        blank = np.flatnonzero(kinds == _BLANK)
        blank = blank[kinds[blank + 1] != _END]  # before the end of a document, white space is one word
        after, kind_after = runs[blank + 1], kinds[blank + 1]
        last = after - 1
        while len(inside := np.flatnonzero((text[last] & 0xC0) == _INSIDE)):
            last[inside] -= 1
        begins[last] = True  # the last blank of several is left for what follows
        joins = text[last] == ord(" ")
        if _NUMBER in one_by_one:
            joins &= kind_after != _NUMBER
        begins[after[joins]] = False

        for kind in one_by_one:
            single = np.flatnonzero(classes == kind)
            begins[single[(text[single] & 0xC0) != _INSIDE]] = True
        self._mark_contractions(text, classes, begins)
        return np.flatnonzero(begins).astype(np.int32)

    @staticmethod
    def _mark_contractions(text: np.ndarray, classes: np.ndarray, begins: np.ndarray) -> None:
        """'s 't 're 've 'm 'll 'd are words where the apostrophe begins one, whatever follows them."""
        at = np.flatnonzero(text == ord("'"))
        at = at[begins[at]]
        at = at[classes[at + 1] == _LETTER]  # so at + 2 is still inside the text, which ends with a NUL
        first, second = text[at + 1], text[at + 2]
        short = np.isin(first, np.frombuffer(b"stmd", dtype=np.uint8))
        long = np.zeros(len(at), dtype=bool)
        for pair in (b"re", b"ve", b"ll"):
            long |= (first == pair[0]) & (second == pair[1])
        begins[at[short | long] + 1] = False
        begins[at[short] + 2] = True
        begins[at[long] + 3] = True

    def _class_of_each_byte(self, data: bytes, text: np.ndarray) -> np.ndarray:
        """_LETTER, _NUMBER, ... for every byte; all bytes of a character have the class of the character."""
        classes = np.frombuffer(bytearray(data.translate(_ASCII)), dtype=np.uint8)
        lead = np.flatnonzero(text >= 0xC0)
        if not len(lead):
            return classes
        length = 2 + (text[lead] >= 0xE0) + (text[lead] >= 0xF0)
        points = text[lead].astype(np.int32) & np.array([0, 0, 0x1F, 0x0F, 0x07])[length]
        for number in range(1, 4):
            longer = length > number
            points[longer] = (points[longer] << 6) | (text[lead[longer] + number] & 0x3F)
        found = self._classes[points]
        if (found == _UNKNOWN).any():
            self._classify(np.unique(points[found == _UNKNOWN]))
            found = self._classes[points]
        classes[lead] = found
        for number in range(1, 4):
            longer = length > number
            classes[lead[longer] + number] = found[longer]
        return classes

    def _classify(self, points: np.ndarray) -> None:
        """Asks the tokenizer's own engine: versions of Unicode differ in what is a letter."""
        from tokenizers import Regex, pre_tokenizers

        self._classes[points] = _OTHER
        text = "".join(map(chr, points))
        for pattern, kind in ((r"\p{L}+", _LETTER), (r"\p{N}+", _NUMBER), (r"\s+", _BLANK)):
            split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
            for characters, _ in split.pre_tokenize_str(text):
                self._classes[[ord(character) for character in characters]] = kind


def _chunks(texts: Sequence[str]):
    """Texts behind NULs, joined to about CHARACTERS_AT_ONCE; a longer text comes in pieces."""
    gathered: list[str] = []
    size = 0
    for text in texts:
        if size and size + len(text) > CHARACTERS_AT_ONCE:
            yield "".join(gathered)
            gathered, size = [], 0
        start = 0
        gathered.append("\0")
        while len(text) - start > 2 * CHARACTERS_AT_ONCE:
            cut = _SAFE_CUT.search(text, start + CHARACTERS_AT_ONCE)
            if cut is None:
                break
            gathered.append(text[start : cut.start()])
            yield "".join(gathered)
            gathered, start = [], cut.start()
        gathered.append(text[start:] if start else text)
        size += len(text) - start
    if gathered:
        yield "".join(gathered)


def splitting_pattern(backend: dict) -> str | None:
    """The pattern by which a tokenizer splits texts into words, if it is one that can be followed here.

    Args:
        backend: what `tokenizer.json` holds.
    """
    model, splitter = backend["model"], backend["pre_tokenizer"] or {}
    plain = (
        backend["normalizer"] is None
        and model["type"] == "BPE"
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and all(token["special"] for token in backend["added_tokens"])
    )
    if not plain:
        return None
    if splitter.get("type") == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"]:
        return GPT2_PATTERN
    if splitter.get("type") != "Sequence" or [part["type"] for part in splitter["pretokenizers"]] != [
        "Split",
        "ByteLevel",
    ]:
        return None
    split, byte_level = splitter["pretokenizers"]
    pattern = split["pattern"].get("Regex")
    follows = split["behavior"] == "Isolated" and not split["invert"] and pattern in (GPT2_PATTERN, SPLIT_PATTERN)
    return pattern if follows and not byte_level["use_regex"] and not byte_level["add_prefix_space"] else None


def merger_of(tokenizer, model: dict):
    """(a `tiktoken` encoding that merges a word as the tokenizer does, the tokenizer's id of each of its ranks).

    Five times the speed of `tokenizers` on a word. tiktoken merges the neighbours whose union has the lowest rank, and
    not the lowest pair of a list of merges. For merges that come of training the two are the same: inside a stretch
    that no merge has crossed, the order of merges is that of the stretch alone, so whenever a union could be formed, it
    is of the two parts of which it was learned. For merges written by hand it need not be so: a thousand words made of
    tokens are compared. (None, None) where they differ, or where a token can be merged in two ways.
    """
    import tiktoken

    unions = [a + b for a, b in (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])]
    characters = _byte_characters()
    spelled = [*characters.values(), *unions]  # in the order of their ranks
    if len(set(spelled)) != len(spelled) or not set(spelled) <= set(model["vocab"]):
        return None, None
    byte_of = {ord(character): byte for byte, character in characters.items()}
    ranks = {token.translate(byte_of).encode("latin-1"): rank for rank, token in enumerate(spelled)}
    merger = tiktoken.Encoding("words", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={})
    id_of_rank = np.array([model["vocab"][token] for token in spelled], dtype=np.int64)
    draw = random.Random(0)
    letters = [token for token in spelled if token.isascii() and token.isalpha()]
    words = ["".join(draw.choices(letters, k=draw.choice((1, 2, 3)))) for _ in range(1000)]
    merged = [id_of_rank[merger.encode_ordinary(word)].tolist() for word in words]
    return (merger, id_of_rank) if merged == encode_text(tokenizer, words) else (None, None)


def _byte_characters() -> dict[int, str]:
    """The character by which a byte-level BPE spells each byte: itself if it is printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
