"""Linear classifiers of a task: of normalised or plain features, with or without a bias.

Merging, caches, metrics and exported models all use them, so they are below every wing.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fingerprints import fingerprint, state_digest


@dataclass(frozen=True, eq=False)
class Classifier:
    """Maps features (N, d) to logits (N, C). Raises `InputError` unless weight and bias agree in C."""

    weight: Float[Tensor, "C d"]
    """In float32. Of a zero-shot classifier, unit-norm rows times the logit scale."""
    bias: Float[Tensor, " C"] | None = None
    """In float32; zeros become None."""
    normalise: bool = True
    """Whether features are L2-normalised first, as zero-shot classifiers take them."""

    def __post_init__(self) -> None:
        weight, bias = self.weight, self.bias
        if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
            raise InputError(f"a classifier's weight is of shape (C, d) and floats, not {_described(weight)}")
        if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
            raise InputError(f"a classifier's bias is of shape (C,) = ({len(weight)},), not {_described(bias)}")
        object.__setattr__(self, "weight", weight.detach().float().contiguous())
        has_bias = bias is not None and bool(bias.any())
        object.__setattr__(self, "bias", bias.detach().float().contiguous() if bias is not None and has_bias else None)

    def logits(self, features: Float[Tensor, "N d"]) -> Float[Tensor, "N C"]:
        """Logits in float32, or in float64 of such features."""
        return linear_logits(features, self.weight, self.bias, normalise=self.normalise)

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        moved = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=moved)

    @cached_property
    def digest(self) -> str:
        """Digest of its values; of a zero-shot classifier, that of its weight alone."""
        own = state_digest({"": self.weight} | ({} if self.bias is None else {"bias": self.bias}))
        return own if self.normalise else fingerprint([own, "plain features"])


def linear_logits(
    features: Float[Tensor, "N d"], weight: Float[Tensor, "C d"], bias: Float[Tensor, " C"] | None, *, normalise: bool
) -> Float[Tensor, "N C"]:
    """Logits of a classifier with these parts. Nothing depends on values, so that it can be exported."""
    kind = torch.promote_types(features.dtype, torch.float32)
    features = F.normalize(features.to(kind), dim=-1) if normalise else features.to(kind)
    return F.linear(features, weight.to(kind), None if bias is None else bias.to(kind))


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
