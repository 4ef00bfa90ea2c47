"""SIGKILL at every file operation of a save costs at most one save interval, and the run resumes identically."""

import pytest
from faults.harness import kill_during_save

WRITERS = ("open", "save", "safe_save_file", "save_file")  # operations that can leave a torn file


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_during_a_save_costs_at_most_one_interval(sandbox, stopped_at_4, uninterrupted, every):
    assert not kill_during_save(sandbox, stopped_at_4, uninterrupted, every)


@pytest.mark.slow
def test_a_torn_file_costs_at_most_one_interval(sandbox, stopped_at_4, uninterrupted):
    assert not kill_during_save(sandbox, stopped_at_4, uninterrupted, every=4, only=WRITERS, torn=True)
