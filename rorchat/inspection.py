"""What is wrong with data, row by row, and what a model sees of a row, token by token."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

from tqdm.auto import tqdm

from rorchat.chatml import END_OF_TEXT, IGNORE_INDEX, encode_conversations, encode_text
from rorchat.errors import DataError, RorchatError, UsageError
from rorchat.persona import Persona
from rorchat.reading.filters import Filters
from rorchat.rows import RejectedRow, row_text
from rorchat.sources.base import RowStats, exact_digest, text_digest
from rorchat.sources.registry import SourceRows, find_source, list_sources, load_rows
from rorchat.tokenizer import byte_characters
from rorchat.tokens.decontamination import EvaluationText

#: The shapes that files of many datasets have, the most telling first.
SHAPES = ("preference", "messages", "alpaca", "prompt_completion", "text")
FORMAT_REASONS = ("missing field", "wrong type", "not a dialogue")  # reasons that speak against a shape
ROWS_TRIED = 40  # rows of a file on which each shape is tried
ROWS_AT_ONCE = 500


@dataclass
class CheckResult:
    """What `check` found: the source as it was read, whether that was a guess, and where the rows went."""

    spec: str
    guessed: bool
    stats: RowStats
    evaluation: EvaluationText | None = None  # what the rows were compared with


def resolve_spec(given: str, shape: str | None = None) -> tuple[str, bool]:
    """(spec, whether it was guessed) of a source, or of a path and the shape of the rows in it.

    Raises:
        UsageError: no such source or path, or the shape is of no known name.
        DataError: no shape fits.
    """
    path = Path(given).expanduser()
    if path.exists():
        if shape:
            find_source(shape)
            return f"{shape}={given}", False
        return f"{guess_row_format(path)}={given}", True
    name, _, where = given.partition("=")
    if not where and (path.suffix or "/" in given):
        raise DataError(f"No file or folder {given}.")
    find_source(name)
    if shape and shape != name:
        raise UsageError(f"{given!r} names its source already, so --as {shape} has no place: give the path alone.")
    return given, False


def guess_row_format(path: Path) -> str:
    """The source as which the first rows of a path can be read best.

    Where several read nearly all of them, a dataset whose name stands in the path goes first, then the shapes. A row of
    the right shape with a fault counts half.

    Raises:
        DataError: none can read any row; says what the likeliest one stumbled over.
    """
    tried = {name: _try(name, path) for name in list_sources() if not find_source(name).is_generated}
    best = max(kept for kept, _ in tried.values())
    if not best:
        kept, said = max(tried.values(), key=lambda result: bool(result[1]))
        raise DataError(
            f"No row of {path} is of a known shape{f' ({said})' if said else ''}. Say which it is with --as: "
            f"{', '.join(SHAPES)}, or a dataset of `rorchat data list`."
        )
    named = [name for name in tried if name not in SHAPES and _names(path, name)]
    for name in (*named, *SHAPES, *tried):
        if tried[name][0] >= (0.4 if name in named else 0.8) * best:
            return name
    raise AssertionError("the best is among those tried")


def _names(path: Path, name: str) -> bool:
    """Whether words of a path begin as the name of a source does: `my-FineWeb-Edu2/` does, `compiled/` is no pile."""
    return bool(re.search(r"(?<![^\W_])" + "[-_ ]?".join(name.replace("_", "")), str(path).lower()))


def _try(name: str, path: Path) -> tuple[float, str]:
    """(share of the first rows that a source can read, what is wrong with the first of the others)."""
    kinds = find_source(name).kinds
    said = ""
    kept, seen = 0.0, 0
    try:
        rows = load_rows(f"{name}={path}", kinds[0])
        for _, raw in islice(rows.raw, ROWS_TRIED):
            seen += 1
            try:
                rows.convert(raw)
                kept += 1
            except RejectedRow as reject:
                # A row of the right shape with a fault tells of its shape too, if less than a good one
                kept += 0.0 if isinstance(raw, RejectedRow) or reject.reason in FORMAT_REASONS else 0.5
                said = said or str(reject)
    except RorchatError:
        return 0.0, ""
    return kept / max(1, seen), said


def check(
    given: str,
    *,
    shape: str | None = None,
    filters: Filters | None = None,
    evaluation: list[str] | None = None,
    tokenizer=None,
    max_length: int | None = None,
    rejects: TextIO | None = None,
    seed: int = 0,
    persona: Persona | None = None,
) -> CheckResult:
    """Reads every row of a source on its own and counts where it goes.

    Args:
        given: a source (`alpaca`, `alpaca=PATH`) or a path.
        shape: as which source a path is read; None to guess.
        filters: what else makes a row unusable.
        evaluation: files of evaluation sets with which no row may have 13 words in common.
        tokenizer, max_length: with both, conversations of which no exchange fits are over-long, as in fine-tuning.
        rejects: where each reject is written, as JSON lines with place, reason, detail and the row as it was read.

    Raises:
        UsageError, DataError: nothing can be read at all; what is wrong with a row is counted.
    """
    spec, guessed = resolve_spec(given, shape)
    kind = find_source(spec.partition("=")[0]).kinds[0]
    on_reject = _RejectWriter(rejects) if rejects else None
    rows = load_rows(spec, kind, seed=seed, persona=persona, allow_empty=True, on_reject=on_reject)
    overlap = EvaluationText.read(evaluation) if evaluation else None
    seen: set[bytes] = set()
    fitting: list[tuple[str, dict]] = []
    for row in tqdm(rows, desc=f"check {spec}", unit=" rows", disable=None, leave=False):
        text = row_text(row)
        mark = exact_digest(row, text_digest(text))
        try:
            (filters or Filters()).check(text)
            if overlap is not None:
                overlap.check(text)
            if mark in seen:
                raise RejectedRow("duplicate")
        except RejectedRow as reject:
            rows.withdraw(rows.place, reject, row)
            continue
        seen.add(mark)
        if tokenizer is not None and max_length and kind != "document":
            fitting.append((rows.place, row))
            if len(fitting) == ROWS_AT_ONCE:
                _check_lengths(fitting, tokenizer, max_length, rows)
                fitting = []
    _check_lengths(fitting, tokenizer, max_length, rows)
    return CheckResult(spec, guessed, rows.stats, overlap)


@dataclass
class _RejectWriter:
    """Writes rejected rows as JSON lines."""

    file: TextIO

    def __call__(self, place: str, rejected_row: RejectedRow, row: object) -> None:
        row = None if isinstance(row, RejectedRow) else row
        record = {"place": place, "reason": rejected_row.reason, "detail": rejected_row.detail, "row": row}
        try:
            line = json.dumps(record, default=str)  # ASCII, because a row may contain half a surrogate pair
        except RecursionError:  # nested just too deeply to be written
            line = json.dumps({**record, "row": None})
        self.file.write(line + "\n")


def _check_lengths(rows: list[tuple[str, dict]], tokenizer, max_length: int | None, checked: SourceRows) -> None:
    if not rows:
        return
    conversations = [messages for _, row in rows for messages in _conversations(row)]
    encoded = iter(encode_conversations(tokenizer, conversations, max_length))
    for place, row in rows:
        sides = [next(encoded) for _ in _conversations(row)]
        if None in sides or ("chosen" in row and any(side.dropped_turns for side in sides)):
            checked.withdraw(place, RejectedRow("over-long", f"no exchange fits into {max_length} tokens"), row)
        elif any(side.dropped_turns for side in sides):
            checked.stats.cut += 1


def _conversations(row: dict) -> list[list[dict]]:
    if "messages" in row:
        return [row["messages"]]
    return [[*row["prompt"], *row[side]] for side in ("chosen", "rejected")]


@dataclass(frozen=True)
class ShownToken:
    """One token as the model sees it: its text, and whether the loss counts it."""

    text: str
    trained: bool
    control: bool


def show(spec: str, number: int, tokenizer, *, seed: int = 0, persona: Persona | None = None) -> tuple[str, dict]:
    """(place of a row, its tokens under a title each): one sequence, or the chosen and the rejected one.

    Args:
        number: of the raw row, counted from 0.

    Raises:
        DataError: there is no such row, or it cannot be used; says why.
    """
    kind = find_source(spec.partition("=")[0]).kinds[0]
    rows = load_rows(spec, kind, seed=seed, persona=persona)
    raw = next(islice(rows.raw, number, None), None)
    if raw is None:
        raise DataError(f"{spec} has no row {number}: rows are counted from 0, and it has fewer.")
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
        title: list(_tokens(tokenizer, one.input_ids, one.labels)) for title, one in zip(titles, encoded, strict=True)
    }


def _tokens(tokenizer, input_ids: list[int], labels: list[int]) -> Iterator[ShownToken]:
    """Tokens with their text. A character of several tokens stands with the last of them."""
    byte_of = {character: byte for byte, character in byte_characters().items()}
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token, label, spelled in zip(input_ids, labels, tokenizer.convert_ids_to_tokens(input_ids), strict=True):
        text = spelled if token in added else decoder.decode(bytes(byte_of[character] for character in spelled))
        yield ShownToken(text, label != IGNORE_INDEX, token in special)
