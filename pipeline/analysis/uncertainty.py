"""Uncertainty of the kept heads that predict it: measured on the features of a cache, and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from probsurgery.pipeline.analysis.kept_heads import kept_heads
from probsurgery.pipeline.analysis.tables import AVERAGE, BASELINE, Line, Table
from probsurgery.pipeline.heads.uncertainty import COVERAGES, Uncertainty, measure
from probsurgery.pipeline.store.cache import Cache

_FORMATS = {"rank corr.": ".2f", "of doubt": ".2f", "sigma": ".3f", "residual": ".3f"}
"""Of the columns that are not in percent."""
_NOTE = (
    "rank corr.: rank correlation of an image's predicted sigma with its true residual; of doubt: that of 1 - the "
    "classifier's largest probability with the residual. A normal distribution has 68.3 % in 1 sigma and 95.4 % in 2. "
    "at 90%: accuracy without the least certain tenth of the images."
)


@dataclass(frozen=True)
class HeadUncertainty:
    """One head's uncertainty on each of its tasks."""

    cache: str
    label: str
    protocol: str
    tasks: dict[str, Uncertainty]


def uncertainties(cache: Cache, results: Path | None = None) -> list[HeadUncertainty]:
    """The uncertainty of every kept head that predicts sigma, on all test images of its tasks."""
    return [
        HeadUncertainty(
            str(cache.path),
            kept_head.label,
            kept_head.protocol,
            {
                task: measure(
                    kept_head.head.params_of(task),
                    cache.features(task),
                    cache.features(task, "expert"),
                    cache.classifier(task),
                    cache.labels(task),
                )
                for task in kept_head.head.tasks
            },
        )
        for kept_head in kept_heads(cache, results)
        if kept_head.head.settings.predicts_sigma
    ]


def uncertainty_table(head: HeadUncertainty) -> Table:
    """Correlations, calibration, and accuracy without the least certain images."""
    lines = [Line(task, _figures(measured)) for task, measured in head.tasks.items()]
    columns = {column: _FORMATS.get(column, ".1f") for column in lines[0].values}
    means = {column: fmean(line.values[column] for line in lines) for column in columns}
    title = f"Uncertainty of {head.label} ({head.cache}: {head.protocol}, evaluated on all test images)"
    return Table(title, columns, (*lines, Line(AVERAGE, means, BASELINE)), first="task", notes=(_NOTE,))


def _figures(measured: Uncertainty) -> dict[str, float]:
    figures = {
        "rank corr.": measured.rank_correlation,
        "of doubt": measured.confidence_correlation,
        "in 1 sigma, %": 100 * measured.within[1],
        "in 2 sigma, %": 100 * measured.within[2],
        "sigma": fmean(sigma for sigma, _ in measured.bins),
        "residual": fmean(residual for _, residual in measured.bins),
        "acc. at 100%": 100 * measured.by_sigma[COVERAGES.index(1.0)],
    }
    for share in (0.9, 0.8, 0.5):
        at = COVERAGES.index(share)
        figures[f"at {share:.0%} by sigma"] = 100 * measured.by_sigma[at]
        figures[f"at {share:.0%} by doubt"] = 100 * measured.by_confidence[at]
    return figures
