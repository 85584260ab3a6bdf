"""Reports -> figures: PNG and SVG, in colours that colour-blind readers tell apart, and that survive print."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from probsurgery.pipeline.analysis.curves import Curve, Grid
from probsurgery.pipeline.analysis.labels import value_text
from probsurgery.pipeline.analysis.projection import Projection
from probsurgery.pipeline.analysis.report import Report
from probsurgery.pipeline.analysis.tables import AVERAGE, BASELINE, spread_text
from probsurgery.pipeline.analysis.uncertainty import HeadUncertainty
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.heads.uncertainty import COVERAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    NewFigure = Callable[[float, float], Figure]
    """Makes an empty figure of a width and height in inches."""

T = TypeVar("T")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette for colour-blind readers; lines differ in their markers too."""
MARKERS = "osD^vPX"
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
_STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "svg.hashsalt": "probsurgery",
    "figure.constrained_layout.use": True,
}
_LOG_AXES = ("rank", "hidden", "steps", "fraction", "kl_weight", "lr", "penalty", "batch_size")
"""Settings that are shown on a logarithmic axis; all others are categories."""
_MAX_BARS = 5
"""Lines of a table in a bar chart."""
_FEATURE_STYLES = {"expert": ("#E69F00", "o", 9), "merged": ("#0072B2", "s", 9), "corrected": ("black", ".", 6)}
"""Colour, marker and size of each kind of feature. Experts are drawn first, so that corrected features lie on them."""


@dataclass(frozen=True)
class DrawnFigure:
    """A figure on disk."""

    path: Path
    """The PNG; the SVG is beside it."""
    title: str


def draw(
    reports: Sequence[Report],
    folder: str | Path,
    uncertainties: Sequence[HeadUncertainty] = (),
    projections: Sequence[Projection] = (),
) -> list[DrawnFigure]:
    """Write every figure that the results allow, as PNG and SVG.

    Raises `InputError` as `prepare` does.
    """
    folder = Path(folder)
    prepare(folder)
    with _matplotlib() as new_figure:
        drawn = []
        for name, figure in _figures(reports, uncertainties, projections, new_figure):
            for suffix in ("png", "svg"):
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(folder / f"{name}.{suffix}", dpi=160, metadata=metadata)
            drawn.append(DrawnFigure(folder / f"{name}.png", figure.get_suptitle() or figure.axes[0].get_title()))
        return drawn


def prepare(folder: Path | None) -> None:
    """Create the folder. Raises `InputError` if that fails, or without matplotlib (the extra `plots`)."""
    with _matplotlib():
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write figures to {folder}: {error.strerror}; choose another --plots") from None


