"""What a side did: the tokens it read, the losses it had, and when its optimizer stepped. The same for every side."""

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


class Watch:
    """Listens to one training; `record` is what it heard.

    Steps are timed from the end of one `optimizer.step()` to the end of the next, by hooks of `torch.optim.Optimizer`,
    wherever the step is called from. Batches and losses are copied and looked at when all is over.
    """

    def __init__(self, work: Work, folder: Path):
        self.work, self.folder = work, folder
        self.digest: Callable[[Iterable[torch.Tensor]], str] = tokens_sha256  # of what was read
        self.batches: list[torch.Tensor] = []
        self.losses: list[torch.Tensor] = []
        self.optimizer_began: list[float] = []
        self.stepped: list[float] = []
        self.losses_by_step: list[int] = []  # how many losses there had been when it ended
        self.identity: dict[str, object] = {}
        self.attached = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer is not self.attached:
            self.attached = optimizer
            optimizer.register_step_pre_hook(lambda *_: self.optimizer_began.append(now()))
            optimizer.register_step_post_hook(lambda *_: self.ended())

    def ended(self) -> None:
        self.stepped.append(now())
        self.losses_by_step.append(len(self.losses))

    def begins(self, precision: str, weights_sha256: str, parameters: int) -> None:
        """Called just before training: the first step's time counts from here, compilation included."""
        self.identity = {"precision": precision, "weights_sha256": weights_sha256, "parameters": parameters}
        self.began = now()

    def read(self, input_ids: torch.Tensor) -> None:
        self.batches.append(input_ids.detach().clone())

    def lost(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach().clone())

    def record(self, first_loss: float | None = None) -> dict[str, object]:
        """Args:
        first_loss: where the side's own first loss is not comparable (dropout), that of a plain forward pass before it.
        """
        cuda = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        discarded = self.work.discarded
        # A pass's loss is its share of the step's mean
        of_steps = [float(sum(self.losses[a:b])) for a, b in pairwise([0, *self.losses_by_step])]
        seconds = [b - a for a, b in pairwise([self.began, *self.stepped])]
        optimizer = [end - began for began, end in zip(self.optimizer_began, self.stepped, strict=True)]
        return self.identity | {
            "tokens_sha256": self.digest(self.batches),
            "first_loss": of_steps[0] if first_loss is None else first_loss,
            "last_loss": of_steps[-1],
            "first_step_seconds": seconds[0],
            "step_seconds": seconds[discarded:],
            "optimizer_seconds": optimizer[discarded:],
            "peak_memory_bytes": peak,
        }
