"""One part of a source -> arrays: the unit of preparation. What it writes depends on its rows alone.

part-00012.train.npy, part-00012.validation.npy    ids
part-00012.documents.npz                           of every document: split, tokens, bytes, digest
part-00012.places.txt                              of every document: where it stood, a line each
part-00012.json                                    which part it is and the counts; written last: what has one is whole
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rorchat.chatml import encode_conversations
from rorchat.files import file_sha256, fsync_file, write_atomically
from rorchat.persona import Persona
from rorchat.reading.filters import Filters
from rorchat.rows import RejectedRow, row_text
from rorchat.sources.base import exact_digest, is_validation_digest, text_digest
from rorchat.sources.registry import RowStats, SourcePart, SourceRows, load_rows
from rorchat.tokens.decontamination import EvaluationText
from rorchat.tokens.encode import Encoder, TooLong
from rorchat.tokens.store import SPLITS, block_crcs

CHARACTERS_AT_ONCE = 2**22


@dataclass
class Job:
    """What is done with every part of a source, and where its results go."""

    spec: str
    kind: str
    tokenizer: object
    folder: Path
    validation_share: float
    seed: int
    persona: Persona | None
    filters: Filters
    evaluation: EvaluationText | None = None

    def __post_init__(self):
        self.encoder = Encoder(self.tokenizer)

    def prepare(self, number: int, part: SourcePart, told: Callable[[int, int, int], None]) -> None:
        """Writes the arrays of a part. `told` hears of documents, bytes and tokens as they are done."""
        name = f"part-{number:05d}"
        tally = RowStats(self.spec)
        arrays = {split: ArrayWriter(self.folder / f"{name}.{split}.npy", self.encoder.dtype) for split in SPLITS}
        table: dict[str, list] = {"split": [], "tokens": [], "bytes": [], "digest": []}
        # A file's name may be no UTF-8, and stands in the places
        with open(self.folder / f"{name}.places.txt", "w", encoding="utf-8", errors="surrogateescape") as places:
            for batch in _batches(
                load_rows(self.spec, self.kind, seed=self.seed, persona=self.persona, part=part), tally
            ):
                documents = self._kept(batch, tally)
                ids, lengths = self._encoded(documents, tally)
                documents = [document for document in documents if document is not None]
                splits = np.array(
                    [is_validation_digest(mark, self.validation_share) for _, _, _, mark in documents], dtype=bool
                )
                if splits.any():
                    for held, length, end in zip(splits, lengths, np.cumsum(lengths), strict=True):
                        arrays["validation" if held else "train"].write(ids[end - length : end])
                else:
                    arrays["train"].write(ids)
                sizes = [_utf8_bytes(text) for _, _, text, _ in documents]
                table["split"].append(splits)
                table["tokens"].append(lengths)
                table["bytes"].append(np.array(sizes, dtype=np.int64))
                marks = b"".join(exact_digest(row, mark) for _, row, _, mark in documents)
                table["digest"].append(np.frombuffer(marks, dtype=np.uint64))
                places.writelines(place.replace("\n", " ") + "\n" for place, *_ in documents)
                told(len(documents), sum(sizes), len(ids))
        for array in arrays.values():
            array.close()
        # A part may have no document: its tables are of the same types, or the joined tables would change theirs
        types = {"split": bool, "tokens": np.int64, "bytes": np.int64, "digest": np.uint64}
        joined = {key: np.concatenate([np.empty(0, types[key]), *values]) for key, values in table.items()}
        np.savez(self.folder / f"{name}.documents.npz", **joined)
        for written in (f"{name}.places.txt", f"{name}.documents.npz"):
            fsync_file(self.folder / written)
        record = {"part": part.record(), "tally": asdict(tally), "utf8_bytes": int(joined["bytes"].sum())}
        write_atomically(self.folder / f"{name}.json", json.dumps(record))

    def _kept(self, batch: list[tuple[str, dict]], tally: RowStats) -> list[tuple[str, dict, str, bytes] | None]:
        """(place, row, text, digest) of the rows that pass the filters."""
        documents = []
        for place, row in batch:
            text = row_text(row)
            try:
                self.filters.check(text)
                if self.evaluation is not None:
                    self.evaluation.check(text)
            except RejectedRow as reject:
                tally.withdraw(place, reject)
                continue
            documents.append((place, row, text, text_digest(text)))
        return documents

    def _encoded(self, documents: list, tally: RowStats) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all, lengths of each) of documents; those that cannot be encoded are set to None and counted."""
        if self.kind == "conversation":
            return self._encoded_conversations(documents)
        try:
            return self.encoder.encode([text for _, _, text, _ in documents])
        except TooLong:
            encoded = []
            for at, (place, _, text, _) in enumerate(documents):
                try:
                    encoded.append(self.encoder.encode([text])[0])
                except TooLong as error:
                    tally.withdraw(place, RejectedRow("over-long", str(error)))
                    documents[at] = None
            return _joined(encoded, self.encoder.dtype)

    def _encoded_conversations(self, documents: list) -> tuple[np.ndarray, np.ndarray]:
        """Conversations as training renders them, control tokens and all, each behind an `<|endoftext|>`."""
        conversations = [row["messages"] for _, row, _, _ in documents]
        encoded = encode_conversations(self.tokenizer, conversations, encode=self.encoder.encode_texts)
        return _joined([[self.encoder.end_of_text, *one.input_ids] for one in encoded], self.encoder.dtype)


def _utf8_bytes(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(len(text[start : start + 2**20].encode()) for start in range(0, len(text), 2**20))


def _joined(encoded: list, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    flat = [np.asarray(ids, dtype=dtype) for ids in encoded]
    return np.concatenate([np.empty(0, dtype=dtype), *flat]), np.array([len(ids) for ids in flat], dtype=np.int64)


def _batches(rows: SourceRows, tally: RowStats) -> Iterator[list[tuple[str, dict]]]:
    """Rows with their places, about CHARACTERS_AT_ONCE together; what the rows count is counted into `tally`."""
    rows.stats = tally
    batch, size = [], 0
    for row in rows:
        batch.append((rows.place, row))
        size += len(row_text(row))
        if size >= CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class ArrayWriter:
    """A .npy file of one flat array that is written piece by piece."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype, self.length = path, np.dtype(dtype), 0
        self.file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        # numpy leaves room in a header for any length, so that it can be written again over itself
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def write(self, ids: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self.length += len(ids)

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def sealed(path: Path) -> tuple[str, np.ndarray]:
    """(sha256, CRC of the blocks) of an array file."""
    return file_sha256(path), block_crcs(np.load(path, mmap_mode="r"))


def link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no hard links, or it is another one."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
