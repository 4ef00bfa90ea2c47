"""The token store: flat arrays of token ids on disk, with a manifest that describes them.

    NAME/manifest.json               format version, tokenizer, counts, sha256 of every file, rejected rows by reason;
                                     written last, with a sha256 of its own content
    NAME/train-00000.npy             uint16 (uint32 if the vocabulary exceeds 65,536 tokens), one flat array
    NAME/train-00000.docs.npy        int64 offsets of the documents, each at an <|endoftext|>; not used by mixtures
    NAME/train-00000.untrained.npy   int64 (S, 2), the start and the end of every message that is not learned; missing
                                     if there are none
    NAME/validation-00000.npy ...
    NAME/blocks.npy                  uint32, a CRC-32 of every block of the arrays, in the order of the manifest

Every document is stored as `<|endoftext|>` followed by its text. The model thus learns to start a text after
`<|endoftext|>` and, because documents follow each other, to end one with it.

Hashing a store of many gigabytes before every run would take minutes, but without a check a flipped bit could enter the
training data. Each block is therefore compared with its CRC when it is first read on a machine
(`rorchat.tokens.checked_blocks`). The time to open a store does not depend on its size.
"""

import hashlib
import json
import tokenize
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rorchat.chatml import IGNORE_INDEX
from rorchat.errors import DataError, MismatchError
from rorchat.files import file_sha256, json_sha256, to_json, write_atomically
from rorchat.sources.registry import hub_record
from rorchat.tokenizer import chat_template_sha256, tokenizer_sha256
from rorchat.tokens.checked_blocks import open_record

FORMAT_VERSION = 4
TOKENS_FOLDER = "tokens"  # default folder of token stores, inside the folder of a run
SPLITS = ("train", "validation")
DTYPES = ("uint16", "uint32")
BLOCK_BYTES = 2**18
#: Exceptions that numpy raises for a damaged .npy file, whose header it parses as Python.
NPY_ERRORS = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError)
_VERIFY_TOKENS = 2**24  # number of ids that `verify` checks at a time


@dataclass
class Shard:
    """The counts and checksums of one array file and its document offsets."""

    file: str
    split: str
    tokens: int
    documents: int
    utf8_bytes: int
    sha256: str
    docs_sha256: str
    untrained_sha256: str = ""  # empty: every token is learned

    @property
    def docs_file(self) -> str:
        return self.file.removesuffix(".npy") + ".docs.npy"

    @property
    def untrained_file(self) -> str:
        return self.file.removesuffix(".npy") + ".untrained.npy"

    def files(self) -> dict[str, str]:
        """file name -> its sha256."""
        files = {self.file: self.sha256, self.docs_file: self.docs_sha256, self.untrained_file: self.untrained_sha256}
        return {file: sha256 for file, sha256 in files.items() if sha256}


