"""The YAML files of a project fit their recipes, and run.sh has the commands."""

import subprocess

import pytest
import yaml
from project_support import make_scheduler, make_survey, write_data
from support import chat_row, json_lines

from rorchat.errors import UsageError
from rorchat.persona import load_persona
from rorchat.project.files import ProjectFiles, default_persona
from rorchat.project.runner import read_steps
from rorchat.project.schedule import Base, Scheduler
from rorchat.project.settings import ProjectSettings
from rorchat.project.sizing import SHAPES
from rorchat.project.vocabulary import Vocabulary
from rorchat.training.arguments import parse
from rorchat.training.dpo import DPOArguments
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.sft import SFTArguments
from rorchat.training.tokenizer import TokenizerArguments

ARGUMENTS = {
    "tokenizer": TokenizerArguments, "pretrain": PretrainArguments, "midtrain": PretrainArguments,
    "sft": SFTArguments, "dpo": DPOArguments,
}  # fmt: skip


VOCABULARY = Vocabulary(1024, 2.5, 2.5)


@pytest.fixture
def scheduler(tmp_path):
    return make_scheduler(write_data(tmp_path))


def write(folder, scheduler, shape=SHAPES[2], vocabulary=VOCABULARY, persona=None) -> ProjectFiles:
    files = ProjectFiles(folder, ProjectSettings(scheduler, scheduler.schedule(shape, vocabulary)), persona)
    files.write()
    return files


def test_every_file_fits_its_recipe(scheduler, tmp_path, monkeypatch):
    files = write(tmp_path / "bot", scheduler)
    monkeypatch.chdir(tmp_path / "bot")
    schedule = files.settings.schedule
    for name, arguments in ARGUMENTS.items():
        parsed = parse(arguments, ["--config", f"{name}.yaml"])
        assert parsed.output_dir == f"runs/{name}"
        if name in ("pretrain", "midtrain"):
            assert 0.99 * schedule.tokens[name] <= parsed.train_tokens + 2048 <= 1.01 * schedule.tokens[name] + 4096
    assert parse(SFTArguments, ["--config", "sft.yaml"]).model == "runs/midtrain"
    assert parse(DPOArguments, ["--config", "dpo.yaml"]).model == "runs/sft"
    comments = [line for line in (tmp_path / "bot" / "pretrain.yaml").read_text().splitlines() if line.startswith("#")]
    assert "parameters" in comments[0] and "epochs" in " ".join(comments)


def test_the_weights_of_midtraining_divide_each_group_by_size(scheduler):
    values = (
        ProjectSettings(scheduler, scheduler.schedule(SHAPES[2], Vocabulary(1024, 2.5, 2.5)))
        .stages()["midtrain"]
        .values
    )
    shares = dict(zip((spec.partition("=")[0] for spec in values["sources"]), values["weights"], strict=True))
    assert shares["messages"] == 60 and shares["persona"] == 10
    assert sum(values["weights"]) == pytest.approx(100)


def test_the_script_has_the_commands_that_the_runner_reads(scheduler, tmp_path):
    files = write(tmp_path / "bot", scheduler)
    steps = read_steps(tmp_path / "bot")
    assert [step.name for step in steps] == [*ARGUMENTS, "evaluate", "gate", "report"]
    assert [" ".join(step.words) for step in steps] == [*files.commands().values()]
    assert sum(step.seconds for step in steps) == pytest.approx(files.settings.schedule.total_seconds, abs=1)
    assert subprocess.run(["bash", "-n", tmp_path / "bot" / "run.sh"]).returncode == 0


def test_only_an_empty_folder_is_written_to(scheduler, tmp_path):
    (tmp_path / "bot").mkdir()
    write(tmp_path / "bot", scheduler)
    with pytest.raises(UsageError, match="not an empty folder"):
        write(tmp_path / "bot", scheduler)


def test_the_persona_is_copied_or_named_after_the_folder(scheduler, tmp_path):
    mine = tmp_path / "me.yaml"
    mine.write_text("name: Bibo\nmaker: Ann\n")
    write(tmp_path / "one", scheduler, persona=mine)
    assert load_persona(tmp_path / "one" / "persona.yaml").name == "Bibo"
    write(tmp_path / "my-bot", scheduler)
    assert load_persona(tmp_path / "my-bot" / "persona.yaml").name == "My Bot"
    assert "name: My Bot" in default_persona(tmp_path / "my-bot")


def test_a_large_base_model_is_trained_with_adamw_at_its_window(tmp_path, monkeypatch):
    survey = make_survey(write_data(tmp_path), from_scratch=False)
    base = Base("gpt2", SHAPES[9], Vocabulary(50_304, 4.4, 4.4), 1024)
    scheduler = Scheduler(survey, make_scheduler(write_data(tmp_path)).machine, 1.0, base)
    write(tmp_path / "bot", scheduler, base.shape, base.vocabulary)
    monkeypatch.chdir(tmp_path / "bot")
    midtrain = yaml.safe_load((tmp_path / "bot" / "midtrain.yaml").read_text())
    assert midtrain["model"] == "gpt2" and "optimizer" not in midtrain and "tokenizer" not in midtrain
    assert parse(PretrainArguments, ["--config", "midtrain.yaml"]).optimizer == "adamw"
    assert not (tmp_path / "bot" / "tokenizer.yaml").exists()


def test_without_documents_pretraining_reads_the_conversations(tmp_path):
    chats = [chat_row(f"What is {n}?", "It is a number. " * 40) for n in range(400)]
    (tmp_path / "chats.jsonl").write_text(json_lines(*chats))
    scheduler = make_scheduler({"conversations": [f"messages={tmp_path / 'chats.jsonl'}"]})
    stages = ProjectSettings(scheduler, scheduler.schedule(SHAPES[2], Vocabulary(1024, 2.5, 2.5))).stages()
    assert list(stages) == ["tokenizer", "pretrain", "sft"]
    assert stages["pretrain"].values["sources"] == [f"messages={tmp_path / 'chats.jsonl'}", "persona=1000"]
    assert "replay" not in stages["sft"].values
