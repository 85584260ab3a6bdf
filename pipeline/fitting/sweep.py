"""A sweep: every combination of some values, fitted together, with one line of results for each setting."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

from probsurgery.pipeline.config import SweepConfig
from probsurgery.pipeline.device import available_memory, choose_device
from probsurgery.pipeline.fitting.fit import FitResult, fit_all
from probsurgery.pipeline.fitting.scale import with_scales
from probsurgery.pipeline.progress import Progress, no_progress
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import ResultRow, Spread, mean_if_known, spread, spreads
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
    """Mean absolute difference to the expert's features after the head, for each task; empty for classifier heads."""
    average_accuracy: Spread | None
    """Over tasks, then over seeds; None if a task is missing, or has no accuracy."""
    average_bias: Spread | None


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep, and how it went."""

    cache: str
    protocol: str
    """How fitted and evaluated rows relate; where the fraction varies, it is with the settings."""
    tasks: tuple[str, ...]
    varied: dict[str, tuple[Any, ...]]
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
    kernels: tuple[str, ...]
    """What trained the heads: `torch`, or the compiled steps of `TrainingPlan.kernel`."""
    seconds: float


def sweep(config: SweepConfig, progress: Progress = no_progress) -> SweepResult:
    """Fit every setting of a grid that is not among the results yet; `progress` is told which is best so far.

    Raises `InputError`, before anything is written, for a value out of range or a grid that memory does not hold.
    """
    begun, best = time.perf_counter(), _BestSoFar()
    config = with_scales(config)
    tasks = config.tasks or Cache(config.cache).identity.tasks
    heads, free = config.size * (1 if config.shared else len(tasks)), available_memory(choose_device("cpu"))
    if heads * HEAD_BYTES > free:
        raise too_large(heads, heads * HEAD_BYTES, free)

    def show(done: int, total: int, what: str = "", *, unit: str | None = None) -> None:
        progress(done, total, best.text)

    results = fit_all(config.expand(), keep_heads=config.keep_heads, progress=show, finished=best.note)
    tasks = results[0].config.known_tasks
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
        baselines={
            encoder: {
                task: fmean(by_seed.values())
                for task, by_seed in _by_task(results, tasks, partial(_percent, encoder=encoder)).items()
            }
            for encoder in ("merged", "individual")
        },
        lines=tuple(_line(over_seeds, tasks, list(varied)) for over_seeds in by_setting.values()),
        seeds=len(config.seed),
        heads=len(results) * (1 if config.shared else len(tasks)),
        fitted=sum(result.fitted for result in results),
        failures=tuple(failure for result in results for failure in result.failures),
        kernels=tuple(sorted({row.plan.kernel for result in results for row in result.rows if row.plan})),
        seconds=time.perf_counter() - begun,
    )


class _BestSoFar:
    """The setting and seed with the least bias, averaged over tasks. It does not depend on labels."""

    def __init__(self) -> None:
        self.text = ""
        self._least = float("inf")

    def note(self, result: FitResult) -> None:
        if len(result.rows) < len(result.config.known_tasks):  # a head failed
            return
        bias = mean_if_known(map(_bias, result.rows))
        if bias is not None and bias < self._least:
            self._least = bias
            self.text = f"least bias so far {bias:.3f} ({result.rows[0].head})"


def _line(results: Sequence[FitResult], tasks: Sequence[str], varied: Sequence[str]) -> SettingLine:
    """One setting's line, from its results for each seed."""
    config, whole = results[0].config, [result.rows for result in results if len(result.rows) == len(tasks)]
    settings = {"head": config.head.kind, **vars(config.head), "fraction": config.fraction}
    return SettingLine(
        setting={name: settings[name] for name in varied if name in settings},
        seeds=len(whole),
        accuracy=spreads(_by_task(results, tasks, _percent)),
        bias=spreads(_by_task(results, tasks, _bias)),
        average_accuracy=spread(
            {rows[0].seed: mean for rows in whole if (mean := mean_if_known(map(_percent, rows))) is not None}
        ),
        average_bias=spread(
            {rows[0].seed: mean for rows in whole if (mean := mean_if_known(map(_bias, rows))) is not None}
        ),
    )


def _percent(row: ResultRow, encoder: str = "head") -> float | None:
    return row.accuracy.percent(encoder)


def _bias(row: ResultRow) -> float | None:
    return row.bias.after


def _by_task(
    results: Sequence[FitResult], tasks: Sequence[str], figure: Callable[[ResultRow], float | None]
) -> dict[str, dict[int, float]]:
    """A figure by seed, for each task that has it; of several results of a seed, the last."""
    rows = [row for result in results for row in result.rows]
    known = [(row, value) for row in rows if (value := figure(row)) is not None]
    figures = {task: {row.seed: value for row, value in known if row.task == task} for task in tasks}
    return {task: by_seed for task, by_seed in figures.items() if by_seed}
