"""`rorchat.new` and `rorchat.run` in Python."""

from pathlib import Path

import pytest
from project_support import make_machine, write_data

import rorchat
from rorchat.errors import UsageError
from rorchat.project import create, runner


def test_a_project_is_made_and_run(tmp_path, monkeypatch):
    monkeypatch.setattr(create, "measure_machine", lambda block_size: make_machine(block_size=block_size))
    monkeypatch.setattr(create, "measure_seconds_per_token", lambda *_, **__: 1e-4)
    given = write_data(tmp_path)
    project = rorchat.new(
        tmp_path / "bot", documents=tmp_path / "texts.jsonl", conversations=given["conversations"], hours=0.2
    )
    assert 0 < project.schedule.total_seconds <= 1.02 * 720 and project.survey.rows("documents") == 400
    commands = []

    def record(words, folder: Path) -> int:
        commands.append(words[1])
        return 0

    monkeypatch.setattr(runner, "run_command", record)
    times = rorchat.run(str(tmp_path / "bot"))
    assert commands[0] == "train-tokenizer" and [time.name for time in times][-1] == "report"


def test_a_folder_that_is_no_project_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no run.sh"):
        rorchat.run(tmp_path)
