"""Divides the time between the stages: how many tokens each reads, and how long it takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from rorchat.model import Shape, count_parameters, count_scaling_parameters
from rorchat.project.sizing import SHAPES, Size, choose_size, predict
from rorchat.project.survey import Survey, count_bytes
from rorchat.project.timing import Machine
from rorchat.project.vocabulary import Vocabulary

#: Shares of the training time. What a stage cannot use is divided between the others.
TIME_SHARES = {"pretrain": 0.55, "midtrain": 0.2, "sft": 0.2, "dpo": 0.05}
#: Passes over the data of a stage. More are learned by heart: docs/planning.md has the loss of small models after 3, 10
#: and 20 passes.
MAX_EPOCHS = {"pretrain": 3.8, "midtrain": 3.8, "sft": 3.0, "dpo": 1.0}  # 4, less what a tokenizer may differ
#: The time of a token relative to that of the measured step: evaluations, checkpoints and logs come on top. In the chat
#: stages, this is without the language-model head, which is computed only for replies, LABEL_SHARE of the tokens.
RELATIVE_COST = {"pretrain": 1.1, "midtrain": 1.12, "sft": 1.15, "dpo": 1.4}
STARTS = {"dpo": 2.5}  # the start of a stage, in those of a process; 1.5 for the others
LABEL_SHARE = 0.5
TARGET_STEPS = 1_000  # of pretraining: the batch is as large as this allows
MIN_BATCH_TOKENS, MAX_BATCH_TOKENS = 2_048, 524_288
LARGE = 100e6  # parameters
MIN_STEPS = 10  # of every stage, however little time there is
MESSAGE_TOKENS = 12  # control tokens, role and line breaks of a message, and a share of the system message
MESSAGES_PER_ROW = 3
#: Shares of the tokens of midtraining, in percent
MIDTRAIN_WEIGHTS = {"documents": 30.0, "conversations": 60.0, "persona": 10.0}
#: The data that limit the length of a stage, see `Scheduler.count_tokens`
GROUPS = {
    "pretrain": ("documents",), "midtrain": ("conversations",), "sft": ("conversations", "persona"),
    "dpo": ("preferences",),
}  # fmt: skip
VALIDATION_TOKENS = 20_000  # enough to measure a loss to about 1 %, and quick to evaluate
MIN_VALIDATION_SHARE, MAX_VALIDATION_SHARE = 0.005, 0.1
#: Seconds of a command that scores, beside its start: (fixed, per million parameters)
SCORING_SECONDS = {"evaluate": (8.0, 0.5), "gate": (14.0, 6.0), "report": (3.0, 0.0)}


@dataclass(frozen=True)
class Base:
    """The model that training starts from instead of random weights."""

    name: str
    shape: Shape
    vocabulary: Vocabulary
    positions: int

    @property
    def is_large(self) -> bool:
        """Whether it is as large as GPT-2's smallest checkpoint, which is fine-tuned with AdamW at small rates."""
        return count_parameters(self.shape, self.vocabulary.size, self.positions) > LARGE


