"""Mixtures that are over: how a run keeps them, so that its whole plan can be made again when their data are gone.

A part of the past is JSON in the run's identity, and so in every checkpoint:

    until     the row at which it ended, counted from the beginning
    mixture   what was mixed (`MixtureConfig.resolved`)
    sources   {spec: digest} of what it was mixed of
    windows   {name: rows of an epoch} of the sources that could be had
    data      the summaries of all stores up to here, licences too
"""

from collections.abc import Sequence

from rorchat.errors import MismatchError
from rorchat.mixture.config import MixtureConfig
from rorchat.mixture.plan import Plan
from rorchat.sources.registry import find_source
from rorchat.tokens.store import TokenStore


def history_entry(identity: dict, until: int) -> dict[str, object]:
    """What a run mixes as a part of its past that ended at a row."""
    inputs = {key: identity["inputs"][key] for key in ("mixture", "sources")}
    return {"until": until, **inputs, "windows": identity["windows"], "data": identity["data"]}


def spec_without_path(spec: str) -> str:
    """A source's spec; of one that is read from files its kind alone, for they may lie elsewhere tomorrow."""
    kind, _, where = spec.partition("=")
    is_local = bool(where) and (kind == "store" or not find_source(kind).is_generated)
    return kind if is_local else spec


def without_paths(inputs: dict) -> dict:
    """The inputs of an identity without the places of files: sources have the names of the mixture and their digests.

    Where there is no mixture, their names are kinds and digests.
    """
    sources = inputs.get("sources", {})
    if "mixture" not in inputs:
        return inputs | {"sources": {name: sources[spec] for spec, name in names_without_paths(sources).items()}}
    mixed = inputs["mixture"]["sources"]
    placeless = {name: source | {"spec": spec_without_path(source["spec"])} for name, source in mixed.items()}
    digests = {name: sources.get(source["spec"], "") for name, source in mixed.items()}
    return inputs | {"sources": digests, "mixture": inputs["mixture"] | {"sources": placeless}}


def names_without_paths(sources: dict[str, str]) -> dict[str, str]:
    """For {spec: digest}, of each spec a name that does not say where files lie."""
    places = {spec: spec_without_path(spec) for spec in sources}
    return {spec: kind if kind == spec else f"{kind}={sources[spec] or spec}" for spec, kind in places.items()}


def require_same_data(past: Sequence[dict], inputs: dict) -> None:
    """Raises MismatchError where a source has the name of one of the past and is made of something else."""
    now = _made_of(inputs)
    for part in past:
        for name, before in _made_of(part).items():
            if name in now and _differ(before, now[name]):
                raise MismatchError(
                    f"Source {name!r} was {_said(part, name)} up to row {part['until']:,} and is "
                    f"{_said(inputs, name)} now: what goes on under its name must be the same data, filters included. "
                    "Give it another name in a mixture file."
                )


def _made_of(part: dict) -> dict[str, tuple]:
    """What the data of each source hang on, by name; where a store lies plays no part."""
    mixture, found = part["mixture"], {}
    for name, source in mixture["sources"].items():
        digest = part["sources"].get(source["spec"])
        what = spec_without_path(source["spec"])
        found[name] = (digest,) if what == "store" else (digest, what, source["filters"], list(mixture["against"]))
    return found


def _differ(before: tuple, now: tuple) -> bool:
    """Whether two sources are made of something else; files that are gone have not changed."""
    known = before[0] and now[0]
    return before[1:] != now[1:] or bool(known and before[0] != now[0])


def _said(part: dict, name: str) -> str:
    spec = part["mixture"]["sources"][name]["spec"]
    return f"{spec} ({(part['sources'].get(spec) or 'gone')[:12]})"


def build_plan(
    past: Sequence[dict], config: MixtureConfig, windows: dict[str, int], rows: int, block_size: int
) -> Plan:
    """The plan of all rows of a run: those of the past as they were, and behind them those of `config`.

    Args:
        windows: rows of one epoch of the sources that there are now.

    Raises:
        MismatchError: a source that goes on has another number of rows than it had.
        UsageError, DataError: as `Plan`.
    """
    plan, start = None, 0
    for part in past:
        for name, before in part["windows"].items():
            if windows.get(name, before) != before:
                raise MismatchError(
                    f"Source {name!r} had {before:,} rows up to row {part['until']:,} and has {windows[name]:,} now: "
                    "what goes on under its name must be the same data. Give it another name in a mixture file."
                )
        plan = Plan(MixtureConfig.from_dict(part["mixture"]), part["windows"], rows, block_size, plan, start)
        start = part["until"]
    return Plan(config, windows, rows, block_size, plan, start)


def data_summaries(past: Sequence[dict], stores: Sequence[TokenStore]) -> list[dict[str, object]]:
    """The summaries of all stores that a run has read or will read, those of the past first."""
    before = past[-1]["data"] if past else []
    return [*before, *(found for store in stores if (found := store.manifest.summary()) not in before)]
