"""The compiled step against float64 autograd, torch's step and the plain loop; what a head does not depend on."""

import threading
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from autograd_loop import DIM, PlainHead, plain_loop, rows
from probsurgery.pipeline.config import LOSSES, ProbSettings, SurgerySettings
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.heads.kinds import HEADS, initial_params
from probsurgery.pipeline.training import kernel as kernel_module
from probsurgery.pipeline.training import loop
from probsurgery.pipeline.training.batches import BLOCK, Job, Rows, Stream, generator
from probsurgery.pipeline.training.kernel import TORCH, VARIABLE, CompiledStack, kernel_for, usable_kernels
from probsurgery.pipeline.training.loop import train_stack
from probsurgery.pipeline.training.plan import Workload, fit_heads, make_plan
from probsurgery.pipeline.training.threads import run_in_threads

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not usable_kernels(), reason="no kernel was compiled for this processor")


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


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
    start = initial_params(job.settings, job.dim, generator(job.label, job.seed, "init"))
    return {name: weight[None] for name, weight in start.items()}


@pytest.fixture
def permuted(monkeypatch):
    """Trains a job by torch with its feature dimensions permuted, and turns the weights back: only rounding differs."""
    order = torch.randperm(DIM, generator=torch.Generator().manual_seed(1))
    noise, start = Stream.noise, initial_params

    def train(job):
        turned = tuple(Rows(r.task, r.merged[:, order], r.expert[:, order]) for r in job.rows)
        with monkeypatch.context() as patch:
            patch.setattr(Stream, "noise", lambda stream, out: out.copy_(noise(stream)[..., order]))
            patch.setattr(loop, "initial_params", lambda *a: {n: _turn(n, w, order) for n, w in start(*a).items()})
            (fitted,) = train_stack([replace(job, rows=turned)])
        return {name: _turn(name, weight[0], order.argsort())[None] for name, weight in fitted.params.items()}

    def _turn(name, weight, order):
        return weight[:, order] if name == "hidden" else weight[order]

    return train


@every_kernel
def test_under_l1_it_is_as_near_to_torch_as_torch_is_to_itself(kernel, permuted):
    """A residual whose sign flips by rounding parts two runs that are both right, so there is no fixed tolerance."""
    compiled, turned = [], []
    for seed in range(5):
        job = Job((rows("a", 120),), ProbSettings(steps=250, hidden=16), seed)
        (torchs,) = train_stack([job])
        compiled.append(distance(train_stack([job], kernel=kernel)[0].params, torchs.params))
        turned.append(distance(permuted(job), torchs.params))
    assert 0 < min(turned) < 1e-5
    assert median(compiled) < max(3 * median(turned), 1e-5)
    assert max(compiled) < max(3 * max(turned), 1e-5)


def mixed_jobs():
    """Several shapes, losses and seeds on one stream of batches, other streams, and a shared head."""
    a, b = rows("a", 120), rows("b", 37, 1)
    settings = [ProbSettings(steps=100, hidden=h, kl_weight=k) for h in (5, 16) for k in (0, 1e-2)]
    settings += [replace(settings[0], loss=loss, lr=1e-2) for loss in LOSSES]
    settings += [replace(settings[0], feature_scale=3.0)]
    jobs = [Job((a,), s, seed) for s in settings for seed in (0, 1)]
    return [*jobs, Job((b,), SurgerySettings(steps=70, rank=3)), Job((a, b), settings[0], stops=(30, 64))]


def test_a_head_is_the_same_to_the_bit_whatever_is_trained_beside_it_and_on_how_many_threads():
    jobs = mixed_jobs()
    alone = [fit_heads([job])[0] for job in jobs]
    for workers in (0, 2, 5):
        among = fit_heads(jobs, workers=workers)
        for one, other in zip(alone, among, strict=True):
            assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)
            assert one.curve == other.curve
            for steps, copy in one.earlier.items():
                assert all(torch.equal(copy.params[n], other.earlier[steps].params[n]) for n in copy.params)


