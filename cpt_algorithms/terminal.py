# SPDX-License-Identifier: Apache-2.0
"""Tables for a terminal of any width: names wrap, numbers are always whole."""

import copy
import re
import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

__all__ = ['make_console', 'print_table']

_NAME = 16  # characters that a name, or a long head, has on each of its lines at least
_NUMBER = re.compile(r'[-+]?\d[\d.,]*')
_WIDE = 100_000


def make_console() -> Console:
    """Standard output, as wide as the terminal; rich would take a log file for a narrow one."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def print_table(table: Table, console: Console) -> None:
    """Print a table. Columns that are justified to the right hold numbers, which are never wrapped or cut.

    If there is too little room, names and heads wrap; if that is not enough, the table is printed in parts, one below
    the other, each with the names.
    """
    if _width(table, console) <= console.width:
        console.print(table)
        return
    least = [_least(column, console) for column in table.columns]
    begin, numbers = 0, [index for index, column in enumerate(table.columns) if column.justify == 'right']
    while True:
        end, kept = len(numbers), _kept(table, numbers[begin:])
        while end > begin + 1 and _width(_part(table, kept, least), console) > console.width:
            end -= 1
            kept = _kept(table, numbers[begin:end])
        part = _part(table, kept, _widened(table, kept, least, console))
        if begin:
            part.title = None
        console.print(part)
        if end == len(numbers):
            return
        begin = end


def _measured(what: object, console: Console) -> Measurement:
    return Measurement.get(console, console.options.update(width=_WIDE), what)  # pyright: ignore[reportArgumentType]


def _width(table: Table, console: Console) -> int:
    return _measured(table, console).maximum


def _least(column: Column, console: Console) -> int:
    """How narrow a column can be."""
    head, cells = _measured(column.header, console), [_measured(cell, console) for cell in column.cells]
    if column.justify == 'right':
        return max([min(head.minimum, _NAME), *(cell.maximum for cell in cells)])
    words = [word for cell in column.cells for word in console.render_str(str(cell)).plain.split()]
    numbers = [len(word) for word in words if _NUMBER.match(word)]
    return max([min(_NAME, max([head.maximum, *(cell.maximum for cell in cells)])), *numbers])


def _kept(table: Table, numbers: Sequence[int]) -> list[int]:
    return [index for index, column in enumerate(table.columns) if column.justify != 'right' or index in numbers]


def _part(table: Table, kept: Sequence[int], widths: Sequence[int]) -> Table:
    part = copy.copy(table)
    part.columns = [
        replace(table.columns[index], _index=number, width=widths[index], no_wrap=False, overflow='fold')
        for number, index in enumerate(kept)
    ]
    return part


def _widened(table: Table, kept: Sequence[int], least: Sequence[int], console: Console) -> list[int]:
    """Give the remaining width to names, then to heads."""
    widths = list(least)
    free = console.width - _width(_part(table, kept, widths), console)
    for index in sorted(kept, key=lambda index: table.columns[index].justify == 'right'):
        column = table.columns[index]
        natural = max(_measured(each, console).maximum for each in (column.header, *column.cells))
        more = max(0, min(free, natural - widths[index]))
        widths[index], free = widths[index] + more, free - more
    return widths
