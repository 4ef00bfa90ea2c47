"""Fast encoding of documents: every distinct word is encoded only once.

A byte-level BPE first splits a text into words and then merges the bytes within each word. Most words are repeated (a
book of 170,000 words has about 10,000 different ones). Once the ids of each word are cached, splitting takes most of
the time, so it is done in numpy on about a million characters at once:

1. Every byte gets the class of its character: letter, number, white space, other.
2. A word starts where the class changes. The exceptions of the pattern (the space before a word, contractions, the last
   of several spaces) move a few of these starts.
3. Arrow replaces the words by numbers. Words that were not seen before are encoded by the tokenizer.
4. The ids of all words are gathered from a table.

The ids equal those of the tokenizer for every text. Two splitting patterns are supported, GPT-2's and rorchat's. With
any other pattern the tokenizer does all the work.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from rorchat.chatml import END_OF_TEXT, encode_text
from rorchat.tokenizer import SPLIT_PATTERN, byte_characters

CHUNK_CHARACTERS = 2**20  # the arrays of a chunk fit into the CPU cache
MAX_WORD_BYTES = 2**16  # merging takes more than linear time in the length of a word
MAX_CACHED_WORDS = 2_000_000  # the cache is cleared beyond this size, to bound memory

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_LETTER, _NUMBER, _OTHER, _BLANK, _END, _UNKNOWN = 1, 2, 3, 4, 5, 255
_NUL = b"\0"  # precedes every document and becomes <|endoftext|>; documents cannot contain it
_CONTINUATION = 0x80  # a UTF-8 continuation byte: byte & 0xC0 == _CONTINUATION


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
# Positions at which a long text can be cut, because a word starts there in any context: the character class changes,
# and the preceding character is not white space. Limited to characters with the same class in all Unicode versions.
_SAFE_CUT = re.compile(
    r"(?<=[^\W\d_]) (?=[^\W\d_])|(?<=[A-Za-z])(?=[\r\n0-9.,;:+/=])|(?<=[0-9])(?=[\r\nA-Za-z.,;:+/=])"
    r"|(?<=[\u4e00-\u9fff\u3041-\u3096\u30a1-\u30fa])(?=[\n，。、；：？！])"
)


class WordTooLongError(ValueError):
    """A text contains a word of more than MAX_WORD_BYTES bytes."""


class Encoder:
    """Encodes documents into numpy arrays of ids, with an `<|endoftext|>` before each document.

    Args:
        tokenizer: from `rorchat.load_tokenizer`.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        self.pattern = splitting_pattern(backend)
        self._merger: Any
        self._id_of_rank: Any
        self._merger, self._id_of_rank = build_merger(tokenizer, backend["model"]) if self.pattern else (None, None)
        self._classes = np.full(0x110000, _UNKNOWN, dtype=np.uint8)
        self._classes[:128] = np.frombuffer(_ASCII, dtype=np.uint8)[:128]
        self._clear_cache()

    def _clear_cache(self) -> None:
        self._number: dict[bytes, int] = {_NUL: 0}
        self._ids = np.array([self.end_of_text], dtype=self.dtype)  # the ids of all cached words, concatenated
        self._starts = np.array([0], dtype=np.int32)
        self._counts = np.array([1], dtype=np.int32)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes N texts.

        Returns:
            (ids (T,) of all texts, number of ids (N,) of each text, including its `<|endoftext|>`).

        Raises:
            WordTooLongError: a text contains a word of more than MAX_WORD_BYTES bytes.
            ValueError: a text contains a NUL character.
        """
        if not texts:
            return np.empty(0, dtype=self.dtype), np.empty(0, dtype=np.int64)
        if self.pattern is None:
            return self._encode_with_tokenizer(texts)
        ids, starts, total = bytearray(), [], 0  # grown in place: concatenating arrays needs twice the memory
        for chunk in _chunks(texts):
            chunk_ids, chunk_starts = self._encode_chunk(chunk)
            ids += chunk_ids.data.cast("B")
            starts.append(chunk_starts.astype(np.int64) + total)
            total += len(chunk_ids)
        all_starts = np.concatenate([*starts, [total]])
        if len(all_starts) != len(texts) + 1:
            raise ValueError("a text contains a NUL character")
        return np.frombuffer(ids, dtype=self.dtype), np.diff(all_starts)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text without `<|endoftext|>`, equal to those of `rorchat.chatml.encode_text`."""
        try:
            ids, lengths = self.encode(texts)
        except ValueError:  # an overlong word or a NUL: the tokenizer accepts both
            return encode_text(self.tokenizer, list(texts))
        ends = np.cumsum(lengths).tolist()
        flat = ids.tolist()
        return [flat[start + 1 : end] for start, end in zip([0, *ends], ends, strict=False)]

    def _encode_with_tokenizer(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = encode_text(self.tokenizer, list(texts))
        flat = [token for ids in encoded for token in (self.end_of_text, *ids)]
        return np.array(flat, dtype=self.dtype), np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)

    def _encode_chunk(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids, offsets at which documents start) of text in which a NUL precedes every document."""
        import pyarrow

        data = (text + "\0").encode()
        offsets = self._split(data)  # (W + 1,) starts of the words, then of the final NUL
        words = pyarrow.Array.from_buffers(
            pyarrow.binary(), len(offsets) - 1, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(data)]
        ).dictionary_encode()
        distinct = self._look_up(words.dictionary.to_pylist())  # (D,) cache numbers of the distinct words
        index = words.indices.to_numpy()  # (W,) -> D
        counts = self._counts[distinct][index]  # (W,) ids per word
        ends = np.cumsum(counts, dtype=np.int32)
        starts = ends - counts
        shift = self._starts[distinct][index] - starts  # from the position in the output to the position in the cache
        ids = self._ids[np.arange(ends[-1], dtype=np.int32) + np.repeat(shift, counts)]  # (T,)
        nul = np.flatnonzero(distinct == 0)  # empty if the chunk continues a long text
        return ids, starts[index == nul[0]] if len(nul) else starts[:0]

    def _look_up(self, words: list[bytes]) -> np.ndarray:
        """The cache number of each word. New words are encoded and added to the cache."""
        if len(self._number) > MAX_CACHED_WORDS:
            self._clear_cache()
        numbers = [self._number.get(word, -1) for word in words]
        new = [word for word, number in zip(words, numbers, strict=True) if number < 0]
        if new:
            longest = max(map(len, new))
            if longest > MAX_WORD_BYTES:
                raise WordTooLongError(f"a word of {longest:,} bytes; the limit is {MAX_WORD_BYTES:,}")
            self._add_to_cache(new)
            numbers = [self._number[word] for word in words]
        return np.array(numbers, dtype=np.int32)

    def _add_to_cache(self, words: list[bytes]) -> None:
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
        """The offset of each word in UTF-8 text, int32. The text starts and ends with a NUL."""
        text = np.frombuffer(data, dtype=np.uint8)
        classes = self._classify_bytes(data, text)
        begins = np.empty(len(text), dtype=bool)
        begins[0] = True
        np.not_equal(classes[1:], classes[:-1], out=begins[1:])
        runs = np.flatnonzero(begins)
        kinds = classes[runs]
        single_kinds = (_END, _NUMBER) if self.pattern == SPLIT_PATTERN else (_END,)

        # The last character of a run of white space belongs to the word that follows
        blank = np.flatnonzero(kinds == _BLANK)
        blank = blank[kinds[blank + 1] != _END]  # at the end of a document, white space is one word
        after, kind_after = runs[blank + 1], kinds[blank + 1]
        last = after - 1
        while len(inside := np.flatnonzero((text[last] & 0xC0) == _CONTINUATION)):
            last[inside] -= 1
        begins[last] = True
        joins = text[last] == ord(" ")  # only a space joins the word; other white space is a separate word
        if _NUMBER in single_kinds:
            joins &= kind_after != _NUMBER
        begins[after[joins]] = False

        for kind in single_kinds:
            single = np.flatnonzero(classes == kind)
            begins[single[(text[single] & 0xC0) != _CONTINUATION]] = True
        self._mark_contractions(text, classes, begins)
        return np.flatnonzero(begins).astype(np.int32)

    @staticmethod
    def _mark_contractions(text: np.ndarray, classes: np.ndarray, begins: np.ndarray) -> None:
        """Makes 's 't 're 've 'm 'll 'd separate words if the apostrophe starts a word."""
        at = np.flatnonzero(text == ord("'"))
        at = at[begins[at]]
        at = at[classes[at + 1] == _LETTER]  # at + 2 is in range because the text ends with a NUL
        first, second = text[at + 1], text[at + 2]
        short = np.isin(first, np.frombuffer(b"stmd", dtype=np.uint8))
        long = np.zeros(len(at), dtype=bool)
        for pair in (b"re", b"ve", b"ll"):
            long |= (first == pair[0]) & (second == pair[1])
        begins[at[short | long] + 1] = False
        begins[at[short] + 2] = True
        begins[at[long] + 3] = True

    def _classify_bytes(self, data: bytes, text: np.ndarray) -> np.ndarray:
        """The class of the character that each byte belongs to: _LETTER, _NUMBER, ..."""
        classes = np.frombuffer(bytearray(data.translate(_ASCII)), dtype=np.uint8)
        lead = np.flatnonzero(text >= 0xC0)
        if not len(lead):
            return classes
        # Decode the characters beyond ASCII to code points, look up their classes, and copy these to all their bytes
        length = 2 + (text[lead] >= 0xE0) + (text[lead] >= 0xF0)
        points = text[lead].astype(np.int32) & np.array([0, 0, 0x1F, 0x0F, 0x07])[length]
        for number in range(1, 4):
            longer = length > number
            points[longer] = (points[longer] << 6) | (text[lead[longer] + number] & 0x3F)
        kinds = self._classes[points]
        if (kinds == _UNKNOWN).any():
            self._classify_characters(np.unique(points[kinds == _UNKNOWN]))
            kinds = self._classes[points]
        classes[lead] = kinds
        for number in range(1, 4):
            longer = length > number
            classes[lead[longer] + number] = kinds[longer]
        return classes

    def _classify_characters(self, points: np.ndarray) -> None:
        """Classifies characters by the regex engine of `tokenizers`, because versions of Unicode differ."""
        from tokenizers import Regex, pre_tokenizers

        self._classes[points] = _OTHER
        text = "".join(map(chr, points))
        for pattern, kind in ((r"\p{L}+", _LETTER), (r"\p{N}+", _NUMBER), (r"\s+", _BLANK)):
            split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
            for characters, _ in split.pre_tokenize_str(text):
                self._classes[[ord(character) for character in characters]] = kind


