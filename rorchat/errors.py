"""Errors with a message for the user and an exit code.

Every error that a user can cause is a `RorchatError`. Its message is one line: the problem, what is allowed, what to do
next. Commands print it and exit with its code. Any other exception is a bug and keeps its traceback.
"""

import difflib
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable


class RorchatError(Exception):
    """An error with a one-line message and an exit code (as in BSD sysexits.h)."""

    exit_code = 1


class UsageError(RorchatError):
    """The command or its configuration is wrong."""

    exit_code = 2


class DataError(RorchatError):
    """The data cannot be used: missing, empty or malformed."""

    exit_code = 65


class DivergedError(RorchatError):
    """Training has diverged: the loss or the gradient norm is not finite."""

    exit_code = 70


class StorageError(RorchatError):
    """The disk is full or cannot be written."""

    exit_code = 74


class Interrupted(RorchatError):
    """A signal stopped the run. The same command resumes it."""

    exit_code = 75


class RemoteError(RorchatError):
    """A remote service (the Hub) failed."""

    exit_code = 76


class PermissionRefused(RorchatError):
    """A remote service or the file system denies permission."""

    exit_code = 77


class MismatchError(RorchatError):
    """Two things do not match: tokenizer and model, config and run folder, block size and context window."""

    exit_code = 78


#: What to do about an OSError, by its errno.
_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose another place, or ask its owner",
    errno.EPERM: "choose another place, or ask its owner",
    errno.EEXIST: "choose another place, or move away what is there",
    errno.ENOTDIR: "a part of this path is a file: choose another place, or move it away",
    errno.EISDIR: "a file is expected there",
    errno.ENOENT: "create it first, or give another path",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'gsm8k'?"`, or an empty string if no known name is similar."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def exits_with_one_line(main: Callable) -> Callable:
    """Decorator for a command's `main` that prints errors as one line on stderr and exits with their code.

    Processes of a distributed run other than the first print their rank, because their errors may differ.
    """

    @functools.wraps(main)
    def command(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except RorchatError as error:
            rank = os.environ.get("RANK", "0")
            prefix = "error" if rank == "0" else f"process {rank}"
            print(f"{prefix}: {error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)
        except OSError as error:
            if error.errno is None and error.filename is None:
                raise
            code = PermissionRefused.exit_code if isinstance(error, PermissionError) else StorageError.exit_code
            where = f"{error.filename}: " if error.filename else ""
            remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
            print(f"error: {where}{str(error.strerror).lower()}{remedy}", file=sys.stderr, flush=True)
            sys.exit(code)

    return command
