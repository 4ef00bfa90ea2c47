"""What a side did: the tokens it read, the losses it had, and when its optimizer stepped. The same for every side."""

import resource
import time
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
        self.batches: list[torch.Tensor] = []
        self.losses: list[torch.Tensor] = []
        self.optimizer_began: list[float] = []
        self.stepped: list[float] = []
        self.identity: dict[str, object] = {}
        self.attached = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer is not self.attached:
            self.attached = optimizer
            optimizer.register_step_pre_hook(lambda *_: self.optimizer_began.append(now()))
            optimizer.register_step_post_hook(lambda *_: self.stepped.append(now()))

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
        passes, discarded = self.work.passes, self.work.discarded
        # A pass's loss is its share of the step's mean
        of_steps = [float(sum(self.losses[at : at + passes])) for at in range(0, len(self.losses), passes)]
        ends = self.stepped
        optimizer = [end - began for began, end in zip(self.optimizer_began, ends, strict=True)]
        return self.identity | {
            "tokens_sha256": tokens_sha256(self.batches),
            "first_loss": of_steps[0] if first_loss is None else first_loss,
            "last_loss": of_steps[-1],
            "first_step_seconds": ends[0] - self.began,
            "step_seconds": [b - a for a, b in zip(ends, ends[1:], strict=False)][discarded - 1 :],
            "optimizer_seconds": optimizer[discarded:],
            "peak_memory_bytes": peak,
        }
