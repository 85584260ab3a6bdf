"""One training step of K heads at once: forward pass, gradients written out by hand, Adam.

Every head is ``z_hat = z - W_out relu(W_in z)``. ProbSurgery's `W_out` gives the mean and the log-variance of the
correction, concatenated. A loss is a mean over one head's samples, rows and dimensions, and no head's gradient depends
on another head, so K heads in one stack take exactly the steps that each would take alone.

Shapes: K heads, S samples, B rows, d dimensions, w inner width (rank or hidden), o = d (Surgery) or 2 d (ProbSurgery).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probsurgery.pipeline.config import HeadSettings, TrainedSettings
from probsurgery.pipeline.heads.kinds import Params, stack_params
from probsurgery.pipeline.heads.objectives import distance, distance_gradient, kl_divergence
from probsurgery.pipeline.training.joint import BETAS, EPSILON, taken_back

FUSED_ADAM = getattr(torch, "_fused_adam_", None)


class Stack:
    """K heads whose settings differ in the KL weight only, with Adam's state, in buffers that are allocated once.

    Each of `starts` holds one head's initial parameters, without the stack dimension; they are not changed. The buffers
    have their type. With a round of T tasks, T - 1 steps of Adam without a gradient follow each step (see `joint`), and
    `params` takes back as many as the head's place in the round.
    """

    def __init__(
        self,
        settings: Sequence[HeadSettings],
        starts: Sequence[Params],
        device: torch.device | str = "cpu",
        *,
        places: Sequence[int] = (),
        tasks_in_round: int = 1,
    ) -> None:
        first = settings[0]
        assert isinstance(first, TrainedSettings), "ridge is solved, not trained"
        self.settings: TrainedSettings = first
        self.names = list(starts[0])
        stacked = stack_params([{name: t.unsqueeze(0) for name, t in start.items()} for start in starts])
        inner, *outer = stacked.values()
        self.weights = [inner.to(device), torch.cat(outer, dim=1).to(device)]
        """W_in (K, w, d) and W_out (K, o, w)."""
        self.gradients = [torch.zeros_like(w) for w in self.weights]
        heads, width, self.dim = inner.shape
        like: dict[str, Any] = {"device": device, "dtype": inner.dtype}
        batch, outputs = self.settings.batch_size, self.weights[1].shape[1]
        self.loss_sums = torch.zeros(heads, **like)
        """Each head's losses, summed over the steps with `note_loss`."""
        self._adam = Adam(self.weights, self.settings.lr)
        self._places, self._others = places or [0] * heads, tasks_in_round - 1
        self._no_gradients = [torch.zeros_like(w) for w in self.weights] if self._others else []

        # Buffers of a step, and views of them: allocating takes longer than the arithmetic, and a view as long as a
        # small operation.
        self._u, self._grad_u = (torch.empty(heads, batch, width, **like) for _ in range(2))
        self._out, self._grad_out = (torch.empty(heads, batch, outputs, **like) for _ in range(2))
        samples = max(1, self.settings.samples)  # without noise, the mean is the only sample
        self._corrected, self._spread, self._g = (
            torch.empty(samples, heads, batch, self.dim, **like) for _ in range(3)
        )
        self._w_in_t, self._w_out_t = (weight.mT for weight in self.weights)
        self._grad_out_t, self._grad_u_t = self._grad_out.mT, self._grad_u.mT
        self._predicts_log_var = "log_var" in self.names
        if self._predicts_log_var:
            self._kl_weights = torch.tensor([s.kl_weight for s in settings], **like)
            self._kl_scale = self._kl_weights.view(-1, 1, 1) / batch
            self._mu, self._log_var = self._out.split(self.dim, dim=-1)
            self._grad_mu, self._grad_log_var = self._grad_out.split(self.dim, dim=-1)
            self._single_g = self._g[0] if samples == 1 else None

    def step(self, z: Tensor, expert: Tensor, noise: Tensor | None, note_loss: bool = True) -> None:
        """Update every head by one step of Adam, which treats each entry by itself, so stacking does not change it.

        The arguments are those of `backward`.
        """
        self.backward(z, expert, noise, note_loss)
        self._adam.step(self.gradients)
        for _ in range(self._others):
            self._adam.step(self._no_gradients)

    def backward(
        self,
        z: Float[Tensor, "K B d"],
        expert: Float[Tensor, "K B d"],
        noise: Float[Tensor, "S K B d"] | None,
        note_loss: bool = True,
    ) -> None:
        """Write the gradient of each head's loss into `gradients`; with `note_loss`, add the losses to `loss_sums`."""
        u = torch.bmm(z, self._w_in_t, out=self._u).relu_()
        torch.bmm(u, self._w_out_t, out=self._out)
        if self._predicts_log_var:
            self._prob_gradient(z, expert, noise, note_loss)
        else:
            self._surgery_gradient(z, expert, note_loss)
        torch.bmm(self._grad_out_t, u, out=self.gradients[1])
        torch.bmm(self._grad_out, self.weights[1], out=self._grad_u).mul_(u.sign_())  # u is never negative
        torch.bmm(self._grad_u_t, z, out=self.gradients[0])

    def _surgery_gradient(self, z: Tensor, expert: Tensor, note_loss: bool) -> None:
        """Write the gradient with respect to the correction into `_grad_out`."""
        corrected = torch.sub(z, self._out, out=self._corrected[0])
        distance_gradient(corrected, expert, self.settings.loss, out=self._grad_out).neg_()
        if note_loss:
            self.loss_sums += distance(corrected, expert, self.settings.loss)

    def _prob_gradient(self, z: Tensor, expert: Tensor, noise: Tensor | None, note_loss: bool) -> None:
        """Write the gradient with respect to mean and log-variance, through the draws ``b = mu + noise sigma``.

        As ``z_hat = z - b``, the distance's gradient g gives -g for mu and ``-g noise sigma / 2`` for log_var. Both are
        summed over samples, and the gradients of the KL divergence are added. Without noise, b is mu.
        """
        mu = self._mu
        if note_loss:
            self.loss_sums += self._kl_weights * kl_divergence(mu, self._log_var)
        sigma = self._log_var.mul_(0.5).exp_()  # in place of the log-variance
        spread = self._spread.zero_() if noise is None else torch.mul(noise, sigma, out=self._spread)
        corrected = torch.sub(z, spread, out=self._corrected).sub_(mu)
        if note_loss:
            self.loss_sums += distance(corrected, expert, self.settings.loss)
        g = distance_gradient(corrected, expert, self.settings.loss, out=self._g)
        torch.mul(mu, self._kl_scale, out=self._grad_mu).sub_(self._total_g())
        g.mul_(spread)
        variance_gap = sigma.square_().sub_(1)
        torch.mul(variance_gap, self._kl_scale, out=self._grad_log_var).sub_(self._total_g()).mul_(0.5)

    def _total_g(self) -> Float[Tensor, "K B d"]:
        return self._g.sum(0) if self._single_g is None else self._single_g

    def params(self, k: int) -> Params:
        """A copy of head k's current parameters, a stack of one, on the CPU."""
        w_in, w_out = (w[k : k + 1].cpu().clone() for w in self._adam.before(self._places[k]))
        first, *others = self.names
        return {first: w_in} | dict(zip(others, (w.clone() for w in w_out.split(self.dim, dim=1)), strict=True))


