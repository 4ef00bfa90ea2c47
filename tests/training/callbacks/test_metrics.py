"""metrics.jsonl, and the progress line with speed, time left and cost."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from callback_support import ARGUMENTS, log, make_state, start_metrics
from support import read_strict

from rorchat.jsonl import append_json_line, drop_partial_line
from rorchat.training.callbacks import metrics as metrics_module
from rorchat.training.callbacks.metrics import MetricsCallback, Utilization, format_seconds, read_elapsed
from rorchat.training.callbacks.samples import SamplesCallback
from rorchat.training.callbacks.signals import SignalCallback


def test_nan_and_infinity_are_written_as_strings(tmp_path):
    append_json_line(tmp_path / "m.jsonl", {"loss": math.nan, "inner": {"a": math.inf, "b": -math.inf}, "c": 1.5})
    assert read_strict(tmp_path / "m.jsonl") == [{"loss": "nan", "inner": {"a": "inf", "b": "-inf"}, "c": 1.5}]


def test_a_partial_line_is_dropped_and_the_time_continues(tmp_path):
    path = tmp_path / "m.jsonl"
    assert read_elapsed(path) == (0, 0)
    append_json_line(path, {"step": 1, "seconds": 12.5, "dollars": 0.25})
    append_json_line(path, {"step": 2, "note": "ä"})
    whole = path.read_bytes()
    path.write_bytes(whole + '{"step": 3, "text": "ä'.encode()[:-1])
    drop_partial_line(path)
    assert path.read_bytes() == whole
    assert read_elapsed(path) == (12.5, 0.25)


def test_a_progress_line_has_speed_time_left_and_cost(tmp_path, clock, capsys):
    metrics = start_metrics(tmp_path, price_per_hour=36.0, measure_utilization=lambda: Utilization(1e6, 1e9, "known"))
    clock.now += 10
    log(metrics, 10, loss=2.0, learning_rate=1e-3)
    clock.now += 32
    log(metrics, 10, eval_loss=1.5, eval_bits_per_byte=0.75, eval_seconds=32.0)
    assert capsys.readouterr().err.splitlines() == [
        "step 10/40  loss 2.000  learning rate 1.00e-03  100 tokens/s  MFU 10.0%  "
        "30 s left, plus 3 evaluations and 2 sets of samples  $0.10",
        "step 10/40  validation loss 1.500  bits/byte 0.750  $0.42",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min"), (6, "6 s"), (200, "3 min 20 s"), (3600, "1 h"), (3605, "1 h"), (7500, "2 h 5 min"),
     (86_400, "1 day"), (200_000, "2 days 7 h")],
)  # fmt: skip
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert format_seconds(seconds) == text


def measure(flops_per_token: float, *peaks: float):
    """A measurement of the peak that gives `peaks` one after another, and the list of its calls."""
    left, calls = [*peaks], []

    def measure_utilization(repeat: bool = False) -> Utilization:
        calls.append(repeat)
        return Utilization(flops_per_token, left.pop(0), "measured")

    return measure_utilization, calls


@pytest.mark.parametrize(("again", "peak"), [(1.5e8, 1.5e8), (0.9e8, 1e8)])
def test_a_step_faster_than_the_peak_raises_the_peak(tmp_path, clock, capsys, again, peak):
    """100 tokens/s of 1e6 FLOPs are 1e8 FLOP/s: the second measurement finds this peak, or training itself does."""
    measure_utilization, calls = measure(1e6, 0.5e8, again)
    metrics = start_metrics(tmp_path, measure_utilization=measure_utilization)
    for step in (10, 20):
        clock.now += 10
        log(metrics, step, loss=2.0)
    assert calls == [False, True]
    first, second = read_strict(tmp_path / "metrics.jsonl")
    assert (first["mfu"], first["peak"], first["peak_flops"]) == (pytest.approx(1e8 / peak, abs=1e-5), "raised", peak)
    assert second["mfu"] == first["mfu"] <= 1 and "peak" not in second
    shown = capsys.readouterr().err.splitlines()
    assert f"peak raised to {peak / 1e12:.3g} TFLOP/s" in shown[0] and "peak" not in shown[1]


def test_a_peak_that_is_not_reached_is_measured_once(tmp_path, clock):
    measure_utilization, calls = measure(1e6, 2e8)
    metrics = start_metrics(tmp_path, measure_utilization=measure_utilization)
    clock.now += 10
    log(metrics, 10, loss=2.0)
    (line,) = read_strict(tmp_path / "metrics.jsonl")
    assert calls == [False] and (line["mfu"], line["peak"], line["peak_flops"]) == (0.5, "measured", 2e8)


def test_the_time_left_is_not_carried_away_by_one_slow_window(tmp_path, clock, capsys):
    metrics = start_metrics(tmp_path)
    for step, took in ((4, 400), (8, 4), (12, 4), (16, 4), (20, 90)):
        clock.now += took
        log(metrics, step, loss=2.0)
    assert "  20 s left" in capsys.readouterr().err.splitlines()[-1]


def test_evaluation_and_sampling_do_not_count_as_training_time(tmp_path, clock):
    metrics = start_metrics(tmp_path)
    clock.now += 5
    log(metrics, 1, loss=2.0)
    clock.now += 30
    log(metrics, 1, eval_loss=1.5, eval_seconds=30.0)

    def generate(prompts):
        clock.now += 60
        return ["hello"]

    model = torch.nn.Linear(1, 1).train()
    SamplesCallback(tmp_path, ["Hi"], generate, metrics, SignalCallback(tmp_path)).on_train_end(
        ARGUMENTS, make_state(1), None, model=model
    )
    clock.now += 4
    logs = log(metrics, 3, loss=2.0)
    assert (logs["tokens_per_second"], logs["seconds"]) == (50, 99)  # 200 tokens in 4 s of 99
    clock.now += 10
    assert log(metrics, 4, loss=2.0)["tokens_per_second"] == 10


def test_a_resumed_run_adds_an_event_and_continues_time_and_cost(tmp_path, clock):
    metrics = start_metrics(tmp_path, price_per_hour=3600.0)
    clock.now += 50
    log(metrics, 10, loss=2.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    clock.now += 10_000
    again = MetricsCallback(tmp_path, lambda step: 100 * step, price_per_hour=7200.0)
    again.on_train_begin(ARGUMENTS, make_state(8), None)
    clock.now += 10
    log(again, 10, loss=2.0)
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    lines = read_strict(tmp_path / "metrics.jsonl")
    assert lines[1] == {"event": "resumed", "step": 8, "seconds": 50.0, "dollars": 50.0}
    assert (lines[2]["seconds"], lines[2]["dollars"], lines[2]["tokens_per_second"]) == (60, 70, 20)


def test_a_bar_shows_loss_and_speed(tmp_path, clock, monkeypatch):
    shown = []
    bar = SimpleNamespace(
        set_postfix_str=shown.append,
        write=lambda line, file: shown.append(line),
        update=shown.append,
        close=lambda: None,
    )
    monkeypatch.setattr(metrics_module, "tqdm", lambda **settings: shown.append(settings["total"]) or bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)  # set by commands that ran in this process
    metrics = start_metrics(tmp_path)
    clock.now += 1
    metrics.on_step_end(ARGUMENTS, make_state(1), None)
    log(metrics, 1, SimpleNamespace(**{**vars(ARGUMENTS), "eval_strategy": "no", "sample_steps": 0}), loss=2.5)
    assert shown == [40, 1, "loss 2.500, 100 tokens/s", "step 1/40  loss 2.500  100 tokens/s  39 s left"]


def test_only_the_main_process_writes(tmp_path, clock, capsys):
    metrics = MetricsCallback(tmp_path, lambda step: 100 * step)
    metrics.on_train_begin(ARGUMENTS, make_state(3, first=False), None)
    clock.now += 1
    metrics.on_log(ARGUMENTS, make_state(4, first=False), None, logs=metrics.complete({"loss": 2.0}, 4))
    SamplesCallback(tmp_path, ["Hi"], None, metrics, SignalCallback(tmp_path)).on_train_end(
        ARGUMENTS, make_state(4, first=False), None
    )
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""
