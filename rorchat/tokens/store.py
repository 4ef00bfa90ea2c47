"""A token store: flat arrays of ids on disk, and a manifest that says what they are.

    NAME/manifest.json               format, tokenizer, counts, sha256 of every file, rejects by reason; written last,
                                     with a sha256 of all that it says
    NAME/train-00000.npy             uint16 (uint32 above 65,535 ids), one flat array
    NAME/train-00000.docs.npy        int64, where each document begins: at its <|endoftext|>; no mixture reads it
    NAME/validation-00000.npy ...
    NAME/blocks.npy                  uint32, a CRC of every block of the arrays, in the order of the manifest

Every document is `<|endoftext|>` and its words, so that a model learns to begin a text after `<|endoftext|>` and, in a
stream of documents, to end one with it.

To hash a store of many gigabytes before every run would take minutes, and to trust it is how a flipped bit gets into a
model. So a block is compared with its CRC when it is first read, and what opening costs does not grow with the store.
"""

import hashlib
import json
import tokenize
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from rorchat.errors import DataError, MismatchError
from rorchat.files import file_sha256, json_sha256, write_atomically
from rorchat.tokenizer import chat_template_sha256, tokenizer_sha256

FORMAT_VERSION = 4
SPLITS = ("train", "validation")
TYPES = ("uint16", "uint32")
BLOCK_BYTES = 2**18
#: What numpy raises for a file that is no array: it parses the head of one as Python.
UNREADABLE = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError)
_READ_BYTES = 2**24


