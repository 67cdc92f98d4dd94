"""A table on the terminal: drawn by rich where it is installed, in aligned columns where it is not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

LOG_WIDTH = 160  # of what goes to a file: nothing is cut off


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> None:
    """The first column is text, the others are aligned to the right. ``marks``: a rich style for each row."""
    print()
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # a machine that only measures: .ci/gpu.py lists the packages that it has
        print(plain_table(title, header, rows), flush=True)
        return
    print(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*(Text(cell) for cell in row), style=marks[number] if marks else "")
    console = Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)
    console.print(table, highlight=False)
    sys.stdout.flush()


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    >>> print(plain_table("ages", ["name", "years"], [["Mia", "7"], ["Tom", "11"]]))
    ages
    name  years
    Mia       7
    Tom      11
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def shown(line: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([title, *map(shown, lines)])
