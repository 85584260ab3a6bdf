"""A sweep: every combination of some values fitted as one job, and what came out for each setting."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from probsurgery.pipeline.config import FitConfig, SweepConfig
from probsurgery.pipeline.device import available_memory, choose_device
from probsurgery.pipeline.fitting.fit import FitResult, fit_all
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import Spread, spread
from probsurgery.pipeline.training.plan import HEAD_BYTES, too_large

Progress = Callable[[int, int, str], None]
"""Told how many head-steps are done, how many there are in all, and which setting is best so far."""


@dataclass(frozen=True)
class SettingLine:
    """What one setting gives, over its seeds."""

    setting: dict[str, object]
    """The settings that vary in this sweep."""
    seeds: int
    """Of which every task is there."""
    accuracy: dict[str, Spread]
    """In percent, for each task."""
    bias: dict[str, Spread]
    """Mean absolute difference to the expert's features after the head, for each task."""
    average_accuracy: Spread | None
    """Over tasks, then over seeds; None if a task is missing."""
    average_bias: Spread | None


@dataclass(frozen=True)
class SweepResult:
    """A sweep's table, and how it went."""

    cache: str
    protocol: str
    """How fitted and evaluated rows relate; where the fraction varies, it is with the settings."""
    tasks: tuple[str, ...]
    varied: dict[str, tuple]
    """The settings that vary, but the seed, with their values."""
    baselines: dict[str, dict[str, float]]
    """Accuracy in percent of the merged and the individual encoders, for each task."""
    lines: tuple[SettingLine, ...]
    seeds: int
    heads: int
    """In the grid."""
    fitted: int
    """Of them now; the others were there already, or failed."""
    failures: tuple[tuple[str, str], ...]
    """Each head that could not be fitted, and why."""
    seconds: float


def sweep(config: SweepConfig, progress: Progress = lambda done, total, best: None) -> SweepResult:
    """Fit every setting of a grid that is not among the results yet.

    Raises `InputError`, before anything is written, for a value out of range or a grid that memory does not hold.
    """
    _check_size(config)
    begun, best = time.perf_counter(), _Best()
    results = fit_all(
        config.expand(),
        keep_heads=config.keep_heads,
        progress=lambda done, total: progress(done, total, best.text),
        finished=best.note,
    )
    tasks = results[0].config.tasks
    given = {"head": config.head, **config.values, "fraction": config.fraction}
    varied = {name: values for name, values in given.items() if len(values) > 1}
    by_setting = defaultdict(list)
    for result in results:
        by_setting[result.config.head, result.config.fraction].append(result)
    return SweepResult(
        str(config.cache),
        (results[0].config if len(config.fraction) == 1 else replace(results[0].config, fraction=1.0)).protocol,
        tasks,
        varied,
        {kind: _baseline(results, tasks, kind) for kind in ("merged", "individual")},
        tuple(_line(its, tasks, varied) for its in by_setting.values()),
        seeds=len(config.seed),
        heads=len(results) * (1 if config.shared else len(tasks)),
        fitted=sum(result.fitted for result in results),
        failures=tuple(failure for result in results for failure in result.failures),
        seconds=time.perf_counter() - begun,
    )


def _check_size(config: SweepConfig) -> None:
    free = available_memory(choose_device("cpu"))
    tasks = config.tasks or Cache(config.cache).identity["tasks"]
    heads = config.size * (1 if config.shared else len(tasks))
    if heads * HEAD_BYTES > free:
        raise too_large(heads, heads * HEAD_BYTES, free)


class _Best:
    """The setting and seed with the least bias, averaged over tasks, of those that have every task so far.

    Labels have no part in it.
    """

    def __init__(self) -> None:
        self.text = ""
        self._least = float("inf")
        self._biases: dict[tuple, dict[str, float]] = defaultdict(dict)

    def note(self, config: FitConfig, row: dict) -> None:
        biases = self._biases[config.head, config.fraction, config.seed]
        biases[row["task"]] = row["bias"]["after"]
        if len(biases) == len(config.tasks) and fmean(biases.values()) < self._least:
            self._least = fmean(biases.values())
            self.text = f"least bias so far {self._least:.3f} ({row['head']})"


def _setting(config: FitConfig, varied: Sequence[str]) -> dict[str, object]:
    settings = {"head": config.head.kind, **vars(config.head), "fraction": config.fraction}
    return {name: settings[name] for name in varied if name in settings}


def _line(results: Sequence[FitResult], tasks: Sequence[str], varied: Sequence[str]) -> SettingLine:
    seeds = [{row["task"]: row for row in result.rows} for result in results]
    figures = {
        "accuracy": lambda row: 100 * row["accuracy"]["head"],
        "bias": lambda row: row["bias"]["after"],
    }
    by_task, average = {}, {}
    for name, figure in figures.items():
        by_task[name] = {t: s for t in tasks if (s := spread([figure(rows[t]) for rows in seeds if t in rows]))}
        whole = [fmean(figure(row) for row in rows.values()) for rows in seeds if len(rows) == len(tasks)]
        average[name] = spread(whole)
    setting = _setting(results[0].config, varied)
    return SettingLine(setting, len(whole), by_task["accuracy"], by_task["bias"], average["accuracy"], average["bias"])


def _baseline(results: Sequence[FitResult], tasks: Sequence[str], kind: str) -> dict[str, float]:
    rows = [row for result in results for row in result.rows]
    found = {task: [100 * row["accuracy"][kind] for row in rows if row["task"] == task] for task in tasks}
    return {task: fmean(values) for task, values in found.items() if values}
