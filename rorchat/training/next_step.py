"""What a user may do next: the last lines of every command that makes something."""

import os
import shlex
from pathlib import Path

from rorchat.errors import WITHIN_PROJECT
from rorchat.lineage import SMOKE_SUFFIX
from rorchat.tokenizer import find_run, was_trained_on_documents_only

#: For each stage or command the next commands. `...` stands for what only the user knows, such as the data.
#: {run} is its result, {beside} the folder that contains it, {start} the model that the stage started from.
_COMPLETE = 'rorchat complete {run} "Once upon a time"'
_CHAT, _GATE = "rorchat chat {run}", "rorchat gate {run}"
_SFT = "rorchat sft --model {run} --sources ... --output_dir {beside}/sft"
NEXT_COMMANDS = {
    "plan": ("rorchat pretrain --config {run} --smoke",),
    "data prepare": ("rorchat pretrain --sources store={run} --tokenizer ... --train_tokens ... --output_dir ...",),
    "train-tokenizer": (
        "rorchat pretrain --tokenizer {run} --sources ... --train_tokens ... --output_dir {beside}/pretrain",
    ),
    "pretrain": (_COMPLETE, _SFT),
    "midtrain": (_CHAT, _SFT),
    "sft": (_CHAT, _GATE),
    "dpo": (f"{_GATE} --before {{start}}", _CHAT),
    "grpo": (f"{_GATE} --before {{start}}", _CHAT),
    "gate": ("rorchat push {run} YOU/NAME --dry_run",),
}


def list_next_commands(stage: str, folder: str | Path, start: str | None = None) -> list[str]:
    """The commands that follow a stage or another command.

    Args:
        stage: a key of NEXT_COMMANDS.
        folder: its result: the folder of a run, a tokenizer or a token store, the model that was judged, or the YAML
            file of a plan.
        start: the model that the stage started from.
    """
    folder = Path(folder)
    if stage == "pretrain" and not was_trained_on_documents_only(str(folder)):
        stage = "midtrain"
    values = {"run": folder, "beside": folder.parent, "start": start}
    quoted = {name: shlex.quote(str(value)) for name, value in values.items()}
    return [command.format(**quoted) for command in NEXT_COMMANDS[stage]]


def list_commands_after_gate(model: str) -> list[str]:
    """The commands that follow `rorchat gate`: the report of the run's story, if the model has a run, and the push."""
    run = find_run(model)
    report = [f"rorchat report {shlex.quote(str(run[0].parent))}"] if run else []
    return [*report, *list_next_commands("gate", model)]


def build_try_command(run: Path, folder: Path) -> str:
    """The command that tries the model in `folder`, which a run made: `rorchat complete` of a base model, or `chat`."""
    command = _COMPLETE if was_trained_on_documents_only(str(run)) else _CHAT
    return command.format(run=shlex.quote(str(folder)))


def describe_next(commands: list[str]) -> str:
    """The next commands, one per line; empty within `rorchat run`, which runs the next command itself."""
    if os.environ.get(WITHIN_PROJECT):
        return ""
    return "next: " + "\n      ".join(commands)


def describe_stage(stage: str, folder: Path, start: str | None = None) -> str:
    """Where the model of a finished stage is, and the next commands."""
    if folder.name.endswith(SMOKE_SUFFIX):
        return f"smoke test passed, output in {folder}\n" + describe_next(["the same command without --smoke"])
    return f"model in {folder / 'model'}\n" + describe_next(list_next_commands(stage, folder, start))
