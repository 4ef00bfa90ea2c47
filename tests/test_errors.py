"""Errors become one line on stderr and an exit code."""

import errno
import io
import os
import sys

import pytest

from rorchat.errors import (
    WITHIN_PROJECT,
    DataError,
    Interrupted,
    MismatchError,
    PermissionDenied,
    StoppedBySignal,
    StorageError,
    UsageError,
    check_all,
    did_you_mean,
    exits_with_one_line,
)


def run_failing(error: BaseException) -> int:
    @exits_with_one_line
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a.txt is empty."), 65, "error: a.txt is empty."),
        (KeyboardInterrupt(), 130, "stopped"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 130, "stopped: the reader of the output has ended"),
        (OSError(errno.ENOSPC, "No space left", "run"), StorageError.exit_code, "error: run: no space left; free some"),
        (PermissionError(errno.EACCES, "Denied", "run"), PermissionDenied.exit_code, "error: run: denied; choose"),
    ],
    ids=["data", "interrupt", "closed pipe", "disk full", "permission"],
)
def test_errors_exit_with_their_code_and_one_line(error, code, line, capsys):
    assert run_failing(error) == code
    stderr = capsys.readouterr().err
    assert stderr.startswith(line) and stderr.count("\n") == 1


def test_a_stop_within_a_project_is_reported_by_rorchat_run_alone(monkeypatch, capsys):
    monkeypatch.setenv(WITHIN_PROJECT, "1")
    assert run_failing(StoppedBySignal("Stopped at step 3.")) == 75
    assert run_failing(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""
    run_failing(Interrupted("Another process has died."))
    assert capsys.readouterr().err == "error: Another process has died.\n"


def print_to(stdout: io.TextIOBase | None, monkeypatch) -> int:
    """Prints a text to this stream and returns the exit code."""

    @exits_with_one_line
    def main():
        print("你好, naïve café")  # noqa: T201

    monkeypatch.setattr(sys, "stdout", stdout)
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "koi8-r"])
def test_characters_that_a_stream_lacks_are_replaced(encoding, monkeypatch):
    content = io.BytesIO()
    assert print_to(io.TextIOWrapper(content, encoding=encoding), monkeypatch) == 0
    assert content.getvalue().decode(encoding).startswith("??, na")


def test_a_reader_that_ends_before_the_last_flush_ends_the_command_with_130(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", encoding="utf-8")
    assert print_to(stream, monkeypatch) == 130
    assert capsys.readouterr().err == "stopped: the reader of the output has ended\n"
    stream.close()  # what was not written goes to the null device, so this does not fail


def test_a_stream_that_was_closed_before_the_start_is_the_null_device(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert print_to(None, monkeypatch) == 0
    assert (sys.stdin.read(), sys.stdout.name) == ("", os.devnull)


def test_other_processes_print_their_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    run_failing(DataError("a.txt is empty."))
    assert capsys.readouterr().err == "process 3: a.txt is empty.\n"


def test_other_exceptions_keep_their_traceback():
    @exits_with_one_line
    def main():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        main()


def test_did_you_mean_suggests_only_similar_names():
    assert did_you_mean("gsm8", ["alpaca", "gsm8k"]) == " Did you mean 'gsm8k'?"
    assert did_you_mean("xyz", ["alpaca", "gsm8k"]) == ""


def test_all_checks_run_and_their_messages_are_joined():
    def fail(error: Exception):
        raise error

    check_all(lambda: None)
    with pytest.raises(MismatchError, match="^one. Try: --a 1$"):
        check_all(lambda: None, lambda: fail(MismatchError("one. Try: --a 1")))
    with pytest.raises(UsageError, match="^one. two. three. Try: --a 1 --c 3$"):
        check_all(
            lambda: fail(MismatchError("one. Try: --a 1")),
            lambda: fail(UsageError("two.")),
            lambda: fail(UsageError("three. Try: --c 3")),
        )
    with pytest.raises(ZeroDivisionError):
        check_all(lambda: fail(UsageError("one.")), lambda: 1 / 0)
