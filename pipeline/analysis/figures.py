"""Reports -> figures: PNG and SVG, in colours that colour-blind readers tell apart, and in print."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from probsurgery.pipeline.analysis.kept_heads import HeadUncertainty, Projection
from probsurgery.pipeline.analysis.report import AVERAGE, Curve, Grid, Report
from probsurgery.pipeline.analysis.tables import BASELINE
from probsurgery.pipeline.config import number_text
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.heads.uncertainty import COVERAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, for colour-blind readers; lines have markers of their own too."""
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
_LOG = ("rank", "hidden", "steps", "fraction", "kl_weight", "lr", "penalty", "batch_size")
_SHOWN = 5
"""Lines in a bar chart."""
_KINDS = {"expert": ("#E69F00", "o", 9), "merged": ("#0072B2", "s", 9), "corrected": ("black", ".", 6)}
"""Of features: colour, marker and size. Experts first, so that what ought to lie on them is seen."""


@dataclass(frozen=True)
class Drawn:
    """A figure on disk."""

    path: Path
    """The PNG; the SVG is beside it."""
    title: str


def draw(
    reports: Sequence[Report],
    folder: str | Path,
    uncertainties: Sequence[HeadUncertainty] = (),
    projections: Sequence[Projection] = (),
) -> list[Drawn]:
    """Write every figure that the results allow, as PNG and SVG.

    Raises `InputError` as `prepare` does.
    """
    folder = Path(folder)
    prepare(folder)
    with _matplotlib() as new:
        written = []
        for name, figure in _figures(reports, uncertainties, projections, new):
            for suffix in ("png", "svg"):
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(folder / f"{name}.{suffix}", dpi=160, metadata=metadata)
            written.append(Drawn(folder / f"{name}.png", figure.get_suptitle() or figure.axes[0].get_title()))
        return written


def prepare(folder: Path | None) -> None:
    """Raise `InputError` without matplotlib (the extra `plots`), or if the folder cannot be made."""
    with _matplotlib():
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write figures to {folder}: {error.strerror}; choose another --plots") from None


@contextmanager
def _matplotlib() -> Iterator[Callable[..., Figure]]:
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
    new: Callable[..., Figure],
) -> Iterator[tuple[str, Figure]]:
    for report in reports:
        suffix = "" if len(reports) == 1 else f"-{_slug(f'{report.arch}-{report.protocol}')}"
        yield f"bias{suffix}", _bias(report, new)
        by_axis: dict[str, list[Curve]] = {}
        for curve in report.curves:
            by_axis.setdefault(curve.axis, []).append(curve)
        for axis, curves in by_axis.items():
            yield f"{axis.replace('_', '-')}{suffix}", _curves(report, curves, new)
        for number_of, grid in enumerate(report.grids):
            more = f"-{number_of + 1}" if len(report.grids) > 1 else ""
            yield f"{'-'.join(grid.axes).replace('_', '-')}{more}{suffix}", _heat_map(grid, new)
    for name, found, make in (
        ("calibration", uncertainties, _calibration),
        ("coverage", uncertainties, _coverage),
        ("projection", projections, _projection),
    ):
        for index, one in enumerate(found):
            yield f"{name}{f'-{index + 1}' if len(found) > 1 else ''}", make(one, new)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _bias(report: Report, new: Callable[..., Figure]) -> Figure:
    """ProbSurgery's figure: bias of each task before and after."""
    shown = report.bias.lines[:_SHOWN]
    columns = [*report.tasks, AVERAGE]
    figure = new(7.2, 2.8)
    axes = figure.subplots()
    width = 0.8 / len(shown)
    for index, line in enumerate(shown):
        places = [i - 0.4 + width * (index + 0.5) for i in range(len(columns))]
        spreads = [line.values.get(column) for column in columns]
        axes.bar(
            places,
            [s.mean if s else 0 for s in spreads],
            width,
            yerr=[s.sd or 0 if s else 0 for s in spreads],
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


def _curves(report: Report, curves: Sequence[Curve], new: Callable[..., Figure]) -> Figure:
    """Average accuracy and bias against one setting, with a band of one standard deviation."""
    figure = new(7.2, 3.0)
    panels = figure.subplots(1, 2)
    axis = curves[0].axis
    for axes, what in zip(panels, ("accuracy", "bias"), strict=True):
        for index, curve in enumerate(curves):
            points = {v: s for v, p in curve.points.items() if (s := getattr(p, what).get(AVERAGE))}
            values = list(points)
            places = list(range(len(values))) if _is_categorical(axis) else values
            means = [s.mean for s in points.values()]
            colour = COLOURS[index % len(COLOURS)]
            style = {"linestyle": "none"} if _is_categorical(axis) else {}
            axes.plot(
                places,
                means,
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                color=colour,
                label=curve.label.removeprefix("+ "),
                **style,
            )
            off = [s.sd or 0 for s in points.values()]
            if _is_categorical(axis):
                axes.errorbar(places, means, off, fmt="none", color=colour, elinewidth=0.8)
            else:
                low, high = ([m + sign * o for m, o in zip(means, off, strict=True)] for sign in (-1, 1))
                axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
            _scale(axes, axis, values)
        axes.set_xlabel(axis.replace("_", " "))
    _reference_lines(panels[0], report)
    panels[0].set_ylabel("average accuracy, %")
    panels[1].set_ylabel("average bias")
    figure.suptitle(f"Against {axis.replace('_', ' ')} ({report.arch}, {curves[0].protocol})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _is_categorical(axis: str) -> bool:
    return axis not in _LOG


def _scale(axes: Axes, axis: str, values: Sequence[object]) -> None:
    if _is_categorical(axis):
        axes.set_xticks(range(len(values)), [str(value) for value in values])
        axes.margins(x=0.2)
        return
    positive = [value for value in values if value > 0]
    if min(values) <= 0 < max(values):
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
    else:
        axes.set_xscale("log")
    axes.set_xticks(list(values), [_tick(value) for value in values])
    axes.minorticks_off()


def _tick(value: float) -> str:
    return number_text(value) if isinstance(value, float) else f"{value:,}"


def _reference_lines(axes: Axes, report: Report) -> None:
    """Where the encoders are, where they are near enough to what is shown."""
    low, high = axes.get_ylim()
    for line in report.accuracy.lines:
        is_merged = line.label.startswith("merged (")
        value = line.values.get(AVERAGE)
        if value is None or not (is_merged or line.kind == BASELINE):
            continue
        if low - 0.6 * (high - low) <= value.mean <= high + 0.6 * (high - low):
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


def _heat_map(grid: Grid, new: Callable[..., Figure]) -> Figure:
    """Average accuracy and bias over two settings."""
    figure = new(7.2, 2.9)
    down, across = grid.axes
    rows, columns = grid.values
    panels = figure.subplots(1, 2)
    for axes, what, form in zip(panels, ("accuracy", "bias"), (".1f", ".3f"), strict=True):
        found = {key: getattr(point, what).get(AVERAGE) for key, point in grid.points.items()}
        means = [[s.mean if (s := found.get((r, c))) else float("nan") for c in columns] for r in rows]
        # The better is the brighter in both.
        image = axes.imshow(means, cmap="cividis" if what == "accuracy" else "cividis_r", aspect="auto")
        middle = sum(image.get_clim()) / 2
        for i, r in enumerate(rows):
            for j, c in enumerate(columns):
                s = found.get((r, c))
                if s:
                    text = format(s.mean, form) + ("" if s.sd is None else f"\n±{s.sd:{form}}")
                    colour = "black" if (s.mean > middle) == (what == "accuracy") else "white"
                    axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(columns)), [_tick(c) for c in columns])
        axes.set_yticks(range(len(rows)), [_tick(r) for r in rows])
        axes.set_xlabel(across.replace("_", " "))
        axes.set_ylabel(down.replace("_", " "))
        axes.grid(visible=False)
        axes.set_title("average accuracy, %" if what == "accuracy" else "average bias")
    figure.suptitle(f"{grid.label.removeprefix('+ ')}: width and KL weight ({grid.protocol})")
    return figure


