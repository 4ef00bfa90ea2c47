"""A token store: flat arrays of ids on disk, and a manifest that says what they are.

    NAME/manifest.json               format, tokenizer, counts, sha256 of every shard, rejects by reason; written last
    NAME/train-00000.npy             uint16 (uint32 above 65,535 ids), one flat array
    NAME/train-00000.docs.npy        int64, where each document begins: at its <|endoftext|>
    NAME/validation-00000.npy ...

Every document is `<|endoftext|>` and its words, so that a model learns to begin a text after `<|endoftext|>` and, in a
stream of documents, to end one with it.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from rorchat.errors import DataError, MismatchError

FORMAT_VERSION = 1
SPLITS = ("train", "validation")


@dataclass
class Shard:
    """One array file: how much is in it, and its sha256."""

    file: str
    split: str
    tokens: int
    documents: int
    utf8_bytes: int
    sha256: str


@dataclass
class Manifest:
    """What a token store holds and where it came from. `identity` is what must agree for it to be used again."""

    source: str
    licence: str
    tokenizer_sha256: str
    vocabulary_size: int
    end_of_text_id: int
    validation_share: float
    seed: int
    source_bytes: int = 0  # of the local files, to notice when they change
    rows_in: int = 0
    kept: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    def identity(self) -> dict[str, object]:
        keys = (
            "format_version",
            "source",
            "tokenizer_sha256",
            "vocabulary_size",
            "validation_share",
            "seed",
            "source_bytes",
        )
        return {key: getattr(self, key) for key in keys}

    def total(self, split: str, what: str) -> int:
        """The sum of `tokens`, `documents` or `utf8_bytes` over a split's shards."""
        return sum(getattr(shard, what) for shard in self.shards if shard.split == split)

    def summary(self) -> dict[str, object]:
        """What a run remembers of a source."""
        keys = ("source", "licence", "rows_in", "kept", "rejects")
        counts = {
            f"{split}_{what}": self.total(split, what)
            for split in SPLITS
            for what in ("documents", "tokens", "utf8_bytes")
        }
        return {key: getattr(self, key) for key in keys} | counts

    def write(self, folder: Path) -> None:
        (folder / "manifest.json").write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        try:
            values = json.loads((folder / "manifest.json").read_text())
            return cls(**{**values, "shards": [Shard(**shard) for shard in values["shards"]]})
        except FileNotFoundError:
            raise DataError(f"{folder} is no token store: it has no manifest.json.") from None
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise DataError(
                f"{folder}/manifest.json cannot be read ({error}): delete the folder to prepare it again."
            ) from None


class TokenStore:
    """The arrays of one source, memory-mapped; reading copies no more than is asked for."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self._arrays = {split: self._mapped(split) for split in SPLITS}
        self._starts = {
            split: np.cumsum([0, *(len(array) for array in arrays)]) for split, arrays in self._arrays.items()
        }

    def _mapped(self, split: str) -> list[np.ndarray]:
        arrays = []
        for shard in self.manifest.shards:
            if shard.split != split:
                continue
            try:
                array = np.load(self.folder / shard.file, mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise DataError(
                    f"{self.folder / shard.file} cannot be read: {error}. Delete {self.folder} to prepare it again."
                ) from None
            if len(array) != shard.tokens:
                raise MismatchError(
                    f"{self.folder / shard.file} has {len(array):,} tokens, its manifest says "
                    f"{shard.tokens:,}: delete {self.folder} to prepare it again."
                )
            arrays.append(array)
        return arrays

    @property
    def name(self) -> str:
        return self.folder.name

    def tokens(self, split: str) -> int:
        return int(self._starts[split][-1])

    def slice(self, split: str, start: int, stop: int) -> np.ndarray:
        """Ids `start` to `stop` of a split as one int64 array, across shards where need be."""
        starts, arrays = self._starts[split], self._arrays[split]
        first = int(np.searchsorted(starts, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = start - int(starts[first])
            part = arrays[first][offset : offset + stop - start]
            parts.append(part)
            start += len(part)
            first += 1
        return np.concatenate(parts).astype(np.int64)