def _chunks(texts: Sequence[str]) -> Iterator[str]:
    """Joins texts, with a NUL before each, into chunks of about CHUNK_CHARACTERS. A longer text is split."""
    gathered: list[str] = []
    size = 0
    for text in texts:
        if size and size + len(text) > CHUNK_CHARACTERS:
            yield "".join(gathered)
            gathered, size = [], 0
        start = 0
        gathered.append("\0")
        while len(text) - start > 2 * CHUNK_CHARACTERS:
            cut = _SAFE_CUT.search(text, start + CHUNK_CHARACTERS)
            if cut is None:
                break
            gathered.append(text[start : cut.start()])
            yield "".join(gathered)
            gathered, start = [], cut.start()
        gathered.append(text[start:] if start else text)
        size += len(text) - start
    if gathered:
        yield "".join(gathered)


def word_lengths(text: str) -> Iterator[int]:
    """The bytes of each word of a text, split by GPT-2's pattern: no word of SPLIT_PATTERN is longer."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated")
    for chunk in _chunks([text]):
        yield from (len(word.encode()) for word, _ in split.pre_tokenize_str(chunk.removeprefix("\0")))


def splitting_pattern(backend: dict) -> str | None:
    """The pattern by which a tokenizer splits texts into words; None if it is not supported here.

    Args:
        backend: the content of `tokenizer.json`.
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
    parts = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else []
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = parts
    pattern = split["pattern"].get("Regex")
    supported = split["behavior"] == "Isolated" and not split["invert"] and pattern in (GPT2_PATTERN, SPLIT_PATTERN)
    return pattern if supported and not byte_level["use_regex"] and not byte_level["add_prefix_space"] else None


