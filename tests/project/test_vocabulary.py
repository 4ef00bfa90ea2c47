"""Trial tokenizers."""

import random

from rorchat.project.vocabulary import Sample, measure_bytes_per_token, try_vocabularies


def make_text(words, count):
    generator = random.Random(0)
    vocabulary = ["".join(generator.choices("abcdefghijklmnop", k=6)) for _ in range(words)]
    return " ".join(generator.choices(vocabulary, k=count))


def sample(text, is_all=True):
    return Sample(text, len(text), is_all)


def test_larger_vocabularies_have_more_bytes_per_token():
    tried = try_vocabularies(sample(make_text(2000, 28_000)), sample("A word again, again and again. " * 200))
    assert [vocabulary.size for vocabulary in tried] == [512, 1024]
    assert tried[0].bytes_per_token < tried[1].bytes_per_token
    assert all(vocabulary.chat_bytes_per_token > vocabulary.bytes_per_token for vocabulary in tried)


def test_of_a_sample_the_tokens_of_unseen_text_are_counted():
    seen, unseen = "A very short text. " * 200, make_text(300, 60)
    (whole,) = try_vocabularies(sample(seen), sample(seen))
    assert whole.bytes_per_token > 3.5
    part = sample(seen + unseen, is_all=False)
    assert try_vocabularies(part, part)[0].bytes_per_token < 3


def test_a_short_text_gets_the_smallest_vocabulary():
    text = sample("A very short text. " * 20)
    assert [vocabulary.size for vocabulary in try_vocabularies(text, text)] == [512]


def test_a_vocabulary_that_gains_nothing_is_not_taken():
    """Two hundred words fit into a thousand tokens, however much text there is."""
    documents = Sample(make_text(200, 4000), 10**9, is_all=True)
    assert [vocabulary.size for vocabulary in try_vocabularies(documents, sample("Yes, it is. " * 9))] == [512, 1024]


def test_few_chats_beside_much_text_are_still_measured():
    """Training follows the sizes; the tokens of chats are counted in all of them."""
    documents = Sample(make_text(300, 400), 10**12, is_all=False)
    vocabulary, *_ = try_vocabularies(documents, sample("So it is, said the cat to the dog. " * 50))
    assert 1 <= vocabulary.chat_bytes_per_token < 3  # hardly any chat is in the tokenizer's training text


def test_bytes_per_token_counts_bytes(tokenizer):
    assert measure_bytes_per_token(tokenizer, "\u00e9" * 10) == 20 / len(tokenizer.encode("\u00e9" * 10))
