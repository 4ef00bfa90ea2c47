"""Checks of settings before any data is read: types, ranges, schedules, settings without an effect, repeated flags.

Settings that are refused with any value are in `rorchat.training.unsupported_options`.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import get_scheduler
from transformers.training_args import trainer_log_levels

from rorchat.errors import UsageError, did_you_mean, shorten_error
from rorchat.files import to_json
from rorchat.training.checkpointing.checkpoint import KEPT
from rorchat.training.optim import OPTIMIZERS
from rorchat.training.unsupported_options import OTHER_NAMES

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
TRIED_STEPS = 10  # of a schedule that is tried with its settings
ROUNDING = 1e-6  # of a share of the learning rate
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
    return Rule(lambda value: value in names, words or _list_names(names), names)


def any_of(*names: str) -> Rule:
    """For a list, one of whose elements must be among the names."""
    return Rule(lambda values: not {*values}.isdisjoint(names), _list_names(names))


def left_out(name: str) -> Rule:
    """For a setting with which another one has no effect."""
    return Rule(lambda value: not value, f"no {name}")


def is_given(words: str) -> Rule:
    """For a setting without which another one has no effect."""
    return Rule(bool, words)


def _list_names(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


class Effect(NamedTuple):
    """A setting that has an effect only with some values of another one."""

    name: str
    other: str
    rule: Rule


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
STAGE_EFFECTS = (
    Effect("matrix_learning_rate", "optimizer", one_of("muon")),
    Effect("cooldown_share", "lr_scheduler_type", one_of(COOLDOWN_SCHEDULE)),
    Effect("cooldown_share", "lr_scheduler_kwargs", left_out("lr_scheduler_kwargs")),
    Effect("warmup_steps", "lr_scheduler_type", one_of(*(kind for kind in SCHEDULES if kind != "constant"))),
    Effect("lr_scheduler_kwargs", "lr_scheduler_type", one_of(*(k for k in SCHEDULES if not k.startswith("constant")))),
)
#: Of the stages that evaluate at the end only, unless `eval_strategy` is given. Elsewhere, who gives "no" knows.
EVAL_EFFECTS = tuple(Effect(name, "eval_strategy", one_of("steps")) for name in ("eval_steps", "eval_delay"))


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


def suggest(name: str, known: Iterable[str]) -> str:
    """What to give in place of an unknown setting, as a sentence; "" if no known one is similar."""
    return f" Give {OTHER_NAMES[name]}." if name in OTHER_NAMES else did_you_mean(name, known)


def check_types(
    values: Mapping[str, object], path: str, options: dict[str, argparse.Action], known: Collection[str]
) -> None:
    """Checks names and types. TrlParser accepts a list for an int, and YAML's unquoted `no` for a string.

    Args:
        path: the config file that has the values; "" if they were given in Python.
        known: the names of the options that are not refused, to suggest one of them.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    for key, value in values.items():
        line = next((n for n, text in enumerate(lines, 1) if re.match(rf"{re.escape(str(key))}\s*:", text)), 0)
        where, what = (f"{path}:{line}: ", "key") if path else ("", "setting")
        if key not in options or key == "help":
            raise UsageError(f"{where}unknown {what} {key!r}.{suggest(str(key), known)}")
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


def check_effects(arguments: object, given: Set[str], effects: Sequence[Effect], flags: Set[str] = frozenset()) -> None:
    """Refuses given settings that have no effect because of the value of another one.

    A setting of a config file is only reported if a flag has given the other one its value: the file remains as it is.

    Args:
        flags: those of the given settings that are not from a config file.

    Raises:
        UsageError: with every setting that is refused.
    """
    refused = []
    for name, other, rule in effects:
        value = getattr(arguments, other)
        if name not in given or rule.allows(value):
            continue
        value = " ".join(value) if isinstance(value, list) else getattr(value, "value", value)  # enums
        problem = f"{name} has no effect with {other} {value}"
        if name in flags or other not in flags:
            refused.append(f"{problem}: leave it out, or give {rule.words}.")
        elif os.environ.get("RANK", "0") == "0":
            print(problem, file=sys.stderr)  # noqa: T201
    if refused:
        raise UsageError(" ".join(refused))


def check_schedule(kind: str, kwargs: dict | str | None, learning_rate: float | None) -> None:
    """Raises UsageError if a schedule of Transformers refuses its settings, lacks one, or leaves the learning rate.

    The schedule is built for another optimizer and another length, which finds unknown names and wrong values alike.

    Args:
        kind: one of `SCHEDULES`; another one is reported elsewhere.
        kwargs: `lr_scheduler_kwargs`, possibly as JSON.
        learning_rate: None if it is not known yet.
    """
    if kind not in SCHEDULES or (not kwargs and kind in (COOLDOWN_SCHEDULE, COSINE_SCHEDULE)):
        return  # the settings of these two are derived from the length of the run
    kwargs = read_kwargs(kwargs)
    for name, value in kwargs.items():
        if isinstance(value, float | int) and not NOT_NEGATIVE.allows(value):
            raise UsageError(f"{name} in lr_scheduler_kwargs is {value}: give {NOT_NEGATIVE.words}.")
    rate = learning_rate if learning_rate is not None and NOT_NEGATIVE.allows(learning_rate) else 1.0
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    given = f" with lr_scheduler_kwargs {to_json(kwargs)}" if kwargs else " without lr_scheduler_kwargs"
    try:
        schedule = get_scheduler(
            kind, optimizer, num_warmup_steps=2, num_training_steps=TRIED_STEPS, scheduler_specific_kwargs=kwargs
        )
        shares = [schedule.lr_lambdas[0](step) for step in range(TRIED_STEPS + 1)]
    except (TypeError, ValueError, ArithmeticError, KeyError) as error:
        raise UsageError(f"lr_scheduler_type {kind}{given}: {shorten_error(error)}") from None
    wrong = next((share for share in shares if not 0 <= share <= 1 + ROUNDING), None)
    if wrong is not None:
        raise UsageError(
            f"lr_scheduler_type {kind}{given}: the learning rate would be {wrong:.3g} times learning_rate. Give "
            "settings with which it stays between 0 and learning_rate."
        )


def read_kwargs(kwargs: dict | str | None) -> dict:
    """The value of `lr_scheduler_kwargs`, which is JSON on the command line; raises UsageError if it is no object."""
    try:
        value = json.loads(kwargs) if isinstance(kwargs, str) else kwargs or {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError("lr_scheduler_kwargs is no JSON object: give one such as '{\"num_cycles\": 2}'.")
    return value


def check_length(steps: int, warmup_steps: float, kwargs: dict | str | None) -> None:
    """Raises UsageError if a run has fewer steps than its warm-up and decay.

    Args:
        steps: of the run; not positive if they are not known yet.
        kwargs: `lr_scheduler_kwargs`, possibly as JSON. With more steps of decay than are left, the learning rate would
            never be reached.
    """
    if 0 < steps < warmup_steps:
        raise UsageError(
            f"warmup_steps is {warmup_steps:g}, but the run has only {steps:,} steps: give fewer, or a share of them "
            "below 1."
        )
    warmup = math.ceil(warmup_steps * steps) if warmup_steps < 1 else warmup_steps
    decay = read_kwargs(kwargs).get("num_decay_steps", 0)
    if 0 < steps < warmup + decay:
        raise UsageError(
            f"num_decay_steps in lr_scheduler_kwargs is {decay}, but the run has only {steps - warmup:g} steps after "
            "its warm-up: give fewer."
        )
