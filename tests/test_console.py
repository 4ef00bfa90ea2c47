"""What the libraries print while a command runs."""

import os
import subprocess
import sys

import pytest

from rorchat.console import quiet_libraries, shows_bars

TRAINING = "import rorchat.training.train_and_save, rorchat.training.dpo"


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_importing_training_has_no_side_effects():
    run_python(
        "import logging, os, warnings\nos.environ.pop('TQDM_DISABLE', None)\n"
        f"{TRAINING}\n"
        "assert 'TQDM_DISABLE' not in os.environ\n"
        "assert logging.getLogger('bitsandbytes').level == logging.NOTSET\n"
        "assert not any('gradient_checkpointing' in str(entry[1]) for entry in warnings.filters)\n"
    )


def test_after_configure_libraries_the_imports_print_nothing():
    result = run_python(f"from rorchat.console import configure_libraries; configure_libraries(); {TRAINING}")
    assert (result.stdout, result.stderr) == ("", "")


def test_progress_bars_are_off_unless_stderr_is_a_terminal():
    result = run_python(
        "import os\nos.environ.pop('TQDM_DISABLE', None)\n"
        "from rorchat.console import configure_libraries\nconfigure_libraries()\n"
        "import tqdm; print(tqdm.tqdm(range(2)).disable)"
    )
    assert result.stdout == "True\n"


def test_bars_are_shown_on_a_terminal_and_in_a_notebook_unless_tqdm_is_disabled(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel.kernelapp", raising=False)
    assert not shows_bars()
    from ipykernel.kernelapp import IPKernelApp

    assert not shows_bars()  # imported, but no kernel runs
    monkeypatch.setattr(IPKernelApp, "initialized", lambda: True)
    assert shows_bars()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not shows_bars()


def test_a_function_call_leaves_bars_of_its_caller_on():
    """As the first test shows, importing the training changes nothing that tqdm reads on import."""
    result = run_python(
        "import os\nos.environ.pop('TQDM_DISABLE', None)\n"
        "from rorchat.console import quiet_libraries\n"
        "with quiet_libraries(): import tqdm\n"
        "print(tqdm.tqdm(range(2)).disable)"
    )
    assert result.stdout == "False\n"


def test_an_error_restores_the_environment_too(monkeypatch):
    monkeypatch.setenv("CHANGED", "before")
    monkeypatch.setenv("REMOVED", "before")
    with pytest.raises(ValueError), quiet_libraries():
        os.environ["CHANGED"] = os.environ["ADDED"] = "during"
        del os.environ["REMOVED"]
        raise ValueError
    assert (os.environ["CHANGED"], os.environ["REMOVED"], "ADDED" in os.environ) == ("before", "before", False)
