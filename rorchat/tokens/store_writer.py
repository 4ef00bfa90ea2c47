"""Writes the files of a token store: arrays, document offsets, checksums and, last, the manifest."""

import os
import shutil
from pathlib import Path

import numpy as np

from rorchat.files import file_sha256, fsync_file
from rorchat.tokens.store import SPLITS, Manifest, Shard, block_crcs


class ArrayWriter:
    """Writes a flat array to an .npy file in pieces."""

    def __init__(self, path: Path, dtype: np.dtype | type):
        self.path, self.dtype, self.length = path, np.dtype(dtype), 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        # numpy pads the header so that it has the same size for any length: it can be overwritten in place
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, ids: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self.length += len(ids)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class StoreWriter:
    """Adds shards to a store that is being made. `close` writes the manifest, which completes the store."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._crcs: list[np.ndarray] = []
        self._counts = dict.fromkeys(SPLITS, 0)

    def next_path(self, split: str) -> Path:
        """The path of the next shard of a split. Write the array there, then call `add_shard`."""
        return self.folder / f"{split}-{self._counts[split]:05d}.npy"

    def add_shard(self, split: str, starts: np.ndarray, utf8_bytes: int, untrained: np.ndarray | None = None) -> None:
        """Registers the array at `next_path(split)`.

        Args:
            starts: the offsets at which its documents start.
            utf8_bytes: the size of their text.
            untrained: (S, 2), the start and the end of every message that is not learned, in ascending order.
        """
        path = self.next_path(split)
        self._counts[split] += 1
        docs_path = path.with_suffix(".docs.npy")
        np.save(docs_path, starts)
        fsync_file(docs_path)
        ids = np.load(path, mmap_mode="r")
        shard = Shard(path.name, split, len(ids), len(starts), utf8_bytes, file_sha256(path), file_sha256(docs_path))
        if untrained is not None and len(untrained):
            untrained_path = self.folder / shard.untrained_file
            np.save(untrained_path, untrained.astype(np.int64))
            fsync_file(untrained_path)
            shard.untrained_sha256 = file_sha256(untrained_path)
        self.manifest.shards.append(shard)
        self.manifest.dtype = str(ids.dtype)
        self._crcs.append(block_crcs(ids))

    def close(self) -> None:
        path = self.folder / "blocks.npy"
        np.save(path, np.concatenate(self._crcs))
        fsync_file(path)
        self.manifest.blocks_sha256 = file_sha256(path)
        self.manifest.write(self.folder)


def link_or_copy(source: Path, target: Path) -> None:
    """Creates a hard link, or a copy if the file system has no hard links or the paths are on different ones."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
