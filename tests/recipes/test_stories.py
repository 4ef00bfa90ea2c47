"""The stories: every YAML fits its recipe, every script its commands, and two mixtures train on real data."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recipe_commands import VARIABLES

from rorchat.mixture.config import read_mixture
from rorchat.training.arguments import parse

ROOT = Path(__file__).resolve().parents[2]


def arguments_of(stage: str) -> type:
    """The dataclass of a recipe's settings."""
    from rorchat.training import dpo, grpo, pretrain, sft

    if stage == "tokenizer":
        return runpy.run_path(str(ROOT / "recipes" / "tokenizer.py"))["TokenizerArguments"]
    classes = {"pretrain": pretrain.PretrainArguments, "sft": sft.SFTArguments, "dpo": dpo.DPOArguments}
    return (classes | {"midtrain": pretrain.PretrainArguments, "grpo": grpo.GRPOArguments})[stage]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*/*.yaml"), key=str), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_yaml_fits_its_recipe(path, monkeypatch):
    if path.parent.name == "accelerate":
        assert yaml.safe_load(path.read_text())["num_processes"] >= 1
        return
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "x")
    monkeypatch.chdir(ROOT)
    if path.stem == "mixture":
        assert len(read_mixture(path).sources) >= 4
        return
    given = yaml.safe_load(os.path.expandvars(path.read_text()))
    missing = [
        flag
        for key, flag in (("sources", ["--sources", "text=x"]), ("output_dir", ["--output_dir", "x"]))
        if key not in given and not (key == "sources" and "mixture" in given)
        for flag in flag
    ]
    if path.stem == "dpo" and "model" not in given:
        missing += ["--model", "x"]
    parsed = parse(arguments_of(path.stem), ["--config", str(path), *missing])
    assert {key: parsed.given[key] for key in given if key != "sample_prompts"} == {
        key: pytest.approx(float(value)) if isinstance(parsed.given[key], float) else value
        for key, value in given.items()
        if key != "sample_prompts"
    }


def said_by(script: Path, folder: Path, *words: object, verdict: int = 0) -> tuple[int, list[list[str]]]:
    """(exit code, commands in their order) of a script; none is run, its variables are set, the gate ends as told."""
    log, commands = folder / "commands.txt", folder / "bin"
    log.unlink(missing_ok=True)
    commands.mkdir(exist_ok=True)
    for name in ("accelerate", "rorchat"):
        (commands / name).write_text(
            f'#!/bin/sh\nprintf "%s\\t" {name} "$@" >> "{log}"\necho >> "{log}"\n[ "$1" != chat ] || cat > /dev/null\n'
            f'[ "$1" != gate ] || exit {verdict}\n'
        )
        (commands / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    environment |= dict.fromkeys(VARIABLES, "x")
    done = subprocess.run(["bash", script, *map(str, words)], env=environment, capture_output=True, text=True)
    return done.returncode, [line.split("\t")[:-1] for line in log.read_text().splitlines()]


RORCHAT_124M = ["pretrain", "sft", "dpo"]


@pytest.mark.parametrize(
    ("script", "more", "launched", "asked"),
    [
        ("first_words.sh", [], RORCHAT_124M, ["evaluate", "gate", "report", "chat"]),
        ("rorchat_124m.sh", [], RORCHAT_124M, ["evaluate", "gate", "report"]),
        ("rorchat_124m.sh", ["me/mine"], RORCHAT_124M, ["evaluate", "gate", "report", "push"]),
        ("rorchat_124m.sh", ["--smoke"], RORCHAT_124M, ["report"]),
    ],
)
def test_every_command_of_a_script_is_one_that_there_is(script, more, launched, asked, tmp_path, monkeypatch):
    import typer

    from rorchat.cli import app

    (tmp_path / "out" / "dpo" / "model").mkdir(parents=True)
    (tmp_path / "out" / "dpo" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(ROOT)
    for name in VARIABLES:
        monkeypatch.setenv(name, "x")
    code, said = said_by(ROOT / "scripts" / script, tmp_path, tmp_path, tmp_path / "out", *more)
    assert code == 0
    recipes = [words for words in said if words[0] == "accelerate"]
    assert [Path(words[5]).stem for words in recipes] == launched
    for _, _, _, _, config, recipe, *flags in recipes:
        assert (ROOT / config).is_file()
        parsed = parse(arguments_of(Path(recipe).stem), flags)
        assert getattr(parsed, "smoke", False) == ("--smoke" in more)
        assert parsed.output_dir.startswith(str(tmp_path / "out"))
    commands = [words for words in said if words[0] == "rorchat"]
    assert [words[1] for words in commands] == asked
    for _, name, *words in commands:
        typer.main.get_command(app).commands[name].make_context(name, words)  # refuses what it does not know


@pytest.mark.parametrize("verdict", [70, 78])
@pytest.mark.parametrize(
    ("script", "words", "story"),
    [
        ("demo.sh", [], "runs/demo"),
        ("first_words.sh", ["data", "out"], "out"),
        ("rorchat_124m.sh", ["data", "out", "me/mine"], "out"),
    ],
)
def test_a_verdict_is_this_models_and_what_is_none_ends_the_story(script, words, story, verdict, tmp_path):
    (tmp_path / "scripts").mkdir()
    copy = shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts")  # the demo writes beside its own folder
    (tmp_path / "data").mkdir()
    (tmp_path / story / "dpo" / "model").mkdir(parents=True)
    (tmp_path / story / "dpo" / "model" / "config.json").write_text("{}")
    (tmp_path / story / "behaviour.json").write_text("of an earlier model")
    words = [word if "/" in word else tmp_path / word for word in words]
    code, said = said_by(copy, tmp_path, *words, verdict=verdict)
    asked = [command[1] for command in said if command[0] == "rorchat"]
    goes_on = verdict == 70 and "me/mine" not in words
    assert (code == 0) == goes_on and "push" not in asked
    assert ("report" in asked) == (goes_on or "me/mine" in words)
    assert not (tmp_path / story / "behaviour.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("story", "ends_with"),
    [
        (
            "rorchat-124m",
            {"pile": 0.50, "dailydialog": 0.18, "cornell": 0.08, "questions": 0.08, "science": 0.06,
             "mathematics": 0.07, "python": 0.03},
        ),
        ("rangeflow-124m", {"c4": 0.10, "cosmopedia": 0.45, "alpaca": 0.27, "python": 0.18}),
    ],
)  # fmt: skip
def test_the_mixture_of_a_story_is_prepared_from_real_data_and_trains(story, ends_with, shared_data, tmp_path):
    environment = os.environ | {name: str(shared_data / place) for name, place in VARIABLES.items()}
    words = [
        sys.executable, "recipes/pretrain.py", "--mixture", f"recipes/{story}/mixture.yaml", "--size", "demo",
        "--tokenizer", shared_data / "gpt2_tokenizer", "--block_size", 256, "--per_device_train_batch_size", 4,
        "--global_batch_tokens", 1024, "--max_steps", 20, "--logging_steps", 1, "--eval_strategy", "no",
        "--validation_share", 0.02, "--learning_rate", "3e-3", "--output_dir", tmp_path / "run",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    last = record["plan"]["phases"][-1]
    assert {part["name"]: part["share_at_end"] for part in last["sources"]} == pytest.approx(ends_with)
    assert sum(part["tokens"] for part in record["plan"]["sources"]) == 20 * 1024
    for source in record["data"]:
        assert source["rows_in"] == source["kept"] + sum(source["rejects"].values()) > 100
    losses = [line["loss"] for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if "loss" in line]
    assert len(losses) == 20 and losses[0] > 10.5 and losses[-1] < losses[0] - 1
    assert (tmp_path / "run" / "mixture.png").stat().st_size > 10_000
