"""AdaRank (Lee et al., ICLR 2026): which singular directions of each task vector are merged is learned from images.

Holds theta_0, the merged model, and on the device the factors of all task vectors, 1.4 T P in a vision transformer:
(1.4 T + 3) P in all, and the activations of one batch.
"""

from typing import Any

import torch
from torch import Tensor

from probsurgery.pipeline.merging.entropy import learn
from probsurgery.pipeline.merging.layers import block_of
from probsurgery.pipeline.merging.spectral import factors
from probsurgery.pipeline.merging.vectors import Experts, ImageStream, Merged, StateDict, by_tensor

_START, _TEMPERATURE = 0.1, 10.0
"""A mask is sigmoid(logit / temperature) > 1/2. Adam moves a logit by about the learning rate a step."""


def adarank(pretrained: StateDict, experts: Experts, stream: ImageStream, *, initial: float, **learning: Any) -> Merged:
    """theta_0 + sum_t lambda_t U_t diag(m_t S_t) V_t^T with learned lambdas and binary masks m_t, for each matrix.

    Matrices are those of the blocks (all, if no tensor's name has a number); other tensors are theta_0 + sum_t lambda_t
    tau_t. Masks begin with every direction, and get the gradient of sigmoid(logit / temperature), straight through.
    Departure: 500 steps by default; the paper takes 10,000. lambdas are not clamped, as in the authors' code.
    """
    matrices = {name for name, theta in pretrained.items() if theta.ndim == 2}
    masked = set(filter(block_of, matrices)) or matrices
    theta = stream.on_device(pretrained)
    layers = {}
    for done, (name, taus) in enumerate(by_tensor(pretrained, experts)):
        stream.progress(done, len(pretrained), f"singular vectors of {name}")
        layers[name] = (_Directions if name in masked else _Whole)(taus.to(stream.device), initial)

    def build(name: str) -> Tensor:
        return theta[name] + layers[name].update()

    parameters = [parameter for layer in layers.values() for parameter in layer.parameters]
    entropies = learn(parameters, lambda step: build, list(theta), stream, title="masks", **learning)
    with torch.no_grad():
        return Merged({name: build(name).cpu() for name in theta}, entropies)


class _Whole:
    """sum_t lambda_t tau_t of one tensor."""

    def __init__(self, taus: Tensor, initial: float) -> None:
        self.taus = taus
        self.lambdas = torch.full((len(taus),), initial, device=taus.device, requires_grad=True)
        self.parameters = [self.lambdas]

    def update(self) -> Tensor:
        return torch.tensordot(self.lambdas, self.taus, 1)


class _Directions:
    """sum_t lambda_t U_t diag(m_t S_t) V_t^T of one matrix. The directions of all tasks are side by side."""

    def __init__(self, taus: Tensor, initial: float) -> None:
        found = [factors(tau, 0) for tau in taus]
        self.left = torch.cat([left for left, _, _ in found], 1).float()
        """(m, R)."""
        self.right = torch.cat([right * sizes for _, sizes, right in found], 1).T.float().contiguous()
        """S V^T (R, n)."""
        ranks = torch.tensor([len(sizes) for _, sizes, _ in found])
        self.task = torch.arange(len(taus)).repeat_interleave(ranks).to(taus.device)
        """Which task a direction is of, (R,)."""
        self.lambdas = torch.full((len(taus),), initial, device=taus.device, requires_grad=True)
        self.logits = torch.full((len(self.task),), _START, device=taus.device, requires_grad=True)
        self.parameters = [self.lambdas, self.logits]

    def update(self) -> Tensor:
        soft = torch.sigmoid(self.logits / _TEMPERATURE)
        mask = (soft > 0.5).to(soft) + soft - soft.detach()  # the value of a step, the gradient of the sigmoid
        return (self.left * (mask * self.lambdas[self.task])) @ self.right
