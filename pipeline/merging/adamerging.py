"""AdaMerging (Yang et al., ICLR 2024): a coefficient per task, or per task and tensor, learned from images.

Holds theta_0 and the stacked task vectors on the device, (T + 1) P, one copy of the merged model, P, and the
activations of one batch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probsurgery.pipeline.merging.coefficients import Coefficients
from probsurgery.pipeline.merging.entropy import Build, learn
from probsurgery.pipeline.merging.sparse import ties_vectors
from probsurgery.pipeline.merging.vectors import (
    Experts,
    ImageStream,
    Merged,
    StateDict,
    Vector,
    add_vectors,
    stack,
    task_vectors,
)


def adamerging(
    pretrained: StateDict,
    experts: Experts,
    stream: ImageStream | None,
    coefficients: Coefficients | None = None,
    *,
    layerwise: bool,
    keep: float | None = None,
    counted: str = "tower",
    **learning: Any,
) -> Merged:
    """theta_0 + sum_t lambda_t * tau_t, where the lambdas in [0, 1] are learned by `learn_coefficients` (eq. 6 and 7).

    With `layerwise` there is one lambda per task and parameter tensor, otherwise one per task. With `keep`, the tau_t
    are first trimmed to this share and sign-elected as in TIES ("AdaMerging++"). Given `coefficients` replace learning.
    """
    vectors = partial(task_vectors, pretrained, experts)
    if keep is not None:
        vectors = partial(ties_vectors, pretrained, experts, keep, counted)
    entropies: tuple[float, ...] = ()
    if coefficients is None:
        assert stream is not None, "`merge` asks for a stream unless there are coefficients"
        theta = stream.on_device(pretrained)
        stacked = stack(pretrained, vectors(), len(experts), stream.device)
        values, entropies = learn_coefficients(theta, stacked, stream, layerwise=layerwise, **learning)
        del stacked
        coefficients = Coefficients(tuple(experts), tuple(pretrained) if layerwise else None, values)
    table = coefficients.table(tuple(experts), tuple(pretrained))
    merged = add_vectors(pretrained, _scaled(vectors(), table))
    return replace(merged, entropy=entropies, coefficients=coefficients)


def _scaled(vectors: Iterable[Vector], table: Tensor) -> Iterator[Vector]:
    """lambda_t * tau_t for each row t of a table (T, L)."""
    for row, vector in zip(table.tolist(), vectors, strict=True):
        yield ((name, factor * tau) for factor, (name, tau) in zip(row, vector, strict=True))


def learn_coefficients(
    theta: StateDict, stacked: StateDict, stream: ImageStream, *, layerwise: bool, initial: float, **learning: Any
) -> tuple[Tensor, tuple[float, ...]]:
    """Coefficients (T,) or (T, L), and the mean entropy before each step (AdaMerging, eq. 6 and 7).

    `stacked` are the task vectors, each tensor (T, ...), on the stream's device like `theta`; `learning` are keyword
    arguments of `learn`. As in the reference, a learned value may leave [0, 1], where it gets no gradient.
    """
    count = len(next(iter(stacked.values())))
    raw = torch.full((count, len(theta) if layerwise else 1), initial, device=stream.device, requires_grad=True)
    build = blend(theta, stacked, raw)
    title = f"{'layer' if layerwise else 'task'}-wise coefficients"
    entropies = learn([raw], lambda step: build, list(theta), stream, title=title, **learning)
    values = raw.detach().clamp(0, 1).cpu()
    return (values if layerwise else values[:, 0]), entropies


def blend(theta: StateDict, stacked: StateDict, raw: Tensor) -> Build:
    """theta_0 + sum_t clamp(raw_t, 0, 1) * tau_t, one tensor at a time, from `raw` (T, 1) or (T, L)."""
    column = {name: index if raw.shape[1] > 1 else 0 for index, name in enumerate(theta)}

    def build(name: str) -> Tensor:
        return theta[name] + torch.tensordot(raw[:, column[name]].clamp(0, 1), stacked[name], 1)

    return build
