"""One step against autograd and torch's Adam, in float64."""

import pytest
import torch
import torch.nn.functional as F

from probsurgery.pipeline.config import LOSSES, ProbSettings, SurgerySettings
from probsurgery.pipeline.training import adam_step as step_module
from probsurgery.pipeline.training.adam_step import Stack

HEADS, BATCH, DIM, WIDTH = 3, 6, 10, 4
ERRORS = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "smooth-l1": F.smooth_l1_loss,
    "cosine": lambda a, b: (1 - F.cosine_similarity(a, b)).mean(),
}


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def starts(settings):
    """Weights away from zero, so that every term of a gradient counts."""
    names = ("down", "up") if isinstance(settings, SurgerySettings) else ("hidden", "mu", "log_var")
    shapes = [(WIDTH, DIM), *[(DIM, WIDTH)] * (len(names) - 1)]
    return [dict(zip(names, (numbers(*s) * 0.5 for s in shapes), strict=True)) for _ in range(HEADS)]


def loss_of_one_head(settings, weights, z, expert, noise):
    """The formula of the papers for one head, with torch's own losses; noise is (S, B, d)."""
    error = ERRORS[settings.loss]
    first, second, *third = weights.values()
    u = F.relu(z @ first.T)
    if not third:
        return error(z - u @ second.T, expert)
    mu, log_var = u @ second.T, u @ third[0].T
    noise = torch.zeros(1, *mu.shape) if noise is None else noise
    terms = [error(z - (mu + eps * torch.exp(log_var / 2)), expert) for eps in noise]
    kl = (-0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)).mean()
    return sum(terms) / len(terms) + settings.kl_weight * kl


def settings_of(kind, loss, samples):
    common = {"loss": loss, "batch_size": BATCH, "lr": 0.05}
    if kind == "surgery":
        return [SurgerySettings(rank=WIDTH, **common)] * HEADS
    return [ProbSettings(hidden=WIDTH, samples=samples, kl_weight=k, **common) for k in (0, 1e-2, 0.7)]


CASES = [("surgery", 0), ("prob", 0), ("prob", 1), ("prob", 3)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("kind", "samples"), CASES)
def test_gradients_and_losses_are_those_of_autograd(kind, samples, loss):
    settings = settings_of(kind, loss, samples)
    begin = starts(settings[0])
    stack = Stack(settings, begin)
    z, expert = numbers(HEADS, BATCH, DIM), numbers(HEADS, BATCH, DIM)
    noise = numbers(samples, HEADS, BATCH, DIM) if samples else None
    stack.backward(z, expert, noise)
    for k, (head_settings, start) in enumerate(zip(settings, begin, strict=True)):
        weights = {name: weight.clone().requires_grad_() for name, weight in start.items()}
        value = loss_of_one_head(head_settings, weights, z[k], expert[k], noise[:, k] if samples else None)
        value.backward()
        first, *others = weights.values()
        assert torch.allclose(stack.gradients[0][k], first.grad, rtol=1e-9, atol=1e-14)
        assert torch.allclose(stack.gradients[1][k], torch.cat([w.grad for w in others]), rtol=1e-9, atol=1e-14)
        assert stack.loss_sums[k].item() == pytest.approx(value.item(), rel=1e-12)
        assert first.grad.abs().max() > 1e-4


@pytest.mark.parametrize("private", [True, False], ids=["the fused kernel", "written out"])
@pytest.mark.parametrize(("kind", "samples"), CASES)
def test_steps_of_a_stack_are_those_of_adam_for_each_head(kind, samples, private, monkeypatch):
    """Batches alternate between two tasks, as those of a shared head do."""
    if not private:
        monkeypatch.setattr(step_module, "FUSED_ADAM", None)
    settings = settings_of(kind, "l1", samples)
    begin = starts(settings[0])
    stack = Stack(settings, begin)
    heads = [{name: w.clone().requires_grad_() for name, w in start.items()} for start in begin]
    optimizers = [torch.optim.Adam(head.values(), lr=0.05) for head in heads]
    tasks = [(numbers(HEADS, BATCH, DIM), numbers(HEADS, BATCH, DIM)) for _ in range(2)]
    for step in range(8):
        z, expert = tasks[step % 2]
        noise = numbers(samples, HEADS, BATCH, DIM) if samples else None
        stack.step(z, expert, noise, note_loss=step % 3 == 0)
        for k, (head, optimizer) in enumerate(zip(heads, optimizers, strict=True)):
            optimizer.zero_grad()
            loss_of_one_head(settings[k], head, z[k], expert[k], noise[:, k] if samples else None).backward()
            optimizer.step()
    for k, head in enumerate(heads):
        params = stack.params(k)
        assert list(params) == list(head)
        for name, weight in head.items():
            assert torch.allclose(params[name][0], weight, rtol=1e-8, atol=1e-11), name


def test_starting_weights_are_left_as_they_are():
    settings = settings_of("prob", "l1", 1)
    begin = starts(settings[0])
    before = [{name: w.clone() for name, w in start.items()} for start in begin]
    Stack(settings, begin).step(numbers(HEADS, BATCH, DIM), numbers(HEADS, BATCH, DIM), numbers(1, HEADS, BATCH, DIM))
    assert all(torch.equal(b[name], s[name]) for b, s in zip(before, begin, strict=True) for name in s)


def test_a_head_with_nan_weights_does_not_affect_the_others():
    settings = settings_of("prob", "l1", 1)
    begin = starts(settings[0])
    z, expert, noise = numbers(HEADS, BATCH, DIM), numbers(HEADS, BATCH, DIM), numbers(1, HEADS, BATCH, DIM)
    clean, spoilt = Stack(settings, begin), Stack(settings, begin)
    spoilt.weights[0][1] = float("nan")
    for stack in (clean, spoilt):
        for _ in range(3):
            stack.step(z, expert, noise)
    assert spoilt.loss_sums.isnan().tolist() == [False, True, False]
    for k in (0, 2):
        assert all(torch.equal(clean.params(k)[n], spoilt.params(k)[n]) for n in begin[0])
