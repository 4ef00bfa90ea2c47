"""Errors become one line on stderr and an exit code."""

import errno

import pytest

from rorchat.errors import (
    DataError,
    MismatchError,
    PermissionDenied,
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
        (OSError(errno.ENOSPC, "No space left", "run"), StorageError.exit_code, "error: run: no space left; free some"),
        (PermissionError(errno.EACCES, "Denied", "run"), PermissionDenied.exit_code, "error: run: denied; choose"),
    ],
    ids=["data", "interrupt", "disk full", "permission"],
)
def test_errors_exit_with_their_code_and_one_line(error, code, line, capsys):
    assert run_failing(error) == code
    stderr = capsys.readouterr().err
    assert stderr.startswith(line) and stderr.count("\n") == 1


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
