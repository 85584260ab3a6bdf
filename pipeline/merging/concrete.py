"""Concrete subspace merging (Tang et al., 2023, arxiv.org/abs/2312.06173): a learned mask that the tasks share.

The mask has an entry for each parameter, Gumbel-sigmoid of a learned logit; it is learned as AdaMerging's coefficients
are. `concrete_ta` holds 7 P on the device (theta_0, the sum of the task vectors, the logits, their gradient, Adam's two
moments, the merged model); `concrete_am`, with every task vector, T + 6.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from probsurgery.pipeline.merging.adamerging import blend, learn_coefficients
from probsurgery.pipeline.merging.entropy import Build, learn
from probsurgery.pipeline.merging.vectors import (
    Experts,
    Merged,
    Samples,
    StateDict,
    on_device,
    stack,
    task_vectors,
    total,
)


class Mask:
    """Logits x of every parameter; a draw is sigmoid((x + logistic noise) / temperature), divided by its mean."""

    def __init__(self, names: StateDict, temperature: float, seed: int, device: torch.device) -> None:
        self.logits = {n: torch.zeros(tensor.shape, device=device, requires_grad=True) for n, tensor in names.items()}
        self.temperature, self.seed, self.device = temperature, seed, device
        self._index = {name: index for index, name in enumerate(names)}

    def draw(self, name: str, step: int | None) -> Tensor:
        """A step's draw, the same however often it is asked for; None: without noise."""
        x = self.logits[name]
        if step is not None:
            own = (self.seed * 1_000_003 + step) * 100_003 + self._index[name]
            generator = torch.Generator(self.device).manual_seed(own % 2**63)
            x = x + torch.rand(x.shape, generator=generator, device=self.device).clamp(1e-6, 1 - 1e-6).logit()
        mask = torch.sigmoid(x / self.temperature)
        return mask / mask.mean()


def concrete_ta(
    pretrained: StateDict,
    experts: Experts,
    samples: Samples,
    *,
    scale: float,
    temperature: float,
    **how: float | str,
) -> Merged:
    """theta_0 + scale * m * sum tau_t with the learned mask m.

    The merged model takes the mask without noise; the public code draws it once more.
    """
    theta, device = on_device(pretrained, samples), samples.device
    update = {name: tau.to(device) for name, tau in total(pretrained, task_vectors(pretrained, experts)).items()}
    mask = Mask(pretrained, temperature, how["seed"], device)

    def build_at(step: int | None) -> Build:
        return lambda name: theta[name] + scale * mask.draw(name, step) * update[name]

    course = learn(list(mask.logits.values()), build_at, list(theta), samples, title="mask", **how)
    return Merged(_built(build_at(None), theta), {"entropy": course})


def concrete_am(
    pretrained: StateDict,
    experts: Experts,
    samples: Samples,
    *,
    initial: float,
    temperature: float,
    **how: float | str,
) -> Merged:
    """theta_0 + sum over t of lambda_t * m * tau_t: the mask and the layer-wise coefficients lambda, learned in turn.

    First the mask with the coefficients at their initial value, then the coefficients with the mask. The public code
    moves the coefficients by one inner step before each step of the mask, and resets them.
    """
    theta, device = on_device(pretrained, samples), samples.device
    stacked = stack(pretrained, task_vectors(pretrained, experts), len(experts), device)
    mask = Mask(pretrained, temperature, how["seed"], device)
    fixed = torch.full((len(experts), 1), initial, device=device)

    def build_at(step: int | None) -> Build:
        plain = blend(theta, stacked, fixed)
        return lambda name: theta[name] + mask.draw(name, step) * (plain(name) - theta[name])

    course = learn(list(mask.logits.values()), build_at, list(theta), samples, title="mask", **how)
    with torch.no_grad():
        for name in theta:
            stacked[name] *= mask.draw(name, None)
    del mask, build_at  # the logits' memory
    values, after = learn_coefficients(theta, stacked, samples, layerwise=True, initial=initial, **how)
    return Merged(_built(blend(theta, stacked, values.to(device)), theta), {"entropy": course + after})


def _built(build: Callable[[str], Tensor], theta: StateDict) -> StateDict:
    with torch.no_grad():
        return {name: build(name).cpu() for name in theta}
