"""Tables of single runs of `fit` and `sweep`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from probsurgery.pipeline.analysis.labels import head_count, parameters_each, training_seconds, value_text
from probsurgery.pipeline.analysis.tables import AVERAGE, BASELINE, Line, Table, mean_of
from probsurgery.pipeline.fitting.sweep import SweepResult
from probsurgery.pipeline.store.results import ResultRow


def fit_table(rows: Sequence[ResultRow], folder: Path | None = None) -> Table:
    """Accuracy in percent and bias of one fit on each task and on average; `folder` is where the head is saved."""
    columns = {"merged": ".1f", "with head": ".1f", "expert": ".1f", "bias before": ".3f", "after": ".3f"}
    lines = []
    for row in rows:
        accuracy = map(row.accuracy.percent, ("merged", "head", "individual"))
        lines.append(Line(row.task, dict(zip(columns, [*accuracy, row.bias.before, row.bias.after], strict=True))))
    averages = {column: mean_of(lines, column) for column in columns}
    heads = "1 head" if head_count(rows) == 1 else f"{head_count(rows)} heads"
    note = f"{heads}, {parameters_each(rows)} parameters each, {training_seconds(rows):.1f} s of training"
    title = f"{folder or rows[0].head} ({rows[0].protocol})"
    return Table(title, columns, (*lines, Line("average", averages, BASELINE)), first="task", notes=(note,))


def sweep_tables(result: SweepResult) -> list[Table]:
    """The baselines and every setting of a sweep; then, if two settings vary, a grid of accuracy and one of bias."""
    lines = []
    for encoder, values in result.baselines.items():
        average = {AVERAGE: fmean(values.values())} if len(values) == len(result.tasks) else {}
        lines.append(Line(encoder, values | average, BASELINE))
    for line in result.lines:
        figures = {**line.accuracy, AVERAGE: line.average_accuracy, "bias": line.average_bias}
        incomplete = f" ({line.seeds} of {result.seeds} seeds)" if line.seeds < result.seeds else ""
        setting = [f"{name.replace('_', '-')} {value_text(value)}" for name, value in line.setting.items()]
        lines.append(Line((" ".join(setting) or "with head") + incomplete, figures))
    over_seeds = "; mean and standard deviation over seeds" if result.seeds > 1 else ""
    title = f"Accuracy in % ({result.cache}: {result.protocol}){over_seeds}"
    tables = [Table(title, dict.fromkeys([*result.tasks, AVERAGE], ".1f") | {"bias": ".4f"}, tuple(lines), first="")]
    if len(result.varied) == 2 and all(len(line.setting) == 2 for line in result.lines):
        tables.append(_grid("Average accuracy", result, "average_accuracy", ".1f"))
        tables.append(_grid("Bias", result, "average_bias", ".4f"))
    return tables


def _grid(title: str, result: SweepResult, figure: str, spec: str) -> Table:
    """One setting down, the other across."""
    (down, rows), (across, values) = result.varied.items()
    columns = {value: value_text(value) for value in values}
    figures = {(line.setting[down], line.setting[across]): getattr(line, figure) for line in result.lines}
    lines = [Line(value_text(row), {text: figures.get((row, v)) for v, text in columns.items()}) for row in rows]
    first = f"{down} \\ {across}".replace("_", "-")
    return Table(title, dict.fromkeys(columns.values(), spec), tuple(lines), first=first)
