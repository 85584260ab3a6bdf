"""The kinds of head: what each computes, its parameters, and how they are initialised.

A head's parameters are a dictionary of tensors whose first dimension is the stack: K heads are trained, stored and
applied together. A single head is a stack of one.

Shapes: K heads, B rows, d dimensions, r rank, h hidden width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probsurgery.pipeline.config import HEAD_SETTINGS, HeadSettings

Params = dict[str, Tensor]
Features = Float[Tensor, "K B d"]


def surgery_correction(params: Params, z: Features) -> Features:
    """``W_up relu(W_down z)``; down: (K, r, d), up: (K, d, r), no biases (Surgery, eq. 2)."""
    return (z @ params["down"].mT).relu() @ params["up"].mT


def prob_distribution(params: Params, z: Features, scale: float = 1.0) -> tuple[Features, Features]:
    """Mean and log-variance of the correction, from one bottleneck ``u = relu(W_h z)`` (ProbSurgery).

    hidden: (K, h, d), mu and log_var: (K, d, h), no biases. The public code calls the compressing map `up_proj`.
    `scale` is what features were multiplied by in training. Without biases, u of ``scale z`` is ``scale u``, so the
    mean in the features' own units needs no scale, and the log-variance is less by ``2 ln scale``.
    """
    u = (z @ params["hidden"].mT).relu()
    return u @ params["mu"].mT, scale * (u @ params["log_var"].mT) - 2 * math.log(scale)


def prob_correction(params: Params, z: Features) -> Features:
    """The mean of the correction, which inference subtracts."""
    return (z @ params["hidden"].mT).relu() @ params["mu"].mT


def ridge_correction(params: Params, z: Features) -> Features:
    """``z - (W z + b)``, so that subtracting it leaves the prediction; weight: (K, d, d), bias: (K, d)."""
    return z - z @ params["weight"].mT - params["bias"].unsqueeze(1)


def affine_correction(params: Params, z: Features) -> Features:
    """``z - (scale z + shift)``, by dimension; scale and shift: (K, d)."""
    return z - z * params["scale"].unsqueeze(1) - params["shift"].unsqueeze(1)


def orthogonal_correction(params: Params, z: Features) -> Features:
    """``z - R z``; rotation: (K, d, d)."""
    return z - z @ params["rotation"].mT


def no_correction(params: Params, z: Features) -> Features:
    """Zeros: of a classifier head, which leaves features as they are."""
    return torch.zeros_like(z)


@dataclass(frozen=True)
class HeadKind:
    """One row of the table of heads."""

    correction: Callable[[Params, Tensor], Tensor]
    shapes: Callable[[Any, int], dict[str, tuple[int, ...]]]
    """Shapes of the parameters of one head's correction, from its settings and d; the layer that takes the features
    comes first."""
    per_head: tuple[str, ...] = ()
    """Numeric settings in which the heads of one stack may differ."""


HEADS: dict[str, HeadKind] = {
    "prob": HeadKind(
        prob_correction,
        lambda s, d: {"hidden": (s.hidden, d), "mu": (d, s.hidden), "log_var": (d, s.hidden)},
        per_head=("kl_weight",),
    ),
    "surgery": HeadKind(surgery_correction, lambda s, d: {"down": (s.rank, d), "up": (d, s.rank)}),
    "ridge": HeadKind(ridge_correction, lambda s, d: {"weight": (d, d), "bias": (d,)}),
    "affine": HeadKind(affine_correction, lambda s, d: {"scale": (d,), "shift": (d,)}),
    "orthogonal": HeadKind(orthogonal_correction, lambda s, d: {"rotation": (d, d)}),
    "classifier": HeadKind(no_correction, lambda s, d: {}),
}
assert HEADS.keys() == HEAD_SETTINGS.keys()


def classifier_shapes(classes: int, d: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what a classifier head trains."""
    return {"weight": (classes, d), "bias": (classes,)}


def parameter_count(settings: HeadSettings, d: int, classes: int = 0) -> int:
    """Number of parameters in one head; `classes` are those of a classifier head's task."""
    of_kind = HEADS[settings.kind].shapes(settings, d)
    return sum(math.prod(shape) for shape in (of_kind or classifier_shapes(classes, d)).values())


def initial_params(settings: HeadSettings, d: int, generator: torch.Generator) -> Params:
    """Initial parameters of one head that is trained, without the stack dimension. They correct nothing.

    The first layer is Kaiming-uniform with a = sqrt(5), which is U(-1/sqrt(d), 1/sqrt(d)); the others are zero.
    """
    params = {name: torch.zeros(shape) for name, shape in HEADS[settings.kind].shapes(settings, d).items()}
    next(iter(params.values())).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d), generator=generator)
    return params


def stack_params(heads: Sequence[Params]) -> Params:
    """Join single heads' parameters (or stacks of one) along the stack dimension."""
    return {name: torch.cat([head[name] for head in heads]) for name in heads[0]}
