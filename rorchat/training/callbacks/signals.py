"""SIGTERM, SIGINT and a SAVE file: save a checkpoint at the end of the step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback

from rorchat.errors import Interrupted
from rorchat.training.distributed import any_rank, sharding_strategy

SAVE = "SAVE"  # a file of this name in the run's folder asks for a checkpoint

SECOND_SIGNAL = 1.0  # seconds: a launcher passes the first one on, so that it may come twice


class SignalCallback(TrainerCallback):
    """SIGTERM, SIGINT and the file SAVE: a checkpoint at the end of the step, on which all processes agree."""

    training: "SignalCallback | None" = None  # of the run that trains in this process

    def __init__(self, folder: Path):
        self.save_file = folder / SAVE
        self.received: int | None = None
        self.stopping = False
        self.since = 0.0

    def take(self, number: int) -> None:
        """The first signal is acted on between two steps; another one ends the process, wherever it is."""
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            name = signal.Signals(number).name
            said = f"{name}: a checkpoint is saved after this step; another one, a second later, stops at once\n"
            os.write(2, said.encode())  # print is not safe inside a signal
        elif time.monotonic() - self.since > SECOND_SIGNAL:
            os._exit(128 + number)

    def on_train_begin(self, args, state, control, **kwargs):
        SignalCallback.training = self

    def on_step_end(self, args, state, control, **kwargs):
        wants_save = state.is_world_process_zero and self.save_file.exists()
        stop, save = any_rank(self.received is not None, wants_save)
        self.stopping = stop
        if stop and sharding_strategy(args):  # whose checkpoints would be in pieces
            control.should_training_stop = True
        elif stop or save:
            control.should_save = True
        if save and state.is_world_process_zero:
            self.save_file.unlink(missing_ok=True)

    def on_save(self, args, state, control, **kwargs):
        if self.stopping:  # not before: the checkpoint would hold it, and stop whoever goes on from it
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        SignalCallback.training = None


@contextmanager
def handle_signals() -> Iterator[None]:
    """Takes SIGTERM and SIGINT over: they stop a run between two steps, and outside of training at once.

    Raises:
        SystemExit: from wherever the process is, when a signal comes outside of training.
    """
    if threading.current_thread() is not threading.main_thread():  # no other may
        yield
        return

    def take(number: int, frame) -> None:
        if SignalCallback.training is None:
            said = f"error: {signal.Signals(number).name} outside of training: the same command goes on.\n"
            os.write(2, said.encode())
            raise SystemExit(Interrupted.exit_code)  # no Exception, which a library might catch
        SignalCallback.training.take(number)

    before = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        SignalCallback.training = None
        for number, handler in before.items():
            signal.signal(number, handler)