@dataclass
class Shard:
    """One array file and its table of documents: how much is in it, and the sha256 of both."""

    file: str
    split: str
    tokens: int
    documents: int
    utf8_bytes: int
    sha256: str
    docs_sha256: str

    @property
    def docs_file(self) -> str:
        return self.file.removesuffix(".npy") + ".docs.npy"


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
    kind: str = "document"
    chat_template_sha256: str = ""  # of stores of conversations, which are written as the template has it
    filters: dict[str, object] = field(default_factory=dict)
    source_sha256: str = ""  # what the source is made of: `rorchat.sources.registry.source_digest`
    evaluation: dict[str, str] = field(default_factory=dict)  # of each evaluation set the same
    hub_fingerprint: str = ""  # which state of a dataset of the Hub this is
    rows_in: int = 0
    kept: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    repairs: dict[str, int] = field(default_factory=dict)
    dtype: str = "uint16"
    shards: list[Shard] = field(default_factory=list)
    blocks_sha256: str = ""
    format_version: int = FORMAT_VERSION

    def identity(self) -> dict[str, object]:
        keys = (
            "format_version", "source", "kind", "tokenizer_sha256", "chat_template_sha256", "vocabulary_size",
            "validation_share", "seed", "filters", "source_sha256", "evaluation",
        )  # fmt: skip
        return {key: getattr(self, key) for key in keys}

    def total(self, split: str, what: str) -> int:
        """The sum of `tokens`, `documents` or `utf8_bytes` over a split's shards."""
        return sum(getattr(shard, what) for shard in self.shards if shard.split == split)

    def content_sha256(self) -> str:
        """A digest of what the arrays hold, wherever the store lies."""
        return hashlib.sha256("".join(f"{s.split} {s.sha256}\n" for s in self.shards).encode()).hexdigest()

    def summary(self) -> dict[str, object]:
        """What a run remembers of a source."""
        keys = ("source", "licence", "rows_in", "kept", "rejects", "repairs")
        counts = {
            f"{split}_{what}": self.total(split, what)
            for split in SPLITS
            for what in ("documents", "tokens", "utf8_bytes")
        }
        return {key: getattr(self, key) for key in keys} | counts

    def write(self, folder: Path) -> None:
        """Writes the manifest in one step: a folder has all of it or none, whatever is killed."""
        said = asdict(self)
        write_atomically(folder / "manifest.json", json.dumps({**said, "sha256": json_sha256(said)}, indent=2))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest in a folder.

        Raises:
            DataError: there is none, it was changed since it was written, or it has another format.
        """
        try:
            values = json.loads((folder / "manifest.json").read_text())
            if values["format_version"] != FORMAT_VERSION:
                raise ValueError(f"its format is {values['format_version']}, this is {FORMAT_VERSION}")
            if values.pop("sha256", None) != json_sha256(values):
                raise ValueError("it is not as it was written: its sha256 differs")
            manifest = cls(**{**values, "shards": [Shard(**shard) for shard in values["shards"]]})
            if manifest.dtype not in TYPES or not {shard.split for shard in manifest.shards} <= set(SPLITS):
                raise ValueError(f"dtype {manifest.dtype!r}, splits {sorted({s.split for s in manifest.shards})}")
            return manifest
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{folder} is no token store: it has no manifest.json. Name another folder, or delete it to prepare it "
                "again."
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{folder}/manifest.json cannot be read ({error}): delete the folder to prepare it again."
            ) from None


def store_folder(spec: str) -> Path | None:
    """The folder of the token store that a spec names, with or without `store=`; None where it names a source."""
    folder = Path(spec.removeprefix("store="))
    return folder if spec.startswith("store=") or (folder / "manifest.json").is_file() else None


def block_crcs(array: np.ndarray) -> np.ndarray:
    """The CRC-32 of every BLOCK_BYTES of an array, the last block shorter; uint32."""
    data = memoryview(np.ascontiguousarray(array)).cast("B")
    starts = range(0, len(data), BLOCK_BYTES)
    return np.array([zlib.crc32(data[start : start + BLOCK_BYTES]) for start in starts], dtype=np.uint32)


class TokenStore:
    """The arrays of one source, memory-mapped; reading copies no more than is asked for, and checks it.

    Raises:
        DataError: a file is missing, of another type or length than the manifest says, or damaged; it is named. Damage
            inside an array is found when the block that has it is first read.
    """

    def __init__(self, folder: str | Path, name: str | None = None):
        self.folder = Path(folder)
        self.name = name or self.folder.name  # by which a mixture knows it
        self.manifest = Manifest.read(self.folder)
        self._block_tokens = BLOCK_BYTES // np.dtype(self.manifest.dtype).itemsize
        self._arrays: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._files: dict[str, list[str]] = {split: [] for split in SPLITS}
        self._blocks: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._open()
        self._starts = {
            split: np.cumsum([0, *(len(array) for array in arrays)]) for split, arrays in self._arrays.items()
        }
        self._seen = {split: [np.zeros(len(b), dtype=bool) for b in blocks] for split, blocks in self._blocks.items()}

    def _open(self) -> None:
        blocks = self._load("blocks.npy", mapped=False)
        if file_sha256(self.folder / "blocks.npy") != self.manifest.blocks_sha256:
            raise self._damaged("blocks.npy", "its bytes are not those of the manifest's sha256")
        at = 0
        for shard in self.manifest.shards:
            array = self._load(shard.file)
            if str(array.dtype) != self.manifest.dtype or array.ndim != 1:
                raise self._damaged(shard.file, f"it holds {array.dtype}, its manifest says {self.manifest.dtype}")
            if len(array) != shard.tokens:
                raise self._damaged(shard.file, f"it has {len(array):,} tokens, its manifest says {shard.tokens:,}")
            count = -(-len(array) // self._block_tokens)
            self._arrays[shard.split].append(array)
            self._files[shard.split].append(shard.file)
            self._blocks[shard.split].append(blocks[at : at + count])
            at += count
        if at != len(blocks):
            raise self._damaged("blocks.npy", f"it is of {len(blocks)} blocks, the arrays have {at}")

    def _load(self, file: str, mapped: bool = True) -> np.ndarray:
        try:
            array = np.load(self.folder / file, mmap_mode="r" if mapped else None)
        except FileNotFoundError:
            raise self._damaged(file, "it is missing") from None
        except UNREADABLE as error:
            raise self._damaged(file, f"it cannot be read: {' '.join(str(error).split())[:120]}") from None
        if not isinstance(array, np.ndarray):
            raise self._damaged(file, "it is an archive of arrays")
        return array

    def _damaged(self, file: str, what: str) -> DataError:
        return DataError(f"{self.folder / file} is damaged: {what}. Delete {self.folder} to prepare it again.")

    def tokens(self, split: str) -> int:
        return int(self._starts[split][-1])

    def slice(self, split: str, start: int, stop: int) -> np.ndarray:
        """Ids `start` to `stop` of a split as one int64 array, across shards where need be.

        Raises:
            DataError: a block that they stand in is not what was written; the file and the block are named.
        """
        starts, arrays = self._starts[split], self._arrays[split]
        shard = int(np.searchsorted(starts, start, side="right")) - 1
        ids = np.empty(stop - start, dtype=np.int64)
        done = 0
        while done < len(ids):
            offset = start + done - int(starts[shard])
            part = arrays[shard][offset : offset + len(ids) - done]
            self._check(split, shard, offset, offset + len(part))
            ids[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return ids

    def documents(self, split: str) -> np.ndarray:
        """Where each document of a split begins, int64, ascending, and last where the split ends.

        Raises:
            DataError: a table of documents is not what was written; it is named.
        """
        tables = []
        shards = [shard for shard in self.manifest.shards if shard.split == split]
        for shard, start in zip(shards, self._starts[split], strict=False):
            tables.append(self._load(shard.docs_file) + start)
            if file_sha256(self.folder / shard.docs_file) != shard.docs_sha256:
                raise self._damaged(shard.docs_file, "its bytes are not those of the manifest's sha256")
        return np.concatenate([*tables, self._starts[split][-1:]]).astype(np.int64)

    def _check(self, split: str, shard: int, start: int, stop: int) -> None:
        seen, size = self._seen[split][shard], self._block_tokens
        for block in range(start // size, -(-stop // size)):
            if not seen[block]:
                data = self._arrays[split][shard][block * size : (block + 1) * size]
                if zlib.crc32(data.data) != self._blocks[split][shard][block]:
                    raise self._damaged(self._files[split][shard], f"block {block} (from token {block * size:,})")
                seen[block] = True

    def verify(self, progress=None) -> list[str]:
        """Reads every byte of the store. What is wrong with it, a line each; empty if nothing is.

        Args:
            progress: called with the number of bytes read since the last call.
        """
        problems = []
        for shard in self.manifest.shards:
            for file, digest in ((shard.file, shard.sha256), (shard.docs_file, shard.docs_sha256)):
                path = self.folder / file
                if not path.is_file():
                    problems.append(f"{path}: missing")
                elif file_sha256(path) != digest:
                    problems.append(f"{path}: its sha256 is not the manifest's")
                if progress and path.is_file():
                    progress(path.stat().st_size)
            if not any(str(self.folder / shard.file.removesuffix(".npy")) in problem for problem in problems):
                problems += self._misfits(shard)
        return problems

    def _misfits(self, shard: Shard) -> list[str]:
        """Where the ids of a whole shard do not fit its manifest."""
        ids, starts = self._load(shard.file), self._load(shard.docs_file)
        largest = max((int(ids[at : at + _READ_BYTES].max()) for at in range(0, len(ids), _READ_BYTES)), default=0)
        misfits = []
        if largest >= self.manifest.vocabulary_size:
            misfits.append(f"id {largest} in a vocabulary of {self.manifest.vocabulary_size}")
        if len(starts) != shard.documents or (np.diff(starts) <= 0).any() or (len(starts) and starts[-1] >= len(ids)):
            misfits.append(f"the table of documents does not fit its {shard.documents} documents")
        elif (ids[starts] != self.manifest.end_of_text_id).any():
            misfits.append("a document does not begin with <|endoftext|>")
        return [f"{self.folder / shard.file}: {misfit}" for misfit in misfits]


def open_store(folder: str | Path, tokenizer, name: str | None = None) -> TokenStore:
    """A token store that is there already, made with this tokenizer.

    Args:
        name: by which a mixture knows it; default: the folder's.

    Raises:
        DataError: there is none, or it is damaged.
        MismatchError: its ids are another tokenizer's, or its conversations another template's.
    """
    store = TokenStore(folder, name)
    if store.manifest.tokenizer_sha256 != tokenizer_sha256(tokenizer):
        raise MismatchError(
            f"{store.folder} was made with another tokenizer, of {store.manifest.vocabulary_size:,} tokens: train with "
            "that one, or prepare the texts again."
        )
    if store.manifest.kind == "conversation" and store.manifest.chat_template_sha256 != chat_template_sha256(tokenizer):
        raise MismatchError(
            f"The conversations of {store.folder} have another chat template or system message than the tokenizer: "
            "give the persona that they were written with, or prepare them again."
        )
    return store
