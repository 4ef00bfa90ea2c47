"""What rorchat and the libraries print while a command or a function runs."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

#: Loggers whose warnings mean nothing to a user: on a CPU, bitsandbytes reports a missing 4-bit kernel, which nothing
#: here uses; the Trainer reports differences to a checkpoint that the run folder has checked.
SILENCED_LOGGERS = ("bitsandbytes", "transformers.trainer", "transformers.trainer_utils")


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. A program that has only imported ipykernel is none."""
    kernel = sys.modules.get("ipykernel.kernelapp")
    return kernel is not None and kernel.IPKernelApp.initialized()


def is_interactive() -> bool:
    """Whether a person works in this process, in a notebook or at Python's prompt: ending it would lose variables."""
    return in_notebook() or "ps1" in vars(sys)


def shows_bars() -> bool:
    """Whether progress bars are shown: on a terminal and in a notebook. A log has lines instead."""
    return (sys.stderr.isatty() or in_notebook()) and not os.environ.get("TQDM_DISABLE")


def silence_warnings() -> None:
    """Silences warnings of libraries that mean nothing to a user."""
    for name in SILENCED_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # transformers 5.23 deprecates field names that TRL 1.16 still uses
    warnings.filterwarnings("ignore", message=r".*gradient_checkpointing.*deprecated", category=FutureWarning)


def configure_libraries() -> None:
    """Silences messages and progress bars that mean nothing to a user of a command, until the process ends.

    Commands and recipes call this before they import torch, transformers or TRL, some of which print while they are
    imported or read their settings only then.
    """
    silence_warnings()
    # datasets logs what its exceptions say as well
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    if not shows_bars():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars belong on a terminal; a log has lines


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences the same warnings during a function call, and leaves the process as it was.

    Progress bars are not turned off: tqdm reads TQDM_DISABLE once, when it is imported, so that it would hold for all
    later bars of the caller as well. Libraries and training stages set environment variables, which would change the
    next run in the same process; they are restored too.
    """
    environment = dict(os.environ)
    levels = {name: logging.getLogger(name).level for name in SILENCED_LOGGERS}
    with warnings.catch_warnings():
        silence_warnings()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
