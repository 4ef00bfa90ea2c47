"""The errors of the Hub's client: which of them are the fault of the Hub or the network, and why, in one line.

`huggingface_hub`, its HTTP client and the libraries above it wrap each other's errors and raise OSError, ValueError,
RuntimeError and others. A proxy without its package is an ImportError, and a mirror that answers with JSON of another
form is a KeyError or TypeError somewhere in the client.
"""

import traceback
from collections.abc import Iterator

from rorchat.errors import PermissionDenied, RemoteError, RorchatError

LOG_IN = "log in with `hf auth login`"
_CLIENTS = {"huggingface_hub", "httpx2", "httpcore2", "hf_xet", "transformers"}


def list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def find_root_cause(error: BaseException) -> BaseException:
    """The first error of those that were stated as the cause. An error in handling another one is not its cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def is_remote(error: BaseException) -> bool:
    """Whether an error is from the Hub or the network. A full disk is an OSError with an errno."""
    import httpx2

    if isinstance(error, OSError):
        return error.errno is None or isinstance(error, (ConnectionError, TimeoutError))
    if isinstance(error, ImportError):
        return "proxy" in str(error).lower()
    if isinstance(error, LookupError | TypeError | AttributeError):
        return _was_raised_by_client(error)
    # RuntimeError: errors of Xet; ValueError: a response that is not from the Hub, such as a page of a proxy
    return isinstance(error, httpx2.HTTPError | httpx2.InvalidURL | RuntimeError | ValueError)


def _was_raised_by_client(error: BaseException) -> bool:
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].partition(".")[0] in _CLIENTS


def is_denied(error: BaseException) -> bool:
    """Whether the Hub has refused access, or there is no login."""
    from huggingface_hub.errors import GatedRepoError, LocalTokenNotFoundError

    denials = (GatedRepoError, LocalTokenNotFoundError, PermissionError)
    return any(find_status(cause) in (401, 403) or isinstance(cause, denials) for cause in list_causes(error))


def find_status(error: BaseException) -> int | None:
    """The status of the HTTP response that an error is about, if there is one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def describe(error: BaseException) -> str:
    """What happened, in at most 200 characters: the Hub's own words, or else the first line of the error."""
    status, message = find_status(error), getattr(error, "server_message", None)
    if status and message:
        text = f"{status}, {message}"
    elif isinstance(error, LookupError | TypeError | AttributeError):
        text = f"the answer is not that of a Hub: {type(error).__name__} {error}"
    else:
        text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")


def explain_failed_load(what: str, name: str, error: Exception) -> RorchatError:
    """The error to raise instead of one that a library raised while it loaded something from the Hub.

    Args:
        what: what was loaded, such as "a tokenizer".
        name: its Hub id.

    Raises:
        Exception: `error` itself, if it is not from the Hub or the network.
    """
    if not is_remote(error):
        raise error
    reason = describe(find_root_cause(error))
    if is_denied(error):
        return PermissionDenied(
            f"Cannot load {what} from {name!r}: there is no such folder, and the Hub denies access ({reason}). Check "
            f"the name, or {LOG_IN}."
        )
    return RemoteError(f"Cannot load {what} from {name!r}: there is no such folder, and the Hub returned: {reason}")
