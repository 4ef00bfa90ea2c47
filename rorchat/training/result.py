"""What a training stage returns."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingResult:
    """The metrics and the folder of a finished run.

    Attributes:
        metrics: the final metrics by name, which docs/metrics.md explains. They are also in run.json.
        run_folder: the output folder, with config.yaml, metrics.jsonl, samples.jsonl and checkpoints.
    """

    metrics: dict[str, float]
    run_folder: Path

    @property
    def model_folder(self) -> Path:
        """The trained model: a folder that Transformers loads."""
        return self.run_folder / "model"


@dataclass(frozen=True)
class TokenizerResult:
    """A trained tokenizer.

    Attributes:
        metrics: its size, and how much text it was trained on. They are also in tokenizer_training.json.
        folder: the folder that Transformers loads.
    """

    metrics: dict[str, float]
    folder: Path
