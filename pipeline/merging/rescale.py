"""A factor for a merge's update, chosen without labels. Holds theta_0, the merged model and two more, 4 P."""

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.merging.vectors import Experts, ImageStream, Merged, StateDict

FACTORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)


def rescale(
    pretrained: StateDict,
    experts: Experts,
    merged: Mapping[str, Tensor],
    stream: ImageStream,
    *,
    by: str,
    images: int,
    split: str,
    seed: int,
) -> Merged:
    """theta_0 + factor * (merged - theta_0), with the best factor of `FACTORS` on unlabelled images of every task.

    Best is the least mean absolute difference of the features to the experts' (`by` "distance", the bias of the
    reports), or the least mean entropy of the predictions ("entropy"), on average over the tasks. Ours, in place of the
    coefficient that papers choose on labels. Raises `InputError` if predictions lack a classifier.
    """
    if by == "entropy" and (lacking := next((task for task in experts if task not in stream.classifiers), None)):
        raise InputError(f"rescale by entropy needs predictions, and {lacking} has no classifier; use by=distance")
    theta = stream.on_device(pretrained)
    update = {name: tensor - theta[name] for name, tensor in stream.on_device(merged).items()}
    samples, targets = {}, {}
    for task, expert in experts.items():
        samples[task] = [batch for batch, _ in stream.take(task, split, images, seed)]
        if by == "distance":
            weights = stream.on_device(expert)
            targets[task] = [stream.forward(weights, batch) for batch in samples[task]]
    losses = dict.fromkeys(FACTORS, 0.0)
    for done, (factor, task) in enumerate(product(FACTORS, experts)):
        stream.progress(done, len(FACTORS) * len(experts), f"factor {factor}")
        weights = {name: theta[name] + factor * tensor for name, tensor in update.items()}
        found = torch.cat([stream.forward(weights, batch) for batch in samples[task]])
        if by == "distance":
            losses[factor] += float((found - torch.cat(targets[task])).abs().mean())
        else:
            log_p = stream.logits_of(found, task).log_softmax(-1)
            losses[factor] -= float((log_p.exp() * log_p).sum(-1).mean())
    best = min(losses, key=losses.__getitem__)
    state = {name: (theta[name] + best * tensor).cpu() for name, tensor in update.items()}
    return Merged(state, chosen={"factor": best})
