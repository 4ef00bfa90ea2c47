"""Checks every row of a dataset and shows the tokens of a row as the model sees them."""

import codecs
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
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
from rorchat.errors import DataError, RorchatError, UsageError
from rorchat.files import to_json
from rorchat.persona import Persona
from rorchat.reading.encodings import COMPRESSIONS, content_suffix
from rorchat.reading.filters import Filters
from rorchat.reading.folders import is_hidden
from rorchat.reading.formats import READERS, TEXT_SUFFIXES
from rorchat.rows import RejectedRow, row_text
from rorchat.sources.base import RowStats, Source
from rorchat.sources.columns import parse_columns, source_for_columns, suggest_pair, text_columns
from rorchat.sources.location import add_columns, may_name_dataset
from rorchat.sources.registry import SourceRows, find_source, list_sources, load_rows, locate
from rorchat.tokenizer import byte_characters
from rorchat.tokens.decontamination import EvaluationText
from rorchat.validation_split import exact_digest, text_digest

#: The row formats of files that belong to no known dataset, the most specific first.
ROW_FORMATS = ("preference", "alpaca", "prompt_completion", "messages", "text")
FORMAT_REASONS = ("missing field", "wrong type", "not a dialogue")  # reasons that indicate a different row format
SAMPLE_ROWS = 40  # rows of a file on which each format is tried
BATCH_ROWS = 500  # rows encoded together
#: Words in the file names of many datasets, which say nothing about which one it is.
_COMMON_NAMES = {"train", "data", "sample", "input", "sft", "prefs", "complete", "ready"}


@dataclass
class CheckResult:
    """The result of `check_source`: the spec, whether its row format was guessed, and the counts of the rows."""

    spec: str
    guessed: bool
    stats: RowStats
    evaluation: EvaluationText | None = None  # the evaluation sets that the rows were compared with


def resolve_spec(
    spec_or_path: str, row_format: str | None = None, columns: Sequence[str] | None = None
) -> tuple[str, bool]:
    """Returns (spec, whether the row format was guessed) for a spec, or for a path and the format of its rows.

    Args:
        columns: the columns to read, as ROLE=COLUMN. They also say which format a path has.

    Raises:
        UsageError: there is no such source or format, or it does not take these columns.
        DataError: there is no such file, or no format fits it.
    """
    path, given = Path(spec_or_path).expanduser(), parse_columns(columns or [])
    if path.exists():
        if row_format:
            find_source(row_format)
        guessed = not row_format and not given
        name = row_format or (source_for_columns(given) if given else guess_row_format(path))
        return add_columns([f"{name}={spec_or_path}"], given)[0], guessed
    name, _, where = spec_or_path.partition("=")
    if not where and (path.suffix or "/" in spec_or_path):
        advice = f" For a dataset of the Hub, name its format, as in text={spec_or_path}."
        raise DataError(f"No file or folder {spec_or_path}.{advice if may_name_dataset(spec_or_path) else ''}")
    try:
        find_source(name)
    except UsageError:
        if ":" in name and Path(name.partition(":")[0]).expanduser().exists():
            advice = shlex.quote(f"messages={spec_or_path}")
            raise UsageError(f"{spec_or_path} names columns without a source: write {advice}.") from None
        raise
    locate(spec_or_path)
    if row_format and row_format != name:
        raise UsageError(
            f"{spec_or_path!r} already names its source, so --as {row_format} is not allowed: give only the path."
        )
    return add_columns([spec_or_path], given)[0], False


def guess_row_format(path: Path) -> str:
    """The name of the source that can read most of the first rows of a file or folder.

    A dataset is only considered if the files carry a mark of it: its name in the path, a file name of its own, or rows
    with columns of its own. Of the sources that read at least 80 % as many rows as the best one (40 % if the path names
    the source), those named in the path are preferred, then ROW_FORMATS. An unusable row in the right format counts as
    half a row.

    Raises:
        DataError: no source can read any row.
    """
    candidates = [name for name in list_sources() if name in ROW_FORMATS or _has_mark(find_source(name), path)]
    results = {name: _try_source(name, path) for name in candidates}
    best = max(score for score, _ in results.values())
    if not best:
        problem = results["text"][1] or next((problem for _, problem in results.values() if problem), "")
        start = f"No row of {path} has a known format{f' ({problem})' if problem else ''}."
        if len(columns := _first_text_columns(path)) == 2:
            raise DataError(f"{start} {suggest_pair(f'messages={path}', columns)}")
        raise DataError(
            f"{start} Name the format before the path, as in alpaca={path} ({', '.join(ROW_FORMATS)}, or a dataset of "
            f"`rorchat data list`), or the columns, as in messages={path}:user=QUESTION:assistant=ANSWER."
        )
    named = [name for name in results if name not in ROW_FORMATS and _is_named_in(path, name)]
    for name in (*named, *ROW_FORMATS, *results):
        if results[name][0] >= (0.4 if name in named else 0.8) * best:
            return name
    raise AssertionError("the best source is one of those tried")


