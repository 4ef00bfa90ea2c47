"""Typer with the conventions of this command line: flags with underscores, one line for a wrong one."""

import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption
from typer.exceptions import TyperException
from typer.main import get_command

from rorchat.errors import UsageError, did_you_mean

COLUMNS_FLAG = "--columns"


def with_underscores(flag: str) -> str:
    """`--max-length` -> `--max_length`."""
    prefix = flag[: len(flag) - len(flag.lstrip("-"))]
    return prefix + flag[len(prefix) :].replace("-", "_")


class Command(TyperCommand):
    """A command whose flags have underscores, as in Transformers; hyphens are accepted as well."""

    def __init__(self, name: str | None, *, context_settings: dict[str, Any] | None = None, **settings: Any):
        # normalizes the names that are declared and the names that are typed
        context_settings = {"token_normalize_func": with_underscores} | (context_settings or {})
        super().__init__(name, context_settings=context_settings, **settings)
        for parameter in self.params:
            if isinstance(parameter, TyperOption):  # for the help and for messages
                parameter.opts = [with_underscores(flag) for flag in parameter.opts]
                parameter.secondary_opts = [with_underscores(flag) for flag in parameter.secondary_opts]

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        self._refuse_repeated_flags(args)
        has_columns = any(COLUMNS_FLAG in parameter.opts for parameter in self.params)
        return super().parse_args(ctx, repeat_columns(args) if has_columns else args)

    def _refuse_repeated_flags(self, words: Sequence[str]) -> None:
        """Raises UsageError if a flag that takes one value is given twice: Typer would use the last one."""
        options = [option for option in self.params if isinstance(option, TyperOption) and not option.multiple]
        single = {flag for option in options for flag in option.opts}
        flags = [with_underscores(word.partition("=")[0]) for word in words if word.startswith("--")]
        for flag in flags:
            if flag in single and flags.count(flag) > 1:
                raise UsageError(f"{flag} is given twice, but takes one value: give it once. See --help.")


def repeat_columns(words: Sequence[str]) -> list[str]:
    """`--columns A=x B=y` -> `--columns A=x --columns B=y`: the training commands take several values of a flag.

    `text=x` and `messages=x` are columns only if they come first: no other column goes with them, so later they are the
    source.
    """
    result: list[str] = []
    in_columns = is_first = False
    for word in words:
        role, sign, _ = word.partition("=")
        in_columns = in_columns and bool(sign) and role.isalpha() and (is_first or role not in ("text", "messages"))
        if in_columns and not is_first:
            result.append(COLUMNS_FLAG)
        result.append(word)
        is_first = word == COLUMNS_FLAG
        in_columns = in_columns or is_first
    return result


class App(typer.Typer):
    """A group of commands; without a command it shows its help."""

    def __init__(self, help: str):
        super().__init__(help=help, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def command(self, name: str | None = None, **settings: Any):
        return super().command(name, **({"cls": Command} | settings))

    def run(self) -> None:
        """Runs the command in `sys.argv` and exits.

        Typer's own `main` is not used: it turns KeyboardInterrupt and a closed pipe into exit codes without a message.

        Raises:
            UsageError: an unknown command or flag, a missing argument, a value of the wrong type.
        """
        command = get_command(self)
        try:
            with command.make_context("rorchat", sys.argv[1:]) as context:
                command.invoke(context)
        except typer.Exit as stop:  # of --help and --version
            sys.exit(stop.exit_code)
        except TyperException as error:
            message = error.format_message().strip()
            if not message:  # the help has been shown
                sys.exit(error.exit_code)
            if unknown := re.fullmatch(r"No such option: (\S+)( \(Possible options: (.*)\))?", message):
                message = f"Unknown option {unknown[1]}.{did_you_mean(unknown[1], (unknown[3] or '').split(', '))}"
            if "unexpected extra argument" in message:
                message += ". A flag that takes several values is repeated for each of them"
            raise UsageError(f"{message if message.endswith(('.', '?')) else message + '.'} See --help.") from None
        sys.exit(0)
