"""The last lines of a command: where its result is, and commands that exist."""

import shlex
from dataclasses import fields

import pytest
import typer.main

from rorchat.cli import app
from rorchat.training.dpo import DPOArguments
from rorchat.training.grpo import GRPOArguments
from rorchat.training.next_step import NEXT_COMMANDS, build_try_command, describe_stage, list_next_commands
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.sft import SFTArguments

SETTINGS = {"pretrain": PretrainArguments, "sft": SFTArguments, "dpo": DPOArguments, "grpo": GRPOArguments}


@pytest.mark.parametrize("stage", NEXT_COMMANDS)
def test_the_next_commands_exist_with_their_flags(stage):
    for command in list_next_commands(stage, "runs/my run", "runs/start"):
        program, name, *words = shlex.split(command)
        assert (program, "{" in command) == ("rorchat", False)
        flags = {word.removeprefix("--") for word in words if word.startswith("--")} - {"config"}
        item = typer.main.get_command(app).commands[name]
        if name in SETTINGS:
            assert flags <= {field.name for field in fields(SETTINGS[name])}
        else:
            item.make_context(name, words)  # raises on unknown flags and missing arguments


def write_record(folder, stage: str, *sources: str):
    record = f'{{"stage": "{stage}", "settings": {{}}, "inputs": {{}}, "data": [{{"source": "{sources[0]}"}}]}}'
    folder.mkdir()
    (folder / "run.json").write_text(record)
    return folder


def test_a_base_model_completes_and_a_model_that_read_conversations_chats(tmp_path):
    base = write_record(tmp_path / "pretrain", "pretrain", "text=books/")
    first, then = describe_stage("pretrain", base).splitlines()[1:]
    assert describe_stage("pretrain", base).splitlines()[0] == f"model in {base / 'model'}"
    assert first == f'next: rorchat complete {base} "Once upon a time"'
    assert then == f"      rorchat sft --model {base} --sources ... --output_dir {tmp_path / 'sft'}"
    middle = write_record(tmp_path / "midtrain", "pretrain", "chat:tinytown=10")
    assert describe_stage("pretrain", middle).splitlines()[1] == f"next: rorchat chat {middle}"
    assert build_try_command(base, tmp_path) == f'rorchat complete {tmp_path} "Once upon a time"'
    assert build_try_command(middle, tmp_path) == f"rorchat chat {tmp_path}"


def test_preference_training_is_judged_beside_the_model_it_started_from(tmp_path):
    assert list_next_commands("dpo", "runs/dpo", "runs/sft")[0] == "rorchat gate runs/dpo --before runs/sft"


def test_after_a_smoke_test_comes_the_run_itself(tmp_path):
    lines = describe_stage("sft", tmp_path / "sft-smoke").splitlines()
    assert lines == [f"smoke test passed, output in {tmp_path / 'sft-smoke'}", "next: the same command without --smoke"]
