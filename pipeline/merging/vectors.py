"""Task vectors, and the types that all merging methods share.

Notation: theta_0 are the pre-trained weights, theta_t those of the expert of task t out of T, and
tau_t = theta_t - theta_0 is a task vector. P is the size of one model in float32. Experts may be read from disk on
access; every function here iterates over them and holds one tensor of one expert, unless its docstring says otherwise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.merging.coefficients import Coefficients
from probsurgery.pipeline.progress import Progress, no_progress

Key = TypeVar("Key")
StateDict = dict[str, Tensor]
Experts = Mapping[str, Mapping[str, Tensor]]
"""State dicts by task."""
Vector = Iterable[tuple[str, Tensor]]
"""A task vector, possibly processed: names and tensors in the pre-trained model's order."""


@dataclass(frozen=True)
class ImageStream:
    """An image stream that merges learn from: the encoder as a function, classifiers and endless batches of images."""

    forward: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    """Maps weights and images (B, 3, size, size) to features (B, d)."""
    classifiers: Mapping[str, Classifier]
    """By task, on the device."""
    batches: Callable[[str, str, int, int], Iterator[tuple[Tensor, Tensor]]]
    """Maps task, split, batch size B and seed to endless batches in random order: images on the device, labels (B,)."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = no_progress

    def take(self, task: str, split: str, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches with `count` images in total, and their labels. Images repeat if the task has fewer."""
        for images, labels in self.batches(task, split, min(count, 64), seed):
            yield images[:count], labels[:count]
            count -= len(images)
            if count <= 0:
                return

    def kept(self, tasks: Iterable[str], split: str, count: int, seed: int) -> dict[str, list[Tensor]]:
        """The images that `take` gives for each task, on the CPU, to be passed through a model several times."""
        return {task: [images.cpu() for images, _ in self.take(task, split, count, seed)] for task in tasks}

    def on_device(self, state: Mapping[str, Tensor]) -> StateDict:
        """Weights in float32 on the device, copied only where needed."""
        return {name: tensor.to(self.device, torch.float32) for name, tensor in state.items()}

    def logits(self, weights: Mapping[str, Tensor], task: str, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, size, size)."""
        return self.logits_of(self.forward(weights, images), task)

    def logits_of(self, features: Tensor, task: str) -> Tensor:
        """Logits (B, C) of features (B, d)."""
        return self.classifiers[task].logits(features)


@dataclass(frozen=True)
class Machine:
    """Where a merge that learns nothing computes, and whom it tells how far it is."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = no_progress


@dataclass(frozen=True)
class Merged:
    """A merged model, with diagnostics of methods that learn: entropy per step, learned coefficients."""

    state: Mapping[str, Tensor]
    """Float32, on the CPU."""
    entropy: tuple[float, ...] = ()
    """Mean entropy of the predictions before each step, in nats."""
    coefficients: Coefficients | None = None
    chosen: Mapping[str, float] = field(default_factory=dict)
    """Numbers that were chosen on images, by name."""


def task_vector(pretrained: StateDict, expert: Mapping[str, Tensor], names: Iterable[str] | None = None) -> Vector:
    """tau_t in float32; `names` are those of its tensors that are wanted.

    Raises `InputError` unless both state dicts have the same keys.
    """
    if expert.keys() != pretrained.keys():
        name = min(expert.keys() ^ pretrained.keys())
        raise InputError(f"cannot merge: an expert and the pre-trained model differ in the key {name!r}")
    return ((n, expert[n].float() - pretrained[n].float()) for n in (pretrained if names is None else names))


def task_vectors(pretrained: StateDict, experts: Experts) -> Iterator[Vector]:
    """The task vector of each expert."""
    return (task_vector(pretrained, expert) for expert in experts.values())


def zeros(pretrained: StateDict) -> StateDict:
    """A zero for each tensor, to sum into. Allocated before any vector, so that memory does not fragment."""
    return {name: torch.zeros(theta.shape, device=theta.device) for name, theta in pretrained.items()}


def total(pretrained: StateDict, vectors: Iterable[Vector]) -> StateDict:
    """The sum of task vectors."""
    summed = zeros(pretrained)
    for vector in vectors:
        for name, tau in vector:
            summed[name].add_(tau)
    return summed


def add(pretrained: StateDict, update: StateDict, scale: float) -> StateDict:
    """theta_0 + scale * update, computed in place in `update`."""
    return {name: update[name].mul_(scale).add_(theta) for name, theta in pretrained.items()}


def add_vectors(pretrained: StateDict, vectors: Iterable[Vector], scale: float = 1.0) -> Merged:
    """theta_0 + scale * (the sum of task vectors)."""
    return Merged(add(pretrained, total(pretrained, vectors), scale))


def add_to(sums: dict[Key, Tensor], name: Key, tensor: Tensor) -> None:
    """Add a tensor to the sum under this name. The first tensor becomes the sum and is changed by later calls."""
    sums[name] = sums[name].add_(tensor) if name in sums else tensor


def on_gradient(weights: StateDict, use: Callable[[str, Tensor], object]) -> None:
    """In a backward pass, call `use` with each weight's name and gradient, and free the gradient at once."""

    def hook(name: str, weight: Tensor) -> None:
        assert weight.grad is not None, "the hook runs after accumulation"
        use(name, weight.grad)
        weight.grad = None

    for name, weight in weights.items():
        weight.requires_grad_().register_post_accumulate_grad_hook(partial(hook, name))


def stack(pretrained: StateDict, vectors: Iterable[Vector], count: int, device: torch.device) -> StateDict:
    """All task vectors, stacked: each tensor (T, ...). Holds T * P."""
    stacked = {n: torch.empty(count, *theta.shape, device=device) for n, theta in pretrained.items()}
    for index, vector in enumerate(vectors):
        for name, tau in vector:
            stacked[name][index] = tau
    return stacked


def by_tensor(pretrained: StateDict, experts: Experts) -> Iterator[tuple[str, Tensor]]:
    """Each tensor's name and task vectors (T, ...), in the model's order.

    Holds T * P / (2 T) of them, or those of the largest tensor, and opens each expert about 2 T times.
    """
    room = sum(theta.numel() for theta in pretrained.values()) / 2 / len(experts)
    waiting = list(pretrained)
    while waiting:
        ends = accumulate(pretrained[name].numel() for name in waiting)
        count = max(1, sum(end <= room for end in ends))
        names, waiting = waiting[:count], waiting[count:]
        vectors = (task_vector(pretrained, expert, names) for expert in experts.values())
        stacked = stack({name: pretrained[name] for name in names}, vectors, len(experts), torch.device("cpu"))
        while stacked:
            name = next(iter(stacked))
            yield name, stacked.pop(name)
