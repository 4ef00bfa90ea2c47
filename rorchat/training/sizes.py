"""The numbers of a run that must fit together: rows, batches, tokens, and the size and context window of the model.

The checks name every number that does not fit, and end with one complete set of numbers that does.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.inference.engine import resolve_model_path
from rorchat.model import parse_shape

FITTING_STEPS = 100  # of a suggested run


def read_model_size(model: str, name: str) -> int | None:
    """A size in config.json of a model in a local folder; None if it is not known before the model is loaded."""
    try:
        config = json.loads((Path(resolve_model_path(model)) / "config.json").read_text(encoding="utf-8"))
        return int(config[name])
    except (DataError, OSError, ValueError, KeyError, TypeError):  # reported when the model is loaded
        return None


def check_row_length(name: str, tokens: int | None, model: str) -> None:
    """Raises an error if a setting of a chat stage is not positive or exceeds the context window of the model.

    Raises:
        UsageError, MismatchError.
    """
    if tokens is None:
        return
    if tokens < 1:
        raise UsageError(f"{name} is {tokens}: give a positive number, or omit it.")
    positions = read_model_size(model, "n_positions")
    if positions and tokens > positions:
        raise MismatchError(
            f"{name} is {tokens}, but the model has only {positions} positions. {try_settings({name: positions})}"
        )


def check_batch(arguments, smallest: int = 1) -> None:
    """Raises UsageError unless the sizes of a chat stage's batches are positive.

    Args:
        smallest: rows of the smallest training batch.
    """
    names = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    wrong = [name for name in names if getattr(arguments, name) < 1]
    if wrong:
        fitting = {name: smallest if name == "per_device_train_batch_size" else 1 for name in wrong}
        given = ", ".join(f"{name} {getattr(arguments, name)}" for name in wrong)
        raise UsageError(f"{given}: give positive numbers. {try_settings(fitting)}")


def try_settings(settings: Mapping[str, object]) -> str:
    """The end of a message: settings that fit, as they are written on the command line."""
    return "Try: " + " ".join(f"--{name} {value}" for name, value in settings.items())


@dataclass(frozen=True)
class PretrainingSizes:
    """The sizes of a pretraining run.

    Args:
        size: of a new model; None if training starts from a model.
        n_positions: the context window of the model that training starts from; None if there is none or it is unknown.
        max_steps: takes precedence over `train_tokens` if it is positive.
        processes: each reads `per_device_train_batch_size` rows in a forward pass.
    """

    block_size: int
    per_device_train_batch_size: int
    global_batch_tokens: int
    train_tokens: int
    max_steps: int
    processes: int
    size: str | None = None
    n_positions: int | None = None

    def check(self) -> None:
        """Raises UsageError with all problems, or MismatchError if only the context window of the model is too small.

        The message ends with sizes that fit.
        """
        problems = self.problems()
        if problems:
            kind = MismatchError if self._exceeds_positions() and len(problems) == 1 else UsageError
            raise kind(f"{' '.join(problems)} {try_settings(self.fitting())}")

    def problems(self) -> list[str]:
        """One sentence for each number that does not fit."""
        problems = [self._size_problem()]
        for name in ("global_batch_tokens", "per_device_train_batch_size"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}: give a positive number.")
        if self.block_size < 2:
            problems.append(f"block_size is {self.block_size}: a row needs at least 2 tokens.")
        if self._exceeds_positions():
            problems.append(f"block_size is {self.block_size}, but the model has only {self.n_positions} positions.")
        tokens_per_pass = self.block_size * self.per_device_train_batch_size * self.processes
        if tokens_per_pass > 0 and self.global_batch_tokens > 0 and self.global_batch_tokens % tokens_per_pass:
            problems.append(
                f"global_batch_tokens {self.global_batch_tokens:,} is not a multiple of block_size {self.block_size} x "
                f"per_device_train_batch_size {self.per_device_train_batch_size} x {self.processes} processes = "
                f"{tokens_per_pass:,}."
            )
        if self.max_steps <= 0 and self.train_tokens <= 0:
            problems.append("The length of the run is missing: give train_tokens or max_steps.")
        elif self.max_steps <= 0 and self.train_tokens < self.global_batch_tokens:
            problems.append(
                f"train_tokens is {self.train_tokens:,}, less than one step of {self.global_batch_tokens:,} tokens."
            )
        return [problem for problem in problems if problem]

    def fitting(self) -> dict[str, object]:
        """The nearest sizes that fit; a step is made smaller if `train_tokens` does not suffice for one."""
        block_size = max(2, self.block_size)
        if self.n_positions:
            block_size = min(block_size, self.n_positions)
        step = self.global_batch_tokens
        if self.max_steps <= 0 and 0 < self.train_tokens < step:
            step = self.train_tokens // FITTING_STEPS
        rows = max(1, step // (block_size * self.processes))  # of one process in a step
        batch = min(rows, max(1, self.per_device_train_batch_size))
        step = rows // batch * batch * block_size * self.processes
        fitting: dict[str, object] = {"size": self._fitting_size()} if self._size_problem() else {}
        fitting |= {"block_size": block_size, "per_device_train_batch_size": batch, "global_batch_tokens": step}
        if self.max_steps <= 0:
            fitting["train_tokens"] = self.train_tokens if self.train_tokens >= step else FITTING_STEPS * step
        return {name: value for name, value in fitting.items() if value}

    def _exceeds_positions(self) -> bool:
        return self.n_positions is not None and self.block_size > self.n_positions

    def _size_problem(self) -> str:
        try:
            if self.size:
                parse_shape(self.size)
        except UsageError as error:
            return str(error)
        return ""

    def _fitting_size(self) -> str | None:
        """The same layers and width with the next smaller number of heads that divides the width."""
        parts = (self.size or "").lower().split("x")
        if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
            return None
        layers, heads, width = map(int, parts)
        return f"{layers}x{max(n for n in range(1, min(heads, width) + 1) if width % n == 0)}x{width}"