def _calibration(found: HeadUncertainty, new: Callable[..., Figure]) -> Figure:
    """Predicted sigma against true residual, rows in groups of rising sigma."""
    figure = new(5.6, 3.4)
    axes = figure.subplots()
    for index, (task, one) in enumerate(found.tasks.items()):
        predicted, true = zip(*one.bins, strict=True)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        label = f"{task} ({one.rank_correlation:+.2f})"
        axes.plot(predicted, true, marker=marker, markersize=3, linewidth=1, color=colour, label=label)
    most, highest = (1.1 * max(pair[i] for one in found.tasks.values() for pair in one.bins) for i in (0, 1))
    axes.plot((0, most), (0, most), color="0.35", linestyle="--", linewidth=0.8, label="calibrated")
    axes.set_xlim(0, most)
    axes.set_ylim(0, max(most, highest))
    axes.set_xlabel("predicted sigma (root mean square)")
    axes.set_ylabel("true residual (root mean square)")
    figure.suptitle(f"Is sigma calibrated? {found.label} ({found.protocol})")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right center", title="task (rank correlation)", title_fontsize=7
    )
    return figure


def _coverage(found: HeadUncertainty, new: Callable[..., Figure]) -> Figure:
    """Accuracy of the most certain images, by predicted sigma and by the classifier's own confidence."""
    count = len(found.tasks)
    columns = min(4, count)
    rows = -(-count // columns)
    figure = new(7.2, 1.7 * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    share = [100 * c for c in COVERAGES]
    for axes, (task, one) in zip(panels.flat, found.tasks.items(), strict=False):
        for index, (label, values) in enumerate(
            (("least sigma first", one.by_sigma), ("most confident first", one.by_confidence))
        ):
            axes.plot(
                share, [100 * v for v in values], color=COLOURS[index], marker=MARKERS[index], markersize=3, label=label
            )
        axes.set_title(task)
        axes.invert_xaxis() if axes is panels.flat[0] else None
    for axes in list(panels.flat)[count:]:
        axes.axis("off")
    panels[-1, 0].set_xlabel("images kept, %")
    panels[-1, 0].set_ylabel("accuracy, %")
    figure.suptitle(f"Accuracy when the least certain are left out: {found.label} ({found.protocol})")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _projection(found: Projection, new: Callable[..., Figure]) -> Figure:
    """Merged, corrected and expert features of each task, in one plane."""
    count = len(found.points)
    columns = min(4, count)
    rows = -(-count // columns)
    figure = new(7.2, 1.9 * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (task, kinds) in zip(panels.flat, found.points.items(), strict=False):
        for kind, (colour, marker, size) in _KINDS.items():
            x, y = kinds[kind].T
            axes.scatter(x, y, size, colour, marker, alpha=0.6, linewidths=0, label=kind, rasterized=True)
        axes.set_title(task)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in list(panels.flat)[count:]:
        axes.axis("off")
    figure.suptitle(f"{found.method} of features: {found.label} ({found.cache})")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=2)
    return figure
