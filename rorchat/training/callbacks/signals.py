"""Saves a checkpoint on SIGTERM, SIGINT, when the launcher ends, or when a file SAVE appears in the run's folder."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback

from rorchat.console import is_interactive
from rorchat.errors import WITHIN_PROJECT, Interrupted
from rorchat.training.distributed import any_rank, sharding_strategy
from rorchat.training.launcher import (
    PARENT_ENDED,
    find_waiting_parent,
    follow,
    get_parent_signal,
    set_parent_signal,
    warn_about_deaf_parent,
)

SAVE_FILE = "SAVE"
REPEAT_SECONDS = 1.0  # launchers forward a signal, so that the same one may arrive twice within this time


class SignalCallback(TrainerCallback):
    """Saves a checkpoint at the end of the step, and stops after it if a signal was received. All processes agree."""

    active: "SignalCallback | None" = None  # of the run that trains in this process, for the signal handlers
    stop_asked = False  # whether a signal came outside of training

    def __init__(self, folder: Path):
        self.save_file = folder / SAVE_FILE
        self.received: int | None = None
        self.received_at = 0.0
        self.stopping = False

    def receive(self, number: int) -> None:
        """Records the first signal. A second one ends the process at once, but not that of an ended parent.

        Raises:
            KeyboardInterrupt: for a second signal in a notebook or at Python's prompt, instead of ending the process.
        """
        if self.received in (None, PARENT_ENDED):
            self.received, self.received_at = number, time.monotonic()
            repeat = "" if number == PARENT_ENDED else "; send it again to stop at once"
            message = f"{_describe(number)}: saving a checkpoint after this step{repeat}"
            if os.isatty(2):
                _write(message)  # until `on_train_end`: one line remains, which says how the run ended
            else:
                _write_line(message)
        elif number != PARENT_ENDED and time.monotonic() - self.received_at > REPEAT_SECONDS:
            if is_interactive():
                raise KeyboardInterrupt
            os._exit(128 + number)

    def on_train_begin(self, args, state, control, **kwargs):
        SignalCallback.stop_if_asked()
        SignalCallback.active = self

    @classmethod
    def stop_if_asked(cls) -> None:
        """Ends the process if a signal came outside of training.

        The handler has tried so before, but Python ignores an exception that is raised while it runs the callback of a
        weak reference or a finalizer.
        """
        if cls.stop_asked:
            raise SystemExit(Interrupted.exit_code)  # not an Exception, which a library might catch

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
            _write("\r\x1b[K")  # clears the line


def _write_line(message: str) -> None:
    """Writes a line to stderr, unless `rorchat run` reports the stop itself."""
    if not os.environ.get(WITHIN_PROJECT):
        _write(f"{message}\n")


def _write(text: str) -> None:
    """Writes to stderr in a signal handler, where print is not safe. An exception there would end the run."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


@contextmanager
def handle_signals() -> Iterator[None]:
    """Handles SIGTERM, SIGINT and the end of a launcher: during training after the current step, otherwise at once.

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
        if number == PARENT_ENDED:
            _discard_unread_output()
        if SignalCallback.active is None:
            _write_line(f"error: {_describe(number)} outside of training. Run the same command to resume.")
            SignalCallback.stop_asked = True
            SignalCallback.stop_if_asked()
        else:
            SignalCallback.active.receive(number)

    parent, parent_signal = find_waiting_parent(), get_parent_signal()  # before a handler replaces an ignored SIGINT
    if warning := warn_about_deaf_parent(parent):
        print(warning, file=sys.stderr)  # noqa: T201
    follows = parent is not None or parent_signal == PARENT_ENDED
    numbers = [signal.SIGTERM, signal.SIGINT, *([PARENT_ENDED] if follows else [])]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        follow(parent)
        yield
        SignalCallback.stop_if_asked()
    finally:
        SignalCallback.active, SignalCallback.stop_asked = None, False
        set_parent_signal(parent_signal)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _describe(number: int) -> str:
    return "the process that started this one has ended" if number == PARENT_ENDED else signal.Signals(number).name


def _discard_unread_output() -> None:
    """Sends stdout and stderr to the null device if the process that has ended read them, or its terminal is gone.

    Otherwise the next progress line would raise BrokenPipeError, and the run would end without a checkpoint.
    """
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    unread = [stream for stream, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    if unread:
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in unread:
            os.dup2(null, stream)
        os.close(null)
