"""Fisher merging (Matena and Raffel, NeurIPS 2022): an average of the experts, weighted by their Fisher information.

Holds 8 P: theta_0, the weighted sum, the sum of weights, an expert, and its Fisher information before and after
normalisation. The expert and its information are on the device.
"""

from functools import reduce

import torch
from torch import Tensor

from probsurgery.pipeline.merging.vectors import Experts, ImageStream, Merged, StateDict, add_to, on_gradient, zeros


def fisher(
    pretrained: StateDict,
    experts: Experts,
    stream: ImageStream,
    *,
    split: str,
    images: int,
    labels: bool,
    normalise: bool,
    floor: float,
    seed: int,
) -> Merged:
    """(sum F_t theta_t) / (sum F_t), per parameter (eq. 4), F_t the diagonal Fisher information of expert t.

    F_t is estimated from `images` images of the task. Each image's label is drawn from the expert's own prediction, or
    is the true one with `labels` (the "empirical" Fisher). With `normalise`, each F_t is divided by its norm, so that
    a task with larger gradients does not outweigh the others. `floor` is the minimum of F_t relative to its mean:
    a parameter that affects no expert's predictions is averaged.
    """
    weighted: StateDict = {}
    weights: StateDict = {}
    for index, (task, expert) in enumerate(experts.items()):
        state = stream.on_device(expert)
        generator = torch.Generator().manual_seed(seed)
        information = zeros(state)
        done = index * images
        for batch, true_labels in stream.take(task, split, images, seed):
            add_squares(information, state, stream, task, batch, true_labels if labels else None, generator)
            done += len(batch)
            stream.progress(done, len(experts) * images, f"Fisher information of {task}")
        information = _normalised({n: f.cpu() / images for n, f in information.items()}, normalise, floor)
        for name, f in information.items():
            add_to(weighted, name, f * expert[name].float())
            add_to(weights, name, f)
    return Merged({name: weighted.pop(name) / weights.pop(name) for name in pretrained})


def add_squares(
    information: StateDict,
    state: StateDict,
    stream: ImageStream,
    task: str,
    images: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
) -> None:
    """Add (d log p(y|x) / d theta)^2 of each image (B, 3, size, size). Labels y (B,) are given or drawn from p(y|x)."""
    weights = {name: tensor.detach() for name, tensor in state.items()}
    on_gradient(weights, lambda name, gradient: information[name].addcmul_(gradient, gradient))
    for row in range(len(images)):
        log_p = stream.logits(weights, task, images[row : row + 1])[0].log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
        log_p[int(drawn if labels is None else labels[row])].backward()


def _normalised(information: StateDict, normalise: bool, floor: float) -> StateDict:
    if normalise:
        norm = torch.stack([f.norm() for f in information.values()]).norm().clamp(min=1e-30)
        information = {name: f / norm for name, f in information.items()}
    mean = reduce(torch.add, (f.sum() for f in information.values())) / sum(f.numel() for f in information.values())
    minimum = (floor * mean).clamp(min=1e-30)
    return {name: f.clamp(min=minimum) for name, f in information.items()}
