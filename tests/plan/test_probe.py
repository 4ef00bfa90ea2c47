"""Measured speed."""

import pytest
from plan_support import make_test_plan
from support import command

from rorchat.plan.budget import make_plan
from rorchat.plan.cost import estimate_seconds_per_token
from rorchat.plan.probe import Probe
from rorchat.plan.show import list_assumptions


def test_a_plan_uses_the_measured_speed():
    arguments = ["--size", "2x2x128", "--tokens", "1e7", "--device", "cpu", "--vocabulary", 512, "--block_size", 64]
    done = command("plan", *arguments, "--probe", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    assert "probe: 4 steps of 2x2x128 on" in done.stderr
    assert "measured |" in done.stdout and "Speed: measured here" in done.stdout
    assert "assumed" not in done.stdout


def test_a_measured_step_has_all_micro_batches_and_one_update():
    plan = make_test_plan("A100-80", size="124m", tokens=1e10, gpus=2)
    probed = Probe(micro_batch=8, micro_step=0.1, update=0.05, spread=0.0)
    rows = plan.global_batch_tokens // 1024
    step = rows / 8 * 0.1 / 2 + 0.05  # every GPU does half of the micro-batches, and all of the update
    assert probed.seconds_per_token(plan) == pytest.approx(step / plan.global_batch_tokens)
    again = make_plan(plan.request, measured=probed.seconds_per_token(plan))
    assert again.hours == pytest.approx(plan.tokens * step / plan.global_batch_tokens * 1.1 / 3600)
    assert estimate_seconds_per_token(again.setup, again.shape, 1, 1024) == probed.seconds_per_token(plan)


def test_a_busy_machine_is_reported():
    plan = make_test_plan("cpu", tokens=1e8, size="2x2x128", mfu=0.5, block_size=128)
    text = {spread: " ".join(list_assumptions(plan, Probe(4, 0.2, 0.01, spread))) for spread in (0.05, 0.5)}
    assert "was busy" in text[0.5] and "was busy" not in text[0.05]
