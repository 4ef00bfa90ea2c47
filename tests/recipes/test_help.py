"""The packaged help of a training command is the help of its recipe; it is also the list of settings."""

import importlib

import pytest

from rorchat.stories import HELP_FOLDER

COMMANDS = {"train-tokenizer": "tokenizer", "pretrain": "pretrain", "sft": "sft", "dpo": "dpo", "grpo": "grpo"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_packaged_help_is_up_to_date(command, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"rorchat {command}"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"rorchat.recipes.{COMMANDS[command]}").main(["--help"])
    assert stop.value.code == 0
    packaged = (HELP_FOLDER / f"{command}.txt").read_text(encoding="utf-8")
    assert capsys.readouterr().out == packaged, "A setting changed: run `make help-texts`"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_has_one_line(command):
    lines = [line for line in (HELP_FOLDER / f"{command}.txt").read_text().splitlines() if line.startswith("  --")]
    names = [line.split()[0] for line in lines]
    assert len(names) == len(set(names)) >= 7
    assert [line for line in lines if len(line.split()) < 4] == [], "a setting without an explanation"
