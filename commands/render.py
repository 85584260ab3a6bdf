"""Results on standard output, as tables or JSON; notes on standard error."""

import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from probsurgery.pipeline.analysis.tables import FORMATS, Line, Table
from probsurgery.pipeline.files import json_text
from probsurgery.pipeline.texts import plain

_LABEL_WIDTH = 24
"""Least width of a column of labels that are longer."""
_GAP, _EDGES = 2, 2
"""Spaces before every column but the first, and on both sides of a table."""
_UNLIMITED = 10_000


def say(text: str) -> None:
    """Print a line on standard output. Names in it may be somebody else's."""
    print(plain(text))


def note(text: str) -> None:
    """Print a line on standard error."""
    print(plain(text), file=sys.stderr)


def print_json(value: object) -> None:
    """Print a machine-readable result."""
    print(json_text(value, indent=1))


def counted(count: int, noun: str) -> str:
    """A number of things, such as "1 cache" or "2 caches"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def rate_text(per_second: float) -> str:
    """A rate with two digits or more, such as 0.25 or 1,234."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def print_tables(tables: Sequence[Table], form: str = "text", titles: Mapping[str, str] | None = None) -> None:
    """Print tables as text, JSON, or another of `tables.FORMATS`; `titles` are shown instead of tasks' names."""
    tables = [replace(table, titles=titles) for table in tables] if titles else tables
    if form == "json":
        print_json([table.to_json() for table in tables])
        return
    if form in FORMATS:
        print(FORMATS[form](tables), end="")
        return
    for table in tables:
        _print_text(table.title)
        header = list(table.header)
        rows = [[Text(table.label(line)), *_cells(table, line)] for line in table.lines]
        if sys.stdout.isatty() and len(rows) < len(header):
            turned = [[Text(column), *(row[index] for row in rows)] for index, column in enumerate(header) if index]
            turned_header = ["", *(row[0].plain for row in rows)]
            if len(_blocks(turned_header, turned)) < len(_blocks(header, rows)):
                header, rows = turned_header, turned
        print_rows(header, rows)
        for text in table.notes:
            _print_text(text)


def _cells(table: Table, line: Line) -> list[Text]:
    return [Text(table.text(line, column), "bold" if table.is_best(line, column) else "") for column in table.columns]


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Print rows of text in columns, the first aligned left and the others right.

    Text is wrapped between words only. Columns beyond a terminal's width follow in further blocks, each with the first
    column; a pipe has no width.
    """
    texts = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        print("\n".join(_lines(columns, texts)))
        return
    console = _console()
    for block in _blocks(columns, texts):
        grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        widths = {index: _least_width(columns, texts, index) for index in block}
        room = console.width - _EDGES - sum(widths.values()) - _GAP * (len(block) - 1)
        for index in block:  # what is left goes to the first columns that would be wrapped
            widest = max([len(columns[index]), *(len(row[index]) for row in texts)])
            more = max(0, min(room, widest - widths[index]))
            room -= more
            justify: Literal["left", "right"] = "right" if index else "left"
            grid.add_column(plain(columns[index]), justify=justify, width=widths[index] + more, overflow="fold")
        for row in texts:
            grid.add_row(*(Text(plain(row[index].plain), row[index].style) for index in block))
        console.print(grid)


def _lines(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> Iterator[str]:
    """A table as on a terminal without a width: rich takes minutes for the tables of large sweeps."""
    cells = [[plain(column) for column in columns], *([plain(cell.plain) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    empty = " " * (sum(widths) + _GAP * (len(widths) - 1) + _EDGES)
    yield empty
    for number, row in enumerate(cells):
        spaces = [" " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)]
        padded = [row[0] + spaces[0], *map(str.__add__, spaces[1:], row[1:])]
        yield f" {(' ' * _GAP).join(padded)} "
        if not number:
            yield f" {'─' * (len(empty) - _EDGES)} "
    yield empty


def _blocks(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> list[list[int]]:
    """Numbers of the columns that fit side by side, the first column in every block."""
    blocks: list[list[int]] = []
    room = 0
    for index in range(1, len(columns)):
        width = _GAP + _least_width(columns, rows, index)
        if not blocks or room < width:
            blocks.append([0])
            room = _console().width - _EDGES - _least_width(columns, rows, 0)
        blocks[-1].append(index)
        room -= width
    return blocks or [[0]]


def _least_width(columns: Sequence[str], rows: Sequence[Sequence[Text]], index: int) -> int:
    """The width of a column in which no word is broken; labels, in the first one, get room for several words.

    Only a word of more than half of the terminal is folded.
    """
    texts, half = [columns[index], *(row[index].plain for row in rows)], (_console().width - _EDGES - _GAP) // 2
    longest_word = min(half, max((len(word) for text in texts for word in text.split()), default=1))
    return longest_word if index else max(longest_word, min(_LABEL_WIDTH, half, max(map(len, texts))))


def _print_text(text: str) -> None:
    """Print a paragraph, wrapped between words on a terminal."""
    width = _console().width if sys.stdout.isatty() else sys.maxsize
    print(textwrap.fill(plain(text), width, break_long_words=False, break_on_hyphens=False))


def _console() -> Console:
    # A name may look like markup. Without a terminal, tables take the width that they need.
    shape: dict[str, Any] = {} if sys.stdout.isatty() else {"width": _UNLIMITED, "force_terminal": False}
    return Console(markup=False, emoji=False, highlight=False, **shape)
