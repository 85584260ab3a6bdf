"""Which rows each head is fitted and evaluated on, and its accuracy and bias on them."""

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
from probsurgery.pipeline.store.arrays import KINDS
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import Accuracy, Bias
from probsurgery.pipeline.training.batches import Rows, generator

EVALUATION_ROWS = 4096
"""Rows evaluated at a time. Larger temporary tensors are slow: their memory is returned to the system each time."""


@dataclass(frozen=True)
class TaskData:
    """One task's test data, in memory or mapped from disk."""

    merged: Tensor
    expert: Tensor
    pretrained: Tensor | None
    labels: Tensor
    classifier: Tensor


@dataclass(frozen=True)
class Evaluation:
    """How good one head is on one task; the fields are those of a row of results."""

    fit_rows: int
    eval_rows: int
    accuracy: Accuracy
    bias: Bias


class LoadedTasks:
    """Tasks read from a cache. Features are held once: in memory or, mapped, as files in `scratch`.

    With `scratch`, no more than one shard of them is in memory at a time, and worker processes can map them too.
    """

    def __init__(self, cache: Cache, tasks: Sequence[str], fit_split: str, scratch: Path | None = None) -> None:
        self.cache, self._fit_split = cache, fit_split
        self._test: dict[str, TaskData] = {}
        self._fitted: dict[str, Rows] = {}
        for task in tasks:
            files = {
                (split, kind): scratch and scratch / f"{task}.{split}.{kind}.npy"
                for split in dict.fromkeys(("test", fit_split))
                for kind in (KINDS if split == "test" else ("merged", "expert"))
                if cache.has(task, kind, split)
            }
            features = {
                (split, kind): cache.features(task, kind, split, scratch=file) for (split, kind), file in files.items()
            }
            test = (features.get(("test", kind)) for kind in KINDS)
            self._test[task] = TaskData(*test, cache.labels(task), cache.classifier(task))
            fitted = [(fit_split, kind) for kind in ("merged", "expert")]
            self._fitted[task] = Rows(
                task,
                *(features[key] for key in fitted),
                files=tuple(files[key] for key in fitted) if scratch else None,
            )
        self._seen: dict[tuple, Rows] = {}
        self._baselines: dict[tuple, tuple[Tensor, dict[str, tuple[float, float]]]] = {}

    def rows(self, config: FitConfig, task: str) -> Rows:
        """What the fit may see: merged and expert features only. Heads that see the same rows share one object."""
        whole = self._fitted[task]
        everything = config.fraction == 1 and not config.holdout
        key = (task,) if everything else (task, config.seed, config.fraction, config.holdout)
        if key not in self._seen:
            if self._fit_split == "train":
                seen = _fraction(config, task, torch.arange(len(whole)))
            else:
                seen, _ = split_rows(config, task, len(whole))
            self._seen[key] = replace(whole, seen=seen) if len(seen) < len(whole) else whole
        return self._seen[key]

    def evaluate(self, config: FitConfig, head: Head, task: str) -> Evaluation:
        """Evaluate a head, and the encoders beside it, on the test rows that its configuration evaluates on."""
        data = self._test[task]
        key = (task, config.seed, config.holdout) if config.holdout else (task,)
        if key not in self._baselines:
            _, rows = split_rows(config, task, len(data.merged))
            encoders = {"pretrained": data.pretrained, "individual": data.expert, "merged": data.merged}
            self._baselines[key] = (
                rows,
                {
                    encoder: _accuracy_and_bias(data, rows, values.__getitem__)
                    for encoder, values in encoders.items()
                    if values is not None
                },
            )
        rows, baselines = self._baselines[key]
        head_accuracy, head_bias = _accuracy_and_bias(data, rows, lambda block: head(data.merged[block], task))
        return Evaluation(
            fit_rows=len(self.rows(config, task)),
            eval_rows=len(rows),
            accuracy=Accuracy(**{encoder: figures[0] for encoder, figures in baselines.items()}, head=head_accuracy),
            bias=Bias(before=baselines["merged"][1], after=head_bias),
        )


def _accuracy_and_bias(data: TaskData, rows: Tensor, features: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Accuracy in [0, 1] and bias on some rows; `features` maps row numbers to features."""
    correct, bias = 0, 0.0
    for block in rows.split(EVALUATION_ROWS):
        values = features(block)
        correct += round(accuracy(values, data.classifier, data.labels[block]) * len(block))
        bias += representation_bias(values, data.expert[block]) * len(block)
    return correct / len(rows), bias / len(rows)


def split_rows(config: FitConfig, task: str, rows: int) -> tuple[Tensor, Tensor]:
    """Numbers of the test rows that may be fitted, and of those that are evaluated on; a task has `rows` of them."""
    order = torch.randperm(rows, generator=generator(task, config.seed, "holdout"))
    held_out = round(config.holdout * rows)
    if config.holdout and not 0 < held_out < rows:
        raise InputError(
            f"--holdout {config.holdout:g} of the {rows} rows of task {task} leaves none to "
            f"{'fit' if held_out else 'evaluate on'}"
        )
    seen, evaluated = order[held_out:].sort().values, order[:held_out].sort().values
    return _fraction(config, task, seen), evaluated if held_out else torch.arange(rows)


def seen_count(config: FitConfig, rows: int) -> int:
    """How many of a task's rows in the fitted split the fit may see."""
    return max(1, round(config.fraction * (rows - round(config.holdout * rows))))


def _fraction(config: FitConfig, task: str, rows: Tensor) -> Tensor:
    if config.fraction == 1:
        return rows
    order = torch.randperm(len(rows), generator=generator(task, config.seed, "fraction"))
    return rows[order[: seen_count(replace(config, holdout=0.0), len(rows))].sort().values]
