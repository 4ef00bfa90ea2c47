"""`rorchat checkpoint ...`: list and verify the checkpoints of a run, and export the model of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rorchat.cli.app import App
from rorchat.errors import DataError, UsageError
from rorchat.training.checkpointing.checkpoint import DAMAGED, MANIFEST, Checkpoint, DamagedCheckpoint
from rorchat.training.checkpointing.recovery import Checkpoints

VALID = "valid"
app = App("List, verify and export the checkpoints of a run.")


@app.command("list")
def list_checkpoints(run: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """List the checkpoints of a run, newest first. Only file sizes are checked; `verify` reads the contents."""
    from rorchat.cli.tables import print_table

    _require_folder(run)
    if (run / MANIFEST).is_file():
        raise UsageError(f"{run} is itself a checkpoint: give the folder of its run, {run.parent}.")
    rows = []
    for checkpoint in Checkpoints(run).committed():
        loss = checkpoint.validation_loss
        cells = [f"{checkpoint.step:,}", f"{checkpoint.bytes / 1e6:,.1f} MB", "" if loss is None else f"{loss:.4f}"]
        rows.append([checkpoint.folder.name, *cells, _check(checkpoint.verify_sizes)])
    listed = {row[0] for row in rows}
    for folder in sorted(run.glob("checkpoint-*")):
        if folder.is_dir() and folder.name not in listed:
            rows.append([folder.name, "", "", "", _verify(folder)])
    if not rows:
        raise DataError(f"{run} has no checkpoint. A run saves one every save_steps steps.")
    print_table(["checkpoint", "step", "size", "validation loss", "state"], rows)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run for all its checkpoints.")],
) -> None:
    """Compare every file of a checkpoint with its manifest. The exit code is 65 if one is damaged."""
    _require_folder(folder)
    folders = [folder] if (folder / MANIFEST).is_file() else sorted(folder.glob("checkpoint-*"))
    if not folders:
        raise DataError(f"{folder} is not a checkpoint and contains none.")
    set_aside = [path for path in folders if DAMAGED in path.name]
    states = {path: _verify(path) for path in folders if path not in set_aside}
    for path, state in states.items():
        print(f"{path.name}: {state}")
    for path in set_aside:
        print(f"{path.name}: set aside earlier as damaged; ignored")
    damaged = sum(state != VALID for state in states.values()) if states else len(set_aside)
    if damaged:
        raise DataError(
            f"{damaged} of {len(states) or damaged} checkpoints in {folder} are damaged. A resumed run sets them aside "
            "and uses the newest valid one, if there is one."
        )


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run for its newest checkpoint.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the model.")],
) -> None:
    """Verify a checkpoint and save its model as Transformers and the Hub expect it: weights, tokenizer and configs."""
    _require_folder(checkpoint)
    if out.exists():
        raise UsageError(f"{out} already exists: give a new folder.")
    if not (checkpoint / MANIFEST).is_file():
        checkpoints = Checkpoints(checkpoint).committed()
        if not checkpoints:
            raise DataError(f"{checkpoint} is not a checkpoint and contains none.")
        checkpoint = checkpoints[0].folder
    _require_valid(checkpoint)

    from transformers import GPT2LMHeadModel

    from rorchat.adapter import is_adapter
    from rorchat.model import load_checkpoint, save_model
    from rorchat.tokenizer import load_tokenizer
    from rorchat.training.next_step import build_try_command, describe_next

    tokenizer = load_tokenizer(str(checkpoint))
    if is_adapter(checkpoint):  # merged into its base model
        model = load_checkpoint(str(checkpoint), tokenizer)
    else:
        model = GPT2LMHeadModel.from_pretrained(checkpoint, local_files_only=True)
    save_model(model, tokenizer, out)
    print(f"model in {out}", describe_next([build_try_command(checkpoint, out)]), sep="\n")


def _require_valid(checkpoint: Path) -> None:
    """Raises DamagedCheckpoint if a checkpoint is damaged; the message names a valid one of the same run."""
    try:
        Checkpoint.read(checkpoint).verify()
    except DamagedCheckpoint as damage:
        others = (other for other in Checkpoints(checkpoint.parent).committed() if other.folder != checkpoint)
        valid = next((other.folder for other in others if _check(other.verify) == VALID), None)
        advice = f"{valid} is valid: export that one." if valid else "The run has no other valid checkpoint."
        raise DamagedCheckpoint(f"{damage} {advice}") from None


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"No folder {folder}.")


def _verify(folder: Path) -> str:
    return _check(lambda: Checkpoint.read(folder).verify())


def _check(check: Callable[[], None]) -> str:
    """Returns VALID, or the message of the `DamagedCheckpoint` that the check raises."""
    try:
        check()
        return VALID
    except DamagedCheckpoint as damage:
        return str(damage)
