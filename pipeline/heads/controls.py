"""Corrections of few degrees of freedom in closed form: which part of the bias is a shift, a scale, a rotation?"""

from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.heads.kinds import Params
from probsurgery.pipeline.heads.ridge import row_blocks, row_means


def solve_affine(
    merged: Float[Tensor, "N d"],
    expert: Float[Tensor, "N d"],
    device: torch.device | str = "cpu",
    seen: Int[Tensor, " M"] | None = None,
) -> Params:
    """Scale and shift of each dimension: the parameters, a stack of one. Computed in float64.

    Minimises ``sum |a z + b - z_expert|^2`` for each dimension by itself, so ``a = cov(z, z_expert) / var(z)``. It is
    the same least squares as ridge's, with a diagonal matrix. A dimension that is constant keeps a scale of 1. Rows are
    read in blocks, as for ridge.
    """
    rows = len(merged if seen is None else seen)
    x_mean, y_mean = row_means(row_blocks(merged, expert, device, seen), rows)
    centred = ((x - x_mean, y - y_mean) for x, y in row_blocks(merged, expert, device, seen))
    variance, covariance = reduce(torch.add, (torch.stack([(x * x).sum(0), (x * y).sum(0)]) for x, y in centred))
    scale = torch.where(variance > 0, covariance / variance, 1)
    return _stack_of_one("affine", scale=scale, shift=y_mean - scale * x_mean)


def solve_orthogonal(
    merged: Float[Tensor, "N d"],
    expert: Float[Tensor, "N d"],
    device: torch.device | str = "cpu",
    seen: Int[Tensor, " M"] | None = None,
) -> Params:
    """The orthogonal R that minimises ``sum |R z - z_expert|^2`` (Procrustes): a stack of one. Computed in float64.

    With ``sum z z_expert^T = U S V^T``, ``R = V U^T``; it may be a reflection. Features are not centred: a rotation
    about the origin keeps lengths, so that ``C normalise(R z) = (C R) normalise(z)``: a classifier C absorbs it, and
    nothing is added at inference (Kong et al., arxiv.org/abs/2412.13526). One about a mean would need a bias too, which
    classifiers of normalised features cannot absorb. Where S is zero, as with fewer rows than dimensions, R is not
    determined; there it is the choice nearest to the identity. Rows are read in blocks, as for ridge.
    """
    products = reduce(torch.add, (x.T @ y for x, y in row_blocks(merged, expert, device, seen)))
    if not products.isfinite().all():
        raise _not_finite("orthogonal")
    u, s, vh = torch.linalg.svd(products)
    rank = int((s > s[0] * len(s) * torch.finfo(s.dtype).eps).sum())
    free_u, free_vh = u[:, rank:], vh[rank:]
    a, _, bh = torch.linalg.svd(free_u.T @ free_vh.T)
    rotation = (u[:, :rank] @ vh[:rank] + free_u @ (a @ bh) @ free_vh).T
    return _stack_of_one("orthogonal", rotation=rotation)


def _stack_of_one(kind: str, **params: Tensor) -> Params:
    stacked = {name: values.float().cpu()[None] for name, values in params.items()}
    if not all(values.isfinite().all() for values in stacked.values()):
        raise _not_finite(kind)
    return stacked


def _not_finite(kind: str) -> ProbsurgeryError:
    return ProbsurgeryError(f"the {kind} head has no finite solution: features are too large")
