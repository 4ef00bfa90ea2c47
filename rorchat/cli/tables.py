"""Tables: drawn on a terminal, Markdown in a file or a pipe."""

import shutil
import sys
from collections.abc import Sequence

WIDE_ENOUGH = 24  # characters in which most cells fit, or wrap without being cut inside a word
GAP = 3  # between columns


def print_table(header: list[str], rows: list[list[str]], less_important: Sequence[str] = ()) -> None:
    """Prints a table. On a terminal, cells are wrapped to its width.

    Args:
        less_important: columns that a narrow terminal does not show, the least important first.
    """
    if not sys.stdout.isatty():
        from rorchat.reporting.tables import format_table

        print(format_table(header, rows))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = _choose_columns(header, rows, less_important, shutil.get_terminal_size().columns)
    drawing = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number in shown:
        drawing.add_column(header[number], no_wrap=number == shown[0], overflow="fold")
    for row in rows:
        drawing.add_row(*(Text(row[number]) for number in shown))
    Console().print(drawing)
    hidden = [name for number, name in enumerate(header) if number not in shown]
    if hidden:
        print(f"A wider terminal or a pipe also shows: {', '.join(hidden)}.")


def _choose_columns(header: list[str], rows: list[list[str]], less_important: Sequence[str], room: int) -> list[int]:
    """The numbers of the columns that fit into `room` characters; the important ones in any case."""
    shown = list(range(len(header)))
    for name in less_important:
        widths = [_width(header, rows, number) for number in shown]
        if sum(min(width, WIDE_ENOUGH) + GAP for width in widths) <= room:
            break
        shown.remove(header.index(name))
    return shown


def _width(header: list[str], rows: list[list[str]], number: int) -> int:
    return max(len(line[number]) for line in (header, *rows))
