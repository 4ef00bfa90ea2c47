"""The settings of every stage, and how they are parsed: defaults < YAML < command line."""

import argparse
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
import torch
from transformers.trainer_utils import SaveStrategy
from trl import TrlParser

from rorchat.errors import UsageError, check_all
from rorchat.mixture.mixture_file import expand_variables
from rorchat.sources.columns import parse_columns
from rorchat.sources.location import add_columns
from rorchat.stories import find_beside, find_story_file
from rorchat.training.distributed import check_sharding, run_on_main_process, use_gloo_on_cpu
from rorchat.training.gpu import asks_for_cpu, check_gpu, require_no_gpu_wanted
from rorchat.training.help import format_help
from rorchat.training.option_checks import (
    COOLDOWN_SCHEDULE,
    DATA_RULES,
    STAGE_EFFECTS,
    STAGE_RULES,
    Effect,
    Gather,
    check_effects,
    check_length,
    check_rules,
    check_schedule,
    check_types,
    suggest,
)
from rorchat.training.runtime import DTYPES, find_precision, keep_freed_memory, use_all_cores
from rorchat.training.sizes import read_model_size
from rorchat.training.trackers import parse_trackers
from rorchat.training.unsupported_options import EVERY_STAGE
from rorchat.validation_split import MAX_EVAL_TOKENS
from rorchat.yaml_file import read_yaml

if TYPE_CHECKING:
    from transformers import TrainingArguments as _TrainerArguments
else:
    _TrainerArguments = object  # the class of each stage adds Transformers' or TRL's settings

Arguments = TypeVar("Arguments", bound="DataArguments")
SMOKE_ROWS_PER_SOURCE = 64
SMOKE_REPLY_TOKENS = 16  # a model that has not learned to stop would generate a quarter of the context window


@dataclass
class DataArguments:
    """Which data a stage reads."""

    #: Settings of a base class that `parse` refuses, and why.
    UNSUPPORTED_ARGS: ClassVar[dict[str, str]] = {}
    #: Settings that `parse` refuses unless another one has a value with which they have an effect.
    EFFECTS: ClassVar[tuple[Effect, ...]] = ()

    sources: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME (from the Hub), NAME=OWNER/DATASET (any dataset of the Hub), NAME=PATH (local files) or "
            "NAME=AMOUNT (generated), one or several; chat:NAME takes the conversations of a source that also has "
            "documents."
        },
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "ROLE=COLUMN, one or several: the columns of your files or dataset, as user=question "
            "assistant=answer, text=body, or prompt=q chosen=good rejected=bad; default: known names."
        },
    )
    persona: str | None = field(default=None, metadata={"help": "A persona file; default: RorChat's."})
    validation_share: float = field(
        default=0.01, metadata={"help": "Share of documents or conversations in the validation split, in (0, 1)."}
    )
    data_seed: int = field(default=0, metadata={"help": "Seed of generated sources and of the order of rows."})
    #: The settings of the config file and the command line, which `parse` sets; the run's config.yaml.
    given: dict[str, object] = field(default_factory=dict, init=False)

    def source_specs(self) -> list[str]:
        """Every source that the stage reads."""
        return self.sources

    def name_columns(self) -> None:
        """Adds the given columns to the specs of the sources that take them.

        Raises:
            UsageError: no source takes them.
        """
        self.sources = add_columns(self.sources, parse_columns(self.columns))

    def pin_sources(self, pins: Mapping[str, str]) -> None:
        """Replaces specs by those of the same rows at a commit of the Hub."""
        self.sources = [pins.get(spec, spec) for spec in self.sources]

    def check_data(self) -> None:
        """Raises UsageError if there is no source, none takes the columns, or a number is out of range."""
        self.name_columns()
        if not self.source_specs():
            raise UsageError("No sources: give at least one, as in --sources text=my_texts/")
        check_rules(self, DATA_RULES)


