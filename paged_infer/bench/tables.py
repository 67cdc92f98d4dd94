"""A table on the terminal: drawn by rich where it is installed, in aligned columns where it is not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

LOG_WIDTH = 160  # of what goes to a file: nothing is cut off
GAP = 2  # columns of space between two of a table


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> None:
    """The first column is text, the others are aligned to the right. ``marks``: a rich style for each row.

    A table that is wider than the terminal is printed in parts, each with the first column: no word is broken.
    """
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
    console = Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)
    for columns in parts_of(header, rows, console.width):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(header[column], justify="right" if column else "left", overflow="fold", no_wrap=True)
        for number, row in enumerate(rows):
            table.add_row(*(Text(row[column]) for column in columns), style=marks[number] if marks else "")
        console.print(table, highlight=False)
    sys.stdout.flush()


def parts_of(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The columns of each part of a table that fits ``width``: the first one, and as many of the others as possible.

    >>> parts_of(["ages", "years"], [["Mia", "7"], ["Tom", "11"]], 80)
    [[0, 1]]
    >>> parts_of(["name", "one", "two"], [["Mia", "1", "2"]], 10)
    [[0, 1], [0, 2]]
    """
    cells = [[line for row in (header, *rows) for line in row[column].split("\n")] for column in range(len(header))]
    first, *widths = [max(map(len, lines)) for lines in cells]
    parts: list[list[int]] = []
    room = 0
    for column, needed in enumerate(widths, 1):
        if needed + GAP > room or not parts:
            parts.append([0])
            room = width - first - 1
        parts[-1].append(column)
        room -= needed + GAP
    return parts or [[0]]


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
