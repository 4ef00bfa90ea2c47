"""A clock, states and callbacks for the tests of callbacks."""

from pathlib import Path
from types import SimpleNamespace

from rorchat.training.callbacks.metrics import MetricsCallback


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def make_state(step: int, first: bool = True, until: int = 40) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=until, eval_steps=10, is_world_process_zero=first)


ARGUMENTS = SimpleNamespace(fp16=False, eval_strategy="steps", sample_prompts=["Hi"], sample_steps=20)


def start_metrics(folder: Path, **settings) -> MetricsCallback:
    metrics = MetricsCallback(folder, lambda step: 100 * step, **settings)
    metrics.on_train_begin(ARGUMENTS, make_state(0), None)
    return metrics


def log(metrics: MetricsCallback, step: int, arguments=ARGUMENTS, **logs: float) -> dict:
    logs = metrics.complete(logs, step)
    metrics.on_log(arguments, make_state(step), None, logs=logs)
    return logs
