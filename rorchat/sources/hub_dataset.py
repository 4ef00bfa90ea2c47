"""Datasets of the Hub: the commit, configuration and split that a name stands for, and their rows.

The rows are read by `datasets`: downloaded into its cache, or streamed if the files of the split are large. Parquet,
JSON, CSV and text files are read; no code of a dataset is ever run.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rorchat.errors import DataError, RemoteError, UsageError, did_you_mean
from rorchat.reading.slices import Row
from rorchat.reading.text import DOCUMENT_SEPARATOR
from rorchat.sources.base import Source
from rorchat.sources.hub_errors import FORMATS, PARQUET_COPY, explained_errors

STREAM_ABOVE_BYTES = 2**30  # size of the files of a split, compressed
TIMEOUT_SECONDS = 20
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hub; None stands for a default, which `resolve` replaces.

    Attributes:
        path: OWNER/NAME.
        config, split, revision: as for `datasets.load_dataset`.
        streaming: whether rows are streamed instead of downloaded; None decides by the size of the files.
        files: further arguments of `datasets.load_dataset`, which say which files are read.
        is_own: whether it is the dataset that a named source reads by default.
        source: the name of the source that reads it, for error messages.
    """

    path: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    streaming: bool | None = None
    files: tuple[tuple[str, str], ...] = ()
    is_own: bool = False
    source: str = "text"

    @classmethod
    def of_source(cls, source: Source) -> "HubDataset | None":
        """The dataset that a named source reads by default; None if it has none."""
        if source.hub is None:
            return None
        named = {"path": "path", "name": "config", "split": "split", "revision": "revision"}
        arguments = {named[key]: value for key, value in source.hub.items() if key in named}
        files = tuple((key, value) for key, value in source.hub.items() if key not in named)
        return cls(**arguments, files=files, is_own=True, source=source.name)  # type: ignore[arg-type]

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(self.revision and COMMIT.fullmatch(self.revision))

    @property
    def url(self) -> str:
        """What `datasets` loads from the Hub even if there is a local folder of this name."""
        return f"hf://datasets/{self.path}"

    def explained_errors(self) -> AbstractContextManager:
        """Turns errors of `datasets` and of its HTTP client into errors of one line."""
        return explained_errors(self.path, self.revision, self.source, has_default=self.is_own)

    def record(self) -> dict[str, str]:
        """What run.json and a token store record."""
        values = {"dataset": self.path, "config": self.config, "split": self.split, "revision": self.revision}
        return {key: value or "default" for key, value in values.items()}


@dataclass(frozen=True)
class HubRows:
    """The rows of a resolved dataset.

    Attributes:
        rows: a `datasets.Dataset`, or an `IterableDataset` if rows are streamed.
        licence: as the dataset's card states it.
        is_streamed: whether rows are an `IterableDataset`.
        has_whole_files: whether a row is a whole text file, in which `<|endoftext|>` separates documents.
    """

    dataset: HubDataset
    rows: Any
    licence: str
    is_streamed: bool = False
    has_whole_files: bool = False

    @property
    def columns(self) -> list[str]:
        """The names of the columns; empty if they are known only when rows are read."""
        return list(self.rows.column_names or [])

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """Yields (place, row) of rows from `start` to `stop`, or of such a range of shards if rows are streamed.

        Raises:
            RemoteError: the Hub stopped answering.
            DataError: a file is damaged.
        """
        if not self.is_streamed:
            numbers = range(start, len(self.rows) if stop is None else stop)
            rows = ((f"{self.dataset.path}, row {number}", self.rows[number]) for number in numbers)
        elif stop is None:
            rows = ((f"{self.dataset.path}, row {number}", row) for number, row in enumerate(self.rows))
        else:
            rows = (
                (f"{self.dataset.path}, file {shard}, row {number}", row)
                for shard in range(start, stop)
                for number, row in enumerate(self.rows.shard(self.rows.num_shards, shard))
            )
        with self.dataset.explained_errors():
            for place, row in rows:
                if self.has_whole_files:
                    yield from _split_documents(place, row)
                else:
                    yield place, row


def _split_documents(place: str, row: dict) -> Iterator[Row]:
    documents = [document.strip("\r\n") for document in row["text"].split(DOCUMENT_SEPARATOR)]
    for number, document in enumerate(documents):
        if not document.isspace() and (document or number + 1 < len(documents)):
            yield f"{place}, document {number}" if documents[1:] else place, {"text": document}


