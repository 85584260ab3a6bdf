"""Accuracy and bias against the settings that sweeps varied: one setting as a curve, two as a grid."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from probsurgery.pipeline.analysis.labels import (
    HeadFigures,
    by_setting,
    departure_count,
    head_figures,
    head_label,
    sort_key,
    value_text,
)
from probsurgery.pipeline.analysis.tables import AVERAGE, Line, Table
from probsurgery.pipeline.store.results import ResultRow

AXES = ("rank", "hidden", "kl_weight", "steps", "samples", "fraction", "loss", "batch_size", "lr", "penalty")
"""Settings against which there are curves."""
GRID_AXES = ("hidden", "kl_weight")
"""Settings against which there is a grid: down, across."""
_Group = dict[tuple[Any, ...], list[ResultRow]]
"""Rows by their values on one or two axes."""


@dataclass(frozen=True)
class Curve:
    """Accuracy and bias against one setting, all others being equal."""

    axis: str
    label: str
    """The head, with the settings that are held fixed."""
    protocol: str
    points: dict[Any, HeadFigures]
    """By the setting's value, in order."""

    @property
    def axis_title(self) -> str:
        return self.axis.replace("_", " ")


@dataclass(frozen=True)
class Grid:
    """Accuracy and bias against `GRID_AXES`, all other settings being equal."""

    label: str
    protocol: str
    points: dict[tuple[Any, ...], HeadFigures]
    """By both settings' values, in order: a row for each width, a column for each weight."""


def find_curves(rows: Sequence[ResultRow], prefix: str = "") -> list[Curve]:
    """The longest curve for each setting that varies and each kind of head."""
    groups: dict[tuple[str, str], list[_Group]] = defaultdict(list)
    settings = by_setting(rows)
    for axis in AXES:
        for group in _equal_but_for(settings, (axis,), (int, float, str)):
            if len(group) > 1:
                groups[axis, _first_row(group).kind].append(group)
    curves = []
    for (axis, _), of_kind in groups.items():
        group = min(of_kind, key=lambda group: _priority(group, (axis,)))
        # Numbers in order, then texts as they come.
        values = sorted(group, key=lambda key: (1, 0) if isinstance(key[0], str) else (0, key[0]))
        first, figures = group[values[0]][0], _figures(group)
        points = {value: figures[value,] for (value,) in values}
        curves.append(Curve(axis, prefix + head_label(first, (axis,)), first.base_protocol, points))
    return curves


def find_grids(rows: Sequence[ResultRow], prefix: str = "") -> list[Grid]:
    """The largest grid of widths and KL weights, or nothing if only one of them varies."""
    grids = []
    for group in _equal_but_for(by_setting(rows), GRID_AXES, (int, float)):
        weights: dict[Any, set[Any]] = defaultdict(set)
        for width, weight in group:
            weights[width].add(weight)
        most = max(weights.values(), key=len)  # a width with fewer weights would leave holes
        values = sorted(width for width in weights if weights[width] >= most), sorted(most)
        if min(map(len, values)) > 1:
            grids.append({key: group[key] for key in product(*values)})
    if not grids:
        return []
    group = min(grids, key=lambda group: _priority(group, GRID_AXES))
    first = _first_row(group)
    return [Grid(prefix + head_label(first, GRID_AXES), first.protocol, _figures(group))]


def _equal_but_for(settings: Sequence[list[ResultRow]], axes: tuple[str, ...], types: tuple[type, ...]) -> list[_Group]:
    """Rows, given by setting, with values of these types on the axes, in groups equal in all else but seed and task."""
    groups: dict[Hashable, _Group] = defaultdict(lambda: defaultdict(list))
    for first, *others in settings:
        named = {**first.settings, "fraction": first.fraction}
        values = tuple(named.pop(axis, None) for axis in axes)
        if all(isinstance(value, types) for value in values):
            shared_by = first.tasks if first.shared else None
            key = first.kind, frozenset(named.items()), shared_by, first.base_protocol
            groups[key][values] += [first, *others]
    return list(groups.values())


def _priority(group: _Group, axes: tuple[str, ...]) -> tuple[object, ...]:
    """Sort key of groups: more values come first, then settings near the defaults."""
    first = _first_row(group)
    return -len(group), departure_count(first, axes), sort_key(first, axes)


def _first_row(group: _Group) -> ResultRow:
    return next(iter(group.values()))[0]


def _figures(group: _Group) -> dict[tuple[Any, ...], HeadFigures]:
    tasks = list(dict.fromkeys(row.task for rows in group.values() for row in rows))
    return {values: head_figures(rows, tasks) for values, rows in group.items()}


def curve_table(curve: Curve, tasks: Sequence[str]) -> Table:
    """A curve as a table: one line for each value."""
    lines = [Line(value_text(value), point.line_values) for value, point in curve.points.items()]
    title = f"Accuracy in % against {curve.axis_title}: {curve.label} ({curve.protocol})"
    return Table(title, dict.fromkeys([*tasks, AVERAGE], ".1f") | {"bias": ".4f"}, tuple(lines), first=curve.axis_title)
