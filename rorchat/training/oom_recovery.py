"""Memory that runs out in a step: its micro-batches are divided and the step is done again, on the same rows.

Transformers' `auto_find_batch_size` starts the whole run anew with a smaller batch, and so with smaller steps.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import Trainer

from rorchat.errors import Interrupted, UsageError
from rorchat.files import write_atomically

MICRO_BATCH = "micro_batch.json"  # what fits, so that a run that goes on need not find out again


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


class OOMRecoveryMixin(Trainer):
    """A Trainer whose step, when memory runs out in it, is done again in micro-batches of half the rows.

    The samples of the step, their order and the sum of their losses stay; sums are formed in another order. `remember`
    must be called before it trains.
    """

    def remember(self, folder: Path) -> None:
        """Keeps how many rows fit in a file of the run's folder, and begins with what it says."""
        self._micro_batch = folder / MICRO_BATCH
        self.micro_batch_rows = self.args.per_device_train_batch_size
        try:
            rows = int(json.loads(self._micro_batch.read_text())["rows"])
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or none any more: it is found out again
            return
        if 0 < rows < self.micro_batch_rows:
            self.micro_batch_rows = rows
            if self.is_world_process_zero():
                print(f"{rows} rows at a time, which is what {self._micro_batch} says did fit", file=sys.stderr)  # noqa: T201

    def micro_step(self, model, inputs: dict[str, Tensor], num_items_in_batch) -> Tensor:
        """Forward and backward of a micro-batch or a part of one; its loss, detached."""
        return super().training_step(model, inputs, num_items_in_batch)

    def divided(self, inputs: dict[str, Tensor], rows: int) -> Sequence[dict[str, Tensor]]:
        """A micro-batch in parts of at most so many rows."""
        split = {name: tensor.split(rows) for name, tensor in inputs.items()}
        return [dict(zip(split, part, strict=True)) for part in zip(*split.values(), strict=True)]

    def ran_out(self, step: int, rows: int) -> None:
        """Tells that from a step on micro-batches have so many rows."""

    def get_batch_samples(self, *args, **kwargs):
        found = super().get_batch_samples(*args, **kwargs)
        self._micro_batches, self._reached = found[0], 0
        return found

    def training_step(self, model, inputs, num_items_in_batch=None):
        earlier, self._reached = self._micro_batches[: self._reached], self._reached + 1
        to_do = [inputs]
        while True:
            try:
                return [self._in_parts(model, each, num_items_in_batch) for each in to_do][-1]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # not above, where the traceback holds on to what did not fit
            self._halve()
            model.zero_grad()
            to_do = [*earlier, inputs]  # whose gradients had a part of this one's added

    def _in_parts(self, model, inputs: dict[str, Tensor], num_items_in_batch) -> Tensor:
        if self.micro_batch_rows >= self.args.per_device_train_batch_size:
            return self.micro_step(model, inputs, num_items_in_batch)
        steps, losses = self.current_gradient_accumulation_steps, []
        for part in self.divided(inputs, self.micro_batch_rows):
            share = len(next(iter(part.values()))) / len(next(iter(inputs.values())))
            self.current_gradient_accumulation_steps = steps / share  # by which a loss is divided that is a mean
            losses.append(self.micro_step(model, part, num_items_in_batch))
        self.current_gradient_accumulation_steps = steps
        return torch.stack(losses).sum()

    def _halve(self) -> None:
        """Makes micro-batches smaller.

        Raises:
            UsageError: one row does not fit.
            Interrupted: there are other processes, who have their part of this step behind them.
        """
        step, before = self.state.global_step + 1, self.micro_batch_rows
        if before == 1:
            raise UsageError(
                f"Out of memory at step {step} with one row at a time: give a smaller model, shorter rows (block_size, "
                "max_length), or --gradient_checkpointing true."
            )
        self.micro_batch_rows = before // 2
        write_atomically(self._micro_batch, json.dumps({"rows": self.micro_batch_rows}))
        if self.args.world_size > 1:
            raise Interrupted(
                f"Out of memory at step {step} with micro-batches of {before}: the same command goes on from the last "
                f"checkpoint with {self.micro_batch_rows}."
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.ran_out(step, self.micro_batch_rows)
