"""RAW DATA: one file = one dataset; the file's name is the dataset's name in a recipe.

A source module holds, as data and one pure function:

    KIND      "document", "conversation" or "preference"
    LICENCE   as its publisher states it
    HUB       arguments of `datasets.load_dataset` (Parquet or plain files), or None
    FILES     glob patterns of its files in a local folder, best first
    RAW       some raw rows: they document the format, and are its test
    convert   raw row -> a row of its kind, raising `Reject` for a row that cannot be used
    read      optional: (place, raw row) of a local path, where the original files are of no common format

Generated sources (tinytown, persona) have `generate(kind, amount, seed, persona)` instead. To add a dataset, copy
`alpaca.py` and change these names.
"""

import hashlib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from rorchat.errors import DataError, RemoteError, UsageError, did_you_mean
from rorchat.persona import Persona
from rorchat.sources._read import read_rows
from rorchat.sources._rows import CHECKS, KINDS, ROLES, Reject, check_messages

__all__ = [
    "CHECKS", "KINDS", "ROLES", "Reject", "Rows", "Tally",
    "available", "check_messages", "find", "in_validation",
    "local_bytes", "load", "texts",
]  # fmt: skip

PLACES_KEPT = 3  # how many places of each reject reason are shown


def available() -> list[str]:
    """The names of all sources, which are the names of the files here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> ModuleType:
    """The module of a source.

    Raises:
        UsageError: there is no such source; names the nearest.
    """
    if name not in available():
        raise UsageError(
            f"No source named {name!r}.{did_you_mean(name, available())} Available: {', '.join(available())}. "
            "To add one, copy rorchat/sources/alpaca.py."
        )
    return importlib.import_module(f"rorchat.sources.{name}")


@dataclass
class Tally:
    """Where the rows of a source went: `rows_in == kept + sum(rejects)`, always."""

    source: str
    rows_in: int = 0
    kept: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    cut: int = 0  # kept rows that lost their last turns to the window

    def reject(self, place: str, reject: Reject) -> None:
        self.rejects[reject.reason] = self.rejects.get(reject.reason, 0) + 1
        places = self.places.setdefault(reject.reason, [])
        if len(places) < PLACES_KEPT:
            places.append(f"{place} ({reject.detail})" if reject.detail else place)

    def withdraw(self, place: str, reject: Reject) -> None:
        """Rejects a row that was counted as kept, for a reason that only a later stage can see."""
        self.kept -= 1
        self.reject(place, reject)

    def summary(self) -> dict:
        """What a run remembers of a source."""
        licence = find(self.source.partition("=")[0]).LICENCE
        return {
            "source": self.source,
            "licence": licence,
            "rows_in": self.rows_in,
            "kept": self.kept,
            "rejects": self.rejects,
            "cut": self.cut,
        }

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.kept:,} of {self.rows_in:,} rows kept"]
        if self.cut:
            lines.append(f"  {self.cut:,} of them lost their last turns: they are longer than the window")
        for reason, count in sorted(self.rejects.items(), key=lambda item: -item[1]):
            lines.append(f"  {count:,} rejected: {reason}, first at {'; '.join(self.places[reason])}")
        return "\n".join(lines)


@dataclass
class Rows:
    """The usable rows of a source, checked one by one; `tally` counts while they are read.

    `place` is that of the row given last.
    """

    spec: str
    kind: str
    module: ModuleType
    raw: Iterator[tuple[str, object]]
    tally: Tally
    place: str = ""

    def __iter__(self) -> Iterator[dict]:
        for place, raw in self.raw:
            self.tally.rows_in += 1
            try:
                if isinstance(raw, Reject):
                    raise raw
                row = raw if hasattr(self.module, "generate") else self.module.convert(raw)
                CHECKS[self.kind](row)
            except Reject as reject:
                self.tally.reject(place, reject)
                continue
            self.tally.kept += 1
            self.place = place
            yield row
        if not self.tally.rows_in:
            raise DataError(f"{self.spec} is empty: there is no row in it.")
        if not self.tally.kept:
            raise DataError(f"No row of {self.spec} can be used. {' '.join(str(self.tally).split())}.")


def load(spec: str, kind: str, *, seed: int = 0, persona: Persona | None = None) -> Rows:
    """The rows of one source, read lazily.

    Args:
        spec: `NAME`, from the Hub; `NAME=PATH`, a local file or folder in the original format; or `NAME=AMOUNT` for a
            generated source. `alpaca`, `alpaca=data/alpaca_data.json`, `tinytown=20000`.
        kind: what the caller needs: "document", "conversation" or "preference".
        seed, persona: for generated sources.

    Raises:
        UsageError: no such source, or a source of another kind.
        DataError: nothing is at the path, or (while reading) no row can be used.
        RemoteError: the Hub cannot be reached.
    """
    name, _, where = spec.partition("=")
    module = find(name)
    kinds = module.KIND if isinstance(module.KIND, tuple) else (module.KIND,)
    if kind not in kinds:
        fitting = [other for other in available() if kind in _kinds_of(other)]
        raise UsageError(
            f"Source {name!r} gives {' and '.join(f'{k}s' for k in kinds)}, but here go {kind}s: {', '.join(fitting)}."
        )
    if hasattr(module, "generate"):
        raw = _generated(module, name, kind, where, seed, persona)
    elif where:
        reader = getattr(module, "read", None)
        path = Path(where).expanduser()
        raw = reader(path) if reader else read_rows(path, module.FILES)
    else:
        raw = _from_hub(name, module)
    return Rows(spec, kind, module, iter(raw), Tally(spec))


def _kinds_of(name: str) -> tuple[str, ...]:
    kind = find(name).KIND
    return kind if isinstance(kind, tuple) else (kind,)


def _generated(module: ModuleType, name: str, kind: str, amount: str, seed: int, persona: Persona | None):
    if not amount.isdigit() or int(amount) < 1:
        raise UsageError(
            f"{name} is generated: say how many rows, as in {name}=1000; this says {amount or 'nothing'!r}."
        )
    rows = module.generate(kind, int(amount), seed, persona)
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows))


def _from_hub(name: str, module: ModuleType) -> Iterator[tuple[str, object]]:
    if module.HUB is None:
        raise UsageError(f"{name} has no home on the Hub: give a file or folder, as in {name}=PATH.")
    import datasets

    try:
        rows = datasets.load_dataset(**module.HUB)
    except Exception as error:  # datasets raises whatever its transport raises: OSError, httpx, its own
        said = " ".join(str(error).split())[:160]
        raise RemoteError(
            f"{module.HUB['path']} cannot be read from the Hub ({said}). With a local copy: {name}=PATH."
        ) from error
    return ((f"{module.HUB['path']}, row {number}", row) for number, row in enumerate(rows))


def local_bytes(spec: str) -> int:
    """The size of a source's local files, 0 for what comes from the Hub or is generated: to notice when they change."""
    where = spec.partition("=")[2]
    path = Path(where).expanduser()
    files = [path] if path.is_file() else path.rglob("*") if where and path.is_dir() else []
    return sum(file.stat().st_size for file in files if file.is_file())


def in_validation(text: str, share: float) -> bool:
    """Whether a text is held out from training: decided by a hash of its words, before anything is mixed.

    Exact duplicates, and those that differ in case or white space alone, always fall on the same side.
    """
    words = " ".join(text.lower().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8]) < share * 2**64


def texts(specs: list[str], seed: int = 0, persona: Persona | None = None) -> Iterator[str]:
    """All text of some sources of any kind, for training a tokenizer: documents, or the contents of messages."""
    for spec in specs:
        kind = _kinds_of(spec.partition("=")[0])[0]
        for row in load(spec, kind, seed=seed, persona=persona):
            if kind == "document":
                yield row["text"]
            else:
                yield from (turn["content"] for part in row.values() for turn in part)
