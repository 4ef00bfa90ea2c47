"""The mixture file: sources and phases, checked before any data is read.

    sources:
      c4: c4=../data/c4                                             # NAME: SPEC
      tales: {from: cosmopedia=$DATA/tales, max_epochs: 4, optional: true, filters: {min_characters: 200}}
      talk: chat:tinytown=5000                                      # conversations of a source that also has documents
      mine: store=../tokens/mine                                    # an existing token store
      web: {from: text=OWNER/DATASET@v2, columns: {text: body}}     # a dataset of the Hub, and which column is read
    against: [../data/gsm8k/test.jsonl]                             # reject documents that share 13 consecutive words
    phases:
      - {share: 60%, weights: {c4: 1}}                              # of all tokens; alternatively `tokens: 2_000_000`
      - {share: 20%, ramp_to: {c4: 1, tales: 3}, replay: 10%}       # linear ramp; 10 % of the previous mixture
      - {share: 20%}                                                # keeps the weights at the end of the previous phase

Weights are proportional to tokens and need not sum to 1. `$NAME` is an environment variable. In a mixture that is
appended to a run (`--new_phase`), the first phase may use `ramp_to` or `replay`, and shares refer to the remaining
tokens.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rorchat.errors import UsageError, did_you_mean
from rorchat.reading.filters import Filters
from rorchat.sources.columns import parse_columns
from rorchat.sources.location import add_columns
from rorchat.sources.registry import CHAT_PREFIX
from rorchat.stories import find_story_file
from rorchat.yaml_file import read_yaml

KEYS = ("sources", "against", "phases", "weights")
SOURCE_KEYS = ("from", "columns", "max_epochs", "optional", "filters")
_VARIABLE = re.compile(r"\$(?:\w+|\{[^}]*\})")  # as in os.path.expandvars
PHASE_KEYS = ("share", "tokens", "weights", "ramp_to", "replay")


@dataclass(frozen=True)
class Source:
    """One source of a mixture: its spec (such as `NAME=PATH`), the maximum number of epochs, and its filters."""

    spec: str
    max_epochs: float | None = None
    optional: bool = False
    filters: Filters = Filters()


@dataclass(frozen=True)
class Phase:
    """A phase of the mixture: its length and its weights.

    The length is given either as `tokens`, or as a `share` of the tokens that remain after all phases with `tokens`.
    A phase without `weights` and `ramp_to` keeps the weights at the end of the previous phase; if it is the first
    phase, sources are mixed by size.
    """

    share: float | None = None
    tokens: int | None = None
    weights: dict[str, float] | None = None
    ramp_to: dict[str, float] | None = None
    replay: float = 0.0


@dataclass(frozen=True)
class MixtureConfig:
    """The sources and phases of a mixture, as configured. Error messages name `where`, the file."""

    sources: dict[str, Source]
    phases: tuple[Phase, ...] = (Phase(share=1.0),)
    where: str = "the mixture"
    against: tuple[str, ...] = ()  # evaluation sets; documents that share 13 consecutive words are rejected

    @classmethod
    def from_specs(cls, specs: Sequence[str], weights: Sequence[float] | None = None) -> "MixtureConfig":
        """Creates a mixture with one phase. Without weights, sources are mixed by size.

        Sources are named by `name_sources`.

        Raises:
            UsageError: the numbers of weights and sources differ, or a weight is not positive.
        """
        sources = {name: Source(spec) for name, spec in zip(name_sources(specs), specs, strict=True)}
        if not weights:
            return cls(sources)
        if len(weights) != len(specs) or not all(0 < weight < math.inf for weight in weights):
            raise UsageError(
                f"{len(weights)} weights {list(weights)} for {len(specs)} sources: give one positive number per source."
            )
        return cls(sources, (Phase(share=1.0, weights=dict(zip(sources, weights, strict=True))),))

    @classmethod
    def from_dict(cls, values: dict) -> "MixtureConfig":
        """Inverse of `to_dict`, except for `where`."""
        sources = {
            name: Source(**source | {"filters": Filters(**source["filters"])})
            for name, source in values["sources"].items()
        }
        return cls(sources, tuple(Phase(**phase) for phase in values["phases"]), against=tuple(values["against"]))

    def with_specs(self, specs: Mapping[str, str]) -> "MixtureConfig":
        """The mixture with some specs of its sources replaced."""
        sources = {
            name: replace(source, spec=specs.get(source.spec, source.spec)) for name, source in self.sources.items()
        }
        return replace(self, sources=sources)

    def require_standalone(self) -> None:
        """Raises UsageError if the first phase refers to a previous phase."""
        for key in ("ramp_to", "replay"):
            if self.phases and getattr(self.phases[0], key):
                raise UsageError(
                    f"{self.where}: phase 1: {key} needs a previous phase, but this is the first one: give weights."
                )

    def to_dict(self) -> dict[str, object]:
        """Returns everything that the plan depends on, as JSON. Equivalent files result in equal values."""
        return {
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "phases": [asdict(phase) for phase in self.phases],
            "against": list(self.against),
        }


def name_sources(specs: Sequence[str]) -> list[str]:
    """A name for each source, after its kind: the first `text=...` is "text", the second "text-2"."""
    names: list[str] = []
    for spec in specs:
        name = spec.partition("=")[0].replace(":", "-")  # also used as a folder name
        names.append(next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in names))
    return names


def read_mixture(path: str | Path, is_continuation: bool = False) -> MixtureConfig:
    """Reads a mixture from a YAML file. See the docstring of this module for an example.

    Args:
        is_continuation: whether the first phase may continue a previous mixture. If there turns out to be none, the
            caller must call `require_standalone`.

    Raises:
        UsageError: the file is invalid; the message names the phase or source.
    """
    path = find_story_file(path)
    where = str(path)
    content = read_yaml(path, "mixture", UsageError)
    _require_known_keys(where, content, KEYS)
    if not isinstance(content.get("sources"), dict) or not content["sources"]:
        raise UsageError(f"{where}: no sources; give them by name, as in `sources: {{text: text=my_texts/}}`.")
    expand_variables(where, _list_specs(content))  # names all missing variables at once
    sources = {
        name: _read_source(f"{where}: source {name!r}", name, value) for name, value in content["sources"].items()
    }
    if "phases" in content and "weights" in content:
        raise UsageError(f"{where}: both phases and weights: move the weights into the phases.")
    if "phases" not in content:
        weights = {} if content.get("weights") is None else {"weights": content["weights"]}
        phases = [_read_phase(where, {"share": 1.0} | weights, sources)]
    elif not isinstance(content["phases"], list) or not content["phases"]:
        raise UsageError(f"{where}: phases must be a list, as in `phases: [{{share: 100%}}]`.")
    else:
        phases = [
            _read_phase(f"{where}: phase {number}", value, sources) for number, value in enumerate(content["phases"], 1)
        ]
    shares = [phase.share for phase in phases if phase.share is not None]
    if shares and abs(sum(shares) - 1) > 1e-6:
        raise UsageError(
            f"{where}: the shares of the phases sum to {100 * sum(shares):.6g} %: they must sum to 100 % (of the "
            "tokens that remain after phases with `tokens`)."
        )
    against = content.get("against") or []
    if not isinstance(against, list) or not all(isinstance(path, str) for path in against):
        raise UsageError(f"{where}: against is {against!r}; give a list of files or folders of evaluation sets.")
    config = MixtureConfig(sources, tuple(phases), where, tuple(expand_variables(where, against)))
    if not is_continuation:
        config.require_standalone()
    return config


def expand_variables(where: str, specs: Sequence[str]) -> list[str]:
    """Replaces environment variables in specs and paths. The error message names `where`.

    Raises:
        UsageError: variables are not set. The message names all of them, with an example value for each.
    """
    examples: dict[str, str] = {}
    for spec in specs:
        source, _, path = spec.rpartition("=")
        for reference in _VARIABLE.findall(spec):
            name = reference.strip("${}")
            is_whole = bool(source) and path == reference
            if name not in os.environ:
                examples.setdefault(name, f"/data/{source.removeprefix(CHAT_PREFIX)}" if is_whole else "/data")
    if examples:
        assignments = " ".join(f"{name}={value}" for name, value in examples.items())
        raise UsageError(
            f"{where}: environment variables that are not set: {', '.join(examples)}. Set each to the path of its "
            f"data, as in `export {assignments}`, or remove the sources that use them."
        )
    return [os.path.expandvars(spec) for spec in specs]


def _list_specs(content: dict) -> list[str]:
    """All strings of a mixture file in which variables are replaced, unless they are malformed."""
    specs = [value.get("from") if isinstance(value, dict) else value for value in content["sources"].values()]
    against = content.get("against")
    return [spec for spec in (*specs, *(against if isinstance(against, list) else ())) if isinstance(spec, str)]


def _require_known_keys(where: str, value: Any, known: Sequence[str]) -> None:
    if not isinstance(value, dict):
        raise UsageError(f"{where} must contain `key: value` lines, but is a {type(value).__name__}.")
    for key in value:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}.{did_you_mean(str(key), known)} Known: {', '.join(known)}.")


def _read_source(where: str, name: Any, value: Any) -> Source:
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UsageError(
            f"{where}: the name is also used as a folder name: use letters, digits, '-', '_' and '.'; quote numbers."
        )
    if isinstance(value, str):
        value = {"from": value}
    _require_known_keys(where, value, SOURCE_KEYS)
    spec, optional, epochs = value.get("from"), value.get("optional", False), value.get("max_epochs")
    if not isinstance(spec, str) or not spec.strip():
        raise UsageError(f"{where}: from is {spec!r}; give NAME, NAME=OWNER/DATASET, NAME=PATH or NAME=AMOUNT.")
    if not isinstance(optional, bool):
        raise UsageError(f"{where}: optional is {optional!r}; give true or false.")
    if epochs is not None:
        epochs = _read_number(f"{where}: max_epochs", epochs)
        if epochs == 0:
            raise UsageError(f"{where}: max_epochs is 0; give a positive number, or remove the source.")
    filters = {} if value.get("filters") is None else value["filters"]
    _require_known_keys(f"{where}: filters", filters, [field.name for field in fields(Filters)])
    try:
        chosen = Filters(**filters)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    (spec,) = expand_variables(where, [spec])
    spec = _name_columns(where, spec, value.get("columns"))
    return Source(spec, epochs, optional, chosen)


def _name_columns(where: str, spec: str, columns: Any) -> str:
    """The spec with the columns of a source."""
    if columns is None:
        return spec
    if not isinstance(columns, dict) or not columns:
        raise UsageError(f"{where}: columns is {columns!r}; give ROLE: COLUMN, as in {{text: body}}.")
    try:
        return add_columns([spec], parse_columns(f"{role}={column}" for role, column in columns.items()))[0]
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _read_phase(where: str, value: Any, sources: dict[str, Source]) -> Phase:
    _require_known_keys(where, value, PHASE_KEYS)
    if ("share" in value) == ("tokens" in value):
        raise UsageError(f"{where}: give its length either as share (such as 60%) or as tokens.")
    if "weights" in value and "ramp_to" in value:
        raise UsageError(f"{where}: both weights and ramp_to: give one of the two.")
    if "replay" in value and "weights" not in value and "ramp_to" not in value:
        raise UsageError(
            f"{where}: replay needs weights or ramp_to; without them, the whole phase keeps the previous mixture."
        )
    values: dict[str, Any] = {
        key: _read_weights(f"{where}: {key}", value[key], sources) for key in ("weights", "ramp_to") if key in value
    }
    for key in ("share", "replay", "tokens"):
        if key in value:
            values[key] = _read_number(f"{where}: {key}", value[key])
            if values[key] == 0 or (key != "tokens" and values[key] > 1):
                allowed = (
                    "a positive number" if key == "tokens" else "more than 0 and at most 100 %, such as 60% or 0.6"
                )
                raise UsageError(f"{where}: {key} is {value[key]!r}; give {allowed}.")
    if "tokens" in values:
        if values["tokens"] != int(values["tokens"]):
            raise UsageError(f"{where}: tokens is {value['tokens']!r}; give a whole number.")
        values["tokens"] = int(values["tokens"])
    return Phase(**values)


def _read_weights(where: str, value: Any, sources: dict[str, Source]) -> dict[str, float]:
    if not isinstance(value, dict) or not value:
        raise UsageError(f"{where} is {value!r}; give one number per source, such as {{{next(iter(sources))}: 1}}.")
    for name in value:
        if name not in sources:
            hint = did_you_mean(str(name), sources)
            raise UsageError(f"{where} names {name!r}, which is not a source.{hint} Sources: {', '.join(sources)}.")
    weights = {name: _read_number(f"{where}: {name}", weight) for name, weight in value.items()}
    if not any(weights.values()):
        raise UsageError(f"{where} are all 0: give at least one source a positive number.")
    return weights


def _read_number(where: str, value: Any) -> float:
    """Converts a number, `60%`, or `6e-4` (which YAML reads as a string) to a non-negative float."""
    is_percent = isinstance(value, str) and value.strip().endswith("%")
    try:
        number = math.nan if isinstance(value, bool) else float(value.strip().rstrip("%") if is_percent else value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UsageError(f"{where} is {value!r}; give a non-negative number.")
    return number / 100 if is_percent else number
