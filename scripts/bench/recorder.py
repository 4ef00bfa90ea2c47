"""Records the tokens that a side read, its losses, and the times of its optimizer steps, alike for every side."""

import resource
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import torch
from material import tokens_sha256
from works import Work


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Recorder:
    """Records one training run.

    A step lasts from the end of one `optimizer.step()` to the end of the next, as hooks of `torch.optim.Optimizer` see
    it. Batches and losses are copied during training and processed afterwards.
    """

    def __init__(self, work: Work, folder: Path):
        self.work, self.folder = work, folder
        self.digest: Callable[[Iterable[torch.Tensor]], str] = tokens_sha256  # of the batches
        self.batches: list[torch.Tensor] = []
        self.losses: list[torch.Tensor] = []
        self.optimizer_starts: list[float] = []
        self.step_ends: list[float] = []
        self.losses_by_step: list[int] = []  # number of losses at the end of each step
        self.side: dict[str, object] = {}
        self.attached = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer is not self.attached:
            self.attached = optimizer
            optimizer.register_step_pre_hook(lambda *_: self.optimizer_starts.append(now()))
            optimizer.register_step_post_hook(lambda *_: self.end_step())

    def end_step(self) -> None:
        self.step_ends.append(now())
        self.losses_by_step.append(len(self.losses))

    def start(self, precision: str, weights_sha256: str, parameters: int) -> None:
        """Start the clock of the first step, just before training; compilation is included."""
        self.side = {"precision": precision, "weights_sha256": weights_sha256, "parameters": parameters}
        self.started = now()

    def add_batch(self, input_ids: torch.Tensor) -> None:
        self.batches.append(input_ids.detach().clone())

    def add_loss(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach().clone())

    def record(self, first_loss: float | None = None) -> dict[str, object]:
        """The measurements of the run.

        Args:
            first_loss: loss of a forward pass without dropout, for a side whose own first loss is not comparable.
        """
        cuda = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        discarded = self.work.discarded
        # the loss of a micro-batch is its share of the mean over the step
        step_losses = [float(sum(self.losses[a:b])) for a, b in pairwise([0, *self.losses_by_step])]
        seconds = [b - a for a, b in pairwise([self.started, *self.step_ends])]
        optimizer = [end - started for started, end in zip(self.optimizer_starts, self.step_ends, strict=True)]
        return self.side | {
            "tokens_sha256": self.digest(self.batches),
            "first_loss": step_losses[0] if first_loss is None else first_loss,
            "last_loss": step_losses[-1],
            "first_step_seconds": seconds[0],
            "step_seconds": seconds[discarded:],
            "optimizer_seconds": optimizer[discarded:],
            "peak_memory_bytes": peak,
        }
