"""Replay: documents of pretraining as rows among what a later stage learns, so that it forgets less of them.

A few per cent of them keep most of what is lost without (Ibrahim et al. 2024, arXiv:2403.08763, of continued
pretraining). Which documents come is a function of the seed; those that are held out never come.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rorchat.chatml import END_OF_TEXT, IGNORE_INDEX, encode_text
from rorchat.errors import DataError, UsageError
from rorchat.sources.base import is_validation_text
from rorchat.sources.registry import load_rows
from rorchat.tokens.store import open_store, store_folder

DOCUMENTS_AT_ONCE = 200  # a call of the tokenizer


def replay_rows(
    source: str, tokenizer, tokens: int, max_length: int, seed: int, validation_share: float
) -> list[dict[str, list[int]]]:
    """Training documents as rows `input_ids` (T,) and `labels` (T,), T at most `max_length`.

    A row is `<|endoftext|>`, the words, and `<|endoftext|>` again where the document ends in it; what is longer than a
    row goes on in the next one, behind an `<|endoftext|>` of its own. All of it is target but the first id (-100):
    nothing in the row stands before it, and where rows are packed, what does is another's.

    Args:
        source: the folder of a token store, of which random documents come; or a source's spec, of which the first.
        tokens: ids of all rows together: the last row is cut, so that there are as many, or one fewer.
        seed: which documents of a store, in which order; and of a generated source.
        validation_share: of a source's documents, those which this share holds out are left out; a store knows its own.

    Raises:
        UsageError: the source gives no documents, or `tokens` or `max_length` has no room for a word.
        DataError: there are not so many tokens to train on.
        MismatchError: the store was made with another tokenizer.
    """
    for name, value in (("tokens", tokens), ("max_length", max_length)):
        if value < 2:
            raise UsageError(f"replay: {name} is {value}: a row needs at least 2 tokens.")
    if folder := store_folder(source):
        documents = _of_store(folder, tokenizer, seed)
    else:
        documents = _of_source(source, tokenizer, seed, validation_share)
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    rows, left = [], tokens
    for words in documents:
        for row in _rows_of(words, end_of_text, max_length):
            rows.append({"input_ids": row[:left], "labels": [IGNORE_INDEX, *row[1:left]]})
            left -= len(row)
            if left < 2:  # a row of one id has no target
                return rows
    raise DataError(
        f"{source} has {tokens - left:,} tokens of documents to train on, and {tokens:,} are to be replayed: give more "
        "text or a smaller share."
    )


def _rows_of(words: list[int], end_of_text: int, max_length: int) -> Iterator[list[int]]:
    """A document's ids, closed by an `<|endoftext|>`, in rows that each begin with one."""
    closed = [*words, end_of_text]
    for start in range(0, len(closed), max_length - 1):
        yield [end_of_text, *closed[start : start + max_length - 1]]


def _of_store(folder: Path, tokenizer, seed: int) -> Iterator[list[int]]:
    """The training documents of a store in random order, without their `<|endoftext|>`."""
    store = open_store(folder, tokenizer)
    if store.manifest.kind != "document":
        raise UsageError(f"{folder} holds {store.manifest.kind}s: replay is of documents, name a store of those.")
    starts = store.documents("train")
    for number in np.random.default_rng(seed).permutation(len(starts) - 1):
        yield store.slice("train", int(starts[number]) + 1, int(starts[number + 1])).tolist()


def _of_source(spec: str, tokenizer, seed: int, validation_share: float) -> Iterator[list[int]]:
    """The training documents of a source in its own order."""
    texts: list[str] = []
    for row in load_rows(spec, "document", seed=seed):
        if is_validation_text(row["text"], validation_share):
            continue
        texts.append(row["text"])
        if len(texts) == DOCUMENTS_AT_ONCE:
            yield from encode_text(tokenizer, texts)
            texts = []
    if texts:
        yield from encode_text(tokenizer, texts)
