"""A mixture file -> sources and phases, checked before anything is read.

    sources:
      c4: c4=../data/c4                                             # NAME: SPEC
      tales: {from: cosmopedia=$DATA/tales, max_epochs: 4, optional: true, filters: {min_characters: 200}}
      talk: chat:tinytown=5000                                      # conversations of a source with documents too
      mine: store=../tokens/mine                                    # a token store that is there already
    against: [../data/gsm8k/test.jsonl]                             # no document with 13 words in a row of these
    phases:
      - {share: 60%, weights: {c4: 1}}                              # of the tokens; or `tokens: 2_000_000`
      - {share: 20%, ramp_to: {c4: 1, tales: 3}, replay: 10%}       # in a straight line; a tenth stays as it was
      - {share: 20%}                                                # as the phase before ended

Weights are shares of tokens, in any scale. `$NAME` stands for an environment variable. Of a mixture that is appended to
a run (`--new_phase`) the first phase may begin with `ramp_to` or `replay`, and shares are of the tokens that are left.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rorchat.errors import UsageError, did_you_mean
from rorchat.reading.filters import Filters
from rorchat.stories import find_story_file
from rorchat.yaml_file import read_yaml

KEYS = ("sources", "against", "phases", "weights")
SOURCE_KEYS = ("from", "max_epochs", "optional", "filters")
PHASE_KEYS = ("share", "tokens", "weights", "ramp_to", "replay")


@dataclass(frozen=True)
class Source:
    """One source of a mixture: its spec (`NAME=PATH`), how often its rows may be repeated, and what is filtered out."""

    spec: str
    max_epochs: float | None = None
    optional: bool = False
    filters: Filters = Filters()


@dataclass(frozen=True)
class Phase:
    """A stretch of the plan: its length, as `share` of what phases with `tokens` leave or as `tokens`, and weights.

    Without `weights` and `ramp_to` it goes on as the phase before ended; the first one then mixes by size.
    """

    share: float | None = None
    tokens: int | None = None
    weights: dict[str, float] | None = None
    ramp_to: dict[str, float] | None = None
    replay: float = 0.0


@dataclass(frozen=True)
class MixtureConfig:
    """What is mixed and how, as the user said it; `where` is the file, for messages."""

    sources: dict[str, Source]
    phases: tuple[Phase, ...] = (Phase(share=1.0),)
    where: str = "the mixture"
    against: tuple[str, ...] = ()  # evaluation sets that no document may have 13 words in common with

    @classmethod
    def from_specs(cls, specs: Sequence[str], weights: Sequence[float] | None = None) -> "MixtureConfig":
        """One phase over some specs; a second `text=...` is named text-2. Without weights they are mixed by size.

        Raises:
            UsageError: weights of another number than sources, or not positive.
        """
        sources: dict[str, Source] = {}
        for spec in specs:
            name = spec.partition("=")[0].replace(":", "-")  # it becomes a folder's
            free = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in sources)
            sources[free] = Source(spec)
        if not weights:
            return cls(sources)
        if len(weights) != len(specs) or not all(0 < weight < math.inf for weight in weights):
            raise UsageError(
                f"{len(weights)} weights {list(weights)} for {len(specs)} sources: give one positive number a source."
            )
        return cls(sources, (Phase(share=1.0, weights=dict(zip(sources, weights, strict=True))),))

    @classmethod
    def from_dict(cls, resolved: dict) -> "MixtureConfig":
        """What `resolved` was made of, but for the name of the file."""
        sources = {
            name: Source(**said | {"filters": Filters(**said["filters"])}) for name, said in resolved["sources"].items()
        }
        return cls(sources, tuple(Phase(**phase) for phase in resolved["phases"]), against=tuple(resolved["against"]))

    def require_standalone(self) -> None:
        """Raises UsageError where the first phase goes on from a phase before it."""
        for key in ("ramp_to", "replay"):
            if self.phases and getattr(self.phases[0], key):
                raise UsageError(
                    f"{self.where}: phase 1: {key} goes on from the phase before, and this is the first: give weights."
                )

    def to_dict(self) -> dict[str, object]:
        """All that the plan depends on, for JSON: two files that say the same in other words are equal here."""
        return {
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "phases": [asdict(phase) for phase in self.phases],
            "against": list(self.against),
        }


def read_mixture(path: str | Path, is_continuation: bool = False) -> MixtureConfig:
    """The mixture that a YAML file describes; the head of this module shows one.

    Args:
        is_continuation: the first phase may go on from another mixture; whether there is one, `require_standalone` asks.

    Raises:
        UsageError: what is wrong, in which phase or source: one line.
    """
    path = find_story_file(path)
    where = str(path)
    content = read_yaml(path, "mixture", UsageError)
    _known_keys(where, content, KEYS)
    if not isinstance(content.get("sources"), dict) or not content["sources"]:
        raise UsageError(f"{where}: no sources; give them by name, as in `sources: {{text: text=my_texts/}}`.")
    sources = {name: _read_source(f"{where}: source {name!r}", name, said) for name, said in content["sources"].items()}
    if "phases" in content and "weights" in content:
        raise UsageError(f"{where}: both phases and weights: give the weights to the phases.")
    if "phases" not in content:
        weights = {} if content.get("weights") is None else {"weights": content["weights"]}
        phases = [_read_phase(where, {"share": 1.0} | weights, sources)]
    elif not isinstance(content["phases"], list) or not content["phases"]:
        raise UsageError(f"{where}: phases must be a list, as in `phases: [{{share: 100%}}]`.")
    else:
        phases = [
            _read_phase(f"{where}: phase {number}", said, sources) for number, said in enumerate(content["phases"], 1)
        ]
    shares = [phase.share for phase in phases if phase.share is not None]
    if shares and abs(sum(shares) - 1) > 1e-6:
        raise UsageError(
            f"{where}: the shares of the phases sum to {100 * sum(shares):.6g} %: they must sum to 100 % (of what "
            "phases with `tokens` leave)."
        )
    against = content.get("against") or []
    if not isinstance(against, list) or not all(isinstance(path, str) for path in against):
        raise UsageError(f"{where}: against is {against!r}; give a list of files or folders of evaluation sets.")
    config = MixtureConfig(
        sources, tuple(phases), where, tuple(expand_variables(f"{where}: against", path) for path in against)
    )
    if not is_continuation:
        config.require_standalone()
    return config


def expand_variables(where: str, said: str) -> str:
    """A path or spec with its environment variables put in; `where` is for the message.

    Raises:
        UsageError: one is not set.
    """
    expanded = os.path.expandvars(said)
    if "$" in expanded:
        raise UsageError(f"{where} is {said!r}, but {expanded[expanded.index('$') :].split('/')[0]} is not set.")
    return expanded


def _known_keys(where: str, said: object, known: Sequence[str]) -> None:
    if not isinstance(said, dict):
        raise UsageError(f"{where} must hold `key: value` lines, it holds a {type(said).__name__}.")
    for key in said:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}.{did_you_mean(str(key), known)} Known: {', '.join(known)}.")


def _read_source(where: str, name: object, said: object) -> Source:
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UsageError(f"{where}: its name becomes a folder's: letters, digits, '-', '_', '.' only; quote a number.")
    if isinstance(said, str):
        said = {"from": said}
    _known_keys(where, said, SOURCE_KEYS)
    spec, optional, epochs = said.get("from"), said.get("optional", False), said.get("max_epochs")
    if not isinstance(spec, str) or not spec.strip():
        raise UsageError(f"{where}: from is {spec!r}; give NAME, NAME=PATH or NAME=AMOUNT.")
    if not isinstance(optional, bool):
        raise UsageError(f"{where}: optional is {optional!r}; give true or false.")
    if epochs is not None:
        epochs = _number(f"{where}: max_epochs", epochs)
        if epochs == 0:
            raise UsageError(f"{where}: max_epochs is 0; give a positive number, or leave the source out.")
    filters = {} if said.get("filters") is None else said["filters"]
    _known_keys(f"{where}: filters", filters, [field.name for field in fields(Filters)])
    try:
        chosen = Filters(**filters)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return Source(expand_variables(f"{where}: from", spec), epochs, optional, chosen)


def _read_phase(where: str, said: object, sources: dict[str, Source]) -> Phase:
    _known_keys(where, said, PHASE_KEYS)
    if ("share" in said) == ("tokens" in said):
        raise UsageError(f"{where}: give its length as share (of the tokens, as 60%) or as tokens: one of the two.")
    if "weights" in said and "ramp_to" in said:
        raise UsageError(f"{where}: both weights and ramp_to: give one of the two.")
    if "replay" in said and "weights" not in said and "ramp_to" not in said:
        raise UsageError(f"{where}: replay without weights or ramp_to: all of it goes on as the one before ended.")
    values = {
        key: _read_weights(f"{where}: {key}", said[key], sources) for key in ("weights", "ramp_to") if key in said
    }
    for key in ("share", "replay", "tokens"):
        if key in said:
            values[key] = _number(f"{where}: {key}", said[key])
            if values[key] == 0 or (key != "tokens" and values[key] > 1):
                allowed = "a positive number" if key == "tokens" else "more than 0 and at most 100 %, as 60% or 0.6"
                raise UsageError(f"{where}: {key} is {said[key]!r}; give {allowed}.")
    if "tokens" in values:
        if values["tokens"] != int(values["tokens"]):
            raise UsageError(f"{where}: tokens is {said['tokens']!r}; give a whole number.")
        values["tokens"] = int(values["tokens"])
    return Phase(**values)


def _read_weights(where: str, said: object, sources: dict[str, Source]) -> dict[str, float]:
    if not isinstance(said, dict) or not said:
        raise UsageError(f"{where} is {said!r}; give one number a source, as {{{next(iter(sources))}: 1}}.")
    for name in said:
        if name not in sources:
            hint = did_you_mean(str(name), sources)
            raise UsageError(f"{where} names {name!r}, which is no source.{hint} Sources: {', '.join(sources)}.")
    weights = {name: _number(f"{where}: {name}", weight) for name, weight in said.items()}
    if not any(weights.values()):
        raise UsageError(f"{where} are all 0: give at least one source a positive number.")
    return weights


def _number(where: str, said: object) -> float:
    """A number >= 0, from a number, from `60%`, or from `6e-4`, which YAML reads as a string."""
    try:
        percent = isinstance(said, str) and said.strip().endswith("%")
        value = math.nan if isinstance(said, bool) else float(said.strip().rstrip("%") if percent else said)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise UsageError(f"{where} is {said!r}; give a number that is not negative.")
    return value / 100 if percent else value
