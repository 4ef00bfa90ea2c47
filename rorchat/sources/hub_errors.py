"""Explains in one line why a dataset of the Hub cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rorchat.errors import DataError, PermissionDenied, RemoteError, RorchatError, UsageError
from rorchat.hub_client import LOG_IN, find_root_cause, list_causes

FORMATS = ("parquet", "json", "csv", "text")
PARQUET_COPY = "refs/convert/parquet"  # the revision with the Hub's own conversion to Parquet


@contextmanager
def explained_errors(dataset: str, revision: str | None, source: str, has_default: bool) -> Iterator[None]:
    """Turns the errors of `datasets` and of its HTTP client into errors of one line.

    Args:
        dataset: OWNER/NAME.
        revision: the revision that is read.
        source: the name of the source that reads it, for advice.
        has_default: whether it is the source's own dataset, so that its name is not one that the user mistyped.

    Raises:
        UsageError: there is no such revision.
        DataError: there is no such dataset, it consists of code, or its files cannot be read.
        PermissionDenied: it is private or gated.
        RemoteError: the Hub does not answer.
    """
    try:
        yield
    except RorchatError:
        raise
    except Exception as error:  # `datasets` does not wrap the errors of its HTTP client: OSError, httpx, and others
        raise _explain(dataset, revision, source, has_default, error) from error


def _explain(dataset: str, revision: str | None, source: str, has_default: bool, error: Exception) -> RorchatError:
    import pyarrow
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(list_causes(error))
    reason = " ".join((str(find_root_cause(error)) or type(error).__name__).split())[:160]
    status = next((cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)), None)

    def is_a(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_a(GatedRepoError) or (is_a(DatasetNotFoundError) and "is a gated dataset" in str(error)):
        from huggingface_hub import constants

        return PermissionDenied(
            f"{dataset} is gated: accept its terms on {constants.ENDPOINT}/datasets/{dataset}, then {LOG_IN}."
        )
    if is_a(RevisionNotFoundError):
        return UsageError(f"{dataset} has no revision {revision!r}: give a branch, a tag or a commit, or omit it.")
    if is_a(RepositoryNotFoundError) and status == 404:
        return DataError(f"There is no dataset {dataset} on the Hub, and no local file or folder of that name.")
    if status in (401, 403):
        return PermissionDenied(
            f"There is no dataset {dataset} on the Hub, or it is private: check the name, or {LOG_IN}."
        )
    if "Dataset scripts are no longer supported" in str(error):
        return DataError(
            f"{dataset} is made by a script, and code of a dataset is never run (there is no trust_remote_code): "
            f"use its Parquet copy, {dataset}@{PARQUET_COPY}, or download and convert it."
        )
    if is_a(EmptyDatasetError, DataFilesNotFoundError):
        return DataError(f"{dataset} has no data files of a known format: {', '.join(FORMATS)} can be read.")
    if is_a(DatasetsError, pyarrow.ArrowException, ValueError) and not is_a(ConnectionError, HfHubHTTPError):
        return DataError(
            f"`datasets` cannot read {dataset} ({reason}). Download its files and give {source}=FOLDER: "
            "then a bad row costs only that row."
        )
    no_path = "" if has_default or Path(dataset).exists() else f" (there is no local path {dataset})"
    return RemoteError(
        f"Cannot read {dataset} from the Hub ({reason}). Check the network, or use a local copy: "
        f"{source}=PATH{no_path}."
    )
