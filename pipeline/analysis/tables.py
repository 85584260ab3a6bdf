"""Tables as data, and as Markdown, LaTeX and CSV to paste."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from probsurgery.pipeline.store.results import Spread

Value = Spread | float | str
MEASURED, BASELINE, PUBLISHED, DIFFERENCE = "measured", "baseline", "published", "difference"
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_LATEX |= {"<": "$<$", ">": "$>$", "±": r"$\pm$"}


@dataclass(frozen=True)
class Line:
    """One line of a table: what it is of, and its values by column; a column that it lacks is shown as "-"."""

    label: str
    values: dict[str, Value]
    kind: str = MEASURED
    """`measured`; `baseline`, which is no candidate for the best; `published` by others; `difference` to such a one."""
    method: str = ""
    """What the published tables call it."""


@dataclass(frozen=True)
class Table:
    """A table of figures."""

    title: str
    """With the protocol under which the figures were measured."""
    columns: dict[str, str]
    """Each column's format."""
    lines: tuple[Line, ...]
    best: Callable[[Sequence[float]], float] | None = None
    """`max` or `min` over the measured lines of a column; None: no column has a best."""
    first: str = "method"
    """What the lines are."""
    notes: tuple[str, ...] = field(default=())

    def is_best(self, line: Line, column: str) -> bool:
        """Whether a cell is the best of its column, as it is shown; several may be."""
        if self.best is None or line.kind != MEASURED:
            return False
        figures = {id(one): _figure(one, column) for one in self.lines if one.kind == MEASURED}
        form = self.columns[column].replace(",", "")
        shown = {key: float(format(value, form)) for key, value in figures.items() if value is not None}
        return len(shown) > 1 and shown.get(id(line)) == self.best(shown.values())

    def text(self, line: Line, column: str) -> str:
        """A cell as text."""
        value, form = line.values.get(column), self.columns[column]
        form = f"+{form}" if line.kind == DIFFERENCE else form
        if value is None or isinstance(value, str):
            return value or "-"
        return spread_text(value, form) if isinstance(value, Spread) else format(value, form)

    def to_json(self) -> dict:
        """Figures in full, as `{"mean", "sd", "seeds"}` where there are seeds."""
        lines = [
            {"label": line.label, "kind": line.kind, "method": line.method}
            | {"values": {c: vars(v) if isinstance(v, Spread) else v for c, v in line.values.items()}}
            | {"best": [column for column in self.columns if self.is_best(line, column)]}
            for line in self.lines
        ]
        return {"title": self.title, "columns": list(self.columns), "lines": lines, "notes": list(self.notes)}


def spread_text(figure: Spread, form: str) -> str:
    """A mean, with the standard deviation where there is one."""
    return format(figure.mean, form) + ("" if figure.sd is None else f"±{figure.sd:{form.lstrip('+')}}")


def _figure(line: Line, column: str) -> float | None:
    value = line.values.get(column)
    return value.mean if isinstance(value, Spread) else value if isinstance(value, int | float) else None


def to_markdown(tables: Sequence[Table]) -> str:
    """GitHub's tables, each under its title; the best of a column is bold."""
    parts = []
    for table in tables:
        rows = [[table.first, *table.columns], ["---", *["---:"] * len(table.columns)]]
        for line in table.lines:
            cells = (f"**{t}**" if table.is_best(line, c) else t for c, t in _texts(table, line))
            rows.append([line.label, *cells])
        text = "\n".join("| " + " | ".join(c.replace("|", r"\|") for c in row) + " |" for row in rows)
        parts.append("\n\n".join([f"**{table.title}**", text, *table.notes]))
    return "\n\n".join(parts) + "\n"


def to_latex(tables: Sequence[Table]) -> str:
    r"""`table` environments for the package booktabs; the best of a column is bold."""
    parts = ["% \\usepackage{booktabs}"]
    for table in tables:
        rows = [" & ".join(map(_escaped, (table.first, *table.columns))) + r" \\", r"\midrule"]
        before = None
        for line in table.lines:
            if (before == BASELINE and line.kind != BASELINE) or line.kind == PUBLISHED != before != DIFFERENCE:
                rows.append(r"\midrule")
            before = line.kind
            cells = (
                rf"\textbf{{{_escaped(t)}}}" if table.is_best(line, c) else _escaped(t) for c, t in _texts(table, line)
            )
            rows.append(" & ".join([_escaped(line.label), *cells]) + r" \\")
        caption = _escaped(" ".join([f"{table.title}.", *table.notes]))
        begin = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
        begin += [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
        parts.append("\n".join([*begin, *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """All figures in full, one a row: table, line, kind, column, value, standard deviation over seeds, seeds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "line", "kind", "column", "value", "sd", "seeds"])
    for table in tables:
        for line in table.lines:
            for column in table.columns:
                value = line.values.get(column)
                if value is None:
                    continue
                figures = [value.mean, value.sd, value.seeds] if isinstance(value, Spread) else [value, None, None]
                writer.writerow([table.title, line.label, line.kind, column, *figures])
    return out.getvalue()


def _texts(table: Table, line: Line) -> list[tuple[str, str]]:
    return [(column, table.text(line, column)) for column in table.columns]


def _escaped(text: str) -> str:
    return re.sub(r"[&%$#_{}\\~^<>±]", lambda found: _LATEX[found[0]], text)


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "markdown": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
}
