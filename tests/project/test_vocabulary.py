"""Trial tokenizers."""

import random

from rorchat.project.vocabulary import measure_bytes_per_token, try_vocabularies


def test_larger_vocabularies_have_more_bytes_per_token():
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=6)) for _ in range(2000)]
    tried = try_vocabularies(" ".join(generator.choices(words, k=28_000)))
    assert [vocabulary.size for vocabulary in tried] == [512, 1024]
    assert tried[0].bytes_per_token < tried[1].bytes_per_token


def test_a_short_text_gets_the_smallest_vocabulary():
    assert [vocabulary.size for vocabulary in try_vocabularies("A very short text. " * 20)] == [512]


def test_bytes_per_token_counts_bytes(tokenizer):
    assert measure_bytes_per_token(tokenizer, "\u00e9" * 10) == 20 / len(tokenizer.encode("\u00e9" * 10))
