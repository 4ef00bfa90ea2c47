"""Exceptions with a one-line message and an exit code.

Every error that a user can cause is a `RorchatError`. Its message states the problem, the allowed values and what to do
next. Commands print the message and exit with the code. Any other exception is a bug and keeps its traceback.
"""

import difflib
import errno
import functools
import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import TextIO

#: The environment variable that `rorchat run` sets for the commands of a project. It runs the next one itself, and says
#: itself that one was stopped.
WITHIN_PROJECT = "RORCHAT_WITHIN_PROJECT"


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
    """The disk is full or not writable."""

    exit_code = 74


class Interrupted(RorchatError):
    """A signal stopped the run. The same command resumes it."""

    exit_code = 75


class StoppedBySignal(Interrupted):
    """A signal stopped the run after it had saved a checkpoint."""


class RemoteError(RorchatError):
    """A remote service (the Hub) failed."""

    exit_code = 76


class PermissionDenied(RorchatError):
    """A remote service or the file system denied permission."""

    exit_code = 77


class MismatchError(RorchatError):
    """Two things do not match: tokenizer and model, config and run folder, block size and context window."""

    exit_code = 78


def check_all(*checks: Callable[[], object]) -> None:
    """Runs all checks, so that a user sees every problem at once.

    Raises:
        RorchatError: the error of the only check that failed, or one UsageError with the messages of several, which
            ends with all of their `Try: --SETTING VALUE`.
    """
    failures = []
    for check in checks:
        try:
            check()
        except RorchatError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        problems, _, advice = zip(*(str(failure).partition(" Try: ") for failure in failures), strict=True)
        settings = " ".join(filter(None, advice))
        raise UsageError(" ".join(problems) + (f" Try: {settings}" if settings else ""))


#: What to do about an OSError, by its errno.
_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EROFS: "choose a writable place",
    errno.EACCES: "choose another place, or ask its owner",
    errno.EPERM: "choose another place, or ask its owner",
    errno.EEXIST: "choose another place, or move the existing file",
    errno.ENOTDIR: "part of this path is a file, not a folder: choose another place, or move the file",
    errno.EISDIR: "this is a folder, but a file is expected",
    errno.ENOENT: "create it first, or give another path",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'gsm8k'?"`, or an empty string if no known name is similar."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def shorten_error(error: BaseException) -> str:
    """The message of a library's exception on one line of at most 200 characters."""
    return textwrap.shorten(str(error), 200, placeholder=" ...")


def exits_with_one_line(main: Callable) -> Callable:
    """Decorates the `main` of a command: prints an error to stderr as one line and exits with its code.

    Characters that the terminal or pipe cannot show are replaced by question marks. In a distributed run, all processes
    except rank 0 print their rank before the message.
    """

    @functools.wraps(main)
    def command(*args, **kwargs):
        _prepare_streams()
        try:
            try:
                return main(*args, **kwargs)
            finally:
                sys.stdout.flush()  # here, because the interpreter's own flush would fail without an explanation
        except RorchatError as error:
            if not (isinstance(error, StoppedBySignal) and os.environ.get(WITHIN_PROJECT)):
                rank = os.environ.get("RANK", "0")
                prefix = "error" if rank == "0" else f"process {rank}"
                _report(f"{prefix}: {error}")
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            if not os.environ.get(WITHIN_PROJECT):
                newline = "\n" if sys.stderr.isatty() else ""  # after the "^C" that it shows
                _report(f"{newline}stopped")
            sys.exit(130)
        except BrokenPipeError:
            _discard_unwritten_output()
            _report("stopped: the reader of the output has ended")
            sys.exit(130)
        except OSError as error:
            if error.errno is None and error.filename is None:
                raise
            _discard_unwritten_output()
            code = PermissionDenied.exit_code if isinstance(error, PermissionError) else StorageError.exit_code
            where = f"{error.filename}: " if error.filename else ""
            remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
            _report(f"error: {where}{str(error.strerror).lower()}{remedy}")
            sys.exit(code)

    return command


def _report(message: str) -> None:
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it
        _discard(sys.stderr)


def _prepare_streams() -> None:
    """Lets any text be printed, also on a stream whose encoding lacks some characters.

    A stream that was closed before the start is None in Python. It becomes the null device, because a file that is
    opened later would get its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if vars(sys)[name] is None:
            vars(sys)[name] = open(os.devnull, mode, encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _discard_unwritten_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)


def _discard(stream: TextIO) -> None:
    """Redirects a broken stream to the null device. Otherwise the interpreter complains about it when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
