"""Task vectors, tensor by tensor, and what all merges share.

Notation: theta_0 pre-trained, theta_t the expert of task t of T, tau_t = theta_t - theta_0 its task vector. P is the
size of one model in float32. Experts may be read from disk as they are asked for; every function here goes through
them one at a time and holds one tensor of one expert, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from probsurgery.pipeline.errors import InputError

StateDict = dict[str, Tensor]
Experts = Mapping[str, Mapping[str, Tensor]]
"""State dicts by task."""
Vector = Iterable[tuple[str, Tensor]]
"""A task vector, or what was made of one: names and tensors in the pre-trained model's order."""


@dataclass(frozen=True)
class Samples:
    """What merges that learn are given, beside the weights: the encoder as a function, and images of each task."""

    forward: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    """Weights and images (B, 3, size, size) -> features (B, d)."""
    classifiers: Mapping[str, Tensor]
    """By task, (C, d), on the device."""
    batches: Callable[[str, str, int, int], Iterator[tuple[Tensor, Tensor]]]
    """Task, split, batch size B and seed -> batches without end, in random order: images on the device, labels (B,)."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Callable[[int, int, str], None] = lambda done, total, what: None
    """Told how much is done, of how much, and what there is to say of it."""

    def take(self, task: str, split: str, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `count` images in all, and their labels; some come again if the task has fewer."""
        size = min(count, 64)
        for images, labels in self.batches(task, split, size, seed):
            yield images[:count], labels[:count]
            count -= len(images)
            if count <= 0:
                return

    def logits(self, weights: Mapping[str, Tensor], task: str, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, size, size)."""
        return self.logits_of(self.forward(weights, images), task)

    def logits_of(self, features: Tensor, task: str) -> Tensor:
        """Logits (B, C) of features (B, d)."""
        return F.normalize(features, dim=-1) @ self.classifiers[task].T


@dataclass(frozen=True)
class Merged:
    """A merged model, and what is worth keeping of how it was made."""

    state: StateDict
    """Float32, on the CPU."""
    about: dict = field(default_factory=dict)
    """What a learned merge has to say for itself: its course, its coefficients."""


def task_vector(pretrained: StateDict, expert: Mapping[str, Tensor]) -> Vector:
    """tau_t, in float32. Raises `InputError` if the two have not the same names."""
    if expert.keys() != pretrained.keys():
        name = min(expert.keys() ^ pretrained.keys())
        raise InputError(f"cannot merge: an expert and the pre-trained model differ in the key {name!r}")
    return ((name, expert[name].float() - theta.float()) for name, theta in pretrained.items())


def task_vectors(pretrained: StateDict, experts: Experts) -> Iterator[Vector]:
    """tau_t of each expert."""
    return (task_vector(pretrained, expert) for expert in experts.values())


def zeros(pretrained: StateDict) -> StateDict:
    """Where vectors are to be summed; made before any of them, so that what is freed leaves no holes between."""
    return {name: torch.zeros(theta.shape, device=theta.device) for name, theta in pretrained.items()}


def total(pretrained: StateDict, vectors: Iterable[Vector]) -> StateDict:
    """The sum of task vectors."""
    summed = zeros(pretrained)
    for vector in vectors:
        for name, tau in vector:
            summed[name].add_(tau)
    return summed


def add(pretrained: StateDict, update: StateDict, scale: float = 1.0) -> StateDict:
    """theta_0 + scale * update, in the update's own memory."""
    return {name: update[name].mul_(scale).add_(theta) for name, theta in pretrained.items()}


def add_to(sums: StateDict, name: str, tensor: Tensor) -> None:
    """Add a tensor, which may be kept, to the sum of its name."""
    sums[name] = sums[name].add_(tensor) if name in sums else tensor


def on_device(state: Mapping[str, Tensor], samples: Samples) -> StateDict:
    """Weights where they are computed with; copies only if that is elsewhere."""
    return {name: tensor.to(samples.device, torch.float32) for name, tensor in state.items()}


def stack(pretrained: StateDict, vectors: Iterable[Vector], count: int, device: torch.device) -> StateDict:
    """All task vectors side by side: each tensor (T, ...). Holds T * P."""
    stacked = {n: torch.empty(count, *theta.shape, device=device) for n, theta in pretrained.items()}
    for index, vector in enumerate(vectors):
        for name, tau in vector:
            stacked[name][index] = tau
    return stacked
