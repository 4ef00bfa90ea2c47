"""The settings of every stage of a project, with the reasons: what the YAML files contain."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rorchat.model import count_parameters
from rorchat.plan.scaling import format_size
from rorchat.plan.show import format_count, format_duration
from rorchat.project.schedule import Schedule, Scheduler, choose_batch_tokens
from rorchat.project.survey import SourceSurvey
from rorchat.project_folder import RUNS

ROWS_PER_STEP = 8  # of fine-tuning and preference training; fewer if there would be less than CHAT_STEPS steps
CHAT_STEPS = 100
#: Learning rates of Muon (matrices) and AdamW (the rest), as in the demo.
RATES: dict[str, dict[str, float]] = {
    "pretrain": {"learning_rate": 2e-3, "matrix_learning_rate": 1e-2},
    "midtrain": {"learning_rate": 1e-3, "matrix_learning_rate": 5e-3, "warmup_steps": 0.05, "cooldown_share": 1.0},
    "sft": {"learning_rate": 5e-4, "matrix_learning_rate": 5e-3},
}
#: Fine-tuning of a large pretrained checkpoint: AdamW at the defaults of the recipes
BASE_RATES: dict[str, dict[str, float]] = {"midtrain": {"learning_rate": 2e-4}, "sft": {"learning_rate": 2e-4}}


@dataclass(frozen=True)
class StageSettings:
    """The content of a stage's YAML file: comment lines, then settings."""

    comments: list[str]
    values: dict[str, Any]


