"""Callbacks by themselves: speed, time left and cost by the clock, and the step at which a run has diverged."""

import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import read_strict

from rorchat.errors import DivergedError
from rorchat.jsonl import append_json_line, drop_partial_line
from rorchat.training.callbacks import metrics as metrics_module
from rorchat.training.callbacks.divergence import DivergenceCallback
from rorchat.training.callbacks.metrics import MetricsCallback, Utilization, read_elapsed
from rorchat.training.callbacks.samples import SamplesCallback


def test_numbers_that_json_does_not_have_become_words(tmp_path):
    append_json_line(tmp_path / "m.jsonl", {"loss": math.nan, "inner": {"a": math.inf, "b": -math.inf}, "c": 1.5})
    assert read_strict(tmp_path / "m.jsonl") == [{"loss": "nan", "inner": {"a": "inf", "b": "-inf"}, "c": 1.5}]


def test_a_half_written_line_is_cut_off_and_time_goes_on_from_the_last_whole_one(tmp_path):
    path = tmp_path / "m.jsonl"
    assert read_elapsed(path) == (0, 0)
    append_json_line(path, {"step": 1, "seconds": 12.5, "dollars": 0.25})
    append_json_line(path, {"step": 2, "note": "ä"})
    whole = path.read_bytes()
    path.write_bytes(whole + '{"step": 3, "text": "ä'.encode()[:-1])
    drop_partial_line(path)
    assert path.read_bytes() == whole
    assert read_elapsed(path) == (12.5, 0.25)


# The clock and the progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_module, "time", clock)
    return clock


def a_state(step: int, first: bool = True, until: int = 40) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=until, eval_steps=10, is_world_process_zero=first)


ARGUMENTS = SimpleNamespace(fp16=False, eval_strategy="steps", sample_prompts=["Hi"], sample_steps=20)


def begun(folder: Path, **settings) -> MetricsCallback:
    metrics = MetricsCallback(folder, lambda step: 100 * step, **settings)
    metrics.on_train_begin(ARGUMENTS, a_state(0), None)
    return metrics


def log(metrics: MetricsCallback, step: int, arguments=ARGUMENTS, **logs: float) -> dict:
    logs = metrics.complete(logs, step)
    metrics.on_log(arguments, a_state(step), None, logs=logs)
    return logs


def test_the_line_says_speed_time_left_what_is_not_in_it_and_the_cost(tmp_path, clock, capsys):
    metrics = begun(tmp_path, price_per_hour=36.0, measure=lambda: Utilization(1e6, 1e9, "known"))
    clock.now += 10
    log(metrics, 10, loss=2.0, learning_rate=1e-3)
    clock.now += 32
    log(metrics, 10, eval_loss=1.5, eval_bits_per_byte=0.75, eval_seconds=32.0)
    assert capsys.readouterr().err.splitlines() == [
        "step 10/40  loss 2.000  lr 1.00e-03  100 tokens/s  MFU 10.0%  "
        "0:00:30 left without 3 evaluations, 2 samplings  $0.10",
        "step 10/40  validation loss 1.500  bits/byte 0.750  $0.42",
    ]


def test_the_time_left_is_not_carried_away_by_one_slow_window(tmp_path, clock, capsys):
    metrics = begun(tmp_path)
    for step, took in ((4, 400), (8, 4), (12, 4), (16, 4), (20, 90)):
        clock.now += took
        log(metrics, step, loss=2.0)
    assert "0:00:20 left" in capsys.readouterr().err.splitlines()[-1]


def test_evaluation_and_sampling_are_no_training_time(tmp_path, clock):
    metrics = begun(tmp_path)
    clock.now += 5
    log(metrics, 1, loss=2.0)
    clock.now += 30
    log(metrics, 1, eval_loss=1.5, eval_seconds=30.0)

    def speak(prompts):
        clock.now += 60
        return ["hello"]

    model = torch.nn.Linear(1, 1).train()
    SamplesCallback(tmp_path, ["Hi"], speak, metrics).on_train_end(ARGUMENTS, a_state(1), None, model=model)
    clock.now += 4
    logs = log(metrics, 3, loss=2.0)
    assert (logs["tokens_per_second"], logs["seconds"]) == (50, 99)  # 200 tokens in 4 s of 99
    clock.now += 10
    assert log(metrics, 4, loss=2.0)["tokens_per_second"] == 10