def _first_text_columns(path: Path) -> list[str]:
    """The columns with text of the first row that has columns; none if the files cannot be read."""
    try:
        rows = load_rows(f"messages={path}", "conversation").raw
        return next((columns for _, row in islice(rows, SAMPLE_ROWS) if (columns := text_columns(row))), [])
    except DataError:
        return []


def _has_mark(source: Source, path: Path) -> bool:
    """Whether a path contains the name of a dataset or a file name of its own, or may have rows with its columns.

    Columns are tried, not compared: rows that are converted have them. A dataset whose only column is `text`, and one
    that is read from plain text files, has no columns of its own.
    """
    if source.is_generated:
        return False
    if _is_named_in(path, source.name):
        return True
    names = [path.name] if path.is_file() else [file.name for file in path.rglob("*") if not is_hidden(file, path)]
    if any(fnmatchcase(name, pattern) for name in names for pattern in _own_patterns(source)):
        return True
    columns = {column for row in source.raw if isinstance(row, dict) for column in row}
    suffixes = {content_suffix(Path(name)) for name in names}
    are_tables = ".txt" not in suffixes and any(suffix in READERS for suffix in suffixes - TEXT_SUFFIXES)
    return are_tables and not columns <= {"text"}


def _own_patterns(source: Source) -> Iterator[str]:
    """The patterns of a source's file names that contain more than words which any file may have."""
    for pattern in source.files:
        name = pattern.rpartition("/")[2]
        words = re.findall(r"[a-z]\w*", re.sub(r"\[.*?\]", "", name.partition(".")[0].lower()))
        if any(part not in _COMMON_NAMES for word in words for part in word.split("_") if part):
            yield from (name, *(name + packing for packing in COMPRESSIONS))


def _is_named_in(path: Path, name: str) -> bool:
    """Whether a word of a path starts with a source's name: `my-FineWeb-Edu2/`, but not `pile` in `compiled/`."""
    return bool(re.search(r"(?<![^\W_])" + "[-_ ]?".join(name.replace("_", "")), str(path).lower()))


def _try_source(name: str, path: Path) -> tuple[float, str]:
    """Returns (the share of the first rows that a source can read, the problem with the first unusable row)."""
    problem = ""
    score, count = 0.0, 0
    try:
        rows = load_rows(f"{name}={path}", find_source(name).kinds[0])
        for _, raw in islice(rows.raw, SAMPLE_ROWS):
            count += 1
            try:
                rows.convert(raw)
                # a text under another usual name, such as "content", can be a part of a row of another format
                is_other_text = name == "text" and isinstance(raw, dict) and "text" not in raw
                score += 0.75 if is_other_text or rows.is_by_order else 1
            except RejectedRow as rejected_row:
                # An unusable row in the right format is weaker evidence for the format than a good one
                is_other_format = isinstance(raw, RejectedRow) or rejected_row.reason in FORMAT_REASONS
                score += 0.0 if is_other_format else 0.5
                problem = problem or str(rejected_row)
    except RorchatError as error:
        return 0.0, str(error).rstrip(".") if name == "text" else ""  # it reads any file that is text
    unread = rows.stats.reading.describe_unread(str(path))
    return score / max(1, count), problem or (f"not read: {unread}" if unread else "")


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
    """Reads and checks every row of a source.

    Args:
        spec_or_path: a spec (`alpaca`, `alpaca=PATH`) or a path.
        row_format: the source that reads a path; None to guess it.
        filters: further conditions that rows must meet.
        evaluation: paths of evaluation sets. Rows that share 13 consecutive words with them are rejected.
        tokenizer, max_length: if both are given, rows that do not fit into `max_length` tokens are truncated and
            counted, or rejected, as in training.
        rejects: receives every rejected row as a JSON line with place, reason, detail and the raw row.

    Raises:
        UsageError, DataError: the source cannot be read at all. Unusable rows do not raise; they are counted.
    """
    spec, guessed = resolve_spec(spec_or_path, row_format)
    kind = find_source(spec.partition("=")[0]).kinds[0]
    on_reject = _RejectWriter(rejects) if rejects else None
    rows = load_rows(spec, kind, seed=seed, persona=persona, allow_empty=True, on_reject=on_reject)
    evaluation_text = EvaluationText.read(evaluation) if evaluation else None
    filters = filters or Filters()
    seen: set[bytes] = set()
    batch: list[tuple[str, dict]] = []
    longest = max_length if tokenizer is not None and kind != "document" else None
    for row in tqdm(rows, desc=f"check {spec}", unit=" rows", disable=not shows_bars(), leave=False):
        text = row_text(row)
        row_digest = exact_digest(row, text_digest(text))
        try:
            filters.check(text)
            if evaluation_text is not None:
                evaluation_text.check(text)
            if row_digest in seen:
                raise RejectedRow("duplicate")
        except RejectedRow as rejected_row:
            rows.withdraw(rows.place, rejected_row, row)
            continue
        seen.add(row_digest)
        if longest:
            batch.append((rows.place, row))
            if len(batch) == BATCH_ROWS:
                _check_lengths(batch, tokenizer, longest, rows)
                batch = []
    if longest and batch:
        _check_lengths(batch, tokenizer, longest, rows)
    return CheckResult(spec, guessed, rows.stats, evaluation_text)


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
