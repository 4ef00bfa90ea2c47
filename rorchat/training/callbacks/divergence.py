"""Stops or repairs a run whose loss or gradient norm is not finite, before the optimizer steps."""

import math
import sys
from collections.abc import Callable

from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from rorchat.errors import DivergedError
from rorchat.jsonl import append_json_line
from rorchat.training.callbacks.metrics import MetricsCallback
from rorchat.training.distributed import any_rank

DIVERGED_ROWS = "diverged_rows.jsonl"


class DivergenceCallback(TrainerCallback):
    """Sees a loss or gradient norm that is no number before the optimizer does: at its step, with its value and rows.

    All processes see it alike: each has its own loss, and the gradient norm of all. On a GPU this waits for the step's
    gradients, once an optimizer step. Under fp16 an infinite gradient is no failure: the scaler skips that step and
    halves its scale, which `skipped_steps` counts.

    Args:
        metrics: where a line says what was seen.
        mend: makes good a step that has diverged, so that the run can go on, and says how; "" where it cannot.

    Raises:
        DivergedError: from the step's callbacks, on every process.
    """

    def __init__(self, metrics: MetricsCallback, drop_partial_line: Callable[[int], str] = lambda step: ""):
        self.metrics, self.mend = metrics, drop_partial_line
        self.step, self.loss, self.norm = 0, 0.0, None
        self.finite: tuple[int, float] | None = None

    def see(self, step: int, loss: Tensor) -> None:
        """Takes the loss of a micro-batch of a step, detached; a step's is their sum, as in the Trainer."""
        self.step = step
        self.loss = self.loss + (loss.item() if loss.device.type == "cpu" else loss)

    def see_norm(self, norm: Tensor | float | None) -> None:
        """Takes the norm of a step's gradients before they are clipped; None where nobody computed it."""
        self.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP's, on every process

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        loss, norm = float(self.loss), None if args.fp16 or self.norm is None else float(self.norm)
        self.loss, self.norm = 0.0, None
        is_finite = math.isfinite(loss) and (norm is None or math.isfinite(norm))
        if not any_rank(not is_finite)[0]:
            self.finite = self.step, loss
            return
        metrics, step = self.metrics, self.step
        done = self.mend(step)
        record = {"step": step, "event": done or "diverged", "tokens": metrics.count_tokens(step), "loss": loss}
        if norm is not None:
            record["grad_norm"] = norm
        if self.finite:
            record["last_finite_loss"] = self.finite[1]
        shares = metrics.mixture(step - 1, step) if metrics.mixture else {}
        if shares:
            record["mixture"] = shares
        if metrics.is_first:
            append_json_line(metrics.path, record | metrics.spent())
        said = self._said(step, loss, norm, shares)
        if not done:
            metrics.close()
            raise DivergedError(
                f"{said} Look at the rows of that step, or lower learning_rate (and matrix_learning_rate with muon) "
                "in a new output_dir; the same command goes on from the last checkpoint, if there is one."
            )
        if metrics.is_first:
            tqdm.write(f"{said} {done.capitalize()}: {DIVERGED_ROWS} has its rows.", file=sys.stderr)

    def _said(self, step: int, loss: float, norm: float | None, shares: dict[str, float]) -> str:
        what = (
            f"The loss is {loss}" if not math.isfinite(loss) else f"The loss is {loss:.4f} but the gradient norm {norm}"
        )
        rows = f", whose rows are of {', '.join(name for name, share in shares.items() if share)}" if shares else ""
        before = f"; the last finite loss was {self.finite[1]:.4f} at step {self.finite[0]}" if self.finite else ""
        return f"{what} at step {step}{rows}{before}."
