"""Accuracy and bias against the settings that sweeps varied: one setting as a curve, two as a grid."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import UnionType

from probsurgery.pipeline.analysis.labels import departure_count, head_label, sort_key, value_text
from probsurgery.pipeline.analysis.summary import head_accuracy, head_bias
from probsurgery.pipeline.analysis.tables import AVERAGE, Line, Table
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.store.results import ResultRow, Spread

AXES = ("rank", "hidden", "kl_weight", "steps", "samples", "fraction", "loss", "batch_size", "lr", "penalty")
"""Settings against which there are curves."""
GRID_AXES = ("hidden", "kl_weight")
"""Settings against which there is a grid: down, across."""


@dataclass(frozen=True)
class Point:
    """One setting's figures over seeds, for each task and on average."""

    accuracy: dict[str, Spread]
    """In percent."""
    bias: dict[str, Spread]


@dataclass(frozen=True)
class Curve:
    """Accuracy and bias against one setting, all others being equal."""

    axis: str
    label: str
    """The head, with the settings that are held fixed."""
    protocol: str
    points: dict[object, Point]
    """By the setting's value, in order."""

    @property
    def axis_title(self) -> str:
        """The setting's name in titles."""
        return self.axis.replace("_", " ")


@dataclass(frozen=True)
class Grid:
    """Accuracy and bias against two settings, all others being equal."""

    axes: tuple[str, str]
    values: tuple[list, list]
    """Of each setting, in order."""
    label: str
    protocol: str
    points: dict[tuple, Point]
    """By both settings' values."""


def find_curves(rows: Sequence[ResultRow], prefix: str = "") -> list[Curve]:
    """The longest curve for each setting that varies and each kind of head; of equals the nearest to the defaults."""
    curves: dict[tuple[str, str], list[tuple[tuple, dict[object, list[ResultRow]]]]] = defaultdict(list)
    for axis in AXES:
        for by_values in _equal_but_for(rows, (axis,), int | float | str):
            by_value = {value: group for (value,), group in by_values.items()}
            if len(by_value) > 1:
                first = _first_row(by_value)
                priority = -len(by_value), departure_count(first, (axis,)), sort_key(first, (axis,))
                curves[axis, first.kind].append((priority, by_value))
    return [_curve(axis, min(found, key=lambda item: item[0])[1], prefix) for (axis, _), found in curves.items()]


def _curve(axis: str, by_value: dict[object, list[ResultRow]], prefix: str) -> Curve:
    values = sorted(by_value, key=lambda value: (isinstance(value, str), 0 if isinstance(value, str) else value))
    first = by_value[values[0]][0]
    points = _points({value: by_value[value] for value in values})
    return Curve(axis, prefix + head_label(first, (axis,)), first.base_protocol, points)


def find_grids(rows: Sequence[ResultRow], prefix: str = "") -> list[Grid]:
    """The largest grid of widths and KL weights, of equals the nearest to the defaults; empty if only one varies."""
    grids = []
    for by_values in _equal_but_for(rows, GRID_AXES, int | float):
        weights = defaultdict(set)
        for width, weight in by_values:
            weights[width].add(weight)
        most = max(weights.values(), key=len)  # a width with fewer weights would leave holes
        values = sorted(width for width in weights if weights[width] >= most), sorted(most)
        if min(map(len, values)) > 1:
            grids.append((values, {key: by_values[key] for key in product(*values)}))
    if not grids:
        return []
    values, by_values = min(grids, key=lambda grid: (-len(grid[1]), departure_count(_first_row(grid[1]), GRID_AXES)))
    first = _first_row(by_values)
    return [Grid(GRID_AXES, values, prefix + head_label(first, GRID_AXES), first.protocol, _points(by_values))]


def _equal_but_for(
    rows: Sequence[ResultRow], axes: tuple[str, ...], types: UnionType
) -> list[dict[tuple, list[ResultRow]]]:
    """Rows with values of these types on the axes, by those values: one group for each combination of all else.

    Seed and task tell no groups apart.
    """
    groups: dict[str, dict[tuple, list[ResultRow]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        settings = {**row.settings, "fraction": row.fraction}
        values = tuple(settings.pop(axis, None) for axis in axes)
        if all(isinstance(value, types) for value in values):
            shared_by = row.tasks if row.shared else None
            groups[fingerprint([row.kind, settings, shared_by, row.base_protocol])][values].append(row)
    return list(groups.values())


def _first_row(by_value: Mapping[Hashable, list[ResultRow]]) -> ResultRow:
    return next(iter(by_value.values()))[0]


def _points(by_value: Mapping[Hashable, list[ResultRow]]) -> dict:
    tasks = list(dict.fromkeys(row.task for rows in by_value.values() for row in rows))
    return {value: Point(head_accuracy(rows, tasks), head_bias(rows, tasks)) for value, rows in by_value.items()}


def curve_table(curve: Curve, tasks: Sequence[str]) -> Table:
    """A curve as a table: one line for each value."""
    lines = []
    for value, point in curve.points.items():
        bias = {"bias": point.bias[AVERAGE]} if AVERAGE in point.bias else {}
        lines.append(Line(value_text(value), point.accuracy | bias))
    title = f"Accuracy in % against {curve.axis_title}: {curve.label} ({curve.protocol})"
    columns = dict.fromkeys([*tasks, AVERAGE], ".1f") | {"bias": ".4f"}
    return Table(title, columns, tuple(lines), first=curve.axis_title)
