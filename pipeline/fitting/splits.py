"""Which rows each head is fitted on and evaluated on, and its figures on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from probsurgery.pipeline.config import FitConfig
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.heads.head import Head
from probsurgery.pipeline.heads.metrics import accuracy, representation_bias
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.manifest import KINDS
from probsurgery.pipeline.training.loop import Rows, generator

EVALUATED_AT_ONCE = 4096
"""Rows. The memory of larger temporary tensors goes back to the system each time, and fetching it anew is slow."""


@dataclass(frozen=True)
class TaskData:
    """One task's tensors, in memory or mapped from disk, as the fit and its evaluation use them."""

    task: str
    merged: Tensor
    expert: Tensor
    pretrained: Tensor | None
    labels: Tensor
    classifier: Tensor


class LoadedTasks:
    """Tasks read from a cache. Features are held once: in memory or, mapped, as files in `scratch`.

    With `scratch`, no more than a shard of them is in memory at a time, and worker processes can map them too.
    """

    def __init__(self, cache: Cache, tasks: Sequence[str], fit_split: str, scratch: Path | None = None) -> None:
        self._fit_split = fit_split
        self._tasks: dict[str, TaskData] = {}
        self._features: dict[str, Rows] = {}
        for task in tasks:
            files = {
                (split, kind): scratch and scratch / f"{task}.{split}.{kind}.npy"
                for split in dict.fromkeys(("test", fit_split))
                for kind in (KINDS if split == "test" else ("merged", "expert"))
                if cache.has(task, kind, split)
            }
            read = {key: cache.features(task, key[1], key[0], scratch=file) for key, file in files.items()}
            test = (read.get(("test", kind)) for kind in KINDS)
            self._tasks[task] = TaskData(task, *test, cache.labels(task), cache.classifier(task))
            fitted = [(fit_split, kind) for kind in ("merged", "expert")]
            self._features[task] = Rows(
                task, *(read[key] for key in fitted), files=tuple(files[key] for key in fitted) if scratch else None
            )
        self._seen: dict[tuple, Rows] = {}
        self._baselines: dict[tuple, tuple[Tensor, dict]] = {}

    def rows(self, config: FitConfig, task: str) -> Rows:
        """What the fit may see: merged and expert features only. Heads that see the same rows share one object."""
        whole = self._features[task]
        everything = config.fraction == 1 and not config.holdout
        key = (task,) if everything else (task, config.seed, config.fraction, config.holdout)
        if key not in self._seen:
            if self._fit_split == "train":
                seen = _fraction(config, task, torch.arange(len(whole)))
            else:
                seen, _ = split_rows(config, self._tasks[task])
            self._seen[key] = replace(whole, seen=seen) if len(seen) < len(whole) else whole
        return self._seen[key]

    def evaluate(self, config: FitConfig, head: Head, task: str) -> dict:
        """Accuracy in [0, 1] and bias of each kind of features on the rows that this setting evaluates on."""
        its = self._tasks[task]
        key = (task, config.seed, config.holdout) if config.holdout else (task,)
        if key not in self._baselines:
            _, rows = split_rows(config, its)
            kinds = {"individual": its.expert, "merged": its.merged}
            kinds = {"pretrained": its.pretrained} | kinds if its.pretrained is not None else kinds
            figures = {kind: _figures(its, rows, lambda part, v=values: v[part]) for kind, values in kinds.items()}
            self._baselines[key] = rows, figures
        rows, baselines = self._baselines[key]
        its_accuracy, bias = _figures(its, rows, lambda part: head(its.merged[part], task))
        return {
            "fit_rows": len(self.rows(config, task)),
            "eval_rows": len(rows),
            "accuracy": {kind: figure for kind, (figure, _) in baselines.items()} | {"head": its_accuracy},
            "bias": {"before": baselines["merged"][1], "after": bias},
        }


def _figures(its: TaskData, rows: Tensor, features: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Accuracy of features on these rows, and their bias; `features` gives those of some row numbers."""
    right, off = 0, 0.0
    for part in rows.split(EVALUATED_AT_ONCE):
        values = features(part)
        right += round(accuracy(values, its.classifier, its.labels[part]) * len(part))
        off += representation_bias(values, its.expert[part]) * len(part)
    return right / len(rows), off / len(rows)


def split_rows(config: FitConfig, data: TaskData) -> tuple[Tensor, Tensor]:
    """Numbers of the test rows that may be fitted, and of those that are evaluated on."""
    rows = len(data.merged)
    order = torch.randperm(rows, generator=generator(data.task, config.seed, "holdout"))
    kept = round(config.holdout * rows)
    if config.holdout and not 0 < kept < rows:
        raise InputError(
            f"--holdout {config.holdout:g} of the {rows} rows of task {data.task} leaves none to "
            f"{'evaluate on' if not kept else 'fit'}"
        )
    seen, held_out = order[kept:].sort().values, order[:kept].sort().values
    return _fraction(config, data.task, seen), held_out if kept else torch.arange(rows)


def seen_count(config: FitConfig, rows: int) -> int:
    """How many of a task's rows in the fitted split the fit may see."""
    return max(1, round(config.fraction * (rows - round(config.holdout * rows))))


def _fraction(config: FitConfig, task: str, rows: Tensor) -> Tensor:
    if config.fraction == 1:
        return rows
    order = torch.randperm(len(rows), generator=generator(task, config.seed, "fraction"))
    return rows[order[: seen_count(replace(config, holdout=0.0), len(rows))].sort().values]
