"""Published figures for the methods that are measured here, and how they compare."""

import csv
from collections.abc import Sequence
from pathlib import Path

from probsurgery.pipeline.analysis.labels import departures
from probsurgery.pipeline.analysis.tables import AVERAGE, DIFFERENCE, PUBLISHED, Line
from probsurgery.pipeline.datasets.tasks import SUITES
from probsurgery.pipeline.store.results import ResultRow


def published(arch: str) -> list[dict[str, str]]:
    """Published figures for an architecture: source, method, accuracy in % for each task and on average.

    They were measured by others, on other copies of the data. An empty text stands for a figure that was not given.
    """
    with (Path(__file__).parent / "published.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key != "arch"} for row in rows if row["arch"] == arch]


def published_name(merge: str, row: ResultRow) -> str:
    """A head's name in the published tables; "" if they cannot have it.

    They have Surgery of several ranks, of shares of the data, and online, and ProbSurgery with its defaults only.
    """
    if row.kind not in ("surgery", "prob") or row.shared or not row.base_protocol.startswith("transductive"):
        return ""
    implied = ("steps", "batch_size") if row.is_online else ()
    if departures(row, ("rank", *implied)):
        return ""
    if row.kind == "prob":
        return f"{merge}+probsurgery" if row.fraction == 1 and not row.is_online else ""
    share = f"{100 * row.fraction:g}%"
    details = f"r={row.settings.get('rank')}"
    if row.is_online:
        details += f";online {share}"
    elif row.fraction != 1:
        details += f";{share} data"
    return f"{merge}+surgery({details})"


def published_lines(arch: str, measured: Sequence[Line], tasks: Sequence[str]) -> list[Line]:
    """The published lines, each followed by its difference from the measured line of the same method."""
    columns = {task.title: name for name, task in SUITES["clip8"]().items()} | {AVERAGE: AVERAGE}
    # An average over other tasks is not comparable.
    comparable = {*tasks, AVERAGE} if set(columns.values()) == {*tasks, AVERAGE} else set(tasks)
    columns = {title: column for title, column in columns.items() if column in comparable}
    lines = []
    for row in published(arch):
        method = row["method"]
        values = {column: float(row[title]) for title, column in columns.items() if row[title]}
        lines.append(Line(f"{method} [published: {row['source']}]", values, PUBLISHED, method))
        for line in measured:
            if line.method == method:
                differences = {c: number - v for c, v in values.items() if (number := line.number(c)) is not None}
                lines.append(Line(f"measured - published, {method}", differences, DIFFERENCE, method))
    return lines
