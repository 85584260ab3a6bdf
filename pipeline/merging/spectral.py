"""Merges by the singular vectors of task vectors, one matrix at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from probsurgery.pipeline.merging.vectors import Experts, Merged, StateDict


def svc(pretrained: StateDict, experts: Experts, merged: Mapping[str, Tensor], *, alpha: float) -> Merged:
    """The merged model, each singular value of its update divided by how much the tasks overlap there.

    Singular value calibration (Li et al., ICML 2026). For a matrix, D = merged - theta_0 = U S V^T, and u_r^T tau_t is
    the part of task t along the r-th left singular vector. s_t = <u_r^T D, u_r^T tau_t> / |u_r^T tau_t|^2 says how
    often D counts it; S_r is multiplied by T / sum_t max(alpha, s_t). `alpha` 0 stands for 1 / T.
    """
    floor = alpha or 1 / len(experts)
    state = {}
    for name, theta in pretrained.items():
        if theta.ndim != 2 or "embed" in name:
            state[name] = merged[name]
            continue
        update = merged[name].double() - theta.double()
        left = torch.linalg.svd(update, full_matrices=False).U
        along, counted = left.T @ update, torch.zeros(left.shape[1], dtype=torch.float64)
        for expert in experts.values():
            own = left.T @ (expert[name].double() - theta.double())
            counted += ((along * own).sum(1) / own.square().sum(1).clamp(min=1e-300)).clamp(min=floor)
        factors = len(experts) / counted
        state[name] = (theta.double() + left @ (factors[:, None] * along)).float()
    return Merged(state)
