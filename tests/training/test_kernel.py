"""The compiled step against float64 autograd, torch's step and the plain loop; what a head does not depend on."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from autograd_loop import PlainHead, plain_loop, rows
from probsurgery.pipeline.config import LOSSES, ProbSettings, SurgerySettings
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.heads.kinds import HEADS, initial_params
from probsurgery.pipeline.training import kernel as kernel_module
from probsurgery.pipeline.training.batches import BLOCK, Job, Rows
from probsurgery.pipeline.training.kernel import KERNELS, TORCH, CompiledStack, kernel_for, usable_kernels
from probsurgery.pipeline.training.loop import train_stack
from probsurgery.pipeline.training.plan import Plan, Workload, execute, fit_heads, make_plan
from probsurgery.pipeline.training.threads import run_in_threads

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not usable_kernels(), reason="no kernel was compiled for this processor")
every_kernel = pytest.mark.parametrize("kernel", usable_kernels() or [None])


def settings_of(kind, width, samples=1, **common):
    if kind == "surgery":
        return SurgerySettings(rank=width, **common)
    return ProbSettings(hidden=width, samples=samples, kl_weight=0.3, **common)


def one_step(kernel, settings, start, z, expert, noise):
    """The stack after one step on (B, d), and (S, B, d)."""

    def block(values):  # (..., B, d) -> (1, ..., BLOCK, B, d), of which the first step is used
        return values.unsqueeze(-3).repeat(*[1] * (values.ndim - 2), BLOCK, 1, 1)[None].contiguous()

    stack = CompiledStack(kernel, [settings], [start], 1)
    feed = (block(z), block(expert), block(noise))
    stack.run(SimpleNamespace(block=lambda k: feed, tasks=1), 0, 1)
    return stack


SHAPES = [(10, 4, 6), (7, 3, 1), (24, 5, 17), (40, 1, 5)]  # d, width, batch: tails of every kind


@every_kernel
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("kind", "samples"), [("surgery", 0), ("prob", 0), ("prob", 1), ("prob", 3)])
@pytest.mark.parametrize(("d", "width", "batch"), SHAPES)
def test_gradients_and_losses_are_those_of_autograd_in_float64(kernel, kind, samples, loss, d, width, batch):
    """After the first step, Adam's means are a tenth of the gradients."""
    settings = settings_of(kind, width, samples, loss=loss, batch_size=batch)
    start = {name: torch.randn(shape) * 0.5 for name, shape in HEADS[kind].shapes(settings, d).items()}
    z, expert, noise = torch.randn(batch, d), torch.randn(batch, d), torch.randn(samples, batch, d)
    stack = one_step(kernel, settings, start, z, expert, noise)
    head = PlainHead(start).double()
    noises = noise.double() if samples else torch.zeros(1, batch, d)
    value = head.loss(settings, z.double(), expert.double(), noises)
    value.backward()
    assert stack.loss_sums.item() == pytest.approx(value.item(), rel=1e-5)
    stack._states[0][:, 0] = stack._states[0][:, 1] * 10
    for name, gradient in stack.params(0).items():
        expected = getattr(head, name).weight.grad
        assert (gradient[0] - expected).abs().max() < 1e-5 * max(1, expected.abs().max()), name
        assert expected.abs().max() > 1e-4 or width == 1


def distance(params, others):
    """Relative difference of all weights."""
    differences = [(params[name] - others[name]).norm() for name in params]
    return (torch.stack(differences).norm() / torch.stack([others[name].norm() for name in params]).norm()).item()


SMOOTH = [
    ProbSettings(steps=250, hidden=32, loss="smooth-l1"),
    ProbSettings(steps=250, hidden=7, loss="smooth-l1", samples=3, kl_weight=1e-2, batch_size=5),
    SurgerySettings(steps=250, rank=5, loss="smooth-l1"),
]


@every_kernel
@pytest.mark.parametrize("settings", SMOOTH)
def test_steps_are_those_of_torch_and_of_the_plain_loop(kernel, settings):
    job = Job((rows("a", 120), rows("b", 9, 1)), replace(settings, steps=settings.steps // 2))
    (compiled,), (torchs,) = train_stack([job], kernel=kernel), train_stack([job])
    plain = {name: weight[None] for name, weight in plain_loop(job).items()}
    assert distance(compiled.params, torchs.params) < 1e-5
    assert distance(compiled.params, plain) < 1e-5
    assert distance(compiled.params, initial(job)) > 1e-2
    for (step, loss), (other_step, other_loss) in zip(compiled.curve, torchs.curve, strict=True):
        assert step == other_step
        assert loss == pytest.approx(other_loss, rel=1e-5)


def initial(job):
    generator = kernel_module_generator(job)
    return {name: weight[None] for name, weight in initial_params(job.settings, job.dim, generator).items()}


def kernel_module_generator(job):
    from probsurgery.pipeline.training.batches import generator

    return generator(job.label, job.seed, "init")
