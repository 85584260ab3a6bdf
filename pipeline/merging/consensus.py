"""Consensus merging: task arithmetic on the entries that several tasks use. Holds 2.5 P."""

import torch

from probsurgery.pipeline.merging.vectors import Experts, Merged, StateDict, by_tensor


def consensus_ta(pretrained: StateDict, experts: Experts, *, scale: float, threshold: float, least: int) -> Merged:
    """theta_0 + scale * sum tau_t on entries that `least` tasks use (Wang et al., ICML 2024, Consensus TA).

    A task uses the entries where |tau_t| > threshold * |sum tau - tau_t|, its TALL mask. All tensors are treated alike.
    Departure: the authors choose the threshold of each task, of 0.2 to 0.6, and the scale on labels; here they are
    fixed. Where there are fewer than `least` tasks, all of them must use an entry.
    """
    state = {}
    for name, taus in by_tensor(pretrained, experts):
        summed = taus.sum(0)
        used = sum((tau.abs() > threshold * (summed - tau).abs()).int() for tau in taus)
        shared = torch.where(used >= min(least, len(taus)), summed, 0)
        state[name] = pretrained[name] + scale * shared
    return Merged(state)
