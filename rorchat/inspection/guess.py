"""Guesses the source that reads a file or folder, from its names and its first rows."""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import islice
from pathlib import Path

from rorchat.errors import DataError, RorchatError, UsageError
from rorchat.reading.encodings import compression_suffix, content_suffix
from rorchat.reading.folders import refuse_other_than_text
from rorchat.reading.formats import READERS, TEXT_SUFFIXES, read_rows
from rorchat.reading.listing import Listing, is_folder, list_files
from rorchat.reading.zip_files import file_exists, file_size
from rorchat.rows import ROLE_NAMES, RejectedRow
from rorchat.sources.base import Source
from rorchat.sources.columns import parse_columns, source_for_columns, suggest_pair, text_columns
from rorchat.sources.extra_columns import MARK_COLUMNS
from rorchat.sources.local_files import find_beside_files, find_source_files
from rorchat.sources.location import add_columns, may_name_dataset
from rorchat.sources.registry import find_source, list_sources, load_rows, locate

#: The row formats of files that belong to no known dataset, the most specific first.
ROW_FORMATS = ("preference", "alpaca", "prompt_completion", "messages", "text")
FORMAT_REASONS = ("missing field", "wrong type", "not a dialogue")  # reasons that indicate a different row format
SAMPLE_ROWS = 40  # rows of a file on which each format is tried
SMALL_SHARE = 0.1  # of a folder's bytes: a dataset that reads less is not what the folder holds
MOST_BYTES = 0.5  # of a folder: a dataset that reads them is what the folder holds, beside descriptions of it
WELL_READ = 0.8  # share of the first rows of a file that a source reads, if it is the right one
#: Columns of a message that belongs to a tree or thread, whose text alone is no document.
THREAD_COLUMNS = {"parent_id", "parent", "parent_message_id", "reply_to", "in_reply_to", "message_tree_id"}
#: Columns that are not those of a document if they hold the name of a role.
ROLE_COLUMNS = {"role", "from", "speaker", "sender"}
#: Words in the file names of many datasets, which say nothing about which one it is.
_COMMON_NAMES = {"train", "data", "sample", "input", "sft", "prefs", "complete", "ready"}


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
    if file_exists(path):
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
    the source), those named in the path, or by the name of the file, are preferred, then ROW_FORMATS. An unusable row
    in the right format counts as half a row.

    Raises:
        DataError: no source can read any row.
    """
    listing = list_files(path) if is_folder(path) else Listing(path, [path])
    candidates = [name for name in list_sources() if name in ROW_FORMATS or _has_mark(find_source(name), listing)]
    trials = {name: _try_source(name, listing) for name in candidates}
    best = max(trial.score for trial in trials.values())
    if not best:
        raise DataError(_describe_failure(path, trials))
    named = [name for name in trials if name not in ROW_FORMATS and _is_marked(find_source(name), path)]
    for name in (*named, *ROW_FORMATS, *trials):
        if trials[name].score >= (0.4 if name in named else 0.8) * best:
            return name
    raise AssertionError("the best source is one of those tried")


def guess_files(folder: Path) -> dict[Path, str]:
    """{the folder: the source that reads it}, or {file: the source that reads it} if its files need several.

    The name is empty for a file of no known format. A dataset to which most of the folder belongs reads it alone: the
    other files describe it, or are its test splits.

    Raises:
        DataError: no source can read any row.
    """
    whole = _guess(folder)
    files = [file for file in list_files(folder).files if not refuse_other_than_text(file)]
    own: set[Path] = set()
    if whole and whole not in ROW_FORMATS:
        source = find_source(whole)
        own, beside = _split_dataset(source, folder)
        others = {file for file in files if _has_own_name(source, file)}  # such as its test splits
        if _count_bytes(own | beside | others) >= MOST_BYTES * _count_bytes(files):
            return {folder: whole}
        files = [file for file in files if file not in beside]
    known: dict[object, str] = {whole: whole}  # files that look alike are guessed once
    guesses = {}
    for file in files:
        looks = whole if file in own else _describe_looks(file, whole)
        if looks not in known:
            known[looks] = _guess(file)
        guesses[file] = known[looks]
    names = set(guesses.values()) - {""}
    return guesses if len(names) > 1 else {folder: whole or next(iter(names), "") or guess_row_format(folder)}


def _split_dataset(source: Source, folder: Path) -> tuple[set[Path], set[Path]]:
    """(the files of a folder that a dataset reads, the files beside them that belong to it)."""
    own = set(find_source_files(source, folder))
    return own, set(find_beside_files(source, list_files(folder))) - own


def _count_bytes(files: Iterable[Path]) -> int:
    return sum(map(file_size, files))


def _describe_looks(file: Path, whole: str) -> object:
    """What decides the guess: the datasets whose marks the path has, the suffix, and the columns of the first row.

    For a file without such a mark, it is the format of the whole folder if that reads the file well. Only its content
    decides about a text in the folder of a dataset.
    """
    suffix = content_suffix(file)
    marks = tuple(name for name in list_sources() if _is_marked(find_source(name), file))
    if whole in ROW_FORMATS and not marks and _try_source(whole, Listing(file, [file])).score >= WELL_READ:
        return whole
    if suffix in TEXT_SUFFIXES or suffix not in READERS:
        return file if marks else suffix
    row = next(read_rows(file), ("", None))[1]
    return suffix, marks, tuple(sorted(map(str, row))) if isinstance(row, dict) else type(row)


def _guess(path: Path) -> str:
    """As `guess_row_format`, but empty if no source can read any row."""
    try:
        return guess_row_format(path)
    except DataError:
        return ""


def _has_mark(source: Source, listing: Listing) -> bool:
    """Whether a path contains the name of a dataset or a file name of its own, or may have rows with its columns.

    Columns are tried, not compared: rows that are converted have them. A dataset whose only column is `text`, and one
    that is read from plain text files, has no columns of its own.
    """
    if source.is_generated:
        return False
    if _is_named_in(listing.folder, source.name) or any(_has_own_name(source, file) for file in listing.files):
        return True
    columns = {column for row in source.raw if isinstance(row, dict) for column in row}
    suffixes = set(map(content_suffix, listing.files))
    are_tables = ".txt" not in suffixes and any(suffix in READERS for suffix in suffixes - TEXT_SUFFIXES)
    return are_tables and not columns <= {"text"}


def _is_marked(source: Source, file: Path) -> bool:
    """Whether the path of a file names a dataset, or the file has a name of its own."""
    return not source.is_generated and (_is_named_in(file, source.name) or _has_own_name(source, file))


def _has_own_name(source: Source, file: Path) -> bool:
    """Whether the name of a file matches a pattern that contains more than words which any file may have."""
    names = (file.name.lower(), file.name.lower().removesuffix(compression_suffix(file)))
    return any(fnmatchcase(name, pattern) for pattern in _own_patterns(source.files) for name in names)


@lru_cache  # a folder may have many files
def _own_patterns(patterns: tuple[str, ...]) -> list[str]:
    names = [pattern.rpartition("/")[2].lower() for pattern in patterns]
    return [name for name in names if not set(_words_of(name)) <= _COMMON_NAMES]


def _words_of(pattern: str) -> list[str]:
    words = re.findall(r"[a-z]\w*", re.sub(r"\[.*?\]", "", pattern.partition(".")[0]))
    return [part for word in words for part in word.split("_") if part]


def _is_named_in(path: Path, name: str) -> bool:
    """Whether a word of a path starts with a source's name: `my-FineWeb-Edu2/`, but not `pile` in `compiled/`."""
    return bool(re.search(r"(?<![^\W_])" + "[-_ ]?".join(name.replace("_", "")), str(path).lower()))


