"""Tables on a terminal and in a pipe."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios

import pytest
from support import command

CODE = "import sys; from rorchat.cli import main; sys.argv = ['rorchat', 'data', 'list']; main()"


def show_on_terminal(columns: int) -> list[str]:
    """The lines of `rorchat data list` on a terminal of this width, without colours."""
    process, screen = pty.fork()
    if not process:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        os.execve(sys.executable, [sys.executable, "-c", CODE], environment | {"TERM": "xterm"})
    shown = b""
    while True:
        try:
            shown += os.read(screen, 65_536)
        except OSError:  # the process has closed the terminal
            break
    os.waitpid(process, 0)
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()


@pytest.mark.parametrize("columns", [80, 130, 220])
def test_a_table_fits_the_terminal_and_no_word_of_a_licence_is_lost(columns):
    lines = show_on_terminal(columns)
    table = lines[: next(number for number, line in enumerate(lines) if line.startswith(("A wider", "Not for")))]
    assert len(table) > 40 and all(len(line.rstrip()) <= columns for line in table)
    assert "| --- |" not in "".join(lines)
    words = " ".join(" ".join(table).split())
    for word in ("alpaca", "bookcorpus", "conversation", "74,004,228", "smashwords.com"):
        assert f" {word}" in words
    is_narrow = columns < 200
    assert ("A wider terminal or a pipe also shows: " in "\n".join(lines)) == is_narrow
    assert ("tokens in the loss" in "\n".join(lines[:3])) == (not is_narrow)


def test_in_a_pipe_a_table_is_markdown_with_all_columns():
    lines = command("data", "list").stdout.splitlines()
    assert lines[0] == "| source | description | kinds | from | size | licence | tokens in the loss |"
    assert len(lines) > 30 and all(line.startswith("| ") for line in lines[:30])
