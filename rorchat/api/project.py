"""The commands `rorchat new` and `rorchat run` as functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rorchat.console import quiet_libraries

if TYPE_CHECKING:
    from rorchat.project.create import NewProject
    from rorchat.project.runner import StageTime

StrPath = str | Path


def new(
    folder: StrPath,
    *,
    documents: StrPath | Sequence[StrPath] = (),
    conversations: StrPath | Sequence[StrPath] = (),
    preferences: StrPath | Sequence[StrPath] = (),
    hours: float = 0.5,
    persona: StrPath | None = None,
    base: StrPath | None = None,
) -> "NewProject":
    """Plan a chat model from your data for the time you have, and write its settings into a new folder.

        project = rorchat.new("my-bot", documents="my_texts/", conversations="chats.jsonl", hours=0.5)
        rorchat.run("my-bot")

    Args:
        folder: a new folder.
        documents, conversations, preferences: files, folders or sources ("alpaca=FILE"); at least one in total.
        hours: time for everything on this machine, which is measured.
        persona: a persona file; None to write one that you can edit.
        base: a model to start from, such as "gpt2", or "random" for random weights; None for random weights, or for
            GPT-2 on a GPU if the time is too short to pretrain 124M parameters.

    Returns:
        The plan: `.schedule` (size, tokens and seconds of every stage), `.survey` (the data), `.notes`.

    Raises:
        UsageError: there is no data, the time is too short, the folder is not empty, or a source has the wrong kind.
        DataError: a path does not exist, or a source has no usable row.
    """
    with quiet_libraries():
        from rorchat.project.create import create_project

        return create_project(
            Path(folder),
            documents=_as_list(documents),
            conversations=_as_list(conversations),
            preferences=_as_list(preferences),
            hours=hours,
            persona=Path(persona) if persona else None,
            base=str(base) if base else None,
        )


def _as_list(specs: StrPath | Sequence[StrPath]) -> list[str]:
    return [str(specs)] if isinstance(specs, str | Path) else [str(spec) for spec in specs]


def run(folder: StrPath, *, anyway: bool = False) -> "list[StageTime]":
    """Run every stage of a project, each in a separate process. Run it again to resume after a stop.

    Args:
        anyway: continue if the gate fails.

    Returns:
        The planned and the actual duration of every stage, in seconds.

    Raises:
        UsageError: the folder is not a project, or its run.sh has a line that cannot be run.
        MismatchError: another process runs this project.
        StageFailed: a stage failed, or the gate did; the exception has its exit code.
        Interrupted: a signal stopped a stage, which has saved a checkpoint.
    """
    from rorchat.project.runner import run_project

    return run_project(Path(folder), anyway=anyway)
