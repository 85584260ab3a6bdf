"""Ridge regression from merged to expert features: a baseline in closed form, with nothing to tune."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.heads import Params

PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 5))
"""Ridge penalties to choose from, relative to the mean eigenvalue of the features' covariance."""


def solve_ridge(
    merged: Float[Tensor, "N d"],
    expert: Float[Tensor, "N d"],
    penalty: float | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Params, float]:
    """Ridge regression ``W z + b`` in float64 and closed form: the parameters, a stack of one, and the penalty used.

    Minimises ``sum |W z + b - z_expert|^2 + N * penalty * s * |W|^2``, the bias not penalised, where s is the mean
    eigenvalue of the merged features' covariance. Without a given penalty, the one of `PENALTIES` with the least
    leave-one-out squared error is taken: exact, from the hat matrix, and without labels.
    """
    x, y = (values.to(device, torch.float64) for values in (merged, expert))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x)
    eigenvalues = eigenvalues.clamp(min=0)
    unit = max(eigenvalues.mean().item(), torch.finfo(torch.float64).tiny)
    projected = x @ vectors
    target = projected.T @ y

    def leave_one_out(penalty: float) -> float:
        shrink = 1 / (eigenvalues + penalty * unit)
        residual = y - projected @ (shrink[:, None] * target)
        leverage = (projected.square() * shrink).sum(1) + 1 / len(x)
        error = (residual / (1 - leverage)[:, None]).square().mean().item()
        return error if math.isfinite(error) else math.inf

    penalty = penalty if penalty is not None else min(PENALTIES, key=leave_one_out)
    weight = (vectors @ (target / (eigenvalues + penalty * unit)[:, None])).T
    bias = y_mean - weight @ x_mean
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ProbsurgeryError("ridge regression has no finite solution; raise --penalty")
    return {"weight": weight.float().cpu()[None], "bias": bias.float().cpu()[None]}, penalty
