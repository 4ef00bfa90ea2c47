"""Tokenized parts of a source -> a token store: removes duplicates across parts, names shards, writes the manifest."""

import json
from pathlib import Path

import numpy as np

from rorchat.errors import DataError
from rorchat.reading.filters import FILTER_REASONS
from rorchat.rows import RejectedRow
from rorchat.sources.base import RowStats
from rorchat.sources.registry import require_kept_rows
from rorchat.tokens.store import SPLITS, Manifest
from rorchat.tokens.store_writer import ArrayWriter, StoreWriter, link_or_copy
from rorchat.validation_split import choose_for_empty_split, describe_moved

# One entry per document of a part: split (the file that has it), tokens, bytes, digest, keep, final (its split). In
# `untrained`, one per message that is not learned: its document, and its start and end there.
Table = dict[str, np.ndarray]


class OneDocumentError(DataError):
    """All documents of a source are the same text, so they cannot be in different splits."""


def merge_shards(staging: Path, manifest: Manifest, n_parts: int, stats: RowStats) -> RowStats:
    """Writes the files of a store from its tokenized parts; the manifest is written last.

    The parts are kept until the manifest exists, so an interrupted merge can be repeated. If one of the splits would
    have no documents, one is moved there (`choose_for_empty_split`).

    Args:
        stats: the counts of the source, to which those of the parts are added.

    Raises:
        OneDocumentError: there is only one document.
    """
    for leftover in (file for split in SPLITS for file in staging.glob(f"{split}-*")):
        leftover.unlink()
    tables = []
    for number in range(n_parts):
        record = json.loads((staging / f"part-{number:05d}.json").read_text(encoding="utf-8"))
        stats.add(RowStats.from_record(record["tally"]))
        with np.load(staging / f"part-{number:05d}.documents.npz") as table:
            tables.append({key: table[key] for key in table.files})
    _mark_duplicates(staging, tables, stats)
    require_kept_rows(stats, _advise(manifest, stats))
    _fill_empty_split(staging, tables, manifest, stats)
    writer = StoreWriter(staging, manifest)
    for split in SPLITS:
        for number, table in enumerate(tables):
            for stored in SPLITS:  # the same split, unless a document was moved
                _write_shard(writer, staging / f"part-{number:05d}.{stored}.npy", stored, split, table)
    manifest.rows_in, manifest.kept = stats.rows_in, stats.kept
    manifest.rejects, manifest.repairs = dict(sorted(stats.rejects.items())), dict(sorted(stats.repairs.items()))
    manifest.decoded = {name: len(paths) for name, paths in sorted(stats.reading.decoded.items())}
    writer.close()
    return stats


def _advise(manifest: Manifest, stats: RowStats) -> str:
    """What to do if most rows were rejected by a filter; otherwise empty."""
    thresholds = [f"{name} {value:g}" for name, value in manifest.filters.items()]
    if not thresholds or not {reason for reason, _ in stats.most_frequent_rejects()[:1]} & FILTER_REASONS:
        return ""
    return f"Loosen the filters ({', '.join(thresholds)}), or use another source."


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
        places = _read_places(staging, number)
        for document in np.flatnonzero(~part_keep):
            stats.withdraw(places[document], RejectedRow("duplicate"))


def _fill_empty_split(staging: Path, tables: list[Table], manifest: Manifest, stats: RowStats) -> None:
    """Sets `final`, the split of every document: that of its file, unless one of the splits has no documents."""
    for table in tables:
        table["final"] = table["split"].astype(bool)  # true: validation
    kept = [table["final"][table["keep"]] for table in tables]
    in_validation = np.concatenate(kept)
    if in_validation.any() and not in_validation.all():
        return
    empty = "train" if in_validation.any() else "validation"
    # the first 8 bytes of each digest, as `hash_order` reads them
    orders = [table["digest"].view(">u8").reshape(-1, 2)[:, 0] for table in tables]
    order = choose_for_empty_split(
        np.concatenate([column[table["keep"]] for column, table in zip(orders, tables, strict=True)]).tolist(),
        np.concatenate([table["tokens"][table["keep"]] for table in tables]).tolist(),
        empty,
    )
    if order is None:
        raise OneDocumentError(
            f"{manifest.source} has one {manifest.kind}, which cannot be divided between training and validation: "
            f"give more.{f' Rejected were {stats.describe_rejects()}.' if stats.rejects else ''}"
        )
    places = []
    for number, (column, table) in enumerate(zip(orders, tables, strict=True)):
        moved = (column == order) & table["keep"]
        table["final"] ^= moved
        places += [_read_places(staging, number)[document] for document in np.flatnonzero(moved)]
    stats.held_out = describe_moved(empty, manifest.kind, manifest.validation_share, places)


def _read_places(staging: Path, number: int) -> list[str]:
    content = (staging / f"part-{number:05d}.places.txt").read_bytes()
    return content.decode(errors="surrogateescape").split("\n")


def _write_shard(writer: StoreWriter, part: Path, stored: str, split: str, table: Table) -> None:
    """Adds the documents of a part's file that are kept in a split as a shard, if there are any.

    Args:
        stored: the split whose documents the file `part` has.
    """
    in_file = table["split"].astype(bool) == (stored == "validation")
    kept = in_file & table["keep"] & (table["final"] == (split == "validation"))
    if not kept.any():
        return
    lengths = table["tokens"].astype(np.int64)
    if kept.sum() == in_file.sum():
        link_or_copy(part, writer.next_path(split))
    else:
        ids = np.load(part, mmap_mode="r")
        array = ArrayWriter(writer.next_path(split), ids.dtype)
        ends = np.cumsum(lengths[in_file]).tolist()
        for keep, start, end in zip(kept[in_file], [0, *ends], ends, strict=False):
            if keep:
                array.write(ids[start:end])
        array.close()
    starts = np.cumsum(lengths[kept]) - lengths[kept]
    spans = table["untrained"].reshape(-1, 3)
    spans = spans[kept[spans[:, 0]]]
    of_document = np.cumsum(kept)[spans[:, 0]] - 1  # the position of a document among those that are kept
    untrained = starts[of_document][:, None] + spans[:, 1:]
    writer.add_shard(split, starts, int(table["bytes"][kept].sum()), untrained)