@contextmanager
def _matplotlib() -> Iterator[NewFigure]:
    """matplotlib in our style, without its global state of open figures."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("figures need matplotlib; pip install 'probsurgery[plots]'") from None
    with matplotlib.rc_context(_STYLE):
        yield lambda width, height: Figure(figsize=(width, height))


def _figures(
    reports: Sequence[Report],
    uncertainties: Sequence[HeadUncertainty],
    projections: Sequence[Projection],
    new_figure: NewFigure,
) -> Iterator[tuple[str, Figure]]:
    """File name and figure of everything that there is to draw."""
    for report in reports:
        suffix = "" if len(reports) == 1 else f"-{_slug(f'{report.arch}-{report.protocol}')}"
        yield f"bias{suffix}", _bias_bars(report, new_figure)
        by_axis: dict[str, list[Curve]] = defaultdict(list)
        for curve in report.curves:
            by_axis[curve.axis].append(curve)
        for axis, curves in by_axis.items():
            yield f"{axis.replace('_', '-')}{suffix}", _curves(report, curves, new_figure)
        for number, grid in _numbered(report.grids):
            yield f"{'-'.join(grid.axes).replace('_', '-')}{number}{suffix}", _heat_map(grid, new_figure)
    for number, head in _numbered(uncertainties):
        yield f"calibration{number}", _calibration(head, new_figure)
    for number, head in _numbered(uncertainties):
        yield f"coverage{number}", _coverage(head, new_figure)
    for number, projected in _numbered(projections):
        yield f"projection{number}", _projection(projected, new_figure)


def _numbered(items: Sequence[T]) -> Iterator[tuple[str, T]]:
    """Items with the number that their files' names end in, if there are several."""
    for number, item in enumerate(items, 1):
        yield f"-{number}" if len(items) > 1 else "", item


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _bias_bars(report: Report, new_figure: NewFigure) -> Figure:
    """Bias of each task before and after the heads, as in ProbSurgery's figure."""
    lines = report.bias.lines[:_MAX_BARS]
    columns = [*report.tasks, AVERAGE]
    figure = new_figure(7.2, 2.8)
    axes = figure.subplots()
    width = 0.8 / len(lines)
    for index, line in enumerate(lines):
        spreads = [line.values.get(column) for column in columns]
        axes.bar(
            [i - 0.4 + width * (index + 0.5) for i in range(len(columns))],
            [spread.mean if spread else 0 for spread in spreads],
            width,
            yerr=[spread.sd or 0 if spread else 0 for spread in spreads],
            label=line.label.removeprefix("+ "),
            color=COLOURS[index],
            hatch=HATCHES[index],
            edgecolor="white",
            linewidth=0.3,
            error_kw={"elinewidth": 0.8},
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel("bias, mean |difference| to expert")
    axes.grid(visible=False, axis="x")
    axes.set_title(f"Representation bias before and after ({report.arch}, {report.protocol})")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _curves(report: Report, curves: Sequence[Curve], new_figure: NewFigure) -> Figure:
    """Average accuracy and bias against one setting, with one standard deviation as a band or bar."""
    figure = new_figure(7.2, 3.0)
    panels = figure.subplots(1, 2)
    is_categorical = curves[0].axis not in _LOG_AXES
    for axes, measure in zip(panels, ("accuracy", "bias"), strict=True):
        for index, curve in enumerate(curves):
            points = {v: s for v, point in curve.points.items() if (s := getattr(point, measure).get(AVERAGE))}
            values = list(points)
            x = list(range(len(values))) if is_categorical else values
            means = [spread.mean for spread in points.values()]
            deviations = [spread.sd or 0 for spread in points.values()]
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(
                x,
                means,
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                color=colour,
                label=curve.label,
                linestyle="none" if is_categorical else "-",
            )
            if is_categorical:
                axes.errorbar(x, means, deviations, fmt="none", color=colour, elinewidth=0.8)
                axes.set_xticks(x, [str(value) for value in values])
                axes.margins(x=0.2)
            else:
                low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
                _scale_logarithmically(axes, values)
        axes.set_xlabel(curves[0].axis_title)
    _draw_encoders(panels[0], report)
    panels[0].set_ylabel("average accuracy, %")
    panels[1].set_ylabel("average bias")
    figure.suptitle(f"Against {curves[0].axis_title} ({report.arch}, {curves[0].protocol})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _scale_logarithmically(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at the values; linear below the least positive value if there is a zero."""
    if min(values) <= 0 < max(values):
        axes.set_xscale("symlog", linthresh=min(value for value in values if value > 0), linscale=0.5)
    else:
        axes.set_xscale("log")
    axes.set_xticks(list(values), [_tick(value) for value in values])
    axes.minorticks_off()


def _tick(value: float) -> str:
    return value_text(value) if isinstance(value, float) else f"{value:,}"


def _draw_encoders(axes: Axes, report: Report) -> None:
    """A horizontal line for each encoder whose average accuracy is near the values shown."""
    low, high = axes.get_ylim()
    margin = 0.6 * (high - low)
    for line in report.accuracy.lines:
        is_merged = line.label.startswith("merged (")
        value = line.values.get(AVERAGE)
        if value is None or not (is_merged or line.kind == BASELINE):
            continue
        if low - margin <= value.mean <= high + margin:
            axes.axhline(value.mean, color="0.35", linewidth=0.8, linestyle=":" if is_merged else "--")
            axes.annotate(
                line.label,
                (1, value.mean),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=6,
                color="0.35",
            )


def _heat_map(grid: Grid, new_figure: NewFigure) -> Figure:
    """Average accuracy and bias over two settings. In both panels brighter is better."""
    figure = new_figure(7.2, 2.9)
    rows, columns = grid.values
    for axes, measure in zip(figure.subplots(1, 2), ("accuracy", "bias"), strict=True):
        is_accuracy = measure == "accuracy"
        spec = ".1f" if is_accuracy else ".3f"
        spreads = {key: getattr(point, measure).get(AVERAGE) for key, point in grid.points.items()}
        means = [[s.mean if (s := spreads.get((row, column))) else float("nan") for column in columns] for row in rows]
        image = axes.imshow(means, cmap="cividis" if is_accuracy else "cividis_r", aspect="auto")
        middle = sum(image.get_clim()) / 2
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                if spread := spreads.get((row, column)):
                    text = spread_text(spread, spec).replace("±", "\n±")
                    colour = "black" if (spread.mean > middle) == is_accuracy else "white"
                    axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(columns)), [_tick(value) for value in columns])
        axes.set_yticks(range(len(rows)), [_tick(value) for value in rows])
        axes.set_ylabel(grid.axes[0].replace("_", " "))
        axes.set_xlabel(grid.axes[1].replace("_", " "))
        axes.grid(visible=False)
        axes.set_title("average accuracy, %" if is_accuracy else "average bias")
    figure.suptitle(f"{grid.label}: width and KL weight ({grid.protocol})")
    return figure


