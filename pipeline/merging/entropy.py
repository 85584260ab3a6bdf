"""Entropy minimisation: learning how to merge from unlabelled images (AdaMerging, eq. 6 and 7).

The merged weights are a function of the learned parameters, `build(name)`, one tensor at a time. A step holds one copy
of the merged model: the gradient of each of its tensors is propagated to the parameters and freed at once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.merging.vectors import ImageStream, on_gradient

_PASS_SIZE = 16 * 3 * 224 * 224
"""Largest number of pixel values in a forward pass over several tasks: one batch of the papers' size."""
Build = Callable[[str], Tensor]
"""Maps a tensor's name to its merged value, differentiable in the learned parameters; repeated calls agree."""


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy over rows, in nats, of the softmax of logits (B, C) (AdaMerging, eq. 5)."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def add_gradients(build: Build, names: Iterable[str], stream: ImageStream, images: Mapping[str, Tensor]) -> float:
    """Add the gradient of the tasks' summed entropy to the parameters of `build`; returns the mean entropy over tasks.

    `images` are (B, 3, size, size) by task. Tasks are encoded one after the other, so that only one task's activations
    are in memory; small images of several tasks are encoded together.
    """
    with torch.no_grad():
        weights = {name: build(name) for name in names}

    def propagate(name: str, gradient: Tensor) -> None:
        with torch.enable_grad():
            build(name).backward(gradient)

    on_gradient(weights, propagate)
    total = 0.0
    for tasks in _passes(images):
        features = stream.forward(weights, torch.cat([images[task] for task in tasks]))
        by_task = features.split([len(images[task]) for task in tasks])
        losses = [entropy(stream.logits_of(z, task)) for z, task in zip(by_task, tasks, strict=True)]
        loss = torch.stack(losses).sum()
        loss.backward()
        total += loss.item()
    return total / len(images)


def _passes(images: Mapping[str, Tensor]) -> list[list[str]]:
    """Tasks grouped by the forward pass that encodes them."""
    passes: list[list[str]] = []
    left = 0
    for task, batch in images.items():
        if not passes or batch.numel() > left:
            passes.append([])
            left = _PASS_SIZE
        passes[-1].append(task)
        left -= batch.numel()
    return passes


def learn(
    parameters: Sequence[Tensor],
    build_at: Callable[[int], Build],
    names: Sequence[str],
    stream: ImageStream,
    *,
    split: str,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    title: str,
) -> tuple[float, ...]:
    """Adam steps on `parameters`, each on one batch of every task. Returns the mean entropy before each step.

    `build_at` maps a step to its `build`. `title` describes the parameters in progress and errors. Raises
    `ProbsurgeryError` if the entropy is not finite.
    """
    batches = {task: stream.batches(task, split, batch_size, seed) for task in stream.classifiers}
    optimiser = torch.optim.Adam(parameters, lr=lr)
    entropies: list[float] = []
    for step in range(steps):
        optimiser.zero_grad()
        images = {task: next(endless)[0] for task, endless in batches.items()}
        entropies.append(add_gradients(build_at(step), names, stream, images))
        if not entropies[-1] < float("inf"):
            raise ProbsurgeryError(f"{title}: the entropy is {entropies[-1]} in step {step}; try a smaller lr")
        optimiser.step()
        stream.progress(step + 1, steps, f"{title}: entropy {entropies[-1]:.3f}")
    return tuple(entropies)


def window(entropies: Sequence[float], size: int = 20) -> tuple[float, float]:
    """Mean entropy over the first and over the last `size` steps; that of a single batch is too noisy."""
    first, last = entropies[:size], entropies[-size:]
    return sum(first) / len(first), sum(last) / len(last)
