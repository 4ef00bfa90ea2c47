"""Tables: drawn on a terminal, Markdown in a file or a pipe."""

import sys


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Prints a table. On a terminal, cells are wrapped to its width."""
    if not sys.stdout.isatty():
        from rorchat.reporting import format_table

        print(format_table(header, rows))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawing = Table(*header, box=SIMPLE_HEAD, pad_edge=False)
    drawing.columns[0].min_width = max(len(row[0]) for row in rows)
    for column in drawing.columns:
        column.overflow = "fold"
    for row in rows:
        drawing.add_row(*map(Text, row))
    Console().print(drawing)
