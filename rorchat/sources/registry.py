"""Finds a source by its name and reads its rows one by one."""

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from rorchat import sources
from rorchat.errors import DataError, RorchatError, UsageError, did_you_mean
from rorchat.persona import Persona, load_persona
from rorchat.reading.folders import files_digest
from rorchat.reading.listing import is_folder
from rorchat.reading.long_texts import cut_apart
from rorchat.reading.notes import ReadingNotes
from rorchat.reading.parts import split_files
from rorchat.reading.slices import FileSlice
from rorchat.reading.zip_files import file_size
from rorchat.rows import CHECKS, ConvertedRow, RejectedRow
from rorchat.sources.base import REMEDIES, PlacedRow, RowStats, Source, to_printable
from rorchat.sources.columns import (
    ROLES,
    Columns,
    pick_columns,
    require_columns,
    suggest_columns,
    suggest_pair,
    text_columns,
)
from rorchat.sources.extra_columns import (
    add_extra_turns,
    find_extra_columns,
    list_known_columns,
    list_unread_columns,
    refuse_marked,
    refuse_unusable,
)
from rorchat.sources.hub_dataset import HubDataset, HubRows, open_rows, resolve
from rorchat.sources.local_files import find_source_files, note_unread_files, read_slice
from rorchat.sources.location import Location, format_spec, parse_location

CHAT_PREFIX = "chat:"  # prefix of a source's name that selects its conversations
HUB_ROWS_PER_PART = 20_000
#: The other modules of this folder.
NOT_SOURCES = {"base", "columns", "extra_columns", "hub_dataset", "hub_errors", "local_files", "location", "registry"}

RejectHook = Callable[[str, RejectedRow, object], None]  # called with place, rejected row and raw row


def list_sources() -> list[str]:
    """The names of all sources."""
    modules = {module.name for module in pkgutil.iter_modules(sources.__path__)}
    return sorted(modules - NOT_SOURCES)


def find_source(name: str) -> Source:
    """The source with this name. With the prefix `chat:`, the source is restricted to its conversations.

    Raises:
        UsageError: there is no such source, or it has no conversations.
    """
    module_name = name.removeprefix(CHAT_PREFIX)
    if module_name not in list_sources():
        if "/" in module_name:
            raise UsageError(
                f"{module_name!r} is a path, but a source is expected: use text={module_name}, "
                "or another source of `rorchat data list`."
            )
        raise UsageError(
            f"No source named {module_name!r}.{did_you_mean(module_name, list_sources())} "
            f"Available: {', '.join(list_sources())}. To add one, see docs/add_a_dataset.md."
        )
    source = Source.from_module(name, importlib.import_module(f"rorchat.sources.{module_name}"))
    if module_name == name:
        return source
    if "conversation" not in source.kinds:
        raise UsageError(
            f"Source {module_name!r} has {_plural(source.kinds)} but no conversations: omit {CHAT_PREFIX!r}."
        )
    return replace(source, kinds=("conversation",))


def _plural(kinds: Sequence[str]) -> str:
    return " and ".join(f"{kind}s" for kind in kinds)


def split_spec(spec: str) -> tuple[Source, str]:
    """Splits a spec such as "alpaca=data/alpaca.json" or "tinytown=5000" into (source, path or amount)."""
    name, _, where = spec.partition("=")
    return find_source(name), where


def locate(spec: str) -> Location:
    """Where the rows of a source that is not generated are; empty for a generated one.

    Raises:
        UsageError: there is no such source, or an option of the spec is wrong.
    """
    source, where = split_spec(spec)
    if source.is_generated:
        return Location()
    location = parse_location(source, where)
    return location if where else replace(location, dataset=HubDataset.of_source(source))


def local_path(spec: str) -> Path | None:
    """The local file or folder of a source; None if its rows are generated or on the Hub."""
    return locate(spec).path


def pin_spec(spec: str) -> str:
    """The spec of the same rows on the Hub that names their commit, configuration and split. Others are unchanged.

    Raises:
        RorchatError: the dataset cannot be found, see `rorchat.sources.hub_dataset.resolve`.
    """
    location = locate(spec)
    if location.dataset is None:
        return spec
    dataset = resolve(location.dataset)
    return format_spec(spec.partition("=")[0], replace(location, dataset=dataset)) if dataset.is_pinned else spec


def is_pin_of(pinned: str, spec: str) -> bool:
    """Whether a pinned spec names a commit of the rows that another spec asks for without one."""
    if pinned.partition("=")[0] != spec.partition("=")[0]:
        return False
    commit, asked = locate(pinned), locate(spec)
    if commit.dataset is None or asked.dataset is None or commit.columns != asked.columns:
        return False
    if asked.dataset.is_own and asked.dataset.is_pinned:
        return pinned == spec
    wanted = replace(
        commit.dataset,
        path=asked.dataset.path,
        config=asked.dataset.config or commit.dataset.config,
        split=asked.dataset.split or commit.dataset.split,
        revision=commit.dataset.revision if asked.dataset.is_own else asked.dataset.revision or commit.dataset.revision,
    )
    return commit.dataset.is_pinned and wanted == commit.dataset


