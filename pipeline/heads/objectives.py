"""Training objectives of heads and their gradients: pure functions of tensors, with one value per head of a stack.

Shapes: K heads, S samples, B rows, d dimensions. A gradient is that of the sum over heads; as no head's loss depends on
another head, each head gets the gradient of its own loss.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_MIN_NORM = 1e-8
"""Least norm that `cosine` divides by, as in `torch.nn.functional.cosine_similarity`."""


def distance(corrected: Float[Tensor, "... K B d"], expert: Float[Tensor, "K B d"], loss: str) -> Float[Tensor, " K"]:
    """Mean distance between corrected and expert features over samples, rows and dimensions.

    `loss` is ``l1`` (the papers'), ``mse``, ``smooth-l1`` (beta 1) or ``cosine`` (1 - cosine similarity, averaged
    over samples and rows). The reference's cosine loss cannot back-propagate; this one can.
    """
    if loss == "cosine":
        error = (1 - F.cosine_similarity(corrected, expert.expand_as(corrected), dim=-1)).unsqueeze(-1)
    elif loss == "smooth-l1":
        error = F.smooth_l1_loss(corrected, expert.expand_as(corrected), reduction="none")
    else:
        difference = corrected - expert
        error = difference.abs() if loss == "l1" else difference.square()
    return error.mean(dim=(*range(error.ndim - 3), -2, -1))


def distance_gradient(
    corrected: Float[Tensor, "... K B d"], expert: Float[Tensor, "K B d"], loss: str, out: Tensor | None = None
) -> Float[Tensor, "... K B d"]:
    """Gradient of `distance` with respect to the corrected features, written into `out` if given."""
    heads, _, dim = expert.shape
    count = corrected.numel() // heads
    if loss == "cosine":
        norm, expert_norm = (x.norm(dim=-1, keepdim=True).clamp_min(_MIN_NORM) for x in (corrected, expert))
        cosine = (corrected * expert).sum(-1, keepdim=True) / (norm * expert_norm)
        gradient = (corrected * (cosine / norm) - expert / expert_norm) / (norm * (count // dim))
        return gradient if out is None else out.copy_(gradient)
    difference = torch.sub(corrected, expert, out=out)
    if loss == "mse":
        return difference.mul_(2 / count)
    bounded = difference.sign_() if loss == "l1" else difference.clamp_(-1, 1)
    return bounded.div_(count)


def kl_divergence(mu: Float[Tensor, "K B d"], log_var: Float[Tensor, "K B d"]) -> Float[Tensor, " K"]:
    """KL divergence of N(mu, exp(log_var)) from N(0, I): summed over dimensions, mean over rows (ProbSurgery).

    The gradient is ``mu / B`` with respect to mu and ``(exp(log_var) - 1) / (2 B)`` with respect to log_var.
    """
    return -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum(-1).mean(-1)