@dataclass
class Manifest:
    """The content and the origin of a token store."""

    source: str
    licence: str
    tokenizer_sha256: str
    vocabulary_size: int
    end_of_text_id: int
    validation_share: float
    seed: int
    kind: str = "document"
    chat_template_sha256: str = ""  # only for conversations, which are rendered with the template
    filters: dict[str, Any] = field(default_factory=dict)
    source_sha256: str = ""  # `rorchat.sources.registry.source_digest`
    evaluation: dict[str, str] = field(default_factory=dict)  # evaluation set -> its digest
    long_texts: int = 0  # characters at which long texts were cut (`Limits.target`); 0: documents are whole
    hub_fingerprint: str = ""  # the revision of a Hub dataset
    rows_in: int = 0
    kept: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    repairs: dict[str, int] = field(default_factory=dict)
    decoded: dict[str, int] = field(default_factory=dict)  # files in other encodings than UTF-8, by encoding
    dtype: str = "uint16"
    shards: list[Shard] = field(default_factory=list)
    blocks_sha256: str = ""
    format_version: int = FORMAT_VERSION

    def fingerprint(self) -> dict[str, Any]:
        """The settings that must be equal for an existing store to be reused."""
        keys = (
            "format_version", "source", "kind", "tokenizer_sha256", "chat_template_sha256", "vocabulary_size",
            "validation_share", "seed", "filters", "source_sha256", "evaluation", "long_texts",
        )  # fmt: skip
        return {key: getattr(self, key) for key in keys}

    def total(self, split: str, key: str) -> int:
        """The sum of `tokens`, `documents` or `utf8_bytes` over the shards of a split."""
        return sum(getattr(shard, key) for shard in self.shards if shard.split == split)

    def describe_rejects(self) -> str:
        """A sentence about the rows that were rejected, after a space; empty if none were."""
        reasons = sorted(self.rejects.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
        return f" Of {self.rows_in:,} rows, {self.kept:,} were kept: {listed}." if listed else ""

    def content_sha256(self) -> str:
        """A digest of the content of the arrays, independent of the location of the store."""
        lines = [" ".join(filter(None, (s.split, s.sha256, s.untrained_sha256))) + "\n" for s in self.shards]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def summary(self) -> dict[str, object]:
        """The part of the manifest that run.json records."""
        keys = ("source", "licence", "rows_in", "kept", "rejects", "repairs")
        totals = {
            f"{split}_{key}": self.total(split, key)
            for split in SPLITS
            for key in ("documents", "tokens", "utf8_bytes")
        }
        hub = hub_record(self.source)
        return {key: getattr(self, key) for key in keys} | ({"hub": hub} if hub else {}) | totals

    def write(self, folder: Path) -> None:
        """Writes the manifest atomically: after a crash a folder has a complete manifest or none."""
        values = asdict(self)
        write_atomically(folder / "manifest.json", to_json({**values, "sha256": json_sha256(values)}, indent=2))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads the manifest of a store.

        Raises:
            DataError: it is missing, was changed after it was written, or has another format version.
        """
        try:
            values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if values["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {values['format_version']}, expected {FORMAT_VERSION}")
            if values.pop("sha256", None) != json_sha256(values):
                raise ValueError("it was changed after it was written: its sha256 differs")
            manifest = cls(**{**values, "shards": [Shard(**shard) for shard in values["shards"]]})
            if manifest.dtype not in DTYPES or not {shard.split for shard in manifest.shards} <= set(SPLITS):
                raise ValueError(f"dtype {manifest.dtype!r}, splits {sorted({s.split for s in manifest.shards})}")
            return manifest
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{folder} is not a token store: it has no manifest.json. Give another folder, or delete it to prepare "
                "it again."
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{folder}/manifest.json cannot be read ({error}): delete the folder to prepare it again."
            ) from None


def store_folder(spec: str) -> Path | None:
    """The folder of the token store that a spec names, with or without `store=`; None if it names a source."""
    folder = Path(spec.removeprefix("store="))
    return folder if spec.startswith("store=") or (folder / "manifest.json").is_file() else None


def block_crcs(array: np.ndarray) -> np.ndarray:
    """The CRC-32 of every BLOCK_BYTES of an array as uint32; the last block may be shorter."""
    data = np.ascontiguousarray(array).data.cast("B")
    starts = range(0, len(data), BLOCK_BYTES)
    return np.array([zlib.crc32(data[start : start + BLOCK_BYTES]) for start in starts], dtype=np.uint32)


class _ShardArray:
    """The memory-mapped ids of a shard. A block is compared with its CRC when the first process reads it."""

    def __init__(self, path: Path, ids: np.ndarray, crcs: np.ndarray, block_tokens: int):
        self.path, self.ids, self.crcs, self.block_tokens = path, ids, crcs, block_tokens
        self.checked = open_record(path, crcs)

    def read(self, start: int, stop: int) -> np.ndarray:
        size = self.block_tokens
        for block in range(start // size, -(-stop // size)):
            if not self.checked[block]:
                if zlib.crc32(self.ids[block * size : (block + 1) * size].data) != self.crcs[block]:
                    raise _damaged(self.path, f"block {block} (from token {block * size:,}) has changed")
                self.checked[block] = 1
        return self.ids[start:stop]


class TokenStore:
    """The memory-mapped arrays of one source. Data is copied and checked when it is read.

    Args:
        name: the name of the source in a mixture; default: the folder's name.

    Raises:
        DataError: a file is missing, damaged, or does not match the manifest; the message names the file. Damage inside
            an array is detected later, when the block is first read.
    """

    def __init__(self, folder: str | Path, name: str | None = None):
        self.folder = Path(folder)
        self.name = name or self.folder.name
        self.manifest = Manifest.read(self.folder)
        self._arrays: dict[str, list[_ShardArray]] = {split: [] for split in SPLITS}
        self._map_arrays()
        self._starts = {  # the offset of each shard in its split, and the length of the split
            split: np.cumsum([0, *(len(array.ids) for array in arrays)]) for split, arrays in self._arrays.items()
        }
        self._untrained = {split: self._load_untrained(split) for split in SPLITS}

    def _map_arrays(self) -> None:
        path = self.folder / "blocks.npy"
        crcs = load_npy(path, mmap=False)
        if file_sha256(path) != self.manifest.blocks_sha256:
            raise _damaged(path, "its sha256 differs from the manifest's")
        block_tokens = BLOCK_BYTES // np.dtype(self.manifest.dtype).itemsize
        first = 0
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            ids = load_npy(path)
            if str(ids.dtype) != self.manifest.dtype or ids.ndim != 1:
                raise _damaged(path, f"its dtype is {ids.dtype}, the manifest says {self.manifest.dtype}")
            if len(ids) != shard.tokens:
                raise _damaged(path, f"it has {len(ids):,} tokens, the manifest says {shard.tokens:,}")
            last = first + -(-len(ids) // block_tokens)
            self._arrays[shard.split].append(_ShardArray(path, ids, crcs[first:last], block_tokens))
            first = last
        if first != len(crcs):
            raise _damaged(self.folder / "blocks.npy", f"it has {len(crcs)} blocks, the arrays have {first}")

    def _load_untrained(self, split: str) -> np.ndarray:
        """(S, 2), the start and the end in a split of every message that is not learned, in ascending order."""
        spans = [np.empty((0, 2), dtype=np.int64)]
        shards = [shard for shard in self.manifest.shards if shard.split == split]
        for shard, start in zip(shards, self._starts[split], strict=False):
            if shard.untrained_sha256:
                path = self.folder / shard.untrained_file
                spans.append(load_npy(path, mmap=False) + start)
                if file_sha256(path) != shard.untrained_sha256:
                    raise _damaged(path, "its sha256 differs from the manifest's")
        return np.concatenate(spans)

    def has_untrained(self, split: str) -> bool:
        """Whether a split has tokens that are not learned."""
        return len(self._untrained[split]) > 0

    def labels(self, split: str, start: int, ids: np.ndarray) -> np.ndarray:
        """The labels of the ids that begin at `start`: the ids, but -100 in messages that are not learned."""
        starts, ends = self._untrained[split].T
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(starts, start + len(ids))
        if first >= last:
            return ids
        labels = ids.copy()
        for begin, end in zip(starts[first:last] - start, ends[first:last] - start, strict=True):
            labels[max(0, begin) : end] = IGNORE_INDEX
        return labels

    def tokens(self, split: str) -> int:
        return int(self._starts[split][-1])

    def slice(self, split: str, start: int, stop: int) -> np.ndarray:
        """The ids from `start` to `stop` (exclusive) of a split, int64, (stop - start,). They may span several shards.

        Raises:
            DataError: a block in this range is damaged; the message names the file and the block.
        """
        starts = self._starts[split]
        shard = int(np.searchsorted(starts, start, side="right")) - 1
        ids = np.empty(stop - start, dtype=np.int64)
        done = 0
        while done < len(ids):
            offset = start + done - int(starts[shard])
            length = min(len(ids) - done, int(starts[shard + 1] - starts[shard]) - offset)
            ids[done : done + length] = self._arrays[split][shard].read(offset, offset + length)
            done += length
            shard += 1
        return ids

    def documents(self, split: str) -> np.ndarray:
        """The offsets of the documents of a split in ascending order, and at the end the length of the split, int64.

        Raises:
            DataError: a file of document offsets is damaged; the message names it.
        """
        tables = []
        shards = [shard for shard in self.manifest.shards if shard.split == split]
        for shard, start in zip(shards, self._starts[split], strict=False):
            path = self.folder / shard.docs_file
            tables.append(load_npy(path) + start)
            if file_sha256(path) != shard.docs_sha256:
                raise _damaged(path, "its sha256 differs from the manifest's")
        return np.concatenate([*tables, self._starts[split][-1:]]).astype(np.int64)

    def verify(self, progress: Callable[[int], object] | None = None) -> list[str]:
        """Reads every byte of the store and returns a list of problems, empty if the store is valid.

        Args:
            progress: called with the number of bytes read since the last call.
        """
        problems = []
        for shard in self.manifest.shards:
            damaged = False
            for file, sha256 in shard.files().items():
                path = self.folder / file
                problem = "" if path.is_file() else "missing"
                if not problem and file_sha256(path) != sha256:
                    problem = "its sha256 differs from the manifest's"
                if problem:
                    problems.append(f"{path}: {problem}")
                    damaged = True
                if progress and path.is_file():
                    progress(path.stat().st_size)
            if not damaged:
                problems += self._inconsistencies(shard)
        return problems

    def _inconsistencies(self, shard: Shard) -> list[str]:
        """Contradictions between the manifest and the ids of an undamaged shard."""
        ids, starts = load_npy(self.folder / shard.file), load_npy(self.folder / shard.docs_file)
        chunks = range(0, len(ids), _VERIFY_TOKENS)
        largest = max((int(ids[start : start + _VERIFY_TOKENS].max()) for start in chunks), default=0)
        problems = []
        if largest >= self.manifest.vocabulary_size:
            problems.append(f"id {largest} exceeds the vocabulary of {self.manifest.vocabulary_size} tokens")
        if len(starts) != shard.documents or (np.diff(starts) <= 0).any() or (len(starts) and starts[-1] >= len(ids)):
            problems.append(f"the document offsets do not match the {shard.documents} documents of the manifest")
        elif (ids[starts] != self.manifest.end_of_text_id).any():
            problems.append("a document does not start with <|endoftext|>")
        return [f"{self.folder / shard.file}: {problem}" for problem in problems]


def load_npy(path: Path, mmap: bool = True) -> np.ndarray:
    """Loads an .npy file of a store.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        array = np.load(path, mmap_mode="r" if mmap else None)
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except NPY_ERRORS as error:
        raise _damaged(path, f"it cannot be read: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(array, np.ndarray):
        raise _damaged(path, "it is an .npz archive, not an .npy file")
    return array


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path} is damaged: {problem}. Delete {path.parent} to prepare it again.")


def open_store(folder: str | Path, tokenizer, name: str | None = None) -> TokenStore:
    """Opens a token store and checks that it was made with this tokenizer.

    Args:
        name: the name of the source in a mixture; default: the folder's name.

    Raises:
        DataError: there is no store, or it is damaged.
        MismatchError: it was made with another tokenizer, or its conversations with another chat template.
    """
    store = TokenStore(folder, name)
    if store.manifest.tokenizer_sha256 != tokenizer_sha256(tokenizer):
        raise MismatchError(
            f"{store.folder} was made with another tokenizer, which has {store.manifest.vocabulary_size:,} tokens: "
            "train with that tokenizer, or prepare the texts again."
        )
    if store.manifest.kind == "conversation" and store.manifest.chat_template_sha256 != chat_template_sha256(tokenizer):
        raise MismatchError(
            f"The conversations of {store.folder} have another chat template or system message than the tokenizer: "
            "give the persona they were prepared with, or prepare them again."
        )
    return store
