"""Tokenized parts of a source -> a token store: removes duplicates across parts, names shards, writes the manifest."""

import json
from pathlib import Path

import numpy as np

from rorchat.errors import DataError
from rorchat.rows import RejectedRow
from rorchat.sources.base import RowStats
from rorchat.sources.registry import hub_record, require_kept_rows
from rorchat.tokens.store import SPLITS, Manifest
from rorchat.tokens.store_writer import ArrayWriter, StoreWriter, link_or_copy

Table = dict[str, np.ndarray]  # one entry per document of a part: split, tokens, bytes, digest, keep


def merge_shards(staging: Path, manifest: Manifest, n_parts: int) -> RowStats:
    """Writes the files of a store from its tokenized parts; the manifest is written last.

    The parts are kept until the manifest exists, so an interrupted merge can be repeated.
    """
    for leftover in (file for split in SPLITS for file in staging.glob(f"{split}-*")):
        leftover.unlink()
    stats, tables = RowStats(manifest.source, manifest.licence, hub=hub_record(manifest.source)), []
    for number in range(n_parts):
        record = json.loads((staging / f"part-{number:05d}.json").read_text())
        stats.add(RowStats(**record["tally"]))
        with np.load(staging / f"part-{number:05d}.documents.npz") as table:
            tables.append({key: table[key] for key in table.files})
    _mark_duplicates(staging, tables, stats)
    require_kept_rows(stats)
    writer = StoreWriter(staging, manifest)
    for split in SPLITS:
        for number, table in enumerate(tables):
            _write_shard(writer, staging / f"part-{number:05d}.{split}.npy", split, table)
        _require_documents(manifest, split, stats.kept)
    manifest.rows_in, manifest.kept = stats.rows_in, stats.kept
    manifest.rejects, manifest.repairs = dict(sorted(stats.rejects.items())), dict(sorted(stats.repairs.items()))
    writer.close()
    return stats


def _mark_duplicates(staging: Path, tables: list[Table], stats: RowStats) -> None:
    """Sets `keep` of every document: only the first of identical documents, in the order of the parts, is kept."""
    digests = np.concatenate([table["digest"] for table in tables]).astype(np.uint64).reshape(-1, 2)
    order = np.lexsort(digests.T)  # stable: equal digests stay in document order
    is_repeated = (digests[order][1:] == digests[order][:-1]).all(axis=1)
    keep = np.ones(len(digests), dtype=bool)
    keep[order[1:][is_repeated]] = False
    ends = np.cumsum([len(table["split"]) for table in tables])
    for number, (table, part_keep) in enumerate(zip(tables, np.split(keep, ends[:-1]), strict=True)):
        table["keep"] = part_keep
        if part_keep.all():
            continue
        content = (staging / f"part-{number:05d}.places.txt").read_bytes()
        places = content.decode(errors="surrogateescape").split("\n")
        for document in np.flatnonzero(~part_keep):
            stats.withdraw(places[document], RejectedRow("duplicate"))


def _write_shard(writer: StoreWriter, part: Path, split: str, table: Table) -> None:
    """Adds the kept documents of one split of a part as a shard, if there are any."""
    in_split = table["split"].astype(bool) == (split == "validation")
    kept = in_split & table["keep"]
    if not kept.any():
        return
    lengths = table["tokens"].astype(np.int64)
    if kept.sum() == in_split.sum():
        link_or_copy(part, writer.next_path(split))
    else:
        ids = np.load(part, mmap_mode="r")
        array = ArrayWriter(writer.next_path(split), ids.dtype)
        ends = np.cumsum(lengths[in_split]).tolist()
        for keep, start, end in zip(table["keep"][in_split], [0, *ends], ends, strict=False):
            if keep:
                array.write(ids[start:end])
        array.close()
    starts = np.cumsum(lengths[kept]) - lengths[kept]
    writer.add_shard(split, starts, int(table["bytes"][kept].sum()))


def _require_documents(manifest: Manifest, split: str, kept: int) -> None:
    if not manifest.total(split, "documents"):
        advice = {"validation": "raise validation_share", "train": "lower validation_share"}[split]
        raise DataError(
            f"{manifest.source}: no {split} documents; {kept} documents in total at validation_share "
            f"{manifest.validation_share}. Training needs both splits: {advice}, or give more documents."
        )
