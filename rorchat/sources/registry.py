"""Finds a source by its name and reads its rows one by one."""

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import ModuleType

from rorchat import sources
from rorchat.errors import DataError, RemoteError, UsageError, did_you_mean
from rorchat.persona import Persona, load_persona
from rorchat.reading.formats import FileSlice
from rorchat.reading.slices import files_digest, find_files, is_hidden, split_files
from rorchat.rows import CHECKS, RejectedRow, RepairedRow
from rorchat.sources.base import licence_restriction

CHAT_PREFIX = "chat:"  # before a source's name: its conversations
PLACES_KEPT = 3  # how many places of each reject reason are shown
HUB_ROWS_PER_PART = 20_000


def list_sources() -> list[str]:
    """The names of all sources, which are the names of the files here."""
    modules = {module.name for module in pkgutil.iter_modules(sources.__path__)}
    return sorted(modules - {"base", "registry"})


def find_source(name: str) -> ModuleType:
    """The module of a source.

    Args:
        name: a file's here, perhaps behind CHAT.

    Raises:
        UsageError: there is no such source, naming the nearest; or conversations are wanted, and it has none.
    """
    wanted, name = name, name.removeprefix(CHAT_PREFIX)
    if name not in list_sources():
        if "/" in name:
            raise UsageError(
                f"{name!r} is a path, and a source is wanted: text={name}, or another of `rorchat data list`."
            )
        raise UsageError(
            f"No source named {name!r}.{did_you_mean(name, list_sources())} Available: {', '.join(list_sources())}. "
            "To add one, see docs/add_a_dataset.md."
        )
    module = importlib.import_module(f"rorchat.sources.{name}")
    if wanted != name and "conversation" not in _kinds(module):
        gives = " and ".join(f"{kind}s" for kind in _kinds(module))
        raise UsageError(f"Source {name!r} gives {gives} and no conversations: leave {CHAT_PREFIX} out.")
    return module


def _kinds(module: ModuleType) -> tuple[str, ...]:
    kinds = module.KIND if isinstance(module.KIND, tuple) else (module.KIND,)
    return (*kinds, "question") if hasattr(module, "to_question") else kinds


def source_kinds(name: str) -> tuple[str, ...]:
    """The kinds of rows that a source gives; behind CHAT it gives conversations alone."""
    kinds = _kinds(find_source(name))
    return ("conversation",) if name.startswith(CHAT_PREFIX) else kinds


@dataclass
class RowStats:
    """Where the rows of a source went: `rows_in == kept + sum(rejects)`, always."""

    source: str
    rows_in: int = 0
    kept: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    repairs: dict[str, int] = field(default_factory=dict)  # kept rows that their source had to mend
    cut: int = 0  # kept rows that lost their last turns to the window

    def reject(self, place: str, reject: RejectedRow) -> None:
        self.rejects[reject.reason] = self.rejects.get(reject.reason, 0) + 1
        places = self.places.setdefault(reject.reason, [])
        if len(places) < PLACES_KEPT:
            places.append(f"{place} ({reject.detail})" if reject.detail else place)

    def withdraw(self, place: str, reject: RejectedRow) -> None:
        """Rejects a row that was counted as kept, for a reason that only a later stage can see."""
        self.kept -= 1
        self.reject(place, reject)

    def add(self, other: "RowStats") -> None:
        """Adds the counts of another part of the same source, which comes after this one."""
        self.rows_in, self.kept, self.cut = self.rows_in + other.rows_in, self.kept + other.kept, self.cut + other.cut
        for mine, others in ((self.rejects, other.rejects), (self.repairs, other.repairs)):
            for reason, count in others.items():
                mine[reason] = mine.get(reason, 0) + count
        for reason, places in other.places.items():
            self.places[reason] = [*self.places.get(reason, []), *places][:PLACES_KEPT]

    @property
    def licence(self) -> str:
        return find_source(self.source.partition("=")[0]).LICENCE

    def summary(self) -> dict:
        """What a run remembers of a source."""
        return {
            "source": self.source,
            "licence": self.licence,
            "rows_in": self.rows_in,
            "kept": self.kept,
            "rejects": self.rejects,
            "repairs": self.repairs,
            "cut": self.cut,
        }

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.kept:,} of {self.rows_in:,} rows kept"]
        if licence_restriction(self.licence):
            lines.append(f"  licence: {self.licence}")
        if self.cut:
            lines.append(f"  {self.cut:,} of them lost their last turns: they are longer than the window")
        lines += [f"  {count:,} of them repaired: {repair}" for repair, count in self.repairs.items()]
        for reason, count in sorted(self.rejects.items(), key=lambda item: -item[1]):
            lines.append(f"  {count:,} rejected: {reason}, first at {'; '.join(self.places[reason])}")
        return _printable("\n".join(lines))