@dataclass
class SourceRows:
    """Iterates over the usable rows of a source or of a part of it.

    Attributes:
        raw: iterator over (place, raw row or RejectedRow).
        stats: counts of the rows read so far.
        allow_empty: whether a source without usable rows is accepted. If not, the iteration ends with a DataError.
        on_reject: called for each rejected row.
        place: the place that the last row was read from.
        columns: role -> column, if the user has named them.
        is_by_order: whether only the order of its texts says who is the user in the last converted row.
    """

    spec: str
    kind: str
    source: Source
    raw: Iterator[PlacedRow]
    stats: RowStats
    allow_empty: bool = False
    on_reject: RejectHook | None = None
    place: str = ""
    columns: Columns = field(default_factory=dict)
    is_by_order: bool = False

    def __iter__(self) -> Iterator[dict]:
        for place, raw in self.raw:
            self.stats.rows_in += 1
            try:
                row = self.convert(raw)
            except RejectedRow as rejected_row:
                self.stats.reject(place, rejected_row)
                if rejected_row.reason == "missing field" and not self.columns:
                    self.stats.text_columns = self.stats.text_columns or text_columns(raw)
                if self.on_reject:
                    self.on_reject(place, rejected_row, raw)
                continue
            del raw
            yield from self._pieces(place, row)
        if not self.allow_empty:
            require_kept_rows(self.stats)

    def _pieces(self, place: str, row: dict) -> Iterator[dict]:
        """A usable row, or the rows into which its long text is cut."""
        limits = self.source.long_texts
        if limits is None or len(row["text"]) <= limits.maximum:
            self.stats.kept, self.place = self.stats.kept + 1, place
            yield row
            return
        pieces = 0
        for pieces, text in enumerate(cut_apart(row["text"], limits), start=1):  # noqa: B007
            if pieces == 2:
                self.stats.reading.long_texts += 1
            self.stats.rows_in += pieces > 1
            self.stats.kept, self.place = self.stats.kept + 1, f"{place}, piece {pieces}"
            yield {"text": text}

    def withdraw(self, place: str, rejected_row: RejectedRow, row: dict) -> None:
        """Rejects a row that has already been yielded."""
        self.stats.withdraw(place, rejected_row)
        if self.on_reject:
            self.on_reject(place, rejected_row, row)

    @cached_property
    def _known_columns(self) -> frozenset[str]:
        return list_known_columns(self.source)

    def convert(self, raw: Any) -> dict:
        """Converts a raw row to this kind of row and checks it. Repairs are counted.

        Raises:
            RejectedRow: the raw row cannot be used.
        """
        if isinstance(raw, RejectedRow):
            raise raw
        has_turns, name = self.kind in ("conversation", "preference"), self.source.name.removeprefix(CHAT_PREFIX)
        extra = find_extra_columns(raw, self.columns) if has_turns else {}
        if extra and self.kind == "conversation":
            refuse_marked(raw, extra)
        if extra:
            refuse_unusable(raw, extra)
        picked = pick_columns(name, self.columns, raw)
        convert = self.source.to_question if self.kind == "question" else self.source.convert
        converted = convert(picked.row) if convert else picked.row  # generated rows need no conversion
        row, repairs = (converted.row, converted.repairs) if isinstance(converted, ConvertedRow) else (converted, ())
        if extra:
            row, further = add_extra_turns(raw, extra, self.columns, row)
            repairs += further
        CHECKS[self.kind](row)
        unread = []
        if has_turns and isinstance(raw, dict):
            unread = list_unread_columns(self._known_columns, raw, self.columns, row)
        self.stats.count_kept(picked.rule, *picked.repairs, *repairs, unread=unread)
        self.is_by_order = picked.is_by_order
        return row


def require_kept_rows(stats: RowStats, advice: str = "") -> None:
    """Raises a DataError, which names the reasons that took the rows, unless at least one row was kept.

    Args:
        advice: what to do if the most frequent reason is not about columns; empty to correct the rows.
    """
    if not stats.rows_in:
        unread = stats.reading.describe_unread(stats.source.partition("=")[2])
        raise DataError(
            to_printable(f"{stats.source} is empty: it has no rows{f'. Not read: {unread}' if unread else ''}.")
        )
    if not stats.kept:
        remedies = "".join(f"{REMEDIES[reason]} " for reason in stats.rejects if reason in REMEDIES)
        correct = (
            f"{remedies}Correct them (`rorchat data check {stats.source} --rejects FILE` lists them all), or use "
            "another source."
        )
        advice = columns_advice(stats) or advice or correct
        raise DataError(to_printable(f"No row of {stats.source} can be used: {stats.describe_rejects()}. {advice}"))


