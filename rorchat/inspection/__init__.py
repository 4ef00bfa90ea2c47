"""Checks every row of a dataset and shows the tokens of a row as the model sees them."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TextIO

from tqdm.auto import tqdm

from rorchat.chatml import (
    END_OF_TEXT,
    IGNORE_INDEX,
    EncodedConversation,
    EncodedPreference,
    encode_conversations,
    encode_preferences,
    encode_text,
)
from rorchat.console import shows_bars
from rorchat.errors import DataError
from rorchat.files import to_json
from rorchat.inspection.guess import resolve_spec
from rorchat.persona import Persona
from rorchat.reading.filters import Filters
from rorchat.rows import RejectedRow
from rorchat.sources.base import RowStats
from rorchat.sources.registry import SourceRows, find_source, load_rows
from rorchat.tokenizer import byte_characters
from rorchat.tokens.decontamination import EvaluationText
from rorchat.tokens.kept_rows import RowFilter

BATCH_ROWS = 500  # rows encoded together


@dataclass
class CheckResult:
    """The result of `check_source`: the spec, whether its row format was guessed, and the counts of the rows."""

    spec: str
    guessed: bool
    stats: RowStats
    evaluation: EvaluationText | None = None  # the evaluation sets that the rows were compared with


@dataclass
class Checks:
    """The conditions, beside those of its format, that a row must meet.

    Attributes:
        filters: limits of the text.
        evaluation: evaluation sets. Rows that share 13 consecutive words with them are rejected.
        tokenizer, max_length: if both are given, rows that do not fit into `max_length` tokens are truncated and
            counted, or rejected, as in training.
        rejects: receives every rejected row as a JSON line with place, reason, detail and the raw row.
    """

    filters: Filters = field(default_factory=Filters)
    evaluation: EvaluationText | None = None
    tokenizer: object = None
    max_length: int | None = None
    rejects: TextIO | None = None


def check_source(
    spec_or_path: str,
    *,
    row_format: str | None = None,
    filters: Filters | None = None,
    evaluation: list[str] | None = None,
    tokenizer=None,
    max_length: int | None = None,
    rejects: TextIO | None = None,
    seed: int = 0,
    persona: Persona | None = None,
) -> CheckResult:
    """Reads and checks every row of a source. Those that are kept are those of a token store.

    Args:
        spec_or_path: a spec (`alpaca`, `alpaca=PATH`) or a path.
        row_format: the source that reads a path; None to guess it.
        evaluation: paths of evaluation sets.
        filters, tokenizer, max_length, rejects: see `Checks`.

    Raises:
        UsageError, DataError: the source cannot be read at all. Unusable rows do not raise; they are counted.
    """
    spec, guessed = resolve_spec(spec_or_path, row_format)
    evaluation_text = EvaluationText.read(evaluation) if evaluation else None
    checks = Checks(filters or Filters(), evaluation_text, tokenizer, max_length, rejects)
    return CheckResult(spec, guessed, check_spec(spec, checks, seed, persona), evaluation_text)


def check_spec(spec: str, checks: Checks, seed: int = 0, persona: Persona | None = None) -> RowStats:
    """Reads and checks every row of a source; see `check_source`."""
    kind = find_source(spec.partition("=")[0]).kinds[0]
    on_reject = _RejectWriter(checks.rejects) if checks.rejects else None
    rows = load_rows(spec, kind, seed=seed, persona=persona, allow_empty=True, on_reject=on_reject)
    row_filter = RowFilter(kind, checks.filters, checks.evaluation)
    seen: set[bytes] = set()
    batch: list[tuple[str, dict]] = []
    longest = checks.max_length if checks.tokenizer is not None and kind != "document" else None
    for row in tqdm(rows, desc=f"check {spec}", unit=" rows", disable=not shows_bars(), leave=False):
        kept = row_filter.check(rows.place, row, rows)
        if kept is None:
            continue
        if kept.exact_digest in seen:
            rows.withdraw(kept.place, RejectedRow("duplicate"), row)
            continue
        seen.add(kept.exact_digest)
        if longest:
            batch.append((kept.place, row))
            if len(batch) == BATCH_ROWS:
                _check_lengths(batch, checks.tokenizer, longest, rows)
                batch = []
    if longest and batch:
        _check_lengths(batch, checks.tokenizer, longest, rows)
    if kind == "document" and rows.stats.kept == 1:
        rows.stats.held_out = "it is the only document: training divides it, so that a part can be held out"
    return rows.stats


@dataclass
class _RejectWriter:
    """Writes rejected rows as JSON Lines."""

    file: TextIO

    def __call__(self, place: str, rejected_row: RejectedRow, row: object) -> None:
        row = None if isinstance(row, RejectedRow) else row
        record = {"place": place, "reason": rejected_row.reason, "detail": rejected_row.detail, "row": row}
        try:
            line = to_json(record, default=str)  # ASCII, because a row may contain a lone surrogate
        except RecursionError:  # the row is nested too deeply
            line = to_json({**record, "row": None})
        self.file.write(line + "\n")


def _check_lengths(batch: list[tuple[str, dict]], tokenizer, max_length: int, rows: SourceRows) -> None:
    """Rejects and counts conversations and preferences as SFT and DPO do, by what fits into `max_length` tokens."""
    encoded: Sequence[EncodedConversation | EncodedPreference | RejectedRow | None]
    if rows.kind == "preference":
        encoded = encode_preferences(tokenizer, [row for _, row in batch], max_length)
    else:
        encoded = encode_conversations(tokenizer, [row["messages"] for _, row in batch], max_length)
    for (place, row), result in zip(batch, encoded, strict=True):
        if result is None:
            rows.withdraw(place, RejectedRow("over-long", f"no exchange fits into {max_length} tokens"), row)
        elif isinstance(result, RejectedRow):
            rows.withdraw(place, result, row)
        else:
            rows.stats.count_cut(*result.cuts())


def _conversations(row: dict) -> list[list[dict]]:
    if "messages" in row:
        return [row["messages"]]
    return [[*row["prompt"], *row[side]] for side in ("chosen", "rejected")]


@dataclass(frozen=True)
class ShownToken:
    """A token as the model sees it: its text, whether it is a target of the loss, and whether it is a control token."""

    text: str
    trained: bool
    control: bool


def show_row(
    spec: str, number: int, tokenizer, *, seed: int = 0, persona: Persona | None = None
) -> tuple[str, dict[str, list[ShownToken]]]:
    """Encodes one row as in training.

    Args:
        number: the index of the raw row.

    Returns:
        (place of the row, {title: tokens}), with one sequence, or with the chosen and the rejected one of a preference.

    Raises:
        DataError: there is no such row, or it cannot be used.
    """
    kind = find_source(spec.partition("=")[0]).kinds[0]
    rows = load_rows(spec, kind, seed=seed, persona=persona)
    raw = next(islice(rows.raw, number, None), None)
    if raw is None:
        raise DataError(f"{spec} has no row {number}: it has fewer rows (the first is row 0).")
    place = raw[0]
    try:
        row = rows.convert(raw[1])
    except RejectedRow as rejected_row:
        raise DataError(f"{rejected_row.reason}: {rejected_row.describe_place(place)}.") from None
    if kind == "document":
        (ids,) = encode_text(tokenizer, [row["text"]])
        end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        return place, {"document": list(_tokens(tokenizer, [end_of_text, *ids], [end_of_text, *ids]))}
    titles = ["conversation"] if kind == "conversation" else ["chosen", "rejected"]
    encoded = encode_conversations(tokenizer, _conversations(row))
    return place, {
        title: list(_tokens(tokenizer, sequence.input_ids, sequence.labels))
        for title, sequence in zip(titles, encoded, strict=True)
        if sequence is not None  # there is no limit, so every sequence fits
    }


def _tokens(tokenizer, input_ids: list[int], labels: list[int]) -> Iterator[ShownToken]:
    """Yields tokens with their text. A character that spans several tokens is shown at the last of them."""
    byte_of = {character: byte for byte, character in byte_characters().items()}
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token_id, label, token in zip(input_ids, labels, tokenizer.convert_ids_to_tokens(input_ids), strict=True):
        text = token if token_id in added else decoder.decode(bytes(byte_of[character] for character in token))
        yield ShownToken(text, label != IGNORE_INDEX, token_id in special)
