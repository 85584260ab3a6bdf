"""Quality of features: accuracy under the frozen classifier, and distance to the expert's features."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsurgery.pipeline.classifier import Classifier


def accuracy(
    features: Float[Tensor, "N d"], classifier: Classifier | Float[Tensor, "C d"], labels: Int[Tensor, " N"]
) -> float:
    """Share in [0, 1] of rows that the classifier assigns to their label.

    A tensor stands for a zero-shot classifier, for which features are L2-normalised here.
    """
    if isinstance(classifier, Tensor):
        classifier = Classifier(classifier)
    return (classifier.logits(features).argmax(-1) == labels).double().mean().item()


def representation_bias(features: Float[Tensor, "N d"], expert: Float[Tensor, "N d"]) -> float:
    """Mean absolute difference to the expert's features (Surgery, eq. 1).

    The equation divides the L1 norm by the number of rows only. This is the mean over rows and dimensions, which agrees
    with the paper's published bars of 0.1 to 0.3.
    """
    return (features - expert).abs().mean(dtype=torch.float64).item()