@dataclass(frozen=True)
class Schedule:
    """Tokens and time of every command.

    Attributes:
        tokens: {stage of training: tokens that it reads}, in the order of the stages.
        seconds: {command: planned duration}.
    """

    size: Size
    tokens: dict[str, int]
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Scheduler:
    """Divides `hours` between the stages, for any size of model.

    Attributes:
        measured: {(shape, vocabulary): seconds per token}, where they were measured for this size.
        document_bytes: plan as if the documents had this size; None for their own.
    """

    survey: Survey
    machine: Machine
    hours: float
    base: Base | None = None
    measured: Mapping[tuple[Shape, int], float] = field(default_factory=dict)
    document_bytes: int | None = None

    @property
    def optimizer(self) -> str:
        """Muon, but AdamW for a large checkpoint, which was pretrained with it."""
        return "adamw" if self.base and self.base.is_large else "muon"

    @property
    def text_bytes(self) -> int:
        """Size of the text that pretraining reads."""
        return self.document_bytes or count_bytes(self.survey.pretraining)

    @property
    def stages(self) -> list[str]:
        """The stages of training, in order."""
        stages = [] if self.base else ["pretrain"]
        stages += ["midtrain", "sft"] if self.survey.of("documents") else ["sft"]
        return [*stages, "dpo"] if self.survey.of("preferences") else stages

    def choose(self, vocabularies: list[Vocabulary]) -> Size:
        """The size with the lowest predicted loss after the pretraining that fits into the time."""
        return choose_size(
            vocabularies,
            self.text_bytes,
            lambda shape, vocabulary: self._divide(shape, vocabulary).get("pretrain", 0),
            SHAPES,
        )

    def schedule(self, shape: Shape, vocabulary: Vocabulary) -> Schedule:
        """The schedule for one size."""
        tokens = self._divide(shape, vocabulary)
        seconds = self._overhead(count_parameters(shape, vocabulary.size, self.machine.block_size))
        for stage, count in tokens.items():
            seconds[stage] += count * self._seconds_of_token(stage, shape, vocabulary)
        first = tokens[self.stages[0]]
        training_bytes = int(self.text_bytes * (1 - self.validation_share("pretrain", vocabulary)))
        size = predict(shape, vocabulary, first, max(1, training_bytes))
        return Schedule(size, tokens, seconds)

    def seconds_per_token(self, shape: Shape, vocabulary: Vocabulary) -> float:
        """Seconds per token of pretraining: as measured for this size, else interpolated."""
        known = self.measured.get((shape, vocabulary.size))
        return known or self.machine.seconds_per_token(shape, vocabulary.size)

    def _divide(self, shape: Shape, vocabulary: Vocabulary) -> dict[str, int]:
        """{stage: tokens}: of each its share of the time, or less if its data end, but at least a few steps.

        Stages that cannot keep to their share are settled first; the time that is left is divided between the others by
        their shares, which may settle more of them.
        """
        overhead = self._overhead(count_parameters(shape, vocabulary.size, self.machine.block_size))
        left = self.hours * 3600 - sum(overhead.values())
        costs = {stage: self._seconds_of_token(stage, shape, vocabulary) for stage in self.stages}
        tokens, undecided = {}, list(self.stages)
        while undecided:
            total = sum(TIME_SHARES[stage] for stage in undecided)
            affordable = {stage: max(0.0, left) * TIME_SHARES[stage] / total / costs[stage] for stage in undecided}
            for stage in undecided:
                most = min(affordable[stage], self._useful_tokens(stage, vocabulary))
                tokens[stage] = int(max(MIN_STEPS * MIN_BATCH_TOKENS, most))
            settled = [stage for stage in undecided if not math.isclose(tokens[stage], affordable[stage], rel_tol=1e-3)]
            if not settled:
                break
            left -= sum(tokens[stage] * costs[stage] for stage in settled)
            undecided = [stage for stage in undecided if stage not in settled]
        return tokens

    def _seconds_of_token(self, stage: str, shape: Shape, vocabulary: Vocabulary) -> float:
        return self.seconds_per_token(shape, vocabulary) * relative_cost(stage, shape, vocabulary.size)

    def count_tokens(self, group: str, vocabulary: Vocabulary) -> float:
        """Tokens of all "documents", "conversations" (without the persona's), "persona" or "preferences"."""
        if group == "documents":  # and what else pretraining reads
            return self.text_bytes / vocabulary.bytes_per_token
        option = "conversations" if group == "persona" else group
        sources = self.survey.of(option)
        if option == "conversations":
            sources = [source for source in sources if source.is_about_persona == (group == "persona")]
        text = sum(source.utf8_bytes for source in sources) / vocabulary.chat_bytes_per_token
        return text + sum(source.rows for source in sources) * MESSAGES_PER_ROW * MESSAGE_TOKENS

    def validation_share(self, stage: str, vocabulary: Vocabulary) -> float:
        """The share of the rows of a stage that is held out for validation.

        Midtraining holds out as much as pretraining: otherwise it would train on documents that pretraining held out.
        """
        groups = GROUPS["pretrain" if stage == "midtrain" else stage]
        tokens = sum(self.count_tokens(group, vocabulary) for group in groups)
        return round(min(MAX_VALIDATION_SHARE, max(MIN_VALIDATION_SHARE, VALIDATION_TOKENS / max(1, tokens))), 3)

    def midtrain_weights(self, tokens: int, vocabulary: Vocabulary) -> dict[str, float]:
        """{group: percent of the tokens of midtraining}: MIDTRAIN_WEIGHTS, but no chats more often than MAX_EPOCHS."""
        weights, share = {}, self.validation_share("midtrain", vocabulary)
        for group in ("conversations", "persona"):
            most = 100 * MAX_EPOCHS["midtrain"] * self.count_tokens(group, vocabulary) * (1 - share) / tokens
            weights[group] = min(MIDTRAIN_WEIGHTS[group], most)
        return {"documents": 100 - sum(weights.values()), **weights}

    def _useful_tokens(self, stage: str, vocabulary: Vocabulary) -> float:
        """Tokens of the stage's data, times the passes over them that are useful."""
        groups = GROUPS[stage]
        share = self.validation_share(stage, vocabulary)
        tokens = sum(self.count_tokens(group, vocabulary) for group in groups) * (1 - share) * MAX_EPOCHS[stage]
        return tokens * 100 / MIDTRAIN_WEIGHTS["conversations"] if stage == "midtrain" else tokens

    def _overhead(self, parameters: int) -> dict[str, float]:
        """{command: seconds beside the steps of training}, in the order of the commands."""
        start = self.machine.startup_seconds
        seconds = {} if self.base else {"tokenizer": start + self.survey.utf8_bytes("documents", "conversations") / 2e6}
        seconds |= {stage: STARTS.get(stage, 1.5) * start for stage in self.stages}
        for name, (fixed, per_million) in SCORING_SECONDS.items():
            seconds[name] = start / 2 + fixed + per_million * parameters / 1e6
        return seconds


def relative_cost(stage: str, shape: Shape, vocabulary: int) -> float:
    """The time of a token in a stage, relative to one in pretraining."""
    if stage in ("pretrain", "midtrain"):
        return RELATIVE_COST[stage]
    head_share = vocabulary * shape.n_embd / count_scaling_parameters(shape, vocabulary)
    return RELATIVE_COST[stage] * (1 - head_share * (1 - LABEL_SHARE))


def choose_batch_tokens(tokens: int, block_size: int) -> int:
    """Tokens per step: a power of two with which the run has at least TARGET_STEPS steps."""
    batch = MIN_BATCH_TOKENS
    while batch < MAX_BATCH_TOKENS and tokens / (2 * batch) >= TARGET_STEPS:
        batch *= 2
    return max(batch, block_size)