def build_merger(tokenizer, model: dict):
    """Builds a tiktoken encoding that merges the bytes of a word as the tokenizer does.

    tiktoken encodes a word five times as fast as `tokenizers`. It identifies a merge by its result: of all adjacent
    pairs, it merges the one whose concatenation has the lowest rank. A BPE identifies a merge by its two parts. Both
    give the same result for merges learned by BPE training, where every token is always formed from the two parts that
    it was learned from. They can differ for hand-written merges, so a thousand words are compared.

    Returns:
        (encoding, the tokenizer's id for each rank), or (None, None) if the words are encoded differently or a token
        can be formed by two merges.
    """
    import tiktoken

    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
    characters = byte_characters()
    tokens = [*characters.values(), *(a + b for a, b in pairs)]  # sorted by rank
    if len(set(tokens)) != len(tokens) or not set(tokens) <= set(model["vocab"]):
        return None, None
    byte_of = {ord(character): byte for byte, character in characters.items()}
    ranks = {token.translate(byte_of).encode("latin-1"): rank for rank, token in enumerate(tokens)}
    merger = tiktoken.Encoding("words", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={})
    id_of_rank = np.array([model["vocab"][token] for token in tokens], dtype=np.int64)
    rng = random.Random(0)
    letters = [token for token in tokens if token.isascii() and token.isalpha()]
    words = ["".join(rng.choices(letters, k=rng.choice((1, 2, 3)))) for _ in range(1000)]
    merged = [id_of_rank[merger.encode_ordinary(word)].tolist() for word in words]
    return (merger, id_of_rank) if merged == encode_text(tokenizer, words) else (None, None)