def _printable(text: str) -> str:
    """A text as a terminal can take it: the name of a file may be no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


@dataclass
class SourceRows:
    """The usable rows of a source or of a part of one, checked one by one; `tally` counts while they are read.

    `place` is that of the row given last.
    """

    spec: str
    kind: str
    module: ModuleType
    raw: Iterator[tuple[str, object]]
    stats: RowStats
    whole: bool = True  # a source without a usable row is an error, a part of one is not
    on_reject: Callable[[str, RejectedRow, object], None] | None = (
        None  # hears of the place, the reason and the raw row
    )
    place: str = ""

    def __iter__(self) -> Iterator[dict]:
        for place, raw in self.raw:
            self.stats.rows_in += 1
            try:
                row = self._checked(raw)
            except RejectedRow as reject:
                self.stats.reject(place, reject)
                if self.on_reject:
                    self.on_reject(place, reject, raw)
                continue
            self.stats.kept += 1
            self.place = place
            yield row
        if self.whole:
            require_kept_rows(self.stats)

    def _checked(self, raw: object) -> dict:
        if isinstance(raw, RejectedRow):
            raise raw
        row = raw if hasattr(self.module, "generate") else self._converted(raw)
        repair = ""
        if isinstance(row, RepairedRow):
            row, repair = row.row, row.repair
        CHECKS[self.kind](row)
        if repair:
            self.stats.repairs[repair] = self.stats.repairs.get(repair, 0) + 1
        return row

    def _converted(self, raw: object) -> dict | RepairedRow:
        return self.module.to_question(raw) if self.kind == "question" else self.module.convert(raw)


def require_kept_rows(tally: RowStats) -> None:
    """Raises DataError where no row of a source could be used."""
    if not tally.rows_in:
        raise DataError(f"{tally.source} is empty: there is no row in it.")
    if not tally.kept:
        rejects = sorted(tally.rejects.items(), key=lambda item: -item[1])
        said = "; ".join(f"{count:,} {reason}, first at {tally.places[reason][0]}" for reason, count in rejects)
        raise DataError(
            f"No row of {tally.source} can be used: {said}. Mend them (`rorchat data check {tally.source} --rejects "
            "FILE` writes them all), or give another source."
        )


@dataclass(frozen=True)
class SourcePart:
    """A piece of a source that is read by itself: stretches of local files, or a range of the rows of the Hub's."""

    stretches: tuple[FileSlice, ...] = ()
    rows: tuple[int, int] | None = None

    def record(self) -> list:
        """Which piece it is, as JSON has it: to tell whether something was made of this one."""
        return [[str(s.path), s.start, s.stop, s.bytes] for s in self.stretches] or list(self.rows or ())


def load_rows(
    spec: str, kind: str, *, seed: int = 0, persona: Persona | None = None, part: SourcePart | None = None
) -> SourceRows:
    """The rows of one source, read lazily.

    Args:
        spec: `NAME`, from the Hub; `NAME=PATH`, a local file or folder in the original format; or `NAME=AMOUNT` for a
            generated source. `alpaca`, `alpaca=data/alpaca_data.json`, `tinytown=20000`, `chat:tinytown=5000`.
        kind: what the caller needs: "document", "conversation", "preference" or "question".
        seed, persona: for generated sources.
        part: one of `parts(spec)`; None for all of it.

    Raises:
        UsageError: no such source, or a source of another kind.
        DataError: nothing is at the path, or (while reading) no row can be used.
        RemoteError: the Hub cannot be reached.
    """
    name, _, where = spec.partition("=")
    module = find_source(name)
    if kind not in source_kinds(name):
        fitting = [other for other in list_sources() if kind in source_kinds(other)]
        gives = " and ".join(f"{k}s" for k in source_kinds(name))
        raise UsageError(f"Source {name!r} gives {gives}, but here go {kind}s: {', '.join(fitting)}.")
    if hasattr(module, "generate"):
        raw = _generated(module, name, kind, where, seed, persona)
    elif where:
        stretches = part.stretches if part else [FileSlice(file) for file in _files(module, where)]
        read = getattr(module, "read", None)
        raw = _gathered(module, (read(stretch.path) if read else stretch for stretch in stretches))
    else:
        rows = load_hub_rows(name)
        start, stop = part.rows if part else (0, len(rows))
        raw = _gathered(module, [((f"{module.HUB['path']}, row {n}", rows[n]) for n in range(start, stop))])
    return SourceRows(spec, kind, module, raw, RowStats(spec), whole=part is None)


def _gathered(module: ModuleType, files: Iterable[Iterable[tuple[str, object]]]) -> Iterator[tuple[str, object]]:
    """The rows of files one after the other, those that belong together in one."""
    gather = getattr(module, "gather", iter)
    if getattr(module, "RESTARTS_PER_FILE", False):
        return chain.from_iterable(map(gather, files))
    return gather(chain.from_iterable(files))


