"""Writes the help of every training command to rorchat/recipes/help, where `rorchat sft --help` reads it.

python scripts/write_help.py

The real help needs every library of training, which take seconds to import. A test compares the two.
"""

import contextlib
import importlib
import io
import sys

from rorchat.stories import HELP_FOLDER

COMMANDS = {"train-tokenizer": "tokenizer", "pretrain": "pretrain", "sft": "sft", "dpo": "dpo", "grpo": "grpo"}


def capture_help(command: str) -> str:
    """What the recipe of a command prints for --help."""
    sys.argv[0] = f"rorchat {command}"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(f"rorchat.recipes.{COMMANDS[command]}").main(["--help"])
    return text.getvalue()


if __name__ == "__main__":
    HELP_FOLDER.mkdir(exist_ok=True)
    for name in COMMANDS:
        (HELP_FOLDER / f"{name}.txt").write_text(capture_help(name), encoding="utf-8")
        print(HELP_FOLDER / f"{name}.txt")
