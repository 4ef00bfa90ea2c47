"""Trial tokenizers."""

import random

from rorchat.project.vocabulary import measure_bytes_per_token, try_vocabularies


def make_text(words, count):
    generator = random.Random(0)
    vocabulary = ["".join(generator.choices("abcdefghijklmnop", k=6)) for _ in range(words)]
    return " ".join(generator.choices(vocabulary, k=count))


def test_larger_vocabularies_have_more_bytes_per_token():
    tried = try_vocabularies(make_text(2000, 28_000), "A word again, again and again. " * 200, is_all=True)
    assert [vocabulary.size for vocabulary in tried] == [512, 1024]
    assert tried[0].bytes_per_token < tried[1].bytes_per_token
    assert all(vocabulary.chat_bytes_per_token > vocabulary.bytes_per_token for vocabulary in tried)


def test_of_a_sample_the_tokens_of_unseen_text_are_counted():
    seen, unseen = "A very short text. " * 200, make_text(300, 60)
    (whole,) = try_vocabularies(seen, seen, is_all=True)
    assert whole.bytes_per_token > 3.5
    (sample,) = try_vocabularies(seen + unseen, seen + unseen, is_all=False)
    assert sample.bytes_per_token < 3


def test_a_short_text_gets_the_smallest_vocabulary():
    text = "A very short text. " * 20
    assert [vocabulary.size for vocabulary in try_vocabularies(text, text, is_all=True)] == [512]


def test_bytes_per_token_counts_bytes(tokenizer):
    assert measure_bytes_per_token(tokenizer, "\u00e9" * 10) == 20 / len(tokenizer.encode("\u00e9" * 10))
