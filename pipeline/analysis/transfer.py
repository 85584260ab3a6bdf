"""Accuracy of kept heads on tasks, and on caches, that they were not fitted on."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from torch import Tensor

from probsurgery.pipeline.analysis.kept_heads import KeptHead, kept_heads
from probsurgery.pipeline.analysis.tables import AVERAGE, BASELINE, Line, Table
from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.device import one_thread_if_small
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fingerprints import shortened
from probsurgery.pipeline.heads.head import Head
from probsurgery.pipeline.heads.metrics import accuracy
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import mean_if_known


def transfer(cache: str | Path, on: Sequence[str | Path] = (), results: Path | None = None) -> list[Table]:
    """Accuracy in percent of a cache's kept heads where they were not fitted, on all test images.

    One table for each head on every task of the cache; then, for each cache in `on`, one of all heads on that cache's
    features, beside the heads that were fitted there. Raises `InputError` without a kept head, or if a cache has
    another architecture or other tasks.
    """
    source = Cache(cache)
    heads = list(kept_heads(source, results))
    if not heads:
        raise InputError(f"no head of {source.path} is kept; `probsurgery fit --cache {source.path}` keeps one")
    targets = [Cache(path) for path in on]
    for target, field in product(targets, ("arch", "dim", "tasks")):
        expected, given = (getattr(cache.identity, field) for cache in (source, target))
        if given != expected:
            difference = f"has {field} {shortened(given)}, but {source.path} has {shortened(expected)}"
            raise InputError(f"{target.path} {difference}; heads do not fit it")
    return [_across_tasks(source, head) for head in heads] + [_on_cache(cache, source, heads) for cache in targets]


def _percent(features: Tensor, cache: Cache, task: str, classifier: Classifier | None = None) -> float | None:
    """Accuracy of features under the task's classifier, or the one that replaces it."""
    truth = cache.truth(task)
    if truth is None:
        return None
    own, labels = truth
    with one_thread_if_small(features):
        return 100 * accuracy(features, classifier or own, labels)


def _head_percent(head: Head, cache: Cache, task: str, fitted_on: str) -> float | None:
    """Accuracy of a head; None for a classifier head where it was not fitted, as the classes are others."""
    if not head.settings.corrects_features and task != fitted_on:
        return None
    return _percent(head(cache.features(task), fitted_on), cache, task, head.classifiers.get(fitted_on))


def _encoders(cache: Cache, tasks: Sequence[str]) -> list[Line]:
    lines = []
    for label, kind in (("individual experts", "expert"), ("merged", "merged")):
        values = {task: _percent(cache.features(task, kind), cache, task) for task in tasks}
        lines.append(Line(label, values | {AVERAGE: mean_if_known(values.values())}, BASELINE))
    return lines


def _across_tasks(cache: Cache, kept: KeptHead) -> Table:
    """A line for each task that has a head, or one for a shared head; a column for each task."""
    tasks, head = cache.tasks("test"), kept.head
    lines = _encoders(cache, tasks)
    for fitted_on in [head.tasks] if head.shared else [(task,) for task in head.tasks]:
        values = {task: _head_percent(head, cache, task, fitted_on[0]) for task in tasks}
        if elsewhere := [value for task, value in values.items() if task not in fitted_on]:
            values["elsewhere"] = mean_if_known(elsewhere)
        lines.append(Line(f"fitted on {'+'.join(fitted_on)}", values))
    fitted = f"{kept.label} ({cache.path}: fitted {kept.protocol}, evaluated on all test images)"
    columns = dict.fromkeys([*tasks, AVERAGE, "elsewhere"], ".1f")
    notes = ("elsewhere: the mean over tasks that the head was not fitted on.",)
    return Table(f"Accuracy in %. On every task: {fitted}", columns, tuple(lines), first="head", notes=notes)


def _on_cache(target: Cache, source: Cache, heads: Sequence[KeptHead]) -> Table:
    """Heads of a source cache on a target's features, beside those fitted there."""
    tasks = [task for task in target.tasks("test") if any(task in kept.head.tasks for kept in heads)]
    lines = _encoders(target, tasks)
    for origin, origin_heads in ((source, heads), (target, kept_heads(target))):
        for kept in origin_heads:
            fitted = [task for task in tasks if task in kept.head.tasks]
            values = {task: _head_percent(kept.head, target, task, task) for task in fitted}
            if len(values) == len(tasks):
                values[AVERAGE] = mean_if_known(values.values())
            lines.append(Line(f"{kept.label}, fitted on {origin.path.name} ({kept.protocol})", values))
    title = f"Accuracy in %. On {target.path}, all test images: heads of {source.path.name}, and those fitted there"
    return Table(title, dict.fromkeys([*tasks, AVERAGE], ".1f"), tuple(lines), max, first="head")
