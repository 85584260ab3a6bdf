"""What ProbSurgery's variance is worth: predicted spread against true residuals, and whom to leave out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from probsurgery.pipeline.heads.head import Params, prob_distribution

COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
BINS = 10
_AT_ONCE = 4096


@dataclass(frozen=True)
class Uncertainty:
    """One head's uncertainty on one task's images.

    A row's predicted spread is the root of the mean over dimensions of ``sigma^2 = exp(log_var)``; its residual is the
    root mean square of ``z - mu - z_expert``, what is left of the bias.
    """

    rank_correlation: float
    """Spearman's, of predicted spread and residual, over rows; labels have no part in it."""
    confidence_correlation: float
    """The same of the classifier's own doubt, 1 - its largest probability, and the residual: the baseline."""
    within: dict[int, float]
    """Share of the single residuals within 1 and 2 sigma; of a normal distribution 0.683 and 0.954."""
    bins: tuple[tuple[float, float], ...]
    """Rows in `BINS` groups of rising predicted spread: (spread, residual), both root mean squares."""
    by_sigma: tuple[float, ...]
    """Accuracy in [0, 1] of the most certain rows by predicted spread, for each of `COVERAGES`."""
    by_confidence: tuple[float, ...]
    """The same by the classifier's largest probability."""


@torch.no_grad()
def measure(
    params: Params,
    merged: Float[Tensor, "N d"],
    expert: Float[Tensor, "N d"],
    classifier: Float[Tensor, "C d"],
    labels: Int[Tensor, " N"],
) -> Uncertainty:
    """Compare what a ProbSurgery head (a stack of one) says of its correction with what it leaves."""
    spread, residual, doubt, right = (torch.empty(len(merged)) for _ in range(4))
    inside = dict.fromkeys((1, 2), 0)
    for part in torch.arange(len(merged)).split(_AT_ONCE):
        z = merged[part].float()
        mu, log_var = (values[0] for values in prob_distribution(params, z.unsqueeze(0)))
        left = z - mu - expert[part]
        sigma = (log_var / 2).exp()
        spread[part], residual[part] = (x.square().mean(-1).sqrt() for x in (sigma, left))
        for k in inside:
            inside[k] += (left.abs() <= k * sigma).sum().item()
        chances = (F.normalize(z - mu, dim=-1) @ classifier.float().T).softmax(-1)
        doubt[part] = 1 - chances.amax(-1)
        right[part] = (chances.argmax(-1) == labels[part]).float()
    groups = [rows for rows in spread.argsort(stable=True).tensor_split(BINS) if len(rows)]
    return Uncertainty(
        spearman(spread, residual),
        spearman(doubt, residual),
        {k: count / merged.numel() for k, count in inside.items()},
        tuple(tuple(x[rows].square().mean().sqrt().item() for x in (spread, residual)) for rows in groups),
        *(_accuracy_at(COVERAGES, uncertain, right) for uncertain in (spread, doubt)),
    )


def spearman(a: Float[Tensor, " N"], b: Float[Tensor, " N"]) -> float:
    """Rank correlation: Pearson's of the ranks, equal values sharing the mean of theirs. NaN where one is constant."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return torch.corrcoef(ranks)[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]


def _accuracy_at(coverages: Sequence[float], uncertain: Tensor, right: Tensor) -> tuple[float, ...]:
    """Accuracy of the least uncertain rows, for each share of them."""
    ordered = right[uncertain.argsort(stable=True)].double().cumsum(0)
    kept = [max(1, round(share * len(right))) for share in coverages]
    return tuple(ordered[count - 1].item() / count for count in kept)
