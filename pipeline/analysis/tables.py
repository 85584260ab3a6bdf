"""Tables as data, and as Markdown, LaTeX and CSV to paste."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean

from probsurgery.pipeline.store.results import Spread

AVERAGE = "Avg"
"""The column of averages over tasks."""
Value = Spread | float | str
MEASURED, BASELINE, PUBLISHED, DIFFERENCE = "measured", "baseline", "published", "difference"
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": "$<$", ">": "$>$", "±": r"$\pm$"}
)


@dataclass(frozen=True)
class Line:
    """One line of a table: its label, and its values by column. A column without a value is shown as "-"."""

    label: str
    values: Mapping[str, Value | None]
    kind: str = MEASURED
    """`measured`; `baseline`, which does not compete for the best; `published`; or `difference` to a published line."""
    method: str = ""
    """Its name in the published tables."""

    def number(self, column: str) -> float | None:
        """A value as a number, the mean if it is over seeds; None for text or no value."""
        value = self.values.get(column)
        value = value.mean if isinstance(value, Spread) else value
        return value if isinstance(value, int | float) else None


def mean_of(lines: Iterable[Line], column: str) -> float | None:
    """The mean of a column; None unless every line has a number there."""
    numbers = [line.number(column) for line in lines]
    known = [number for number in numbers if number is not None]
    return fmean(known) if known and len(known) == len(numbers) else None


@dataclass(frozen=True)
class Table:
    """A table of figures."""

    title: str
    """Names the protocol under which the figures were measured."""
    columns: dict[str, str]
    """The format of each column."""
    lines: tuple[Line, ...]
    best: Callable[[Sequence[float]], float] | None = None
    """`max` or `min` over the measured lines of a column; None: no column has a best."""
    first: str = "method"
    """Header of the column of labels."""
    notes: tuple[str, ...] = ()

    def is_best(self, line: Line, column: str) -> bool:
        """Whether a cell, as shown, is the best of its column. Several cells may be."""
        if self.best is None or line.kind != MEASURED:
            return False
        rounded = [self._rounded(other, column) for other in self.lines if other.kind == MEASURED]
        shown = [value for value in rounded if value is not None]
        return len(shown) > 1 and self._rounded(line, column) == self.best(shown)

    def _rounded(self, line: Line, column: str) -> float | None:
        """A cell's number as it is shown; None for text or no value."""
        number = line.number(column)
        return None if number is None else float(format(number, self.columns[column].replace(",", "")))

    def text(self, line: Line, column: str) -> str:
        """A cell as text."""
        value, spec = line.values.get(column), self.columns[column]
        spec = f"+{spec}" if line.kind == DIFFERENCE else spec
        if value is None or isinstance(value, str):
            return value or "-"
        return spread_text(value, spec) if isinstance(value, Spread) else format(value, spec)

    def to_json(self) -> dict[str, object]:
        """Figures in full; a figure over seeds is `{"mean", "sd", "seeds"}`."""
        lines = []
        for line in self.lines:
            values = {column: vars(v) if isinstance(v, Spread) else v for column, v in line.values.items()}
            best = [column for column in self.columns if self.is_best(line, column)]
            described = {"label": line.label, "kind": line.kind, "method": line.method}
            lines.append(described | {"values": values, "best": best})
        return {"title": self.title, "columns": list(self.columns), "lines": lines, "notes": list(self.notes)}


def spread_text(spread: Spread, spec: str) -> str:
    """A mean, with the standard deviation if there is one."""
    return format(spread.mean, spec) + ("" if spread.sd is None else f"±{spread.sd:{spec.lstrip('+')}}")


def to_markdown(tables: Sequence[Table]) -> str:
    """GitHub's tables, each under its title. The best of a column is bold."""
    blocks = []
    for table in tables:
        rows = [[table.first, *table.columns], ["---", *["---:"] * len(table.columns)]]
        rows += [[line.label, *_cells(table, line, "**{}**")] for line in table.lines]
        text = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
        blocks.append("\n\n".join([f"**{table.title}**", text, *table.notes]))
    return "\n\n".join(blocks) + "\n"


def to_latex(tables: Sequence[Table]) -> str:
    r"""`table` environments for the package booktabs. The best of a column is bold."""
    blocks = ["% \\usepackage{booktabs}"]
    for table in tables:
        rows = [" & ".join(map(_escaped, (table.first, *table.columns))) + r" \\", r"\midrule"]
        previous = None
        for line in table.lines:
            ends_baselines = previous == BASELINE != line.kind
            if ends_baselines or (line.kind == PUBLISHED and previous not in (PUBLISHED, DIFFERENCE)):
                rows.append(r"\midrule")
            previous = line.kind
            cells = _cells(table, line, r"\textbf{{{}}}", _escaped)
            rows.append(" & ".join([_escaped(line.label), *cells]) + r" \\")
        caption = _escaped(" ".join([f"{table.title}.", *table.notes]))
        begin = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
        begin += [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
        blocks.append("\n".join([*begin, *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(blocks) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """All figures in full, one a row: table, line, kind, column, value, standard deviation over seeds, seeds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "line", "kind", "column", "value", "sd", "seeds"])
    for table in tables:
        for line in table.lines:
            for column in table.columns:
                if (value := line.values.get(column)) is not None:
                    figures = astuple(value) if isinstance(value, Spread) else (value, None, None)
                    writer.writerow([table.title, line.label, line.kind, column, *figures])
    return out.getvalue()


def _cells(table: Table, line: Line, bold: str, escaped: Callable[[str], str] = str) -> list[str]:
    """The cells of a line as text; `bold` is the form of the best."""
    cells = {column: escaped(table.text(line, column)) for column in table.columns}
    return [bold.format(text) if table.is_best(line, column) else text for column, text in cells.items()]


def _escaped(text: str) -> str:
    return text.translate(_LATEX)


FORMATS = {"markdown": to_markdown, "latex": to_latex, "csv": to_csv}
