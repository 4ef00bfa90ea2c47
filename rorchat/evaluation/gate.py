"""The behaviour gate: a chat model's behaviour against thresholds, and beside that of the stage before.

The thresholds stand in `behaviour.yaml`.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from rorchat.chatml import system_message
from rorchat.errors import DataError, DivergedError, MismatchError, RorchatError, did_you_mean
from rorchat.evaluation.behaviour import MEASURES, Behaviour, Measure, Value, measure_behaviour, short
from rorchat.inference.engine import ChatModel, load_model
from rorchat.persona import Persona
from rorchat.yaml_file import read_yaml

THRESHOLDS = Path(__file__).with_name("behaviour.yaml")


class BehaviourFailure(RorchatError):
    """A model does not come up to the thresholds of its behaviour."""

    exit_code = DivergedError.exit_code  # a model that came to nothing; a script tells it from a wrong file by it


def load_thresholds(path: str | Path | None = None) -> dict[str, float]:
    """Thresholds by the names of measures, from a file like `behaviour.yaml`; None for that one.

    Raises:
        DataError: the file is missing or no YAML, names no measure of ours, or has a bound that cannot be.
    """
    path = Path(path or THRESHOLDS)
    values = read_yaml(path, "thresholds file", example=THRESHOLDS)
    if not values:
        raise DataError(f"{path} has no thresholds. Copy {THRESHOLDS} and change it.")
    return {name: _threshold(path, name, given) for name, given in values.items()}


def _threshold(path: Path, name: object, given: object) -> float:
    if name not in MEASURES:
        hint = did_you_mean(str(name), MEASURES)
        raise DataError(f"{path}: {name!r} is no measure.{hint} Known are {', '.join(MEASURES)}.")
    bound = MEASURES[name].bound
    number = given.get(bound) if isinstance(given, dict) and len(given) == 1 else None
    good = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not good or not (math.isfinite(number) and 0 <= number <= 1):
        better = "more" if bound == "min" else "less"
        raise DataError(
            f"{path}: {name} is {short(str(given))}: {better} of it is better, so give a share from 0 to 1 as "
            f"`{name}: {{{bound}: {0.9 if bound == 'min' else 0.1}}}`."
        )
    return float(number)


@dataclass
class Verdict:
    """A model's behaviour against thresholds and, where there is one, beside the behaviour of the stage before."""

    model: Behaviour
    thresholds: dict[str, float]
    before: Behaviour | None = None

    def failures(self) -> list[str]:
        """The measures that miss their threshold; one that applied to no reply has missed it too."""
        return [name for name in self.thresholds if not self._met(name)]

    def _met(self, name: str) -> bool:
        value, threshold = self.model.measures[name].value, self.thresholds[name]
        if value is None:
            return False
        return value >= threshold if MEASURES[name].more_is_better else value <= threshold

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(header, rows) with a measure a row."""
        rows = []
        for name, measure in MEASURES.items():
            value = self.model.measures[name]
            bound = f"{measure.bound} {100 * self.thresholds[name]:g} %" if name in self.thresholds else "-"
            verdict = "-" if name not in self.thresholds else "pass" if self._met(name) else "FAIL"
            before = self._compared(name) if self.before else []
            shown = _shown(value, measure, self.model.persona)
            rows.append([f"{measure.says} ({name})", shown, *before, bound, verdict])
        columns = [self.before.name, "change"] if self.before else []
        return ["measure", self.model.name, *columns, "threshold", ""], rows

    def _compared(self, name: str) -> list[str]:
        now, before = self.model.measures[name], self.before.measures[name]
        known = now.value is not None and before.value is not None
        change = f"{round(100 * (now.value - before.value), 1) + 0.0:+.1f} points" if known else "-"  # never -0.0
        return [_shown(before, MEASURES[name], self.before.persona), change]

    def examples(self) -> list[tuple[str, str, str]]:
        """(measure, what was asked, what was said) of every measure that failed."""
        return [(name, *example) for name in self.failures() for example in self.model.measures[name].examples]

    def sentence(self) -> str:
        """What failed, in one line."""
        failed = [
            f"{name} {_shown(self.model.measures[name], MEASURES[name], self.model.persona)} "
            f"({MEASURES[name].bound} {100 * self.thresholds[name]:g} %)"
            for name in self.failures()
        ]
        return f"{self.model.name} does not behave: {'; '.join(failed)}."


def _shown(value: Value, measure: Measure, persona: str) -> str:
    if value.value is None:
        return "nothing to measure"
    unit = f"probes of {persona}" if persona and measure.unit == "probes" else measure.unit
    return f"{100 * value.value:.1f} % of {value.count} {unit}"


def _check_persona(model: str, chat: ChatModel, persona: Persona, thresholds: dict[str, float]) -> None:
    """Raises MismatchError where the probes of a persona are judged that the model's chat template knows nothing of."""
    judged = [name for name in thresholds if MEASURES[name].unit == "probes"]
    found = system_message(chat.tokenizer)
    if judged and found != persona.system:
        raise MismatchError(
            f"{model} has the system message {short(found)}, the persona {persona.name} has {short(persona.system)}: "
            f"give the persona file of this model with --persona, or leave {', '.join(judged)} out of --thresholds."
        )


def gate(model: str, persona: Persona, thresholds: dict[str, float], before: str | None = None) -> Verdict:
    """The verdict on a chat model, with the model of the stage before beside it.

    Args:
        model, before: a folder, a run's folder or a Hub id.

    Raises:
        DataError, RemoteError: nothing loadable is there.
        MismatchError: it was never taught to chat. Or its chat template has another
            system message than the persona, and measures of the persona have thresholds.
    """
    chats = [(name, load_model(name, require_chat=True)) for name in (model, before) if name]
    _check_persona(*chats[0], persona, thresholds)
    measured = [measure_behaviour(chat, name.rstrip("/"), persona) for name, chat in chats]
    return Verdict(measured[0], thresholds, *measured[1:])


def write_verdict(verdict: Verdict, path: Path) -> None:
    path.write_text(json.dumps(asdict(verdict), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_verdict(path: Path) -> Verdict:
    """What `write_verdict` wrote.

    Raises:
        DataError: it is something else.
    """

    def behaviour(values: dict) -> Behaviour:
        measures = {name: Value(**values["measures"].get(name, {})) for name in MEASURES}
        return Behaviour(**{**values, "measures": measures})

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {name: bound for name, bound in values["thresholds"].items() if name in MEASURES}
        return Verdict(behaviour(values["model"]), known, values["before"] and behaviour(values["before"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no verdict of `rorchat gate`: {error!r}. Write it again with --out.") from None
