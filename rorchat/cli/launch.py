"""Runs a recipe (`rorchat sft ...`) in this process, or in several processes as `accelerate launch` does.

Flags of the launcher (`--num_processes`, `--accelerate_config`, ...) and of the recipe may be mixed. A flag that exists
in both is passed to the recipe. The command exits with the exit code of the recipe, whereas `accelerate launch` always
exits with 1 after a failure.
"""

import argparse
import contextlib
import copy
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence

from rorchat.errors import Interrupted, UsageError
from rorchat.stories import ACCELERATE_FOLDER, HELP_FOLDER, STORIES_FOLDER, find_accelerate_config
from rorchat.training.launcher import SHUTDOWN_SECONDS, find_waiting_parent, follow

#: Flags of the launcher that have a different meaning in a recipe, or would start something other than a recipe.
RECIPE_FLAGS = {
    "help", "debug", "gradient_accumulation_steps", "module", "no_python", "training_script", "training_script_args",
}  # fmt: skip
#: Seconds that processes have to save a checkpoint after a signal before the launcher kills them (torch's default: 30).
SHUTDOWN_TIMEOUT = "600"


def launch_recipe(command: str, argv: Sequence[str]) -> None:
    """Runs a recipe and exits with its code.

    If there is no launcher flag, no default configuration of Accelerate and at most one GPU, the recipe runs in the
    current process. Otherwise Accelerate starts it.

    Args:
        command: "pretrain", "sft", "dpo", "grpo" or "train-tokenizer".
        argv: flags of the recipe and of the launcher.
    """
    follow(find_waiting_parent())  # first: the end of a script is noticed from here on
    name = command.removeprefix("train-")  # the module in rorchat.recipes
    sys.argv[0] = f"rorchat {command}"  # shown in the help
    if {"--help", "-h"} & set(argv):
        # a file, because importing the recipe takes seconds
        print((HELP_FOLDER / f"{command}.txt").read_text(encoding="utf-8"), end="")
        sys.exit(0)
    if {"--help_all", "--help-all"} & set(argv):
        _run_here(name, argv)
    launcher_flags, recipe_flags = split_flags(argv)
    if launcher_flags == ["--num_processes=1"] and not _has_default_config():
        _use_one_gpu()
        _run_here(name, recipe_flags)
    if "RANK" in os.environ or not (launcher_flags or _has_default_config() or _count_gpus() > 1):
        _run_here(name, recipe_flags)  # started by a launcher, or the only process
    _launch(name, launcher_flags, recipe_flags)


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into flags of the launcher (as `--flag=value`) and flags of the recipe.

    Of a flag of the launcher that is given twice, the last value counts, which a message says.

    Raises:
        UsageError: a flag of the launcher has no value, or one too many, or a configuration file does not exist.
    """
    takes_value = _launcher_flags() | {"accelerate_config": True}
    launcher: dict[str, str] = {}
    recipe = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, sign, value = word.partition("=")
        flag = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        if flag not in takes_value:
            recipe.append(word)
            continue
        if takes_value[flag] and not sign:
            if not words:
                raise UsageError(f"--{flag} needs a value.")
            value, sign = words.pop(0), "="
        elif sign and not takes_value[flag]:
            raise UsageError(f"--{flag} takes no value: leave out {word.partition('=')[2]!r}.")
        if flag in ("accelerate_config", "config_file"):
            flag, value = "config_file", str(find_accelerate_config(value))
        if launcher.get(flag, value) != value:
            print(f"--{flag} is given twice: the last value counts, {value}", file=sys.stderr)
        launcher[flag] = value
    return [f"--{flag}={value}" if takes_value[flag] else f"--{flag}" for flag, value in launcher.items()], recipe


def _launcher_flags() -> dict[str, bool]:
    """Maps every flag of `accelerate launch` to whether it takes a value."""
    from accelerate.commands.launch import launch_command_parser

    return {
        option.removeprefix("--").replace("-", "_"): action.nargs != 0
        for action in launch_command_parser()._actions
        for option in action.option_strings
        if option.startswith("--") and option.removeprefix("--") not in RECIPE_FLAGS
    }


def _has_default_config() -> bool:
    from accelerate.commands.config.config_args import default_config_file

    return os.path.isfile(default_config_file)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()  # does not initialize CUDA


def _use_one_gpu() -> None:
    """Hides all GPUs except the first. Otherwise the Trainer would use all of them with DataParallel."""
    if _count_gpus() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _run_here(name: str, argv: Sequence[str]) -> None:
    importlib.import_module(f"rorchat.recipes.{name}").main(list(argv))
    sys.exit(0)


def _launch(name: str, launcher_flags: list[str], recipe_flags: list[str]) -> None:
    """Runs a recipe as `accelerate launch` does, and exits with the exit code of the first process that failed."""
    from accelerate.commands.launch import launch_command

    script = str(STORIES_FOLDER / f"{name}.py")
    arguments = _parse_launcher([*_add_defaults(launcher_flags), script, *recipe_flags])
    _silence_launchers()
    os.environ.setdefault(SHUTDOWN_SECONDS, SHUTDOWN_TIMEOUT)
    try:
        _replace_process_if_single(copy.copy(arguments))
        launch_command(arguments)
    # only the launcher raises these: the recipe runs in other processes
    except (ValueError, ImportError, AssertionError, RuntimeError) as error:
        raise UsageError(f"accelerate launch: {' '.join(str(error).split())}") from None
    except Exception as error:
        sys.exit(_exit_code(error))
    sys.exit(0)


def _parse_launcher(argv: list[str]) -> argparse.Namespace:
    """The settings of `accelerate launch`; raises UsageError where its parser would print how it is used, and exit."""
    from accelerate.commands.launch import launch_command_parser

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            arguments = launch_command_parser().parse_args(argv)
    except SystemExit:
        raise UsageError(f"accelerate launch: {printed.getvalue().strip().rpartition('error: ')[2]}.") from None
    if arguments.num_processes is not None and arguments.num_processes < 1:  # Accelerate takes 0 for the default
        raise UsageError(f"--num_processes is {arguments.num_processes}: give a positive number.")
    return arguments


def _silence_launchers() -> None:
    """Disables the error logs of Accelerate and torchrun: a recipe reports its failure in one line."""
    import torch.distributed.run  # noqa: F401

    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("accelerate.commands", "torch.distributed")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _add_defaults(launcher_flags: list[str]) -> list[str]:
    """Adds default flags, or the file that Accelerate 1.15 needs for several CPU processes, unless a file is given."""
    names = {flag.partition("=")[0]: flag.partition("=")[2] for flag in launcher_flags}
    if "--config_file" in names or _has_default_config():
        return launcher_flags
    if names.get("--num_processes", "1") not in ("0", "1") and _count_gpus() == 0:
        flags = [flag for flag in launcher_flags if flag != "--cpu"]
        return [f"--config_file={ACCELERATE_FOLDER / 'cpu.yaml'}", *flags]
    defaults = {"--mixed_precision": "no", "--num_machines": "1", "--dynamo_backend": "no"}
    return [*launcher_flags, *(f"{flag}={value}" for flag, value in defaults.items() if flag not in names)]


def _replace_process_if_single(arguments: argparse.Namespace) -> None:
    """Replaces this process with the training process if there is only one, so that it receives signals directly."""
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    arguments, *_ = _validate_launch_command(arguments)
    several = ("use_deepspeed", "use_fsdp", "use_megatron_lm", "multi_gpu", "tpu")
    if arguments.cpu or not any(vars(arguments)[name] for name in several):
        command, environment = prepare_simple_launcher_cmd_env(arguments)
        sys.stdout.flush()
        os.execvpe(command[0], command, environment)


def _exit_code(error: Exception) -> int:
    """Returns the exit code of the process that failed first. Prints a line if the process was killed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, SignalException):
        return Interrupted.exit_code  # all processes have saved a checkpoint and exited
    if not isinstance(error, ChildFailedError):
        raise error
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {rank} was killed by {name}.", file=sys.stderr)
        return 128 - failure.exitcode
    return failure.exitcode
