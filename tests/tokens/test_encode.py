"""The fast encoder gives the ids of the tokenizer, for every text."""

import copy
import json
import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from rorchat.chatml import encode_text
from rorchat.tokenizer import SPLIT_PATTERN, train_tokenizer
from rorchat.tokens import encode
from rorchat.tokens.encode import GPT2_PATTERN, MAX_WORD_BYTES, Encoder, WordTooLongError

# Everything the splitting patterns distinguish: contractions, white space, numbers, marks, emoji, control strings
PIECES = (
    """'s 't 're 've 'm 'll 'd 'S ' '' "' a don l e é ß 你 好 1 23 ½ ٣ ² Ⅷ 🙂 👩‍🔬 ... ! _ $ ’s ’ ſ ʼ 'lol 'r 'v
<|endoftext|> <|im_end|> <| x'llama 𝔘 Ａ ́ ﻿ ​""".split()
    + list(" \n\t\x0b\x0c\r\x85\u00a0\u2003\u2028\u3000\x1c")
    + ["  ", "\r\n"]
)


def random_text(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.7:
        return "".join(rng.choices(PIECES, k=rng.randint(1, 30)))
    if kind < 0.85:
        return "".join(chr(rng.randint(1, 127)) for _ in range(rng.randint(1, 200)))
    ranges = ((1, 0x2FF), (0x300, 0x3000), (0x3000, 0xD7FF), (0xE000, 0x10FFFF))
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 40)))


def encoded(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    """The ids of each text without the leading <|endoftext|>."""
    ids, lengths = encoder.encode(texts)
    assert lengths.sum() == len(ids) and len(lengths) == len(texts)
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    assert all(document[0] == encoder.end_of_text for document in documents)
    return [document[1:].tolist() for document in documents]


@pytest.fixture(params=["ours", "gpt2"])
def any_tokenizer(request, tokenizer):
    return tokenizer if request.param == "ours" else request.getfixturevalue("gpt2_tokenizer")


def test_the_ids_of_random_texts_are_those_of_the_tokenizer(any_tokenizer):
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(8000)]
    encoder = Encoder(any_tokenizer)
    assert encoder.pattern in (GPT2_PATTERN, SPLIT_PATTERN)
    for text, fast, slow in zip(texts, encoded(encoder, texts), encode_text(any_tokenizer, texts), strict=True):
        assert fast == slow, repr(text)


def test_characters_are_classified_as_by_the_tokenizer(any_tokenizer):
    points = [*range(1, 0x3100), *range(0xA000, 0xAC00, 3), *range(0xF900, 0x12000, 5), *range(0x12000, 0x110000, 997)]
    texts = [f"a{c}b {c} 1{c} {c}'s\n{c}" for c in map(chr, points)]
    assert encoded(Encoder(any_tokenizer), texts) == encode_text(any_tokenizer, texts)


def test_real_prose_has_the_same_ids_in_pieces_of_any_size(gpt2_tokenizer, shared_data, monkeypatch):
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:200_000]
    (expected,) = encode_text(gpt2_tokenizer, [text])
    for characters in (1000, 30_000, 2**20):
        monkeypatch.setattr(encode, "CHUNK_CHARACTERS", characters)
        assert encoded(Encoder(gpt2_tokenizer), ["before", text, text[:50], text]) == [
            *encode_text(gpt2_tokenizer, ["before"]), expected, *encode_text(gpt2_tokenizer, [text[:50]]), expected,
        ]  # fmt: skip


def test_clearing_the_word_cache_keeps_the_ids(tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "MAX_CACHED_WORDS", 50)
    encoder = Encoder(tokenizer)
    for start in range(0, 300, 20):
        texts = [f"word{n} and number {n}" for n in range(start, start + 20)]
        assert encoded(encoder, texts) == encode_text(tokenizer, texts)
        assert len(encoder._number) < 200


def test_another_splitting_pattern_is_left_to_the_tokenizer(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|[^\p{L}]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder = Encoder(other)
    assert encoder.pattern is None
    texts = ["It's 12 o'clock  now", "a\n\nb"]
    assert encoded(encoder, texts) == encode_text(other, texts) != encode_text(tokenizer, texts)


def test_hand_written_merges_are_left_to_the_tokenizer(tokenizer):
    """With the merge `b c` before `a b`, BPE never reaches `ab c`, but tiktoken would merge `a bc` to `abc`."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {token: number for token, number in backend["model"]["vocab"].items() if number < 16 + 256}
    merges = [["b", "c"], ["a", "b"], ["ab", "c"]]
    backend["model"]["vocab"] = vocabulary | {"".join(merge): 272 + at for at, merge in enumerate(merges)}
    backend["model"]["merges"] = merges
    other = copy.deepcopy(tokenizer)
    other._tokenizer = Tokenizer.from_str(json.dumps(backend))
    encoder = Encoder(other)
    assert encoder._merger is None and Encoder(tokenizer)._merger is not None
    texts = ["abc cab ab", "xabcx"]
    assert encoded(encoder, texts) == encode_text(other, texts)


def test_overlong_words_and_nul_are_refused(tokenizer):
    encoder = Encoder(tokenizer)
    with pytest.raises(
        WordTooLongError, match=f"a word of {MAX_WORD_BYTES + 5:,} bytes; the limit is {MAX_WORD_BYTES:,}"
    ):
        encoder.encode(["fine", "x" * (MAX_WORD_BYTES + 5)])
    with pytest.raises(ValueError, match="NUL"):
        encoder.encode(["fine", "not\0fine"])
    assert encoded(encoder, ["fine"]) == encode_text(tokenizer, ["fine"])


def test_no_texts_give_no_ids(tokenizer):
    ids, lengths = Encoder(tokenizer).encode([])
    assert (len(ids), len(lengths)) == (0, 0)


def test_a_trained_tokenizer_gives_the_same_ids_on_other_text(shared_data):
    lines = (shared_data / "tinyshakespeare" / "input.txt").read_text().split("\n\n")
    trained = train_tokenizer(lines[:3000], vocab_size=2048)
    assert encoded(Encoder(trained), lines[3000:]) == encode_text(trained, lines[3000:])


def test_encode_texts_equals_the_tokenizer_for_any_text(any_tokenizer):
    rng = random.Random(2)
    texts = [random_text(rng) for _ in range(300)] + ["", "\n", "a\0b", "x" * (MAX_WORD_BYTES + 1)]
    encoder = Encoder(any_tokenizer)
    assert encoder.encode_texts(texts[:-2]) == encode_text(any_tokenizer, texts[:-2])
    assert encoder.encode_texts(texts) == encode_text(any_tokenizer, texts)
