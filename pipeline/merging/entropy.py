"""Learning how to merge from unlabelled images: less entropy of the merged model's predictions.

The merged weights are a function of what is learned, `build(name)`, one tensor at a time. A step holds one copy of the
merged model: the gradient of each of its tensors is taken back to what is learned as soon as it is known, and freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.merging.vectors import Samples

_PASS = 16 * 3 * 224 * 224
"""Numbers in the images of a pass over several tasks: a batch of the papers'."""
Build = Callable[[str], Tensor]
"""Name of a tensor -> its merged value, differentiable in what is learned; the same however often it is called."""


def entropy(logits: Tensor) -> Tensor:
    """Mean over rows of the entropy, in nats, of the softmax of logits (B, C) (AdaMerging, eq. 5)."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def add_gradients(build: Build, names: Iterable[str], samples: Samples, images: Mapping[str, Tensor]) -> float:
    """Add the gradient of the tasks' summed entropy to what `build` depends on; gives the mean entropy.

    `images`, by task, are (B, 3, size, size). The tasks go through the encoder one after the other, so that no more
    than one task's activations are held, or together where the images are small.
    """
    with torch.no_grad():
        weights = {name: build(name) for name in names}

    def take_back(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            with torch.enable_grad():
                build(name).backward(weight.grad)
            weight.grad = None

        return hook

    for name, weight in weights.items():
        weight.requires_grad_().register_post_accumulate_grad_hook(take_back(name))
    total = 0.0
    for group in _passes(images):
        features = samples.forward(weights, torch.cat([images[task] for task in group]))
        parts = features.split([len(images[task]) for task in group])
        losses = [entropy(samples.logits_of(part, task)) for part, task in zip(parts, group, strict=True)]
        loss = torch.stack(losses).sum()
        loss.backward()
        total += loss.item()
    return total / len(images)


def _passes(images: Mapping[str, Tensor]) -> list[list[str]]:
    """Tasks whose images are encoded together."""
    groups: list[list[str]] = []
    room = 0
    for task, batch in images.items():
        if not groups or batch.numel() > room:
            groups.append([])
            room = _PASS
        groups[-1].append(task)
        room -= batch.numel()
    return groups


def learn(
    what: Sequence[Tensor],
    build_at: Callable[[int], Build],
    names: Sequence[str],
    samples: Samples,
    *,
    split: str,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    title: str,
) -> list[float]:
    """Adam steps on `what`, each on one batch of every task; gives the mean entropy before each step.

    `build_at` gives a step's `build`. Raises `ProbsurgeryError` if the entropy is not finite.
    """
    streams = {task: samples.batches(task, split, batch_size, seed) for task in samples.classifiers}
    optimiser = torch.optim.Adam(what, lr=lr)
    course: list[float] = []
    for step in range(steps):
        optimiser.zero_grad()
        images = {task: next(stream)[0] for task, stream in streams.items()}
        course.append(add_gradients(build_at(step), names, samples, images))
        if not course[-1] < float("inf"):
            raise ProbsurgeryError(f"{title}: the entropy is {course[-1]} in step {step}; try a smaller lr")
        optimiser.step()
        samples.progress(step + 1, steps, f"{title}: entropy {course[-1]:.3f}")
    return course


def window(course: list[float], size: int = 20) -> tuple[float, float]:
    """Means of the first and the last steps' entropy, which single batches' are too noisy for."""
    first, last = course[:size], course[-size:]
    return sum(first) / len(first), sum(last) / len(last)
