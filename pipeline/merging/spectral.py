"""Merges by the singular vectors of task vectors: TSV-M, Iso-C, Iso-CTS, WUDI in closed form, and SVC, which follows.

Each matrix is merged for itself, in float64, on the machine's device; what is no matrix is averaged. P / 2 of task
vectors is held besides theta_0 and the result, and on the device those of one matrix. Results vary between machines by
float noise. Papers scale the update by a factor that is chosen on labels; here `scale` is 1 unless it is given.

Singular values within the rounding errors of the weights count as zero, so that experts of low rank (LoRA) are merged
at the rank that they have. Full fine-tuning has none that are so small, except in a few directions of half precision.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from probsurgery.pipeline.merging.vectors import Experts, Machine, Merged, StateDict, by_tensor

_ACCURATE = 1e-5
"""Singular values down to this share of the largest are taken from a Gram matrix in float64: its eigenvalues are their
squares, so that singular vectors have errors of up to 2e-16 / 1e-10. A full SVD takes over below."""
_PARALLEL = 1e-10
"""Eigenvalues of a Gram matrix of unit vectors up to which their directions are the same."""
Combine = Callable[[Tensor, list[float]], Tensor]
"""Maps the task vectors (T, m, n) of a matrix, and the singular values (T,) that rounding causes, to the update."""


def tsv_m(pretrained: StateDict, experts: Experts, machine: Machine, *, scale: float, qkv: str) -> Merged:
    """The leading singular vectors of all tasks, made orthogonal (Gargiulo et al., CVPR 2025, TSV-Merge).

    With tau_t = U_t S_t V_t^T and k = min(m, n) / T rounded down, U, S and V are the first k of all tasks side by side;
    the update is polar(U) S polar(V)^T. As in the authors' code, q, k and v are one matrix, and the positional
    embedding and the visual projection are matrices like any other; convolution, norms and biases are averaged.
    Departures: at least one direction of each task is kept; where directions of tasks coincide, nothing is added in
    place of what they lack, where the polar factor in the authors' code adds arbitrary ones.
    """

    def combine(taus: Tensor, noise: list[float]) -> Tensor:
        most = max(1, min(taus.shape[1:]) // len(taus))
        return _side_by_side([factors(tau, level, most) for tau, level in zip(taus, noise, strict=True)])

    return _merge(pretrained, experts, machine, combine, scale, qkv)


def _side_by_side(found: list[tuple[Tensor, Tensor, Tensor]], *, isotropic: bool = False) -> Tensor:
    """polar(U) S polar(V)^T of singular vectors side by side; `isotropic`: with the mean of S for all."""
    left, sizes, right = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    if isotropic and len(sizes):
        sizes = sizes.mean().expand_as(sizes)
    return (polar(left) * sizes) @ polar(right).T


def iso_c(pretrained: StateDict, experts: Experts, machine: Machine, *, scale: float, qkv: str) -> Merged:
    """The sum of the task vectors with equal singular values: mean(S) U V^T (Marczak et al., ICML 2025, Iso-C).

    Tensors are treated as by `tsv_m`. The mean is over the rank of the sum.
    """

    def combine(taus: Tensor, noise: list[float]) -> Tensor:
        left, sizes, right = factors(_sum(taus), math.hypot(*noise))
        return sizes.sum() / max(1, len(sizes)) * (left @ right.T)

    return _merge(pretrained, experts, machine, combine, scale, qkv)


def iso_cts(
    pretrained: StateDict, experts: Experts, machine: Machine, *, scale: float, common: float, qkv: str
) -> Merged:
    """Iso-C with the last directions of the sum replaced by the tasks' own (Marczak et al., ICML 2025, Iso-CTS).

    Of the r directions of the sum, the `common` share stays, and the rest is divided among the tasks, k for each: the
    first k of tau_t without its part along the common left singular vectors. All are made orthogonal as in `tsv_m`,
    with the mean of all their singular values. Left is the side of the rows as a tensor is stored, which for the visual
    projection is its input. Tensors are treated as by `tsv_m`.
    """

    def combine(taus: Tensor, noise: list[float]) -> Tensor:
        left, sizes, right = factors(_sum(taus), math.hypot(*noise))
        rank = len(sizes)
        each = round((rank - int(common * rank)) / len(taus))
        kept = max(0, rank - each * len(taus))
        left, sizes, right = left[:, :kept], sizes[:kept], right[:, :kept]
        own = []
        for tau, level in zip(taus if each else (), noise, strict=bool(each)):
            rest = tau.double() - left @ (left.T @ tau.double())
            own.append(factors(rest, level, each))
        return _side_by_side([*own, (left, sizes, right)], isotropic=True)

    return _merge(pretrained, experts, machine, combine, scale, qkv)


def wudi(
    pretrained: StateDict, experts: Experts, machine: Machine, *, scale: float, keep: float, time: float, qkv: str
) -> Merged:
    """The update with the least interference in the tasks' own directions, in closed form (SWUDI, arXiv 2606.07289).

    WUDI (Cheng et al., ICML 2025) minimises sum_t |(tau - tau_t) tau_t^T|^2 / |tau_t|^2 from tau_0 = sum tau_t by
    Adam. With C = sum tau_t^T tau_t / |tau_t|^2 = V diag(l) V^T and D = sum tau_t tau_t^T tau_t / |tau_t|^2, the update
    is tau_0 + (D V diag(f / l) - tau_0 V diag(f)) V^T. f_i is 1 for the K largest l, and 0 for others. K is
    (sum sqrt(l))^2 / sum l (ASWUDI), or the share `keep` of all; with a `time`, f_i is 1 - exp(-l_i time) (SWUDI).

    As in WUDI's code, matrices are those of the blocks, with q, k and v as one. Positional embeddings and projections
    are averaged, like what is no matrix. Departure: WUDI leaves all these as they were; SWUDI averages what is no
    matrix, and takes the positional embedding for one.
    """

    def combine(taus: Tensor, noise: list[float]) -> Tensor:
        start = _sum(taus)
        gram = start.new_zeros(start.shape[1], start.shape[1])
        for tau in taus:
            gram += tau.double().T @ (tau.double() / _square(tau))
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
        roots = values.sqrt().sum()
        rank = (
            math.ceil(keep * len(values)) if keep else math.ceil(float(roots * roots / values.sum().clamp(min=1e-30)))
        )
        rank = min(rank, int((values > 1e-14 * values[0]).sum()))
        values, vectors = values[:rank], vectors[:, :rank]
        filters = 1 - torch.exp(-values * time) if time else torch.ones_like(values)
        wanted = torch.zeros_like(start[:, :rank])
        for tau in taus:
            wanted += tau.double() @ (tau.double().T @ (tau.double() @ vectors)) / _square(tau)
        return start + (wanted / values - start @ vectors) * filters @ vectors.T

    return _merge(pretrained, experts, machine, combine, scale, qkv, is_merged=_in_block)


def _sum(taus: Tensor) -> Tensor:
    """The sum of task vectors in float64, which holds one of them in float64 at a time."""
    summed = torch.zeros_like(taus[0], dtype=torch.float64)
    for tau in taus:
        summed += tau
    return summed


def _square(tau: Tensor) -> Tensor:
    """|tau|^2 in float64; 1 for zero."""
    square = tau.double().square().sum()
    return torch.where(square == 0, 1, square)


def svc(
    pretrained: StateDict,
    experts: Experts,
    merged: Mapping[str, Tensor],
    machine: Machine,
    *,
    alpha: float,
    qkv: str,
) -> Merged:
    """The merged model, each singular value of its update divided by how often the tasks count in it.

    Singular value calibration (Li et al., ICML 2026). With the update D = merged - theta_0 = U S V^T, s_t^r =
    <u_r^T D, u_r^T tau_t> / |u_r^T tau_t|^2, and S_r is multiplied by T / sum_t max(alpha, s_t^r). `alpha` 0 stands for
    1 / T, the authors' choice except after TSV-M, where it is 1. As in their code, q, k and v are one matrix, and
    embeddings and what is no matrix stay as they are.
    """
    floor = alpha or 1 / len(experts)

    def calibrated(update: Tensor, taus: Tensor) -> Tensor:
        left, _, _ = factors(update, 0)
        along = left.T @ update
        counted = torch.zeros_like(along[:, 0])
        for tau in taus:
            own = left.T @ tau.double()
            counted += ((along * own).sum(1) / own.square().sum(1).clamp(min=1e-300)).clamp(min=floor)
        return update + left @ ((len(taus) / counted - 1)[:, None] * along)

    state = {}
    for done, (name, taus) in enumerate(by_tensor(pretrained, experts)):
        machine.progress(done, len(pretrained), name, unit="tensors")
        state[name], theta = merged[name], pretrained[name].double()
        if taus.ndim == 3 and "embed" not in name:
            update = (merged[name].double() - theta).to(machine.device)
            count = _part_count(name, qkv)
            parts = zip(update.chunk(count), taus.to(machine.device).chunk(count, 1), strict=True)
            state[name] = (theta + torch.cat([calibrated(*part) for part in parts]).cpu()).float()
    return Merged(state)


def _merge(
    pretrained: StateDict,
    experts: Experts,
    machine: Machine,
    combine: Combine,
    scale: float,
    qkv: str,
    is_merged: Callable[[str], bool] = lambda name: True,
) -> Merged:
    """theta_0 + scale * the merged vector: `combine` of the matrices that `is_merged` takes, the mean of others."""
    state = {}
    for done, (name, taus) in enumerate(by_tensor(pretrained, experts)):
        machine.progress(done, len(pretrained), name, unit="tensors")
        theta = pretrained[name].float()
        update = taus.mean(0)
        if taus.ndim == 3 and is_merged(name):
            count = _part_count(name, qkv)
            parts = []
            for part, own in zip(taus.chunk(count, 1), theta.chunk(count), strict=True):
                noise = [_rounding(own, tau) for tau in part]
                parts.append(combine(part.to(machine.device), noise).cpu())
            update = torch.cat(parts)
        state[name] = (theta.double() + scale * update).float()
    return Merged(state)


def _part_count(name: str, qkv: str) -> int:
    """Into how many matrices one is cut: 3 if q, k and v are "apart" and lie one below the other, as torch's and timm's
    attention have them."""
    return 3 if qkv == "apart" and name.endswith(("in_proj_weight", "qkv.weight")) else 1


def _in_block(name: str) -> bool:
    """Whether a matrix is of a layer in a block, and neither an embedding nor the projection of the features."""
    return "embed" not in name and "_projection" not in name and name.rpartition(".")[2] != "proj"


def _rounding(theta: Tensor, tau: Tensor) -> float:
    """The largest singular value that rounding the expert's weights, (m, n), can cause, with a margin of about two.

    Errors of rounding are nearly independent, and 0.2 epsilons of the weight on average. Checkpoints are recognised as
    half precision by their values.
    """
    weights = theta + tau
    kinds = (torch.bfloat16, torch.float16)
    kind = next((kind for kind in kinds if torch.equal(weights.to(kind).float(), weights)), torch.float32)
    size = float(weights.square().mean().sqrt())
    return torch.finfo(kind).eps / 2 * size * sum(map(math.sqrt, weights.shape))


def factors(matrix: Tensor, noise: float, most: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,) and V (n, r) in float64, of the singular values above `noise`, at most the `most` largest.

    From the Gram matrix of the smaller side, unless a value of S is too small for that.
    """
    matrix = matrix.double()
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares, left = torch.linalg.eigh(wide @ wide.T)
    sizes, left = squares.clamp(min=0).sqrt().flip(0), left.flip(1)
    rank = _rank(sizes, noise, most)
    if rank and sizes[rank - 1] < _ACCURATE * sizes[0]:
        left, sizes, transposed = torch.linalg.svd(wide, full_matrices=False)
        rank = _rank(sizes, noise, most)
        right = transposed[:rank].T
    else:
        right = wide.T @ left[:, :rank] / sizes[:rank]
    left, sizes = left[:, :rank], sizes[:rank]
    return (left, sizes, right) if wide is matrix else (right, sizes, left)


def _rank(sizes: Tensor, noise: float, most: int | None) -> int:
    """How many singular values (r,), in falling order, are kept; those that float32 does not hold are not."""
    found = int((sizes > max(noise, torch.finfo(torch.float32).eps * float(sizes[0]))).sum())
    return found if most is None else min(found, most)


def polar(columns: Tensor) -> Tensor:
    """Columns (m, K) made orthogonal: the nearest partial isometry. Directions that coincide share one."""
    squares, vectors = torch.linalg.eigh(columns.T @ columns)
    inverse = torch.where(squares > _PARALLEL, squares.rsqrt(), 0)
    return columns @ (vectors * inverse) @ vectors.T
