"""Result rows -> the figures of one line: each task over seeds, and the average over tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from probsurgery.pipeline.analysis.tables import AVERAGE
from probsurgery.pipeline.store.results import ResultRow, Spread, spread


@dataclass(frozen=True)
class HeadFigures:
    """Figures of the heads of one setting over seeds: for each task, and the average if every task is there."""

    accuracy: dict[str, Spread]
    """In percent."""
    bias: dict[str, Spread]
    """Mean absolute difference of corrected features to the expert's."""

    @property
    def line_values(self) -> dict[str, Spread]:
        """Accuracy by task, and the average bias."""
        return self.accuracy | ({"bias": self.bias[AVERAGE]} if AVERAGE in self.bias else {})


def head_figures(rows: Sequence[ResultRow], tasks: Sequence[str]) -> HeadFigures:
    """Figures of the heads of one setting."""
    accuracy = _over_seeds(rows, tasks, lambda row: 100 * row.accuracy.head)
    return HeadFigures(accuracy, _over_seeds(rows, tasks, lambda row: row.bias.after))


def encoder_accuracy(rows: Sequence[ResultRow], tasks: Sequence[str], encoder: str) -> dict[str, Spread]:
    """Accuracy in percent of the `pretrained`, `individual` or `merged` encoder, or nothing if it is unknown.

    It is that of the rows on which the heads were evaluated.
    """

    def percent(row: ResultRow) -> float | None:
        share = getattr(row.accuracy, encoder)
        return None if share is None else 100 * share

    return _without_equal_seeds(_over_seeds(rows, tasks, percent))


def merged_bias(rows: Sequence[ResultRow], tasks: Sequence[str]) -> dict[str, Spread]:
    """Bias of the merged encoder on the rows that the heads were evaluated on."""
    return _without_equal_seeds(_over_seeds(rows, tasks, lambda row: row.bias.before))


def head_count(rows: Sequence[ResultRow]) -> int:
    """Heads of one setting and seed: one for each task, unless it is shared."""
    return 1 if rows[0].shared else len({row.task for row in rows})


def training_seconds(rows: Sequence[ResultRow]) -> float:
    """Training time of all heads of one setting and seed."""
    of_heads = rows[:1] if rows[0].shared else rows  # each row of a shared head has the whole head's time
    return sum(row.seconds for row in of_heads)


def _over_seeds(
    rows: Sequence[ResultRow], tasks: Sequence[str], figure: Callable[[ResultRow], float | None]
) -> dict[str, Spread]:
    """A figure for each task over seeds, and its average over tasks for the seeds that have every task.

    An encoder's figure of one task and seed is the mean over the heads that were evaluated.
    """
    by_seed: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        value = figure(row)
        if value is not None:
            by_seed[row.seed][row.task].append(value)
    seeds = [{task: fmean(values) for task, values in by_task.items()} for by_task in by_seed.values()]
    columns = {task: [means[task] for means in seeds if task in means] for task in tasks}
    columns[AVERAGE] = [fmean(means[task] for task in tasks) for means in seeds if means.keys() >= set(tasks)]
    return {column: spread(values) for column, values in columns.items() if values}


def _without_equal_seeds(figures: dict[str, Spread]) -> dict[str, Spread]:
    """An encoder's figures: a seed changes one only if it chooses the rows that are evaluated on."""
    return {column: f if f.sd and f.sd > 1e-9 else Spread(f.mean, None) for column, f in figures.items()}
