"""Fixtures of the tests of callbacks."""

import pytest
from callback_support import Clock

from rorchat.training.callbacks import metrics as metrics_module


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Replaces the clock of the metrics."""
    clock = Clock()
    monkeypatch.setattr(metrics_module, "time", clock)
    return clock
