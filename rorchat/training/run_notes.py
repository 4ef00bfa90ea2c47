"""Lines that a run prints about its validation, and about training that probably changes the model too little."""

import math
from collections.abc import Sequence

from rorchat.sources.base import RowStats

MIN_STEPS = 50  # with warm-up and decay, fewer steps at the default learning rates hardly change a model
MIN_KEPT = 0.5  # share of the rows of all sources
MIN_MARGIN = 0.02  # at 1.1M parameters, one epoch of 575 pairs reaches it between 3e-5 and 1e-4 (docs/LOG.md)


def describe_validation(share: float, max_eval_tokens: int) -> str:
    """What every evaluation reads, if that is less than the validation split, else an empty string."""
    if share == 1:
        return ""
    return (
        f"validation: every evaluation reads {share:.2%} of the validation split, {max_eval_tokens:,} tokens, evenly "
        "spaced and the same each time; --max_eval_tokens 0 reads all of it"
    )


def warn_about_kept_rows(row_stats: Sequence[RowStats]) -> str:
    """A warning if less than half of the rows can be used, else an empty string."""
    kept, rows_in = sum(stats.kept for stats in row_stats), sum(stats.rows_in for stats in row_stats)
    if kept >= MIN_KEPT * rows_in:
        return ""
    return (
        f"warning: only {kept:,} of {rows_in:,} rows are used; the lines above give the reasons, and "
        "`rorchat data check SOURCE --rejects FILE` lists the other rows"
    )


def warn_about_steps(arguments, rows: int, multiple: int = 1) -> str:
    """A warning if the rows give a run of few steps, with settings that give MIN_STEPS, else an empty string.

    Args:
        arguments: of a chat stage; `max_steps` is the number of steps of the run.
        rows: rows in one epoch, counted as in `per_device_train_batch_size`.
        multiple: `per_device_train_batch_size` must be a multiple of it.
    """
    if arguments.max_steps >= MIN_STEPS or "max_steps" in arguments.given:
        return ""
    batches = arguments.gradient_accumulation_steps * arguments.world_size

    def epochs(batch: int) -> int:
        return math.ceil(MIN_STEPS * batch * batches / rows)

    smaller = int(rows * arguments.num_train_epochs / (MIN_STEPS * batches)) // multiple * multiple
    if smaller:
        advice = (
            f"--per_device_train_batch_size {smaller} or "
            f"--num_train_epochs {epochs(arguments.per_device_train_batch_size)}"
        )
    else:
        advice = (
            f"more data, or --per_device_train_batch_size {multiple} --num_train_epochs {epochs(multiple)}, which "
            "repeats the data often"
        )
    steps = "1 step" if arguments.max_steps == 1 else f"{arguments.max_steps} steps"
    return f"warning: the run has only {steps} and will change little; for {MIN_STEPS} steps give {advice}"


def warn_about_margin(margin: float, learning_rate: float) -> str:
    """A warning if preference training has not separated chosen and rejected replies, else an empty string.

    Args:
        margin: mean reward of chosen replies minus that of rejected replies after training; 0 before training.
    """
    if not margin < MIN_MARGIN:
        return ""
    return (
        f"warning: the preferences hardly changed the model: the rewards of chosen and rejected replies differ by "
        f"{margin:.3f} after training (0 before, at least {MIN_MARGIN} expected). Train longer (--num_train_epochs), "
        f"or raise --learning_rate, which was {learning_rate:g}"
    )
