"""A second place for checkpoints, written in the background: a folder (Drive, a network mount) or a Hub repository.

What was committed is copied by a thread, verified where it arrived, and only then older copies go. Whatever fails there
is told and tried again with the next checkpoint; training neither waits for it nor ends because of it. A run whose own
folder is gone, or behind, goes on from the mirror.
"""

import hashlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tqdm.auto import tqdm

from rorchat.errors import DataError, MismatchError, PermissionRefused, RemoteError, StorageError, UsageError
from rorchat.training.checkpointing.checkpoint import KEPT, MANIFEST, Checkpoint, Checkpoints, Damaged, copy

#: Not run.json: it may say already that the run has finished, and the model that it speaks of is not copied.
RUN_FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl")
UNTOLD = 1.0  # seconds in which nobody asks what is waited for
GRACE = 20.0  # seconds for what is being copied when a run is stopped


class Place(Protocol):
    """Where copies lie."""

    def found(self) -> list[Checkpoint]:
        """The checkpoints there, the newest first, as their manifests say."""

    def put(self, checkpoint: Checkpoint, run: Path) -> None:
        """Copies a checkpoint and the run's own files there, verifies the copy, and removes the oldest ones."""

    def get(self, checkpoint: Checkpoint, target: Path) -> None:
        """Copies the files of a checkpoint that was found into an empty folder."""

    def set_aside(self, checkpoint: Checkpoint, damage: Damaged) -> None:
        """Takes its name from a copy that does not verify: else it would count as one, and newer ones go for it."""

    def get_run_files(self, run: Path) -> None:
        """Copies the run's own files, as far as they are there."""


class Mirror:
    """Copies of a run's checkpoints in another place. One thread copies; all else is called by the main one.

    Args:
        place: where.
        run: the run's folder.
        told: for messages, what the user called the place.
    """

    def __init__(self, place: Place, run: Path, told: str):
        self.place, self.run, self.told = place, run, told
        self._waiting: Checkpoint | None = None
        self._done: int | None = None  # the step of the newest copy
        self._newest: Checkpoint | None = None
        self._in_use: set[Path] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def bring(self, checkpoints: Checkpoints) -> Checkpoint | None:
        """Takes in the newest copy that verifies, if it is newer than all that verifies here; None where none is.

        Raises:
            DataError: nothing verifies here, and nothing there.
        """
        lost, here = None, None
        try:
            here = checkpoints.recover()
        except DataError as error:
            lost = error
        for copied in self.look():
            if here and copied.step <= here.step:
                break
            try:
                brought = checkpoints.adopt(copied.step, lambda target, copied=copied: self.place.get(copied, target))
            except Damaged as damage:
                _tell(f"mirror {self.told}: its copy of step {copied.step} does not verify, and is set aside there:")
                self.place.set_aside(copied, damage)
                self._done = None
                continue
            self._done = brought.step
            self.place.get_run_files(self.run)
            _tell(f"mirror {self.told}: checkpoint-{brought.step} was brought from there")
            return brought
        if lost:
            raise lost
        return None

    def look(self) -> list[Checkpoint]:
        """The copies that are there, the newest first."""
        there = self.place.found()
        self._done = there[0].step if there else None
        return there

    def offer(self, checkpoint: Checkpoint, in_use: set[Path]) -> None:
        """Has a committed checkpoint copied, in place of one that waits; nothing where its copy is the newest there.

        Args:
            in_use: folders that rotation must leave; the one that is copied is in it as long as it takes.
        """
        if checkpoint.step == self._done:
            return
        with self._changed:
            if self._waiting:
                in_use.discard(self._waiting.folder)
            self._waiting = self._newest = checkpoint
            self._in_use = in_use
            in_use.add(checkpoint.folder)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()

    def finish(self, seconds: float | None = None) -> None:
        """Waits until all is copied, or for so many seconds; says what the newest copy is where it is not the last.

        What could not be copied before is tried once more.
        """
        newest, self._newest = self._newest, None  # once, also where a signal ends the waiting
        if newest is None:
            return
        with self._changed:
            if not self._changed.wait_for(self._idle, UNTOLD):
                _tell(f"mirror {self.told}: waiting for checkpoint-{newest.step}; Ctrl-C does not wait")
            idle = self._changed.wait_for(self._idle, seconds)
        if idle and self._done != newest.step and seconds is None:
            self.offer(newest, self._in_use)
            with self._changed:
                self._changed.wait_for(self._idle)
        if self._done != newest.step:
            there = "nothing" if self._done is None else f"checkpoint-{self._done}"
            _tell(f"mirror {self.told}: {there} is the newest there, checkpoint-{newest.step} the newest here")

    def _idle(self) -> bool:
        return not self._in_use

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                checkpoint, self._waiting = self._waiting, None
            try:
                self.place.put(checkpoint, self.run)
                self._done = checkpoint.step
            except Exception as failure:  # whatever it is, it must not stop the training
                why = " ".join(str(failure).split()) or type(failure).__name__
                _tell(
                    f"mirror {self.told}: checkpoint-{checkpoint.step} could not be copied ({why}). Training goes on; "
                    "the next one is tried."
                )
            with self._changed:
                self._in_use.discard(checkpoint.folder)
                self._changed.notify_all()


