"""The precision of training is the one that this machine computes fastest, also beside other work."""

import random

import pytest
import torch

from rorchat import precision
from rorchat.precision import HOPELESS, choose_precision, compare_speeds, measure_precisions


@pytest.mark.parametrize(
    ("machine", "speeds", "chosen"),
    [
        ("AMD EPYC with AVX512-BF16", {"fp32": 212e9, "bf16": 952e9}, "bf16"),
        ("Intel Xeon without AMX", {"fp32": 193e9, "bf16": 97e9}, "fp32"),
        ("Intel Xeon with AMX", {"fp32": 200e9, "bf16": 1900e9}, "bf16"),
        ("AMD EPYC without AVX-512", {"fp32": 90e9, "bf16": 7e9}, "fp32"),
        ("no difference worth the rounding", {"fp32": 100e9, "bf16": 105e9}, "fp32"),
        ("T4", {"fp32": 8.1e12, "bf16": 3e12, "fp16": 65e12}, "fp16"),
        ("V100", {"fp32": 15.7e12, "bf16": 12e12, "fp16": 125e12}, "fp16"),
        ("V100 that emulates bf16 well", {"fp32": 15.7e12, "bf16": 20e12, "fp16": 125e12}, "fp16"),
        ("P100", {"fp32": 9.3e12, "fp16": 18.7e12}, "fp16"),
        ("A100", {"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12}, "bf16"),
        ("A100, fp16 a little faster", {"fp32": 19.5e12, "bf16": 240e12, "fp16": 290e12}, "bf16"),
    ],
)
def test_the_fastest_precision_is_chosen_unless_it_gains_little(machine, speeds, chosen):
    assert choose_precision(speeds) == chosen


class Clock:
    """A machine on which works have given speeds, and other work disturbs single runs."""

    def __init__(self, speeds: dict[str, float], seed: int = 0):
        self.speeds, self.random, self.now = speeds, random.Random(seed), 0.0
        self.runs: list[tuple[float, str]] = []
        self.started: set[str] = set()

    def levels(self, *flops: float):
        return [(size, {name: lambda size=size, name=name: (size, name) for name in self.speeds}) for size in flops]

    def measure(self, work) -> float:
        flops, name = work()
        self.runs.append((flops, name))
        seconds = flops / self.speeds[name]
        if name not in self.started:  # loads a library
            self.started.add(name)
            seconds += 10
        elif self.random.random() < 0.3:
            seconds *= self.random.uniform(2, 50)
        self.now += seconds
        return seconds


@pytest.mark.parametrize("seed", range(20))
def test_other_work_and_the_first_run_do_not_change_the_choice(seed):
    clock = Clock({"bf16": 250.0, "fp32": 100.0}, seed)
    speeds = compare_speeds(clock.levels(1.0, 10.0, 100.0), clock.measure)
    assert choose_precision(speeds) == "bf16"
    assert max(speeds.values()) <= 250


def test_a_hopeless_precision_is_timed_only_at_the_smallest_size():
    clock = Clock({"bf16": 100 / HOPELESS / 1.01, "fp32": 100.0}, seed=1)
    clock.random.random = lambda: 1.0  # no other work
    speeds = compare_speeds(clock.levels(1.0, 10.0), clock.measure)
    assert {flops for flops, name in clock.runs if name == "bf16"} == {1.0}
    assert {flops for flops, name in clock.runs if name == "fp32"} == {1.0, 10.0}
    assert speeds["bf16"] == pytest.approx(100 / HOPELESS / 1.01)


def test_work_grows_only_as_long_as_time_is_left(monkeypatch):
    clock = Clock({"bf16": 50.0, "fp32": 100.0})
    clock.started = {"bf16", "fp32"}
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock.now)
    clock.random.random = lambda: 1.0
    compare_speeds(clock.levels(1.0, 10.0, 1000.0), clock.measure, seconds=2.0)
    assert {flops for flops, _ in clock.runs} == {1.0, 10.0}
    assert clock.now <= 2.0


def test_the_measurement_leaves_random_numbers_and_threads_alone():
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    speeds = measure_precisions.__wrapped__("cpu", 32)
    assert set(speeds) == {"bf16", "fp32"} and min(speeds.values()) > 1e6
    assert torch.equal(state, torch.random.get_rng_state()) and threads == torch.get_num_threads()