class ProjectSettings:
    """Derives the settings of all stages from a schedule."""

    def __init__(self, scheduler: Scheduler, schedule: Schedule):
        self.scheduler, self.schedule = scheduler, schedule
        self.survey, self.size = scheduler.survey, schedule.size
        self.block_size = scheduler.machine.block_size

    def stages(self) -> dict[str, StageSettings]:
        """{stage: settings}, in the order in which they run."""
        builders: dict[str, Callable[[], StageSettings]] = {
            "tokenizer": self._tokenizer,
            "pretrain": self._pretrain,
            "midtrain": self._midtrain,
            "sft": self._sft,
            "dpo": self._dpo,
        }
        names = [*([] if self.scheduler.base else ["tokenizer"]), *self.scheduler.stages]
        return {name: builders[name]() for name in names}

    @property
    def first_store(self) -> str:
        """The name of the token store of the first source of documents, as MixtureConfig.from_specs chooses it."""
        return self.survey.of("documents")[0].spec.partition("=")[0].replace(":", "-")

    def run_folder(self, stage: str) -> str:
        return f"{RUNS}/{stage}"

    def previous(self, stage: str) -> str:
        """The model that a stage starts from."""
        at = self.scheduler.stages.index(stage)
        if at:
            return self.run_folder(self.scheduler.stages[at - 1])
        return self.scheduler.base.name if self.scheduler.base else ""

    def _tokenizer(self) -> StageSettings:
        sources = [*self.survey.of("documents"), *self.survey.of("conversations")]
        vocabulary = self.size.vocabulary
        comments = [
            f"{vocabulary.size:,} tokens, {vocabulary.bytes_per_token:.2f} bytes per token of the documents. A larger "
            "vocabulary would need fewer tokens for the same text, but more parameters and time per token."
        ]
        values = {
            "sources": [source.spec for source in sources],
            "vocab_size": vocabulary.size,
            "output_dir": self.run_folder("tokenizer"),
        }
        return StageSettings(comments, values)

    def _pretrain(self) -> StageSettings:
        shape, tokens = self.size.shape, self.schedule.tokens["pretrain"]
        batch = choose_batch_tokens(tokens, self.block_size)
        steps = max(1, tokens // batch)
        parameters = format_count(count_parameters(shape, self.size.vocabulary.size, self.block_size))
        comments = [
            f"{parameters} parameters: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide. Of the sizes "
            f"considered, the one with the lowest predicted loss in this time ({self.size.bits_per_byte:.2f} bits per "
            "byte on held-out text).",
            f"tokens per step: {batch // self.block_size} rows x {self.block_size} tokens = {batch:,};  x {steps:,} "
            f"steps = {format_count(steps * batch)} tokens, {self.size.epochs:.1f} epochs",
            self._time("pretrain"),
        ]
        values = {
            "sources": [_chat_spec(source) for source in self.survey.pretraining],
            "tokenizer": self.run_folder("tokenizer"),
            "size": format_size(shape),
            "block_size": self.block_size,
            **self._mixture_settings("pretrain", batch, steps),
        }
        return StageSettings(comments, values)

    def _midtrain(self) -> StageSettings:
        tokens = self.schedule.tokens["midtrain"]
        batch = choose_batch_tokens(tokens, self.block_size)
        steps = max(1, tokens // batch)
        sources = [*self.survey.of("documents"), *self.survey.of("conversations")]
        comments = [
            "Between pretraining and fine-tuning: conversations in the chat format and documents, mixed by `weights`.",
            f"tokens per step: {batch // self.block_size} rows x {self.block_size} tokens = {batch:,};  x {steps:,} "
            f"steps = {format_count(steps * batch)} tokens",
            self._time("midtrain"),
        ]
        values = {
            "sources": [_chat_spec(source) for source in sources],
            "weights": self._midtrain_weights(sources),
            "model": self.previous("midtrain"),
            "block_size": self.block_size,
            **self._mixture_settings("midtrain", batch, steps),
        }
        return StageSettings(comments, values)

    def _midtrain_weights(self, sources: list[SourceSurvey]) -> list[float]:
        """The weight of each group of sources, divided in proportion to their sizes."""

        def group(source: SourceSurvey) -> str:
            return "persona" if source.is_about_persona else source.option

        weights = self.scheduler.midtrain_weights(self.schedule.tokens["midtrain"], self.size.vocabulary)
        sizes = {name: sum(s.utf8_bytes for s in sources if group(s) == name) for name in weights}
        return [round(weights[group(source)] * source.utf8_bytes / sizes[group(source)], 3) for source in sources]

    def _sft(self) -> StageSettings:
        tokens = self.schedule.tokens["sft"]
        rows = max(1, min(ROWS_PER_STEP, tokens // (self.block_size * CHAT_STEPS)))
        steps = max(1, tokens // (rows * self.block_size))
        comments = [
            f"Conversations, packed into rows of {self.block_size} tokens; {rows} rows per step, {steps:,} steps.",
            self._time("sft"),
        ]
        values = {
            "sources": [source.spec for source in self.survey.of("conversations")],
            "persona": "persona.yaml",
            "model": self.previous("sft"),
            "per_device_train_batch_size": rows,
            "max_steps": steps,
            **self._optimizer("sft"),
            "validation_share": self._validation_share("sft"),
            "logging_steps": _round_down(steps / 20),
            "eval_steps": 0.5,
            "sample_prompts": ["Who are you?", "Hello! What can you do?", "What is your favourite colour?"],
            "output_dir": self.run_folder("sft"),
        }
        if self.survey.of("documents") and not self.scheduler.base:
            values["replay"] = f"{self.run_folder('pretrain')}/tokens/{self.first_store}"
            comments.append("A tenth of the tokens are documents of pretraining (replay), against forgetting.")
        return StageSettings(comments, values)

    def _dpo(self) -> StageSettings:
        tokens_of_pairs = self.scheduler.count_tokens("preferences", self.size.vocabulary)
        tokens_per_pair = tokens_of_pairs / self.survey.rows("preferences")
        pairs = min(round(self.schedule.tokens["dpo"] / tokens_per_pair), self.survey.rows("preferences"))
        rows = max(1, min(ROWS_PER_STEP, pairs // CHAT_STEPS))
        steps = max(1, pairs // rows)
        comments = [f"Preferences: {rows} pairs per step, {steps:,} steps.", self._time("dpo")]
        values = {
            "sources": [source.spec for source in self.survey.of("preferences")],
            "persona": "persona.yaml",
            "model": self.previous("dpo"),
            "per_device_train_batch_size": rows,
            "max_steps": steps,
            "validation_share": self._validation_share("dpo"),
            "logging_steps": _round_down(steps / 20),
            "sample_prompts": ["Who are you?", "Hello! What can you do?", "What is your favourite colour?"],
            "output_dir": self.run_folder("dpo"),
        }
        return StageSettings(comments, values)

    def _mixture_settings(self, stage: str, batch: int, steps: int) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": min(8, batch // self.block_size),
            "global_batch_tokens": batch,
            "train_tokens": steps * batch,
            **self._optimizer(stage),
            "persona": "persona.yaml",
            "validation_share": self._validation_share(stage),
            "logging_steps": _round_down(steps / 20),
            "eval_steps": 0.5,
            "output_dir": self.run_folder(stage),
        }

    def _optimizer(self, stage: str) -> dict[str, Any]:
        optimizer = self.scheduler.optimizer
        return dict(BASE_RATES[stage]) if optimizer == "adamw" else {"optimizer": optimizer, **RATES[stage]}

    def _validation_share(self, stage: str) -> float:
        return self.scheduler.validation_share(stage, self.size.vocabulary)

    def _time(self, command: str) -> str:
        return f"about {format_duration(self.schedule.seconds[command] / 3600)} on the machine it was planned for"


def _chat_spec(source: SourceSurvey) -> str:
    """The source as midtraining takes it: `chat:` selects the conversations of a source that has documents, too."""
    is_both = source.option == "conversations" and source.spec.startswith("tinytown=")
    return f"chat:{source.spec}" if is_both else source.spec


def _round_down(value: float) -> int:
    """A number of steps between log lines that is easy to read: 1, 2, 5, 10, 20, 50 ..."""
    allowed = [base * 10**power for power in range(6) for base in (1, 2, 5)]
    return max(number for number in allowed if number <= max(1, value))
