"""Results on standard output, as tables or JSON; notes on standard error."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from probsurgery.pipeline.analysis.tables import FORMATS, Line, Table


def note(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)


def print_json(value: object) -> None:
    """Print a machine-readable result."""
    print(json.dumps(value, indent=1, default=str))


def printable(text: str) -> str:
    """Text from a foreign file, without characters that control a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def counted(count: int, noun: str) -> str:
    """A number of things, such as "1 cache" or "2 caches"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def print_tables(tables: Sequence[Table], form: str = "text") -> None:
    """Print tables as text, JSON, or another of `tables.FORMATS`."""
    if form == "json":
        print_json([table.to_json() for table in tables])
        return
    if form in FORMATS:
        print(FORMATS[form](tables), end="")
        return
    for table in tables:
        print(printable(table.title))
        print_rows((table.first, *table.columns), (_cells(table, line) for line in table.lines))
        for text in table.notes:
            print(printable(text))


def _cells(table: Table, line: Line) -> list[str | Text]:
    texts = {column: printable(table.text(line, column)) for column in table.columns}
    return [line.label, *(Text(text, "bold") if table.is_best(line, c) else text for c, text in texts.items())]


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Print rows of text in columns, the first aligned left and the others right."""
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        # A narrow terminal folds long names; nothing is cut off.
        grid.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in row))
    # A pipe has no width: tables take what they need, where rich would wrap them at 80 columns.
    shape: dict[str, Any] = {} if sys.stdout.isatty() else {"width": 200, "force_terminal": False}
    Console(markup=False, emoji=False, **shape).print(grid)  # a name may look like markup
