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
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from rorchat.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rorchat.errors import DataError
from rorchat.files import file_sha256, fsync_file, json_sha256, to_json, write_atomically
from rorchat.model import WEIGHTS

MANIFEST = "MANIFEST.json"
FORMAT = 1
STAGING, TRASH, DAMAGED = ".staging", ".trash-", ".damaged-"
KEPT = 2  # minimum number of checkpoints to keep, because the newest one may get damaged on the disk
#: Errors of file systems that cannot rename a folder.
NO_RENAME = {errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
#: Errors of file systems that cannot fsync a folder, such as many FUSE and network file systems.
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

#: Parts of the messages of PyTorch's C++ writer when the disk is full (torch 2.13, inline_container.cc).
_WRITER_FAILURES = ("unexpected pos", "PytorchStreamWriter failed", "inline_container")


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
    files = _flush_and_hash(folder)
    _fsync_folder(folder)
    manifest = json.loads(to_json({"format": FORMAT, **manifest, "files": files}))
    write_atomically(folder / MANIFEST, to_json({**manifest, "sha256": json_sha256(manifest)}, indent=2))
    _fsync_folder(folder)
    return Checkpoint.from_manifest(folder, manifest)


def _flush_and_hash(folder: Path) -> dict[str, dict[str, object]]:
    """Flushes all files to the disk, and hashes them meanwhile: a launcher kills a process some time after a signal.

    Returns:
        {path relative to the folder: {"bytes": size, "sha256": ...}}.
    """
    with ExitStack() as opened, ThreadPoolExecutor() as threads:  # the threads end before the files are closed
        files = {name: opened.enter_context((folder / name).open("rb")) for name in _list_files(folder)}
        # a file that was just written is read from memory; hashlib does not hold the interpreter's lock
        digests = {name: threads.submit(hashlib.file_digest, file, "sha256") for name, file in files.items()}
        for file in files.values():
            os.fsync(file.fileno())
        return {
            name: {"bytes": os.fstat(file.fileno()).st_size, "sha256": digests[name].result().hexdigest()}
            for name, file in files.items()
        }


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
        if error.errno not in NO_RENAME:
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


def find_storage_failure(write: Callable[[], object]) -> Exception | None:
    """Calls `write` and returns the exception if the disk failed. Other exceptions propagate."""
    try:
        write()
    except (OSError, SafetensorError) as failure:
        return failure
    except RuntimeError as failure:
        if any(text in str(failure) for text in _WRITER_FAILURES):
            return failure
        raise
    return None
