"""Tokenizes a source into a token store.

A source is tokenized in parts (`rorchat.tokens.tokenize_shard`) by several processes (`rorchat.tokens.workers`). If the
run is killed, complete parts are kept, and the next run tokenizes the remaining ones. Then duplicates are removed
across all parts, in order, and the parts are merged into shards (`rorchat.tokens.merge_shards`). Therefore the bytes of
a store do not depend on the number of workers or on interruptions.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rorchat.chatml import END_OF_TEXT
from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.files import folder_lock, to_json
from rorchat.persona import Persona
from rorchat.reading.filters import Filters
from rorchat.sources.base import RowStats
from rorchat.sources.registry import (
    SourcePart,
    find_source,
    hub_fingerprint,
    hub_record,
    is_pin_of,
    local_path,
    note_unread,
    pin_spec,
    source_digest,
    source_licence,
    source_parts,
)
from rorchat.tokenizer import chat_template_sha256, tokenizer_sha256
from rorchat.tokens.decontamination import EvaluationText
from rorchat.tokens.evaluation_sets import evaluation_digests
from rorchat.tokens.merge_shards import OneDocumentError, merge_shards
from rorchat.tokens.store import Manifest, TokenStore
from rorchat.tokens.tokenize_shard import PART_VERSION, ShardTokenizer
from rorchat.tokens.workers import tokenize_parts


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
    """Creates the token store of a source, or opens it if it already exists.

    Documents are assigned to the training or the validation split by a hash of their text. If one of the splits would
    be empty, a document is moved there, and the only document of a source is divided. Of exact duplicates, only the
    first is kept. The store is written to a temporary folder, which is renamed when the store is complete.

    Args:
        spec: the source, as for `rorchat.sources.registry.load_rows`.
        folder: the folder of the store. Every source needs a separate folder.
        validation_share: share of documents in the validation split, in [0, 1]; at least one is in each split.
        kind: "document" or "conversation" (rendered with the chat template). None selects the first kind that the
            source provides.
        filters: thresholds that documents must satisfy.
        evaluation: paths of evaluation sets. Documents that share 13 consecutive words with them are rejected.
        workers: number of processes; None for one per CPU.

    Returns:
        The opened store.

    Raises:
        MismatchError: the store was created from a different source or tokenizer, or with a different share, seed or
            filter; the source or an evaluation set has changed; or another process is creating the store.
        UsageError: the folder is inside the source's folder.
        DataError: there is only one document, and it cannot be divided.
        StorageError: a worker was killed.
    """
    folder = Path(folder)
    spec = _stored_spec(folder, spec) if folder.exists() else pin_spec(spec)
    name = spec.partition("=")[0]
    kind = kind or next((kind for kind in find_source(name).kinds if kind != "preference"), None)
    if kind not in ("document", "conversation"):
        raise UsageError(f"{spec} contains preferences: pretraining needs documents or conversations.")
    filters, source = filters or Filters(), find_source(name)
    expected = Manifest(
        source=spec,
        licence=source.licence,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocabulary_size=len(tokenizer),
        end_of_text_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        validation_share=validation_share,
        seed=seed if source.is_generated else 0,  # other sources do not depend on it
        kind=kind,
        chat_template_sha256=chat_template_sha256(tokenizer) if kind == "conversation" else "",
        filters=filters.describe(),
        source_sha256=source_digest(spec, persona),
        evaluation=evaluation_digests(evaluation or []),
        long_texts=source.long_texts.target if source.long_texts else 0,
    )
    if folder.exists():
        _print_unread(spec)
    else:
        _require_outside_source(spec, folder)
        with folder_lock(folder):
            if not folder.exists():  # another process may have created it while this one waited for the lock
                staging = folder.with_name(f".{folder.name}.unfinished")
                job = ShardTokenizer(spec, kind, tokenizer, staging, validation_share, seed, persona, filters)
                _create(job, expected, evaluation or [], workers or _count_cpus())
                staging.rename(folder)
                (folder / "identity.json").unlink()  # last, because without it an interrupted run starts over
    return _open(folder, expected)


def _stored_spec(folder: Path, spec: str) -> str:
    """The spec of an existing store if it names a commit of the same rows on the Hub, otherwise `spec`.

    A complete store is not compared with the Hub, which may be unreachable or have a newer commit.
    """
    try:
        stored = Manifest.read(folder).source
    except DataError:  # reported when the store is opened
        return spec
    is_older = stored == spec.partition("=")[0] and is_pin_of(spec, stored)  # before commits were recorded
    return stored if is_older or is_pin_of(stored, spec) else spec


def _create(job: ShardTokenizer, expected: Manifest, evaluation: list[str], workers: int) -> None:
    """Writes the files of a store into the job's folder, except those that an interrupted run has already written."""
    staging = job.folder
    expected.hub_fingerprint, expected.licence = hub_fingerprint(job.spec), source_licence(job.spec)
    _resume_or_clear(staging, expected)
    parts = source_parts(job.spec)
    if not _has_manifest(staging):
        if evaluation:
            job.evaluation = EvaluationText.read(evaluation)
            print(job.evaluation.describe(), file=sys.stderr)  # noqa: T201
        try:
            print(_tokenize_and_merge(job, expected, parts, workers), file=sys.stderr)  # noqa: T201
        except DataError:  # the data must be changed, so these parts cannot be used
            shutil.rmtree(staging)
            raise
    Manifest.read(staging)  # must be readable before the parts are deleted
    for part in staging.glob("part-*"):
        part.unlink()


