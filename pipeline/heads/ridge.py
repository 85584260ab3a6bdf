"""Ridge regression from merged to expert features: a baseline in closed form, with nothing to tune."""

import math
from collections.abc import Iterable, Iterator
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.heads.kinds import Params

PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 5))
"""Ridge penalties to choose from, relative to the mean eigenvalue of the features' covariance."""
BLOCK_ROWS = 4096
"""Rows in memory in float64 at a time."""


def row_blocks(
    merged: Float[Tensor, "N d"],
    expert: Float[Tensor, "N d"],
    device: torch.device | str = "cpu",
    seen: Int[Tensor, " M"] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of both whose numbers are in `seen` (None: all), a block at a time, in float64."""
    for block in (torch.arange(len(merged)) if seen is None else seen).split(BLOCK_ROWS):
        yield merged[block].to(device, torch.float64), expert[block].to(device, torch.float64)


def row_means(blocks: Iterable[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """Means (2, d) of the merged and of the expert features in blocks of `rows` rows in all."""
    return reduce(torch.add, (torch.stack([x.sum(0), y.sum(0)]) for x, y in blocks)) / rows


def solve_ridge(
    merged: Float[Tensor, "N d"],
    expert: Float[Tensor, "N d"],
    penalty: float | None = None,
    device: torch.device | str = "cpu",
    seen: Int[Tensor, " M"] | None = None,
) -> tuple[Params, float]:
    """Ridge regression ``W z + b`` in float64 and closed form: the parameters, a stack of one, and the penalty used.

    Minimises ``sum |W z + b - z_expert|^2 + N * penalty * s * |W|^2``, the bias not penalised, where s is the mean
    eigenvalue of the merged features' covariance. The sum is over the rows whose numbers are in `seen` (None: all).
    Without a given penalty, the one of `PENALTIES` with the least leave-one-out squared error is taken: exact, from the
    hat matrix, and without labels. Rows are read in blocks, so they may be mapped and exceed memory.
    """
    rows = len(merged if seen is None else seen)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        return row_blocks(merged, expert, device, seen)

    x_mean, y_mean = row_means(blocks(), rows)
    gram = reduce(torch.add, ((x - x_mean).T @ (x - x_mean) for x, _ in blocks()))
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues = eigenvalues.clamp(min=0)
    unit = max(eigenvalues.mean().item(), torch.finfo(torch.float64).tiny)
    target = vectors.T @ reduce(torch.add, ((x - x_mean).T @ (y - y_mean) for x, y in blocks()))
    if penalty is None:
        errors = dict.fromkeys(PENALTIES, 0.0)
        for x, y in blocks():
            projected, y = (x - x_mean) @ vectors, y - y_mean
            for candidate in PENALTIES:
                shrink = 1 / (eigenvalues + candidate * unit)
                residual = y - projected @ (shrink[:, None] * target)
                leverage = (projected.square() * shrink).sum(1) + 1 / rows
                errors[candidate] += (residual / (1 - leverage)[:, None]).square().sum().item()
        penalty = min(PENALTIES, key=lambda candidate: math.inf if math.isnan(errors[candidate]) else errors[candidate])
    weight = (vectors @ (target / (eigenvalues + penalty * unit)[:, None])).T
    bias = y_mean - weight @ x_mean
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ProbsurgeryError("ridge regression has no finite solution; raise --penalty")
    return {"weight": weight.float().cpu()[None], "bias": bias.float().cpu()[None]}, penalty
