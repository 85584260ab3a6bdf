"""Reports -> figures: PNG and SVG, in colours that colour-blind readers tell apart, and that survive print."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from probsurgery.pipeline.analysis.curves import Curve, Grid
from probsurgery.pipeline.analysis.kept_heads import HeadUncertainty
from probsurgery.pipeline.analysis.labels import value_text
from probsurgery.pipeline.analysis.projection import Projection
from probsurgery.pipeline.analysis.report import Report
from probsurgery.pipeline.analysis.tables import AVERAGE, BASELINE, spread_text
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.heads.uncertainty import COVERAGES
from probsurgery.pipeline.store.lock import require_writable
from probsurgery.pipeline.store.results import Spread
from probsurgery.pipeline.store.target import refuse_own_files
from probsurgery.pipeline.texts import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette for colour-blind readers; lines differ in their markers too."""
MARKERS = "osD^vPX"
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
_LINE_STYLES: list[dict[str, Any]] = [
    {"color": colour, "marker": marker} for colour, marker in zip(COLOURS, MARKERS, strict=True)
]
_STYLE: dict[Any, object] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "svg.hashsalt": "probsurgery",
    "text.parse_math": False,  # a folder's name may have dollar signs
    "figure.constrained_layout.use": True,
}
_MEASURES = {"accuracy": ("average accuracy, %", ".1f", "cividis"), "bias": ("average bias", ".3f", "cividis_r")}
"""Of each panel: its title, the format of its values, and a colour map in which brighter is better."""
_LOG_AXES = ("rank", "hidden", "steps", "fraction", "kl_weight", "lr", "penalty", "batch_size")
"""Settings that are shown on a logarithmic axis; all others are categories."""
_MAX_BARS = 5
"""Lines of a table in a bar chart."""
_FEATURE_STYLES = {"expert": ("#E69F00", "o", 9), "merged": ("#0072B2", "s", 9), "corrected": ("black", ".", 6)}
"""Colour, marker and size of each kind of feature. Experts are drawn first, so that corrected features lie on them."""


def draw(
    reports: Sequence[Report],
    folder: str | Path,
    uncertainties: Sequence[HeadUncertainty] = (),
    projections: Sequence[Projection] = (),
) -> dict[Path, str]:
    """Write every figure that the results allow, as PNG and SVG; gives the title of each PNG.

    Raises `InputError` as `prepare` does.
    """
    folder, titles = Path(folder), {}
    prepare(folder)
    with _matplotlib_style():
        for name, figure in _figures(reports, uncertainties, projections):
            _make_plain(figure)
            figure.savefig(folder / f"{name}.png", dpi=160)
            figure.savefig(folder / f"{name}.svg", dpi=160, metadata={"Date": None})  # equal figures are equal files
            titles[folder / f"{name}.png"] = figure.get_suptitle() or figure.axes[0].get_title()
    return titles


def _make_plain(figure: Figure) -> None:
    """Replace what is no text in titles, legends and labels, which have names of files and folders."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text("\n".join(map(plain, text.get_text().split("\n"))))


def prepare(folder: Path | None = None) -> None:
    """Create the folder, if any. Raises `InputError` if that fails, or without matplotlib (the extra `plots`)."""
    _matplotlib_style()
    try:
        if folder is not None:
            refuse_own_files(folder, "--plots")
            require_writable(folder, "--plots")
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write figures to {folder}: {error.strerror}; choose another --plots") from None


def _matplotlib_style() -> AbstractContextManager[None]:
    try:
        import matplotlib as mpl
    except ImportError:
        raise InputError("figures need matplotlib; pip install 'probsurgery[plots]'") from None
    return mpl.rc_context(_STYLE)


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, apart from matplotlib's global state of open figures."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _figures(
    reports: Sequence[Report], uncertainties: Sequence[HeadUncertainty], projections: Sequence[Projection]
) -> Iterator[tuple[str, Figure]]:
    """File name and figure of everything that there is to draw."""
    for report in reports:
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"-{report.arch}-{report.protocol}").rstrip("-")
        suffix = slug if len(reports) > 1 else ""
        yield f"bias{suffix}", _bias_bars(report)
        for axis in dict.fromkeys(curve.axis for curve in report.curves):
            curves = [curve for curve in report.curves if curve.axis == axis]
            yield f"{axis.replace('_', '-')}{suffix}", _curves(report, curves)
        yield from _numbered("hidden-kl-weight", report.grids, _heat_map, suffix)
    yield from _numbered("calibration", uncertainties, _calibration)
    judged = [head for head in uncertainties if any(measured.by_sigma for measured in head.tasks.values())]
    yield from _numbered("coverage", judged, _coverage)
    yield from _numbered("projection", projections, _projection)


def _numbered(
    name: str, items: Sequence[T], drawing: Callable[[T], Figure], suffix: str = ""
) -> Iterator[tuple[str, Figure]]:
    """A figure of each item; their files' names have a number if there are several."""
    for number, item in enumerate(items, 1):
        yield (f"{name}-{number}" if len(items) > 1 else name) + suffix, drawing(item)


