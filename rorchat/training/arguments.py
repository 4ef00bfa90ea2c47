"""What every stage is told, and how it is read: defaults < YAML < command line, checked before anything starts."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from trl import TrlParser

from rorchat.errors import UsageError, did_you_mean
from rorchat.mixture.config import expand_variables
from rorchat.stories import find_beside, find_story_file
from rorchat.training.help import format_help
from rorchat.yaml_file import read_yaml

Arguments = TypeVar("Arguments")


@dataclass
class DataArguments:
    """Which data a stage reads."""

    sources: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Each NAME (from the Hub), NAME=PATH (local files) or NAME=AMOUNT (generated); chat:NAME for the "
            "conversations of a source with documents."
        },
    )
    persona: str | None = field(default=None, metadata={"help": "A persona file; default: RorChat's own."})
    validation_share: float = field(
        default=0.01, metadata={"help": "Share of documents or conversations held out, in (0, 1)."}
    )
    data_seed: int = field(default=0, metadata={"help": "Seed of generated sources and of the order of rows."})

    def specs(self) -> list[str]:
        """Every source that the stage reads."""
        return self.sources

    def check_data(self) -> None:
        if not self.specs():
            raise UsageError("No sources: give at least one, as in --sources text=my_texts/")
        if not 0 < self.validation_share < 1:
            raise UsageError(f"validation_share is {self.validation_share}: it must lie between 0 and 1.")


class StageParser(TrlParser):
    """TrlParser with errors of one line. Abbreviated options are refused: a guess would hide a typo."""

    def __init__(self, dataclass_type: type):
        super().__init__(dataclass_type, allow_abbrev=False)

    def error(self, message: str):
        raise UsageError(f"{message.removesuffix('.')}. See --help.")


def parse(dataclass_type: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Arguments from defaults, `--config FILE.yaml` and the command line, in rising order.

    In the file's sources `$NAME` stands for an environment variable, as in a mixture.
    The result carries `given`: what was set by file or flags, which is what a run's config.yaml holds.

    Raises:
        UsageError: unknown key or flag (naming the nearest), a value of the wrong type, an unreadable file, a
            variable that is not set.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = StageParser(dataclass_type)
    _show_help(dataclass_type, parser, argv)
    options = {action.dest: action for action in parser._actions}
    argv, config, path = _without_config(argv)
    _check_config(config, path, options)
    flags = [word[2:].split("=")[0].replace("-", "_") for word in argv if re.match(r"--[a-zA-Z]", word)]
    for flag in flags:
        if flag not in options and flag.removeprefix("no_") not in options:
            raise UsageError(f"Unknown option --{flag}.{did_you_mean(flag, options)} See --help.")
    if config.get("sources") and "sources" not in flags:
        config["sources"] = [expand_variables(f"{path}: sources", spec) for spec in config["sources"]]
    names = {entry.name for entry in fields(dataclass_type)}
    given = {name.removeprefix("no_") if name not in names else name for name in (*config, *flags)}
    decided = sorted(given & set(getattr(dataclass_type, "UNSUPPORTED_ARGS", ())))
    if decided:
        raise UsageError(f"{decided[0]} cannot be set: {dataclass_type.UNSUPPORTED_ARGS[decided[0]]}.")
    parser.set_defaults_with_config(**config)
    try:
        (arguments,) = parser.parse_args_into_dataclasses(args=argv)
    except (ValueError, argparse.ArgumentTypeError) as error:
        said = " ".join(str(error).split())
        # Transformers names the value, and not the setting that has it
        values = config | {flag: value for flag, value in zip(argv, argv[1:], strict=False) if flag.startswith("--")}
        of = [name.removeprefix("--") for name, value in values.items() if isinstance(value, str) and value in said]
        raise UsageError(f"{of[0]}: {said}" if len(of) == 1 and of[0] not in said else said) from None
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


def _plain(value: object) -> object:
    return value.value if hasattr(value, "value") else value  # enums of Transformers


def _without_config(argv: list[str]) -> tuple[list[str], dict, str]:
    if "--config" not in argv:
        return argv, {}, ""
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise UsageError("--config needs a file: --config demo/pretrain.yaml")
    path = find_story_file(argv[at + 1])
    config = read_yaml(path, "config", UsageError)
    for name in FILE_SETTINGS:
        if isinstance(config.get(name), str):
            config[name] = find_beside(path, config[name])
    return argv[:at] + argv[at + 2 :], config, str(path)


#: Settings that name a file of the user: looked up next to the config first.
FILE_SETTINGS = ("mixture", "persona")


#: Our own settings that are strings and nothing else; TrlParser would take a number for them.
OWN_STRINGS = {
    "tokenizer", "size", "model", "token_store", "persona", "optimizer", "output_dir", "mixture", "mirror", "base_text",
    "replay",
}  # fmt: skip
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _check_config(config: dict, path: str, options: dict[str, argparse.Action]) -> None:
    """TrlParser checks neither: it takes a list for an int, and YAML's unquoted `no` for a string."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    for key, value in config.items():
        line = next((n for n, text in enumerate(lines, 1) if re.match(rf"{re.escape(str(key))}\s*:", text)), 0)
        where = f"{path}:{line}: "
        if key not in options or key == "help":
            raise UsageError(f"{where}unknown key {key!r}.{did_you_mean(str(key), options)}")
        wanted = _wanted(options[key])
        if not _fits(value, options[key], wanted):
            hint = " (write yes and no in quotes)" if isinstance(value, bool) else ""
            raise UsageError(f"{where}{key} is {value!r}, a {type(value).__name__}; expected {wanted}{hint}.")


def _wanted(option: argparse.Action) -> str:
    name = getattr(option.type, "__name__", "")
    if option.nargs in ("+", "*"):
        return {"float": "a list of numbers", "int": "a list of numbers"}.get(name, "a list of strings")
    if name == "string_to_bool":
        return "true or false"
    return {"int": "an int", "float": "a number"}.get(name, "a string")


def _fits(value: object, option: argparse.Action, wanted: str) -> bool:
    if value is None:
        return option.default is None
    if wanted.startswith("a list"):
        numbers = wanted.endswith("numbers")
        kinds = (int, float) if numbers else (str,)
        return isinstance(value, list) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)
    if wanted == "true or false":
        return isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no")
    if wanted == "an int":
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted == "a number":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number or (isinstance(value, str) and bool(_NUMBER.fullmatch(value)))  # YAML reads 6e-4 as a string
    if option.dest in OWN_STRINGS:
        return isinstance(value, str)
    # Transformers has fields that take a string or a dictionary or a number: those it checks itself
    return not isinstance(value, bool) and (not isinstance(value, list) or option.dest == "report_to")
