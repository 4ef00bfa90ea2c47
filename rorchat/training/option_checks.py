"""Checks of settings before any data is read: types, ranges, schedules, settings without an effect, repeated flags.

Settings that are refused with any value are in `rorchat.training.unsupported_options`.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import get_scheduler
from transformers.training_args import trainer_log_levels

from rorchat.errors import UsageError, did_you_mean, shorten_error
from rorchat.files import to_json
from rorchat.training.checkpointing.checkpoint import KEPT
from rorchat.training.optim import OPTIMIZERS

COOLDOWN_SCHEDULE, COSINE_SCHEDULE = "warmup_stable_decay", "cosine_with_min_lr"
#: Those of Transformers, except the two that follow the validation loss: `eval_steps` would change the training.
SCHEDULES = (
    COOLDOWN_SCHEDULE, COSINE_SCHEDULE, "linear", "cosine", "cosine_with_restarts", "cosine_warmup_with_min_lr",
    "polynomial", "inverse_sqrt", "constant", "constant_with_warmup",
)  # fmt: skip

#: Settings of rorchat that are strings. TrlParser would accept a number for them.
STRING_SETTINGS = {
    "tokenizer", "size", "model", "token_store", "persona", "optimizer", "output_dir", "mixture", "mirror", "base_text",
    "replay",
}  # fmt: skip
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")


class Rule(NamedTuple):
    """The values that a setting may have.

    Attributes:
        allows: takes a value other than None; False for NaN.
        words: the allowed values, as a message describes them after "give".
        names: the allowed values if they are names, of which a message suggests the nearest one.
    """

    allows: Callable[[Any], bool]
    words: str
    names: tuple[str, ...] = ()


POSITIVE = Rule(lambda value: 0 < value < math.inf, "a positive number")
NOT_NEGATIVE = Rule(lambda value: 0 <= value < math.inf, "0 or a positive number")
FINITE = Rule(math.isfinite, "a number")
SHARE = Rule(lambda value: 0 <= value <= 1, "a number from 0 to 1")
POSITIVE_SHARE = Rule(lambda value: 0 < value <= 1, "a number above 0, at most 1")
SEED = Rule(lambda value: 0 <= value < 2**32, "a number from 0 to 2^32 - 1")
STEPS = Rule(
    lambda value: 0 < value < 1 or (1 <= value < math.inf and value == int(value)),
    "a number of steps, or a share of the run between 0 and 1",
)


def one_of(*names: str, words: str = "") -> Rule:
    return Rule(lambda value: value in names, words or f"one of {', '.join(names)}", names)


def any_of(*names: str) -> Rule:
    """For a list, one of whose elements must be among the names."""
    return Rule(lambda values: not {*values}.isdisjoint(names), f"one of {', '.join(names)}")


DATA_RULES = {"data_seed": SEED, "validation_share": Rule(lambda value: 0 < value < 1, "a number between 0 and 1")}
#: Of the settings that all stages have.
STAGE_RULES = {
    "optimizer": one_of(*OPTIMIZERS),
    "learning_rate": NOT_NEGATIVE,
    "matrix_learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "cooldown_share": SHARE,
    "lr_scheduler_type": one_of(
        *SCHEDULES,
        words=f"one of {', '.join(SCHEDULES)}; with one that follows the validation loss, eval_steps would change the "
        "training",
    ),
    "warmup_steps": Rule(lambda value: value == 0 or STEPS.allows(value), f"0, {STEPS.words}"),
    "max_steps": Rule(lambda value: value > 0 or value == -1, "a positive number, or leave it out"),
    "num_train_epochs": POSITIVE,
    "seed": SEED,
    "sample_steps": NOT_NEGATIVE,
    "price_per_hour": NOT_NEGATIVE,
    "max_eval_tokens": NOT_NEGATIVE,
    "logging_strategy": one_of("steps", "no", words="steps or no; --logging_steps 0.1 logs ten times in a run"),
    "eval_strategy": one_of("steps", "no", words="steps or no; --eval_steps 0.5 evaluates twice in a run"),
    "save_strategy": one_of(
        "steps", "no", words="steps or no; --save_steps 0.5 saves twice in a run, and the best checkpoint is kept"
    ),
    "logging_steps": STEPS,
    "eval_steps": STEPS,
    "save_steps": STEPS,
    "save_total_limit": Rule(
        lambda value: value >= KEPT, f"{KEPT} or more, because the newest checkpoint may be damaged by the disk"
    ),
    "eval_delay": NOT_NEGATIVE,
    "log_level": one_of(*trainer_log_levels),
    "log_level_replica": one_of(*trainer_log_levels),
    "dataloader_num_workers": NOT_NEGATIVE,
    "dataloader_prefetch_factor": POSITIVE,
    "ddp_bucket_cap_mb": POSITIVE,
    "ddp_timeout": POSITIVE,
}
#: Setting -> another setting, and the values of that one with which the first has an effect.
STAGE_EFFECT_RULES = {
    "warmup_steps": ("lr_scheduler_type", one_of(*(kind for kind in SCHEDULES if kind != "constant"))),
    "lr_scheduler_kwargs": ("lr_scheduler_type", one_of(*(k for k in SCHEDULES if not k.startswith("constant")))),
}


class Gather(argparse.Action):
    """Stores the value of a flag. The values of a repeated list are gathered; of other repeated flags, the last counts.

    Scripts override their own flags in this way: `rorchat pretrain --num_processes 1 "$@"`.
    """

    is_given = False

    def __call__(self, parser, namespace, values, option_string=None):
        if self.is_given and self.nargs in ("+", "*"):
            values = [*getattr(namespace, self.dest), *values]
        elif self.is_given and values != getattr(namespace, self.dest) and os.environ.get("RANK", "0") == "0":
            print(f"--{self.dest} is given twice: the last value counts, {values}", file=sys.stderr)  # noqa: T201
        self.is_given = True
        setattr(namespace, self.dest, values)


def check_types(values: Mapping[str, object], path: str, options: dict[str, argparse.Action]) -> None:
    """Checks names and types. TrlParser accepts a list for an int, and YAML's unquoted `no` for a string.

    Args:
        path: the config file that has the values; "" if they were given in Python.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    for key, value in values.items():
        line = next((n for n, text in enumerate(lines, 1) if re.match(rf"{re.escape(str(key))}\s*:", text)), 0)
        where, what = (f"{path}:{line}: ", "key") if path else ("", "setting")
        if key not in options or key == "help":
            raise UsageError(f"{where}unknown {what} {key!r}.{did_you_mean(str(key), options)}")
        expected = _expected_type(options[key])
        if not _has_type(value, options[key], expected):
            hint = " (write yes and no in quotes)" if path and isinstance(value, bool) else ""
            raise UsageError(f"{where}{key} is {value!r}, a {type(value).__name__}; expected {expected}{hint}.")


