"""Checkpoints on disk: written to a staging folder, sealed by a manifest, and verified before they are used.

    .staging/checkpoint-120/   being written; never read
    checkpoint-120/            committed: MANIFEST.json has the size and the sha256 of every file
    checkpoint-120.damaged-1/  failed verification; renamed, never deleted
    .trash-checkpoint-80/      being deleted

The manifest is the commit point. It is written last, after every other file has reached the disk; a folder with a
matching manifest is complete, wherever it is. The rename that follows is only cosmetic, so that nothing is lost on file
systems without atomic renames (Google Drive, some network mounts). Checkpoints are ordered by the step in their
manifests, because modification times and folder names do not survive copying.

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
KEPT = 2  # verified checkpoints, at least: the newest one may be damaged by the disk
#: Errors of file systems that cannot rename a folder.
_NO_RENAME = {errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
#: Errors of file systems that cannot fsync a folder: many FUSE and network file systems.
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class DamagedCheckpoint(DataError):
    """A folder that is not a checkpoint, or whose files differ from its manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a manifest. Call `verify` to compare its files with the manifest.

    Args:
        manifest: step, metadata of the run ("identity"), validation loss and number of processes.
        files: (bytes, sha256) by path relative to the folder.
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
        """The mixtures before the present one. Validation losses are comparable only if these are equal."""
        return self.metadata.get("past", [])

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    @property
    def weight_files(self) -> list[str]:
        """The files with the trained weights: of the model, or of an adapter with its config."""
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
            raise DamagedCheckpoint(f"{folder} has no {MANIFEST}: it was never completed.") from None
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
            DamagedCheckpoint: a file is missing, unexpected, or has another size or content than the manifest says.
        """
        self.verify_sizes()
        for name in self.files:
            self.verify_file(name)

    def verify_file(self, name: str) -> None:
        """Reads one file; raises DamagedCheckpoint as `verify` does."""
        try:
            sha256 = file_sha256(self.folder / name)
        except OSError as error:  # deleted, or on a failing disk
            raise DamagedCheckpoint(f"Cannot read {self.folder / name}: {error.strerror}.") from None
        if sha256 != self.files[name][1]:
            raise DamagedCheckpoint(f"{self.folder / name} is damaged: its sha256 differs from the manifest.")

    def verify_sizes(self) -> None:
        """The fast part of `verify`: all files exist with their sizes, and there are no others."""
        existing = set(_list_files(self.folder)) - {MANIFEST}
        for name, (size, _) in self.files.items():
            if name not in existing:
                raise DamagedCheckpoint(f"{self.folder / name} is missing.")
            try:
                actual = (self.folder / name).stat().st_size
            except OSError as error:  # rotated away in the meantime
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
    """Turns a folder into a checkpoint: flushes its files to the disk, then writes the manifest.

    Args:
        manifest: entries in addition to the files; JSON, with at least `step`.
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
    if os.name != "posix":  # elsewhere, a folder cannot be opened
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
    """Renames a folder. If the file system cannot, copies it, the manifest last, and deletes the original."""
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
    """The checkpoints in the folder of a run. Only one process at a time may change them.

    Args:
        kept: how many of the newest ones are kept, in addition to the one with the lowest validation loss.
    """

    def __init__(self, folder: str | Path, kept: int = KEPT):
        self.folder, self.kept = Path(folder), kept
        self.in_use: set[Path] = set()  # not rotated, because a copy is in progress

    # Writing

    def begin(self, step: int) -> Path:
        """Creates an empty staging folder for the files of a checkpoint, for `commit`."""
        self.discard_staging()
        staging = self.folder / STAGING / f"checkpoint-{step}"
        staging.mkdir(parents=True)
        return staging

    def commit(self, staging: Path, manifest: dict) -> Checkpoint:
        """Seals a staging folder, renames it, and then rotates. A failed rotation is reported, and not an error."""
        return self._publish(seal(staging, manifest))

    def import_copy(self, step: int, fetch: Callable[[Path], None]) -> Checkpoint:
        """Adds a checkpoint from another place.

        Args:
            fetch: copies the files into an empty folder, the manifest last.

        Raises:
            DamagedCheckpoint: the copy is damaged; it is not added.
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
        """Deletes all checkpoints but the new one, the newest complete ones, and the best one.

        The best one has the lowest validation loss among those that were validated on the same sources as the new one.
        """
        self._empty_trash()
        committed = [checkpoint for checkpoint in self.committed() if checkpoint.has_all_files()]
        history = next((checkpoint.mixture_history for checkpoint in committed if checkpoint.folder == new), [])
        comparable = [
            checkpoint
            for checkpoint in committed
            if checkpoint.validation_loss is not None and checkpoint.mixture_history == history
        ]
        keep = {new, *self.in_use, *(checkpoint.folder for checkpoint in committed[: self.kept])}
        if comparable:
            keep.add(min(comparable, key=lambda checkpoint: checkpoint.validation_loss).folder)
        for checkpoint in committed:
            if checkpoint.folder not in keep:
                self._delete(checkpoint.folder)

    def _empty_trash(self) -> None:
        for trash in self.folder.glob(f"{TRASH}*"):
            shutil.rmtree(trash)

    def _delete(self, folder: Path) -> None:
        """Renames a checkpoint before deleting its files, so that an interrupted deletion leaves no checkpoint."""
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
        """`recover` on the main process; every process gets the checkpoint that it leaves as the newest."""
        from rorchat.training.distributed import run_on_main_process

        run_on_main_process(self.recover)
        return next(iter(self.committed()), None)

    def committed(self) -> list[Checkpoint]:
        """All checkpoints with a readable manifest, the newest first; their files are not verified."""
        checkpoints = []
        for folder in self._list_folders():
            try:
                checkpoints.append(Checkpoint.read(folder))
            except DamagedCheckpoint:
                continue
        return sorted(checkpoints, key=lambda checkpoint: checkpoint.step, reverse=True)

    def _list_folders(self) -> list[Path]:
        """Every folder named like a checkpoint, in descending order of its number."""
        folders = [path for path in self.folder.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
        return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)

    def damaged(self) -> list[Path]:
        """The folders that failed verification, the newest last."""
        folders = [path for path in self.folder.glob(f"checkpoint-*{DAMAGED}*") if path.is_dir()]
        return sorted(folders, key=lambda path: (int(path.name.split("-")[1].split(".")[0]), path.name))

    def newest_weights(self) -> Checkpoint:
        """The newest damaged checkpoint whose weights are valid.

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
                f"No checkpoint in {self.folder} is valid, and neither are the weights of one. Restore one from a "
                "backup, or delete them to start from step 0."
            )
        return max(checkpoints, key=lambda checkpoint: checkpoint.step)

    @property
    def weights_folder(self) -> Path:
        """The target of `copy_weights`. The next save deletes it."""
        return self.folder / STAGING / "weights"

    def copy_weights(self, checkpoint: Checkpoint) -> None:
        """Copies the weights of a checkpoint, and nothing else, into a folder to resume from."""
        self.discard_staging()
        self.weights_folder.mkdir(parents=True)
        for name in checkpoint.weight_files:
            shutil.copyfile(checkpoint.folder / name, self.weights_folder / name)

    def recover(self) -> Checkpoint | None:
        """The newest valid checkpoint, after completing or deleting what a killed run left behind.

        Newer checkpoints that are damaged are renamed, with a message.

        Returns:
            None if no checkpoint was ever committed.

        Raises:
            DataError: there were checkpoints, and none is valid. Starting from step 0 would hide the loss.
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
                "the weights of one, if they are valid."
            )
        return None

    def _list_by_step(self) -> list[Path]:
        """Every folder named like a checkpoint, the newest first: by its manifest, or else by its name."""
        steps = {checkpoint.folder: checkpoint.step for checkpoint in self.committed()}
        return sorted(self._list_folders(), key=lambda path: steps.get(path, int(path.name[11:])), reverse=True)

    def _complete_staging(self, staging: Path) -> None:
        """Publishes a staged checkpoint that is complete, unless there is a valid one of the same step."""
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
        """Renames a damaged checkpoint, and prints why."""
        number = 1
        while (renamed := folder.with_name(f"{folder.name}{DAMAGED}{number}")).exists():
            number += 1
        shutil.move(folder, renamed)
        print(f"{damage} It was renamed to {renamed.name}.", file=sys.stderr)  # noqa: T201
