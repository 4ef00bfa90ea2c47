"""`rorchat recipes ...`: the stories in the package, and a copy of one to change."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from rorchat.cli.app import App
from rorchat.errors import UsageError
from rorchat.stories import SCRIPT, STORIES_FOLDER, list_files, list_stories, read_summary

app = App("The stories: settings and script of whole models, from data to chat.")


@app.command("list")
def list_recipes() -> None:
    """The stories, what each does, and its files."""
    for story in list_stories():
        print(f"{story}: {read_summary(story)}")
        print("  " + "  ".join(f"{story}/{path.name}" for path in list_files(story)))
    print(
        "\nUse a file by its name (--config demo/sft.yaml), or copy a story to change it (rorchat recipes copy demo)."
    )
    print(f"The files are in {STORIES_FOLDER}.")


@app.command()
def copy(
    story: Annotated[str, typer.Argument(help="The name of a story, as `rorchat recipes list` shows it.")],
    folder: Annotated[Path | None, typer.Argument(help="A new folder for its files; default: ./STORY.")] = None,
) -> None:
    """Copy a story, to change its settings and run its script."""
    files = list_files(story)
    target = folder or Path(story)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} already exists and is not an empty folder: give another folder.")
    target.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copy(path, target / path.name)
        print(target / path.name)
    print(f"run it: bash {target / SCRIPT}")