def _calibration(head: HeadUncertainty, new_figure: NewFigure) -> Figure:
    """Predicted sigma against true residual, over groups of rows with rising sigma."""
    figure = new_figure(5.6, 3.4)
    axes = figure.subplots()
    for index, (task, measured) in enumerate(head.tasks.items()):
        sigmas, residuals = zip(*measured.bins, strict=True)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        label = f"{task} ({measured.rank_correlation:+.2f})"
        axes.plot(sigmas, residuals, marker=marker, markersize=3, linewidth=1, color=colour, label=label)
    bins = [pair for measured in head.tasks.values() for pair in measured.bins]
    right, top = (1.1 * max(values) for values in zip(*bins, strict=True))
    axes.plot((0, right), (0, right), color="0.35", linestyle="--", linewidth=0.8, label="calibrated")
    axes.set_xlim(0, right)
    axes.set_ylim(0, max(right, top))
    axes.set_xlabel("predicted sigma (root mean square)")
    axes.set_ylabel("true residual (root mean square)")
    figure.suptitle(f"Is sigma calibrated? {head.label} ({head.protocol})")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right center", title="task (rank correlation)", title_fontsize=7
    )
    return figure


def _coverage(head: HeadUncertainty, new_figure: NewFigure) -> Figure:
    """Accuracy of the most certain images, by predicted sigma and by the classifier's confidence."""
    figure, panels = _panel_for_each(head.tasks, 1.7, new_figure, sharex=True)
    shares = [100 * share for share in COVERAGES]
    for axes, measured in zip(panels.flat, head.tasks.values(), strict=False):
        orders = (("least sigma first", measured.by_sigma), ("most confident first", measured.by_confidence))
        for (label, accuracy), colour, marker in zip(orders, COLOURS, MARKERS, strict=False):
            percents = [100 * share for share in accuracy]
            axes.plot(shares, percents, color=colour, marker=marker, markersize=3, label=label)
    panels[0, 0].invert_xaxis()
    panels[-1, 0].set_xlabel("images kept, %")
    panels[-1, 0].set_ylabel("accuracy, %")
    figure.suptitle(f"Accuracy without the least certain images: {head.label} ({head.protocol})")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _projection(projected: Projection, new_figure: NewFigure) -> Figure:
    """Merged, corrected and expert features of each task, in one plane."""
    figure, panels = _panel_for_each(projected.points, 1.9, new_figure, sharex=True, sharey=True)
    for axes, points in zip(panels.flat, projected.points.values(), strict=False):
        for kind, (colour, marker, size) in _FEATURE_STYLES.items():
            x, y = points[kind].T
            axes.scatter(x, y, size, colour, marker, alpha=0.6, linewidths=0, label=kind, rasterized=True)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(f"{projected.method} of features: {projected.label} ({projected.cache})")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=2)
    return figure


def _panel_for_each(
    tasks: Collection[str], height: float, new_figure: NewFigure, **shared: bool
) -> tuple[Figure, np.ndarray]:
    """A figure, and its panels: one with a title for each task, four in a row. `height` is a panel's, in inches."""
    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = new_figure(7.2, height * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes, task in zip(panels.flat, tasks, strict=False):
        axes.set_title(task)
    for axes in panels.flat[len(tasks) :]:
        axes.axis("off")
    return figure, panels
