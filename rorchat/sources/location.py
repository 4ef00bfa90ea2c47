"""Where the rows of a source are: the part of a spec after `NAME=`.

PATH                                                    a local file or folder
OWNER/NAME[:CONFIG][:split=SPLIT][@REVISION]            a dataset of the Hub, also as hf://datasets/OWNER/NAME...
:streaming=true, :streaming=false                       whether its rows are streamed or downloaded first
:ROLE=COLUMN                                            the columns to read, of local files as well
@COMMIT                                                 a commit of the source's own dataset on the Hub: alpaca=@COMMIT

A local path takes precedence over a dataset of the same name, unless a configuration, split or revision is given.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from rorchat.errors import UsageError, did_you_mean
from rorchat.reading.encodings import COMPRESSIONS
from rorchat.reading.formats import READERS
from rorchat.reading.zip_files import file_exists
from rorchat.sources.base import Source
from rorchat.sources.columns import all_roles, check_roles, quote_column, takes_columns
from rorchat.sources.hub_dataset import HubDataset

EXPLICIT = "hf://datasets/"  # prefix that says that a dataset of the Hub is meant
HUB_OPTIONS = ("split", "streaming")

_WHERE = re.compile(r"(?P<base>.*?)(?P<options>(?::[A-Za-z_]+=[^:@]*)*)(?:@(?P<revision>[^@:]+))?")
_HUB_NAME = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[^:=@]+))?")


@dataclass(frozen=True)
class Location:
    """Where the rows of a source are, and which columns are read. Both empty: the dataset that the source names.

    Attributes:
        path: a local file or folder.
        dataset: a dataset of the Hub.
        columns: role -> column, as given; empty if columns with known names are read.
    """

    path: Path | None = None
    dataset: HubDataset | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def parse_location(source: Source, where: str) -> Location:
    """Where the rows of a source are.

    Raises:
        UsageError: an option is unknown or has a wrong value, or the source cannot read the columns.
    """
    if not where:
        return Location()
    path = Path(where).expanduser()
    if file_exists(path):
        _tell_precedence(where)
        return Location(path)
    match = _WHERE.fullmatch(where)
    base, options, revision = match.group("base", "options", "revision") if match else (where, "", None)
    local, hub = Path(base).expanduser(), _match_hub_name(base)
    own = None if base else HubDataset.of_source(source)  # `alpaca=@COMMIT`
    if not hub and not own and (not base or not file_exists(local)):
        return Location(path)
    values = _parse_options(source, options, where)
    columns = {role: column for role, column in values.items() if role not in HUB_OPTIONS}
    if columns:
        check_roles(source.name, columns)
    for_hub = bool(revision) or len(columns) < len(values)  # a local path has no revision or split
    if base and file_exists(local) and not (hub and for_hub):
        if for_hub:
            raise UsageError(
                f"{base} is a local path, which has no revision, split or streaming: omit them in {where!r}."
            )
        _tell_precedence(base)
        return Location(local, columns=columns)
    streaming = {"true": True, "false": False, None: None}[values.get("streaming")]
    if own:
        if "split" in values or columns:
            raise UsageError(f"{source.name}={where}: its split and columns are fixed; only @REVISION can be given.")
        return Location(dataset=replace(own, revision=revision or own.revision, streaming=streaming))
    assert hub is not None, "neither a path nor the source's own dataset"
    config = unquote(hub["config"]) if hub["config"] else None
    dataset = HubDataset(hub["path"], config, values.get("split"), revision, streaming, source=source.name)
    return Location(dataset=dataset, columns=columns)


def _match_hub_name(base: str) -> re.Match | None:
    """The match of OWNER/NAME[:CONFIG]; None for what can only be a path, such as `data/rows.jsonl`."""
    match = _HUB_NAME.fullmatch(base.removeprefix(EXPLICIT))
    if match and not base.startswith(EXPLICIT) and Path(match["path"]).suffix.lower() in (*READERS, *COMPRESSIONS):
        return None
    return match


def may_name_dataset(text: str) -> bool:
    """Whether a text can be the name of a dataset on the Hub."""
    return _match_hub_name(text) is not None


def _parse_options(source: Source, options: str, where: str) -> dict[str, str]:
    values = {}
    known = (*HUB_OPTIONS, *all_roles(source.name))
    for option in options.split(":")[1:]:
        key, _, value = option.partition("=")
        if key not in known:
            raise UsageError(f"{where!r}: unknown option {key!r}.{did_you_mean(key, known)} Known: {', '.join(known)}.")
        if not value or (key == "streaming" and value not in ("true", "false")):
            expected = "true or false" if key == "streaming" else "a name"
            raise UsageError(f"{where!r}: {key} is {value!r}; give {expected}.")
        values[key] = unquote(value)
    return values


@lru_cache  # once per process
def _tell_precedence(where: str) -> None:
    if Path(where).is_dir() and _match_hub_name(where):
        print(  # noqa: T201
            f"{where}: the local folder is read; for the dataset of this name on the Hub, give {EXPLICIT}{where}",
            file=sys.stderr,
        )


def add_columns(specs: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """Specs in which every source that takes these columns reads them.

    Raises:
        UsageError: no source takes them.
    """
    if not columns:
        return list(specs)
    takers = [spec for spec in specs if "=" in spec and takes_columns(spec.partition("=")[0], columns)]
    if not takers:
        for spec in specs or [""]:
            check_roles(spec.partition("=")[0], columns)
    options = format_columns(columns)
    return [_insert_options(spec, options) if spec in takers else spec for spec in specs]


def format_columns(columns: Mapping[str, str]) -> str:
    """Columns as options of a spec; `parse_location` gives the same columns."""
    return "".join(f":{role}={quote_column(column)}" for role, column in columns.items())


def _insert_options(spec: str, options: str) -> str:
    """A spec with options before its revision. Nothing is added twice."""
    name, _, where = spec.partition("=")
    if file_exists(Path(where).expanduser()):
        return f"{name}={where}{options}"
    match = _WHERE.fullmatch(where)
    if match is None or options in match["options"]:
        return spec
    revision = f"@{match['revision']}" if match["revision"] else ""
    return f"{name}={match['base']}{match['options']}{options}{revision}"


def format_spec(name: str, location: Location) -> str:
    """The spec of rows on the Hub; `parse_location` gives the same location."""
    dataset = location.dataset
    assert dataset is not None, "only for rows on the Hub"
    options = f":streaming={str(dataset.streaming).lower()}" if dataset.streaming is not None else ""
    if not dataset.is_own:
        config = f":{quote_column(dataset.config)}" if dataset.config else ""
        split = f":split={dataset.split}" if dataset.split else ""
        options = f"{dataset.path}{config}{split}{options}{format_columns(location.columns)}"
    return f"{name}={options}" + (f"@{dataset.revision}" if dataset.revision else "")
