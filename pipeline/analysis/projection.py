"""Features of all tasks in one plane: merged, corrected by a kept head, and the experts'."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from probsurgery.pipeline.analysis.kept_heads import kept_heads
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.store.cache import Cache

SHOWN_ROWS = 300
"""Most rows of each task; more would hide each other."""


@dataclass(frozen=True)
class Projection:
    """Some rows of every task in one plane."""

    cache: str
    label: str
    method: str
    """PCA or t-SNE."""
    points: dict[str, dict[str, Float[Tensor, "M 2"]]]
    """By task, then `merged`, `corrected` and `expert`."""


def projection(cache: Cache, results: Path | None = None, method: str = "PCA") -> Projection | None:
    """Features of all tasks in one plane, corrected by the first kept head that does; None without one.

    The first `SHOWN_ROWS` rows of each task in a fixed random order. PCA, or t-SNE by scikit-learn.
    """
    first = next((kept for kept in kept_heads(cache, results) if kept.head.settings.corrects_features), None)
    if first is None:
        return None
    features = []
    for task in first.head.tasks:
        merged, expert = cache.features(task), cache.features(task, "expert")
        rows = torch.randperm(len(merged), generator=torch.Generator().manual_seed(0))[:SHOWN_ROWS]
        features.append(torch.cat([merged[rows], first.head(merged[rows], task), expert[rows]]))
    plane = _project(torch.cat(features), method).split([*map(len, features)])
    points = [dict(zip(("merged", "corrected", "expert"), values.chunk(3), strict=True)) for values in plane]
    return Projection(str(cache.path), first.label, method, dict(zip(first.head.tasks, points, strict=True)))


def _project(values: Float[Tensor, "N d"], method: str) -> Float[Tensor, "N 2"]:
    if method == "t-SNE":
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise InputError("t-SNE needs scikit-learn; pip install 'probsurgery[plots]'") from None
        tsne = TSNE(init="pca", random_state=0, perplexity=min(30, (len(values) - 1) / 3))
        return torch.from_numpy(tsne.fit_transform(values.numpy()))
    centred = (values - values.mean(0)).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(-1)
    axes = axes * axes.sum(0).sign()  # an eigenvector's sign depends on the library
    return (centred @ axes).float()
