"""Writes generated samples to samples.jsonl during training."""

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import TrainerCallback

from rorchat.jsonl import append_json_line, drop_partial_line
from rorchat.training.callbacks.metrics import MetricsCallback


class SamplesCallback(TrainerCallback):
    """Writes what the model says to fixed prompts to samples.jsonl: before the first step, after the last, in between.

    The first process speaks; the others wait for it in the next step.

    Args:
        speak: gives the model's words for each prompt, in order.
        metrics: whose clock stands still meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        speak: Callable[[Sequence[str]], list[str]],
        metrics: MetricsCallback,
    ):
        self.path, self.prompts, self.speak, self.metrics = folder / "samples.jsonl", list(prompts), speak, metrics

    def _write(self, state, model) -> None:
        if not state.is_world_process_zero or not self.prompts:
            return
        was_training = model.training
        model.eval()
        with self.metrics.pause():
            texts = self.speak(self.prompts)
        model.train(was_training)
        record = {"step": state.global_step, "tokens": self.metrics.count_tokens(state.global_step)}
        for prompt, text in zip(self.prompts, texts, strict=True):
            append_json_line(self.path, record | {"prompt": prompt, "text": text})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            drop_partial_line(self.path)
        if state.global_step == 0:
            self._write(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if args.sample_steps and state.global_step % args.sample_steps == 0 and state.global_step < state.max_steps:
            self._write(state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not self.metrics.interrupted:
            self._write(state, model)
