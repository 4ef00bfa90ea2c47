"""Tokenizes the parts of a source in parallel processes and reports progress."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rorchat.console import shows_bars
from rorchat.errors import StorageError
from rorchat.sources.registry import SourcePart
from rorchat.tokens.tokenize_shard import ShardTokenizer

LOG_INTERVAL_SECONDS = 10


def tokenize_parts(job: ShardTokenizer, parts: list[SourcePart], workers: int) -> None:
    """Tokenizes every part that is not complete yet.

    Raises:
        StorageError: a worker process was killed. Complete parts are kept.
    """
    done = {number for number, part in enumerate(parts) if _is_complete(job, number, part)}
    todo = [number for number in range(len(parts)) if number not in done]
    if not todo:
        return
    progress = _Progress(job, parts, done)
    try:
        if workers == 1 or len(todo) == 1:
            for number in todo:
                job.tokenize(number, parts[number], progress.add)
                progress.finish_part(number)
        else:
            _run_pool(job, {number: parts[number] for number in todo}, min(workers, len(todo)), progress)
    finally:
        progress.close()


def _record_path(job: ShardTokenizer, number: int) -> Path:
    return job.folder / f"part-{number:05d}.json"


def _is_complete(job: ShardTokenizer, number: int, part: SourcePart) -> bool:
    """Whether exactly this part was tokenized: after a file was renamed, its number may belong to another one."""
    path = _record_path(job, number)
    return path.is_file() and job.record(part).items() <= json.loads(path.read_text(encoding="utf-8")).items()


# The state of a worker process: its initializer sets it
_worker_job: ShardTokenizer
_worker_counters: Any  # a shared array


def _start_worker(job: ShardTokenizer, counters, parent: int) -> None:
    global _worker_job, _worker_counters
    _worker_job, _worker_counters = job, counters
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: the main process says that it was stopped

    def exit_with_parent():  # if the parent is killed, a worker would wait for work forever
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _add_to_counters(*counts: int) -> None:
    with _worker_counters.get_lock():
        for index, count in enumerate(counts):
            _worker_counters[index] += count


def _tokenize_part(number: int, part: SourcePart) -> int:
    _worker_job.tokenize(number, part, _add_to_counters)
    return number


def _run_pool(job: ShardTokenizer, parts: dict[int, SourcePart], workers: int, progress: "_Progress") -> None:
    # Forked workers start at once and share loaded data; they never use torch or a GPU. On other systems than Linux,
    # forking is unsafe with some system libraries.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    counters: Any = context.Array("q", 3)  # documents, bytes, tokens
    initargs = (job, counters, os.getpid())
    with _no_tokenizer_threads():
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=initargs)
        try:
            waiting = {pool.submit(_tokenize_part, number, part) for number, part in parts.items()}
            while waiting:
                ready, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                progress.show(*counters)
                for future in ready:
                    progress.finish_part(future.result())
        except BrokenProcessPool:
            raise StorageError(
                "A worker process was killed, perhaps because memory ran out. Run the same command again to continue; "
                "fewer workers need less memory."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _no_tokenizer_threads() -> Iterator[None]:
    """Disables the threads of `tokenizers`, which do not survive a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class _Progress:
    """Documents, bytes and tokens done, their rates and the time left: a bar in a terminal, lines in a log."""

    def __init__(self, job: ShardTokenizer, parts: list[SourcePart], done: set[int]):
        self.job, self.title = job, f"tokenize {job.spec}"
        self.part_sizes = [_part_size(part) for part in parts]
        self.text_bytes = {number: self._read_text_bytes(number) for number in done}
        self.started = self.last_line = time.monotonic()
        self.counts = (0, 0, 0)
        self.bar = tqdm(
            total=self._estimate(),
            desc=self.title,
            unit="B",
            unit_scale=True,
            disable=not shows_bars(),
            leave=False,
        )

    def _read_text_bytes(self, number: int) -> int:
        return json.loads(_record_path(self.job, number).read_text(encoding="utf-8"))["utf8_bytes"]

    def _estimate(self) -> int:
        """The bytes of text in all parts, estimated from the complete parts."""
        if not self.text_bytes:
            return sum(self.part_sizes)
        ratio = sum(self.text_bytes.values()) / max(1, sum(self.part_sizes[number] for number in self.text_bytes))
        return int(ratio * sum(self.part_sizes))

    def add(self, *counts: int) -> None:
        self.show(*(old + new for old, new in zip(self.counts, counts, strict=True)))

    def show(self, documents: int, utf8_bytes: int, tokens: int) -> None:
        seconds = max(time.monotonic() - self.started, 1e-3)
        rates = f"{documents / seconds:,.0f} documents/s, {tokens / seconds / 1e6:.1f}M tokens/s"
        self.bar.update(utf8_bytes - self.counts[1])
        self.bar.set_postfix_str(rates, refresh=False)
        self.counts = (documents, utf8_bytes, tokens)
        if self.bar.disable and time.monotonic() - self.last_line > LOG_INTERVAL_SECONDS:
            self.last_line = time.monotonic()
            left = max(0, self._estimate() - utf8_bytes) * seconds / max(1, utf8_bytes)
            self._print(
                f"{documents:,} documents, {utf8_bytes / 1e6:,.0f} MB, {rates}, "
                f"{utf8_bytes / seconds / 1e6:.1f} MB/s, about {left:,.0f} s left"
            )

    def finish_part(self, number: int) -> None:
        self.text_bytes[number] = self._read_text_bytes(number)
        self.bar.total = self._estimate()

    def close(self) -> None:
        self.bar.close()
        documents, utf8_bytes, tokens = self.counts
        seconds = max(time.monotonic() - self.started, 1e-3)
        self._print(
            f"{documents:,} documents, {utf8_bytes / 1e6:,.1f} MB, {tokens:,} tokens in {seconds:.1f} s "
            f"({utf8_bytes / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f}M tokens/s)"
        )

    def _print(self, text: str) -> None:
        print(f"{self.title}: {text}", file=sys.stderr)  # noqa: T201


def _part_size(part: SourcePart) -> int:
    """Bytes on disk, or rows if the part is on the Hub."""
    if part.rows:
        return part.rows[1] - part.rows[0]
    return sum(file_slice.bytes for file_slice in part.slices)
