"""The mixture history of a run: its earlier mixtures, from which the plan can be rebuilt without their data.

The entries are stored as JSON in run.json and in every checkpoint:

    until     the row at which the mixture ended, counted from the start of the run
    mixture   the mixture (`MixtureConfig.to_dict`)
    sources   {spec: digest} of the sources
    windows   {name: rows per epoch} of the available sources
    data      the summaries of all stores used so far, with their licences
"""

from collections.abc import Sequence

from rorchat.errors import MismatchError
from rorchat.mixture.mixture_file import MixtureConfig
from rorchat.mixture.plan import Plan
from rorchat.sources.registry import find_source
from rorchat.tokens.store import TokenStore


def history_entry(record: dict, until: int) -> dict[str, object]:
    """Returns the history entry for the current mixture of a run, which ends at row `until`."""
    inputs = {key: record["inputs"][key] for key in ("mixture", "sources")}
    return {"until": until, **inputs, "windows": record["windows"], "data": record["data"]}


def spec_without_path(spec: str) -> str:
    """Returns the part before "=" of a spec of local files, which may be moved, and any other spec unchanged."""
    kind, _, where = spec.partition("=")
    is_local = bool(where) and (kind == "store" or not find_source(kind).is_generated)
    return kind if is_local else spec


def without_paths(inputs: dict) -> dict:
    """Returns the inputs of a run without paths.

    Sources are identified by name and digest. Without a mixture, the name is the spec with a digest instead of a path.
    """
    sources = inputs.get("sources", {})
    if "mixture" not in inputs:
        return inputs | {"sources": {name: sources[spec] for spec, name in names_without_paths(sources).items()}}
    mixed = inputs["mixture"]["sources"]
    specs = {name: source | {"spec": spec_without_path(source["spec"])} for name, source in mixed.items()}
    digests = {name: sources.get(source["spec"], "") for name, source in mixed.items()}
    return inputs | {"sources": digests, "mixture": inputs["mixture"] | {"sources": specs}}


def names_without_paths(sources: dict[str, str]) -> dict[str, str]:
    """Converts {spec: digest} to {spec: name}, where a name contains no path."""
    kinds = {spec: spec_without_path(spec) for spec in sources}
    return {spec: kind if kind == spec else f"{kind}={sources[spec] or spec}" for spec, kind in kinds.items()}


def require_same_data(mixture_history: Sequence[dict], inputs: dict) -> None:
    """Raises MismatchError if a source has the same name as an earlier one but different data."""
    current = _content_by_name(inputs)
    for entry in mixture_history:
        for name, before in _content_by_name(entry).items():
            if name in current and _differs(before, current[name]):
                raise MismatchError(
                    f"Source {name!r} was {_describe_source(entry, name)} up to row {entry['until']:,} and is now "
                    f"{_describe_source(inputs, name)}: a source that keeps its name must have the same data and "
                    "filters. Give it another name in a mixture file."
                )


def _content_by_name(entry: dict) -> dict[str, tuple]:
    """Maps the name of each source to the values that determine its data. Paths are ignored."""
    mixture, content = entry["mixture"], {}
    for name, source in mixture["sources"].items():
        digest = entry["sources"].get(source["spec"])
        kind = spec_without_path(source["spec"])
        content[name] = (digest,) if kind == "store" else (digest, kind, source["filters"], list(mixture["against"]))
    return content


def _differs(before: tuple, now: tuple) -> bool:
    """Whether the data of a source differs. Missing files have no digest and count as unchanged."""
    both_exist = before[0] and now[0]
    return before[1:] != now[1:] or bool(both_exist and before[0] != now[0])


def _describe_source(entry: dict, name: str) -> str:
    spec = entry["mixture"]["sources"][name]["spec"]
    return f"{spec} ({(entry['sources'].get(spec) or 'missing')[:12]})"


def build_plan(
    mixture_history: Sequence[dict], config: MixtureConfig, rows_per_epoch: dict[str, int], rows: int, block_size: int
) -> Plan:
    """Builds the plan of all rows of a run. The rows of earlier mixtures are unchanged; those of `config` follow.

    Args:
        rows_per_epoch: source -> rows in one epoch, for the sources of `config`.
        rows: rows of the whole run.

    Raises:
        MismatchError: a source that is used again has a different number of rows than before.
        UsageError, DataError: as for `Plan`.
    """
    plan, start = None, 0
    for entry in mixture_history:
        for name, before in entry["windows"].items():
            if rows_per_epoch.get(name, before) != before:
                raise MismatchError(
                    f"Source {name!r} had {before:,} rows up to row {entry['until']:,} and now has "
                    f"{rows_per_epoch[name]:,}: a source that keeps its name must have the same data. Give it another "
                    "name in a mixture file."
                )
        plan = Plan(MixtureConfig.from_dict(entry["mixture"]), entry["windows"], rows, block_size, plan, start)
        start = entry["until"]
    return Plan(config, rows_per_epoch, rows, block_size, plan, start)


def data_summaries(mixture_history: Sequence[dict], stores: Sequence[TokenStore]) -> list[dict[str, object]]:
    """Returns the summaries of all stores of a run, starting with those of earlier mixtures."""
    before = mixture_history[-1]["data"] if mixture_history else []
    summaries = [store.manifest.summary() for store in stores]
    return [*before, *(summary for summary in summaries if summary not in before)]
