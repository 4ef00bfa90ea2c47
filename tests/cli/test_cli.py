"""The command line itself: version, help and invalid arguments."""

import pytest
import typer
from support import command

import rorchat
from rorchat.cli import app


def commands_of(group, path=()):
    """(arguments, command) of every command without subcommands."""
    for name, item in group.commands.items():
        if hasattr(item, "commands"):
            yield from commands_of(item, (*path, name))
        else:
            yield (*path, name), item


COMMANDS = dict(commands_of(typer.main.get_command(app)))


def test_the_version_is_that_of_the_package():
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"rorchat {rorchat.__version__}\n")


def test_without_a_command_the_help_lists_all():
    done = command()
    assert done.returncode == 2 and done.stderr == ""
    assert [arguments[0] for arguments in COMMANDS if f" {arguments[0]} " not in done.stdout] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nosuch"], "Unknown option --nosuch. See --help."),
        (["nosuch"], "No such command 'nosuch'"),
        (["chat"], "Missing argument 'folder'"),
        (["chat", "x", "--temprature", "1"], "Unknown option --temprature. Did you mean '--temperature'? See --help."),
        (["push", "x", "y/z", "--privat"], "Did you mean '--private'?"),
        (["chat", "x", "--top_p", "0.9", "--top-p=0.8"], "--top_p is given twice"),
        (["evaluate", "x", "--text", "a.txt", "--text", "b.txt"], "--text is given twice"),
        (["chat", "x", "--top_p", "high"], "Invalid value for '--top_p'"),
        (["data", "prepare", "tinytown=9"], "Missing option '--tokenizer'"),
        (["recipes", "copy", "dem"], "No story 'dem'. Did you mean 'demo'?"),
    ],
)
def test_an_invalid_argument_is_one_line_and_exit_code_2(arguments, message):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_flags_are_written_with_underscores():
    flags = {flag for item in COMMANDS.values() for parameter in item.params for flag in parameter.opts}
    assert len(flags) > 40
    assert [flag for flag in flags if "-" in flag.removeprefix("--")] == []


def test_hyphens_in_flags_are_accepted():
    done = command("tokenizer", "compare", "nowhere/", "--max-characters", "5")
    assert done.returncode == 65 and "No tokenizer" in done.stderr