@lru_cache
def resolve(dataset: HubDataset) -> HubDataset:
    """The dataset with its commit, configuration and split. If the Hub cannot be reached, those in the local cache.

    Raises:
        UsageError: there is no such revision, configuration or split.
        DataError, PermissionDenied: there is no such dataset, it is private, or it has no data files of a known format.
        RemoteError: the Hub cannot be reached, and the dataset is not in the cache.
    """
    if dataset.is_pinned and dataset.split and (dataset.config or dataset.is_own):
        return dataset
    try:
        pinned = replace(dataset, revision=find_commit(dataset))
        return pinned if dataset.is_own else _choose_split(pinned)
    except RemoteError as error:
        if dataset.is_own:
            return dataset  # `datasets` looks into its cache
        cached = _newest_in_cache(dataset)
        if cached is None:
            raise
        print(  # noqa: T201
            f"{dataset.path}: revision {(cached.revision or '')[:12]} of the local cache is read. {error}",
            file=sys.stderr,
        )
        return cached


def find_commit(dataset: HubDataset) -> str:
    """The commit that the revision of a dataset now stands for."""
    if dataset.is_pinned:
        return dataset.revision or ""
    from huggingface_hub import HfApi

    with dataset.explained_errors():
        commit = HfApi().dataset_info(dataset.path, revision=dataset.revision, timeout=TIMEOUT_SECONDS).sha
    return commit or ""


def _choose_split(dataset: HubDataset) -> HubDataset:
    builder = _build(dataset)
    splits = list(map(str, builder.config.data_files or {}))
    split = dataset.split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
    if split not in splits:
        problem = f"no split {split!r}.{did_you_mean(split, splits)}" if split else "no split 'train'."
        raise UsageError(f"{dataset.path} has {problem} Splits: {', '.join(splits)}; choose one with :split=NAME.")
    return replace(dataset, config=builder.config.name, split=split)


def _build(dataset: HubDataset, **options):
    """The builder of `datasets` for a pinned dataset.

    Raises:
        UsageError: there is no such configuration, or several and none is the default.
        DataError: it consists of code, or of files that are neither Parquet, JSON, CSV nor text.
    """
    import datasets

    with dataset.explained_errors():
        try:
            builder = datasets.load_dataset_builder(
                dataset.url, name=dataset.config, revision=dataset.revision, **options
            )
        except ValueError:
            names = datasets.get_dataset_config_names(dataset.url, revision=dataset.revision)
            if dataset.config in names:
                raise
            problem = f"no configuration {dataset.config!r}." if dataset.config else "several configurations."
            hint = did_you_mean(dataset.config, names) if dataset.config else ""
            raise UsageError(
                f"{dataset.path} has {problem}{hint} Choose one, as in {dataset.path}:{names[0]}. "
                f"Configurations: {', '.join(names)}."
            ) from None
    file_format = _file_format(builder)
    if file_format == "cache":  # another revision, because the Hub could not be reached
        raise _not_in_cache(dataset)
    if file_format not in FORMATS:
        raise DataError(
            f"{dataset.path} has files of the format {file_format!r}; only {', '.join(FORMATS)} can be read. Download "
            f"and convert it, or try its Parquet copy: {dataset.path}@{PARQUET_COPY}."
        )
    return builder


def _file_format(builder) -> str:
    return type(builder).__module__.split(".")[-1]


@lru_cache(maxsize=8)
def open_rows(dataset: HubDataset) -> HubRows:
    """The rows of a dataset, which are downloaded unless they are in the cache or streamed.

    Args:
        dataset: must be resolved.

    Raises:
        DataError, PermissionDenied, RemoteError: it cannot be read.
    """
    import datasets

    if not dataset.streaming and (cached := _read_cache(dataset)):
        rows, is_text = cached
        return HubRows(dataset, rows, find_licence(dataset), has_whole_files=is_text)
    options: dict[str, Any] = dict(dataset.files)
    streaming = bool(dataset.streaming)
    if not dataset.is_own:
        builder = _build(dataset)
        if _file_format(builder) == "text":
            options["sample_by"] = "document"  # a row is a file, as in a local folder; by default it is a line
        if dataset.streaming is None:
            streaming = _size_on_hub(dataset, builder.config.data_files[dataset.split]) > STREAM_ABOVE_BYTES
    with dataset.explained_errors():
        rows = datasets.load_dataset(
            path=dataset.url, name=dataset.config, split=dataset.split, revision=dataset.revision, streaming=streaming,
            **options,
        )  # fmt: skip
        if streaming and rows.column_names is None:
            rows = rows._resolve_features()
    if not streaming and dataset.is_pinned:
        _require_commit(dataset, rows)
    return HubRows(dataset, rows, find_licence(dataset), streaming, "sample_by" in options)


