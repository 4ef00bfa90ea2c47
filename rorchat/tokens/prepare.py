"""Text -> shards: each document is held out or not, tokenized once, and written with its manifest."""

import hashlib
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from rorchat.chatml import END_OF_TEXT, encode_text
from rorchat.errors import DataError, MismatchError
from rorchat.persona import Persona
from rorchat.sources import find, in_validation, load, local_bytes
from rorchat.tokenizer import tokenizer_sha256
from rorchat.tokens.store import SPLITS, Manifest, Shard, TokenStore

TOKENS_PER_SHARD = 100_000_000  # 200 MB of uint16
DOCUMENTS_PER_BATCH = 512


class _ShardWriter:
    """Collects the documents of one split and writes them, a shard at a time."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, tokens_per_shard: int):
        self.folder, self.split, self.dtype, self.tokens_per_shard = folder, split, dtype, tokens_per_shard
        self.shards: list[Shard] = []
        self._clear()

    def _clear(self) -> None:
        self._ids: list[np.ndarray] = []
        self._tokens = self._bytes = 0

    def add(self, ids: list[int], utf8_bytes: int) -> None:
        self._ids.append(np.array(ids, dtype=self.dtype))
        self._tokens += len(ids)
        self._bytes += utf8_bytes
        if self._tokens >= self.tokens_per_shard:
            self.write()

    def write(self) -> None:
        if not self._ids:
            return
        file = f"{self.split}-{len(self.shards):05d}.npy"
        np.save(self.folder / file, np.concatenate(self._ids))
        starts = np.cumsum([0, *(len(ids) for ids in self._ids[:-1])], dtype=np.int64)
        np.save(self.folder / file.replace(".npy", ".docs.npy"), starts)
        digest = hashlib.sha256((self.folder / file).read_bytes()).hexdigest()
        self.shards.append(Shard(file, self.split, self._tokens, len(self._ids), self._bytes, digest))
        self._clear()


def prepare(
    spec: str,
    tokenizer,
    folder: str | Path,
    *,
    validation_share: float,
    seed: int = 0,
    persona: Persona | None = None,
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> TokenStore:
    """The token store of one source, made now or found as made before.

    Documents go to validation by a hash of their words, before anything is mixed, so no duplicate straddles. A store
    is written under another name and renamed when complete: what has a manifest is whole.

    Args:
        spec: as for `rorchat.sources.load`.
        folder: where the store is or will be; two sources never share one.
        validation_share: of documents, in [0, 1).

    Raises:
        MismatchError: the folder holds tokens of another source, tokenizer, share or seed.
        DataError: no document was held out for validation, or none was left to train on.
    """
    folder = Path(folder)
    wanted = Manifest(
        source=spec,
        licence=find(spec.partition("=")[0]).LICENCE,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocabulary_size=len(tokenizer),
        end_of_text_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        validation_share=validation_share,
        seed=seed,
        source_bytes=local_bytes(spec),
    )
    if folder.exists():
        return _found(folder, wanted)
    staging = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    writers = {split: _ShardWriter(staging, split, dtype, tokens_per_shard) for split in SPLITS}
    rows = load(spec, "document", seed=seed, persona=persona)
    try:
        for text, ids in _tokenized(rows, tokenizer, f"tokenize {spec}"):
            split = "validation" if in_validation(text, validation_share) else "train"
            writers[split].add([wanted.end_of_text_id, *ids], len(text.encode()))
        for writer in writers.values():
            writer.write()
            wanted.shards += writer.shards
        wanted.rows_in, wanted.kept, wanted.rejects = rows.tally.rows_in, rows.tally.kept, rows.tally.rejects
        _check_split(wanted)
    except BaseException:
        shutil.rmtree(staging)
        raise
    wanted.write(staging)
    staging.rename(folder)
    print(rows.tally, file=sys.stderr)  # noqa: T201
    return TokenStore(folder)


def _tokenized(rows: Iterable[dict], tokenizer, title: str) -> Iterator[tuple[str, list[int]]]:
    """(text, its ids) of every document, a batch at a time."""
    texts = (row["text"] for row in rows)
    batches = iter(lambda: list(islice(texts, DOCUMENTS_PER_BATCH)), [])
    for batch in tqdm(batches, desc=title, unit_scale=DOCUMENTS_PER_BATCH, unit="doc", disable=None):
        yield from zip(batch, encode_text(tokenizer, batch), strict=True)


def _found(folder: Path, wanted: Manifest) -> TokenStore:
    store = TokenStore(folder)
    there, here = store.manifest.identity(), wanted.identity()
    if not here["source_bytes"]:
        here.pop("source_bytes")  # files that are gone have not changed
    differing = [f"{key} {there[key]!r}, now {here[key]!r}" for key in here if there[key] != here[key]]
    if differing:
        raise MismatchError(f"{folder} holds other tokens: {'; '.join(differing)}. Delete it or choose another folder.")
    return store


def _check_split(manifest: Manifest) -> None:
    for split, remedy in (("validation", "raise validation_share"), ("train", "lower validation_share")):
        if not manifest.total(split, "documents"):
            raise DataError(
                f"{manifest.source}: no {split} documents, {manifest.kept} in all at validation_share "
                f"{manifest.validation_share}. There is no training without validation: {remedy}, or give more "
                "documents."
            )