@dataclass(frozen=True)
class _Trial:
    """How well a source reads the first rows.

    Attributes:
        score: the share of rows that it reads; 0 if it reads none.
        problem: with the first row that it cannot use, or with the files.
    """

    score: float
    problem: str = ""


def _try_source(name: str, listing: Listing) -> _Trial:
    problem = ""
    score, count = 0.0, 0
    path, kind = listing.folder, find_source(name).kinds[0]
    try:
        rows = load_rows(f"{name}={path}", kind)
        for _, raw in islice(rows.raw, SAMPLE_ROWS):
            count += 1
            try:
                if kind == "document":
                    _refuse_message(raw)
                rows.convert(_without_marks(raw))
                # a text under another usual name, such as "content", can be a part of a row of another format
                is_other_text = name == "text" and isinstance(raw, dict) and "text" not in raw
                score += 0.75 if is_other_text or rows.is_by_order else 1
            except RejectedRow as rejected_row:
                # An unusable row in the right format is weaker evidence for the format than a good one
                is_other_format = isinstance(raw, RejectedRow) or rejected_row.reason in FORMAT_REASONS
                score += 0.0 if is_other_format else 0.5
                problem = problem or str(rejected_row)
        share = 1.0 if name in ROW_FORMATS else _share_of_bytes(find_source(name), listing)
    except RorchatError as error:
        return _Trial(0.0, str(error).rstrip(".") if name == "text" else "")  # it reads any file that is text
    unread = rows.stats.reading.describe_unread(str(path))
    problem = problem or (f"not read: {unread}" if unread else "")
    return _Trial(score / max(1, count) * (share if share < SMALL_SHARE else 1), problem)


