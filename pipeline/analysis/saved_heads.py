"""The heads saved with a cache, and what they do to features: uncertainty, projection, transfer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from probsurgery.pipeline.analysis.settings import head_label
from probsurgery.pipeline.analysis.tables import AVERAGE, BASELINE, Line, Table
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fingerprints import shortened
from probsurgery.pipeline.heads.head import Head, load_head
from probsurgery.pipeline.heads.metrics import accuracy
from probsurgery.pipeline.heads.uncertainty import COVERAGES, Uncertainty, measure
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import ResultRow

SHOWN_ROWS = 300
"""Most rows of each task; more would hide each other."""
_FORMATS = {"rank corr.": ".2f", "of doubt": ".2f", "sigma": ".3f", "residual": ".3f"}
"""Of the columns that are not in percent."""
_NOTE = (
    "rank corr.: rank correlation of an image's predicted sigma with its true residual; of doubt: that of 1 - the "
    "classifier's largest probability with the residual. A normal distribution has 68.3 % in 1 sigma and 95.4 % in 2. "
    "at 90%: accuracy without the least certain tenth of the images."
)


@dataclass(frozen=True)
class SavedHead:
    """A head with its name in tables."""

    label: str
    protocol: str
    head: Head


def saved_heads(cache: Cache, results: Path | None = None) -> Iterator[SavedHead]:
    """The heads saved with a cache, defaults first. Damaged heads are skipped, and those fitted on other features."""
    paths = [path for path in ((results or cache.path) / "heads").glob("[!.]*") if path.is_dir()]
    for path in sorted(paths, key=lambda path: (path.name.count("-"), path.name)):
        try:
            head = load_head(path)
        except InputError:  # `fit` reports damaged heads
            continue
        rows = [*head.record.results] if head.record else []
        if rows and head.dim == cache.dim and current_rows(rows, cache) == rows:
            seed = f", seed {rows[0].seed}" if rows[0].seed else ""
            yield SavedHead(head_label(rows[0]) + seed, rows[0].protocol, head)


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
    """The uncertainty of every saved head that predicts sigma, on all test images of its tasks."""
    measured = []
    for saved in saved_heads(cache, results):
        if saved.head.settings.predicts_sigma:
            tasks = {task: _measured(saved.head, cache, task) for task in saved.head.tasks}
            measured.append(HeadUncertainty(str(cache.path), saved.label, saved.protocol, tasks))
    return measured


def _measured(head: Head, cache: Cache, task: str) -> Uncertainty:
    merged, expert = cache.features(task), cache.features(task, "expert")
    return measure(head.params_of(task), merged, expert, cache.classifier(task), cache.labels(task))


def uncertainty_table(head: HeadUncertainty) -> Table:
    """Correlations, calibration, and accuracy without the least certain images."""
    lines = [Line(task, _uncertainty_figures(measured)) for task, measured in head.tasks.items()]
    columns = {column: _FORMATS.get(column, ".1f") for column in lines[0].values}
    means = {column: fmean(line.values[column] for line in lines) for column in columns}
    title = f"Uncertainty of {head.label} ({head.cache}: {head.protocol}, evaluated on all test images)"
    return Table(title, columns, (*lines, Line(AVERAGE, means, BASELINE)), first="task", notes=(_NOTE,))


def _uncertainty_figures(measured: Uncertainty) -> dict[str, float]:
    sigmas, residuals = zip(*measured.bins, strict=True)
    figures = {
        "rank corr.": measured.rank_correlation,
        "of doubt": measured.confidence_correlation,
        "in 1 sigma, %": 100 * measured.within[1],
        "in 2 sigma, %": 100 * measured.within[2],
        "sigma": fmean(sigmas),
        "residual": fmean(residuals),
        "acc. at 100%": 100 * measured.by_sigma[COVERAGES.index(1.0)],
    }
    for share in (0.9, 0.8, 0.5):
        for order, accuracies in (("sigma", measured.by_sigma), ("doubt", measured.by_confidence)):
            figures[f"at {share:.0%} by {order}"] = 100 * accuracies[COVERAGES.index(share)]
    return figures


@dataclass(frozen=True)
class Projection:
    """Some rows of every task in one plane."""

    cache: str
    label: str
    method: str
    """PCA or t-SNE."""
    points: dict[str, dict[str, Float[Tensor, "M 2"]]]
    """By task, then `merged`, `corrected` and `expert`."""


def projection(cache: Cache, results: Path | None = None, method: str = "PCA") -> Projection | None:
    """Features of all tasks in one plane, corrected by the first saved head; None without a head.

    The first `SHOWN_ROWS` rows of each task in a fixed random order. PCA, or t-SNE by scikit-learn.
    """
    first = next(saved_heads(cache, results), None)
    if first is None:
        return None
    features = []
    for task in first.head.tasks:
        merged, expert = cache.features(task), cache.features(task, "expert")
        rows = torch.randperm(len(merged), generator=torch.Generator().manual_seed(0))[:SHOWN_ROWS]
        features.append(torch.cat([merged[rows], first.head(merged[rows], task), expert[rows]]))
    plane = _project(torch.cat(features), method).split([*map(len, features)])
    points = [dict(zip(("merged", "corrected", "expert"), values.chunk(3), strict=True)) for values in plane]
    return Projection(str(cache.path), first.label, method, dict(zip(first.head.tasks, points, strict=True)))


def _project(values: Float[Tensor, "N d"], method: str) -> Float[Tensor, "N 2"]:
    if method == "t-SNE":
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise InputError("t-SNE needs scikit-learn; pip install 'probsurgery[plots]'") from None
        tsne = TSNE(init="pca", random_state=0, perplexity=min(30, (len(values) - 1) / 3))
        return torch.from_numpy(tsne.fit_transform(values.numpy()))
    centred = (values - values.mean(0)).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(-1)
    axes = axes * axes.sum(0).sign()  # an eigenvector's sign depends on the library
    return (centred @ axes).float()


def transfer(cache: str | Path, on: Sequence[str | Path] = (), results: Path | None = None) -> list[Table]:
    """Accuracy in percent of a cache's saved heads where they were not fitted, on all test images.

    One table for each head on every task of the cache; then, for each cache in `on`, one of all heads on that cache's
    features, beside the heads that were fitted there. Raises `InputError` without a saved head, or if a cache has
    another architecture or other tasks.
    """
    source = Cache(cache)
    heads = list(saved_heads(source, results))
    if not heads:
        raise InputError(f"no head of {source.path} is saved; `probsurgery fit --cache {source.path}` saves one")
    targets = [Cache(path) for path in on]
    for target, field in product(targets, ("arch", "dim", "tasks")):
        expected, given = (getattr(cache.identity, field) for cache in (source, target))
        if given != expected:
            difference = f"has {field} {shortened(given)}, but {source.path} has {shortened(expected)}"
            raise InputError(f"{target.path} {difference}; heads do not fit it")
    return [_across_tasks(source, head) for head in heads] + [_on_cache(cache, source, heads) for cache in targets]


def _percent(features: Tensor, cache: Cache, task: str) -> float:
    return 100 * accuracy(features, cache.classifier(task), cache.labels(task))


def _encoders(cache: Cache, tasks: Sequence[str]) -> list[Line]:
    lines = []
    for label, kind in (("individual experts", "expert"), ("merged", "merged")):
        values = {task: _percent(cache.features(task, kind), cache, task) for task in tasks}
        lines.append(Line(label, values | {AVERAGE: fmean(values.values())}, BASELINE))
    return lines


def _across_tasks(cache: Cache, saved: SavedHead) -> Table:
    """A line for each task that has a head, or one for a shared head; a column for each task."""
    tasks, head = cache.tasks("test"), saved.head
    lines = _encoders(cache, tasks)
    for fitted_on in [head.tasks] if head.shared else [(task,) for task in head.tasks]:
        values = {task: _percent(head(cache.features(task), fitted_on[0]), cache, task) for task in tasks}
        if elsewhere := [value for task, value in values.items() if task not in fitted_on]:
            values["elsewhere"] = fmean(elsewhere)
        lines.append(Line(f"fitted on {'+'.join(fitted_on)}", values))
    fitted = f"{saved.label} ({cache.path}: fitted {saved.protocol}, evaluated on all test images)"
    columns = dict.fromkeys([*tasks, AVERAGE, "elsewhere"], ".1f")
    notes = ("elsewhere: the mean over tasks that the head was not fitted on.",)
    return Table(f"Accuracy in %. On every task: {fitted}", columns, tuple(lines), first="head", notes=notes)


def _on_cache(target: Cache, source: Cache, heads: Sequence[SavedHead]) -> Table:
    """Heads of a source cache on a target's features, beside those fitted there."""
    tasks = [task for task in target.tasks("test") if any(task in saved.head.tasks for saved in heads)]
    lines = _encoders(target, tasks)
    for origin, origin_heads in ((source, heads), (target, saved_heads(target))):
        for saved in origin_heads:
            fitted = [task for task in tasks if task in saved.head.tasks]
            values = {task: _percent(saved.head(target.features(task), task), target, task) for task in fitted}
            if len(values) == len(tasks):
                values[AVERAGE] = fmean(values.values())
            lines.append(Line(f"{saved.label}, fitted on {origin.path.name} ({saved.protocol})", values))
    title = f"Accuracy in %. On {target.path}, all test images: heads of {source.path.name}, and those fitted there"
    return Table(title, dict.fromkeys([*tasks, AVERAGE], ".1f"), tuple(lines), max, first="head")
