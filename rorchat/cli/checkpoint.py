"""`rorchat checkpoint ...`: what a run has saved, whether it is whole, and its model without the rest."""

from pathlib import Path
from typing import Annotated

import typer

from rorchat.cli.app import App
from rorchat.errors import DataError, UsageError
from rorchat.training.checkpointing.checkpoint import DAMAGED, MANIFEST, Checkpoint, Checkpoints, Damaged

WHOLE = "whole"
app = App("Checkpoints: what there is, whether it is whole, and the model in it.")


@app.command(name="list")
def list_(run: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """The checkpoints of a run, the newest first. Sizes are looked at, contents are not: see `verify`."""
    from rorchat.cli.tables import print_table

    _require_folder(run)
    if (run / MANIFEST).is_file():
        raise UsageError(f"{run} is a checkpoint itself: give the folder of its run, {run.parent}.")
    rows = []
    for checkpoint in Checkpoints(run).committed():
        loss = checkpoint.validation_loss
        rows.append(
            [
                checkpoint.folder.name,
                f"{checkpoint.step:,}",
                f"{checkpoint.bytes / 1e6:,.1f} MB",
                "" if loss is None else f"{loss:.4f}",
                _state(checkpoint.check_sizes),
            ]
        )
    listed = {row[0] for row in rows}
    for folder in sorted(run.glob("checkpoint-*")):
        if folder.is_dir() and folder.name not in listed:
            rows.append([folder.name, "", "", "", _state(lambda folder=folder: Checkpoint.read(folder).verify())])
    if not rows:
        raise DataError(f"{run} has no checkpoint: save_steps says when a run saves one.")
    print_table(["checkpoint", "step", "size", "validation loss", "state"], rows)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run: all of its.")]) -> None:
    """Reads every file of checkpoints and compares it with what was written. Ends with 65 if one is damaged."""
    _require_folder(folder)
    folders = [folder] if (folder / MANIFEST).is_file() else sorted(folder.glob("checkpoint-*"))
    if not folders:
        raise DataError(f"{folder} is no checkpoint and holds none.")
    aside = [each for each in folders if DAMAGED in each.name]
    folders = [each for each in folders if each not in aside]
    damages = 0
    for each in folders:
        state = _state(lambda each=each: Checkpoint.read(each).verify())
        damages += state != WHOLE
        print(f"{each.name}: {state}")
    if not folders:
        damages = len(aside)
    for each in aside:
        print(f"{each.name}: was set aside before; it counts no more")
    if damages:
        raise DataError(
            f"{damages} of {len(folders) or damages} checkpoints in {folder} are damaged: a run that goes on sets them "
            "aside and takes the newest that is whole, if there is one."
        )


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run: its newest.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the model, as Transformers and the Hub have it.")],
) -> None:
    """The model of a checkpoint, verified first: weights as safetensors, tokenizer and configs, and nothing else."""
    _require_folder(checkpoint)
    if out.exists():
        raise UsageError(f"{out} is there already: give a new folder.")
    if not (checkpoint / MANIFEST).is_file():
        found = Checkpoints(checkpoint).committed()
        if not found:
            raise DataError(f"{checkpoint} is no checkpoint and holds none.")
        checkpoint = found[0].folder
    _require_whole(checkpoint)

    from transformers import AutoModelForCausalLM

    from rorchat.model import is_adapter, load_checkpoint, save_model
    from rorchat.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(checkpoint))
    if is_adapter(checkpoint):  # its base is needed as well
        model = load_checkpoint(str(checkpoint), tokenizer)
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True)
    save_model(model, tokenizer, out)
    print(out)


def _require_whole(checkpoint: Path) -> None:
    """Raises Damaged where a checkpoint is not as it was written; names another one of the run that is."""
    try:
        Checkpoint.read(checkpoint).verify()
    except Damaged as damage:
        others = (each for each in Checkpoints(checkpoint.parent).committed() if each.folder != checkpoint)
        whole = next((each.folder for each in others if _state(each.verify) == WHOLE), None)
        raise Damaged(
            f"{damage} {f'{whole} is whole: export that' if whole else 'No other one of the run is whole'}."
        ) from None


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"No folder {folder}.")


def _state(check) -> str:
    try:
        check()
        return WHOLE
    except Damaged as damage:
        return str(damage)
