"""Shared by all sources: their description and row statistics."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

from rorchat.reading.formats import read_rows
from rorchat.reading.long_texts import Limits
from rorchat.reading.notes import ReadingNotes, count_files
from rorchat.reading.slices import FileSlice
from rorchat.rows import ConvertedRow, RejectedRow

MAX_PLACES = 3  # recorded per reason of rejection
SHOWN_RULES = 5
OWN_FILES = "that of your files"  # the licence of a source that reads the user's own files
#: What to do about rows that were rejected for a reason.
REMEDIES = {
    "marked as bad": "A bad reply is only learned from beside a good one to the same prompt: where you have both, read "
    "them with the source 'preference' (columns chosen and rejected) for `rorchat dpo`.",
}
# The tokens on which training computes the loss, by kind of row
LOSS_BY_KIND = {
    "document": "every token",
    "conversation": "replies and their <|im_end|>",
    "preference": "chosen over rejected",
    "question": "sampled replies, by their rewards",
}

PlacedRow = tuple[str, Any]  # (place, raw row)


@dataclass(frozen=True)
class Source:
    """A dataset: its description, its location, and how its rows are read. Fields: docs/add_a_dataset.md."""

    name: str
    title: str
    kinds: tuple[str, ...]
    licence: str
    size: str
    hub: dict[str, str] | None = None
    files: tuple[str, ...] = ()
    raw: tuple[object, ...] = ()
    beside: tuple[str, ...] = ()
    restarts_per_file: bool = False
    about_persona: bool = False
    long_texts: Limits | None = None  # how long texts are cut; None: a document is never cut
    convert: Callable[[Any], dict | ConvertedRow] | None = None
    to_question: Callable[[Any], dict] | None = None
    read: Callable[..., Iterator[PlacedRow]] | None = None
    read_slice: Callable[[FileSlice], Iterator[PlacedRow]] = read_rows
    gather: Callable[[Iterator[PlacedRow]], Iterator[PlacedRow]] | None = None
    generate: Callable[..., Iterator[dict]] | None = None

    @classmethod
    def from_module(cls, name: str, module: ModuleType) -> "Source":
        """Creates a source from the constants (KIND, LICENCE, ...) and functions (convert, ...) of a module."""
        values = {key.lower(): value for key, value in vars(module).items() if key.lower() in cls.__dataclass_fields__}
        kinds = module.KIND if isinstance(module.KIND, tuple) else (module.KIND,)
        kinds += ("question",) if "to_question" in values else ()
        return cls(**{**values, "name": name, "title": (module.__doc__ or "").partition("\n")[0], "kinds": kinds})

    @property
    def is_generated(self) -> bool:
        return self.generate is not None


def licence_restriction(licence: str) -> str:
    """Returns a short warning if a licence restricts the use of the data, otherwise an empty string."""
    if "not for commercial use" in licence:
        return "not for commercial use"
    return "no licence stated" if licence.startswith("unstated") else ""


@dataclass
class RowStats:
    """Counts of the rows of a source. `rows_in == kept + sum(rejects.values())` always holds."""

    source: str
    licence: str = ""
    rows_in: int = 0
    kept: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    repairs: dict[str, int] = field(default_factory=dict)  # kept rows that were repaired
    rules: dict[str, int] = field(default_factory=dict)  # rows by the rule that found their turns; some are withdrawn
    text_columns: list[str] = field(default_factory=list)  # of the first row that lacks the columns to read
    unread_columns: dict[str, int] = field(default_factory=dict)  # rows with a long text that is not read, by column
    cut: int = 0  # kept rows of which a part did not fit into the context window
    cuts: dict[str, int] = field(default_factory=dict)  # the same by what was left out; a row may have several
    hub: dict[str, str] = field(default_factory=dict)  # dataset, config, split and revision of rows from the Hub
    reading: ReadingNotes = field(default_factory=ReadingNotes)
    limits: Limits | None = None  # at which long texts are cut
    held_out: str = ""  # what was done so that neither split is empty; empty if nothing

    @classmethod
    def from_record(cls, record: dict) -> "RowStats":
        """Reads the counts of a part, as written with `record`."""
        return cls(**{**record, "reading": ReadingNotes(**record["reading"])})

    def record(self) -> dict:
        """The counts as JSON values."""
        return {key: value for key, value in asdict(self).items() if key != "limits"}

    def reject(self, place: str, rejected_row: RejectedRow) -> None:
        reason = rejected_row.reason
        self.rejects[reason] = self.rejects.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < MAX_PLACES:
            places.append(rejected_row.describe_place(place))

    def count_kept(self, rule: str, *repairs: str, unread: Sequence[str] = ()) -> None:
        """Counts how a row was read: the rule that found its turns, if there is one, what was repaired or not read."""
        if rule:
            self.rules[rule] = self.rules.get(rule, 0) + 1
        for repair in repairs:
            self.repairs[repair] = self.repairs.get(repair, 0) + 1
        for column in unread:
            self.unread_columns[column] = self.unread_columns.get(column, 0) + 1

    def withdraw(self, place: str, rejected_row: RejectedRow) -> None:
        """Rejects a row that has been counted as kept."""
        self.kept -= 1
        self.reject(place, rejected_row)

    def count_cut(self, *parts: str) -> None:
        """Counts a kept row that was truncated, by the parts of it that were left out; none if it is complete."""
        self.cut += bool(parts)
        for part in parts:
            self.cuts[part] = self.cuts.get(part, 0) + 1

    def add(self, other: "RowStats") -> None:
        """Adds the counts of a later part of the same source."""
        self.rows_in, self.kept, self.cut = self.rows_in + other.rows_in, self.kept + other.kept, self.cut + other.cut
        self.text_columns = self.text_columns or other.text_columns
        for name in ("rejects", "repairs", "rules", "cuts", "unread_columns"):
            counts, other_counts = vars(self)[name], vars(other)[name]
            for reason, count in other_counts.items():
                counts[reason] = counts.get(reason, 0) + count
        self.reading.add(other.reading)
        for reason, places in other.places.items():
            self.places[reason] = [*self.places.get(reason, []), *places][:MAX_PLACES]

    def summary(self) -> dict[str, object]:
        """Returns the counts, as written to run.json."""
        names = ("source", "licence", "rows_in", "kept", "rejects", "repairs", "rules", "unread_columns", "cut", "cuts")
        return {name: vars(self)[name] for name in names} | ({"hub": self.hub} if self.hub else {})

    def most_frequent_rejects(self) -> list[tuple[str, int]]:
        """Returns (reason, count) pairs, the most frequent reason first."""
        return sorted(self.rejects.items(), key=lambda item: -item[1])

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.kept:,} of {self.rows_in:,} rows kept"]
        if self.hub:
            lines.append(f"  from the Hub: {', '.join(f'{key} {value}' for key, value in self.hub.items())}")
        if self.hub or licence_restriction(self.licence):
            lines.append(f"  licence: {self.licence}")
        lines += self._describe_reading()
        lines += self.describe_rules()
        lines += [f"  {count:,} of them truncated: {part}" for part, count in self.cuts.items()]
        lines += [f"  {count:,} of them repaired: {repair}" for repair, count in self.repairs.items()]
        lines += [
            f"  column {column!r} is not read: {count:,} rows have text there. If the replies depend on it, rename it "
            "to 'system', or put it into the prompt"
            for column, count in self.unread_columns.items()
            if 2 * count > self.kept
        ]
        for reason, count in self.most_frequent_rejects():
            lines.append(f"  {count:,} rejected: {reason}, first at {'; '.join(self.places[reason])}")
            lines += [f"    {REMEDIES[reason]}"] if reason in REMEDIES else []
        lines += [f"  {self.held_out}"] if self.held_out else []
        return to_printable("\n".join(lines))

    def describe_rules(self) -> list[str]:
        """Where the turns of the rows were found, and who is the user: a line for each rule."""
        rules = sorted(self.rules.items(), key=lambda item: -item[1])
        lines = [f"  {count:,} row{'s' * (count > 1)} read as {rule}" for rule, count in rules[:SHOWN_RULES]]
        return lines + ([f"  and by {len(rules) - SHOWN_RULES:,} other rules"] if rules[SHOWN_RULES:] else [])

    def _describe_reading(self) -> list[str]:
        reading, lines = self.reading, []
        if reading.long_texts and self.limits:
            files = f"{count_files(reading.files)}, " if reading.files else ""  # none are known on the Hub
            lines.append(
                f"  {files}{self.rows_in:,} documents, which are the rows: {self.limits.describe(reading.long_texts)}"
            )
        folder = self.source.partition("=")[2]
        lines += [f"  {line}" for line in reading.describe_decoded(folder)]
        return lines + ([f"  {unread}"] if (unread := self.describe_unread()) else [])

    def describe_unread(self) -> str:
        """The files of the source that were not read, with their share of the bytes and the reasons; empty if none."""
        reading, folder = self.reading, self.source.partition("=")[2]
        if not reading.unread:
            return ""
        files = f"{count_files(len(reading.unread))} not read{reading.describe_share()}"
        return to_printable(f"{files}: {reading.describe_unread(folder)}")

    def describe_rejects(self) -> str:
        """How many rows were rejected, by reason, with the first place of each; empty if none."""
        reasons = self.most_frequent_rejects()
        return "; ".join(f"{count:,} {reason}, first at {self.places[reason][0]}" for reason, count in reasons)


def to_printable(text: str) -> str:
    """Escapes characters that UTF-8 cannot encode, which may come from file names."""
    return text.encode(errors="backslashreplace").decode()