def columns_advice(stats: RowStats) -> str:
    """How to name the columns of a source, if most of its rejected rows lack one; otherwise empty."""
    name, rejects = stats.source.partition("=")[0], stats.most_frequent_rejects()
    if name not in ROLES or not rejects or rejects[0][0] != "missing field":
        return ""
    if name == "messages" and len(stats.text_columns) == 2:
        return suggest_pair(stats.source, stats.text_columns)
    return suggest_columns(name)


@dataclass(frozen=True)
class SourcePart:
    """A part of a source: slices of local files, or a range (start, stop) on the Hub.

    The range counts rows, or files if rows are streamed.
    """

    slices: tuple[FileSlice, ...] = ()
    rows: tuple[int, int] | None = None

    def record(self) -> list:
        """The boundaries of the part as JSON values, by which it is recognized after a restart."""
        return [[str(s.path), s.start, s.stop, s.bytes] for s in self.slices] or list(self.rows or ())


def load_rows(
    spec: str,
    kind: str,
    *,
    seed: int = 0,
    persona: Persona | None = None,
    part: SourcePart | None = None,
    allow_empty: bool = False,
    on_reject: RejectHook | None = None,
) -> SourceRows:
    """The rows of one source, read lazily.

    Args:
        spec: `NAME` reads from the Hub, `NAME=PATH` a local file or folder in the original format, and `NAME=AMOUNT`
            generates rows: `alpaca`, `alpaca=data/alpaca_data.json`, `tinytown=20000`, `chat:tinytown=5000`.
        kind: "document", "conversation", "preference" or "question".
        seed, persona: for generated sources.
        part: one of `source_parts(spec)`; None for the whole source.
        allow_empty: do not raise a DataError if no row can be used. Always true for a part.
        on_reject: called with the place, the `RejectedRow` and the raw row for each row that cannot be used.

    Raises:
        UsageError: the source does not exist or has no rows of this kind.
        DataError: the path does not exist, or (during iteration) no row can be used.
        RemoteError: the Hub cannot be reached.
    """
    source, where = split_spec(spec)
    if kind not in source.kinds:
        suitable = [name for name in list_sources() if kind in find_source(name).kinds]
        raise UsageError(
            f"Source {source.name!r} has {_plural(source.kinds)}, but {kind}s are expected here: "
            f"use one of {', '.join(suitable)}."
        )
    raw: Iterator[PlacedRow]
    location, stats = locate(spec), RowStats(spec, source.licence, limits=source.long_texts)
    if source.generate:
        amount = _parse_amount(source.name, where)
        rows = source.generate(kind, amount, seed, persona)
        raw = ((f"{source.name}, row {number}", row) for number, row in enumerate(rows))
    elif location.path:
        slices = part.slices if part else [FileSlice(file) for file in find_source_files(source, location.path)]
        raw = _gather_rows(source, (read_slice(source, file_slice, stats) for file_slice in slices))
        stats.reading = ReadingNotes() if part else note_unread(spec)
    else:
        hub = open_hub_rows(spec)
        raw = _gather_rows(source, [hub.read(*(part.rows if part and part.rows else ()))])
        stats.hub = hub.dataset.record()
        stats.licence = source.licence if hub.dataset.is_own else hub.licence
    return SourceRows(
        spec, kind, source, raw, stats, allow_empty or part is not None, on_reject, columns=location.columns
    )


def open_hub_rows(spec: str) -> HubRows:
    """The rows of a dataset on the Hub, whose columns are known to fit the source.

    Raises:
        UsageError: the source has no dataset on the Hub.
        DataError, PermissionDenied, RemoteError: the dataset cannot be read, or has other columns.
    """
    source, location = split_spec(spec)[0], locate(spec)
    if location.dataset is None:
        hint = f", or a dataset of the Hub, as in {source.name}=OWNER/NAME" if source.name in ROLES else ""
        raise UsageError(
            f"{source.name} is not a dataset on the Hub: give a file or folder, as in {source.name}=PATH{hint}."
        )
    rows = open_rows(resolve(location.dataset))
    if rows.columns:
        require_columns(source.name, location.columns, rows.columns, rows.dataset.path)
    return rows


def _parse_amount(name: str, amount: str) -> int:
    if not amount.isdigit() or int(amount) < 1:
        raise UsageError(
            f"{name} is generated and needs a number of rows, as in {name}=1000, not {amount or 'nothing'!r}."
        )
    return int(amount)


