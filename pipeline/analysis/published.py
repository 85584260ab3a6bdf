"""Published figures for the methods that are measured here, and how they compare."""

import csv
from collections.abc import Sequence
from pathlib import Path

from probsurgery.pipeline.analysis.labels import departures
from probsurgery.pipeline.analysis.tables import AVERAGE, DIFFERENCE, PUBLISHED, Line
from probsurgery.pipeline.datasets.suites import suite_tasks
from probsurgery.pipeline.store.manifest import Manifest
from probsurgery.pipeline.store.results import ResultRow

_FAMILIES = {"FusionBench": "tanganke/", "tall_masks": "nik-dim/tall_masks"}
"""What the repositories of a family's experts begin with."""


def published(arch: str, suite: str) -> list[dict[str, str]]:
    """Published figures for an architecture and a suite: source, family of experts, method, what of it was chosen on
    labels, accuracy in % for each task and on average.

    They were measured by others, on other copies of the data, and those of different families are not comparable: their
    experts were trained otherwise, and tall_masks' have other classes for two tasks. An empty text stands for a figure
    that was not given.
    """
    with (Path(__file__).parent / "published.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if (row["arch"], row["suite"]) == (arch, suite)]


def published_name(merge: str, row: ResultRow) -> str:
    """A head's name in the published tables; "" if they cannot have it.

    They have Surgery of several ranks, of shares of the data, and online, and ProbSurgery with its defaults only. None
    says whether one optimiser held the heads of all tasks, so either is compared with them.
    """
    if row.kind not in ("surgery", "prob") or row.shared or not row.base_protocol.startswith("transductive"):
        return ""
    implied = ("steps", "batch_size") if row.is_online else ()
    if departures(row, ("rank", "optimizer", *implied)):
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


def family_of(manifest: Manifest) -> str:
    """The family of a cache's experts, as the published figures name it; "" if their files do not tell it."""
    sources = {manifest.files[task].source for task in manifest.identity.tasks if task in manifest.files}
    families = {family for family, owner in _FAMILIES.items() if all(s.startswith(owner) for s in sources)}
    return families.pop() if sources and families else ""


def published_lines(
    arch: str, suite: str, measured: Sequence[Line], tasks: Sequence[str], family: str = ""
) -> list[Line]:
    """The published lines, each followed by its difference from the measured line of the same method.

    There is no difference to figures of another family of experts than the measured `family`, if both are known.
    """
    rows = published(arch, suite)
    if not rows:
        return []
    columns = {task.title: name for name, task in suite_tasks(suite).items() if name in tasks}
    if len(columns) == len(suite_tasks(suite)):  # an average over other tasks is not comparable
        columns[AVERAGE] = AVERAGE
    lines = []
    for row in rows:
        method = row["method"]
        details = [row["source"], *([f"{row['family']}' experts"] if row["family"] else [])]
        details += [f"{row['labels']} chosen on labels"] if row["labels"] else []
        values = {column: float(row[title]) for title, column in columns.items() if row[title]}
        if not values:
            continue
        lines.append(Line(f"{method} [published: {'; '.join(details)}]", values, PUBLISHED, method))
        if family and row["family"] and row["family"] != family:
            continue
        for line in measured:
            if line.method == method:
                differences = {c: number - v for c, v in values.items() if (number := line.number(c)) is not None}
                lines.append(Line(f"measured - published, {method}", differences, DIFFERENCE, method))
    return lines
