"""AdaMerging (Yang et al., ICLR 2024): a coefficient for each task, or each task and tensor, learned from images.

Holds theta_0 and the task vectors side by side on the device, (T + 1) P, and one copy of the merged model, P, beside
the activations of one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from probsurgery.pipeline.merging.coefficients import Coefficients
from probsurgery.pipeline.merging.entropy import Build, learn
from probsurgery.pipeline.merging.sparse import ties_vectors
from probsurgery.pipeline.merging.vectors import (
    Experts,
    Merged,
    Samples,
    StateDict,
    Vector,
    add,
    on_device,
    stack,
    task_vectors,
    total,
)


def adamerging(
    pretrained: StateDict,
    experts: Experts,
    samples: Samples | None,
    coefficients: Coefficients | None = None,
    *,
    layerwise: bool,
    keep: float | None = None,
    **how: float | str,
) -> Merged:
    """theta_0 + sum over t of lambda_t * tau_t, the lambdas clamped to [0, 1] and learned by `learn_coefficients`.

    With `layerwise` there is a lambda for each task and parameter tensor. With `keep`, the tau are those that TIES has
    trimmed to this share and elected ("AdaMerging++"). Given coefficients are used as they are, and nothing is learned.
    """

    def vectors() -> Iterator[Vector]:
        return task_vectors(pretrained, experts) if keep is None else ties_vectors(pretrained, experts, keep)

    about = {}
    if coefficients is None:
        theta = on_device(pretrained, samples)
        stacked = stack(pretrained, vectors(), len(experts), samples.device)
        values, course = learn_coefficients(theta, stacked, samples, layerwise=layerwise, **how)
        del stacked
        tensors = tuple(pretrained) if layerwise else None
        coefficients = Coefficients(tuple(experts), tensors, values)
        about["entropy"] = course
    return Merged(
        add(pretrained, total(pretrained, _scaled(vectors(), coefficients, tuple(experts), tuple(pretrained)))),
        about | {"coefficients": coefficients},
    )


def _scaled(
    vectors: Iterable[Vector], coefficients: Coefficients, tasks: tuple[str, ...], names: tuple[str, ...]
) -> Iterator[Vector]:
    """lambda_t * tau_t."""
    for row, vector in zip(coefficients.table(tasks, names).tolist(), vectors, strict=True):
        weights = dict(zip(names, row, strict=True))
        yield ((name, weights[name] * tau) for name, tau in vector)


def learn_coefficients(
    theta: StateDict,
    stacked: StateDict,
    samples: Samples,
    *,
    layerwise: bool,
    initial: float,
    **how: float | str,
) -> tuple[Tensor, list[float]]:
    """Coefficients (T,) or (T, L), and the mean entropy before each step (AdaMerging, eq. 6 and 7).

    `stacked` has the task vectors, each tensor (T, ...), and lies with `theta` on the samples' device; `how` is what
    `learn` takes. As in the reference, what is learned may leave [0, 1], and where it has it is not moved further.
    """
    count = len(next(iter(stacked.values())))
    free = torch.full((count, len(theta) if layerwise else 1), initial, device=samples.device, requires_grad=True)
    build = blend(theta, stacked, free)
    title = f"{'layer' if layerwise else 'task'}-wise coefficients"
    course = learn([free], lambda step: build, list(theta), samples, title=title, **how)
    values = free.detach().clamp(0, 1).cpu()
    return (values if layerwise else values[:, 0]), course


def blend(theta: StateDict, stacked: StateDict, free: Tensor) -> Build:
    """theta_0 + sum over t of clamp(free)_t * tau_t for a tensor, from `free` (T, 1) or (T, L)."""
    column = {name: index if free.shape[1] > 1 else 0 for index, name in enumerate(theta)}

    def build(name: str) -> Tensor:
        return theta[name] + torch.tensordot(free[:, column[name]].clamp(0, 1), stacked[name], 1)

    return build
