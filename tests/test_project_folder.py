"""The layout of a project's folder, and what commands say of a project or of an unfinished run."""

import json

import pytest

from rorchat.errors import DataError
from rorchat.inference.engine import resolve_model_path
from rorchat.project_folder import find_last_run, is_project, locate_runs, measure_progress
from rorchat.tokenizer import find_run


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "my-bot"
    (folder / "runs").mkdir(parents=True)
    for name in ("run.sh", "plan.json"):
        (folder / name).write_text("")
    return folder


def add_run(project, stage, *, finished):
    run = project / "runs" / stage
    (run / "model").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"stage": stage, "finished": finished, "settings": {}, "inputs": {}}))
    if finished:
        (run / "model" / "config.json").write_text("{}")
    return run


def add_checkpoint(run, step, steps):
    (run / f"checkpoint-{step}").mkdir()
    state = {"global_step": step, "max_steps": steps}
    (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))


def test_the_runs_of_a_project_are_in_its_folder_and_those_of_a_story_beside_each_other(project, tmp_path):
    assert is_project(project) and locate_runs(project) == project / "runs"
    assert not is_project(tmp_path) and locate_runs(tmp_path) == tmp_path


def test_the_last_run_is_that_of_the_last_finished_stage(project):
    assert find_last_run(project) is None
    pretrain, sft = (add_run(project, stage, finished=True) for stage in ("pretrain", "sft"))
    add_run(project, "dpo", finished=False)
    assert find_last_run(project) == sft != pretrain


def test_progress_is_that_of_the_newest_checkpoint(project):
    run = add_run(project, "pretrain", finished=False)
    assert measure_progress(run) == 0.0
    for step in (100, 300):
        add_checkpoint(run, step, 400)
    (run / "checkpoint-400").mkdir()
    (run / "checkpoint-400" / "trainer_state.json").write_text("{")  # damaged
    assert measure_progress(run) == 0.75
    assert measure_progress(add_run(project, "sft", finished=True)) == 1.0
    assert measure_progress(project / "runs" / "dpo") == 0.0
    (project / "runs" / "tokenizer").mkdir()
    (project / "runs" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert measure_progress(project / "runs" / "tokenizer") == 1.0


def test_a_project_stands_for_the_model_of_its_last_finished_stage(project):
    with pytest.raises(DataError, match="my-bot has no finished stage, .*: rorchat run .*my-bot"):
        resolve_model_path(str(project))
    assert find_run(str(project)) is None
    for stage in ("pretrain", "sft"):
        add_run(project, stage, finished=True)
    assert resolve_model_path(str(project)) == str(project / "runs" / "sft" / "model")
    assert find_run(str(project))[0] == project / "runs" / "sft"


def test_a_folder_of_runs_has_several_models(project):
    for stage in ("pretrain", "sft"):
        add_run(project, stage, finished=True)
    with pytest.raises(DataError, match="several models: give one of .*runs/pretrain, .*runs/sft"):
        resolve_model_path(str(project / "runs"))


def test_an_unfinished_run_has_no_model_and_the_message_says_how_to_resume_it(project, tmp_path):
    with pytest.raises(DataError, match="has not finished.*Resume it with rorchat run .*my-bot"):
        resolve_model_path(str(add_run(project, "sft", finished=False)))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match="has not finished.*with the command that started it"):
        resolve_model_path(str(tmp_path))
