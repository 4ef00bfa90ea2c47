"""Checkpoints on disk: written aside, sealed by a manifest, verified before they are used, the old ones removed last.

    .staging/checkpoint-120/   being written; nobody reads it
    checkpoint-120/            committed: MANIFEST.json has the size and the sha256 of every file
    checkpoint-120.damaged-1/  did not verify; set aside, never deleted
    .trash-checkpoint-80/      on its way out

The manifest is the commit point: it is written when every other file is on the disk, and what has one that fits is
whole, wherever it lies. The rename behind it only tidies up, so that file systems whose renames are not atomic (Drive,
some network mounts) lose nothing. The order of checkpoints is that of the steps in their manifests: times of change and
names do not survive a copy.

Nothing here imports torch.
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
KEPT = 2  # verified checkpoints at least: the newest may be the one that a disk damages
#: What a file system says that has no such rename.
_NO_RENAME = {errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

#: What one says that flushes no folders: many that live in user space or on the network.
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Damaged(DataError):
    """A folder that is no checkpoint, or no longer."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a manifest; whether its files are those of the manifest, `verify` says.

    Args:
        about: what the manifest says besides: the step, the run's identity, the validation loss.
        files: (bytes, sha256) by path inside the folder.
    """

    folder: Path
    about: dict
    files: dict[str, tuple[int, str]]

    @property
    def step(self) -> int:
        return self.about["step"]

    @property
    def validation_loss(self) -> float | None:
        return self.about.get("validation_loss")

    @property
    def mixed_before(self) -> list:
        """What was mixed before the mixture that was trained on: over that seam validation losses do not compare."""
        return self.about.get("identity", {}).get("past", [])

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    @property
    def weights(self) -> list[str]:
        """The files with what was trained: the model's, or an adapter's and what it is."""
        return [WEIGHTS] if WEIGHTS in self.files else [ADAPTER_WEIGHTS, ADAPTER_CONFIG]

    @classmethod
    def read(cls, folder: str | Path) -> "Checkpoint":
        """The checkpoint in a folder, as its manifest has it.

        Raises:
            Damaged: there is no manifest, or it was changed since it was written.
        """
        folder = Path(folder)
        try:
            said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Damaged(f"{folder} has no {MANIFEST}: it was never finished.") from None
        except (OSError, ValueError) as error:
            raise Damaged(f"{folder / MANIFEST} cannot be read: {' '.join(str(error).split())}.") from None
        seal = said.pop("sha256", None) if isinstance(said, dict) else None
        if seal is None or seal != json_sha256(said):
            raise Damaged(f"{folder / MANIFEST} is not as it was written.")
        if said["format"] != FORMAT:
            raise Damaged(f"{folder / MANIFEST} has format {said['format']}; this version reads {FORMAT}.")
        return cls.of(folder, said)

    @classmethod
    def of(cls, folder: Path, said: dict) -> "Checkpoint":
        """The checkpoint in a folder whose manifest says so."""
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in said["files"].items()}
        return cls(folder, {key: value for key, value in said.items() if key != "files"}, files)

    def verify(self) -> None:
        """Reads every file.

        Raises:
            Damaged: one is missing, of another size or other content than when it was written; or one is too many.
        """
        self.check_sizes()
        for name in self.files:
            self.verify_file(name)

    def verify_file(self, name: str) -> None:
        """Reads one file; raises Damaged as `verify` does."""
        try:
            found = file_sha256(self.folder / name)
        except OSError as error:  # gone, or on a disk that cannot read
            raise Damaged(f"{self.folder / name} cannot be read: {error.strerror}.") from None
        if found != self.files[name][1]:
            raise Damaged(f"{self.folder / name} is not what was written: its sha256 differs.")

    def check_sizes(self) -> None:
        """The quick part of `verify`: every file is there, with its size, and no other."""
        there = set(_files_in(self.folder)) - {MANIFEST}
        for name, (size, _) in self.files.items():
            if name not in there:
                raise Damaged(f"{self.folder / name} is missing.")
            try:
                found = (self.folder / name).stat().st_size
            except OSError as error:  # rotated away meanwhile
                raise Damaged(f"{self.folder / name} cannot be read: {error.strerror}.") from None
            if found != size:
                raise Damaged(f"{self.folder / name} has {found:,} bytes, it had {size:,} when it was written.")
        more = sorted(there - set(self.files))
        if more:
            raise Damaged(f"{self.folder / more[0]} is not one of the checkpoint's files.")


def _is_complete(checkpoint: Checkpoint) -> bool:
    try:
        checkpoint.check_sizes()
        return True
    except Damaged:
        return False


def _files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def seal(folder: Path, about: dict) -> Checkpoint:
    """Makes the files of a folder a checkpoint: flushes them to the disk, and then writes their manifest.

    Args:
        about: what the manifest says besides; `step` at least, JSON.
    """
    files = {}
    for name in _files_in(folder):
        path = folder / name
        fsync_file(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    _flush_folder(folder)
    said = json.loads(json.dumps({"format": FORMAT, **about, "files": files}))
    write_atomically(folder / MANIFEST, json.dumps({**said, "sha256": json_sha256(said)}, indent=2))
    _flush_folder(folder)
    return Checkpoint.of(folder, said)


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
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
    """Renames a folder; where the file system cannot, copies it, its manifest last, and removes the original."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        copy(source, target)
        shutil.rmtree(source)
    _flush_folder(target.parent)


