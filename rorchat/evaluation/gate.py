"""The behaviour gate: checks a chat model against thresholds and compares it with the previous stage."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from rorchat.chatml import system_message
from rorchat.errors import DataError, DivergedError, MismatchError, RorchatError, did_you_mean
from rorchat.evaluation.behaviour import MEASURES, Behaviour, Measure, Value, measure_behaviour, quote_short
from rorchat.files import to_json
from rorchat.inference.engine import ChatModel, load_model
from rorchat.lineage import find_persona
from rorchat.persona import Persona
from rorchat.yaml_file import read_yaml

THRESHOLDS_FILE = Path(__file__).with_name("behaviour.yaml")


class BehaviourFailure(RorchatError):
    """A model does not meet a threshold of the behaviour gate."""

    exit_code = DivergedError.exit_code  # lets scripts distinguish a bad model from a bad file


def load_thresholds(path: str | Path | None = None) -> dict[str, float]:
    """Loads {measure: threshold} from a YAML file, by default `behaviour.yaml`.

    Raises:
        DataError: the file is missing, is not YAML, names an unknown measure, or has an invalid threshold.
    """
    path = Path(path or THRESHOLDS_FILE)
    values = read_yaml(path, "thresholds file", example=THRESHOLDS_FILE)
    if not values:
        raise DataError(f"{path} has no thresholds. Copy {THRESHOLDS_FILE} and edit it.")
    return {name: _parse_threshold(path, name, entry) for name, entry in values.items()}


def _parse_threshold(path: Path, name: object, entry: object) -> float:
    if name not in MEASURES:
        hint = did_you_mean(str(name), MEASURES)
        raise DataError(f"{path}: no measure is called {name!r}.{hint} Available: {', '.join(MEASURES)}.")
    bound = MEASURES[name].bound
    number = entry.get(bound) if isinstance(entry, dict) and len(entry) == 1 else None
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if number is None or not is_number or not (math.isfinite(number) and 0 <= number <= 1):
        better = "higher" if bound == "min" else "lower"
        raise DataError(
            f"{path}: {name} is {quote_short(str(entry))}: {better} values are better, so give a share from 0 to 1 as "
            f"`{name}: {{{bound}: {0.9 if bound == 'min' else 0.1}}}`."
        )
    return float(number)


@dataclass
class Verdict:
    """The behaviour of a model, the thresholds, and optionally the behaviour of the previous stage's model."""

    model: Behaviour
    thresholds: dict[str, float]
    before: Behaviour | None = None

    def failures(self) -> list[str]:
        """The measures that fail their threshold, including those that applied to no reply."""
        return [name for name in self.thresholds if not self._passes(name)]

    def _passes(self, name: str) -> bool:
        value, threshold = self.model.measures[name].value, self.thresholds[name]
        if value is None:
            return False
        return value >= threshold if MEASURES[name].more_is_better else value <= threshold

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(header, rows), one row per measure."""
        rows = []
        for name, measure in MEASURES.items():
            value = _format_value(self.model.measures[name], measure, self.model.persona)
            threshold, result = "-", "-"
            if name in self.thresholds:
                threshold = f"{measure.bound} {100 * self.thresholds[name]:g} %"
                result = "pass" if self._passes(name) else "FAIL"
            rows.append([f"{measure.title} ({name})", value, *self._comparison(name), threshold, result])
        comparison = [self.before.name, "change"] if self.before else []
        return ["measure", self.model.name, *comparison, "threshold", ""], rows

    def _comparison(self, name: str) -> list[str]:
        """The cells for the previous model and the change; empty if there is no previous model."""
        if self.before is None:
            return []
        now, before = self.model.measures[name], self.before.measures[name]
        change = "-"
        if now.value is not None and before.value is not None:
            change = f"{round(100 * (now.value - before.value), 1) + 0.0:+.1f} points"  # + 0.0: never -0.0
        return [_format_value(before, MEASURES[name], self.before.persona), change]

    def examples(self) -> list[tuple[str, str, str]]:
        """(measure, prompt, reply) for the examples of every failed measure."""
        return [(name, *example) for name in self.failures() for example in self.model.measures[name].examples]

    def summary(self) -> str:
        """The failed measures in one sentence."""
        failed = [
            f"{name} {_format_value(self.model.measures[name], MEASURES[name], self.model.persona)} "
            f"({MEASURES[name].bound} {100 * self.thresholds[name]:g} %)"
            for name in self.failures()
        ]
        return f"{self.model.name} fails the behaviour gate: {'; '.join(failed)}."


def _format_value(value: Value, measure: Measure, persona: str) -> str:
    if value.value is None:
        return "nothing to measure"
    unit = f"probes of {persona}" if persona and measure.unit == "probes" else measure.unit
    return f"{100 * value.value:.1f} % of {value.count} {unit}"


def _check_persona(model: str, chat: ChatModel, persona: Persona, thresholds: dict[str, float]) -> None:
    """Raises MismatchError if a probe measure has a threshold but the chat template belongs to another persona."""
    judged = [name for name in thresholds if MEASURES[name].unit == "probes"]
    message = system_message(chat.tokenizer)
    if judged and message != persona.system:
        raise MismatchError(
            f"{model} has the system message {quote_short(message)}, but the persona {persona.name} has "
            f"{quote_short(persona.system)}: pass this model's persona file as --persona, or remove "
            f"{', '.join(judged)} from the file of --thresholds."
        )


def judge_model(
    model: str,
    persona: Persona | None = None,
    thresholds: dict[str, float] | None = None,
    before: str | None = None,
) -> Verdict:
    """Measures a chat model, and optionally the model of the previous stage for comparison.

    Args:
        model, before: model folder, run folder or Hub id.
        persona: the persona whose probes are asked; None for that of the model's run.
        thresholds: {measure: threshold}; None for those of `behaviour.yaml`.

    Raises:
        DataError, RemoteError: a model cannot be loaded.
        MismatchError: a model has no chat template, or its chat template belongs to another persona while persona
            measures have thresholds.
    """
    persona = persona or find_persona(model).persona
    thresholds = load_thresholds() if thresholds is None else thresholds
    chats = [(name, load_model(name, require_chat=True)) for name in (model, before) if name]
    _check_persona(*chats[0], persona, thresholds)
    behaviours = [measure_behaviour(chat, name.rstrip("/"), persona) for name, chat in chats]
    return Verdict(behaviours[0], thresholds, *behaviours[1:])


def write_verdict(verdict: Verdict, path: Path) -> None:
    path.write_text(to_json(asdict(verdict), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_verdict(path: Path) -> Verdict:
    """Reads a verdict written by `write_verdict`.

    Raises:
        DataError: the file does not contain a verdict.
    """

    def parse_behaviour(values: dict) -> Behaviour:
        measures = {name: Value(**values["measures"].get(name, {})) for name in MEASURES}
        return Behaviour(**{**values, "measures": measures})

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        thresholds = {name: bound for name, bound in values["thresholds"].items() if name in MEASURES}
        before = values["before"] and parse_behaviour(values["before"])
        return Verdict(parse_behaviour(values["model"]), thresholds, before)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a verdict of `rorchat gate`: {error!r}. Write it again with `rorchat gate --out`."
        ) from None