def _tokenize_and_merge(job: ShardTokenizer, expected: Manifest, parts: list[SourcePart], workers: int) -> RowStats:
    """Writes the files of a store. If its source has only one document, this is divided into several."""
    limits = find_source(job.spec.partition("=")[0]).long_texts

    def run() -> RowStats:
        tokenize_parts(job, parts, workers)
        stats = RowStats(expected.source, expected.licence, limits=limits, hub=hub_record(expected.source))
        stats.reading = note_unread(job.spec)
        return merge_shards(job.folder, expected, len(parts), stats)

    try:
        return run()
    except OneDocumentError:
        if job.kind != "document":
            raise
    job.divides = True
    stats = run()
    stats.held_out = f"the only document was divided into {stats.kept}; {stats.held_out}".removesuffix("; ")
    return stats


def _resume_or_clear(staging: Path, expected: Manifest) -> None:
    """Keeps the files of an interrupted run with the same settings and deletes all others."""
    path = staging / "identity.json"
    settings = expected.fingerprint() | {"hub_fingerprint": expected.hub_fingerprint, "part_version": PART_VERSION}
    content = to_json(settings, indent=2, sort_keys=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        path.write_text(content, encoding="utf-8")


def _print_unread(spec: str) -> None:
    """Names the files that a source does not read; if they are gone, a complete store is still valid."""
    try:
        unread = RowStats(spec, reading=note_unread(spec)).describe_unread()
    except DataError:
        return
    if unread and os.environ.get("RANK", "0") == "0":
        print(f"{spec}: {unread}", file=sys.stderr)  # noqa: T201


def _has_manifest(staging: Path) -> bool:
    try:
        Manifest.read(staging)
        return True
    except DataError:
        return False


def _require_outside_source(spec: str, folder: Path) -> None:
    """Raises UsageError if the store would be created inside its source folder, where the next run would read it."""
    source = local_path(spec)
    if source and source.is_dir() and source.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UsageError(f"{folder} is inside the source folder {source}: choose another folder for the store.")


def _count_cpus() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(folder: Path, expected: Manifest) -> TokenStore:
    """Opens an existing store after comparing its settings with the expected ones."""
    store = TokenStore(folder)
    existing, wanted = store.manifest.fingerprint(), expected.fingerprint()
    # Missing source files count as unchanged. A complete store is not compared with the Hub, which may be unreachable.
    wanted["source_sha256"] = wanted["source_sha256"] or existing["source_sha256"]
    wanted["evaluation"] = {
        name: digest or existing["evaluation"].get(name, "") for name, digest in wanted["evaluation"].items()
    }
    is_earlier = wanted["long_texts"] and not existing["long_texts"]
    if is_earlier:
        wanted["long_texts"] = 0
    differences = [
        _describe_difference(key, existing[key], wanted[key]) for key in wanted if existing[key] != wanted[key]
    ]
    if existing["source"] != wanted["source"]:
        source_parts(expected.source)  # raises a more specific error if the path does not exist
    if differences:
        raise MismatchError(
            f"{folder} contains a different token store: {'; '.join(differences)}. Delete it or choose another folder."
        )
    if is_earlier:
        print(  # noqa: T201
            f"{folder} was made by an earlier version, which did not cut long texts and read only UTF-8: it is used as "
            "it is. Delete it to prepare it again.",
            file=sys.stderr,
        )
    return store


def _describe_difference(key: str, existing: Any, wanted: Any) -> str:
    if key == "source_sha256":
        return "its source (files, persona or location on the Hub) has changed"
    if key == "chat_template_sha256":
        return "its conversations have a different chat template or system message (chat_template_sha256)"
    if key == "long_texts":
        return f"long texts were cut at about {existing:,} characters, now {wanted:,}"
    if key == "evaluation":
        names = [name for name in sorted({*existing, *wanted}) if existing.get(name) != wanted.get(name)]
        return f"evaluation differs in {', '.join(names)}"
    return f"{key} {existing!r}, now {wanted!r}"
