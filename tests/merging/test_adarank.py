"""AdaRank against plain singular value decompositions, and the gradient that its masks get."""

import pytest
import torch
from torch.nn import functional as F

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.merging.adarank import _Directions
from probsurgery.pipeline.merging.registry import merge
from probsurgery.pipeline.merging.vectors import ImageStream

SHAPES = {"embed": (4, 4), "blocks.0.weight": (5, 4), "blocks.0.bias": (5,)}


def state(seed):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


BASE, EXPERTS = state(0), {f"task{i}": state(i) for i in range(1, 4)}


def forward(w, images):
    return F.linear(images @ w["embed"], w["blocks.0.weight"], w["blocks.0.bias"])


def batches(task, split, size, seed):
    g = torch.Generator().manual_seed(seed + sum(map(ord, task)))
    while True:
        yield torch.randn(size, 4, generator=g), torch.zeros(size)


CLASSIFIERS = {t: Classifier(torch.randn(3, 5, generator=torch.Generator().manual_seed(9))) for t in EXPERTS}
STREAM = ImageStream(forward, CLASSIFIERS, batches)


def test_every_direction_with_equal_coefficients_is_task_arithmetic():
    start = merge("adarank", BASE, EXPERTS, STREAM, initial=0.3, steps=1, lr=1e-9).state
    expected = merge("ta", BASE, EXPERTS, scale=0.3).state
    assert all(torch.allclose(start[name], expected[name], atol=1e-5) for name in BASE)


def test_a_mask_that_is_off_takes_its_direction_away():
    taus = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    layer = _Directions(taus, 0.5)
    with torch.no_grad():
        layer.logits[4] = -0.01  # the largest singular value of the second task, of four each
    left, sizes, right = torch.linalg.svd(taus[1], full_matrices=False)
    expected = 0.5 * (taus.sum(0) - sizes[0] * torch.outer(left[:, 0], right[0]))
    assert torch.allclose(layer.update(), expected, atol=1e-5)


def test_masks_get_the_gradient_of_the_sigmoid_and_coefficients_that_of_what_is_on():
    taus = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2))
    layer = _Directions(taus, 0.4)
    with torch.no_grad():
        layer.logits[1] = -0.3
    weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    (layer.update() * weights).sum().backward()
    for task in range(2):
        left, sizes, right = torch.linalg.svd(taus[task], full_matrices=False)
        along = (left.T @ weights @ right.T).diagonal() * sizes  # d loss / d (lambda m)
        logits = layer.logits[3 * task : 3 * task + 3].detach()
        slope = torch.sigmoid(logits / 10) * torch.sigmoid(-logits / 10) / 10
        assert torch.allclose(layer.logits.grad[3 * task : 3 * task + 3], 0.4 * along * slope, atol=1e-5)
        assert torch.allclose(layer.lambdas.grad[task], (along * (logits > 0)).sum(), atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_learning_turns_directions_of_the_blocks_matrices_off(name):
    """Other tensors only get coefficients: they stay a linear combination of the task vectors."""
    result = merge("adarank", BASE, EXPERTS, STREAM, steps=40, lr=0.02, seed=1)
    assert sum(result.entropy[-10:]) < 0.9 * sum(result.entropy[:10])
    taus = torch.stack([(expert[name] - BASE[name]).flatten() for expert in EXPERTS.values()], 1)
    update = (result.state[name] - BASE[name]).flatten()[:, None]
    rest = update - taus @ torch.linalg.lstsq(taus, update).solution
    assert (rest.norm() > 0.05 * update.norm()) == (name == "blocks.0.weight")
