"""Saves a checkpoint on SIGTERM, SIGINT, or when a file named SAVE appears in the run's folder."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback

from rorchat.console import is_interactive
from rorchat.errors import WITHIN_PROJECT, Interrupted
from rorchat.training.distributed import any_rank, sharding_strategy

SAVE_FILE = "SAVE"
REPEAT_SECONDS = 1.0  # launchers forward a signal, so that the same one may arrive twice within this time


class SignalCallback(TrainerCallback):
    """Saves a checkpoint at the end of the step, and stops after it if a signal was received. All processes agree."""

    active: "SignalCallback | None" = None  # of the run that trains in this process, for the signal handlers

    def __init__(self, folder: Path):
        self.save_file = folder / SAVE_FILE
        self.received: int | None = None
        self.received_at = 0.0
        self.stopping = False

    def receive(self, number: int) -> None:
        """Records the first signal. A second one ends the process at once.

        Raises:
            KeyboardInterrupt: for a second signal in a notebook or at Python's prompt, instead of ending the process.
        """
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
            name = signal.Signals(number).name
            message = f"{name}: saving a checkpoint after this step; send it again to stop at once"
            if os.isatty(2):
                os.write(2, message.encode())  # until `on_train_end`: one line remains, which says how the run ended
            else:
                _write_line(message)
        elif time.monotonic() - self.received_at > REPEAT_SECONDS:
            if is_interactive():
                raise KeyboardInterrupt
            os._exit(128 + number)

    def on_train_begin(self, args, state, control, **kwargs):
        SignalCallback.active = self

    def on_step_end(self, args, state, control, **kwargs):
        save_requested = state.is_world_process_zero and self.save_file.exists()
        stop, save = any_rank(self.received is not None, save_requested)
        self.stopping = stop
        if stop and sharding_strategy():  # sharded checkpoints are not supported
            control.should_training_stop = True
        elif stop or save:
            control.should_save = True
        if save and state.is_world_process_zero:
            self.save_file.unlink(missing_ok=True)

    def on_save(self, args, state, control, **kwargs):
        if self.stopping:  # not earlier: the checkpoint would contain the flag, and stop the resumed run
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        SignalCallback.active = None
        if self.received is not None and os.isatty(2):
            os.write(2, b"\r\x1b[K")  # clears the line


def _write_line(message: str) -> None:
    """Writes to stderr from a signal handler, where print is not safe. `rorchat run` reports the stop itself."""
    if not os.environ.get(WITHIN_PROJECT):
        os.write(2, f"{message}\n".encode())


@contextmanager
def handle_signals() -> Iterator[None]:
    """Handles SIGTERM and SIGINT: during training after the current step, otherwise at once.

    Raises:
        SystemExit: wherever the process is, when a signal arrives outside of training.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may install handlers
        yield
        return

    process = os.getpid()

    def handle(number: int, frame) -> None:
        if os.getpid() != process:  # a forked worker of a DataLoader, to which a terminal sends Ctrl-C as well
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if SignalCallback.active is None:
            name = signal.Signals(number).name
            _write_line(f"error: {name} outside of training. Run the same command to resume.")
            raise SystemExit(Interrupted.exit_code)  # not an Exception, which a library might catch
        SignalCallback.active.receive(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        SignalCallback.active = None
        for number, handler in previous.items():
            signal.signal(number, handler)
