"""Copies checkpoints in the background to a folder (Google Drive, a network mount) or a Hub repository.

A thread copies every committed checkpoint, verifies the copy, and only then deletes older copies. A failed copy is
reported, and the next checkpoint is tried; training neither waits for a copy nor ends because of one. A run whose own
folder is lost or outdated resumes from the mirror.
"""

import hashlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from tqdm.auto import tqdm

from rorchat.errors import DataError, MismatchError, PermissionDenied, RemoteError, StorageError, UsageError
from rorchat.hub_client import describe, is_denied, is_remote
from rorchat.training.checkpointing.checkpoint import KEPT, MANIFEST, Checkpoint, DamagedCheckpoint, copy
from rorchat.training.checkpointing.recovery import Checkpoints

#: run.json is not copied: it may say that the run has finished, but the mirror does not contain the final model.
RUN_FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl")
SILENT_SECONDS = 1.0  # a shorter wait is not announced
GRACE_SECONDS = 20.0  # to complete a copy when a run is stopped

Response = TypeVar("Response")


class MirrorStorage(Protocol):
    """Where the copies are."""

    def list_checkpoints(self) -> list[Checkpoint]:
        """The checkpoints, the newest first, as their manifests describe them."""

    def upload(self, checkpoint: Checkpoint, run: Path) -> None:
        """Copies a checkpoint and the files of the run, verifies the copy, and deletes the oldest copies."""

    def download(self, checkpoint: Checkpoint, target: Path) -> None:
        """Copies the files of a listed checkpoint into an empty folder."""

    def quarantine(self, checkpoint: Checkpoint, damage: DamagedCheckpoint) -> None:
        """Removes a damaged copy from the listed ones, so that no valid copy is deleted to keep it."""

    def download_run_files(self, run: Path) -> None:
        """Copies the `RUN_FILES` that the mirror contains into the run folder."""


class Mirror:
    """Copies of the checkpoints of a run. A background thread copies; the main thread calls the methods.

    Args:
        storage: where the copies are stored.
        run: the run folder.
        name: the name of the storage in messages.
    """

    def __init__(self, storage: MirrorStorage, run: Path, name: str):
        self.storage, self.run, self.name = storage, run, name
        self._pending: Checkpoint | None = None
        self._copied_step: int | None = None  # step of the newest copy
        self._newest: Checkpoint | None = None
        self._in_use: set[Path] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def restore_newest(self, checkpoints: Checkpoints) -> Checkpoint | None:
        """Copies the newest valid copy into the run folder, if it is newer than every valid checkpoint there.

        Raises:
            DataError: the run folder has checkpoints, but none there or in the mirror is valid.
        """
        lost, local = None, None
        try:
            local = checkpoints.recover()
        except DataError as error:
            lost = error
        for copied in self.list_copies():
            if local and copied.step <= local.step:
                break
            try:
                restored = checkpoints.import_copy(copied.step, partial(self.storage.download, copied))
            except DamagedCheckpoint as damage:
                _report(f"mirror {self.name}: the copy of step {copied.step} is damaged and is no longer used.")
                self.storage.quarantine(copied, damage)
                self._copied_step = None
                continue
            self._copied_step = restored.step
            self.storage.download_run_files(self.run)
            _report(f"mirror {self.name}: checkpoint-{restored.step} was restored from this mirror")
            return restored
        if lost:
            raise lost
        return None

    def list_copies(self) -> list[Checkpoint]:
        """The copies, the newest first."""
        copies = self.storage.list_checkpoints()
        self._copied_step = copies[0].step if copies else None
        return copies

    def offer(self, checkpoint: Checkpoint, in_use: set[Path]) -> None:
        """Queues a checkpoint to be copied, in place of one that is still queued.

        Args:
            in_use: folders that rotation must not delete; contains the checkpoint until it is copied.
        """
        if checkpoint.step == self._copied_step:
            return
        with self._changed:
            if self._pending:
                in_use.discard(self._pending.folder)
            self._pending = self._newest = checkpoint
            self._in_use = in_use
            in_use.add(checkpoint.folder)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._copy_pending, name="mirror", daemon=True)
            self._thread.start()

    def finish(self, seconds: float | None = None) -> None:
        """Waits at most `seconds` until the newest checkpoint is copied. Without a limit, retries a failed copy once.

        If the newest checkpoint was not copied, prints which copy is the newest.
        """
        newest, self._newest = self._newest, None  # only once, even if a signal interrupts the wait
        if newest is None:
            return
        with self._changed:
            if not self._changed.wait_for(self._is_idle, SILENT_SECONDS):
                _report(f"mirror {self.name}: waiting for checkpoint-{newest.step}; Ctrl-C ends the wait")
            idle = self._changed.wait_for(self._is_idle, seconds)
        if idle and self._copied_step != newest.step and seconds is None:
            self.offer(newest, self._in_use)
            with self._changed:
                self._changed.wait_for(self._is_idle)
        if self._copied_step != newest.step:
            copied = "empty" if self._copied_step is None else f"at checkpoint-{self._copied_step}"
            _report(f"mirror {self.name}: the mirror is {copied}; the newest checkpoint is checkpoint-{newest.step}")

    def _is_idle(self) -> bool:
        return not self._in_use

    def _copy_pending(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None)
                checkpoint, self._pending = self._pending, None
            assert checkpoint is not None, "the wait has ended"
            try:
                self.storage.upload(checkpoint, self.run)
                self._copied_step = checkpoint.step
            except Exception as failure:  # no failure of a copy may stop the training
                reason = " ".join(str(failure).split()) or type(failure).__name__
                _report(
                    f"mirror {self.name}: checkpoint-{checkpoint.step} could not be copied ({reason}). Training "
                    "continues, and the next checkpoint will be tried."
                )
            with self._changed:
                self._in_use.discard(checkpoint.folder)
                self._changed.notify_all()


