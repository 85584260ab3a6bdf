"""What a head is trained to minimise: pure functions of tensors, one value for each head of a stack.

Shapes: K heads, S samples, B rows, d dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def distance(corrected: Float[Tensor, "... K B d"], expert: Float[Tensor, "K B d"], loss: str) -> Float[Tensor, " K"]:
    """Mean distance between corrected and expert features over samples, rows and dimensions.

    `loss` is ``l1`` (the papers'), ``mse``, ``smooth-l1`` (beta 1) or ``cosine`` (1 - cosine similarity, a mean over
    samples and rows). The reference's cosine loss cannot back-propagate; this one can.
    """
    if loss == "cosine":
        error = (1 - F.cosine_similarity(corrected, expert.expand_as(corrected), dim=-1)).unsqueeze(-1)
    elif loss == "smooth-l1":
        error = F.smooth_l1_loss(corrected, expert.expand_as(corrected), reduction="none")
    else:
        difference = corrected - expert
        error = difference.abs() if loss == "l1" else difference.square()
    return error.mean(dim=(*range(error.ndim - 3), -2, -1))


def kl_divergence(mu: Float[Tensor, "K B d"], log_var: Float[Tensor, "K B d"]) -> Float[Tensor, " K"]:
    """KL divergence of N(mu, exp(log_var)) from N(0, I): summed over dimensions, mean over rows (ProbSurgery)."""
    return -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum(-1).mean(-1)


def sample_correction(
    mu: Float[Tensor, "K B d"], log_var: Float[Tensor, "K B d"], noise: Float[Tensor, "S K B d"]
) -> Float[Tensor, "S K B d"]:
    """Reparameterised draws ``mu + noise * exp(log_var / 2)`` of the correction (ProbSurgery)."""
    return torch.addcmul(mu, noise, (log_var / 2).exp())
