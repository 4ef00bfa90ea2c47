"""Text -> a token store: parts of a source, several at a time, and what is decided between them.

A part is prepared by itself (`rorchat.tokens.part`); which process does it, and when, changes nothing. What was done is
kept when the run is killed, and the next run does the rest. Only then are duplicates looked for, over all parts in
their order: the first copy stays. So the store is the same bytes with any number of workers, interrupted or not.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from rorchat.chatml import END_OF_TEXT
from rorchat.errors import DataError, MismatchError, StorageError, UsageError
from rorchat.persona import Persona
from rorchat.sources import Filters, Part, Reject, Tally, find, kinds_of, local_bytes, parts, require_rows
from rorchat.tokenizer import tokenizer_sha256
from rorchat.tokens.overlap import EvaluationText
from rorchat.tokens.part import ArrayWriter, Job, link, sealed
from rorchat.tokens.store import SPLITS, Manifest, Shard, TokenStore

SECONDS_BETWEEN_LINES = 10


def prepare(
    spec: str,
    tokenizer,
    folder: str | Path,
    *,
    validation_share: float,
    kind: str | None = None,
    seed: int = 0,
    persona: Persona | None = None,
    filters: Filters | None = None,
    evaluation: list[str] | None = None,
    workers: int | None = None,
) -> TokenStore:
    """The token store of one source, made now or found as made before.

    Documents go to validation by a hash of their characters, before anything is mixed, and of exact duplicates only the
    first is kept. A store is written under another name and renamed when complete: what has a manifest is whole.

    Args:
        spec: as for `rorchat.sources.load`.
        folder: where the store is or will be; two sources never share one.
        validation_share: of documents, in [0, 1).
        kind: "document" or "conversation", which is written as the chat template has it, control tokens and all;
            None for the first of these that the source gives.
        filters: what else makes a document unusable.
        evaluation: files of evaluation sets: a document that has 13 words in a row with one of them is rejected.
        workers: processes; None for one a CPU.

    Raises:
        MismatchError: the folder holds tokens of another source, tokenizer, share, seed or filter, or another process
            is making it.
        DataError: no document was held out for validation, or none was left to train on.
        StorageError: a worker was killed.
    """
    folder = Path(folder)
    kind = kind or next((kind for kind in kinds_of(spec.partition("=")[0]) if kind != "preference"), None)
    if kind not in ("document", "conversation"):
        raise UsageError(f"{spec} gives preferences: a model is pretrained on documents or conversations.")
    filters = filters or Filters()
    wanted = Manifest(
        source=spec,
        licence=find(spec.partition("=")[0]).LICENCE,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocabulary_size=len(tokenizer),
        end_of_text_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        validation_share=validation_share,
        seed=seed,
        kind=kind,
        chat_template_sha256=_template_sha256(tokenizer) if kind == "conversation" else "",
        filters=filters.describe() | ({"evaluation": sorted(evaluation)} if evaluation else {}),
        source_bytes=local_bytes(spec),
    )
    if folder.exists():
        return _found(folder, wanted)
    with _alone(folder):
        staging = _staging(folder, wanted)
        pieces = parts(spec)
        job = Job(
            spec, kind, tokenizer, staging, validation_share, seed, persona, filters,
            EvaluationText.read(evaluation) if evaluation else None,
        )  # fmt: skip
        if not (staging / "manifest.json").is_file():
            _prepare_parts(job, pieces, workers or _cpus())
            try:
                print(_finish(staging, wanted, len(pieces)), file=sys.stderr)  # noqa: T201
            except DataError:  # which the same parts would give again
                shutil.rmtree(staging)
                raise
        for leftover in [*staging.glob("part-*"), staging / "identity.json"]:
            leftover.unlink()
        staging.rename(folder)
    return TokenStore(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock beside a store that is being made; the system lets go of it when its holder dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except BlockingIOError:
            raise MismatchError(f"{folder} is being prepared by another process: wait for it.") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _template_sha256(tokenizer) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def _found(folder: Path, wanted: Manifest) -> TokenStore:
    store = TokenStore(folder)
    there, here = store.manifest.identity(), wanted.identity()
    if not here["source_bytes"]:
        here.pop("source_bytes")  # files that are gone have not changed
    differing = [f"{key} {there[key]!r}, now {here[key]!r}" for key in here if there[key] != here[key]]
    if differing:
        raise MismatchError(f"{folder} holds other tokens: {'; '.join(differing)}. Delete it or choose another folder.")
    return store


def _staging(folder: Path, wanted: Manifest) -> Path:
    """Where the parts go. What an earlier run with the same settings left is gone on with, anything else is deleted."""
    staging = folder.with_name(f".{folder.name}.unfinished")
    identity = staging / "identity.json"
    said = json.dumps(wanted.identity(), indent=2, sort_keys=True)
    if not identity.is_file() or identity.read_text() != said:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        identity.write_text(said)
    return staging


# -- the parts, several at a time ------------------------------------------------------------------------------------

_job: Job | None = None
_counters = None


def _begin_worker(job: Job, counters, parent: int) -> None:
    global _job, _counters
    _job, _counters = job, counters

    def leave_with_parent():  # a worker whose parent was killed would wait for work for ever
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _tell(documents: int, utf8_bytes: int, tokens: int) -> None:
    with _counters.get_lock():
        for at, count in enumerate((documents, utf8_bytes, tokens)):
            _counters[at] += count


def _work(number: int, part: Part) -> int:
    _job.prepare(number, part, _tell)
    return number


def _prepare_parts(job: Job, pieces: list[Part], workers: int) -> None:
    """Prepares every part that is not done yet, and shows how far it is."""
    done = {number for number in range(len(pieces)) if (job.folder / f"part-{number:05d}.json").is_file()}
    todo = [number for number in range(len(pieces)) if number not in done]
    progress = _Progress(job, pieces, done)
    if not todo:
        return
    if workers == 1 or len(todo) == 1:
        for number in todo:
            job.prepare(number, pieces[number], progress.add)
            progress.finished(number)
        progress.close()
        return
    # Forked, because workers start at once and share what is loaded; they never touch torch or a GPU. Elsewhere than on
    # Linux a fork may break what the system's libraries hold.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    counters = context.Array("q", 3)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    pool = ProcessPoolExecutor(
        min(workers, len(todo)), mp_context=context, initializer=_begin_worker, initargs=(job, counters, os.getpid())
    )
    try:
        waiting = {pool.submit(_work, number, pieces[number]) for number in todo}
        while waiting:
            ready, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            progress.show(*counters)
            for future in ready:
                progress.finished(future.result())
    except BrokenProcessPool:
        raise StorageError(
            "A worker process was killed, perhaps for want of memory. The same command goes on from the finished "
            "parts; with fewer workers it needs less memory."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        progress.close()
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class _Progress:
    """Documents, bytes and tokens done, their rates and the time left: a bar on a terminal, lines in a log."""

    def __init__(self, job: Job, pieces: list[Part], done: set[int]):
        self.job, self.title = job, f"tokenize {job.spec}"
        self.sizes = [_size_of(part) for part in pieces]
        self.text_bytes = {number: self._text_bytes(number) for number in done}
        self.begun, self.last_line = time.monotonic(), time.monotonic()
        self.counts = (0, 0, 0)
        self.bar = tqdm(total=self._expected(), desc=self.title, unit="B", unit_scale=True, disable=None, leave=False)

    def _text_bytes(self, number: int) -> int:
        return json.loads((self.job.folder / f"part-{number:05d}.json").read_text())["utf8_bytes"]

    def _expected(self) -> int:
        """Bytes of text still to come when the work began, by what the finished parts held."""
        if not self.text_bytes:
            return sum(self.sizes)
        ratio = sum(self.text_bytes.values()) / max(1, sum(self.sizes[number] for number in self.text_bytes))
        return int(ratio * sum(self.sizes))

    def add(self, *counts: int) -> None:
        self.show(*(old + new for old, new in zip(self.counts, counts, strict=True)))

    def show(self, documents: int, utf8_bytes: int, tokens: int) -> None:
        seconds = max(time.monotonic() - self.begun, 1e-3)
        rates = f"{documents / seconds:,.0f} documents/s, {tokens / seconds / 1e6:.1f}M tokens/s"
        self.bar.update(utf8_bytes - self.counts[1])
        self.bar.set_postfix_str(rates, refresh=False)
        self.counts = (documents, utf8_bytes, tokens)
        if self.bar.disable and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            left = max(0, self._expected() - utf8_bytes) * seconds / max(1, utf8_bytes)
            print(  # noqa: T201
                f"{self.title}: {documents:,} documents, {utf8_bytes / 1e6:,.0f} MB, {rates}, "
                f"{utf8_bytes / seconds / 1e6:.1f} MB/s, about {left:,.0f} s left",
                file=sys.stderr,
            )

    def finished(self, number: int) -> None:
        self.text_bytes[number] = self._text_bytes(number)
        self.bar.total = self._expected()

    def close(self) -> None:
        self.bar.close()
        documents, utf8_bytes, tokens = self.counts
        seconds = max(time.monotonic() - self.begun, 1e-3)
        print(  # noqa: T201
            f"{self.title}: {documents:,} documents, {utf8_bytes / 1e6:,.1f} MB, {tokens:,} tokens in {seconds:.1f} s "
            f"({utf8_bytes / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f}M tokens/s)",
            file=sys.stderr,
        )


def _size_of(part: Part) -> int:
    if part.rows:
        return part.rows[1] - part.rows[0]
    return sum(stretch.bytes for stretch in part.stretches)


# -- what is decided between the parts -------------------------------------------------------------------------------


def _finish(staging: Path, manifest: Manifest, count: int) -> Tally:
    """Makes the files of a store of finished parts: duplicates out, shards named in order, manifest last.

    The parts stay until there is a manifest, so that this may be interrupted and begun again.
    """
    for leftover in (file for split in SPLITS for file in staging.glob(f"{split}-*")):
        leftover.unlink()
    tally = Tally(manifest.source)
    tables = []
    for number in range(count):
        record = json.loads((staging / f"part-{number:05d}.json").read_text())
        tally.add(Tally(**record["tally"]))
        with np.load(staging / f"part-{number:05d}.documents.npz") as table:
            tables.append({key: table[key] for key in table.files})
    for number, keep in enumerate(_first_copies(tables)):
        dropped = np.flatnonzero(~keep)
        if len(dropped):
            places = (staging / f"part-{number:05d}.places.txt").read_text(encoding="utf-8").split("\n")
            for document in dropped:
                tally.withdraw(places[document], Reject("duplicate"))
        tables[number]["keep"] = keep
    require_rows(tally)
    blocks = []
    for split in SPLITS:
        for number, table in enumerate(tables):
            shard, crc = _shard(staging, number, split, table)
            if shard:
                manifest.shards.append(shard)
                blocks.append(crc)
        _check_split(manifest, split, tally.kept)
    np.save(staging / "blocks.npy", np.concatenate(blocks))
    manifest.blocks_sha256 = sealed(staging / "blocks.npy")[0]
    manifest.dtype = str(np.load(staging / manifest.shards[0].file, mmap_mode="r").dtype)
    manifest.rows_in, manifest.kept = tally.rows_in, tally.kept
    manifest.rejects, manifest.repairs = dict(sorted(tally.rejects.items())), dict(sorted(tally.repairs.items()))
    manifest.write(staging)
    return tally


def _first_copies(tables: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """For each part, which of its documents are no copy of one before."""
    digests = np.concatenate([table["digest"] for table in tables]).astype(np.uint64).reshape(-1, 2)
    _, first = np.unique(digests.view([("a", np.uint64), ("b", np.uint64)])[:, 0], return_index=True)
    keep = np.zeros(len(digests), dtype=bool)
    keep[first] = True
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
