"""Memory and disk of a project."""

import shutil
from dataclasses import replace

import pytest
from project_support import make_scheduler, write_data

from rorchat.project.resources import describe_resources, estimate_disk, estimate_memory
from rorchat.project.sizing import SHAPES
from rorchat.project.vocabulary import Vocabulary


@pytest.fixture
def scheduler(tmp_path):
    return make_scheduler(write_data(tmp_path))


def test_a_larger_model_needs_more(scheduler):
    small, large = (scheduler.schedule(shape, Vocabulary(1024, 2.5, 2.5)) for shape in (SHAPES[1], SHAPES[6]))
    for estimate in (estimate_memory, estimate_disk):
        assert 0 < estimate(scheduler, small) < estimate(scheduler, large)


def test_disk_is_that_of_checkpoints_models_and_stores(scheduler):
    """4x4x128 with 1,024 tokens and 256 positions: 957,184 parameters; 4 stages with 2 checkpoints and a model each."""
    vocabulary = Vocabulary(1024, 2.5, 2.5)
    schedule = scheduler.schedule(SHAPES[2], vocabulary)
    tokens = sum(scheduler.count_tokens(group, vocabulary) for group in ("documents", "conversations", "persona"))
    assert estimate_disk(scheduler, schedule) == pytest.approx(4 * 957_184 * (2 * 12 + 4) + 2 * 2 * tokens)


def test_too_little_memory_or_disk_is_told(scheduler, tmp_path, monkeypatch):
    schedule = scheduler.schedule(SHAPES[6], Vocabulary(1024, 2.5, 2.5))
    text = describe_resources(scheduler, schedule, tmp_path / "not" / "there")
    assert "GB of memory" in text and "only" not in text
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_000_000))
    assert "The disk has only 1 MB left" in describe_resources(scheduler, schedule, tmp_path)
    device = replace(scheduler.machine.device, memory_bytes=5 * 10**8)
    scheduler = replace(scheduler, machine=replace(scheduler.machine, device=device))
    assert "has only 0.5 GB in all: give fewer --hours" in describe_resources(scheduler, schedule, tmp_path)
