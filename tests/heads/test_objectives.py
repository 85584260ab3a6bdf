"""Known answers of the losses, worked by hand."""

import math

import pytest
import torch

from probsurgery.pipeline.config import LOSSES
from probsurgery.pipeline.heads.objectives import distance, distance_gradient, kl_divergence


def test_distances_by_hand():
    corrected = torch.tensor([[[1.0, 2.0], [0.0, -4.0]]])
    expert = torch.tensor([[[0.0, 2.5], [0.0, 0.0]]])
    # differences: 1, -0.5, 0, -4
    assert distance(corrected, expert, "l1").tolist() == [pytest.approx(5.5 / 4)]
    assert distance(corrected, expert, "mse").tolist() == [pytest.approx(17.25 / 4)]
    assert distance(corrected, expert, "smooth-l1").tolist() == [pytest.approx((0.5 + 0.125 + 0 + 3.5) / 4)]


def test_cosine_distance_by_hand():
    corrected = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    expert = torch.tensor([[[6.0, 8.0], [0.0, 2.0]]])
    assert distance(corrected, expert, "cosine").tolist() == [pytest.approx(0.5, abs=1e-6)]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_distance_is_per_head_averages_samples_and_has_a_gradient(loss):
    corrected = torch.randn(3, 2, 5, 7, requires_grad=True)  # S K B d
    expert = torch.randn(2, 5, 7)
    value = distance(corrected, expert, loss)
    one_by_one = torch.stack([distance(sample, expert, loss) for sample in corrected]).mean(0)
    assert value.shape == (2,)
    assert torch.allclose(value, one_by_one, atol=1e-6)
    value[0].backward()
    assert corrected.grad[:, 0].abs().sum() > 0
    assert corrected.grad[:, 1].abs().sum() == 0


def test_kl_by_hand():
    zero = torch.zeros(1, 4, 3)
    assert kl_divergence(zero, zero).item() == 0
    mu, log_var = torch.full((1, 4, 3), 2.0), torch.full((1, 4, 3), math.log(3.0))
    per_dimension = 0.5 * (3 + 4 - 1 - math.log(3))
    assert kl_divergence(mu, log_var).item() == pytest.approx(3 * per_dimension, rel=1e-6)


def test_kl_agrees_with_torch_distributions():
    mu, log_var = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    normal = torch.distributions.Normal
    reference = torch.distributions.kl_divergence(normal(mu, (log_var / 2).exp()), normal(0.0, 1.0)).sum(-1).mean(-1)
    assert torch.allclose(kl_divergence(mu, log_var), reference, rtol=1e-5)


@pytest.mark.parametrize("samples", [(), (3,)])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_distances_are_those_of_autograd(loss, samples):
    corrected = torch.randn(*samples, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    expert = torch.randn(2, 5, 7, dtype=torch.float64)
    distance(corrected, expert, loss).sum().backward()
    assert torch.allclose(distance_gradient(corrected.detach(), expert, loss), corrected.grad, rtol=1e-12, atol=0)
    out = torch.empty_like(corrected)
    assert distance_gradient(corrected.detach(), expert, loss, out=out) is out
    assert torch.allclose(out, corrected.grad, rtol=1e-12, atol=0)
