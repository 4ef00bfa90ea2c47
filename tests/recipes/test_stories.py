"""The stories: every YAML fits its recipe, every script its commands, and two mixtures train on real data."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from recipe_commands import VARIABLES, inside

from rorchat.cli import app
from rorchat.cli.launch import split_flags
from rorchat.mixture.mixture_file import read_mixture
from rorchat.stories import STORIES_FOLDER, list_stories
from rorchat.training.arguments import parse
from rorchat.training.dpo import DPOArguments
from rorchat.training.grpo import GRPOArguments
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.sft import SFTArguments
from rorchat.training.tokenizer import TokenizerArguments

CONFIGS = sorted(path for path in STORIES_FOLDER.glob("*/*.yaml") if path.parent.name != "accelerate")
ARGUMENTS = {
    "tokenizer": TokenizerArguments, "pretrain": PretrainArguments, "midtrain": PretrainArguments,
    "sft": SFTArguments, "dpo": DPOArguments, "grpo": GRPOArguments,
}  # fmt: skip
COMMANDS = {"train-tokenizer": "tokenizer", "pretrain": "pretrain", "sft": "sft", "dpo": "dpo", "grpo": "grpo"}


@pytest.fixture(autouse=True)
def data_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "x")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_fits_its_recipe(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing of the checkout is needed
    if path.stem == "mixture":
        assert len(read_mixture(path).sources) >= 4
        return
    settings = yaml.safe_load(os.path.expandvars(path.read_text()))
    required = {"output_dir": "x", "sources": "text=x"} | ({"model": "x"} if path.stem == "dpo" else {})
    if "mixture" in settings:
        del required["sources"]
        settings["mixture"] = f"{path.parent.name}/{settings['mixture']}"
    missing = [word for name, value in required.items() if name not in settings for word in (f"--{name}", value)]
    parsed = parse(ARGUMENTS[path.stem], ["--config", f"{path.parent.name}/{path.name}", *missing])
    for name, value in settings.items():
        expected = pytest.approx(float(value)) if isinstance(parsed.given[name], float) else value
        assert parsed.given[name] == expected, name


def run_script(story: str, folder: Path, *arguments: object, gate_exit_code: int = 0) -> tuple[int, list[list[str]]]:
    """(exit code, `rorchat` commands in order) of a story's script; a stand-in records the commands."""
    log, commands = folder / "commands.txt", folder / "bin"
    log.unlink(missing_ok=True)
    commands.mkdir(exist_ok=True)
    (commands / "rorchat").write_text(
        f'#!/bin/sh\nprintf "%s\\t" "$@" >> "{log}"\necho >> "{log}"\n'
        f'[ "$1" != chat ] || cat > /dev/null\n[ "$1" != gate ] || exit {gate_exit_code}\n'
    )
    (commands / "rorchat").chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    script = ["bash", STORIES_FOLDER / story / "run.sh", *map(str, arguments)]
    done = subprocess.run(script, env=environment, cwd=folder, capture_output=True, text=True)
    return done.returncode, [line.split("\t")[:-1] for line in log.read_text().splitlines()]


def leave_dpo_model(out: Path) -> None:
    """What the last training command of a script leaves."""
    (out / "dpo" / "model").mkdir(parents=True)
    (out / "dpo" / "model" / "config.json").write_text("{}")


CHAT_STAGES = ["pretrain", "sft", "dpo"]
SCRIPTS = [
    ("demo", [], ["train-tokenizer", "pretrain", *CHAT_STAGES, "evaluate", "gate", "report"]),
    ("first-words", ["data", "out"], ["pretrain", "evaluate", "sft", "dpo", "gate", "report", "chat"]),
    ("rorchat-124m", ["data", "out"], [*CHAT_STAGES, "evaluate", "gate", "report"]),
    ("rorchat-124m", ["data", "out", "me/mine"], [*CHAT_STAGES, "evaluate", "gate", "report", "push"]),
    ("rorchat-124m", ["data", "out", "--smoke"], [*CHAT_STAGES, "report"]),
    ("rangeflow-124m", ["data", "--smoke"], ["pretrain"]),
    ("bookcorpus-51m", ["--smoke"], ["train-tokenizer", "pretrain"]),
    ("fineweb-124m", ["--smoke"], ["data", "pretrain"]),
    ("nanochat-561m", ["--smoke"], ["train-tokenizer", "data", "pretrain"]),
]