def test_a_restart_adds_a_line_and_time_and_cost_go_on(tmp_path, clock):
    metrics = begun(tmp_path, price_per_hour=3600.0)
    clock.now += 50
    log(metrics, 10, loss=2.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    clock.now += 10_000
    again = MetricsCallback(tmp_path, lambda step: 100 * step, price_per_hour=7200.0)
    again.on_train_begin(ARGUMENTS, a_state(8), None)
    clock.now += 10
    log(again, 10, loss=2.0)
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    lines = read_strict(tmp_path / "metrics.jsonl")
    assert lines[1] == {"event": "resumed", "step": 8, "seconds": 50.0, "dollars": 50.0}
    assert (lines[2]["seconds"], lines[2]["dollars"], lines[2]["tokens_per_second"]) == (60, 70, 20)


def test_a_bar_shows_loss_and_speed(tmp_path, clock, monkeypatch):
    said = []
    bar = SimpleNamespace(
        set_postfix_str=said.append, write=lambda line, file: said.append(line), update=said.append, close=lambda: None
    )
    monkeypatch.setattr(metrics_module, "tqdm", lambda **settings: said.append(settings["total"]) or bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    metrics = begun(tmp_path)
    clock.now += 1
    metrics.on_step_end(ARGUMENTS, a_state(1), None)
    log(metrics, 1, SimpleNamespace(**{**vars(ARGUMENTS), "eval_strategy": "no", "sample_steps": 0}), loss=2.5)
    assert said == [40, 1, "loss 2.500, 100 tokens/s", "step 1/40  loss 2.500  100 tokens/s  0:00:39 left"]


def test_other_processes_write_and_show_nothing(tmp_path, clock, capsys):
    metrics = MetricsCallback(tmp_path, lambda step: 100 * step)
    metrics.on_train_begin(ARGUMENTS, a_state(3, first=False), None)
    clock.now += 1
    metrics.on_log(ARGUMENTS, a_state(4, first=False), None, logs=metrics.complete({"loss": 2.0}, 4))
    SamplesCallback(tmp_path, ["Hi"], None, metrics).on_train_end(ARGUMENTS, a_state(4, first=False), None)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


# Samples


def test_the_model_speaks_in_evaluation_and_goes_on_in_training(tmp_path):
    model, seen = torch.nn.Dropout(0.5).train(), []
    samples = SamplesCallback(tmp_path, ["Hi"], lambda prompts: seen.append(model.training) or ["x"], begun(tmp_path))
    samples.on_step_end(ARGUMENTS, a_state(20), None, model=model)
    samples.on_step_end(ARGUMENTS, a_state(21), None, model=model)
    samples.on_step_end(ARGUMENTS, a_state(40), None, model=model)  # the last one is taken by on_train_end
    assert seen == [False] and model.training


# What has diverged


def a_step(watch: DivergenceCallback, step: int, loss, norm=1.0, fp16: bool = False) -> None:
    watch.record_loss(step, torch.as_tensor(loss))
    watch.record_grad_norm(norm)
    watch.on_pre_optimizer_step(SimpleNamespace(fp16=fp16), None, None)


def test_the_loss_of_a_step_is_the_sum_over_its_micro_batches(tmp_path):
    watch = DivergenceCallback(begun(tmp_path))
    watch.record_loss(4, torch.tensor(1.0))
    a_step(watch, 4, 1.5)
    with pytest.raises(DivergedError, match="the last finite loss was 2.5000 at step 4"):
        a_step(watch, 5, math.nan)


class OnDevice(DivergenceCallback):
    """Keeps the sum where the loss is, as on a GPU."""

    def see(self, step, loss):
        self.step, self.loss = step, self.loss + loss


def test_on_a_device_the_step_itself_is_judged_before_the_optimizer_takes_it(tmp_path):
    watch = OnDevice(begun(tmp_path))
    a_step(watch, 4, 2.5)
    with pytest.raises(DivergedError, match="norm inf at step 5; the last finite loss was 2.5000 at step 4"):
        a_step(watch, 5, 2.5, norm=torch.tensor(math.inf))


def test_a_step_that_could_be_mended_is_told_and_the_run_goes_on(tmp_path, capsys):
    asked = []
    watch = DivergenceCallback(begun(tmp_path), mend=lambda step: asked.append(step) or ("skipped" if step < 7 else ""))
    for step, loss in ((4, 2.5), (5, math.nan), (6, 2.4)):
        a_step(watch, step, loss)
    with pytest.raises(DivergedError, match="The loss is inf at step 7; the last finite loss was 2.4000 at step 6"):
        a_step(watch, 7, math.inf)
    assert asked == [5, 7]
    events = [line["event"] for line in read_strict(tmp_path / "metrics.jsonl")]
    assert events == ["skipped", "diverged"]
    assert "The loss is nan at step 5; the last finite loss was 2.5000 at step 4. Skipped" in capsys.readouterr().err


def test_under_fp16_a_run_whose_gradients_stay_infinite_ends(tmp_path):
    metrics = begun(tmp_path)
    arguments = SimpleNamespace(**{**vars(ARGUMENTS), "fp16": True})
    metrics.on_train_begin(arguments, a_state(0), None)
    skipped, taken = SimpleNamespace(step_was_skipped=True), SimpleNamespace(step_was_skipped=False)
    for optimizer in [*[skipped] * 24, taken, *[skipped] * 24]:
        metrics.on_optimizer_step(arguments, a_state(7), None, optimizer=optimizer)
    with pytest.raises(DivergedError, match="25 steps in a row, up to step 8"):
        metrics.on_optimizer_step(arguments, a_state(7), None, optimizer=skipped)


def test_only_the_first_process_tells_the_time_at_which_a_run_diverged(tmp_path):
    """The others have not read what earlier starts took, and the next start goes on from the last time in the file."""
    for first in (True, False):
        metrics = MetricsCallback(tmp_path, lambda step: step)
        metrics.on_train_begin(ARGUMENTS, SimpleNamespace(**{**vars(a_state(0)), "is_world_process_zero": first}), None)
        with pytest.raises(DivergedError):
            a_step(DivergenceCallback(metrics), 5, math.nan)
    assert ["seconds" in line for line in read_strict(tmp_path / "metrics.jsonl")] == [True]  # the other wrote none


def test_under_fp16_an_infinite_gradient_is_a_skipped_step_and_a_lost_loss_is_not(tmp_path, clock, capsys):
    metrics, arguments = (
        MetricsCallback(tmp_path, lambda step: step),
        SimpleNamespace(**{**vars(ARGUMENTS), "fp16": True}),
    )
    metrics.on_train_begin(arguments, a_state(0), None)
    watch = DivergenceCallback(metrics)
    for step, skipped in ((1, True), (2, True), (3, False)):
        a_step(watch, step, 2.0, norm=math.inf, fp16=True)
        metrics.on_optimizer_step(arguments, None, None, optimizer=SimpleNamespace(step_was_skipped=skipped))
    clock.now += 1
    assert log(metrics, 3, arguments, loss=2.0)["skipped_steps"] == 2
    clock.now += 1
    assert log(metrics, 4, arguments, loss=2.0)["skipped_steps"] == 0
    assert "2 steps skipped (infinite gradients)" in capsys.readouterr().err.splitlines()[0]
    with pytest.raises(DivergedError, match="The loss is nan at step 5"):
        a_step(watch, 5, math.nan, norm=math.inf, fp16=True)


def test_watching_costs_less_than_50_microseconds_a_step(tmp_path):
    watch, loss, norm = DivergenceCallback(begun(tmp_path)), torch.tensor(2.0), torch.tensor(1.0)
    best = math.inf
    for _ in range(5):
        started = time.process_time()
        for step in range(200):
            a_step(watch, step, loss, norm)
        best = min(best, (time.process_time() - started) / 200)
    assert best < 50e-6
