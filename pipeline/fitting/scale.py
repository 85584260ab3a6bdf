"""A scale of features at which ProbSurgery's noise does not drown them.

The noise of a step has a standard deviation of 1 in each dimension when training begins, whatever unit the features
have, and log-variances change the more slowly the smaller the features are. Features are therefore brought to a root
mean square of about `TARGET`, by a power of two, which is exact. No label is read.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from probsurgery.pipeline.config import FitConfig, SweepConfig, changed_settings
from probsurgery.pipeline.fitting.requests import chosen_tasks
from probsurgery.pipeline.fitting.splits import split_rows
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import ResultRow

TARGET = 2.0
"""Root mean square of a dimension. The bias that heads leave falls up to about 2 and is level from there to 4, for d=64
and d=512 alike: benchmarks/RESULTS.md. The measure is a dimension's, as the noise's is, not the feature's length."""
_SMALL = 0.25
"""Root mean square below which features are far below the noise."""


def with_scale(config: FitConfig) -> FitConfig:
    """The configuration with a number for a feature scale that is to be chosen."""
    if not config.head.is_trained or config.head.feature_scale:
        return config
    cache = Cache(config.cache)
    size = expert_size(cache, config, chosen_tasks(cache, config))
    return replace(config, head=changed_settings(config.head, feature_scale=scale_for(size)))


def with_scales(config: SweepConfig) -> SweepConfig:
    """The same of a sweep: one number for all its settings and seeds, from the rows that the first of them fits."""
    scales = config.values.get("feature_scale", ())
    first = next((one for one in config.expand() if not one.head.feature_scale), None) if 0 in scales else None
    if first is None:
        return config
    chosen = with_scale(first).head.feature_scale
    values = tuple(dict.fromkeys(scale or chosen for scale in scales))
    return replace(config, values=config.values | {"feature_scale": values})


def scale_for(size: float) -> float:
    """The power of two that brings a root mean square nearest to `TARGET`; 1 if all features are zero."""
    return 2.0 ** min(19, max(-19, round(math.log2(TARGET / size)))) if size else 1.0


def expert_size(cache: Cache, config: FitConfig, tasks: Sequence[str]) -> float:
    """Root mean square of a dimension of the experts' features, over the rows that a configuration fits."""
    total, count = 0.0, 0
    for task in tasks:
        values = cache.features(task, "expert", config.fit_split)
        seen, _ = split_rows(config, task, len(values))
        for rows in seen.split(4096):
            total += values[rows].square().sum(dtype=torch.float64).item()
        count += len(seen) * cache.dim
    return math.sqrt(total / count)


def scale_note(cache: Cache, config: FitConfig, rows: Sequence[ResultRow]) -> str | None:
    """A line if noise was far above the features in training, from the first shard of each task."""
    if not config.head.predicts_sigma or not rows:
        return None
    shards = [torch.from_numpy(cache.decoded_rows(f"{config.fit_split}/{row.task}/expert", 0)).float() for row in rows]
    size = math.sqrt(sum(s.square().sum().item() for s in shards) / max(1, sum(s.numel() for s in shards)))
    if not 0 < size * config.head.feature_scale < _SMALL:
        return None
    unit = f"about {size:.2g} a dimension, far below the noise, which starts at {1 / config.head.feature_scale:g}"
    return f"features are {unit}; --feature-scale auto would multiply them by {scale_for(size):g}"
