"""A loss or gradient norm that is not finite."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from callback_support import ARGUMENTS, log, make_state, start_metrics
from support import read_strict

from rorchat.errors import DivergedError
from rorchat.training.callbacks.divergence import DivergenceCallback
from rorchat.training.callbacks.metrics import MetricsCallback


def run_step(watch: DivergenceCallback, step: int, loss, norm=1.0, fp16: bool = False) -> None:
    watch.record_loss(step, torch.as_tensor(loss))
    watch.record_grad_norm(norm)
    watch.on_pre_optimizer_step(SimpleNamespace(fp16=fp16), None, None)


def test_the_loss_of_a_step_is_the_sum_over_its_micro_batches(tmp_path):
    watch = DivergenceCallback(start_metrics(tmp_path))
    watch.record_loss(4, torch.tensor(1.0))
    run_step(watch, 4, 1.5)
    with pytest.raises(DivergedError, match="the last finite loss was 2.5000 at step 4"):
        run_step(watch, 5, math.nan)


class DivergenceOnGPU(DivergenceCallback):
    """Keeps the total on the device of the loss, as on a GPU."""

    def record_loss(self, step, loss):
        self.step, self.loss = step, self.loss + loss


def test_a_gpu_step_is_checked_before_the_optimizer_step(tmp_path):
    watch = DivergenceOnGPU(start_metrics(tmp_path))
    run_step(watch, 4, 2.5)
    with pytest.raises(
        DivergedError, match="gradient norm is inf at step 5; the last finite loss was 2.5000 at step 4"
    ):
        run_step(watch, 5, 2.5, norm=torch.tensor(math.inf))


def test_a_step_that_was_skipped_is_recorded(tmp_path, capsys):
    asked = []
    watch = DivergenceCallback(
        start_metrics(tmp_path), handle_divergence=lambda step: asked.append(step) or ("skipped" if step < 7 else "")
    )
    for step, loss in ((4, 2.5), (5, math.nan), (6, 2.4)):
        run_step(watch, step, loss)
    with pytest.raises(DivergedError, match="The loss is inf at step 7; the last finite loss was 2.4000 at step 6"):
        run_step(watch, 7, math.inf)
    assert asked == [5, 7]
    events = [line["event"] for line in read_strict(tmp_path / "metrics.jsonl")]
    assert events == ["skipped", "diverged"]
    assert "The loss is nan at step 5; the last finite loss was 2.5000 at step 4. Skipped" in capsys.readouterr().err


def test_fp16_gradients_that_stay_infinite_end_the_run(tmp_path):
    metrics = start_metrics(tmp_path)
    arguments = SimpleNamespace(**{**vars(ARGUMENTS), "fp16": True})
    metrics.on_train_begin(arguments, make_state(0), None)
    skipped, taken = SimpleNamespace(step_was_skipped=True), SimpleNamespace(step_was_skipped=False)
    for optimizer in [*[skipped] * 24, taken, *[skipped] * 24]:
        metrics.on_optimizer_step(arguments, make_state(7), None, optimizer=optimizer)
    with pytest.raises(DivergedError, match="25 consecutive steps, up to step 8"):
        metrics.on_optimizer_step(arguments, make_state(7), None, optimizer=skipped)


def test_only_the_main_process_records_a_divergence(tmp_path):
    """The others do not know the time of earlier starts, from which the next start would continue."""
    for first in (True, False):
        metrics = MetricsCallback(tmp_path, lambda step: step)
        metrics.on_train_begin(
            ARGUMENTS, SimpleNamespace(**{**vars(make_state(0)), "is_world_process_zero": first}), None
        )
        with pytest.raises(DivergedError):
            run_step(DivergenceCallback(metrics), 5, math.nan)
    assert ["seconds" in line for line in read_strict(tmp_path / "metrics.jsonl")] == [
        True
    ]  # the other process wrote nothing


def test_fp16_counts_infinite_gradients_as_skipped_steps(tmp_path, clock, capsys):
    metrics, arguments = (
        MetricsCallback(tmp_path, lambda step: step),
        SimpleNamespace(**{**vars(ARGUMENTS), "fp16": True}),
    )
    metrics.on_train_begin(arguments, make_state(0), None)
    watch = DivergenceCallback(metrics)
    for step, skipped in ((1, True), (2, True), (3, False)):
        run_step(watch, step, 2.0, norm=math.inf, fp16=True)
        metrics.on_optimizer_step(arguments, None, None, optimizer=SimpleNamespace(step_was_skipped=skipped))
    clock.now += 1
    assert log(metrics, 3, arguments, loss=2.0)["skipped_steps"] == 2
    clock.now += 1
    assert log(metrics, 4, arguments, loss=2.0)["skipped_steps"] == 0
    assert "2 steps skipped (infinite gradients)" in capsys.readouterr().err.splitlines()[0]
    with pytest.raises(DivergedError, match="The loss is nan at step 5"):
        run_step(watch, 5, math.nan, norm=math.inf, fp16=True)


def test_watching_costs_less_than_50_microseconds_a_step(tmp_path):
    watch, loss, norm = DivergenceCallback(start_metrics(tmp_path)), torch.tensor(2.0), torch.tensor(1.0)
    best = math.inf
    for _ in range(5):
        started = time.process_time()
        for step in range(200):
            run_step(watch, step, loss, norm)
        best = min(best, (time.process_time() - started) / 200)
    assert best < 50e-6
