"""Tables as data, and as Markdown, LaTeX and CSV to paste."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import zip_longest

from probsurgery.pipeline.store.results import Spread, mean_if_known, spread
from probsurgery.pipeline.texts import plain

AVERAGE = "Avg"
"""The column of averages over tasks."""
_MOST_COLUMNS = 12
"""Of figures, on a page."""
Value = Spread | float | str
MEASURED, BASELINE, PUBLISHED, DIFFERENCE = "measured", "baseline", "published", "difference"
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*<|$"})
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {c: f"{{{c}}}" for c in "[]*"}  # after the end of a row they would belong to it
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", plain(self.label))
        # What is no number is no figure: it has no place in JSON, and no order.
        known = {column: _known(value) for column, value in self.values.items()}
        object.__setattr__(self, "values", known)

    @cached_property
    def seeds(self) -> int:
        """Number of seeds that the line's figures are over; 0 if none depends on seeds."""
        return max((len(v.by_seed) for v in self.values.values() if isinstance(v, Spread)), default=0)

    def number(self, column: str) -> float | None:
        """A value as a number, the mean if it is over seeds; None for text or no value."""
        value = self.values.get(column)
        value = value.mean if isinstance(value, Spread) else value
        return value if isinstance(value, int | float) else None


def _known(value: Value | None) -> Value | None:
    """A value, or None for one that is NaN or infinite. Text is `plain`."""
    if isinstance(value, str):
        return plain(value)
    number = value.mean if isinstance(value, Spread) else value
    return None if isinstance(number, float) and not math.isfinite(number) else value


def mean_of(lines: Iterable[Line], column: str) -> float | None:
    """The mean of a column; None unless every line has a number there."""
    return mean_if_known(line.number(column) for line in lines)


@dataclass(frozen=True)
class Table:
    """A table of figures."""

    title: str
    """Names the protocol under which the figures were measured."""
    columns: dict[str, str]
    """The format of each column."""
    lines: tuple[Line, ...]
    best: Callable[[Sequence[float]], float] | None = None
    """`max` or `min`, by which the best measured lines of a column are found; None: no column has a best."""
    first: str = "method"
    """Header of the column of labels."""
    notes: tuple[str, ...] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    """What is shown instead of the names of some columns and lines: the tasks' titles."""

    def __post_init__(self) -> None:
        # Names of files and folders are in them, which every format would show.
        object.__setattr__(self, "title", plain(self.title))
        object.__setattr__(self, "notes", tuple(map(plain, self.notes)))

    @property
    def is_turned(self) -> bool:
        """Whether pages show a line for each column, because no page is as wide as so many columns."""
        return len(self.columns) > max(_MOST_COLUMNS, len(self.lines))

    def is_best(self, line: Line, column: str) -> bool:
        """Whether a cell is within one standard deviation of the best of its column, or shown as the same number.

        Figures over seeds are compared on the seeds that all lines of the column have, if there are any.
        """
        return id(line) in self._best_lines.get(column, ())

    @cached_property
    def _best_lines(self) -> dict[str, set[int]]:
        """By column, the lines that are best, by their identity."""
        return {column: self._best_of(column) for column in self.columns} if self.best else {}

    def _best_of(self, column: str) -> set[int]:
        measured = [(line, line.values.get(column)) for line in self.lines if line.kind == MEASURED]
        over_seeds = [value for _, value in measured if isinstance(value, Spread) and value.by_seed]
        common = set.intersection(*(set(value.by_seed) for value in over_seeds)) if over_seeds else set()
        compared: dict[int, tuple[float, float]] = {}
        for line, value in measured:
            if isinstance(value, Spread) and value.by_seed and common:
                value = spread({seed: value.by_seed[seed] for seed in common})
            number = value.mean if isinstance(value, Spread) else value
            if isinstance(number, int | float):
                rounded = float(format(number, self.columns[column].replace(",", "")))
                compared[id(line)] = rounded, (value.sd or 0.0) if isinstance(value, Spread) else 0.0
        if self.best is None or len(compared) < 2:
            return set()
        best = self.best([number for number, _ in compared.values()])
        margin = max(deviation for number, deviation in compared.values() if number == best)
        return {line for line, (number, _) in compared.items() if abs(number - best) <= margin}

    @property
    def header(self) -> tuple[str, ...]:
        """The header as it is shown."""
        return (self.first, *(self.titles.get(column, column) for column in self.columns))

    def label(self, line: Line) -> str:
        """A line's label as it is shown, with the number of seeds where lines differ in it."""
        label = self.titles.get(line.label, line.label)
        return f"{label} (n={line.seeds})" if line.seeds and self._seeds_differ else label

    @cached_property
    def _seeds_differ(self) -> bool:
        return len({line.seeds for line in self.lines if line.seeds}) > 1

    def text(self, line: Line, column: str) -> str:
        """A cell as text, with the number of its seeds if it lacks some of the line's."""
        value, spec = line.values.get(column), self.columns[column]
        spec = f"+{spec}" if line.kind == DIFFERENCE else spec
        if value is None or isinstance(value, str):
            return value or "-"
        if not isinstance(value, Spread):
            return format(value, spec)
        lacks_seeds = 0 < len(value.by_seed) < line.seeds
        return spread_text(value, spec) + (f" (n={len(value.by_seed)})" if lacks_seeds else "")

    def to_json(self) -> dict[str, object]:
        """Figures in full, null where there is none; one over seeds is `{"mean", "sd", "seeds", "by_seed"}`."""
        lines = []
        for line in self.lines:
            known = {**dict.fromkeys(self.columns), **line.values}
            values = {column: asdict(v) if isinstance(v, Spread) else v for column, v in known.items()}
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
        header, *rows = _grid(table, "**{}**", _in_markdown)
        rows = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        blocks.append("\n\n".join([f"**{_in_markdown(table.title)}**", text, *map(_in_markdown, table.notes)]))
    return "\n\n".join(blocks) + "\n"


