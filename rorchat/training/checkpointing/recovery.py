"""The checkpoints of a run: committed after every save, rotated, and recovered after a crash."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rorchat.errors import DataError
from rorchat.training.checkpointing.checkpoint import (
    DAMAGED,
    KEPT,
    MANIFEST,
    NO_RENAME,
    STAGING,
    TRASH,
    Checkpoint,
    DamagedCheckpoint,
    move,
    seal,
)


class Checkpoints:
    """The checkpoints of a run folder. Only one process may modify them at a time.

    Args:
        kept: number of newest checkpoints to keep, in addition to the one with the lowest validation loss.
    """

    def __init__(self, folder: str | Path, kept: int = KEPT):
        self.folder, self.kept = Path(folder), kept
        self.in_use: set[Path] = set()  # excluded from rotation while they are being copied

    # Writing

    def begin(self, step: int) -> Path:
        """Creates an empty staging folder. Write the files of the checkpoint there, then call `commit`."""
        self.discard_staging()
        staging = self.folder / STAGING / f"checkpoint-{step}"
        staging.mkdir(parents=True)
        return staging

    def commit(self, staging: Path, manifest: dict) -> Checkpoint:
        """Seals and renames a staging folder, then rotates. If the rotation fails, a message is printed."""
        return self._publish(seal(staging, manifest))

    def import_copy(self, step: int, fetch: Callable[[Path], None]) -> Checkpoint:
        """Adds a copy of a checkpoint, such as one from a mirror.

        Args:
            fetch: copies the files into an empty folder, the manifest last.

        Raises:
            DamagedCheckpoint: the copy is damaged and was not added.
        """
        staging = self.begin(step)
        fetch(staging)
        fetched = Checkpoint.read(staging)
        fetched.verify()
        return self._publish(fetched)

    def _publish(self, staged: Checkpoint) -> Checkpoint:
        target = self.folder / f"checkpoint-{staged.step}"
        if target.exists():
            self._delete(target)
        move(staged.folder, target)
        try:
            self.discard_staging()
            self.rotate(target)
        except OSError as error:
            print(f"{target.name} is saved, but older checkpoints could not be deleted: {error}", file=sys.stderr)  # noqa: T201
        return replace(staged, folder=target)

    def discard_staging(self) -> None:
        """Deletes an incomplete checkpoint."""
        if (self.folder / STAGING).exists():
            shutil.rmtree(self.folder / STAGING)

    def rotate(self, new: Path) -> None:
        """Deletes all checkpoints except the new one, the `kept` newest complete ones, and the best one.

        The best checkpoint has the lowest validation loss among those with the same mixture history as the new one.
        """
        self._empty_trash()
        committed = [checkpoint for checkpoint in self.committed() if checkpoint.has_all_files()]
        history = next((checkpoint.mixture_history for checkpoint in committed if checkpoint.folder == new), [])
        losses = {
            checkpoint.folder: checkpoint.validation_loss
            for checkpoint in committed
            if checkpoint.validation_loss is not None and checkpoint.mixture_history == history
        }
        keep = {new, *self.in_use, *(checkpoint.folder for checkpoint in committed[: self.kept])}
        if losses:
            keep.add(min(losses, key=lambda folder: losses[folder]))
        for checkpoint in committed:
            if checkpoint.folder not in keep:
                self._delete(checkpoint.folder)

    def _empty_trash(self) -> None:
        for trash in self.folder.glob(f"{TRASH}*"):
            shutil.rmtree(trash)

    def _delete(self, folder: Path) -> None:
        """Deletes a checkpoint. It is renamed first, so an interrupted deletion leaves no partial checkpoint."""
        trash = self.folder / f"{TRASH}{folder.name}"
        if trash.exists():
            shutil.rmtree(trash)
        try:
            os.rename(folder, trash)
        except OSError as error:
            if error.errno not in NO_RENAME:
                raise
            (folder / MANIFEST).unlink(missing_ok=True)
            trash = folder
        shutil.rmtree(trash)

    # Reading

    def newest(self) -> Checkpoint | None:
        """Calls `recover` on the main process and returns the newest valid checkpoint on all processes."""
        from rorchat.training.distributed import run_on_main_process

        run_on_main_process(self.recover)
        return next(iter(self.committed()), None)

    def committed(self) -> list[Checkpoint]:
        """All checkpoints with a valid manifest, newest first. Their files are not verified."""
        checkpoints = []
        for folder in self._list_folders():
            try:
                checkpoints.append(Checkpoint.read(folder))
            except DamagedCheckpoint:
                continue
        return sorted(checkpoints, key=lambda checkpoint: checkpoint.step, reverse=True)

    def _list_folders(self) -> list[Path]:
        """All folders named checkpoint-N, in descending order of N."""
        folders = [path for path in self.folder.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
        return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)

    def damaged(self) -> list[Path]:
        """The folders that failed verification, newest last."""
        folders = [path for path in self.folder.glob(f"checkpoint-*{DAMAGED}*") if path.is_dir()]
        return sorted(folders, key=lambda path: (int(path.name.split("-")[1].split(".")[0]), path.name))

    def newest_weights(self) -> Checkpoint:
        """The newest of the damaged checkpoints with intact weights.

        Raises:
            DataError: there is none.
        """
        checkpoints = []
        for folder in self.damaged():
            try:
                checkpoint = Checkpoint.read(folder)
                for name in checkpoint.weight_files:
                    checkpoint.verify_file(name)
                checkpoints.append(checkpoint)
            except DamagedCheckpoint as damage:
                print(damage, file=sys.stderr)  # noqa: T201
        if not checkpoints:
            raise DataError(
                f"All checkpoints in {self.folder} are damaged, and none has intact weights. Restore one from a "
                "backup, or delete them to start from step 0."
            )
        return max(checkpoints, key=lambda checkpoint: checkpoint.step)

    @property
    def weights_folder(self) -> Path:
        """The folder that `copy_weights` writes to. The next save deletes it."""
        return self.folder / STAGING / "weights"

    def copy_weights(self, checkpoint: Checkpoint) -> None:
        """Copies only the weights of a checkpoint to `weights_folder`, to resume from them."""
        self.discard_staging()
        self.weights_folder.mkdir(parents=True)
        for name in checkpoint.weight_files:
            shutil.copyfile(checkpoint.folder / name, self.weights_folder / name)

    def recover(self) -> Checkpoint | None:
        """Cleans up after a killed run and finds the newest valid checkpoint.

        A complete checkpoint in the staging folder is published; other leftovers are deleted. Damaged checkpoints are
        renamed with a message.

        Returns:
            The newest valid checkpoint, or None if no checkpoint was ever committed.

        Raises:
            DataError: all checkpoints are damaged. Starting from step 0 would hide this.
        """
        for staging in sorted(self.folder.glob(f"{STAGING}/*")):
            self._complete_staging(staging)
        self.discard_staging()
        self._empty_trash()
        for folder in self._list_by_step():
            try:
                checkpoint = Checkpoint.read(folder)
                checkpoint.verify()
                return checkpoint
            except DamagedCheckpoint as damage:
                self.quarantine(folder, damage)
        if damaged := self.damaged():
            raise DataError(
                f"No checkpoint in {self.folder} is valid; {len(damaged)} are damaged, such as {damaged[-1].name}. "
                "Restore one from a backup, delete them to start from step 0, or give --weights_only to resume from "
                "the newest intact weights."
            )
        return None

    def _list_by_step(self) -> list[Path]:
        """All folders named checkpoint-N, newest first, by the step in their manifest, or by N if it is unreadable."""
        steps = {checkpoint.folder: checkpoint.step for checkpoint in self.committed()}
        return sorted(self._list_folders(), key=lambda path: steps.get(path, int(path.name[11:])), reverse=True)

    def _complete_staging(self, staging: Path) -> None:
        """Publishes a complete checkpoint from the staging folder, unless there is a valid one of the same step."""
        try:
            checkpoint = Checkpoint.read(staging)
            checkpoint.verify()
        except DamagedCheckpoint:
            return
        target = self.folder / f"checkpoint-{checkpoint.step}"
        if target.exists():
            try:
                Checkpoint.read(target).verify()
                return
            except DamagedCheckpoint as damage:  # an interrupted copy, on a file system without rename
                self.quarantine(target, damage)
        move(staging, target)

    def quarantine(self, folder: Path, damage: DamagedCheckpoint) -> None:
        """Renames a damaged checkpoint and prints the reason."""
        number = 1
        while (renamed := folder.with_name(f"{folder.name}{DAMAGED}{number}")).exists():
            number += 1
        shutil.move(folder, renamed)
        print(f"{damage} It was renamed to {renamed.name}.", file=sys.stderr)  # noqa: T201
