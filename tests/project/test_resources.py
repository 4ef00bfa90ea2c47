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


def test_too_little_memory_or_disk_is_told(scheduler, tmp_path, monkeypatch):
    schedule = scheduler.schedule(SHAPES[6], Vocabulary(1024, 2.5, 2.5))
    text = describe_resources(scheduler, schedule, tmp_path / "not" / "there")
    assert "GB of memory" in text and "only" not in text
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_000_000))
    assert "The disk has only 1 MB left" in describe_resources(scheduler, schedule, tmp_path)
    device = replace(scheduler.machine.device, memory_bytes=10**9)
    scheduler = replace(scheduler, machine=replace(scheduler.machine, device=device))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rorchat.project.resources.estimate_memory", lambda *_: 2e9)
        assert "has only 1.0 GB: close other programs" in describe_resources(scheduler, schedule, tmp_path)