def to_latex(tables: Sequence[Table]) -> str:
    r"""`table` environments for the package booktabs. The best of a column is bold."""
    blocks = ["% \\usepackage{booktabs}"]
    for table in tables:
        header, *cells = _grid(table, r"\textbf{{{}}}", _in_latex)
        if table.is_turned:  # labels of methods are long
            header = [r"\shortstack[r]{" + label.replace(" (", r" \\ (") + "}" for label in header]
        rows, previous = [" & ".join(header) + r" \\", r"\midrule"], None
        for row, line in zip_longest(cells, () if table.is_turned else table.lines):
            kind = line.kind if line else None
            ends_baselines = previous == BASELINE != kind
            if ends_baselines or (kind == PUBLISHED and previous not in (PUBLISHED, DIFFERENCE)):
                rows.append(r"\midrule")
            previous = kind
            rows.append(" & ".join(row) + r" \\")
        caption = _in_latex(" ".join([f"{table.title}.", *table.notes]))
        begin = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
        begin += [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule"]
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
                    value = _in_csv(value) if isinstance(value, str) else value
                    figures = (value.mean, value.sd, value.seeds) if isinstance(value, Spread) else (value, None, None)
                    writer.writerow([*map(_in_csv, (table.title, line.label, line.kind, column)), *figures])
    return out.getvalue()


def _grid(table: Table, bold: str, escaped: Callable[[str], str]) -> list[list[str]]:
    """The header and a row for each line; turned, if the table is to be."""
    rows = [[escaped(text) for text in table.header]]
    rows += [[escaped(table.label(line)), *_cells(table, line, bold, escaped)] for line in table.lines]
    return [list(column) for column in zip(*rows, strict=True)] if table.is_turned else rows


def _cells(table: Table, line: Line, bold: str, escaped: Callable[[str], str] = str) -> list[str]:
    """The cells of a line as text; `bold` is the form of the best."""
    cells = {column: escaped(table.text(line, column)) for column in table.columns}
    return [bold.format(text) if table.is_best(line, column) else text for column, text in cells.items()]


def _in_markdown(text: str) -> str:
    return text.translate(_MARKDOWN).replace("](", r"]\(")  # brackets alone are no link


def _in_latex(text: str) -> str:
    return text.translate(_LATEX)


def _in_csv(text: str) -> str:
    """Text that no spreadsheet takes for a formula. Labels may begin with "+ ", which is followed by a plain name."""
    is_formula = text.startswith(("=", "@", "+", "-")) and not text.startswith("+ ")
    return f"'{text}" if is_formula else text


FORMATS = {"markdown": to_markdown, "latex": to_latex, "csv": to_csv}
