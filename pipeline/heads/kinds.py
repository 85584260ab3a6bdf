"""The kinds of head: what each computes, its parameters, and how they are initialised.

A head's parameters are a dictionary of tensors whose first dimension is the stack: K heads are trained, stored and
applied together. A single head is a stack of one.

Shapes: K heads, B rows, d dimensions, r rank, h hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probsurgery.pipeline.config import HEAD_SETTINGS, HeadSettings

Params = dict[str, Tensor]


def _linear(x: Float[Tensor, "K B i"], weight: Float[Tensor, "K o i"]) -> Float[Tensor, "K B o"]:
    return torch.bmm(x, weight.mT)


def surgery_correction(params: Params, z: Float[Tensor, "K B d"]) -> Float[Tensor, "K B d"]:
    """``W_up relu(W_down z)``; down: (K, r, d), up: (K, d, r), no biases (Surgery, eq. 2)."""
    return _linear(_linear(z, params["down"]).relu(), params["up"])


def prob_distribution(
    params: Params, z: Float[Tensor, "K B d"]
) -> tuple[Float[Tensor, "K B d"], Float[Tensor, "K B d"]]:
    """Mean and log-variance of the correction, from one bottleneck ``u = relu(W_h z)`` (ProbSurgery).

    hidden: (K, h, d), mu and log_var: (K, d, h), no biases. The public code calls the compressing map `up_proj`.
    """
    u = _linear(z, params["hidden"]).relu()
    return _linear(u, params["mu"]), _linear(u, params["log_var"])


def prob_correction(params: Params, z: Float[Tensor, "K B d"]) -> Float[Tensor, "K B d"]:
    """The mean of the correction, which inference subtracts."""
    return _linear(_linear(z, params["hidden"]).relu(), params["mu"])


def ridge_correction(params: Params, z: Float[Tensor, "K B d"]) -> Float[Tensor, "K B d"]:
    """``z - (W z + b)``, so that subtracting it leaves the prediction; weight: (K, d, d), bias: (K, d)."""
    return z - _linear(z, params["weight"]) - params["bias"].unsqueeze(1)


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), which is U(-1/sqrt(inputs), 1/sqrt(inputs))."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _init_surgery(settings: HeadSettings, d: int, generator: torch.Generator) -> Params:
    return {"down": _kaiming((settings.rank, d), generator), "up": torch.zeros(d, settings.rank)}


def _init_prob(settings: HeadSettings, d: int, generator: torch.Generator) -> Params:
    h = settings.hidden
    return {"hidden": _kaiming((h, d), generator), "mu": torch.zeros(d, h), "log_var": torch.zeros(d, h)}


@dataclass(frozen=True)
class HeadKind:
    """One row of the table of heads."""

    paper: str
    correction: Callable[[Params, Tensor], Tensor]
    shapes: Callable[[HeadSettings, int], dict[str, tuple[int, ...]]]
    """Shapes of one head's parameters, from its settings and d."""
    init: Callable[[HeadSettings, int, torch.Generator], Params] | None = None
    """Initial parameters of one head, without the stack dimension; None if the head is solved in closed form."""
    per_head: tuple[str, ...] = ()
    """Numeric settings in which the heads of one stack may differ."""


HEADS: dict[str, HeadKind] = {
    "prob": HeadKind(
        "ProbSurgery, Wei et al., ICML 2025",
        prob_correction,
        lambda s, d: {"hidden": (s.hidden, d), "mu": (d, s.hidden), "log_var": (d, s.hidden)},
        _init_prob,
        per_head=("kl_weight",),
    ),
    "surgery": HeadKind(
        "Surgery, Yang et al., ICML 2024, arxiv.org/abs/2402.02705",
        surgery_correction,
        lambda s, d: {"down": (s.rank, d), "up": (d, s.rank)},
        _init_surgery,
    ),
    "ridge": HeadKind(
        "ridge regression, a baseline",
        ridge_correction,
        lambda s, d: {"weight": (d, d), "bias": (d,)},
    ),
}
assert HEADS.keys() == HEAD_SETTINGS.keys()


def parameter_count(settings: HeadSettings, d: int) -> int:
    """Number of parameters in one head."""
    return sum(math.prod(shape) for shape in HEADS[settings.kind].shapes(settings, d).values())


def stack_params(heads: Sequence[Params]) -> Params:
    """Join single heads' parameters (or stacks of one) along the stack dimension."""
    return {name: torch.cat([head[name] for head in heads]) for name in heads[0]}