def _bias_bars(report: Report) -> Figure:
    """Bias of each task before and after the heads, as in ProbSurgery's figure."""
    lines = [line for line in report.bias.lines if line.values][:_MAX_BARS]  # a classifier head has no bias
    columns = [*report.tasks, AVERAGE]
    figure = _new_figure(7.2, 2.8)
    axes = figure.subplots()
    width = 0.8 / len(lines)
    edge: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.3, "error_kw": {"elinewidth": 0.8}}
    for index, line in enumerate(lines):
        x = np.arange(len(columns)) - 0.4 + width * (index + 0.5)
        figures = (line.values.get(column) for column in columns)
        means, deviations = _means_and_deviations(f if isinstance(f, Spread) else None for f in figures)
        filling: dict[str, Any] = {
            "color": COLOURS[index],
            "hatch": HATCHES[index],
            "label": line.label.removeprefix("+ "),
        }
        axes.bar(x, means, width, yerr=deviations, **filling, **edge)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel("bias, mean |difference| to expert")
    axes.grid(visible=False, axis="x")
    axes.set_title(f"Representation bias before and after ({report.arch}, {report.protocol})")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _means_and_deviations(spreads: Iterable[Spread | None]) -> np.ndarray:
    """An array (2, N), with zeros where a figure or a deviation is missing."""
    return np.array([(spread.mean, spread.sd or 0) if spread else (0, 0) for spread in spreads]).reshape(-1, 2).T


def _curves(report: Report, curves: Sequence[Curve]) -> Figure:
    """Average accuracy and bias against one setting, with one standard deviation as a band or bar."""
    figure = _new_figure(7.2, 3.0)
    panels = figure.subplots(1, 2)
    is_categorical = curves[0].axis not in _LOG_AXES
    line_style = "none" if is_categorical else "-"
    for axes, (measure, (title, *_)) in zip(panels, _MEASURES.items(), strict=True):
        for curve, style in zip(curves, cycle(_LINE_STYLES), strict=False):
            points = {v: s for v, point in curve.points.items() if (s := getattr(point, measure).get(AVERAGE))}
            x: Sequence[float] = range(len(points)) if is_categorical else list(points)
            if not points:  # no accuracy, or not of every task
                continue
            means, deviations = _means_and_deviations(points.values())
            axes.plot(x, means, markersize=4, linestyle=line_style, label=curve.label, **style)
            if is_categorical:
                axes.errorbar(x, means, deviations, fmt="none", color=style["color"], elinewidth=0.8)
                axes.set_xticks(x, [*map(_tick, points)])
                axes.margins(x=0.2)
            else:
                band = means - deviations, means + deviations
                axes.fill_between(x, *band, color=style["color"], alpha=0.2, linewidth=0)
                _scale_logarithmically(axes, x)
        axes.set_xlabel(curves[0].axis_title)
        axes.set_ylabel(title)
    _draw_encoders(panels[0], report)
    figure.suptitle(f"Against {curves[0].axis_title} ({report.arch}, {report.protocol})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _scale_logarithmically(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at the values; linear below the least positive value if there is a zero."""
    if min(values) <= 0 < max(values):
        axes.set_xscale("symlog", linthresh=min(value for value in values if value > 0), linscale=0.5)
    else:
        axes.set_xscale("log")
    axes.set_xticks(values, [*map(_tick, values)])
    axes.minorticks_off()


def _tick(value: float | str) -> str:
    """A value beside an axis, where matplotlib takes the text from here each time that it draws."""
    return f"{value:,}" if isinstance(value, int) else plain(value_text(value))


def _draw_encoders(axes: Axes, report: Report) -> None:
    """A horizontal line for each encoder whose average accuracy is near the values shown."""
    low, high = axes.get_ylim()
    margin = 0.6 * (high - low)
    note: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "ha": "right",
        "va": "bottom",
        "fontsize": 6,
        "color": "0.35",
    }
    for line in report.accuracy.lines:
        is_merged = line.label.startswith("merged (")
        value = line.number(AVERAGE) if is_merged or line.kind == BASELINE else None
        if value is not None and low - margin <= value <= high + margin:
            axes.axhline(value, color="0.35", linewidth=0.8, linestyle=":" if is_merged else "--")
            axes.annotate(line.label, (1, value), **note)


