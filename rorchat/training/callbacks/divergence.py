"""Detects a non-finite loss or gradient norm before the optimizer step."""

import math
import sys
from collections.abc import Callable

from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from rorchat.errors import DivergedError
from rorchat.training.callbacks.metrics import MetricsCallback
from rorchat.training.distributed import any_rank

DIVERGED_ROWS = "diverged_rows.jsonl"


class DivergenceCallback(TrainerCallback):
    """Checks loss and gradient norm of every step. If one is not finite, the run skips the step, rolls back or ends.

    All processes make the same decision: a non-finite loss on any process counts, and the gradient norm is global. On a
    GPU, the check synchronizes with the host once per optimizer step. Under fp16, infinite gradients are not an error:
    the gradient scaler skips the step and reduces its scale, which is counted as `skipped_steps`.

    Args:
        metrics: records the event in metrics.jsonl.
        handle_divergence: called with the number of the step; prepares the run to continue and returns what was done,
            such as "skipped", or "" if the run must end.

    Raises:
        DivergedError: in `on_pre_optimizer_step`, on every process.
    """

    def __init__(self, metrics: MetricsCallback, handle_divergence: Callable[[int], str] = lambda step: ""):
        self.metrics, self.handle_divergence = metrics, handle_divergence
        self.step = 0
        self.loss: Tensor | float = 0.0
        self.grad_norm: Tensor | float | None = None
        self.last_finite: tuple[int, float] | None = None  # (step, loss)

    def record_loss(self, step: int, loss: Tensor) -> None:
        """Adds the detached loss of a micro-batch. The loss of a step is their sum, as in Trainer."""
        self.step = step
        self.loss = self.loss + (loss.item() if loss.device.type == "cpu" else loss)

    def record_grad_norm(self, grad_norm: Tensor | float | None) -> None:
        """Sets the gradient norm of a step before clipping; None if it was not computed."""
        self.grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # sharded under FSDP

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        loss = float(self.loss)
        grad_norm = None if args.fp16 or self.grad_norm is None else float(self.grad_norm)
        self.loss, self.grad_norm = 0.0, None
        is_finite = math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))
        if not any_rank(not is_finite)[0]:
            self.last_finite = self.step, loss
            return
        action = self.handle_divergence(self.step)
        values: dict[str, object] = {"loss": loss}
        if grad_norm is not None:
            values["grad_norm"] = grad_norm
        if self.last_finite:
            values["last_finite_loss"] = self.last_finite[1]
        metrics = self.metrics
        shares = metrics.mixture_shares(self.step - 1, self.step) if metrics.mixture_shares else {}
        if shares:
            values["mixture"] = shares
        metrics.record_event(self.step, action or "diverged", **values)
        message = self._describe(loss, grad_norm, shares)
        if not action:
            metrics.close()
            raise DivergedError(
                f"{message} Inspect the rows of that step, or lower learning_rate (and matrix_learning_rate with muon) "
                "in a new output_dir. Run the same command again to resume from the last checkpoint."
            )
        if metrics.is_main_process:
            tqdm.write(f"{message} {action.capitalize()}: see {DIVERGED_ROWS} for its rows.", file=sys.stderr)

    def _describe(self, loss: float, grad_norm: float | None, shares: dict[str, float]) -> str:
        what = f"The loss is {loss}"
        if math.isfinite(loss):
            what = f"The loss is {loss:.4f} but the gradient norm is {grad_norm}"
        sources = ", ".join(name for name, share in shares.items() if share)
        rows = f", with rows from {sources}" if shares else ""
        before = ""
        if self.last_finite:
            before = f"; the last finite loss was {self.last_finite[1]:.4f} at step {self.last_finite[0]}"
        return f"{what} at step {self.step}{rows}{before}."
