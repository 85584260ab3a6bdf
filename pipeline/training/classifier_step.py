"""One training step of K classifiers at once (FT-Classifier): gradients written out by hand, Adam.

Each classifier ``softmax(W z + b)`` of merged features learns the predictions ``softmax(W_expert z_expert + b_expert)``
of its task's own on the expert's features, where it starts. No label is read. No classifier's gradient depends on
another's, so K in one stack take the steps that each would take alone.

Shapes: K heads, B rows, d dimensions, C classes.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import ClassifierSettings
from probsurgery.pipeline.heads.kinds import Params
from probsurgery.pipeline.training.adam_step import Adam

_MIN_NORM = 1e-12
"""Least norm that features are divided by, as in `torch.nn.functional.normalize`."""


class ClassifierStack:
    """K classifiers of C classes each, with Adam's state. The loss is ``KL(expert || merged)``, the mean over rows.

    Each is trained in units of its start: Adam moves every entry by about `lr` in each step, whatever the gradient, and
    entries are as large as the logit scale makes them, or as a linear probe has them. The unit is the root mean square
    of the entries of the expert's weight.
    """

    def __init__(
        self, settings: ClassifierSettings, experts: Sequence[Classifier], device: torch.device | str = "cpu"
    ) -> None:
        weight = torch.stack([expert.weight for expert in experts]).to(device)
        no_bias = torch.zeros(weight.shape[1])
        biases = [no_bias if expert.bias is None else expert.bias for expert in experts]
        bias = torch.stack(biases).unsqueeze(1).to(device)
        self._expert_weight_t, self._expert_bias = weight.mT, bias
        self._unit = weight.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
        self.weights = [weight / self._unit, bias / self._unit]
        """W (K, C, d) and b (K, 1, C), in those units."""
        self.gradients = [torch.zeros_like(values) for values in self.weights]
        self._adam = Adam(self.weights, settings.lr)
        self._weight_t = self.weights[0].mT
        normalises = torch.tensor([expert.normalise for expert in experts], device=device)
        self._divides = normalises.view(-1, 1, 1)
        self.loss_sums = torch.zeros(len(experts), device=device)
        """Each head's losses, summed over the steps with `note_loss`."""

    def step(self, z: Tensor, expert: Tensor, noise: Tensor | None, note_loss: bool = True) -> None:
        """Update every classifier by one step of Adam. The arguments are those of `backward`; there is no noise."""
        self.backward(z, expert, note_loss)
        self._adam.step(self.gradients)

    def backward(self, z: Float[Tensor, "K B d"], expert: Float[Tensor, "K B d"], note_loss: bool = True) -> None:
        """Write the gradient of each head's loss into `gradients`; with `note_loss`, add the losses to `loss_sums`."""
        z = self._as_taken(z)
        target = torch.baddbmm(self._expert_bias, self._as_taken(expert), self._expert_weight_t).log_softmax(-1)
        found = torch.baddbmm(self.weights[1], z, self._weight_t).mul_(self._unit).log_softmax(-1)
        share = target.exp()
        if note_loss:
            self.loss_sums += (target - found).mul_(share).sum(-1).mean(-1)
        on_logits = found.exp_().sub_(share).mul_(self._unit / z.shape[1])
        torch.bmm(on_logits.mT, z, out=self.gradients[0])
        torch.sum(on_logits, 1, keepdim=True, out=self.gradients[1])

    def _as_taken(self, features: Tensor) -> Tensor:
        """Features as each head's classifier takes them: normalised or plain."""
        norms = features.norm(dim=-1, keepdim=True).clamp_(min=_MIN_NORM)
        return features / torch.where(self._divides, norms, 1)

    def params(self, k: int) -> Params:
        """A copy of head k's current weight (1, C, d) and bias (1, C), on the CPU."""
        weight, bias = (values[k : k + 1] * self._unit[k] for values in self.weights)
        return {"weight": weight.cpu(), "bias": bias[0].cpu()}