def mirror_of(place: str | None, run: Path) -> Mirror | None:
    """The mirror that a setting names; None where none is named.

    Raises:
        UsageError: the name is no folder and no Hub id, or the run's own folder.
        StorageError: the folder's parent is not there: a drive that is not mounted.
        PermissionRefused, RemoteError: the Hub refuses the repository, or cannot be asked.
    """
    if place is None:
        return None
    if _is_local(place):
        return Mirror(FolderPlace(Path(place).expanduser(), run), run, place)
    return Mirror(HubPlace(place), run, place)


def _is_local(place: str) -> bool:
    """As with models: runs/copy could be a Hub id, but not where there is a folder runs."""
    return place.startswith((".", "/", "~")) or "/" not in place or Path(place).parent.is_dir()


def _tell(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


class FolderPlace:
    """Copies in a folder, which has the form of a run's: `rorchat checkpoint list` reads it, too."""

    def __init__(self, folder: Path, run: Path):
        if run.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UsageError(f"mirror {folder} lies in the run's own folder: give another place, best on another disk.")
        if not folder.resolve().parent.is_dir():
            raise StorageError(f"mirror {folder}: there is no {folder.resolve().parent}. Mount the drive, or make it.")
        folder.mkdir(exist_ok=True)
        self.checkpoints = Checkpoints(folder, KEPT)
        strange = sorted(path.name for path in folder.iterdir() if path.name not in RUN_FILES and path.name[0] != ".")
        if strange and not self.found():
            raise MismatchError(
                f"mirror {folder} holds {strange[0]} and no checkpoint: give a folder of its own, it need not be there."
            )

    def found(self) -> list[Checkpoint]:
        return self.checkpoints.committed()

    def put(self, checkpoint: Checkpoint, run: Path) -> None:
        folder = self.checkpoints.folder
        if not folder.is_dir():  # not made anew: it would lie where the drive was mounted
            raise FileNotFoundError(f"{folder} is not there any more")
        self.checkpoints.adopt(checkpoint.step, lambda target: copy(checkpoint.folder, target))
        _copy_run_files(run, folder)

    def get(self, checkpoint: Checkpoint, target: Path) -> None:
        copy(checkpoint.folder, target)

    def set_aside(self, checkpoint: Checkpoint, damage: Damaged) -> None:
        self.checkpoints.set_aside(checkpoint.folder, damage)

    def get_run_files(self, run: Path) -> None:
        _copy_run_files(self.checkpoints.folder, run)


def _copy_run_files(source: Path, target: Path) -> None:
    for name in RUN_FILES:
        if (source / name).is_file():
            staged = target / f".{name}.mirrored"
            shutil.copyfile(source / name, staged)
            staged.replace(target / name)


class HubPlace:
    """Copies in a private repository of the Hub, a commit each. Its history keeps what was deleted.

    Raises:
        UsageError: the name is no Hub id.
        PermissionRefused, RemoteError: the Hub refuses to have it written, or cannot be asked.
    """

    def __init__(self, repository: str):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import HFValidationError, disable_progress_bars, validate_repo_id

        disable_progress_bars()  # a thread's would be drawn over the training's
        self.api, self.repository = HfApi(), repository
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise UsageError(f"mirror {repository!r} is no folder and no Hub id: {error}") from None
        self._ask(lambda: self.api.create_repo(repository, private=True, exist_ok=True))
        self._ask(lambda: self.api.auth_check(repository, write=True))  # one that is there may be somebody else's
        if not self._ask(lambda: self.api.repo_info(repository)).private:
            raise MismatchError(f"mirror {repository} is public, and checkpoints are nobody's to see: make it private.")

    def _ask(self, question: Callable[[], object]) -> object:
        """Asks the Hub before training, when a failure may still be told."""
        import httpx2
        from huggingface_hub.errors import LocalTokenNotFoundError

        try:
            return question()
        except (httpx2.HTTPError, LocalTokenNotFoundError, ConnectionError, ValueError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            why = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
            if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
                raise PermissionRefused(
                    f"mirror {self.repository}: the Hub refuses it ({why}). Log in with `hf auth login` as its owner, "
                    f"or give a folder, ./{self.repository}."
                ) from None
            raise RemoteError(
                f"mirror {self.repository}: the Hub cannot be asked ({why}), and a run may be there to go on from. "
                "Try again, or leave the mirror out."
            ) from None

    def _files(self) -> dict[str, tuple[int, str]]:
        """(bytes, what the Hub knows its content by) of every file there."""
        entries = self.api.list_repo_tree(self.repository, recursive=True)
        return {
            entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in entries
            if hasattr(entry, "size")
        }

    def found(self) -> list[Checkpoint]:
        names = [path.split("/")[0] for path in self._ask(self._files) if path.endswith(f"/{MANIFEST}")]
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                self._ask(lambda name=name: self._download(f"{name}/{MANIFEST}", folder))
                try:
                    found.append(Checkpoint.read(Path(folder) / name))
                except Damaged as damage:
                    _tell(f"mirror {self.repository}: {damage}")
        return sorted(found, key=lambda each: each.step, reverse=True)

    def _download(self, path: str, folder: str | Path) -> None:
        self.api.hf_hub_download(self.repository, path, local_dir=folder)

    def get(self, checkpoint: Checkpoint, target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            for name in (*checkpoint.files, MANIFEST):
                self._ask(lambda name=name: self._download(f"{checkpoint.folder.name}/{name}", folder))
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(Path(folder) / checkpoint.folder.name / name, target / name)

    def set_aside(self, checkpoint: Checkpoint, damage: Damaged) -> None:
        name = checkpoint.folder.name
        self._ask(lambda: self.api.delete_file(f"{name}/{MANIFEST}", self.repository))
        _tell(f"mirror {self.repository}: {damage} Its {MANIFEST} was deleted, so that it counts no more.")

    def get_run_files(self, run: Path) -> None:
        there = self._ask(self._files)
        with tempfile.TemporaryDirectory() as folder:
            for name in RUN_FILES:
                if name in there:
                    self._ask(lambda name=name: self._download(name, folder))
            _copy_run_files(Path(folder), run)

    def put(self, checkpoint: Checkpoint, run: Path) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        name = f"checkpoint-{checkpoint.step}"
        sent = {f"{name}/{each}": checkpoint.folder / each for each in (*checkpoint.files, MANIFEST)}
        # bytes, for they grow meanwhile
        own = {each: (run / each).read_bytes() for each in RUN_FILES if (run / each).is_file()}
        operations = [CommitOperationAdd(path, file) for path, file in {**sent, **own}.items()]
        self.api.create_commit(self.repository, operations, commit_message=f"step {checkpoint.step}")
        there = self._files()
        for path, file in sent.items():
            if there.get(path) not in ((file.stat().st_size, each) for each in _known_by(file)):
                raise RemoteError(f"{path} did not arrive as it was sent")
        copied = {path.split("/")[0] for path in there if path.endswith(f"/{MANIFEST}")}
        others = sorted(copied - {name}, key=lambda each: int(each.rpartition("-")[2]), reverse=True)
        old = [CommitOperationDelete(f"{each}/", is_folder=True) for each in others[KEPT - 1 :]]
        if old:
            self.api.create_commit(self.repository, old, commit_message="older checkpoints")


def _known_by(file: Path) -> tuple[str, str]:
    """What the Hub calls a file's content: git's blob id, or its sha256 where it lies in LFS."""
    size = file.stat().st_size
    blob, content = hashlib.sha1(b"blob %d\0" % size), hashlib.sha256()
    with file.open("rb") as data:
        while part := data.read(2**20):
            blob.update(part)
            content.update(part)
    return blob.hexdigest(), content.hexdigest()
