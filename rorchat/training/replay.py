"""Replay: documents of pretraining among the rows of a later stage, so that the model forgets less of them.

A few per cent of the tokens prevent most of the loss (Ibrahim et al. 2024, arXiv:2403.08763, on continued pretraining).
The seed determines which documents are replayed; documents of the validation split never are.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rorchat.chatml import END_OF_TEXT, IGNORE_INDEX, encode_text
from rorchat.errors import DataError, UsageError
from rorchat.sources.registry import load_rows
from rorchat.tokens.store import open_store, store_folder
from rorchat.validation_split import is_validation_text

DOCUMENTS_PER_CALL = 200  # of the tokenizer


def replay_rows(
    source: str, tokenizer, tokens: int, max_length: int, seed: int, validation_share: float
) -> list[dict[str, list[int]]]:
    """Training documents as rows `input_ids` (T,) and `labels` (T,) of at most `max_length` tokens.

    A row is `<|endoftext|>` and the text of a document, closed by another `<|endoftext|>` where the document ends. A
    document longer than a row continues in the next one. Every token is a target except the first (-100): nothing
    precedes it in its row, and when rows are packed the preceding token belongs to another row.

    Args:
        source: Folder of a token store, whose documents come in random order, or the spec of a source, whose documents
            come in their order.
        tokens: Total length of all rows. The last row is cut so that this is reached exactly or missed by one.
        seed: Of the order of a store's documents, and of a generated source.
        validation_share: Share of a source's documents that belong to its validation split; a store records its own.

    Raises:
        UsageError: the source has no documents, or `tokens` or `max_length` is less than 2.
        DataError: there are fewer tokens than requested.
        MismatchError: the store was made with another tokenizer.
    """
    for name, value in (("tokens", tokens), ("max_length", max_length)):
        if value < 2:
            raise UsageError(f"replay: {name} is {value}: a row needs at least 2 tokens.")
    if folder := store_folder(source):
        documents = _read_store(folder, tokenizer, seed)
    else:
        documents = _read_source(source, tokenizer, seed, validation_share)
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    rows, left = [], tokens
    for ids in documents:
        for row in _split_into_rows(ids, end_of_text, max_length):
            rows.append({"input_ids": row[:left], "labels": [IGNORE_INDEX, *row[1:left]]})
            left -= len(row)
            if left < 2:  # a row of one token has no target
                return rows
    raise DataError(
        f"{source} has {tokens - left:,} training tokens, but {tokens:,} are to be replayed: give more text or a "
        "smaller replay_share."
    )


def _split_into_rows(ids: list[int], end_of_text: int, max_length: int) -> Iterator[list[int]]:
    closed = [*ids, end_of_text]
    for start in range(0, len(closed), max_length - 1):
        yield [end_of_text, *closed[start : start + max_length - 1]]


def _read_store(folder: Path, tokenizer, seed: int) -> Iterator[list[int]]:
    """Training documents of a store in random order, without their `<|endoftext|>`."""
    store = open_store(folder, tokenizer)
    if store.manifest.kind != "document":
        raise UsageError(
            f"{folder} holds {store.manifest.kind}s, but only documents can be replayed: give a store of documents."
        )
    starts = store.documents("train")
    for number in np.random.default_rng(seed).permutation(len(starts) - 1):
        yield store.slice("train", int(starts[number]) + 1, int(starts[number + 1])).tolist()


def _read_source(spec: str, tokenizer, seed: int, validation_share: float) -> Iterator[list[int]]:
    """Training documents of a source, in order."""
    texts: list[str] = []
    rows = load_rows(spec, "document", seed=seed)
    if (unread := rows.stats.describe_unread()) and os.environ.get("RANK", "0") == "0":
        print(f"replay of {spec}: {unread}", file=sys.stderr)  # noqa: T201
    for row in rows:
        if is_validation_text(row["text"], validation_share):
            continue
        texts.append(row["text"])
        if len(texts) == DOCUMENTS_PER_CALL:
            yield from encode_text(tokenizer, texts)
            texts = []
    if texts:
        yield from encode_text(tokenizer, texts)
