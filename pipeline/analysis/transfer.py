"""How kept heads do where they were not fitted: on other tasks, and on other caches, of corrupted images say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from torch import Tensor

from probsurgery.pipeline.analysis.kept_heads import kept_heads
from probsurgery.pipeline.analysis.report import AVERAGE
from probsurgery.pipeline.analysis.tables import BASELINE, Line, Table
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.heads.head import Head
from probsurgery.pipeline.heads.metrics import accuracy
from probsurgery.pipeline.store.cache import Cache


def transfer(cache: str | Path, on: Sequence[str | Path] = (), results: Path | None = None) -> list[Table]:
    """Accuracy in percent of every kept head of a cache: on each task of that cache, its own and the others; then, for
    each cache in `on`, on the same task there, beside the heads that were fitted there.

    Every image of the test split is evaluated on. Raises `InputError` if no head is kept, or if a cache is of another
    architecture or other tasks.
    """
    source = Cache(cache)
    heads = list(kept_heads(source, results))
    if not heads:
        raise InputError(f"no head of {source.path} is kept; `probsurgery fit --cache {source.path}` keeps one")
    others = [Cache(path) for path in on]
    for other in others:
        for key in ("arch", "dim", "tasks"):
            ours, theirs = source.identity[key], other.identity[key]
            if ours != theirs:
                raise InputError(f"{other.path} has {key} {theirs}, but {source.path} has {ours}; heads do not fit it")
    return [_across_tasks(source, label, head) for label, head in heads] + [
        _on_cache(source, other, heads) for other in others
    ]


def _protocol(head: Head) -> str:
    return head.record["results"][0]["protocol"]


def _percent(cache: Cache, task: str, correct: Callable[[Tensor], Tensor] = lambda z: z, kind: str = "merged") -> float:
    return 100 * accuracy(correct(cache.features(task, kind)), cache.classifier(task), cache.labels(task))


def _encoders(cache: Cache, tasks: Sequence[str]) -> list[Line]:
    kinds = {"individual experts": "expert", "merged": "merged"}
    found = {label: {task: _percent(cache, task, kind=kind) for task in tasks} for label, kind in kinds.items()}
    return [Line(label, values | {AVERAGE: fmean(values.values())}, BASELINE) for label, values in found.items()]


def _across_tasks(cache: Cache, label: str, head: Head) -> Table:
    """A line for each head, a column for each task."""
    tasks = cache.tasks("test")
    lines = _encoders(cache, tasks)
    for fitted in [None] if head.shared else head.tasks:
        values = {task: _percent(cache, task, lambda z, f=fitted: head(z, f)) for task in tasks}
        own = head.tasks if fitted is None else (fitted,)
        elsewhere = [value for task, value in values.items() if task not in own]
        values |= {"elsewhere": fmean(elsewhere)} if elsewhere else {}
        lines.append(Line(f"fitted on {'+'.join(own)}", values))
    title = f"On every task: {label} ({cache.path}: fitted {_protocol(head)}, evaluated on all test images)"
    columns = dict.fromkeys([*tasks, AVERAGE, "elsewhere"], ".1f")
    notes = ("elsewhere: the mean over tasks that the head was not fitted on.",)
    return Table(f"Accuracy in %. {title}", columns, tuple(lines), first="head", notes=notes)


def _on_cache(source: Cache, other: Cache, heads: list[tuple[str, Head]]) -> Table:
    """Heads of one cache on another's features, beside those fitted there."""
    tasks = [task for task in other.tasks("test") if any(task in head.tasks for _, head in heads)]
    lines = _encoders(other, tasks)
    for origin, its in ((source, heads), (other, list(kept_heads(other)))):
        for label, head in its:
            shared = [task for task in tasks if task in head.tasks]
            values = {task: _percent(other, task, lambda z, h=head, t=task: h(z, t)) for task in shared}
            if len(values) == len(tasks):
                values[AVERAGE] = fmean(values.values())
            lines.append(Line(f"{label}, fitted on {origin.path.name} ({_protocol(head)})", values))
    title = f"Accuracy in %. On {other.path}, all test images: heads of {source.path.name}, and its own"
    return Table(title, dict.fromkeys([*tasks, AVERAGE], ".1f"), tuple(lines), max, first="head")
