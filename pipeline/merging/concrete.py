"""Concrete subspace merging (Tang et al., 2023, arxiv.org/abs/2312.06173): a learned mask shared by all tasks.

Each parameter has a mask entry, the Gumbel-sigmoid of a learned logit, trained by entropy minimisation as in
AdaMerging. `concrete_ta` holds 7 P on the device: theta_0, the sum of the task vectors, the logits, their gradient,
Adam's two moments, and the merged model. `concrete_am` holds every task vector, (T + 6) P.
"""

from typing import Any

import torch
from torch import Tensor

from probsurgery.pipeline.merging.adamerging import blend, learn_coefficients
from probsurgery.pipeline.merging.entropy import Build, learn
from probsurgery.pipeline.merging.vectors import Experts, ImageStream, Merged, StateDict, stack, task_vectors, total


class Mask:
    """A logit x per parameter. A sample is sigmoid((x + logistic noise) / temperature), divided by its mean."""

    def __init__(self, state: StateDict, temperature: float, seed: int, device: torch.device) -> None:
        self.logits = {n: torch.zeros(tensor.shape, device=device, requires_grad=True) for n, tensor in state.items()}
        self.temperature, self.seed, self.device = temperature, seed, device
        self._index = {name: index for index, name in enumerate(state)}

    def sample(self, name: str, step: int | None) -> Tensor:
        """The mask of one tensor in one step, the same on every call. None stands for the mask without noise."""
        x = self.logits[name]
        if step is not None:
            seed = (self.seed * 1_000_003 + step) * 100_003 + self._index[name]
            generator = torch.Generator(self.device).manual_seed(seed % 2**63)
            x = x + torch.rand(x.shape, generator=generator, device=self.device).clamp(1e-6, 1 - 1e-6).logit()
        mask = torch.sigmoid(x / self.temperature)
        return mask / mask.mean()


def concrete_ta(
    pretrained: StateDict, experts: Experts, stream: ImageStream, *, scale: float, temperature: float, **learning: Any
) -> Merged:
    """theta_0 + scale * m * sum tau_t, where the mask m is learned.

    Departure: the merged model uses the mask without noise; the public code samples it once more.
    """
    theta = stream.on_device(pretrained)
    update = stream.on_device(total(pretrained, task_vectors(pretrained, experts)))
    mask = Mask(pretrained, temperature, learning["seed"], stream.device)

    def build_at(step: int | None) -> Build:
        return lambda name: theta[name] + scale * mask.sample(name, step) * update[name]

    entropies = learn(list(mask.logits.values()), build_at, list(theta), stream, title="mask", **learning)
    return Merged(_built(build_at(None), theta), entropies)


def concrete_am(
    pretrained: StateDict, experts: Experts, stream: ImageStream, *, initial: float, temperature: float, **learning: Any
) -> Merged:
    """theta_0 + sum_t lambda_t * m * tau_t, where the mask m and layer-wise coefficients lambda are learned in turn.

    The mask is learned with the coefficients at their initial value, then the coefficients with the mask fixed.
    Departure: the public code updates the coefficients by one inner step before each step of the mask, and resets them.
    """
    theta = stream.on_device(pretrained)
    stacked = stack(pretrained, task_vectors(pretrained, experts), len(experts), stream.device)
    entropies = _mask_vectors(theta, stacked, stream, initial, temperature, learning)
    values, later = learn_coefficients(theta, stacked, stream, layerwise=True, initial=initial, **learning)
    return Merged(_built(blend(theta, stacked, values.to(stream.device)), theta), entropies + later)


def _mask_vectors(
    theta: StateDict,
    stacked: StateDict,
    stream: ImageStream,
    initial: float,
    temperature: float,
    learning: dict[str, Any],
) -> tuple[float, ...]:
    """Learn the mask, and multiply the task vectors by it in place. Returns the mean entropy before each step."""
    mask = Mask(theta, temperature, learning["seed"], stream.device)
    fixed = torch.full((len(next(iter(stacked.values()))), 1), initial, device=stream.device)

    def build_at(step: int | None) -> Build:
        plain = blend(theta, stacked, fixed)
        return lambda name: theta[name] + mask.sample(name, step) * (plain(name) - theta[name])

    entropies = learn(list(mask.logits.values()), build_at, list(theta), stream, title="mask", **learning)
    with torch.no_grad():
        for name in theta:
            stacked[name] *= mask.sample(name, None)
    return entropies


def _built(build: Build, theta: StateDict) -> StateDict:
    with torch.no_grad():
        return {name: build(name).cpu() for name in theta}