def _without_marks(row: object) -> object:
    """A row without a mark of quality: a reply may be marked as bad in any format."""
    if type(row) is not dict:  # also of an exported chat, which is a dict with its speakers
        return row
    return {column: value for column, value in row.items() if str(column).strip().lower() not in MARK_COLUMNS}


def _share_of_bytes(source: Source, listing: Listing) -> float:
    """The share of a folder that belongs to a dataset."""
    if listing.files == [listing.folder]:
        return 1.0
    return _count_bytes(set().union(*_split_dataset(source, listing.folder))) / max(1, _count_bytes(listing.files))


def _refuse_message(row: object) -> None:
    """Raises RejectedRow if a row is a message of a conversation, whose text alone is no document."""
    for column, value in row.items() if isinstance(row, dict) else ():
        name = str(column).strip().lower()
        is_role = name in ROLE_COLUMNS and isinstance(value, str) and value.strip().lower() in ROLE_NAMES
        is_thread = name in THREAD_COLUMNS and isinstance(value, str | int | None)
        if is_role or is_thread or (name == "replies" and isinstance(value, list)):
            raise RejectedRow("wrong type", f"{column!r} says that the row is a message, not a document")


def _describe_failure(path: Path, trials: dict[str, _Trial]) -> str:
    """Why no source reads a file or folder, what the likeliest says about it, and what to do."""
    likeliest = _find_likeliest(path, trials)
    problem = trials[likeliest or "text"].problem or next((t.problem for t in trials.values() if t.problem), "")
    start = f"No row of {path} has a known format"
    start += f"; the likeliest is {likeliest} ({problem})." if likeliest else f" ({problem})." if problem else "."
    if not likeliest and len(columns := text_columns(_first_row(path))) == 2:
        return f"{start} {suggest_pair(f'messages={path}', columns)}"
    return (
        f"{start} Name the format before the path, as in alpaca={path} ({', '.join(ROW_FORMATS)}, or a dataset of "
        f"`rorchat data list`), or the columns, as in messages={path}:user=QUESTION:assistant=ANSWER."
    )


def _find_likeliest(path: Path, trials: dict[str, _Trial]) -> str:
    """The source that has the most columns in common with the first row; empty if none has any."""
    row = _first_row(path)
    scores = {name: _share_columns(find_source(name), row) for name in (*ROW_FORMATS, *trials) if trials[name].problem}
    best = max(scores, key=lambda name: (scores[name], _is_named_in(path, name)), default="")
    return best if best and scores[best] else ""


def _share_columns(source: Source, row: object) -> float:
    """The largest share of the columns of one of a source's forms that a row has."""
    present = {str(column).lower() for column in _first_object(row)}
    forms = [{str(column).lower() for column in _first_object(raw)} for raw in source.raw]
    return max((len(form & present) / len(form) for form in forms if form), default=0.0)


def _first_object(row: object) -> dict:
    """A row, or the first element of a row that is a list."""
    value = row[0] if isinstance(row, list) and row else row
    return value if isinstance(value, dict) else {}


def _first_row(path: Path) -> object:
    """The first row that can be parsed; None if there is none."""
    try:
        rows = load_rows(f"messages={path}", "conversation").raw
        return next((row for _, row in islice(rows, SAMPLE_ROWS) if not isinstance(row, RejectedRow)), None)
    except DataError:
        return None
