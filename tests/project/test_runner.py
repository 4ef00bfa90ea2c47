"""`rorchat run`: the commands of a project, in order, with what happens when one fails."""

import json
import os
import signal
import subprocess
import sys
import time

import preloaded
import pytest
from project_support import write_data
from recipe_commands import SHORT_REPLIES

from rorchat.cli.project import run
from rorchat.errors import WITHIN_PROJECT, DataError, Interrupted, MismatchError, UsageError
from rorchat.files import folder_lock
from rorchat.inference.engine import load_model
from rorchat.project import runner
from rorchat.project.create import create_project
from rorchat.project.resources import estimate_disk
from rorchat.project.runner import StageFailed, read_steps, run_project
from rorchat.training.next_step import describe_next

SCRIPT = """#!/usr/bin/env bash
# a project
set -euo pipefail
cd "$(dirname "$0")"

rorchat train-tokenizer --config tokenizer.yaml
rorchat pretrain --config pretrain.yaml \\
    --max_steps 3  # few
rorchat gate runs/pretrain --out runs/behaviour.json
rorchat report runs
rorchat push runs/pretrain me/mine
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.sh").write_text(SCRIPT)
    stages = [{"name": "tokenizer", "seconds": 12.0}, {"name": "pretrain", "seconds": 60.0}]
    (tmp_path / "plan.json").write_text(json.dumps({"stages": stages}))
    return tmp_path


@pytest.fixture
def recorded(monkeypatch):
    """Records the commands instead of running them; `codes` has their exit codes."""
    commands, codes = [], {}

    def run_command(words, folder):
        commands.append(words[1])
        return codes.get(words[1], 0)

    monkeypatch.setattr(runner, "run_command", run_command)
    return commands, codes


def test_commands_are_read_with_their_planned_times(folder):
    steps = read_steps(folder)
    assert [(step.name, step.seconds, step.line) for step in steps] == [
        ("tokenizer", 12.0, 6), ("pretrain", 60.0, 7), ("gate", 0.0, 9), ("report", 0.0, 10), ("push", 0.0, 11)
    ]  # fmt: skip
    assert steps[1].words == ("rorchat", "pretrain", "--config", "pretrain.yaml", "--max_steps", "3")


@pytest.mark.parametrize("line", ["python train.py", "rorchat report runs > report.txt", "rorchat gate x || true"])
def test_another_kind_of_line_is_refused_by_number(folder, line):
    (folder / "run.sh").write_text(f"set -e\n{line}\n")
    with pytest.raises(UsageError, match=r"run.sh:2: .* only plain commands .* bash"):
        read_steps(folder)


def test_a_folder_without_a_script_and_a_damaged_plan_are_refused(folder, tmp_path):
    (folder / "plan.json").write_text("{")
    with pytest.raises(DataError, match="plan.json cannot be read"):
        read_steps(folder)
    (folder / "run.sh").unlink()
    with pytest.raises(UsageError, match=r"no run.sh: give the folder of a project"):
        read_steps(folder)
    with pytest.raises(UsageError, match="No folder .*nowhere"):
        read_steps(tmp_path / "nowhere")


def test_all_commands_run_in_order_and_show_the_time_left(folder, recorded):
    commands, _ = recorded
    lines = []
    times = run_project(folder, show=lines.append)
    assert commands == ["train-tokenizer", "pretrain", "gate", "report", "push"]
    assert [t.name for t in times] == ["tokenizer", "pretrain", "gate", "report", "push"]
    assert lines[0].startswith("[1/5] tokenizer: rorchat train-tokenizer")
    assert "about 12 s; 1.2 min until everything is done" in lines[0]
    assert "(planned: 12 s)" in lines[1]


def test_finished_stages_and_checkpoints_are_not_counted_as_time_left(folder, recorded):
    tokenizer, pretrain = folder / "runs" / "tokenizer", folder / "runs" / "pretrain" / "checkpoint-3"
    for place in (tokenizer, pretrain):
        place.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    (pretrain.parent / "run.json").write_text("{}")
    (pretrain / "trainer_state.json").write_text(json.dumps({"global_step": 3, "max_steps": 4}))
    lines = []
    run_project(folder, show=lines.append)
    assert "already finished; 15 s until everything is done" in lines[0]
    assert "about 15 s; 15 s until everything is done" in lines[2]


def test_the_time_of_a_resumed_stage_is_that_of_all_its_starts(folder, recorded, monkeypatch):
    """Each command takes ten seconds. The first start of pretraining is interrupted after its checkpoint."""
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(now))
    progress = {"pretrain": iter([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])}
    monkeypatch.setattr(runner, "measure_progress", lambda run: next(progress.get(run.name, iter([0.0]))))
    _, codes = recorded
    codes["pretrain"] = 75
    with pytest.raises(Interrupted):
        run_project(folder, show=lambda _: None)
    codes.clear()
    for _ in range(2):
        monkeypatch.setattr(runner, "_format_left", lambda *_: "")
        took = {stage.name: stage.seconds for stage in run_project(folder, show=lambda _: None)}
        assert took["pretrain"] == 20 and took["gate"] == 10


def test_a_project_runs_once_at_a_time(folder, recorded):
    with folder_lock(folder), pytest.raises(MismatchError, match="is in use by process"):
        run_project(folder, show=lambda _: None)
    assert recorded[0] == []


def test_commands_of_a_project_name_no_next_command(tmp_path, monkeypatch):
    (tmp_path / "run.sh").write_text("rorchat --version\n")
    seen = []
    monkeypatch.setattr(runner.subprocess, "Popen", lambda *_, env, **__: seen.append(env) or _Finished())
    run_project(tmp_path, show=lambda _: None)
    assert describe_next(["rorchat chat x"]) == "next: rorchat chat x"
    monkeypatch.setattr(os, "environ", seen[0])
    assert describe_next(["rorchat chat x"]) == ""


class _Finished:
    def wait(self):
        return 0


def test_a_failed_gate_still_reports_but_stops_the_project(folder, recorded):
    commands, codes = recorded
    codes["gate"], lines = 70, []
    with pytest.raises(StageFailed, match="The gate failed.*--anyway") as failure:
        run_project(folder, show=lines.append)
    assert [stage.name for stage in failure.value.times] == ["tokenizer", "pretrain", "gate", "report"]
    assert commands == ["train-tokenizer", "pretrain", "gate", "report"] and failure.value.exit_code == 70
    assert any(line.startswith("[3/5] gate: failed after") for line in lines)
    commands.clear()
    run_project(folder, anyway=True, show=lambda _: None)
    assert commands[-1] == "push"


def test_a_failed_command_ends_the_project_with_its_code(folder, recorded):
    commands, codes = recorded
    codes["pretrain"] = 65
    with pytest.raises(StageFailed, match="pretrain failed with exit code 65") as failure:
        run_project(folder, anyway=True, show=lambda _: None)
    assert commands == ["train-tokenizer", "pretrain"] and failure.value.exit_code == 65
    for codes["pretrain"] in (75, 128 + signal.SIGTERM):
        with pytest.raises(Interrupted, match="Resume with: rorchat run"):
            run_project(folder, show=lambda _: None)


def test_a_command_really_runs_in_the_folder(tmp_path, capfd):
    (tmp_path / "run.sh").write_text("rorchat --version\nrorchat nonsense\n")
    with pytest.raises(StageFailed, match="nonsense failed with exit code 2"):
        run_project(tmp_path, show=lambda _: None)
    output = capfd.readouterr()
    assert output.out.startswith("rorchat ") and "nonsense" in output.err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses prctl")
def test_the_command_dies_with_a_killed_runner_and_a_signal_is_passed_on(tmp_path):
    script = tmp_path / "rorchat" / "cli"
    script.mkdir(parents=True)
    (tmp_path / "rorchat" / "__init__.py").write_text("")
    (script / "__init__.py").write_text("")
    (script / "__main__.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "open('pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    code = (
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(runner.__file__.rsplit('/rorchat/', 1)[0])!r})\n"
        "from rorchat.project import runner\n"
        "import os; os.environ['PYTHONPATH'] = sys.argv[1]\n"
        "sys.exit(runner.run_command(('rorchat', 'x'), pathlib.Path(sys.argv[1])))\n"
    )
    for number, expected in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        (tmp_path / "pid").unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        pid = _wait_for_pid(tmp_path / "pid")
        process.send_signal(number)
        assert process.wait(timeout=20) == expected
        _wait_until_gone(pid)


def _wait_for_pid(path) -> int:
    for _ in range(400):
        if path.is_file() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError("the command did not start")


def _wait_until_gone(pid: int) -> None:
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the command is still running")


@pytest.mark.slow
def test_a_project_from_its_data_to_its_model(tmp_path, monkeypatch, capsys):
    """With a measured machine and real commands. The time is short, so the gate need not pass."""
    monkeypatch.setattr("rorchat.project.create.MIN_HOURS", 0)
    monkeypatch.setattr("rorchat.project.timing.measure_startup", lambda: 0.2)  # of preloaded commands
    project = create_project(tmp_path / "bot", **write_data(tmp_path), hours=0.015)

    def run_command(words, folder):
        environment = os.environ | {WITHIN_PROJECT: "1"}
        start = [preloaded.client("python"), "-c", SHORT_REPLIES]
        return subprocess.run([*start, *words[1:]], cwd=folder, env=environment).returncode

    monkeypatch.setattr(runner, "run_command", run_command)
    run(project.folder, anyway=True)
    output = capsys.readouterr().out
    assert f"model in {project.folder / 'runs' / 'dpo' / 'model'}\nnext: rorchat chat" in output
    assert (project.folder / "runs" / "report.md").read_text().startswith("# bot\n")
    assert load_model(str(project.folder / "runs" / "dpo")).chat("Who are you?")
    written = sum(path.stat().st_size for path in (project.folder / "runs").rglob("*") if path.is_file())
    planned = estimate_disk(project.settings.scheduler, project.schedule)
    assert planned / 4 < written < 1.2 * planned  # a short run saves one checkpoint, not two
    run(project.folder, anyway=True)
    assert capsys.readouterr().out.count("already finished") == 5
