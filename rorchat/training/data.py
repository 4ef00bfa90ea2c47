"""Rows of sources -> encoded rows of a chat stage, split into training and validation."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from pyarrow.compute import list_value_length

from rorchat.errors import DataError
from rorchat.persona import load_persona
from rorchat.rows import RejectedRow
from rorchat.sources.base import RowStats
from rorchat.sources.registry import load_rows
from rorchat.validation_split import is_validation_text

ROWS_PER_CALL = 1000  # rows given to a call of `encode`, and so to one of the tokenizer
#: By kind of row, the messages whose text decides between training and validation: no prompt is in both.
SPLIT_BY = {"conversation": "messages", "preference": "prompt", "question": "messages"}

Encode = Callable[[list[dict], RowStats], Iterable[dict | RejectedRow]]


class Split(NamedTuple):
    """Encoded rows to train on and to validate on, and for each source how many rows were kept and rejected."""

    train: Dataset
    validation: Dataset
    row_stats: list[RowStats]


def load_split(arguments, kind: str, encode: Encode) -> Split:
    """Reads and encodes the rows of all sources.

    Args:
        arguments: A chat stage's arguments (`sources`, `persona`, `data_seed`, `validation_share`, `rows_per_source`).
        kind: "conversation", "preference" or "question".
        encode: Gives, for each of some rows of a source, the columns of the encoded row or the reason to reject it. A
            row has its `place` in the source, besides the fields of its kind.

    Raises:
        DataError: there are no rows to train on or none to validate on.
        UsageError: a source has no rows of this kind.
    """
    persona = load_persona(arguments.persona)
    train: list[dict] = []
    validation: list[dict] = []
    row_stats = []
    for spec in arguments.sources:
        source = load_rows(spec, kind, seed=arguments.data_seed, persona=persona)
        rows = ({**row, "place": source.place} for row in islice(source, arguments.rows_per_source))
        while batch := [*islice(rows, ROWS_PER_CALL)]:
            for row, encoded in zip(batch, encode(batch, source.stats), strict=True):
                if isinstance(encoded, RejectedRow):
                    source.stats.withdraw(row["place"], encoded)
                    continue
                text = "\n".join(message["content"] for message in row[SPLIT_BY[kind]])
                part = validation if is_validation_text(text, arguments.validation_share) else train
                part.append(encoded)
        row_stats.append(source.stats)
    if not train or not validation:
        raise DataError(
            f"{len(train)} {kind}s to train on and {len(validation)} to validate on, with validation_share "
            f"{arguments.validation_share} of {', '.join(arguments.sources)}: both are needed. Give more data or "
            "another validation_share."
        )
    return Split(Dataset.from_list(train), Dataset.from_list(validation), row_stats)


def row_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """The number of tokens in a column of each row, (R,)."""
    return list_value_length(dataset.with_format("arrow")[:][column]).to_numpy()
