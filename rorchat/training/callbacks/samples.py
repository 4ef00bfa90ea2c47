"""Writes generated samples to samples.jsonl during training."""

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import TrainerCallback

from rorchat.jsonl import append_json_line, drop_partial_line
from rorchat.training.callbacks.metrics import MetricsCallback
from rorchat.training.callbacks.signals import SignalCallback


class SamplesCallback(TrainerCallback):
    """Generates samples for fixed prompts before the first step, after the last one, and every `sample_steps` steps.

    The main process generates; the others wait for it in the next step.

    Args:
        folder: the run folder.
        prompts: may be empty.
        generate_samples: returns one text per prompt, in order.
        metrics: excludes the time of generation from the training speed.
        signals: tells whether the run was interrupted; an interrupted run has no last sample, because it has not ended.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        generate_samples: Callable[[Sequence[str]], list[str]],
        metrics: MetricsCallback,
        signals: SignalCallback,
    ):
        self.path, self.prompts = folder / "samples.jsonl", list(prompts)
        self.generate_samples, self.metrics, self.signals = generate_samples, metrics, signals

    def _write(self, state, model) -> None:
        if not state.is_world_process_zero or not self.prompts:
            return
        was_training = model.training
        model.eval()
        with self.metrics.pause():
            texts = self.generate_samples(self.prompts)
        model.train(was_training)
        record = {"step": state.global_step, "tokens": self.metrics.tokens_after(state.global_step)}
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
        if not self.signals.stopping:
            self._write(state, model)
