"""Classifiers: what they compute, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models.checkpoints import digest

WEIGHT, BIAS = torch.tensor([[3.0, 4.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0.0, 5.0, -1.0])


@pytest.mark.parametrize("bias", [BIAS, None])
@pytest.mark.parametrize("normalise", [True, False])
def test_logits_are_those_of_a_linear_layer(bias, normalise):
    layer, features = torch.nn.Linear(2, 3, bias=bias is not None), 7 * torch.randn(20, 2)
    layer.weight.data = WEIGHT
    if bias is not None:
        layer.bias.data = bias
    expected = layer(F.normalize(features) if normalise else features)
    assert torch.allclose(Classifier(WEIGHT, bias, normalise).logits(features), expected, atol=1e-6)


def test_each_part_has_its_own_digest_and_a_zero_shot_one_that_of_its_weight():
    made = [
        Classifier(WEIGHT),
        Classifier(WEIGHT, BIAS),
        Classifier(WEIGHT, None, False),
        Classifier(WEIGHT, BIAS, False),
    ]
    assert len({classifier.digest for classifier in made}) == 4
    assert made[0].digest == digest({"": WEIGHT}) == Classifier(WEIGHT.double(), torch.zeros(3)).digest


@pytest.mark.parametrize(
    ("weight", "bias", "words"),
    [
        (WEIGHT[0], None, "floats, not float32 of shape \\(2,\\)"),
        (WEIGHT.long(), None, "not int64"),
        (torch.zeros(0, 2), None, "not float32 of shape \\(0, 2\\)"),
        (WEIGHT, BIAS[:2], "\\(C,\\) = \\(3,\\), not float32 of shape \\(2,\\)"),
        (WEIGHT, BIAS[:, None], "not float32 of shape \\(3, 1\\)"),
    ],
)
def test_shapes_that_disagree_are_refused(weight, bias, words):
    with pytest.raises(InputError, match=words):
        Classifier(weight, bias)