def _gather_rows(source: Source, files: Iterable[Iterator[PlacedRow]]) -> Iterator[PlacedRow]:
    """The rows of all files, after the source's `gather` has regrouped them."""
    gather = source.gather or iter
    if source.restarts_per_file:
        return chain.from_iterable(map(gather, files))
    return gather(chain.from_iterable(files))


def source_parts(spec: str) -> list[SourcePart]:
    """Splits a source into parts that several processes can read in parallel, in the order of its rows.

    The parts depend only on the data, and together they have the same rows as the whole source. A generated source is a
    single part. A source with a `gather` function is a single part, too, unless `restarts_per_file` is set.
    """
    source, _ = split_spec(spec)
    if source.is_generated:
        return [SourcePart()]
    if path := local_path(spec):
        files = find_source_files(source, path)
        if source.gather and not source.restarts_per_file:
            return [SourcePart(tuple(FileSlice(file, bytes=file_size(file)) for file in files))]
        return [SourcePart(slices) for slices in split_files(files, divide=not source.gather and not source.read)]
    hub = open_hub_rows(spec)
    if hub.is_streamed:
        return [SourcePart()] if source.gather else [SourcePart(rows=(n, n + 1)) for n in range(hub.rows.num_shards)]
    rows = len(hub.rows)
    step = rows if source.gather else HUB_ROWS_PER_PART
    return [SourcePart(rows=(start, min(start + step, rows))) for start in range(0, rows, max(1, step))]


def note_unread(spec: str) -> ReadingNotes:
    """Notes about the files of a local folder or zip archive that a source does not read; empty for other sources.

    Raises:
        DataError: the folder has no file that the source can read.
    """
    source, folder = split_spec(spec)[0], local_path(spec)
    return note_unread_files(source, folder) if folder is not None and is_folder(folder) else ReadingNotes()


def source_digest(spec: str, persona: Persona | None = None) -> str:
    """sha256 of the content of a source: its local files (`files_digest`), its Hub arguments, or the persona it uses.

    Empty if the local files no longer exist or the Hub cannot be asked, because a token store made from them is still
    valid.
    """
    source, where = split_spec(spec)
    if source.is_generated:
        return _json_digest(asdict(persona or load_persona()) if source.about_persona else None)
    if not where:
        return _json_digest(source.hub)
    location = locate(spec)
    if location.dataset and location.dataset.is_own:
        return _json_digest([source.hub, location.dataset.revision])
    if location.dataset:
        try:
            return _json_digest([resolve(location.dataset).record(), dict(location.columns)])
        except RorchatError:
            return ""
    path = location.path or Path()
    try:
        files = find_source_files(source, path)
    except DataError:
        return ""
    folders = {folder for file in files for folder in (file.parent, file.parent.parent)}
    beside = {file for folder in folders for pattern in source.beside for file in folder.glob(pattern)}
    digest = files_digest(sorted({*files, *beside}), path if path.is_dir() else path.parent)
    return _json_digest([digest, dict(location.columns)]) if location.columns else digest


def _json_digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hub_fingerprint(spec: str) -> str:
    """The commit of a dataset on the Hub. Empty for other sources, and if the Hub cannot be asked."""
    dataset = locate(spec).dataset
    return (resolve(dataset).revision or "") if dataset else ""


def hub_record(spec: str) -> dict[str, str]:
    """The dataset, config, split and revision of a pinned spec, as run.json records them; empty for other specs."""
    name = spec.partition("=")[0].removeprefix(CHAT_PREFIX)
    dataset = locate(spec).dataset if name in list_sources() else None  # a store may have an origin of another kind
    return dataset.record() if dataset and dataset.is_pinned else {}


def source_licence(spec: str) -> str:
    """The licence of the rows of a source: of a dataset on the Hub, the one that its card states."""
    source, dataset = split_spec(spec)[0], locate(spec).dataset
    return source.licence if dataset is None or dataset.is_own else open_hub_rows(spec).licence


def iterate_texts(
    specs: list[str],
    seed: int = 0,
    persona: Persona | None = None,
    report: Callable[[RowStats], None] | None = None,
) -> Iterator[str]:
    """Yields all text of the sources, for training a tokenizer: documents, or the contents of messages.

    The text of the validation split is included, because the split is chosen later, when the sources are tokenized.

    Args:
        report: called with the counts of each source when it has been read, or when no more text is wanted.
    """
    for spec in specs:
        kind = split_spec(spec)[0].kinds[0]
        rows = load_rows(spec, kind, seed=seed, persona=persona)
        try:
            for row in rows:
                if kind == "document":
                    yield row["text"]
                else:
                    yield from (turn["content"] for part in row.values() for turn in part)
        finally:
            if report:
                report(rows.stats)