def test_heads_of_one_stream_form_a_stack_and_are_spread_over_threads():
    jobs = mixed_jobs()
    workloads = [Workload.of(job) for job in jobs]
    plan = make_plan(workloads, CPU, workers=2)
    assert plan.kernel == usable_kernels()[0]
    assert (plan.threads, plan.processes) == (2, 0)
    assert sorted(map(len, plan.stacks)) == [1, 1, 1, 1, 8, 8]
    assert {jobs[number].seed for number in max(plan.stacks, key=len)} in ({0}, {1})
    one_stream = make_plan(workloads[:16:2], CPU, workers=2)
    assert sorted(map(len, one_stream.stacks)) == [4, 4]
    widths = [sum(jobs[:16:2][number].settings.hidden for number in stack) for stack in one_stream.stacks]
    assert abs(widths[0] - widths[1]) <= 11
    assert make_plan(workloads, CPU, workers=1).workers == 0
    record = plan.record(plan.stacks[0], jobs[0].settings)
    assert (record.kernel, record.workers, record.stack) == (plan.kernel, 2, 8)


def test_threads_end_with_an_interrupt():
    def interrupt(head_steps):
        raise KeyboardInterrupt

    endless = Job((rows("a", 50),), ProbSettings(steps=10**7, hidden=8))
    with pytest.raises(KeyboardInterrupt):
        list(run_in_threads([[endless]] * 3, 2, usable_kernels()[0], interrupt))
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_what_fails_in_a_thread_is_raised_by_the_caller(monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr("probsurgery.pipeline.training.threads.train_stack", broken)
    with pytest.raises(ZeroDivisionError):
        list(run_in_threads([[]], 1, usable_kernels()[0]))


@every_kernel
@pytest.mark.parametrize("place", ["hidden", "log_var"])
def test_nan_in_a_weight_is_an_error_of_that_head_alone(kernel, place, monkeypatch):
    def spoilt(settings, d, random):
        params = initial_params(settings, d, random)
        if settings.kl_weight:
            params[place][2, 3] = float("nan")
        return params

    monkeypatch.setattr(loop, "initial_params", spoilt)
    jobs = [Job((rows("a", 50),), ProbSettings(steps=70, hidden=8, kl_weight=k)) for k in (0, 1)]
    good, bad = train_stack(jobs, kernel=kernel)
    assert isinstance(bad, ProbsurgeryError)
    assert "the loss is nan by step 64" in str(bad)
    assert all(weight.isfinite().all() for weight in good.params.values())


def test_the_variable_chooses_the_kernel(monkeypatch):
    best = usable_kernels()[0]
    assert kernel_for(CPU) == best
    assert kernel_for(torch.device("cuda")) == TORCH
    for name in (TORCH, *usable_kernels()):
        monkeypatch.setenv(VARIABLE, name)
        assert kernel_for(CPU) == name
        assert make_plan([Workload.of(mixed_jobs()[0])], CPU).kernel == name
    (absent,) = {"neon", "avx2"} - set(usable_kernels())
    monkeypatch.setenv(VARIABLE, absent)
    with pytest.raises(InputError, match=f"{VARIABLE} is {absent}, which this installation or processor lacks"):
        kernel_for(CPU)
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(InputError, match=f"{VARIABLE}.*avx512, avx2, neon, torch"):
        kernel_for(CPU)


def test_objects_of_another_source_are_passed_over(monkeypatch):
    monkeypatch.setattr(kernel_module, "INTERFACE", kernel_module.INTERFACE + 1)
    monkeypatch.setattr(kernel_module, "_library", kernel_module._library.__wrapped__)
    assert kernel_for(CPU) == TORCH


def test_without_a_compiled_object_torch_trains(monkeypatch):
    monkeypatch.setattr(kernel_module, "_library", lambda name: None)
    assert make_plan([Workload.of(job) for job in mixed_jobs()], CPU).kernel == TORCH
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(kernel_module.platform, "machine", lambda: "x86_64")
    assert kernel_for(CPU) == TORCH