class Adam:
    """Adam, which updates weights in place, with its state in the open.

    It calls torch's fused kernel without the optimiser around it, whose overhead is as long as a small step. The kernel
    is not public; if torch lacks it, the steps are written out.
    """

    def __init__(self, weights: list[Tensor], lr: float) -> None:
        self._weights, self._lr = weights, lr
        self._means, self._squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
        self._count = torch.zeros((), device=weights[0].device)
        self._settings = {"lr": lr, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPSILON}
        self._settings |= {"weight_decay": 0.0, "amsgrad": False, "maximize": False}

    def step(self, gradients: list[Tensor]) -> None:
        """One step along these gradients."""
        self._count.add_(1)
        if FUSED_ADAM is not None:
            counts = [self._count] * len(self._weights)
            FUSED_ADAM(self._weights, gradients, self._means, self._squares, [], counts, **self._settings)
            return
        count = self._count.double()
        rate, root = self._lr / (1 - BETAS[0] ** count), (1 - BETAS[1] ** count).rsqrt()
        for weight, gradient, mean, square in zip(self._weights, gradients, self._means, self._squares, strict=True):
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            weight.sub_(rate * mean / (square.sqrt() * root + EPSILON))

    def before(self, count: int) -> list[Tensor]:
        """The weights before the last `count` steps, which had no gradients."""
        if not count:
            return self._weights
        step, state = round(self._count.item()), zip(self._weights, self._means, self._squares, strict=True)
        return [taken_back(weight, mean, square, step, count, self._lr) for weight, mean, square in state]
