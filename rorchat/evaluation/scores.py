"""The scores of a model: questions with known answers, persona probes, chat behaviour, and validation loss."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rorchat.chatml import IM_END, token_id
from rorchat.evaluation.text_measures import closes_turn
from rorchat.files import as_number, to_json
from rorchat.inference.engine import ChatModel, generate_replies
from rorchat.persona import Persona, build_probes
from rorchat.sources.tinytown import Question, held_out_questions

MAX_REPLY_TOKENS = 64  # three times the longest expected answer
EXAMPLES_SHOWN = 3
#: Rows of tables with the loss and the bits per byte: on a text, and on the validation split of the base's pretraining.
LOSS_ROWS = ("loss, nats/token", "bits per byte")
BASE_LOSS_ROWS = ("base validation loss, nats/token", "base validation, bits per byte")


def gate_row(measure: str) -> str:
    """The name of the table row of one of the gate's measures."""
    return f"gate: {measure.replace('_', ' ')}"


@dataclass
class Rate:
    """The share of right answers: `right` of `asked` questions."""

    right: int = 0
    asked: int = 0

    def __str__(self) -> str:
        return f"{100 * self.right / self.asked:.1f} % ({self.right}/{self.asked})" if self.asked else "-"

    def add(self, right: bool) -> None:
        self.right, self.asked = self.right + right, self.asked + 1


@dataclass
class Scores:
    """The scores of one model: one column of the table.

    Attributes:
        name: the title of the column.
        folder: the model, as given.
        questions: right answers to questions with known answers.
        kinds: the same, by kind of question.
        stops: replies that end with the end-of-turn token, as in the gate's `stop_rate`.
        persona: correct replies to questions about the persona.
        loss: nats per token on a validation text; None if there is none.
        bits_per_byte: the same loss in bits per UTF-8 byte.
        examples: (question, reply) for the first question of each kind, at most EXAMPLES_SHOWN.
        behaviour: the measures of the gate by their names, as shares.
        on_base_text: whether the loss is that on the validation split of the model's own pretraining.
    """

    name: str
    folder: str
    questions: Rate = field(default_factory=Rate)
    kinds: dict[str, Rate] = field(default_factory=dict)
    stops: Rate = field(default_factory=Rate)
    persona: Rate = field(default_factory=Rate)
    loss: float | None = None
    bits_per_byte: float | None = None
    examples: list[tuple[str, str]] = field(default_factory=list)
    behaviour: dict[str, float] = field(default_factory=dict)
    on_base_text: bool = False

    def rows(self) -> dict[str, str]:
        """Returns {name of a table row: cell} for everything that was measured."""
        cells = {"held-out questions": str(self.questions)} if self.questions.asked else {}
        cells |= {f"- {kind}": str(rate) for kind, rate in self.kinds.items()}
        rates = {"stop rate": self.stops, "persona probes": self.persona}
        cells |= {name: str(rate) for name, rate in rates.items() if rate.asked}
        cells |= {gate_row(name): f"{100 * value:.1f} %" for name, value in self.behaviour.items()}
        if self.bits_per_byte is not None:
            loss, bits = BASE_LOSS_ROWS if self.on_base_text else LOSS_ROWS
            cells |= {loss: f"{self.loss:.3f}", bits: f"{self.bits_per_byte:.3f}"}
        return cells


def score_chat(
    chat: ChatModel, name: str, folder: str, persona: Persona, asked: list[Question] | None = None
) -> Scores:
    """Scores a model's greedy replies to questions and persona probes.

    Args:
        asked: questions with known answers; None for the 200 held-out questions of Tinytown.
    """
    asked = held_out_questions() if asked is None else asked
    persona_probes = build_probes(persona)
    prompts = [question.text for question in asked] + [probe.question for probe in persona_probes]
    limit = min(MAX_REPLY_TOKENS, chat.n_positions // 3)
    replies = generate_replies(chat, prompts, max_new_tokens=limit, temperature=0)
    scores = Scores(name, folder)
    kinds: dict[str, Rate] = defaultdict(Rate)
    first_of_kind: dict[str, tuple[str, str]] = {}
    for question, reply in zip(asked, replies, strict=False):
        right = question.is_right(reply.text)
        scores.questions.add(right)
        kinds[question.kind].add(right)
        first_of_kind.setdefault(question.kind, (question.text, reply.text))
    for probe, reply in zip(persona_probes, replies[len(asked) :], strict=True):
        scores.persona.add(probe.passes(reply.text))
    end_of_turn = token_id(chat.tokenizer, IM_END)
    for reply in replies:
        scores.stops.add(closes_turn(reply.ids, end_of_turn))
    scores.kinds = dict(kinds)
    scores.examples = list(first_of_kind.values())[:EXAMPLES_SHOWN]
    return scores


def write_scores(columns: list[Scores], path: Path) -> None:
    """Writes the scores of several models to a JSON file."""
    path.write_text(
        to_json([asdict(column) for column in columns], indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_scores(path: Path) -> list[Scores]:
    """Reads a file written by `write_scores`."""
    columns = []
    for values in json.loads(path.read_text(encoding="utf-8")):
        for key in ("loss", "bits_per_byte"):
            values[key] = as_number(values.get(key))
        for key in ("questions", "stops", "persona"):
            values[key] = Rate(**values[key])
        values["kinds"] = {kind: Rate(**rate) for kind, rate in values["kinds"].items()}
        values["examples"] = [tuple(example) for example in values["examples"]]
        columns.append(Scores(**values))
    return columns
