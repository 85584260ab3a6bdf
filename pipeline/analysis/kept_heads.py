"""What a report needs the features for: kept heads' uncertainty, and where they move features to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from probsurgery.pipeline.analysis.report import AVERAGE, head_label
from probsurgery.pipeline.analysis.tables import Line, Table
from probsurgery.pipeline.config import ProbSettings
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.heads.head import Head, load_head
from probsurgery.pipeline.heads.uncertainty import COVERAGES, Uncertainty, measure
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import is_result, spread

SHOWN_ROWS = 300
"""Of each task in a projection: more hide each other."""


@dataclass(frozen=True)
class HeadUncertainty:
    """A kept ProbSurgery head's uncertainty on each of its tasks."""

    cache: str
    label: str
    protocol: str
    tasks: dict[str, Uncertainty]


@dataclass(frozen=True)
class Projection:
    """Some rows of every task in one plane."""

    cache: str
    label: str
    method: str
    """PCA or t-SNE."""
    points: dict[str, dict[str, Float[Tensor, "M 2"]]]
    """By task, then `merged`, `corrected` and `expert`."""


def kept_heads(cache: Cache, results: Path | None = None) -> Iterator[tuple[str, Head]]:
    """The heads kept with a cache that were fitted on what it holds now, defaults first, with their labels."""
    folder = (results or cache.path) / "heads"
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    for name in sorted(names, key=lambda name: (name.count("-"), name)):
        if name.startswith("."):
            continue
        try:
            head = load_head(folder / name)
        except InputError:  # damaged ones are for `fit` to complain of
            continue
        rows = head.record.get("results")
        if not isinstance(rows, list) or not rows or not all(map(is_result, rows)) or head.dim != cache.dim:
            continue
        held = {task for task, about in cache.manifest["tasks"].items() if "test" in about["splits"]}
        if all(row["task"] in held and row["cache"] == cache.task_fingerprint(row["task"]) for row in rows):
            seed = f", seed {rows[0]['seed']}" if rows[0]["seed"] else ""
            yield head_label(rows[0]).removeprefix("+ ") + seed, head


def uncertainties(cache: Cache, results: Path | None = None) -> list[HeadUncertainty]:
    """Of every kept ProbSurgery head that was trained with noise, on the task's test images."""
    found = []
    for label, head in kept_heads(cache, results):
        if not isinstance(head.settings, ProbSettings) or not head.settings.samples:
            continue
        tasks = {
            task: measure(
                head.params_of(task),
                cache.features(task),
                cache.features(task, "expert"),
                cache.classifier(task),
                cache.labels(task),
            )
            for task in head.tasks
        }
        found.append(HeadUncertainty(str(cache.path), label, head.record["results"][0]["protocol"], tasks))
    return found


def uncertainty_table(found: HeadUncertainty) -> Table:
    """Correlations, calibration, and accuracy when the least certain images are left out."""
    shown = [share for share in COVERAGES if share in (1.0, 0.9, 0.8, 0.5)]
    columns = {"rank corr.": ".2f", "of doubt": ".2f", "in 1 sigma, %": ".1f", "in 2 sigma, %": ".1f"}
    columns |= {"sigma": ".3f", "residual": ".3f"}
    for share in shown:
        columns |= (
            {f"acc. at {share:.0%}": ".1f"}
            if share == 1
            else {
                f"at {share:.0%} by sigma": ".1f",
                f"at {share:.0%} by doubt": ".1f",
            }
        )
    lines = []
    for task, one in found.tasks.items():
        values = [one.rank_correlation, one.confidence_correlation, *(100 * share for share in one.within.values())]
        values += [spread(pair[i] for pair in one.bins).mean for i in (0, 1)]
        for share in shown:
            at = COVERAGES.index(share)
            values += [100 * one.by_sigma[at]] + ([100 * one.by_confidence[at]] if share < 1 else [])
        lines.append(Line(task, dict(zip(columns, values, strict=True))))
    means = {column: spread(line.values[column] for line in lines).mean for column in columns}
    title = f"Uncertainty of {found.label} ({found.cache}: {found.protocol}, evaluated on all test images)"
    notes = (
        "rank corr.: of a row's predicted sigma and its true residual; of doubt: of 1 - the classifier's largest "
        "probability and the residual. A normal distribution has 68.3 % in 1 sigma and 95.4 % in 2. acc. at 90 %: "
        "when the least certain tenth is left out.",
    )
    return Table(title, columns, (*lines, Line(AVERAGE, means, "baseline")), first="task", notes=notes)


def projection(cache: Cache, results: Path | None = None, method: str = "PCA") -> Projection | None:
    """Merged, corrected and expert features of the first kept head, all tasks in one plane; None without a head.

    The first `SHOWN_ROWS` rows of each task in a fixed random order. PCA, or t-SNE by scikit-learn.
    """
    label, head = next(iter(kept_heads(cache, results)), (None, None))
    if head is None:
        return None
    blocks = {}
    for task in head.tasks:
        merged, expert = cache.features(task), cache.features(task, "expert")
        rows = torch.randperm(len(merged), generator=torch.Generator().manual_seed(0))[:SHOWN_ROWS]
        blocks[task] = {"merged": merged[rows], "corrected": head(merged[rows], task), "expert": expert[rows]}
    flat = [values for its in blocks.values() for values in its.values()]
    plane = _plane(torch.cat(flat), method).split([len(values) for values in flat])
    placed = iter(plane)
    points = {task: {kind: next(placed) for kind in its} for task, its in blocks.items()}
    return Projection(str(cache.path), label, method, points)


def _plane(values: Float[Tensor, "N d"], method: str) -> Float[Tensor, "N 2"]:
    if method == "t-SNE":
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise InputError("t-SNE needs scikit-learn; pip install 'probsurgery[plots]'") from None
        made = TSNE(init="pca", random_state=0, perplexity=min(30, (len(values) - 1) / 3)).fit_transform(values.numpy())
        return torch.from_numpy(made)
    centred = values - values.mean(0)
    axes = torch.linalg.eigh(centred.double().T @ centred.double()).eigenvectors[:, -2:].flip(-1)
    axes = axes * axes.sum(0).sign()  # an eigenvector's sign is the library's choice
    return (centred.double() @ axes).float()
