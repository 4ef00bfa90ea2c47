"""What the libraries print while a command runs."""

import logging
import os
import sys
import warnings


def configure_libraries() -> None:
    """Silences messages and progress bars that mean nothing to a user of a command.

    Commands and recipes call this before they import torch, transformers or TRL, some of which print while they are
    imported or read their settings only then.
    """
    # on a CPU, bitsandbytes warns about a missing 4-bit kernel, which nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers 5.23 deprecates field names that TRL 1.16 still uses
    warnings.filterwarnings("ignore", message=r".*gradient_checkpointing.*deprecated", category=FutureWarning)
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:  # a notebook shows bars
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars belong on a terminal; a log has lines