def copy(source: Path, target: Path) -> None:
    """Copies a folder so that it has a manifest only when all else is there."""
    target.mkdir(exist_ok=True)
    names = _files_in(source)
    for name in sorted(names, key=lambda name: (name == MANIFEST, name)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
        fsync_file(target / name)
    _flush_folder(target)


class Checkpoints:
    """The checkpoints in the folder of a run. One process at a time may change them.

    Args:
        kept: how many stay, the newest ones, and beside them the one with the lowest validation loss.
    """

    def __init__(self, folder: str | Path, kept: int = KEPT):
        self.folder, self.kept = Path(folder), kept
        self.in_use: set[Path] = set()  # what rotation leaves, because somebody reads it

    # Writing

    def begin(self, step: int) -> Path:
        """An empty folder for the files of a checkpoint, which `commit` makes one."""
        self.give_up()
        staging = self.folder / STAGING / f"checkpoint-{step}"
        staging.mkdir(parents=True)
        return staging

    def commit(self, staging: Path, about: dict) -> Checkpoint:
        """Seals what `begin` gave and gives it its name; only then the oldest ones go. That may fail and is told."""
        return self._place(seal(staging, about))

    def adopt(self, step: int, fetch: Callable[[Path], None]) -> Checkpoint:
        """Takes in a checkpoint from elsewhere as `commit` does one that was written here.

        Args:
            fetch: puts its files into an empty folder, the manifest last.

        Raises:
            Damaged: what came does not verify; it is not taken in.
        """
        staging = self.begin(step)
        fetch(staging)
        fetched = Checkpoint.read(staging)
        fetched.verify()
        return self._place(fetched)

    def _place(self, staged: Checkpoint) -> Checkpoint:
        target = self.folder / f"checkpoint-{staged.step}"
        if target.exists():
            self._remove(target)
        move(staged.folder, target)
        try:
            self.give_up()
            self.rotate(target)
        except OSError as error:
            print(f"{target.name} is saved, but older ones could not be removed: {error}", file=sys.stderr)  # noqa: T201
        return replace(staged, folder=target)

    def give_up(self) -> None:
        """Removes what was being written."""
        if (self.folder / STAGING).exists():
            shutil.rmtree(self.folder / STAGING)

    def rotate(self, new: Path) -> None:
        """Removes all but the new one, the newest ones and the best; and what it left half done.

        What lacks files counts as none of them. The best is the one with the lowest validation loss among those that
        were measured on the same sources as the new one.
        """
        self._empty_trash()
        committed = [each for each in self.committed() if _is_complete(each)]
        mixed_before = next((each.mixed_before for each in committed if each.folder == new), [])
        measured = [
            each for each in committed if each.validation_loss is not None and each.mixed_before == mixed_before
        ]
        stay = {each.folder for each in committed[: self.kept]}
        stay |= {min(measured, key=lambda each: each.validation_loss).folder} if measured else set()
        stay |= {new, *self.in_use}
        for each in committed:
            if each.folder not in stay:
                self._remove(each.folder)

    def _empty_trash(self) -> None:
        for trash in self.folder.glob(f"{TRASH}*"):
            shutil.rmtree(trash)

    def _remove(self, folder: Path) -> None:
        """Takes a checkpoint's name before its files, so that what is half deleted is none."""
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
        """As `recover`, on every process: the first one looks and clears up, the others take what it left."""
        from rorchat.training.distributed import run_on_main_process

        run_on_main_process(self.recover)
        return next(iter(self.committed()), None)

    def committed(self) -> list[Checkpoint]:
        """What has a manifest, the newest first; nothing is verified."""
        found = []
        for folder in self._folders():
            try:
                found.append(Checkpoint.read(folder))
            except Damaged:
                continue
        return sorted(found, key=lambda each: each.step, reverse=True)

    def _folders(self) -> list[Path]:
        """Every folder with a checkpoint's name, by the number in it, the highest first."""
        folders = [path for path in self.folder.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
        return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)

    def damaged(self) -> list[Path]:
        """What was set aside."""
        there = [path for path in self.folder.glob(f"checkpoint-*{DAMAGED}*") if path.is_dir()]
        return sorted(there, key=lambda path: (int(path.name.split("-")[1].split(".")[0]), path.name))

    def newest_weights(self) -> Checkpoint:
        """Of what was set aside the newest whose weights are as they were written, whatever became of the rest.

        Raises:
            DataError: there is none.
        """
        found = []
        for folder in self.damaged():
            try:
                checkpoint = Checkpoint.read(folder)
                for name in checkpoint.weights:
                    checkpoint.verify_file(name)
                found.append(checkpoint)
            except Damaged as damage:
                print(damage, file=sys.stderr)  # noqa: T201
        if not found:
            raise DataError(
                f"No checkpoint in {self.folder} verifies, nor the weights of one. Bring one back from a copy, or "
                "delete them to start anew."
            )
        return max(found, key=lambda each: each.step)

    @property
    def weights(self) -> Path:
        """Where `lay_out_weights` puts them: a place that the next save clears."""
        return self.folder / STAGING / "weights"

    def lay_out_weights(self, checkpoint: Checkpoint) -> None:
        """Copies a checkpoint's weights, and nothing else, into a folder."""
        self.give_up()
        self.weights.mkdir(parents=True)
        for name in checkpoint.weights:
            shutil.copyfile(checkpoint.folder / name, self.weights / name)

    def recover(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, after what a killed run left behind is finished or cleared away.

        Damaged ones that are newer are set aside under another name, and told.

        Returns:
            None where nothing was ever committed.

        Raises:
            DataError: there were checkpoints, and none verifies: to start anew would hide the loss.
        """
        for staging in sorted(self.folder.glob(f"{STAGING}/*")):
            self._finish(staging)
        self.give_up()
        self._empty_trash()
        for folder in self._by_step():
            try:
                checkpoint = Checkpoint.read(folder)
                checkpoint.verify()
                return checkpoint
            except Damaged as damage:
                self.set_aside(folder, damage)
        if self.damaged():
            raise DataError(
                f"No checkpoint in {self.folder} verifies; {self.damaged()[-1].name} is one of {len(self.damaged())} "
                "that were set aside. Bring one back from a copy, delete them to start anew, or give --weights_only to "
                "go on from the weights of one, if they are whole."
            )
        return None

    def _by_step(self) -> list[Path]:
        """Every folder of a checkpoint, the newest first: by its manifest, or by its name where it has none."""
        committed = {each.folder: each.step for each in self.committed()}
        return sorted(self._folders(), key=lambda path: committed.get(path, int(path.name[11:])), reverse=True)

    def _finish(self, staging: Path) -> None:
        """Gives a checkpoint its name if it is whole, unless the one that has the name is."""
        try:
            checkpoint = Checkpoint.read(staging)
            checkpoint.verify()
        except Damaged:
            return
        target = self.folder / f"checkpoint-{checkpoint.step}"
        if target.exists():
            try:
                Checkpoint.read(target).verify()
                return
            except Damaged as damage:  # a rename that was a copy, and was interrupted
                self.set_aside(target, damage)
        move(staging, target)

    def set_aside(self, folder: Path, damage: Damaged) -> None:
        """Takes its name from what does not verify, and says so."""
        number = 1
        while (aside := folder.with_name(f"{folder.name}{DAMAGED}{number}")).exists():
            number += 1
        shutil.move(folder, aside)
        print(f"{damage} Set aside as {aside.name}.", file=sys.stderr)  # noqa: T201
