"""Which rows each head is fitted and evaluated on, and its accuracy and bias on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import FitConfig
from probsurgery.pipeline.device import one_thread_if_small
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.heads.head import Head
from probsurgery.pipeline.heads.metrics import accuracy, representation_bias
from probsurgery.pipeline.store.arrays import KINDS
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import Accuracy, Bias
from probsurgery.pipeline.training.batches import Rows, generator

FITTED_KINDS = ("merged", "expert")
ENCODERS = {"pretrained": "pretrained", "individual": "expert", "merged": "merged"}
"""Encoders whose accuracy is reported, and the kind of their features."""
EVALUATION_ROWS = 4096
"""Rows evaluated at a time. Larger temporary tensors are slow: their memory is returned to the system each time."""


@dataclass(frozen=True)
class _TestData:
    """What heads of a task are evaluated on."""

    features: dict[str, Tensor]
    """By kind, each (N, d)."""
    truth: tuple[Classifier, Tensor] | None
    """Classifier and labels (N,), if the task has both."""


class LoadedTasks:
    """Tasks read from a cache. Features are held once: in memory or, mapped, as files in `scratch`.

    With `scratch`, no more than one shard of them is in memory at a time, and worker processes can map them too.
    """

    def __init__(self, cache: Cache, tasks: Sequence[str], fit_split: str, scratch: Path | None = None) -> None:
        self.cache = cache
        self._test: dict[str, _TestData] = {}
        self._fitted: dict[str, Rows] = {}
        for task in tasks:
            features, files = _features(cache, task, "test", KINDS, scratch)
            self._test[task] = _TestData(features, cache.truth(task))
            if fit_split != "test":
                features, files = _features(cache, task, fit_split, FITTED_KINDS, scratch)
            pair = (files["merged"], files["expert"]) if files else None
            classifier = cache.linear_classifier(task)
            self._fitted[task] = Rows(task, features["merged"], features["expert"], files=pair, classifier=classifier)
        self._seen: dict[tuple[str, int, float, float], Rows] = {}
        self._baselines: dict[tuple[object, ...], tuple[Tensor, dict[str, tuple[float | None, float]]]] = {}

    def rows(self, config: FitConfig, task: str) -> Rows:
        """What the fit may see: merged and expert features only. Heads that see the same rows share one object."""
        key, whole = (task, config.seed, config.fraction, config.holdout), self._fitted[task]
        if key not in self._seen:
            seen, _ = split_rows(config, task, len(whole))
            self._seen[key] = replace(whole, seen=seen) if len(seen) < len(whole) else whole
        return self._seen[key]

    def evaluate(self, config: FitConfig, head: Head, task: str) -> tuple[int, Accuracy, Bias]:
        """Evaluate a head, and the encoders beside it, on the test rows that its configuration evaluates on.

        Returns the number of these rows, and the figures on them; no accuracy without labels or a classifier.
        """
        with one_thread_if_small(self._test[task].features["merged"]):
            return self._evaluate(config, head, task)

    def _evaluate(self, config: FitConfig, head: Head, task: str) -> tuple[int, Accuracy, Bias]:
        data = self._test[task]
        key = (task, config.seed, config.holdout) if config.holdout else (task,)
        if key not in self._baselines:
            _, rows = split_rows(config, task, len(data.features["merged"]))
            features = {encoder: data.features[kind] for encoder, kind in ENCODERS.items() if kind in data.features}
            figures = {
                name: _accuracy_and_bias(data, rows, values.__getitem__, None) for name, values in features.items()
            }
            self._baselines[key] = rows, figures
        rows, baselines = self._baselines[key]
        merged = data.features["merged"]
        own = head.classifiers.get(task)
        head_accuracy, head_bias = _accuracy_and_bias(data, rows, lambda block: head(merged[block], task), own)
        shares = {encoder: share for encoder, (share, _) in baselines.items()}
        after = head_bias if head.settings.corrects_features else None
        return len(rows), Accuracy(**shares, head=head_accuracy), Bias(baselines["merged"][1], after)


def _features(
    cache: Cache, task: str, split: str, kinds: Sequence[str], scratch: Path | None
) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """A task's features of those kinds that the cache holds, and the files in `scratch` that they are mapped from."""
    kinds = [kind for kind in kinds if cache.has(task, kind, split)]
    files = {kind: scratch / f"{task}.{split}.{kind}.npy" for kind in kinds} if scratch else {}
    return {kind: cache.features(task, kind, split, scratch=files.get(kind)) for kind in kinds}, files


def _accuracy_and_bias(
    data: _TestData, rows: Tensor, features: Callable[[Tensor], Tensor], classifier: Classifier | None
) -> tuple[float | None, float]:
    """Accuracy in [0, 1], if it can be told, and bias on some rows; `features` maps row numbers to features.

    `classifier` replaces the task's; None: it does not.
    """
    correct, bias = 0, 0.0
    for block in rows.split(EVALUATION_ROWS):
        values = features(block)
        if data.truth is not None:
            own, labels = data.truth
            correct += round(accuracy(values, classifier or own, labels[block]) * len(block))
        bias += representation_bias(values, data.features["expert"][block]) * len(block)
    return correct / len(rows) if data.truth else None, bias / len(rows)


def split_rows(config: FitConfig, task: str, rows: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows that may be fitted, and of those that are evaluated on; the split has `rows` of them."""
    order = torch.randperm(rows, generator=generator(task, config.seed, "holdout"))
    held_out = round(config.holdout * rows)
    if config.holdout and not 0 < held_out < rows:
        raise InputError(
            f"--holdout {config.holdout:g} of the {rows} rows of task {task} leaves none to "
            f"{'fit' if held_out else 'evaluate on'}"
        )
    seen, evaluated = order[held_out:].sort().values, order[:held_out].sort().values
    if config.fraction < 1:
        chosen = torch.randperm(len(seen), generator=generator(task, config.seed, "fraction"))
        seen = seen[chosen[: seen_count(config, rows)].sort().values]
    return seen, evaluated if held_out else torch.arange(rows)


def seen_count(config: FitConfig, rows: int) -> int:
    """How many of a task's rows in the fitted split the fit may see."""
    return max(1, round(config.fraction * (rows - round(config.holdout * rows))))