def _heat_map(grid: Grid) -> Figure:
    """Average accuracy and bias over two settings."""
    figure = _new_figure(7.2, 2.9)
    rows, columns = ([*dict.fromkeys(values)] for values in zip(*grid.points, strict=True))
    for axes, (measure, (title, spec, colours)) in zip(figure.subplots(1, 2), _MEASURES.items(), strict=True):
        spreads = {key: s for key, point in grid.points.items() if (s := getattr(point, measure).get(AVERAGE))}
        means = [[spreads[r, c].mean if (r, c) in spreads else math.nan for c in columns] for r in rows]
        image = axes.imshow(means, cmap=colours, aspect="auto")
        middle = sum(image.get_clim()) / 2
        for (row, column), spread in spreads.items():
            text = spread_text(spread, spec).replace("±", "\n±")
            colour = "black" if (spread.mean > middle) == (measure == "accuracy") else "white"
            x, y = columns.index(column), rows.index(row)
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(columns)), [*map(_tick, columns)])
        axes.set_yticks(range(len(rows)), [*map(_tick, rows)])
        axes.set_ylabel("hidden")
        axes.set_xlabel("kl weight")
        axes.grid(visible=False)
        axes.set_title(title)
    figure.suptitle(f"{grid.label}: width and KL weight ({grid.protocol})")
    return figure


def _calibration(head: HeadUncertainty) -> Figure:
    """Predicted sigma against true residual, over groups of rows with rising sigma."""
    figure = _new_figure(5.6, 3.4)
    axes = figure.subplots()
    for (task, measured), style in zip(head.tasks.items(), cycle(_LINE_STYLES), strict=False):
        label = f"{task} (-)" if measured.rank_correlation is None else f"{task} ({measured.rank_correlation:+.2f})"
        axes.plot(*zip(*measured.bins, strict=True), markersize=3, linewidth=1, label=label, **style)
    bins = np.concatenate([measured.bins for measured in head.tasks.values()])
    right, top = 1.1 * np.max(bins, axis=0, initial=0, where=np.isfinite(bins))
    axes.plot((0, right), (0, right), color="0.35", linestyle="--", linewidth=0.8, label="calibrated")
    axes.set_xlim(0, right or 1)
    axes.set_ylim(0, max(right, top) or 1)
    axes.set_xlabel("predicted sigma (root mean square)")
    axes.set_ylabel("true residual (root mean square)")
    figure.suptitle(f"Is sigma calibrated? {head.label} ({head.protocol})")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", title="task (rank correlation)")
    return figure


def _coverage(head: HeadUncertainty) -> Figure:
    """Accuracy of the most certain images, by predicted sigma and by the classifier's confidence."""
    tasks = {task: measured for task, measured in head.tasks.items() if measured.by_sigma}
    figure, panels = _panel_for_each(tasks, 1.7, sharex=True)
    for axes, measured in zip(panels.flat, tasks.values(), strict=False):
        orders = {"least sigma first": measured.by_sigma, "most confident first": measured.by_confidence}
        for (label, accuracy), style in zip(orders.items(), _LINE_STYLES, strict=False):
            axes.plot(100 * np.array(COVERAGES), 100 * np.array(accuracy), markersize=3, label=label, **style)
    panels[0, 0].invert_xaxis()
    panels[-1, 0].set_xlabel("images kept, %")
    panels[-1, 0].set_ylabel("accuracy, %")
    figure.suptitle(f"Accuracy without the least certain images: {head.label} ({head.protocol})")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _projection(projected: Projection) -> Figure:
    """Merged, corrected and expert features of each task, in one plane."""
    figure, panels = _panel_for_each(projected.points, 1.9, sharex=True, sharey=True)
    for axes, points in zip(panels.flat, projected.points.values(), strict=False):
        for kind, (colour, marker, size) in _FEATURE_STYLES.items():
            axes.scatter(
                *points[kind].T, s=size, c=colour, marker=marker, alpha=0.6, linewidths=0, label=kind, rasterized=True
            )
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(f"{projected.method} of features: {projected.label} ({projected.cache})")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=2)
    return figure


def _panel_for_each(
    tasks: Collection[str], height: float, *, sharex: bool, sharey: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure, and its panels: one with a title for each task, four in a row. `height` is a panel's, in inches."""
    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = _new_figure(7.2, height * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    for axes, task in zip(panels.flat, tasks, strict=False):
        axes.set_title(task)
    for axes in panels.flat[len(tasks) :]:
        axes.axis("off")
    return figure, panels
