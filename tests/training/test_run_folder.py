"""What a command does with the run that its output folder already contains."""

import json
from pathlib import Path

import pytest

from rorchat.errors import MismatchError
from rorchat.training.arguments import parse
from rorchat.training.checkpointing.checkpoint import Checkpoint
from rorchat.training.checkpointing.resume_plan import ResumePlan
from rorchat.training.oom_recovery import MICRO_BATCH_FILE
from rorchat.training.run_folder import RunFolder
from rorchat.training.sft import SFTArguments


def open_run(output: Path, *flags: object) -> RunFolder:
    words = ["--model", "gpt2", "--sources", "persona=9", "--output_dir", output, "--bf16", "false", *flags]
    return RunFolder(parse(SFTArguments, [*map(str, words)]), "sft", {})


def finish_run(output: Path, *flags: object) -> None:
    with open_run(output, *flags) as run:
        run.begin()
        run.finish({"metrics": {}})


def test_a_smoke_test_replaces_an_earlier_one_with_other_settings(tmp_path, capsys):
    finish_run(tmp_path / "run", "--smoke")
    folder = tmp_path / "run-smoke"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (folder / "model").mkdir()
    (folder / "link").symlink_to(outside)
    with open_run(tmp_path / "run", "--smoke") as run:
        assert run.is_finished and (folder / "model").is_dir()
    with open_run(tmp_path / "run", "--smoke", "--learning_rate", "1e-3") as run:
        assert not run.is_finished and [*folder.iterdir()] == []
    assert (outside / "kept").is_file()
    assert "replacing an earlier smoke test (learning_rate differ" in capsys.readouterr().err


def test_a_checkpoint_with_other_rows_is_refused(tmp_path):
    """An earlier version may have rejected rows that are now kept."""
    with open_run(tmp_path / "run") as run:
        manifest = {"step": 2, "identity": {"data": [{"kept": 108}]}}
        run.plan = ResumePlan({}, Checkpoint(tmp_path / "run" / "checkpoint-2", manifest, {}))
        assert run.context({"data": [{"kept": 108}]}).details
        with pytest.raises(MismatchError, match="kept_rows.1 108, now 990. Give a new --output_dir"):
            run.context({"data": [{"kept": 990}]})


@pytest.mark.parametrize("change", ["a real run", "no smoke test", "other files"])
def test_a_smoke_test_replaces_nothing_else(tmp_path, change):
    """A real run whose folder ends in -smoke, a run that was recorded without --smoke, and files of the user."""
    folder = tmp_path / "run-smoke"
    if change == "other files":
        folder.mkdir()
        (folder / "thesis.txt").touch()
    else:
        finish_run(tmp_path / "run", *(["--smoke"] if change == "no smoke test" else []))
        (tmp_path / "run").rename(folder) if change == "a real run" else None
    if change == "no smoke test":
        record = json.loads((folder / "run.json").read_text())
        record["settings"].pop("smoke")
        (folder / "run.json").write_text(json.dumps(record))
    files = sorted(path.name for path in folder.iterdir())
    with pytest.raises(MismatchError, match="Give a new --output_dir, or delete the folder"):
        open_run(tmp_path / "run", "--smoke", "--learning_rate", "1e-3")
    assert sorted(path.name for path in folder.iterdir()) == files


@pytest.mark.parametrize("stops", [1, 3])
def test_the_micro_batch_that_fits_is_kept_until_there_is_a_checkpoint(stops, tmp_path):
    """Otherwise every second start without a checkpoint would run out of memory again."""
    for _ in range(stops):
        with open_run(tmp_path / "run") as run:
            run.begin()
            if not (tmp_path / "run" / MICRO_BATCH_FILE).exists():
                (tmp_path / "run" / MICRO_BATCH_FILE).write_text('{"rows": 2}')
    with open_run(tmp_path / "run") as run:
        run.begin()
    assert (tmp_path / "run" / MICRO_BATCH_FILE).read_text() == '{"rows": 2}'


@pytest.mark.parametrize("change", [["--max_length", "64"], ["--learning_rate", "1e-3"], ["--num_train_epochs", "2"]])
def test_the_micro_batch_of_other_settings_is_dropped(change, tmp_path):
    with open_run(tmp_path / "run") as run:
        run.begin()
    (tmp_path / "run" / MICRO_BATCH_FILE).write_text('{"rows": 2}')
    with open_run(tmp_path / "run", *change):
        assert not (tmp_path / "run" / MICRO_BATCH_FILE).exists()  # before a trainer reads it
