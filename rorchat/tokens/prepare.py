"""Text -> a token store: parts of a source, several at a time.

A part is prepared by itself (`rorchat.tokens.tokenize_shard`); which process does it, and when, changes nothing.
What was done is kept when the run is killed, and the next run does the rest. Only then are duplicates looked for, over all parts in
their order (`rorchat.tokens.merge_shards`): the first copy stays. So the store is the same bytes with any number of
workers,
interrupted or not.
"""

import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm.auto import tqdm

from rorchat.chatml import END_OF_TEXT
from rorchat.errors import DataError, MismatchError, StorageError, UsageError
from rorchat.files import folder_lock
from rorchat.persona import Persona
from rorchat.reading.filters import Filters
from rorchat.sources.registry import SourcePart, find_source, hub_fingerprint, source_digest, source_kinds, source_parts
from rorchat.tokenizer import chat_template_sha256, tokenizer_sha256
from rorchat.tokens.decontamination import EvaluationText, evaluation_digests
from rorchat.tokens.merge_shards import merge_shards
from rorchat.tokens.store import Manifest, TokenStore
from rorchat.tokens.tokenize_shard import Job

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
        spec: as for `rorchat.sources.registry.load_rows`.
        folder: where the store is or will be; two sources never share one.
        validation_share: of documents, in [0, 1).
        kind: "document" or "conversation", which is written as the chat template has it, control tokens and all;
            None for the first of these that the source gives.
        filters: what else makes a document unusable.
        evaluation: files of evaluation sets: a document that has 13 words in a row with one of them is rejected.
        workers: processes; None for one a CPU.

    Raises:
        MismatchError: the folder holds tokens of another source, tokenizer, share, seed or filter, the source or an
            evaluation set has changed, or another process is making the store.
        UsageError: the folder lies in the source's.
        DataError: no document was held out for validation, or none was left to train on.
        StorageError: a worker was killed.
    """
    folder = Path(folder)
    kind = kind or next((kind for kind in source_kinds(spec.partition("=")[0]) if kind != "preference"), None)
    if kind not in ("document", "conversation"):
        raise UsageError(f"{spec} gives preferences: a model is pretrained on documents or conversations.")
    filters, generated = filters or Filters(), hasattr(find_source(spec.partition("=")[0]), "generate")
    wanted = Manifest(
        source=spec,
        licence=find_source(spec.partition("=")[0]).LICENCE,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocabulary_size=len(tokenizer),
        end_of_text_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        validation_share=validation_share,
        seed=seed if generated else 0,  # which plays no part in files
        kind=kind,
        chat_template_sha256=chat_template_sha256(tokenizer) if kind == "conversation" else "",
        filters=filters.describe(),
        source_sha256=source_digest(spec, persona),
        evaluation=evaluation_digests(evaluation or []),
    )
    if not folder.exists():
        _require_apart(spec, folder)
        with folder_lock(folder):
            if not folder.exists():  # another process may have made it since
                job = Job(spec, kind, tokenizer, _staging(folder), validation_share, seed, persona, filters)
                _make(job, wanted, evaluation or [], workers or _cpus())
                job.folder.rename(folder)
                (folder / "identity.json").unlink()  # last: without it, what was made would be made again
    return _found(folder, wanted)


def _make(job: Job, wanted: Manifest, evaluation: list[str], workers: int) -> None:
    """Makes the files of a store in the job's folder, or what is missing of them."""
    wanted.hub_fingerprint = hub_fingerprint(job.spec)
    _go_on_or_begin(job.folder, wanted)
    pieces = source_parts(job.spec)
    if not _is_finished(job.folder):
        if evaluation:
            job.evaluation = EvaluationText.read(evaluation)
            print(job.evaluation.describe(), file=sys.stderr)  # noqa: T201
        _prepare_parts(job, pieces, workers)
        try:
            print(merge_shards(job.folder, wanted, len(pieces)), file=sys.stderr)  # noqa: T201
        except DataError:  # which the same parts would give again: of another share they are others
            shutil.rmtree(job.folder)
            raise
    Manifest.read(job.folder)  # before the parts go, of which it can be made again
    for leftover in job.folder.glob("part-*"):
        leftover.unlink()


def _is_finished(staging: Path) -> bool:
    try:
        Manifest.read(staging)
        return True
    except DataError:
        return False


def _require_apart(spec: str, folder: Path) -> None:
    """Raises UsageError where a store would stand in the folder that is read, and be read the next time."""
    where = spec.partition("=")[2]
    source = Path(where).expanduser()
    if where and source.is_dir() and source.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UsageError(f"{folder} lies in {where}, which is read: choose another place for the store.")


def _cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _found(folder: Path, wanted: Manifest) -> TokenStore:
    store = TokenStore(folder)
    there, here = store.manifest.identity(), wanted.identity()
    # Files that are gone have not changed. A finished store is not compared with the Hub, which may not be there.
    here["source_sha256"] = here["source_sha256"] or there["source_sha256"]
    here["evaluation"] = {name: sha or there["evaluation"].get(name, "") for name, sha in here["evaluation"].items()}
    differing = [_difference(key, there[key], here[key]) for key in here if there[key] != here[key]]
    if there["source"] != here["source"]:
        source_parts(wanted.source)  # a place with nothing to read is told as that
    if differing:
        raise MismatchError(f"{folder} holds other tokens: {'; '.join(differing)}. Delete it or choose another folder.")
    return store


def _difference(key: str, there: object, here: object) -> str:
    if key == "source_sha256":
        return "what it was made of (files, persona, place on the Hub) has changed since"
    if key == "chat_template_sha256":
        return "its conversations have another chat template or system message (chat_template_sha256)"
    if key == "evaluation":
        names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
        return f"evaluation differs in {', '.join(names)}"
    return f"{key} {there!r}, now {here!r}"


def _staging(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.unfinished")


def _go_on_or_begin(staging: Path, wanted: Manifest) -> None:
    """What an earlier run with the same settings left is gone on with, anything else is deleted."""
    identity = staging / "identity.json"
    said = json.dumps(wanted.identity() | {"hub_fingerprint": wanted.hub_fingerprint}, indent=2, sort_keys=True)
    if not identity.is_file() or identity.read_text() != said:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        identity.write_text(said)


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


def _work(number: int, part: SourcePart) -> int:
    _job.prepare(number, part, _tell)
    return number


def _prepare_parts(job: Job, pieces: list[SourcePart], workers: int) -> None:
    """Prepares every part that is not done yet, and shows how far it is."""
    done = {number for number, part in enumerate(pieces) if _is_done(job.folder / f"part-{number:05d}.json", part)}
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


def _is_done(record: Path, part: SourcePart) -> bool:
    """Whether a part was prepared: this one, and not another that had its number."""
    return record.is_file() and json.loads(record.read_text())["part"] == part.record()


class _Progress:
    """Documents, bytes and tokens done, their rates and the time left: a bar on a terminal, lines in a log."""

    def __init__(self, job: Job, pieces: list[SourcePart], done: set[int]):
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


def _size_of(part: SourcePart) -> int:
    if part.rows:
        return part.rows[1] - part.rows[0]
    return sum(stretch.bytes for stretch in part.stretches)