def _expected_type(option: argparse.Action) -> str:
    name = getattr(option.type, "__name__", "")
    if option.nargs in ("+", "*"):
        return {"float": "a list of numbers", "int": "a list of numbers"}.get(name, "a list of strings")
    if name == "string_to_bool":
        return "true or false"
    return {"int": "an int", "float": "a number"}.get(name, "a string")


def _has_type(value: object, option: argparse.Action, expected: str) -> bool:
    if value is None:
        return option.default is None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    match expected:
        case "a list of numbers" | "a list of strings":
            kinds = (int, float) if expected.endswith("numbers") else (str,)
            return isinstance(value, list) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)
        case "true or false":
            return isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no")
        case "an int":
            return isinstance(value, int) and is_number
        case "a number":  # YAML reads 6e-4 as a string
            return is_number or (isinstance(value, str) and bool(_NUMBER.fullmatch(value)))
    if option.dest in STRING_SETTINGS:
        return isinstance(value, str)
    # Transformers has settings that are a string or a dict or a number: it checks them itself
    return not isinstance(value, bool) and (not isinstance(value, list) or option.dest == "report_to")


def check_rules(arguments: object, rules: Mapping[str, Rule]) -> None:
    """Raises UsageError with every setting whose value is not allowed; None is the value of an omitted setting."""
    wrong = []
    for name, rule in rules.items():
        value = getattr(arguments, name)
        if value is not None and not rule.allows(value):
            suggestion = did_you_mean(str(value), rule.names)
            wrong.append(f"{name} is {value!r}: give {rule.words}.{suggestion}")
    if wrong:
        raise UsageError(" ".join(wrong))


def check_effects(arguments: object, given: Set[str], rules: Mapping[str, tuple[str, Rule]]) -> None:
    """Raises UsageError with every given setting that has no effect because of the value of another one."""
    idle = []
    for name in sorted(given & rules.keys()):
        other, rule = rules[name]
        value = getattr(arguments, other)
        if not rule.allows(value):
            value = " ".join(value) if isinstance(value, list) else getattr(value, "value", value)  # enums
            idle.append(f"{name} has no effect with {other} {value}: leave it out, or give {rule.words}.")
    if idle:
        raise UsageError(" ".join(idle))


def check_schedule(kind: str, kwargs: dict | str | None, learning_rate: float | None) -> None:
    """Raises UsageError if a learning-rate schedule of Transformers refuses its settings, or lacks one.

    The schedule is built for another optimizer and another length, which finds unknown names and wrong values alike.

    Args:
        kind: one of `SCHEDULES`; another one is reported elsewhere.
        kwargs: `lr_scheduler_kwargs`, possibly as JSON.
        learning_rate: None if it is not known yet.
    """
    if kind not in SCHEDULES or (not kwargs and kind in (COOLDOWN_SCHEDULE, COSINE_SCHEDULE)):
        return  # the settings of these two are derived from the length of the run
    try:
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs or {}
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise UsageError("lr_scheduler_kwargs is no JSON object: give one such as '{\"num_cycles\": 2}'.")
    rate = learning_rate if learning_rate is not None and NOT_NEGATIVE.allows(learning_rate) else 1.0
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    try:
        get_scheduler(kind, optimizer, num_warmup_steps=0, num_training_steps=10, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError, ArithmeticError) as error:
        given = f" with lr_scheduler_kwargs {to_json(kwargs)}" if kwargs else " without lr_scheduler_kwargs"
        raise UsageError(f"lr_scheduler_type {kind}{given}: {shorten_error(error)}") from None


def check_warmup(warmup_steps: float, steps: int) -> None:
    """Raises UsageError if a run ends before its learning rate has been reached.

    Args:
        steps: of the run; not positive if they are not known yet.
    """
    if 0 < steps < warmup_steps:
        raise UsageError(
            f"warmup_steps is {warmup_steps:g}, but the run has only {steps:,} steps: give fewer, or a share of them "
            "below 1."
        )
