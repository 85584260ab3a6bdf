"""How well ProbSurgery's variance predicts errors: calibration, and accuracy without the least certain images."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.heads.kinds import Params, prob_distribution

COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the images, the most certain ones, whose accuracy is measured."""
BINS = 10
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Uncertainty:
    """One head's uncertainty on one task's images.

    A row's predicted spread is the root of the mean over dimensions of ``sigma^2 = exp(log_var)``; its residual is the
    root mean square of ``z - mu - z_expert``, the bias that remains after the correction.
    """

    rank_correlation: float | None
    """Spearman's, of predicted spread and residual, over rows; None if either is constant. It does not depend on
    labels."""
    confidence_correlation: float | None
    """The same with 1 - the classifier's largest probability instead of the spread: a baseline. None without one."""
    within: dict[int, float]
    """Share of the residuals, per dimension, within 1 and 2 sigma; for a normal distribution 0.683 and 0.954."""
    bins: tuple[tuple[float, float], ...]
    """Rows in `BINS` groups of increasing predicted spread: (spread, residual), both root mean squares."""
    by_sigma: tuple[float, ...] | None
    """Accuracy in [0, 1] of the most certain rows by predicted spread, for each of `COVERAGES`; None without labels or
    a classifier."""
    by_confidence: tuple[float, ...] | None
    """The same by the classifier's largest probability."""


@torch.no_grad()
def measure(
    params: Params,
    merged: Float[Tensor, "N d"],
    expert: Float[Tensor, "N d"],
    classifier: Classifier | None = None,
    labels: Int[Tensor, " N"] | None = None,
    scale: float = 1.0,
) -> Uncertainty:
    """Compare the variance that a ProbSurgery head (a stack of one) predicts with the residuals that it leaves.

    `scale` is the head's `feature_scale`.
    """
    spread, residual, doubt, correct = (torch.empty(len(merged)) for _ in range(4))
    inside = dict.fromkeys((1, 2), 0)
    for rows in torch.arange(len(merged)).split(_BLOCK_ROWS):
        z = merged[rows].float()
        mu, log_var = (values[0] for values in prob_distribution(params, z.unsqueeze(0), scale))
        error = z - mu - expert[rows]
        sigma = (log_var / 2).exp()
        spread[rows], residual[rows] = (x.square().mean(-1).sqrt() for x in (sigma, error))
        for k in inside:
            inside[k] += int((error.abs() <= k * sigma).sum())
        if classifier is not None:
            probabilities = classifier.logits(z - mu).softmax(-1)
            doubt[rows] = 1 - probabilities.amax(-1)
            if labels is not None:
                correct[rows] = (probabilities.argmax(-1) == labels[rows]).float()
    has_accuracy = classifier is not None and labels is not None
    groups = [rows for rows in spread.argsort(stable=True).tensor_split(BINS) if len(rows)]
    return Uncertainty(
        spearman(spread, residual),
        None if classifier is None else spearman(doubt, residual),
        {k: count / merged.numel() for k, count in inside.items()},
        tuple((_root_mean_square(spread[rows]), _root_mean_square(residual[rows])) for rows in groups),
        *(_accuracy_by(uncertainty, correct) if has_accuracy else None for uncertainty in (spread, doubt)),
    )


def spearman(a: Float[Tensor, " N"], b: Float[Tensor, " N"]) -> float | None:
    """Rank correlation: Pearson's of the ranks. Equal values get their mean rank; None if `a` or `b` is constant."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    is_constant = (ranks == ranks[:, :1]).all(-1).any()
    return None if is_constant else torch.corrcoef(ranks)[0, 1].item()


def _root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _ranks(values: Tensor) -> Tensor:
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]


def _accuracy_by(uncertainty: Tensor, correct: Tensor) -> tuple[float, ...]:
    """Accuracy of the least uncertain rows, for each of `COVERAGES`."""
    ordered = correct[uncertainty.argsort(stable=True)].double().cumsum(0)
    counts = [max(1, round(share * len(correct))) for share in COVERAGES]
    return tuple(ordered[count - 1].item() / count for count in counts)