def _files(module: ModuleType, where: str) -> list[Path]:
    return find_files(Path(where).expanduser(), module.FILES, any_suffix=hasattr(module, "read"))


def source_parts(spec: str) -> list[SourcePart]:
    """A source in parts that several processes can read, in the order of its rows; their bounds depend on the data.

    A generated source is one part, and so is one whose rows belong together (`gather`), on the Hub or, unless it begins
    anew with every file, in local files. So a source has the same rows in parts as in one piece.
    """
    name, _, where = spec.partition("=")
    module = find_source(name)
    if hasattr(module, "generate"):
        return [SourcePart()]
    gathered = hasattr(module, "gather")
    if where:
        files = _files(module, where)
        if gathered and not getattr(module, "RESTARTS_PER_FILE", False):
            return [SourcePart(tuple(FileSlice(file, bytes=file.stat().st_size) for file in files))]
        divide = not gathered and not hasattr(module, "read")
        return [SourcePart(stretches) for stretches in split_files(files, divide=divide)]
    rows = len(load_hub_rows(name))
    step = rows if gathered else HUB_ROWS_PER_PART
    return [SourcePart(rows=(start, min(start + step, rows))) for start in range(0, rows, max(1, step))]


def _generated(module: ModuleType, name: str, kind: str, amount: str, seed: int, persona: Persona | None):
    if not amount.isdigit() or int(amount) < 1:
        raise UsageError(
            f"{name} is generated: say how many rows, as in {name}=1000; this says {amount or 'nothing'!r}."
        )
    rows = module.generate(kind, int(amount), seed, persona)
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows))


@lru_cache(maxsize=4)
def load_hub_rows(name: str):
    module = find_source(name)
    if module.HUB is None:
        raise UsageError(f"{name} has no home on the Hub: give a file or folder, as in {name}=PATH.")
    import datasets

    try:
        return datasets.load_dataset(**module.HUB)
    except Exception as error:  # datasets raises whatever its transport raises: OSError, httpx, its own
        said = " ".join(str(error).split())[:160]
        raise RemoteError(
            f"{module.HUB['path']} cannot be read from the Hub ({said}). With a local copy: {name}=PATH."
        ) from error


def unread_files(spec: str) -> list[str]:
    """The files of a local folder that a source leaves alone: FILES picks the best form of a dataset and no second."""
    name, _, where = spec.partition("=")
    folder = Path(where).expanduser()
    if hasattr(find_source(name), "generate") or not where or not folder.is_dir():
        return []
    read = set(_files(find_source(name), where))
    there = (file for file in folder.rglob("*") if file.is_file() and not is_hidden(file, folder))
    return sorted(_printable(str(file.relative_to(folder))) for file in there if file not in read)


def source_digest(spec: str, persona: Persona | None = None) -> str:
    """What a source is made of, as a sha256: its local files (`digest_of_files`), or what it takes from the Hub.

    Empty where local files are gone: what was made of them is still theirs. A generated source is its spec and seed,
    and the persona where that has a say.
    """
    name, _, where = spec.partition("=")
    module = find_source(name)
    if hasattr(module, "generate"):
        about = asdict(persona or load_persona()) if getattr(module, "ABOUT_PERSONA", False) else None
        return _sha256_of(about)
    if not where:
        return _sha256_of(module.HUB)
    try:
        files = _files(module, where)
    except DataError:
        return ""
    beside = {
        file
        for folder in {folder for file in files for folder in (file.parent, file.parent.parent)}
        for pattern in getattr(module, "BESIDE", ())
        for file in folder.glob(pattern)
    }
    path = Path(where).expanduser()
    return files_digest(sorted({*files, *beside}), path if path.is_dir() else path.parent)


def _sha256_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hub_fingerprint(spec: str) -> str:
    """What the Hub holds of a dataset now, as `datasets` tells one state of it from another; empty if it is not there.

    Of the repository's commit, the configuration and the split.
    """
    name, _, where = spec.partition("=")
    return "" if where or hasattr(find_source(name), "generate") else load_hub_rows(name)._fingerprint


def iterate_texts(specs: list[str], seed: int = 0, persona: Persona | None = None) -> Iterator[str]:
    """All text of some sources of any kind, for training a tokenizer: documents, or the contents of messages.

    What will be held out for validation is among it: where the split falls is decided when tokens are prepared.
    """
    for spec in specs:
        kind = source_kinds(spec.partition("=")[0])[0]
        for row in load_rows(spec, kind, seed=seed, persona=persona):
            if kind == "document":
                yield row["text"]
            else:
                yield from (turn["content"] for part in row.values() for turn in part)
