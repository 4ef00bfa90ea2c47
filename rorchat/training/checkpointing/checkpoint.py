"""Checkpoints on disk: written to a staging folder, committed by a manifest, and verified before they are loaded.

    .staging/checkpoint-120/   being written; never read
    checkpoint-120/            committed: MANIFEST.json has the size and the sha256 of every file
    checkpoint-120.damaged-1/  failed verification: renamed, never deleted automatically
    .trash-checkpoint-80/      being deleted

The manifest is the commit point. It is written last, after all other files have been flushed to the disk, so a folder
with a matching manifest is complete, whatever its name. Safety does not depend on the rename that follows, because some
file systems have no atomic rename (Google Drive, some network mounts). Checkpoints are ordered by the step in their
manifests, because modification times and folder names can change when they are copied.

This module does not import torch.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rorchat.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rorchat.errors import DataError
from rorchat.files import file_sha256, fsync_file, json_sha256, write_atomically
from rorchat.model import WEIGHTS

MANIFEST = "MANIFEST.json"
FORMAT = 1
STAGING, TRASH, DAMAGED = ".staging", ".trash-", ".damaged-"
KEPT = 2  # minimum number of checkpoints to keep, because the newest one may get damaged on the disk
#: Errors of file systems that cannot rename a folder.
_NO_RENAME = {errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
#: Errors of file systems that cannot fsync a folder, such as many FUSE and network file systems.
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class DamagedCheckpoint(DataError):
    """A folder that is not a checkpoint, or whose files differ from its manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its manifest. Call `verify` to compare the files with the manifest.

    Args:
        manifest: step, metadata of the run ("identity"), validation loss and number of processes.
        files: {path relative to the folder: (size in bytes, sha256)}.
    """

    folder: Path
    manifest: dict
    files: dict[str, tuple[int, str]]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def metadata(self) -> dict:
        """The metadata of the run, see `rorchat.training.checkpointing.fingerprint`."""
        return self.manifest.get("identity", {})

    @property
    def validation_loss(self) -> float | None:
        return self.manifest.get("validation_loss")

    @property
    def mixture_history(self) -> list:
        """The earlier mixtures of the run. Validation losses are comparable only between equal histories."""
        return self.metadata.get("past", [])

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    @property
    def weight_files(self) -> list[str]:
        """The files with the trained weights: those of the model, or those of the adapter and its config."""
        return [WEIGHTS] if WEIGHTS in self.files else [ADAPTER_WEIGHTS, ADAPTER_CONFIG]

    @classmethod
    def read(cls, folder: str | Path) -> "Checkpoint":
        """Reads the manifest in a folder.

        Raises:
            DamagedCheckpoint: there is no manifest, or it has changed since it was written.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{folder} has no {MANIFEST}: it is incomplete.") from None
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"Cannot read {folder / MANIFEST}: {' '.join(str(error).split())}.") from None
        sha256 = manifest.pop("sha256", None) if isinstance(manifest, dict) else None
        if sha256 is None or sha256 != json_sha256(manifest):
            raise DamagedCheckpoint(f"{folder / MANIFEST} has changed since it was written.")
        if manifest["format"] != FORMAT:
            raise DamagedCheckpoint(
                f"{folder / MANIFEST} has format {manifest['format']}; this version reads {FORMAT}."
            )
        return cls.from_manifest(folder, manifest)

    @classmethod
    def from_manifest(cls, folder: Path, manifest: dict) -> "Checkpoint":
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        return cls(folder, {key: value for key, value in manifest.items() if key != "files"}, files)

    def verify(self) -> None:
        """Reads every file and compares it with the manifest.

        Raises:
            DamagedCheckpoint: a file is missing or unexpected, or its size or sha256 differs from the manifest.
        """
        self.verify_sizes()
        for name in self.files:
            self.verify_file(name)

    def verify_file(self, name: str) -> None:
        """Compares the sha256 of one file with the manifest; raises DamagedCheckpoint if it differs."""
        try:
            sha256 = file_sha256(self.folder / name)
        except OSError as error:  # deleted, or on a failing disk
            raise DamagedCheckpoint(f"Cannot read {self.folder / name}: {error.strerror}.") from None
        if sha256 != self.files[name][1]:
            raise DamagedCheckpoint(f"{self.folder / name} is damaged: its sha256 differs from the manifest.")

    def verify_sizes(self) -> None:
        """The fast part of `verify`: checks the names and sizes of all files without reading them."""
        existing = set(_list_files(self.folder)) - {MANIFEST}
        for name, (size, _) in self.files.items():
            if name not in existing:
                raise DamagedCheckpoint(f"{self.folder / name} is missing.")
            try:
                actual = (self.folder / name).stat().st_size
            except OSError as error:  # deleted by rotation in the meantime
                raise DamagedCheckpoint(f"Cannot read {self.folder / name}: {error.strerror}.") from None
            if actual != size:
                raise DamagedCheckpoint(f"{self.folder / name} has {actual:,} bytes; the manifest says {size:,}.")
        unexpected = sorted(existing - set(self.files))
        if unexpected:
            raise DamagedCheckpoint(f"{self.folder / unexpected[0]} does not belong to the checkpoint.")

    def has_all_files(self) -> bool:
        try:
            self.verify_sizes()
            return True
        except DamagedCheckpoint:
            return False


def _list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def seal(folder: Path, manifest: dict) -> Checkpoint:
    """Flushes the files of a folder to the disk and writes the manifest, which makes it a checkpoint.

    Args:
        manifest: JSON values to store in addition to the list of files, at least `step`.
    """
    files = {}
    for name in _list_files(folder):
        path = folder / name
        fsync_file(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    _fsync_folder(folder)
    manifest = json.loads(json.dumps({"format": FORMAT, **manifest, "files": files}))
    write_atomically(folder / MANIFEST, json.dumps({**manifest, "sha256": json_sha256(manifest)}, indent=2))
    _fsync_folder(folder)
    return Checkpoint.from_manifest(folder, manifest)


def _fsync_folder(folder: Path) -> None:
    if os.name != "posix":  # a folder can be opened only on POSIX
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Renames a folder. On file systems without rename, copies the folder and deletes the original."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        copy(source, target)
        shutil.rmtree(source)
    _fsync_folder(target.parent)


def copy(source: Path, target: Path) -> None:
    """Copies a checkpoint. The manifest is copied last, so that an incomplete copy has none."""
    target.mkdir(exist_ok=True)
    for name in sorted(_list_files(source), key=lambda name: (name == MANIFEST, name)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
        fsync_file(target / name)
    _fsync_folder(target)


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
            if error.errno not in _NO_RENAME:
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
