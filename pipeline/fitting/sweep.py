"""A sweep: every combination of some values, fitted together, with one line of results for each setting."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from probsurgery.pipeline.config import SweepConfig
from probsurgery.pipeline.device import available_memory, choose_device
from probsurgery.pipeline.fitting.fit import FitResult, fit_all
from probsurgery.pipeline.progress import Progress, no_progress
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import ResultRow, Spread, spread
from probsurgery.pipeline.training.plan import HEAD_BYTES, too_large


@dataclass(frozen=True)
class SettingLine:
    """The results of one setting over its seeds."""

    setting: dict[str, object]
    """The settings that vary in this sweep."""
    seeds: int
    """Number of seeds with results for every task."""
    accuracy: dict[str, Spread]
    """In percent, for each task."""
    bias: dict[str, Spread]
    """Mean absolute difference to the expert's features after the head, for each task."""
    average_accuracy: Spread | None
    """Over tasks, then over seeds; None if a task is missing."""
    average_bias: Spread | None


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep, and how it went."""

    cache: str
    protocol: str
    """How fitted and evaluated rows relate; where the fraction varies, it is with the settings."""
    tasks: tuple[str, ...]
    varied: dict[str, tuple]
    """The settings that vary, except the seed, with their values."""
    baselines: dict[str, dict[str, float]]
    """Accuracy in percent of the merged and the individual encoders, for each task."""
    lines: tuple[SettingLine, ...]
    seeds: int
    heads: int
    """Heads in the grid."""
    fitted: int
    """Heads fitted now; the others existed already, or failed."""
    failures: tuple[tuple[str, str], ...]
    """(label, reason) of each head that could not be fitted."""
    seconds: float


def sweep(config: SweepConfig, progress: Progress = no_progress) -> SweepResult:
    """Fit every setting of a grid that is not among the results yet; `progress` is told which is best so far.

    Raises `InputError`, before anything is written, for a value out of range or a grid that memory does not hold.
    """
    _check_size(config)
    begun, best = time.perf_counter(), _BestSoFar()

    def show(done: int, total: int, what: str = "", *, unit: str | None = None) -> None:
        progress(done, total, best.text)

    results = fit_all(config.expand(), keep_heads=config.keep_heads, progress=show, finished=best.note)
    tasks = results[0].config.tasks
    grid = {"head": config.head, **config.values, "fraction": config.fraction}
    varied = {name: values for name, values in grid.items() if len(values) > 1}
    by_setting = defaultdict(list)
    for result in results:
        by_setting[result.config.head, result.config.fraction].append(result)
    return SweepResult(
        cache=str(config.cache),
        protocol=replace(results[0].config, fraction=config.fraction[0] if len(config.fraction) == 1 else 1.0).protocol,
        tasks=tasks,
        varied=varied,
        baselines={encoder: _baseline(results, tasks, encoder) for encoder in ("merged", "individual")},
        lines=tuple(_line(over_seeds, tasks, varied) for over_seeds in by_setting.values()),
        seeds=len(config.seed),
        heads=len(results) * (1 if config.shared else len(tasks)),
        fitted=sum(result.fitted for result in results),
        failures=tuple(failure for result in results for failure in result.failures),
        seconds=time.perf_counter() - begun,
    )


def _check_size(config: SweepConfig) -> None:
    free = available_memory(choose_device("cpu"))
    tasks = config.tasks or Cache(config.cache).identity.tasks
    heads = config.size * (1 if config.shared else len(tasks))
    if heads * HEAD_BYTES > free:
        raise too_large(heads, heads * HEAD_BYTES, free)


class _BestSoFar:
    """The setting and seed with the least bias, averaged over tasks. It does not depend on labels."""

    def __init__(self) -> None:
        self.text = ""
        self._least = float("inf")

    def note(self, result: FitResult) -> None:
        if len(result.rows) < len(result.config.tasks):  # a head failed
            return
        bias = fmean(row.bias.after for row in result.rows)
        if bias < self._least:
            self._least = bias
            self.text = f"least bias so far {bias:.3f} ({result.rows[0].head})"


def _line(results: Sequence[FitResult], tasks: Sequence[str], varied: Sequence[str]) -> SettingLine:
    """One setting's line, from its results for each seed."""
    config = results[0].config
    settings = {"head": config.head.kind, **vars(config.head), "fraction": config.fraction}
    accuracy, average_accuracy = _spreads(results, tasks, lambda row: 100 * row.accuracy.head)
    bias, average_bias = _spreads(results, tasks, lambda row: row.bias.after)
    return SettingLine(
        setting={name: settings[name] for name in varied if name in settings},
        seeds=sum(len(result.rows) == len(tasks) for result in results),
        accuracy=accuracy,
        bias=bias,
        average_accuracy=average_accuracy,
        average_bias=average_bias,
    )


def _spreads(
    results: Sequence[FitResult], tasks: Sequence[str], figure: Callable[[ResultRow], float]
) -> tuple[dict[str, Spread], Spread | None]:
    """A figure for each task over seeds, and its average over tasks of the seeds that have every task."""
    by_task = defaultdict(list)
    for result in results:
        for row in result.rows:
            by_task[row.task].append(figure(row))
    averages = [fmean(map(figure, result.rows)) for result in results if len(result.rows) == len(tasks)]
    return {task: spread(by_task[task]) for task in tasks if task in by_task}, spread(averages)


def _baseline(results: Sequence[FitResult], tasks: Sequence[str], encoder: str) -> dict[str, float]:
    by_task = defaultdict(list)
    for result in results:
        for row in result.rows:
            by_task[row.task].append(100 * getattr(row.accuracy, encoder))
    return {task: fmean(by_task[task]) for task in tasks if task in by_task}