def open_mirror(name: str | None, run: Path) -> Mirror | None:
    """The mirror with this name, a folder or a Hub id; None for no mirror.

    Raises:
        UsageError: the name is neither a folder nor a Hub id, or it is inside the run's folder.
        StorageError: the parent of the folder does not exist, as when a drive is not mounted.
        PermissionDenied, RemoteError: the Hub denies access to the repository, or cannot be reached.
    """
    if name is None:
        return None
    if _is_local(name):
        return Mirror(FolderStorage(Path(name).expanduser(), run), run, name)
    return Mirror(HubStorage(name), run, name)


def _is_local(name: str) -> bool:
    """Whether a name is a path. As for models, `runs/copy` is a path if there is a folder `runs`."""
    return name.startswith((".", "/", "~")) or "/" not in name or Path(name).parent.is_dir()


def _report(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


class FolderStorage:
    """Copies in a folder with the layout of a run, so that `rorchat checkpoint list` can read it."""

    def __init__(self, folder: Path, run: Path):
        if run.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UsageError(f"mirror {folder} is inside the run's folder: give another folder, best on another disk.")
        if not folder.resolve().parent.is_dir():
            raise StorageError(
                f"mirror {folder}: {folder.resolve().parent} does not exist. Mount the drive, or create it."
            )
        folder.mkdir(exist_ok=True)
        self.checkpoints = Checkpoints(folder, KEPT)
        others = sorted(path.name for path in folder.iterdir() if path.name not in RUN_FILES and path.name[0] != ".")
        if others and not self.list_checkpoints():
            raise MismatchError(
                f"mirror {folder} contains {others[0]} and no checkpoint: give an empty folder, or a new one."
            )

    def list_checkpoints(self) -> list[Checkpoint]:
        return self.checkpoints.committed()

    def upload(self, checkpoint: Checkpoint, run: Path) -> None:
        folder = self.checkpoints.folder
        if not folder.is_dir():  # not created again: it would be on the disk below the mount point
            raise FileNotFoundError(f"{folder} no longer exists")
        self.checkpoints.import_copy(checkpoint.step, lambda target: copy(checkpoint.folder, target))
        _copy_run_files(run, folder)

    def download(self, checkpoint: Checkpoint, target: Path) -> None:
        copy(checkpoint.folder, target)

    def quarantine(self, checkpoint: Checkpoint, damage: DamagedCheckpoint) -> None:
        self.checkpoints.quarantine(checkpoint.folder, damage)

    def download_run_files(self, run: Path) -> None:
        _copy_run_files(self.checkpoints.folder, run)


def _copy_run_files(source: Path, target: Path) -> None:
    for name in RUN_FILES:
        if (source / name).is_file():
            staged = target / f".{name}.mirrored"
            shutil.copyfile(source / name, staged)
            staged.replace(target / name)


class HubStorage:
    """Copies in a private repository of the Hub, one commit each. The git history keeps deleted copies.

    Raises:
        UsageError: the name is not a Hub id.
        PermissionDenied, RemoteError: the Hub denies write access, or cannot be reached.
    """

    def __init__(self, repository: str):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import HFValidationError, disable_progress_bars, validate_repo_id

        disable_progress_bars()  # bars of this thread would overwrite those of training
        self.api, self.repository = HfApi(), repository
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise UsageError(f"mirror {repository!r} is neither a folder nor a Hub id: {error}") from None
        self._request(lambda: self.api.create_repo(repository, private=True, exist_ok=True))
        self._request(lambda: self.api.auth_check(repository, write=True))  # it may exist and belong to someone else
        if not self._request(lambda: self.api.repo_info(repository)).private:
            raise MismatchError(f"mirror {repository} is a public repository: make it private, or give another one.")

    def _request(self, request: Callable[[], Response]) -> Response:
        """Sends a request before training, when a failure can still end the run."""
        try:
            return request()
        except Exception as error:
            if not is_remote(error):
                raise
            reason = describe(error)
            if is_denied(error):
                raise PermissionDenied(
                    f"mirror {self.repository}: the Hub refuses access ({reason}). Log in as its owner with `hf auth "
                    f"login`, or give a folder, ./{self.repository}."
                ) from None
            raise RemoteError(
                f"mirror {self.repository}: the Hub cannot be reached ({reason}), so it is unknown whether there is a "
                "run to resume. Try again, or leave the mirror out."
            ) from None

    def _list_files(self) -> dict[str, tuple[int, str]]:
        """(bytes, hash) of every file: the sha256 for LFS files, otherwise git's blob id."""
        from huggingface_hub.hf_api import RepoFile

        entries = self.api.list_repo_tree(self.repository, recursive=True)
        return {
            entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def list_checkpoints(self) -> list[Checkpoint]:
        names = [path.split("/")[0] for path in self._request(self._list_files) if path.endswith(f"/{MANIFEST}")]
        checkpoints = []
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                self._request(partial(self._download_file, f"{name}/{MANIFEST}", folder))
                try:
                    checkpoints.append(Checkpoint.read(Path(folder) / name))
                except DamagedCheckpoint as damage:
                    _report(f"mirror {self.repository}: {damage}")
        return sorted(checkpoints, key=lambda checkpoint: checkpoint.step, reverse=True)

    def _download_file(self, path: str, folder: str | Path) -> None:
        self.api.hf_hub_download(self.repository, path, local_dir=folder)

    def download(self, checkpoint: Checkpoint, target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            for name in (*checkpoint.files, MANIFEST):
                self._request(partial(self._download_file, f"{checkpoint.folder.name}/{name}", folder))
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(Path(folder) / checkpoint.folder.name / name, target / name)

    def quarantine(self, checkpoint: Checkpoint, damage: DamagedCheckpoint) -> None:
        name = checkpoint.folder.name
        self._request(lambda: self.api.delete_file(f"{name}/{MANIFEST}", self.repository))
        _report(f"mirror {self.repository}: {damage} Its {MANIFEST} was deleted, so that it is ignored.")

    def download_run_files(self, run: Path) -> None:
        existing = self._request(self._list_files)
        with tempfile.TemporaryDirectory() as folder:
            for name in RUN_FILES:
                if name in existing:
                    self._request(partial(self._download_file, name, folder))
            _copy_run_files(Path(folder), run)

    def upload(self, checkpoint: Checkpoint, run: Path) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        folder = f"checkpoint-{checkpoint.step}"
        files = {f"{folder}/{name}": checkpoint.folder / name for name in (*checkpoint.files, MANIFEST)}
        # as bytes, because these files grow during the upload
        run_files = {name: (run / name).read_bytes() for name in RUN_FILES if (run / name).is_file()}
        contents: dict[str, Path | bytes] = {**files, **run_files}
        operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
        self.api.create_commit(self.repository, operations, commit_message=f"step {checkpoint.step}")
        uploaded = self._list_files()
        for path, file in files.items():
            if uploaded.get(path) not in [(file.stat().st_size, digest) for digest in _hub_hashes(file)]:
                raise RemoteError(f"{path} differs from the uploaded file")
        copies = {path.split("/")[0] for path in uploaded if path.endswith(f"/{MANIFEST}")}
        others = sorted(copies - {folder}, key=lambda name: int(name.rpartition("-")[2]), reverse=True)
        outdated = [CommitOperationDelete(f"{name}/", is_folder=True) for name in others[KEPT - 1 :]]
        if outdated:
            self.api.create_commit(self.repository, outdated, commit_message="delete older checkpoints")


def _hub_hashes(file: Path) -> tuple[str, str]:
    """Both hashes by which the Hub may identify a file: git's blob id, and the sha256 of LFS files."""
    blob_id, sha256 = hashlib.sha1(b"blob %d\0" % file.stat().st_size), hashlib.sha256()
    with file.open("rb") as data:
        while chunk := data.read(2**20):
            blob_id.update(chunk)
            sha256.update(chunk)
    return blob_id.hexdigest(), sha256.hexdigest()
