"""Sparsified task vectors: TIES, DARE, Breadcrumbs.

DARE and Breadcrumbs hold theta_0 and the sum, 2 P; TIES holds theta_0 and two sums, 3 P.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.merging.vectors import (
    Experts,
    Merged,
    StateDict,
    Vector,
    add,
    add_vectors,
    task_vector,
    task_vectors,
    zeros,
)

COUNTED = ("tower", "checkpoint")
_TOKENS, _CONTEXT = 49_408, 77  # of CLIP's text tower


def ties(pretrained: StateDict, experts: Experts, *, scale: float, keep: float, counted: str) -> Merged:
    """theta_0 + scale * (trimmed, sign-elected, disjointly summed task vectors) (Yadav et al., NeurIPS 2023).

    Trim: keep the `keep` share of each tau_t that is largest by magnitude, over the whole vector. Elect: per entry, the
    sign of the sum over tasks. Merge: sum the entries of that sign. Departure: where the sum is exactly zero, nothing
    is added; the reference gives such an entry the majority sign of all others. `counted` is explained in `share_of`.
    """
    positive, negative = _sums_by_sign(pretrained, _trimmed(pretrained, experts, share_of(pretrained, keep, counted)))
    update = {}
    for name in pretrained:
        plus, minus = positive.pop(name), negative.pop(name)
        # Positive and negative entries were summed separately, so electing a sign selects one of the two sums.
        elected = (plus + minus).sign_()
        minus.mul_(elected.clamp(max=0).neg_())
        update[name] = plus.mul_(elected.clamp_(min=0)).add_(minus)
    return Merged(add(pretrained, update, scale))


def ties_vectors(pretrained: StateDict, experts: Experts, keep: float, counted: str) -> Iterator[Vector]:
    """Each tau_t, trimmed, with only the entries of the elected sign. Their sum is what `ties` adds."""
    keep = share_of(pretrained, keep, counted)
    positive, negative = _sums_by_sign(pretrained, _trimmed(pretrained, experts, keep))
    signs = {name: (positive.pop(name) + negative.pop(name)).sign().to(torch.int8) for name in pretrained}
    for vector in _trimmed(pretrained, experts, keep):
        yield ((name, torch.where(tau.sign() == signs[name], tau, 0)) for name, tau in vector)


def share_of(pretrained: StateDict, keep: float, counted: str) -> float:
    """The share of the image tower's entries that are kept.

    The experts that the papers merged are whole checkpoints, with text tensors beside the image tower that no image
    moves: token embedding, positional embedding, projection, the last layer norm, and the logit scale. The reference's
    share counts their entries too, which are zero in tau_t, so that 20 % of a checkpoint are 25.8 % of ViT-B/32's tower
    (`counted="checkpoint"`). Raises `InputError` if the tower has no projection, whose width is the text tensors'.
    """
    if counted == "tower":
        return keep
    if "proj" not in pretrained:
        raise InputError("counted=checkpoint is for image towers of open_clip, which have a `proj`; use counted=tower")
    width, tower = pretrained["proj"].shape[1], sum(theta.numel() for theta in pretrained.values())
    text = width * (_TOKENS + _CONTEXT + width + 2) + 1
    return min(1.0, keep * (tower + text) / tower)


def _trimmed(pretrained: StateDict, experts: Experts, keep: float) -> Iterator[Vector]:
    """Each tau_t, trimmed. Ties with the smallest kept magnitude are kept too."""
    for expert in experts.values():
        threshold = magnitude_threshold(partial(task_vector, pretrained, expert), keep)
        yield ((n, torch.where(tau.abs() >= threshold, tau, 0)) for n, tau in task_vector(pretrained, expert))


def _sums_by_sign(pretrained: StateDict, vectors: Iterator[Vector]) -> tuple[StateDict, StateDict]:
    positive, negative = zeros(pretrained), zeros(pretrained)
    for vector in vectors:
        for name, tau in vector:
            positive[name].add_(tau.clamp(min=0))
            negative[name].add_(tau.clamp_(max=0))
    return positive, negative


def magnitude_threshold(vector: Callable[[], Vector], keep: float) -> float:
    """The k-th largest magnitude of a whole vector, where k is the `keep` share of its entries, at least 1.

    Exact, without the vector in memory: non-negative floats sort like their bits, so a histogram of the upper and then
    of the lower half of the bits finds it. `vector()` is called once for each.
    """
    counts = _histogram(vector, lambda bits: bits >> 16)
    rank = max(1, round(keep * int(counts.sum())))
    upper, larger = _value_at(counts, rank)
    lower, _ = _value_at(_histogram(vector, lambda bits: bits[bits >> 16 == upper] & 0xFFFF), rank - larger)
    return torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32).item()


def _histogram(vector: Callable[[], Vector], half: Callable[[Tensor], Tensor]) -> Tensor:
    """How often each value (2^16,) occurs in one half of the magnitudes' bits."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for _, tau in vector():
        counts += torch.bincount(half(tau.abs().flatten().view(torch.int32)), minlength=1 << 16)
    return counts


def _value_at(counts: Tensor, rank: int) -> tuple[int, int]:
    """The value of the rank-th largest entry, and how many entries are larger."""
    at_least = counts.flip(0).cumsum(0).flip(0)
    value = int((at_least >= rank).nonzero().max())
    return value, int(at_least[value] - counts[value])


def dare(pretrained: StateDict, experts: Experts, *, scale: float, drop: float, seed: int) -> Merged:
    """theta_0 + scale * sum tau_t, each entry dropped with probability `drop` and otherwise divided by 1 - drop.

    DARE (Yu et al., ICML 2024) followed by task arithmetic. What is dropped depends on the seed and the task's name,
    and not on the order of the experts.
    """

    def dropped() -> Iterator[Vector]:
        for task, expert in experts.items():
            task_seed = int.from_bytes(hashlib.sha256(f"{seed} {task}".encode()).digest()[:7], "little")
            generator = torch.Generator().manual_seed(task_seed)
            yield (
                (name, torch.where(torch.rand(tau.shape, generator=generator) >= drop, tau / (1 - drop), 0))
                for name, tau in task_vector(pretrained, expert)
            )

    return add_vectors(pretrained, dropped(), scale)


def breadcrumbs(
    pretrained: StateDict, experts: Experts, *, scale: float, small: float, large: float, rows: bool
) -> Merged:
    """theta_0 + scale * sum tau_t without the smallest and largest entries (Davari and Belilovsky, ECCV 2024).

    In each tensor, the `small` share of entries with the smallest magnitudes is dropped, and the `large` share with
    the largest. Equal magnitudes are treated alike. Departure: the authors' code takes the shares of each row (along
    the last dimension), as with `rows`.
    """

    def masked(tau: Tensor) -> Tensor:
        magnitudes = tau.abs().view(-1, tau.shape[-1]) if rows and tau.ndim else tau.abs().view(1, -1)
        size = magnitudes.shape[1]
        first, last = round(small * size), size - round(large * size)
        if first >= last:
            return torch.zeros_like(tau)
        mask = magnitudes <= magnitudes.kthvalue(last, 1, keepdim=True).values
        if first:
            mask &= magnitudes > magnitudes.kthvalue(first, 1, keepdim=True).values
        return tau * mask.view_as(tau)

    vectors = (((name, masked(tau)) for name, tau in vector) for vector in task_vectors(pretrained, experts))
    return add_vectors(pretrained, vectors, scale)
