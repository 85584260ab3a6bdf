"""Merging methods: a pre-trained state dict and the experts' -> one merged state dict.

Notation: theta_0 pre-trained, theta_t expert t of T, tau_t = theta_t - theta_0 its task vector. Experts are taken one
at a time, so that no more than one needs to be in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probsurgery.pipeline.errors import InputError, unknown

StateDict = dict[str, Tensor]


def task_vectors(pretrained: StateDict, experts: Iterable[StateDict]) -> Iterator[StateDict]:
    """tau_t = theta_t - theta_0 for each expert, in float32."""
    for expert in experts:
        if expert.keys() != pretrained.keys():
            name = min(expert.keys() ^ pretrained.keys())
            raise InputError(f"cannot merge: an expert and the pre-trained model differ in the key {name!r}")
        yield {name: expert[name].float() - theta.float() for name, theta in pretrained.items()}


def _add(pretrained: StateDict, update: StateDict, scale: float) -> StateDict:
    return {name: theta.float() + scale * update[name] for name, theta in pretrained.items()}


def _sum(vectors: Iterable[StateDict]) -> tuple[StateDict, int]:
    total: StateDict = {}
    count = 0
    for count, vector in enumerate(vectors, start=1):  # noqa: B007 (count is used after the loop)
        for name, tau in vector.items():
            total[name] = total[name].add_(tau) if name in total else tau
    if not count:
        raise InputError("cannot merge: no expert was given")
    return total, count


def weight_averaging(pretrained: StateDict, experts: Iterable[StateDict]) -> StateDict:
    """theta_0 + (1/T) sum tau_t, over all T experts.

    The reference lists 1+7 coefficients for 8 tasks, and so drops the last.
    """
    total, count = _sum(task_vectors(pretrained, experts))
    return _add(pretrained, total, 1 / count)


def task_arithmetic(pretrained: StateDict, experts: Iterable[StateDict], *, scale: float) -> StateDict:
    """theta_0 + scale * sum tau_t (Ilharco et al., ICLR 2023)."""
    return _add(pretrained, _sum(task_vectors(pretrained, experts))[0], scale)


def ties(pretrained: StateDict, experts: Iterable[StateDict], *, scale: float, keep: float) -> StateDict:
    """theta_0 + scale * (trimmed, sign-elected, disjointly summed task vectors) (Yadav et al., NeurIPS 2023).

    Trim: keep the `keep` share of each tau_t that is largest by magnitude, over the whole flattened vector. Elect: per
    entry, the sign of the sum over tasks. Merge: sum the entries that have that sign. Where the sum is exactly zero
    nothing is added; the reference gives such an entry the majority sign of all others.
    """
    positive, negative = None, None
    for vector in task_vectors(pretrained, experts):
        tau = _trim(torch.cat([vector[name].flatten() for name in pretrained]), keep)
        positive = tau.clamp(min=0) if positive is None else positive.add_(tau.clamp(min=0))
        negative = tau.clamp(max=0) if negative is None else negative.add_(tau.clamp(max=0))
    if positive is None:
        raise InputError("cannot merge: no expert was given")
    # Agreeing entries of one sign have been summed apart from the other sign's, so electing picks one of the two sums.
    elected = (positive + negative).sign()
    flat = torch.where(elected > 0, positive, torch.where(elected < 0, negative, 0))
    parts = flat.split([theta.numel() for theta in pretrained.values()])
    update = {n: part.view_as(theta) for (n, theta), part in zip(pretrained.items(), parts, strict=True)}
    return _add(pretrained, update, scale)


def _trim(tau: Tensor, keep: float) -> Tensor:
    """Zero all but the `keep` share of entries that is largest by magnitude; entries equal to the last one stay too."""
    kept = max(1, round(keep * tau.numel()))
    threshold = tau.abs().kthvalue(tau.numel() - kept + 1).values
    return torch.where(tau.abs() >= threshold, tau, 0)


@dataclass(frozen=True)
class Method:
    """One row of the table of merging methods."""

    paper: str
    function: Callable[..., StateDict]
    settings: dict[str, float] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "wa": Method("weight averaging; Wortsman et al., ICML 2022, arxiv.org/abs/2203.05482", weight_averaging),
    "ta": Method(
        "task arithmetic; Ilharco et al., ICLR 2023, arxiv.org/abs/2212.04089", task_arithmetic, {"scale": 0.3}
    ),
    "ties": Method(
        "TIES-Merging; Yadav et al., NeurIPS 2023, arxiv.org/abs/2306.01708", ties, {"scale": 0.3, "keep": 0.2}
    ),
}


@torch.no_grad()
def merge(method: str, pretrained: StateDict, experts: Iterable[StateDict], **settings: float) -> StateDict:
    """Merge by a method's name in `METHODS`; `settings` replace its defaults. Returns float32 tensors.

    Raises `InputError` for an unknown method or setting, or if the state dicts do not have the same keys.
    """
    if method not in METHODS:
        raise unknown("merge", method, METHODS)
    row = METHODS[method]
    for name in settings:
        if name not in row.settings:
            raise unknown(f"setting of {method}", name, row.settings)
    return row.function(pretrained, experts, **(row.settings | settings))