def _require_commit(dataset: HubDataset, rows) -> None:
    """Raises RemoteError if `datasets` could not reach the Hub and returned another revision of its cache."""
    if any(dataset.revision not in Path(file["filename"]).parts for file in rows.cache_files):
        raise _not_in_cache(dataset)


def _not_in_cache(dataset: HubDataset) -> RemoteError:
    return RemoteError(
        f"Revision {dataset.revision} of {dataset.path} is not in the local cache, and the Hub cannot be reached: "
        "connect once to download it."
    )


def _size_on_hub(dataset: HubDataset, urls: list[str]) -> int:
    """The bytes of some files of a dataset, named by their URLs."""
    from huggingface_hub import HfApi

    with dataset.explained_errors():
        info = HfApi().dataset_info(
            dataset.path, revision=dataset.revision, files_metadata=True, timeout=TIMEOUT_SECONDS
        )
    prefix = f"hf://datasets/{dataset.path}@{dataset.revision}/"
    wanted = {url.removeprefix(prefix) for url in urls}
    return sum(file.size or 0 for file in info.siblings or [] if file.rfilename in wanted)


# -- the local cache -------------------------------------------------------------------------------------------------


def _cache_folders(dataset: HubDataset) -> Iterator[tuple[Path, dict]]:
    """(folder, dataset_info.json) of what `datasets` has prepared of a dataset: CONFIG/VERSION/COMMIT in its cache."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, name = dataset.path.split("/")
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / f"{owner}___{camelcase_to_snakecase(name)}"
    for file in root.glob("*/*/*/dataset_info.json"):
        folder = file.parent
        if dataset.revision in (None, folder.name) and COMMIT.fullmatch(folder.name):
            info = json.loads(file.read_text(encoding="utf-8"))
            suffix = "-sample_by=document" if info["builder_name"] == "text" else ""
            is_whole = folder.parts[-3] == f"{info['config_name']}{suffix}"  # other suffixes: other files or settings
            splits = info.get("splits") or {}
            if is_whole and dataset.config in (None, info["config_name"]) and dataset.split in (None, *splits):
                yield folder, info


def _newest_in_cache(dataset: HubDataset) -> HubDataset | None:
    """The revision of a dataset that was prepared last; None if there is none, or if another one is asked for."""
    folders = sorted(_cache_folders(dataset), key=lambda entry: entry[0].stat().st_mtime)
    if not folders:
        return None
    folder, info = folders[-1]
    splits = list(info["splits"])
    split = dataset.split or ("train" if "train" in splits else splits[0])
    return replace(dataset, config=info["config_name"], split=split, revision=folder.name)


def _read_cache(dataset: HubDataset) -> tuple[Any, bool] | None:
    """The prepared rows of exactly this commit, and whether they are whole text files. Needs no network."""
    from datasets.packaged_modules.cache.cache import Cache

    if dataset.is_own or not dataset.is_pinned:
        return None
    for folder, info in _cache_folders(dataset):
        config_id, version, commit = folder.parts[-3:]
        builder = Cache(
            dataset_name=info["dataset_name"], config_name=config_id, version=version, hash=commit,
            repo_id=dataset.path,
        )  # fmt: skip
        return builder.as_dataset(split=dataset.split), info["builder_name"] == "text"
    return None


def find_licence(dataset: HubDataset) -> str:
    """The licence in the metadata of a dataset's card, as `datasets` has downloaded it; "unstated" if there is none."""
    from huggingface_hub import DatasetCard, try_to_load_from_cache

    card = try_to_load_from_cache(dataset.path, "README.md", revision=dataset.revision, repo_type="dataset")
    if not isinstance(card, str):
        return "unstated: the dataset has no card"
    try:
        metadata = DatasetCard.load(card).data.to_dict()
    except (ValueError, OSError):
        return "unstated: the metadata of the dataset's card cannot be read"
    licences = metadata.get("license") or []
    names = [str(name) for name in ([licences] if isinstance(licences, str) else licences) if str(name) != "unknown"]
    if not names:
        return "unstated: the dataset's card names no licence"
    if "other" in names and metadata.get("license_name"):
        names[names.index("other")] = str(metadata["license_name"])
    is_restricted = any(re.search(r"(^|-)nc(-|$)", name.lower()) for name in names)
    return ", ".join(names) + (" (not for commercial use)" if is_restricted else "")
