"""Which errors of the Hub's client are remote, and what they say."""

import errno
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import RepoUrl
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from rorchat.errors import PermissionDenied, RemoteError
from rorchat.hub_client import describe, explain_failed_load, is_denied, is_remote


def fail_in_client() -> Exception:
    """An error that the client raises because an answer has another form."""
    try:
        RepoUrl(None)
    except Exception as error:
        return error
    raise AssertionError("the client accepts anything")


def answered(status: int) -> HfHubHTTPError:
    request = httpx2.Request("GET", "http://mirror/api/models/me/x")
    return HfHubHTTPError(f"{status} Client Error", response=httpx2.Response(status, request=request))


REMOTE = {
    "no route": httpx2.ConnectError("no route"),
    "a port that is no number": httpx2.InvalidURL("Invalid port: 'abc'"),
    "a proxy without its package": ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."),
    "a page of a proxy": ValueError("Expecting value: line 1"),
    "an answer of another form": fail_in_client(),
    "an error of the server": answered(500),
}
LOCAL = {
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "a missing package": ImportError("No module named 'peft'"),
    "a bug": KeyError("a bug of ours"),
}


@pytest.mark.parametrize("error", REMOTE.values(), ids=REMOTE)
def test_errors_of_the_network_and_of_mirrors_are_remote(error):
    assert is_remote(error)
    explained = explain_failed_load("a tokenizer", "me/x", error)
    assert type(explained) is RemoteError and explained.exit_code == 76
    assert "'me/x'" in str(explained) and describe(error) in str(explained) and "\n" not in str(explained)


@pytest.mark.parametrize("error", LOCAL.values(), ids=LOCAL)
def test_other_errors_are_not_remote(error):
    assert not is_remote(error)
    with pytest.raises(type(error)):
        explain_failed_load("a tokenizer", "me/x", error)


@pytest.mark.parametrize("error", [answered(401), answered(403), LocalTokenNotFoundError("no token")], ids=repr)
def test_a_refused_login_is_denied_also_if_libraries_wrap_it(error):
    wrapped = OSError("me/x is not a local folder")
    wrapped.__cause__ = error
    assert is_denied(wrapped)
    explained = explain_failed_load("a model", "me/x", wrapped)
    assert type(explained) is PermissionDenied and "hf auth login" in str(explained)


def test_the_words_of_the_hub_come_first():
    error = SimpleNamespace(response=SimpleNamespace(status_code=402), server_message="Storage is full.")
    assert describe(error) == "402, Storage is full"
