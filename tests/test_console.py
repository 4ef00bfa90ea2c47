"""What the libraries print while a command runs."""

import subprocess
import sys

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