def test_every_story_has_a_script_that_is_tested():
    assert {story for story, _, _ in SCRIPTS} == set(list_stories())
    assert {path.parent.name for path in CONFIGS} == set(list_stories())


@pytest.mark.parametrize(("story", "arguments", "commands"), SCRIPTS)
def test_the_commands_of_a_script_exist(story, arguments, commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    leave_dpo_model(tmp_path / ("runs/demo" if story == "demo" else "out"))
    code, recorded = run_script(story, tmp_path, *arguments)
    assert code == 0
    assert [name for name, *_ in recorded] == commands
    for name, *flags in recorded:
        if name in COMMANDS:
            launcher, recipe = split_flags(flags)
            parsed = parse(ARGUMENTS[COMMANDS[name]], recipe)
            assert launcher in ([], ["--num_processes=1"])
            assert ("--smoke" in flags) == bool(vars(parsed).get("smoke"))
            assert (tmp_path / parsed.output_dir).is_relative_to(tmp_path)
        else:
            group = typer.main.get_command(app)
            if name == "data":
                group, name, *flags = group.commands["data"], *flags
            group.commands[name].make_context(name, flags)  # raises on unknown flags


@pytest.mark.parametrize("gate_exit_code", [70, 78])
@pytest.mark.parametrize(
    ("story", "arguments", "out"),
    [
        ("demo", [], "runs/demo"),
        ("first-words", ["data", "out"], "out"),
        ("rorchat-124m", ["data", "out", "me/mine"], "out"),
    ],
)
def test_a_failed_gate_stops_a_push_and_an_error_stops_the_script(story, arguments, out, gate_exit_code, tmp_path):
    (tmp_path / "data").mkdir()
    leave_dpo_model(tmp_path / out)
    (tmp_path / out / "behaviour.json").write_text("of an earlier model")
    code, recorded = run_script(story, tmp_path, *arguments, gate_exit_code=gate_exit_code)
    commands = [name for name, *_ in recorded]
    pushes = "me/mine" in arguments
    continues = gate_exit_code == 70 and not pushes
    assert (code == 0) == continues and "push" not in commands
    assert ("report" in commands) == (continues or pushes)
    assert not (tmp_path / out / "behaviour.json").exists()


def test_a_copied_script_uses_the_settings_beside_it(tmp_path):
    shutil.copytree(STORIES_FOLDER / "rangeflow-124m", tmp_path / "mine")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "rorchat").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "rorchat").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    arguments = ["bash", tmp_path / "mine" / "run.sh", tmp_path]
    done = subprocess.run(arguments, env=environment, cwd="/", capture_output=True, text=True)
    assert f"--config {tmp_path / 'mine' / 'pretrain.yaml'}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("story", "final_shares"),
    [
        (
            "rorchat-124m",
            {"pile": 0.50, "dailydialog": 0.18, "cornell": 0.08, "questions": 0.08, "science": 0.06,
             "mathematics": 0.07, "python": 0.03},
        ),
        ("rangeflow-124m", {"c4": 0.10, "cosmopedia": 0.45, "alpaca": 0.27, "python": 0.18}),
    ],
)  # fmt: skip
def test_the_mixture_of_a_story_trains_on_real_data(story, final_shares, shared_data, tmp_path, monkeypatch):
    for name, path in VARIABLES.items():
        monkeypatch.setenv(name, str(shared_data / path))
    done = inside(
        "pretrain", "--mixture", f"{story}/mixture.yaml", "--size", "demo", "--block_size", 256,
        "--tokenizer", shared_data / "gpt2_tokenizer", "--per_device_train_batch_size", 2,
        "--global_batch_tokens", 512, "--max_steps", 20, "--logging_steps", 1, "--eval_strategy", "no",
        "--validation_share", 0.005, "--learning_rate", "3e-3", "--sample_prompts", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    last = record["plan"]["phases"][-1]
    assert {source["name"]: source["share_at_end"] for source in last["sources"]} == pytest.approx(final_shares)
    assert sum(source["tokens"] for source in record["plan"]["sources"]) == 20 * 512
    for source in record["data"]:
        assert source["rows_in"] == source["kept"] + sum(source["rejects"].values()) > 100
    losses = [line["loss"] for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if "loss" in line]
    assert len(losses) == 20 and losses[0] > 10.5 and losses[-1] < losses[0] - 1
    assert (tmp_path / "run" / "mixture.png").stat().st_size > 10_000
