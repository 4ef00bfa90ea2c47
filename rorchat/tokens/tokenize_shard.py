"""Tokenizes one part of a source into arrays of ids. Parts are processed in parallel.

The files of a part depend only on its rows:

part-00012.train.npy, part-00012.validation.npy    ids
part-00012.documents.npz                           for every document: split, tokens, bytes, digest; for every message
                                                   that is not learned: its document, and its start and end there
part-00012.places.txt                              for every document: its place in the source, one per line
part-00012.json                                    identity and counts of the part; written last, so it marks completion
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rorchat.chatml import encode_conversations
from rorchat.files import fsync_file, to_json, write_atomically
from rorchat.persona import Persona
from rorchat.reading.filters import Filters
from rorchat.reading.long_texts import divide
from rorchat.rows import row_text
from rorchat.sources.registry import SourcePart, SourceRows, load_rows
from rorchat.tokens.decontamination import EvaluationText
from rorchat.tokens.encode import Encoder
from rorchat.tokens.kept_rows import KeptRow, RowFilter
from rorchat.tokens.store import SPLITS
from rorchat.tokens.store_writer import ArrayWriter
from rorchat.validation_split import is_validation_digest

Span = tuple[int, int]  # start and end in the ids of a document

BATCH_CHARACTERS = 2**22
PART_VERSION = 2  # of the files of a part: those of an earlier version are not resumed
# An empty part must write tables of the same dtypes as any other
_TABLE_DTYPES = {"split": bool, "tokens": np.int64, "bytes": np.int64, "digest": np.uint64, "untrained": np.int64}


@dataclass
class ShardTokenizer:
    """Tokenizes the parts of one source into a folder, with the same settings for each."""

    spec: str
    kind: str
    tokenizer: object
    folder: Path
    validation_share: float
    seed: int
    persona: Persona | None
    filters: Filters
    evaluation: EvaluationText | None = None
    divides: bool = False  # divide the only document of the source into several

    def __post_init__(self):
        self.encoder = Encoder(self.tokenizer)

    def tokenize(self, number: int, part: SourcePart, progress: Callable[[int, int, int], object]) -> None:
        """Writes the files of a part.

        Args:
            progress: called with the documents, bytes and tokens done since the last call.
        """
        name = f"part-{number:05d}"
        rows = load_rows(self.spec, self.kind, seed=self.seed, persona=self.persona, part=part)
        row_filter = RowFilter(self.kind, self.filters, self.evaluation)
        writers = {split: ArrayWriter(self.folder / f"{name}.{split}.npy", self.encoder.dtype) for split in SPLITS}
        table: dict[str, list] = {key: [np.empty(0, dtype)] for key, dtype in _TABLE_DTYPES.items()}
        n_documents = 0
        # Places contain file names, which need not be valid UTF-8
        with open(self.folder / f"{name}.places.txt", "w", encoding="utf-8", errors="surrogateescape") as places:
            for batch in _batches(_divide(rows) if self.divides else _with_places(rows)):
                documents = [kept for place, row in batch if (kept := row_filter.check(place, row, rows))]
                ids, lengths, untrained = self._encode(documents)
                is_validation = np.array(
                    [is_validation_digest(d.digest, self.validation_share) for d in documents], dtype=bool
                )
                for writer, chosen in ((writers["train"], ~is_validation), (writers["validation"], is_validation)):
                    if chosen.any():
                        writer.write(ids if chosen.all() else ids[np.repeat(chosen, lengths)])
                sizes = [_utf8_bytes(document.text) for document in documents]
                spans = [(number, *span) for number, all_of in enumerate(untrained, n_documents) for span in all_of]
                table["untrained"].append(np.array(spans, dtype=np.int64).ravel())
                n_documents += len(documents)
                table["split"].append(is_validation)
                table["tokens"].append(lengths)
                table["bytes"].append(np.array(sizes, dtype=np.int64))
                digests = b"".join(document.exact_digest for document in documents)
                table["digest"].append(np.frombuffer(digests, dtype=np.uint64))
                places.writelines(document.place.replace("\n", " ") + "\n" for document in documents)
                progress(len(documents), sum(sizes), len(ids))
        for writer in writers.values():
            writer.close()
        columns: dict[str, Any] = {key: np.concatenate(values) for key, values in table.items()}
        np.savez(self.folder / f"{name}.documents.npz", **columns)
        for suffix in ("places.txt", "documents.npz"):
            fsync_file(self.folder / f"{name}.{suffix}")
        record = self.record(part) | {"tally": rows.stats.record(), "utf8_bytes": int(columns["bytes"].sum())}
        write_atomically(self.folder / f"{name}.json", to_json(record))

    def record(self, part: SourcePart) -> dict[str, object]:
        """What identifies a part that has been tokenized."""
        return {"part": part.record(), "divides": self.divides}

    def _encode(self, documents: list[KeptRow]) -> tuple[np.ndarray, np.ndarray, list[list[Span]]]:
        """(all ids, the number of ids of each document, the spans of its ids that are not learned)."""
        if self.kind == "conversation":
            return self._encode_conversations(documents)
        return *self.encoder.encode([document.text for document in documents]), [[] for _ in documents]

    def _encode_conversations(self, documents: list[KeptRow]) -> tuple[np.ndarray, np.ndarray, list[list[Span]]]:
        """Conversations in the chat format, with control tokens, each after an `<|endoftext|>`."""
        conversations = [document.row["messages"] for document in documents]
        encoded = encode_conversations(self.tokenizer, conversations, encode=self.encoder.encode_texts)
        rows, untrained = [], []
        for conversation in encoded:
            assert conversation is not None, "without `max_length`, every conversation fits"
            rows.append([self.encoder.end_of_text, *conversation.input_ids])
            untrained.append([(start + 1, stop + 1) for start, stop in conversation.untrained])
        return *_concatenate(rows, self.encoder.dtype), untrained


def _utf8_bytes(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(len(text[start : start + 2**20].encode()) for start in range(0, len(text), 2**20))


def _concatenate(encoded: list, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.asarray(ids, dtype=dtype) for ids in encoded]
    lengths = np.array([len(ids) for ids in arrays], dtype=np.int64)
    return np.concatenate([np.empty(0, dtype=dtype), *arrays]), lengths


def _with_places(rows: SourceRows) -> Iterator[tuple[str, dict]]:
    for row in rows:
        yield rows.place, row


def _divide(rows: SourceRows) -> Iterator[tuple[str, dict]]:
    """The pieces of every document, which are counted as rows."""
    for row in rows:
        pieces = [stripped for piece in divide(row["text"]) if (stripped := piece.lstrip("\r\n").rstrip())]
        rows.stats.rows_in += len(pieces) - 1
        rows.stats.kept += len(pieces) - 1
        for number, piece in enumerate(pieces, start=1):
            yield f"{rows.place}, piece {number}", {"text": piece}


def _batches(rows: Iterator[tuple[str, dict]]) -> Iterator[list[tuple[str, dict]]]:
    """Rows with their places in batches of about BATCH_CHARACTERS."""
    batch: list[tuple[str, dict]] = []
    size = 0
    for place, row in rows:
        batch.append((place, row))
        size += len(row_text(row))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
