"""Known answers of the metrics."""

import pytest
import torch
from jaxtyping import TypeCheckError

from probsurgery.pipeline.heads.metrics import accuracy, representation_bias


def test_bias_is_the_mean_over_rows_and_dimensions():
    assert representation_bias(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 4.0], [3.0, 8.0]])) == 7 / 4


def test_accuracy_counts_right_rows_and_ignores_their_length():
    classifier = torch.eye(3)
    features = torch.tensor([[9.0, 0, 0], [0, 1e-3, 0], [0, 0, 5], [5, 4, 0]])
    assert accuracy(features, classifier, torch.tensor([0, 1, 2, 1])) == pytest.approx(0.75)
    assert accuracy(100 * features, classifier, torch.tensor([0, 1, 2, 1])) == pytest.approx(0.75)


def test_annotated_shapes_are_checked_under_the_tests():
    with pytest.raises(TypeCheckError, match="features"):
        accuracy(torch.zeros(4, 3, 2), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64))
