"""`rorchat new` and `rorchat run`: a project from the user's own data to a chat model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rorchat.project.runner import StageTime

Sources = list[str] | None


def new(
    folder: Annotated[Path, typer.Argument(help="A new folder for the project.")],
    documents: Annotated[
        Sources, typer.Option(help="Texts: a file, a folder, or a source such as text=OWNER/NAME. Repeatable.")
    ] = None,
    conversations: Annotated[
        Sources,
        typer.Option(
            help="Chats: a file, a folder, or a source such as alpaca=FILE or "
            "messages=FILE:user=COLUMN:assistant=COLUMN. Repeatable."
        ),
    ] = None,
    preferences: Annotated[
        Sources, typer.Option(help="Prompts with a chosen and a rejected reply. Repeatable.")
    ] = None,
    persona: Annotated[Path | None, typer.Option(help="A persona file; default: one to edit is written.")] = None,
    hours: Annotated[float, typer.Option(help="Time for everything, on this machine.")] = 0.5,
    base: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Start from this model (gpt2, a run folder, a Hub id), or from random weights (random). Default: "
            "random; on a GPU, gpt2 if the time is too short to pretrain 124M parameters.",
        ),
    ] = None,
) -> None:
    """Plan a chat model from your data for the time you have: reads, measures, and writes settings and a script."""
    from rorchat.cli.tables import print_table
    from rorchat.project.create import create_project

    project = create_project(
        folder,
        documents=documents or [],
        conversations=conversations or [],
        preferences=preferences or [],
        hours=hours,
        persona=persona,
        base=base,
    )
    print_table(["source", "used as", "rows", "text", "language", "licence"], project.source_rows())
    print("", *project.describe_reading(), "", sep="\n")
    print_table(["stage", "time", "reads", "command"], project.stage_rows())
    print("", *(f"- {note}" for note in project.notes), sep="\n")
    print(f"\nproject  {folder}    edit its files if you like, then: rorchat run {folder}")


def run(
    folder: Annotated[Path, typer.Argument(help="The folder of a project that `rorchat new` has made.")],
    anyway: Annotated[bool, typer.Option("--anyway", help="Continue if the gate fails.")] = False,
) -> None:
    """Run every stage of a project. Run it again to resume after a stop."""
    from rorchat.project.runner import StageFailed, run_project

    try:
        times = run_project(folder, anyway=anyway)
    except StageFailed as failure:
        _print_results(folder, failure.times, failed=True)
        raise
    _print_results(folder, times)


def _print_results(folder: Path, times: "list[StageTime]", *, failed: bool = False) -> None:
    """How long every stage took, and where report and model are."""
    from rorchat.cli.tables import print_table
    from rorchat.plan.show import format_duration
    from rorchat.project_folder import RUNS, find_last_run
    from rorchat.training.next_step import describe_next

    rows = [
        [t.name, format_duration(t.planned / 3600) if t.planned else "-", format_duration(t.seconds / 3600)]
        for t in times
    ]
    total = (sum(t.planned for t in times), sum(t.seconds for t in times))
    rows.append(["total", *(format_duration(seconds / 3600) for seconds in total)])
    print()
    print_table(["stage", "planned", "took"], rows)
    if (report := folder / RUNS / "report.md").is_file():
        print(f"\nreport in {report}")
    if model := find_last_run(folder):
        commands = [f"rorchat chat {folder}", *([] if failed else [f"rorchat push {folder} YOU/NAME --dry_run"])]
        print(f"model in {model / 'model'}", describe_next(commands), sep="\n")
