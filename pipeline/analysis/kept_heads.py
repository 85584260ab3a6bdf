"""The heads kept with a cache, and how uncertain they are."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from probsurgery.pipeline.analysis.labels import head_label
from probsurgery.pipeline.analysis.tables import AVERAGE, BASELINE, Line, Table, mean_of
from probsurgery.pipeline.device import one_thread_if_small
from probsurgery.pipeline.errors import AccessError, InputError, PassedOverWarning
from probsurgery.pipeline.files import folders_in
from probsurgery.pipeline.heads.head import Head, load_head
from probsurgery.pipeline.heads.uncertainty import COVERAGES, Uncertainty, measure
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import ResultRow

_FORMATS = {"rank corr.": ".2f", "of doubt": ".2f", "sigma": ".3f", "residual": ".3f"}
"""Of the columns that are not in percent."""
_NOTE = (
    "rank corr.: rank correlation of an image's predicted sigma with its true residual; of doubt: that of 1 - the "
    "classifier's largest probability with the residual. A normal distribution has 68.3 % in 1 sigma and 95.4 % in 2. "
    "at 90%: accuracy without the least certain tenth of the images."
)


@dataclass(frozen=True)
class KeptHead:
    """A head with its name in tables."""

    label: str
    protocol: str
    head: Head


def kept_heads(cache: Cache, results: Path | None = None) -> Iterator[KeptHead]:
    """The heads kept with a cache, defaults first. Damaged heads are passed over with a warning, those fitted on
    other features without.

    Raises `AccessError` or an OSError if one is there and cannot be read.
    """
    paths = folders_in((results or cache.path) / "heads")
    for path in sorted(paths, key=lambda path: (path.name.count("-"), path.name)):
        try:
            head = load_head(path)
        except AccessError:
            raise
        except InputError as error:
            warnings.warn(f"a head is passed over: {error}", PassedOverWarning, stacklevel=2)
            continue
        rows = [*head.record.results] if head.record else []
        if rows and head.dim == cache.dim and current_rows(rows, cache) == rows:
            seed = f", seed {rows[0].seed}" if rows[0].seed else ""
            yield KeptHead(head_label(rows[0]) + seed, rows[0].protocol, head)


def current_rows(rows: Iterable[ResultRow], cache: Cache) -> list[ResultRow]:
    """The rows whose heads were fitted on the features that the cache holds now."""
    tasks = cache.manifest.tasks.items()
    current = {name: cache.task_fingerprint(name) for name, task in tasks if "test" in task.splits}
    return [row for row in rows if row.cache == current.get(row.task)]


@dataclass(frozen=True)
class HeadUncertainty:
    """One head's uncertainty on each of its tasks."""

    cache: str
    label: str
    protocol: str
    tasks: dict[str, Uncertainty]


def uncertainties(cache: Cache, results: Path | None = None) -> list[HeadUncertainty]:
    """The uncertainty of every kept head that predicts sigma, on all test images of its tasks."""
    measured = []
    for kept in kept_heads(cache, results):
        if kept.head.settings.predicts_sigma:
            tasks = {task: _measured(kept.head, cache, task) for task in kept.head.tasks}
            measured.append(HeadUncertainty(str(cache.path), kept.label, kept.protocol, tasks))
    return measured


def _measured(head: Head, cache: Cache, task: str) -> Uncertainty:
    merged, expert = cache.features(task), cache.features(task, "expert")
    with one_thread_if_small(merged):
        labels = cache.labels(task) if cache.has_labels(task) else None
        scale = head.settings.feature_scale
        return measure(head.params_of(task), merged, expert, cache.linear_classifier(task), labels, scale)


def uncertainty_table(head: HeadUncertainty) -> Table:
    """Correlations, calibration, and accuracy without the least certain images."""
    lines = [Line(task, _uncertainty_figures(measured)) for task, measured in head.tasks.items()]
    columns = {column: _FORMATS.get(column, ".1f") for column in lines[0].values}
    means = {column: mean_of(lines, column) for column in columns}
    title = f"Uncertainty of {head.label} ({head.cache}: {head.protocol}, evaluated on all test images)"
    return Table(title, columns, (*lines, Line(AVERAGE, means, BASELINE)), first="task", notes=(_NOTE,))


def _uncertainty_figures(measured: Uncertainty) -> dict[str, float | None]:
    sigmas, residuals = zip(*measured.bins, strict=True)
    figures: dict[str, float | None] = {
        "rank corr.": measured.rank_correlation,
        "of doubt": measured.confidence_correlation,
        "in 1 sigma, %": 100 * measured.within[1],
        "in 2 sigma, %": 100 * measured.within[2],
        "sigma": fmean(sigmas),
        "residual": fmean(residuals),
        "acc. at 100%": _at(measured.by_sigma, 1.0),
    }
    for share in (0.9, 0.8, 0.5):
        for order, accuracies in (("sigma", measured.by_sigma), ("doubt", measured.by_confidence)):
            figures[f"at {share:.0%} by {order}"] = _at(accuracies, share)
    return figures


def _at(accuracies: Sequence[float] | None, coverage: float) -> float | None:
    return None if accuracies is None else 100 * accuracies[COVERAGES.index(coverage)]
