"""A chat model's scores: held-out questions by kind, stop rate, persona probes, and loss on held-out text."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rorchat.chatml import IM_END
from rorchat.inference.engine import ChatModel, Reply, generate_replies
from rorchat.persona import Persona, build_probes
from rorchat.sources.tinytown import Question, held_out_questions

MAX_REPLY_TOKENS = 64  # the longest answer asked for takes a third of that
EXAMPLES_SHOWN = 3


@dataclass
class Rate:
    """So many right of so many asked."""

    right: int = 0
    asked: int = 0

    def __str__(self) -> str:
        return f"{100 * self.right / self.asked:.1f} % ({self.right}/{self.asked})" if self.asked else "-"

    def add(self, right: bool) -> None:
        self.right, self.asked = self.right + right, self.asked + 1


@dataclass
class Scores:
    """One column of the table. `loss` (nats per token) and `bits_per_byte` are of held-out text, where given.

    `stops` counts replies that close their turn, as the gate's `stop_rate` does.
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

    def rows(self) -> dict[str, str]:
        """What the table shows, by the names of its rows."""
        shown = {"held-out questions": str(self.questions)}
        shown |= {f"- {kind}": str(rate) for kind, rate in self.kinds.items()}
        shown |= {"stops by itself": str(self.stops), "persona probes": str(self.persona)}
        if self.bits_per_byte is not None:
            shown |= {"loss, nats/token": f"{self.loss:.3f}", "bits per byte": f"{self.bits_per_byte:.3f}"}
        return shown


def score_chat(
    chat: ChatModel, name: str, folder: str, persona: Persona, asked: list[Question] | None = None
) -> Scores:
    """Asks the held-out questions and the persona probes, all with the likeliest words, and counts.

    Args:
        asked: questions with known answers; None for Tinytown's 200.
    """
    asked = held_out_questions() if asked is None else asked
    persona_probes = build_probes(persona)
    prompts = [question.text for question in asked] + [probe.question for probe in persona_probes]
    limit = min(MAX_REPLY_TOKENS, chat.n_positions // 3)
    replies = generate_replies(chat, prompts, max_new_tokens=limit, temperature=0)
    scores = Scores(name, folder)
    kinds: dict[str, Rate] = defaultdict(Rate)
    for question, reply in zip(asked, replies, strict=False):
        right = question.is_right(reply.text)
        scores.questions.add(right)
        kinds[question.kind].add(right)
    for probe, reply in zip(persona_probes, replies[len(asked) :], strict=True):
        scores.persona.add(probe.passes(reply.text))
    end_of_turn = chat.tokenizer.convert_tokens_to_ids(IM_END)
    for reply in replies:
        scores.stops.add(reply.closes_turn(end_of_turn))
    scores.kinds = dict(kinds)
    scores.examples = _examples(asked, prompts, replies)
    return scores


def _examples(asked: list[Question], prompts: list[str], replies: list[Reply]) -> list[tuple[str, str]]:
    """One exchange of each kind of question."""
    first: dict[str, tuple[str, str]] = {}
    for question, prompt, reply in zip(asked, prompts, replies, strict=False):
        first.setdefault(question.kind, (prompt, reply.text))
    return list(first.values())[:EXAMPLES_SHOWN]


def write_scores(columns: list[Scores], path: Path) -> None:
    path.write_text(json.dumps([asdict(column) for column in columns], indent=2, ensure_ascii=False) + "\n")


def read_scores(path: Path) -> list[Scores]:
    columns = []
    for values in json.loads(path.read_text()):
        for key in ("questions", "stops", "persona"):
            values[key] = Rate(**values[key])
        values["kinds"] = {kind: Rate(**rate) for kind, rate in values["kinds"].items()}
        values["examples"] = [tuple(example) for example in values["examples"]]
        columns.append(Scores(**values))
    return columns
