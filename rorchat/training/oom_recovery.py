"""Recovers from running out of memory in a step: the step is repeated on the same rows with smaller micro-batches.

Transformers' `auto_find_batch_size` restarts the whole run with a smaller batch, and so with other training steps.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import GPT2LMHeadModel, Trainer

from rorchat.errors import Interrupted, UsageError
from rorchat.files import to_json, write_atomically
from rorchat.training.arguments import StageArguments

MICRO_BATCH_FILE = "micro_batch.json"  # the size that fits, so that a resumed run need not search again
Batch = dict[str, Tensor]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host could not allocate a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


class OOMRecoveryMixin(Trainer):
    """A Trainer that halves its micro-batches when a step runs out of memory, and repeats the step.

    The samples of the step, their order and the total of their losses stay the same; floating-point sums are formed in
    another order. The micro-batch size that fits is stored in the folder of the run and used by the next start.
    """

    args: StageArguments
    model: GPT2LMHeadModel

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._micro_batch_file = Path(self.args.output_dir) / MICRO_BATCH_FILE
        self.micro_batch_rows = self.args.per_device_train_batch_size
        try:
            rows = int(json.loads(self._micro_batch_file.read_text(encoding="utf-8"))["rows"])
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: search again
            return
        if 0 < rows < self.micro_batch_rows:
            self.micro_batch_rows = rows
            if self.is_world_process_zero():
                print(f"micro-batches of {rows} rows, which fit before ({self._micro_batch_file})", file=sys.stderr)  # noqa: T201

    def split_batch(self, inputs: Batch, rows: int) -> Sequence[Batch]:
        """A micro-batch in parts of at most `rows` rows."""
        split = {name: tensor.split(rows) for name, tensor in inputs.items()}
        return [dict(zip(split, part, strict=True)) for part in zip(*split.values(), strict=True)]

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._micro_batches, self._position = batches, 0  # of this optimizer step
        return batches, num_items

    def forward_backward(self, model, inputs: Batch, num_items_in_batch) -> Tensor:
        """Computes the gradients of a micro-batch, or of a part of one; returns its detached loss."""
        return super().training_step(model, inputs, num_items_in_batch)

    def training_step(self, model, inputs, num_items_in_batch=None):
        return self.retry_on_oom(lambda batch: self.forward_backward(model, batch, num_items_in_batch), inputs)

    def retry_on_oom(self, step_fn: Callable[[Batch], Tensor], inputs: Batch) -> Tensor:
        """Calls `step_fn` (forward and backward) on a micro-batch, or on smaller parts of it if memory runs out.

        When memory runs out, the gradients of the failed micro-batch are partly added to those of the earlier ones. So
        all of them are dropped, and the earlier micro-batches of the optimizer step are computed again.

        Returns:
            The loss of the micro-batch, detached.
        """
        earlier, self._position = self._micro_batches[: self._position], self._position + 1
        pending = [inputs]
        while True:
            try:
                return [self._step_in_parts(step_fn, batch) for batch in pending][-1]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # outside of the handler, whose traceback keeps the tensors that did not fit
            self.halve_micro_batch()
            self.model.zero_grad()
            pending = [*earlier, inputs]

    def _step_in_parts(self, step_fn: Callable[[Batch], Tensor], inputs: Batch) -> Tensor:
        if self.micro_batch_rows >= self.args.per_device_train_batch_size:
            return step_fn(inputs)
        steps, losses = self.current_gradient_accumulation_steps, []
        try:
            for part in self.split_batch(inputs, self.micro_batch_rows):
                share = len(next(iter(part.values()))) / len(next(iter(inputs.values())))
                # the divisor of a loss that is a mean over rows, which the Trainer keeps as an integer
                self.current_gradient_accumulation_steps = steps / share  # type: ignore[assignment]
                losses.append(step_fn(part))
        finally:  # also if memory runs out again
            self.current_gradient_accumulation_steps = steps
        return torch.stack(losses).sum()

    def halve_micro_batch(self) -> None:
        """Halves the micro-batches from this step on.

        Raises:
            UsageError: a single row does not fit.
            Interrupted: there are several processes. The others cannot repeat the step, so the run must be restarted.
        """
        step, rows_before = self.state.global_step + 1, self.micro_batch_rows
        if rows_before == 1:
            raise UsageError(
                f"Out of memory at step {step} with micro-batches of one row: use a smaller model, shorter rows "
                "(block_size, max_length), or --gradient_checkpointing true."
            )
        self.micro_batch_rows = rows_before // 2
        write_atomically(self._micro_batch_file, to_json({"rows": self.micro_batch_rows}))
        if self.args.world_size > 1:
            raise Interrupted(
                f"Out of memory at step {step} with micro-batches of {rows_before} rows. Run the same command again to "
                f"resume from the last checkpoint with {self.micro_batch_rows}."
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
