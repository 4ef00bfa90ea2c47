"""Finished parts of a source -> the files of a store: what is decided between the parts."""

import json
from pathlib import Path

import numpy as np

from rorchat.errors import DataError
from rorchat.files import fsync_file
from rorchat.rows import RejectedRow
from rorchat.sources.registry import RowStats, require_kept_rows
from rorchat.tokens.store import SPLITS, Manifest, Shard
from rorchat.tokens.tokenize_shard import ArrayWriter, link, sealed


def merge_shards(staging: Path, manifest: Manifest, count: int) -> RowStats:
    """Makes the files of a store of finished parts: duplicates out, shards named in order, manifest last.

    The parts stay until there is a manifest, so that this may be interrupted and begun again.
    """
    for leftover in (file for split in SPLITS for file in staging.glob(f"{split}-*")):
        leftover.unlink()
    tally = RowStats(manifest.source)
    tables = []
    for number in range(count):
        record = json.loads((staging / f"part-{number:05d}.json").read_text())
        tally.add(RowStats(**record["tally"]))
        with np.load(staging / f"part-{number:05d}.documents.npz") as table:
            tables.append({key: table[key] for key in table.files})
    for number, keep in enumerate(_first_copies(tables)):
        dropped = np.flatnonzero(~keep)
        if len(dropped):
            places = (
                (staging / f"part-{number:05d}.places.txt").read_bytes().decode(errors="surrogateescape").split("\n")
            )
            for document in dropped:
                tally.withdraw(places[document], RejectedRow("duplicate"))
        tables[number]["keep"] = keep
    require_kept_rows(tally)
    blocks = []
    for split in SPLITS:
        for number, table in enumerate(tables):
            shard, crc = _shard(staging, number, split, table)
            if shard:
                manifest.shards.append(shard)
                blocks.append(crc)
        _check_split(manifest, split, tally.kept)
    np.save(staging / "blocks.npy", np.concatenate(blocks))
    fsync_file(staging / "blocks.npy")
    manifest.blocks_sha256 = sealed(staging / "blocks.npy")[0]
    manifest.dtype = str(np.load(staging / manifest.shards[0].file, mmap_mode="r").dtype)
    manifest.rows_in, manifest.kept = tally.rows_in, tally.kept
    manifest.rejects, manifest.repairs = dict(sorted(tally.rejects.items())), dict(sorted(tally.repairs.items()))
    manifest.write(staging)
    return tally


def _first_copies(tables: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """For each part, which of its documents are no copy of one before."""
    digests = np.concatenate([table["digest"] for table in tables]).astype(np.uint64).reshape(-1, 2)
    order = np.lexsort(digests.T)  # equal ones stay in their order
    same = (digests[order][1:] == digests[order][:-1]).all(axis=1)
    keep = np.ones(len(digests), dtype=bool)
    keep[order[1:][same]] = False
    return np.split(keep, np.cumsum([len(table["split"]) for table in tables])[:-1])


def _shard(staging: Path, number: int, split: str, table: dict) -> tuple[Shard | None, np.ndarray | None]:
    """The documents of one split of a part as a shard of the store; none if there are none."""
    of_split = table["split"].astype(bool) == (split == "validation")
    chosen = of_split & table["keep"]
    source = staging / f"part-{number:05d}.{split}.npy"
    if not chosen.any():
        return None, None
    serial = len(list(staging.glob(f"{split}-*.docs.npy")))
    target = staging / f"{split}-{serial:05d}.npy"
    lengths = table["tokens"][chosen].astype(np.int64)
    if chosen.sum() == of_split.sum():
        link(source, target)
    else:
        ids = np.load(source, mmap_mode="r")
        array = ArrayWriter(target, ids.dtype)
        ends = np.cumsum(table["tokens"][of_split].astype(np.int64))
        for keep, end, length in zip(table["keep"][of_split], ends, table["tokens"][of_split], strict=True):
            if keep:
                array.write(ids[int(end) - int(length) : int(end)])
        array.close()
    np.save(target.with_suffix(".docs.npy"), np.cumsum(lengths) - lengths)
    fsync_file(target.with_suffix(".docs.npy"))
    digest, crc = sealed(target)
    docs_digest = sealed(target.with_suffix(".docs.npy"))[0]
    utf8_bytes = int(table["bytes"][chosen].sum())
    return Shard(target.name, split, int(lengths.sum()), int(chosen.sum()), utf8_bytes, digest, docs_digest), crc


def _check_split(manifest: Manifest, split: str, kept: int) -> None:
    remedy = {"validation": "raise validation_share", "train": "lower validation_share"}[split]
    if not manifest.total(split, "documents"):
        raise DataError(
            f"{manifest.source}: no {split} documents, {kept} in all at validation_share "
            f"{manifest.validation_share}. There is no training without validation: {remedy}, or give more documents."
        )
