"""Measures the base loss: the loss on the validation split of pretraining, before and after a later stage.

Its increase measures forgetting (McCloskey and Cohen 1989): a later stage makes the model worse at what it learned in
pretraining. `rorchat.evaluation.base_text` finds the text.
"""

import json
import sys
from pathlib import Path

from transformers import Trainer, TrainerCallback

from rorchat.errors import UsageError
from rorchat.evaluation.base_text import BaseText, find_base_text
from rorchat.evaluation.loss import Loss
from rorchat.jsonl import append_json_line
from rorchat.tokens.store import Manifest, store_folder

LOSS_NAMES = ("base_loss", "base_bits_per_byte")


class BaseLossCallback(TrainerCallback):
    """Measures and logs the base loss before the first step, and whenever `measure_after` is called.

    A resumed run does not repeat the first measurement. If its text differs from the text of the first measurement, the
    increase of the loss is not reported.
    """

    def __init__(self, trainer, text: BaseText):
        self.trainer, self.text = trainer, text

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            if state.is_world_process_zero:
                metrics = self.trainer.metrics
                event = {"step": 0, "event": "base text", "tokens": 0}
                event |= {"text": self.text.describe(), "sha256": self.text.sha256()}
                append_json_line(metrics.path, event | metrics.elapsed())
            self._measure()
            return
        first_text, _ = self._read_first_measurement()
        if state.is_world_process_zero and first_text and first_text["sha256"] != self.text.sha256():
            print(  # noqa: T201
                f"base loss: the run started with a different text, {first_text['text']}. The change is not reported.",
                file=sys.stderr,
            )

    def measure_after(self) -> dict[str, float]:
        """Measures the loss. Also returns the loss before the first step, if it was measured on the same text."""
        text, before = self._read_first_measurement()
        if text.get("sha256") != self.text.sha256():
            before = {}
        return self._measure() | {f"{name}_before": value for name, value in before.items()}

    def _read_first_measurement(self) -> tuple[dict, dict[str, float]]:
        """Returns the event with the text and the loss before the first step, or two empty dictionaries."""
        path = self.trainer.metrics.path
        text: dict = {}
        for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
            record = json.loads(line) if line else {}
            if record.get("event") == "base text":
                text = record
            elif text and "base_loss" in record:
                return text, {name: record[name] for name in LOSS_NAMES}
        return {}, {}

    def _measure(self) -> dict[str, float]:
        trainer = self.trainer
        with trainer.metrics.pause():
            loss: Loss = trainer.loss_on({"": self.text.rows})[""]
        values = dict(zip(LOSS_NAMES, (loss.per_token, loss.bits_per_byte), strict=True)) | {"base_tokens": loss.tokens}
        # not TRL's `log`, which would add its averages over the steps since the last log entry
        Trainer.log(trainer, trainer.metrics.complete(dict(values), trainer.state.global_step))
        return values


def create_base_loss_callback(trainer, arguments, n_positions: int) -> BaseLossCallback | None:
    """Creates the callback of a stage that starts from a model. Without a text, prints a message and returns None.

    Raises:
        UsageError: the stage would train on the text.
    """
    model, given = arguments.model, arguments.base_text
    if not model and not given:
        return None
    text = find_base_text(given, model, trainer.chat.tokenizer, n_positions)
    if text:
        _check_not_trained_on(text, arguments)
    if trainer.is_world_process_zero():
        print(_startup_message(text, model, arguments), file=sys.stderr)  # noqa: T201
    return BaseLossCallback(trainer, text) if text else None


def _check_not_trained_on(text: BaseText, arguments) -> None:
    replay = arguments.replay_source()
    trained_specs = [replay] if arguments.resolved_mixture() is None else arguments.source_specs()
    if not text.validation_share and set(trained_specs) & set(text.origins):
        raise UsageError(
            f"base_text {text.origins[0]} is also training data: the base loss would be measured on all of its "
            "documents. Give a different text, or a token store, of which only the validation split is used."
        )
    if replay and not store_folder(replay) and arguments.validation_share < text.validation_share:
        raise UsageError(
            f"replay {replay} is split with validation_share {arguments.validation_share}, but the base text "
            f"{', '.join(text.origins)} with {text.validation_share}: parts of its validation split would be trained "
            f"on. Give --validation_share {text.validation_share}, or replay the token store."
        )


def _startup_message(text: BaseText | None, model: str, arguments) -> str:
    if text is None:
        return (
            f"base loss: not measured, because no pretraining run with token stores was found for {model}. To "
            "measure it, pass a token store or a source as --base_text."
        )
    message = f"base loss: measured on {text.describe()}, before and after this stage; if it rises, the model forgets"
    share = _training_validation_share(text, arguments)
    if share is not None and share < text.validation_share:
        message += (
            f"; warning: this stage has validation_share {share}, but the text was split with "
            f"{text.validation_share}, so parts of it may be trained on"
        )
    return message


def _training_validation_share(text: BaseText, arguments) -> float | None:
    """Returns the validation share of this stage's documents, or None if they are those of the text."""
    if arguments.resolved_mixture() is not None:
        return arguments.validation_share
    folder = store_folder(arguments.replay_source() or "")
    if not folder or folder.resolve() in {Path(path).resolve() for path in text.origins}:
        return None
    return Manifest.read(folder).validation_share