@dataclass
class StageArguments(DataArguments, _TrainerArguments):
    """Settings of all training stages, in addition to those of Transformers' Trainer.

    A stage's class lists this one before Transformers' or TRL's, so that the defaults below take precedence.
    """

    row_layout: ClassVar[str] = "packed"  # see `rorchat.training.kernels.attention.describe_attention`
    eval_columns: ClassVar[tuple[str, ...]] = ()  # of a chat stage's rows, with the tokens that an evaluation reads
    UNSUPPORTED_ARGS: ClassVar[dict[str, str]] = EVERY_STAGE
    EFFECTS: ClassVar[tuple[Effect, ...]] = STAGE_EFFECTS

    smoke: bool = field(
        default=False, metadata={"help": "Try the run: 3 steps with tiny batches, in OUTPUT_DIR-smoke."}
    )
    optimizer: str = field(
        default="adamw", metadata={"help": "adamw, adamw_8bit, or muon (matrices; the rest uses adamw)."}
    )
    matrix_learning_rate: float = field(
        default=6e-3, metadata={"help": "Muon's learning rate; learning_rate is AdamW's, x10 for the embedding."}
    )
    cooldown_share: float = field(
        default=0.7, metadata={"help": f"Share of the steps in which {COOLDOWN_SCHEDULE} decays to 0."}
    )
    sample_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts to generate samples for, before and after training; default: three of the validation "
            "split; none if the list is empty."
        },
    )
    sample_steps: int = field(default=0, metadata={"help": "Also generate samples every N steps; 0: never."})
    price_per_hour: float = field(
        default=0.0, metadata={"help": "Dollars per hour of the whole machine: shows and logs the cost."}
    )
    max_eval_tokens: int = field(
        default=MAX_EVAL_TOKENS,
        metadata={
            "help": "Tokens of the validation split that an evaluation reads, evenly spaced and the same each time; 0: "
            "all."
        },
    )
    base_text: str | None = field(
        default=None,
        metadata={
            "help": "Text (a token store or a source) on which the loss is measured before and after the stage; "
            "default: the validation split of the model's pretraining."
        },
    )
    weights_only: bool = field(
        default=False, metadata={"help": "Resume from weights only (optimizer state lost or changed)."}
    )
    mirror: str | None = field(
        default=None,
        metadata={"help": "Back up checkpoints to this folder or Hub id, and resume from it."},
    )

    if TYPE_CHECKING:  # never None, unlike in Transformers' settings
        data_seed: int = 0
        output_dir: str = ""
        model: str | None = None  # of every stage

    # settings of Transformers and TRL with other defaults
    lr_scheduler_type: str = COOLDOWN_SCHEDULE
    gradient_checkpointing: bool = False
    bf16: bool | None = None  # type: ignore[assignment]  # None until `resolve_defaults` chooses the precision
    precision_reason: str = field(default="", init=False)  # why the precision was chosen; "" if it was given
    save_total_limit: int = 2
    report_to: str = "none"
    disable_tqdm: bool = True

    @property
    def on_gpu(self) -> bool:
        """Whether training will run on a CUDA device; known before Transformers initializes one."""
        return torch.cuda.is_available() and not self.use_cpu

    @property
    def precision(self) -> str:
        """The precision of matrix products: bf16, fp16 or fp32."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def is_compiled(self) -> bool:
        """Whether the model is compiled with torch.compile."""
        return False

    @property
    def rows_per_source(self) -> int | None:
        """Rows of each source that a chat stage reads; None for all."""
        return SMOKE_ROWS_PER_SOURCE if self.smoke else None

    @property
    def reply_tokens(self) -> int | None:
        """The length of a sample of a chat stage; None for the default of the engine."""
        return SMOKE_REPLY_TOKENS if self.smoke else None

    def model_width(self) -> int | None:
        """`n_embd` of the model to be trained; None if it is not known before the model is loaded."""
        return read_model_size(self.model, "n_embd") if self.model else None

    def max_row_length(self) -> int | None:
        """Tokens of the longest row of a chat stage; None for all positions of the model."""
        return None

    def eval_reply_tokens(self, n_positions: int) -> int:
        """Tokens that an evaluation generates for each validation row."""
        return 0

    def create_adapter(self, model, tokenizer, base: str):
        """The LoRA adapter to be trained, added to the model; None to train the model itself."""
        return None

    # What identifies a run beyond its settings. Stages that have such inputs override these.

    def appends_phase(self) -> bool:
        """Whether a changed mixture is appended to the run."""
        return False

    def rows_per_step(self) -> int:
        """Rows of the mixture that one optimizer step reads; 0 for stages without a mixture."""
        return 0

    def optional_specs(self) -> Collection[str]:
        """The sources that are omitted if they cannot be read."""
        return ()

    def resolved_mixture(self) -> dict | None:
        """The mixture with all its sources, as JSON; None for stages without a mixture."""
        return None

    def replay_source(self) -> str | None:
        """The pretraining documents that are mixed into a later stage."""
        return None

    def reward_files(self) -> dict[str, str]:
        """The sha256 of every file that defines a reward of the user."""
        return {}

    # Checks

    def check_stage(self) -> None:
        """Raises UsageError for settings that are out of range or contradict each other."""
        check_all(
            partial(check_rules, self, STAGE_RULES),
            partial(check_schedule, self.lr_scheduler_type, self.lr_scheduler_kwargs, self.learning_rate),
            partial(check_length, self.max_steps, self.warmup_steps, self.lr_scheduler_kwargs),
            self._check_folders,
        )

    def _check_folders(self) -> None:
        if self.mirror and self.save_strategy == SaveStrategy.NO:
            raise UsageError("mirror copies checkpoints, but save_strategy is no: remove one of them.")
        if not self.output_dir:
            raise UsageError("No output folder: give --output_dir runs/my-run")

    def check_devices(self) -> None:
        """Raises UsageError if the GPU cannot compute, or if one process sees several, which DataParallel would use."""
        if self.on_gpu:
            check_gpu(self.device, DTYPES[self.precision])
        if self.n_gpu > 1:
            raise UsageError(
                f"One process sees {self.n_gpu} GPUs. Launch one process per GPU with `rorchat ... "
                f"--num_processes {self.n_gpu}`, or hide all GPUs but one with CUDA_VISIBLE_DEVICES=0."
            )

    def resolve_defaults(self) -> None:
        """Replaces defaults of Transformers. Must be called before Transformers checks the settings."""
        self.report_to = parse_trackers(self.report_to)  # type: ignore[assignment]  # one string on the command line
        check_sharding(self)
        self.use_cpu = self.use_cpu or asks_for_cpu()
        if not self.on_gpu and not self.use_cpu:
            require_no_gpu_wanted()
        if self.bf16 is None and not self.fp16:
            self._choose_precision()
        if self.fp16 and not self.on_gpu:
            raise UsageError("fp16 needs a GPU: on a CPU leave the precision out, or give --bf16 true.")
        if self.bf16 and not self.on_gpu:
            self.use_cpu = True  # transformers 5.23 requires a GPU for bf16 otherwise
        if not self.on_gpu:
            use_gloo_on_cpu()
        self.ddp_find_unused_parameters = False  # all are used, and the search traverses the graph in every step
        use_all_cores()
        keep_freed_memory()
        self.dataloader_pin_memory = self.on_gpu  # torch warns on a CPU
        if self.on_gpu and self.accelerator_config is None:
            self.accelerator_config = {"non_blocking": True}  # overlaps the copy of a batch with computation
        self.train_sampling_strategy = "sequential"  # the dataset is already in training order
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False  # it would log the average of earlier losses in place of NaN
        self.include_num_input_tokens_seen = "no"  # the datasets count tokens

    def _choose_precision(self) -> None:
        """Sets the precision that is fastest here, which the main process measures for all."""
        if not self.on_gpu:
            use_gloo_on_cpu()
        device = "cuda" if self.on_gpu else "cpu"
        find = partial(find_precision, Path(self.output_dir), device, self.model_width())
        precision, self.precision_reason = run_on_main_process(find)
        self.bf16, self.fp16 = precision == "bf16", precision == "fp16"


class StageParser(TrlParser):
    """A TrlParser that reports errors in one line, rejects abbreviated options, which may be typos, and gathers lists.

    It parses one command line.
    """

    def __init__(self, dataclass_type: type):
        # Transformers annotates the parameter with a `NewType`, which no class matches
        super().__init__(dataclass_type, allow_abbrev=False)  # type: ignore[arg-type]
        for action in self._actions:
            if action.dest == "sample_prompts":
                action.nargs = "*"  # an empty list turns samples off

    def add_argument(self, *names, **settings):
        return super().add_argument(*names, **{"action": Gather} | settings)

    def error(self, message: str):
        raise UsageError(f"{message.removesuffix('.')}. See --help.")


def parse(
    dataclass_type: type[Arguments],
    argv: Sequence[str] | None = None,
    settings: Mapping[str, object] | None = None,
) -> Arguments:
    """Settings from defaults, `--config FILE.yaml`, Python and the command line; later ones take precedence.

    In the `sources` of the file, `$NAME` is replaced by an environment variable, as in a mixture file. The values of a
    list may be given by several flags. The attribute `given` of the result has the settings of the file and the command
    line; it is written to the run's config.yaml.

    Args:
        argv: the words of the command line; None for those of this process.
        settings: values by name, as a function of `rorchat.api` was called with. They are checked like a config file's.

    Raises:
        UsageError: an unknown key or flag (the message suggests the nearest one), a value of the wrong type or out of
            range, a setting without an effect, an unreadable file, or an environment variable that is not set.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = StageParser(dataclass_type)
    _show_help(dataclass_type, parser, argv)
    options = {action.dest: action for action in parser._actions}
    argv, config, path = _split_config(argv)
    known = [*(options.keys() - dataclass_type.UNSUPPORTED_ARGS.keys()), "config"]
    check_types(config, path, options, known)
    settings = {name: _plain(value) for name, value in (settings or {}).items()}
    check_types(settings, "", options, known)
    words = [word[2:].split("=")[0].replace("-", "_") for word in argv if re.match(r"--[a-zA-Z]", word)]
    for flag in words:
        if flag not in options and flag.removeprefix("no_") not in options:
            raise UsageError(f"Unknown option --{flag}.{suggest(flag, known)} See --help.")
    if config.get("sources") and "sources" not in (*words, *settings):
        config["sources"] = expand_variables(path, config["sources"])
    config |= settings
    names = {entry.name for entry in fields(dataclass_type)}
    flags = {name.removeprefix("no_") if name not in names else name for name in words} | settings.keys()
    given = config.keys() | flags
    unsupported = dataclass_type.UNSUPPORTED_ARGS
    if refused := sorted(given & unsupported.keys()):
        raise UsageError(" ".join(f"{name} cannot be set: {unsupported[name]}." for name in refused))
    parser.set_defaults_with_config(**config)
    try:
        arguments, rest = parser.parse_args_into_dataclasses(
            args=argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(_name_setting(" ".join(str(error).split()), config, argv)) from None
    if rest:
        raise UsageError(f"Unexpected {' '.join(rest)!r}: give every setting as --NAME VALUE. See --help.")
    check_effects(arguments, given, dataclass_type.EFFECTS, flags)
    arguments.given = {name: _plain(getattr(arguments, name)) for name in sorted(given & names)}
    return arguments


def _show_help(dataclass_type: type, parser: StageParser, argv: list[str]) -> None:
    """Prints the help that was asked for, if any, and exits."""
    if {"--help_all", "--help-all"} & set(argv):
        parser.print_help()
    elif {"--help", "-h"} & set(argv):
        sys.stdout.write(format_help(dataclass_type, Path(sys.argv[0]).name))
    else:
        return
    sys.exit(0)


def _name_setting(message: str, config: dict, argv: list[str]) -> str:
    """Adds the name of the setting to an error message of Transformers, which contains only the value."""
    values = config | {flag: value for flag, value in zip(argv, argv[1:], strict=False) if flag.startswith("--")}
    settings = [
        name.removeprefix("--") for name, value in values.items() if isinstance(value, str) and value in message
    ]
    return f"{settings[0]}: {message}" if len(settings) == 1 and settings[0] not in message else message


def _plain(value: object) -> object:
    """The value as YAML can hold it: enums of Transformers, paths, tuples and NumPy's numbers are converted."""
    match value:
        case Enum():
            return value.value
        case os.PathLike():
            return os.fspath(value)
        case list() | tuple():
            return [_plain(element) for element in value]
        case np.generic():
            return value.item()
    return value


def _split_config(argv: list[str]) -> tuple[list[str], dict, str]:
    """Returns the arguments other than `--config FILE`, the values of the config file, and its path."""
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in argv:
        return argv, {}, ""
    if argv.count("--config") > 1:
        raise UsageError("--config is given twice: write all settings into one file.")
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise UsageError("--config needs a file: --config demo/pretrain.yaml")
    path = find_story_file(argv[at + 1])
    config = read_yaml(path, "config", UsageError)
    for name in FILE_SETTINGS:
        if isinstance(config.get(name), str):
            config[name] = find_beside(path, config[name])
    return argv[:at] + argv[at + 2 :], config, str(path)


#: Settings that name a file, which is looked up next to the config file first.
FILE_SETTINGS = ("mixture", "persona")
