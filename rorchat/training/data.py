"""Rows of sources -> encoded rows of a chat stage, split into training and validation."""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, islice
from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from pyarrow.compute import list_value_length

from rorchat.errors import DataError
from rorchat.mixture.dataset import choose_evenly, limit_share
from rorchat.mixture.mixture_file import name_sources
from rorchat.persona import load_persona
from rorchat.rows import RejectedRow
from rorchat.sources.base import RowStats
from rorchat.sources.registry import load_rows, require_kept_rows
from rorchat.validation_split import (
    choose_for_empty_split,
    describe_moved,
    hash_order,
    is_validation_digest,
    text_digest,
)

ROWS_PER_CALL = 1000  # rows given to a call of `encode`, and so to one of the tokenizer
#: By kind of row, the messages whose text decides between training and validation: no prompt is in both.
SPLIT_BY = {"conversation": "messages", "preference": "prompt", "question": "messages"}


Encode = Callable[[list[dict], RowStats], Iterable[dict | RejectedRow]]


class _Row(NamedTuple):
    encoded: dict
    place: str
    order: int  # `hash_order` of the text that decides the split
    is_validation: bool
    source: int  # the position of its source


class Split(NamedTuple):
    """Encoded rows to train on and to validate on, and for each source how many rows were kept and rejected.

    Attributes:
        validation: the rows in the order of the sources, or {name of a source: its rows}.
        validation_rows: number of rows of each source in the validation split.
    """

    train: Dataset
    validation: Dataset | dict[str, Dataset]
    row_stats: list[RowStats]
    validation_rows: list[int]

    def all_validation(self) -> Dataset:
        """The rows of all sources."""
        parts = self.validation
        return concatenate_datasets(list(parts.values())) if isinstance(parts, dict) else parts

    def summary(self) -> list[dict[str, object]]:
        """What run.json records about each source."""
        rows = zip(self.row_stats, self.validation_rows, strict=True)
        return [stats.summary() | {"validation": count} for stats, count in rows]


def load_split(arguments, kind: str, encode: Encode) -> Split:
    """Reads and encodes the rows of all sources.

    If all rows are in one split, those with one text are moved to the other (`choose_for_empty_split`).

    Args:
        arguments: A chat stage's arguments (`sources`, `persona`, `data_seed`, `validation_share`, `rows_per_source`).
        kind: "conversation", "preference" or "question".
        encode: Gives, for each of some rows of a source, the columns of the encoded row or the reason to reject it. A
            row has its `place` in the source, besides the fields of its kind.

    Raises:
        DataError: there are no rows, or the text that decides the split is the same in all of them.
        UsageError: a source has no rows of this kind.
    """
    persona = load_persona(arguments.persona)
    rows: list[_Row] = []
    row_stats: list[RowStats] = []
    for spec in arguments.sources:
        source = load_rows(spec, kind, seed=arguments.data_seed, persona=persona)
        raw = ({**row, "place": source.place} for row in islice(source, arguments.rows_per_source))
        while batch := [*islice(raw, ROWS_PER_CALL)]:
            for row, encoded in zip(batch, encode(batch, source.stats), strict=True):
                if isinstance(encoded, RejectedRow):
                    source.stats.withdraw(row["place"], encoded)
                    continue
                text = "\n".join(message["content"] for message in row[SPLIT_BY[kind]])
                digest = text_digest(text)
                is_validation = is_validation_digest(digest, arguments.validation_share)
                rows.append(_Row(encoded, row["place"], hash_order(digest), is_validation, len(row_stats)))
        require_kept_rows(source.stats, _advise(source.stats))
        row_stats.append(source.stats)
    moved = _move_rows(rows, kind, arguments, row_stats)
    in_validation = [row.is_validation != (row.order == moved) for row in rows]
    train = [row.encoded for row, held_out in zip(rows, in_validation, strict=True) if not held_out]
    validation = [row.encoded for row, held_out in zip(rows, in_validation, strict=True) if held_out]
    sources = [row.source for row, held_out in zip(rows, in_validation, strict=True) if held_out]
    counts = [sources.count(number) for number in range(len(row_stats))]
    return Split(Dataset.from_list(train), Dataset.from_list(validation), row_stats, counts)


def limit_split(split: Split, columns: Sequence[str], max_tokens: int, reply_tokens: int = 0) -> tuple[Split, float]:
    """The split with the same share of each source's validation rows, evenly spaced, and that share.

    Args:
        columns: those whose tokens an evaluation reads.
        max_tokens: of all validation rows together, about; 0 for no limit.
        reply_tokens: tokens that an evaluation generates for each row.
    """
    rows = split.all_validation()
    tokens = sum(int(row_lengths(rows, column).sum()) for column in columns) + reply_tokens * len(rows)
    share = limit_share(tokens, max_tokens)

    def limit(rows: Dataset) -> Dataset:
        return rows.select(choose_evenly(len(rows), share))

    parts = split.validation
    limited = {name: limit(rows) for name, rows in parts.items()} if isinstance(parts, dict) else limit(parts)
    return (split._replace(validation=limited) if share < 1 else split), share


def _advise(stats: RowStats) -> str:
    """What to do if most rows do not fit into the context window; otherwise empty."""
    if [reason for reason, _ in stats.most_frequent_rejects()[:1]] != ["over-long"]:
        return ""
    return "Give a larger max_length, if the model has the positions, or shorter rows."


def divide_by_source(validation: Dataset, specs: list[str], counts: list[int]) -> dict[str, Dataset]:
    """The validation rows of each source, by its name. Sources without validation rows are left out."""
    ends = accumulate(counts)
    return {
        name: validation.select(range(end - count, end))
        for name, end, count in zip(name_sources(specs), ends, counts, strict=True)
        if count
    }


def _move_rows(rows: list[_Row], kind: str, arguments, row_stats: list[RowStats]) -> int | None:
    """The `order` of the rows that change their split because the other one has none; None if both have some."""
    in_validation = sum(row.is_validation for row in rows)
    if 0 < in_validation < len(rows):
        return None
    empty = "train" if in_validation else "validation"
    moved = choose_for_empty_split([row.order for row in rows], [1] * len(rows), empty)
    if moved is None:
        raise DataError(
            f"{len(rows) - in_validation} {kind}s to train on and {in_validation} to validate on, with "
            f"validation_share {arguments.validation_share} of {', '.join(arguments.sources)}: both are needed, and "
            f"rows with the same {SPLIT_BY[kind]} stay together. Give more data."
            + "".join(f" Of {s.source} were rejected: {s.describe_rejects()}." for s in row_stats if s.rejects)
        )
    for number, stats in enumerate(row_stats):
        places = [row.place for row in rows if row.order == moved and row.source == number]
        if places:
            stats.held_out = describe_moved(empty, kind, arguments.validation_share, places)
    return moved


def row_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """The number of tokens in a column of each row, (R,)."""
    return list_value_length(dataset.with_format("arrow")[:][column]).to_numpy()
