"""Classifier heads: the step against autograd, the training against an independent loop, stacks, refusals."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import ClassifierSettings, SurgerySettings
from probsurgery.pipeline.device import choose_device
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.training.batches import BLOCK, Job, Rows, Stream
from probsurgery.pipeline.training.classifier_step import ClassifierStack
from probsurgery.pipeline.training.kernel import TORCH, VARIABLE
from probsurgery.pipeline.training.loop import train_stack
from probsurgery.pipeline.training.plan import fit_heads

DIM = 12
QUICK = ClassifierSettings(steps=150, batch_size=16)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(task, n, classes=4, *, normalise=True, bias=False, seed=0):
    """Merged features turned away from the expert's, and a classifier of the expert's."""
    expert = drawn(n, DIM, seed=seed)
    merged = expert + 0.7 * expert.roll(1, -1) + 0.2
    own = Classifier(5 * drawn(classes, DIM, seed=seed + 1), drawn(classes, seed=seed + 2) if bias else None, normalise)
    return Rows(task, merged, expert, classifier=own)


def divergence(own, weight, bias, z, expert):
    """KL(expert || merged) by torch's loss."""
    taken = (lambda x: F.normalize(x, dim=-1)) if own.normalise else lambda x: x
    old_bias = 0 if own.bias is None else own.bias
    target = F.softmax(taken(expert) @ own.weight.T + old_bias, dim=1)
    return F.kl_div(F.log_softmax(taken(z) @ weight.T + bias, dim=1), target, reduction="batchmean")


def plain_loop(job):
    """One classifier as a module, torch's default Adam; its unit is a factor of the module's output."""
    (data,), settings, own = job.rows, job.settings, job.rows[0].classifier
    unit = own.weight.pow(2).mean().sqrt()
    layer = nn.Linear(DIM, len(own.weight))
    layer.weight.data = own.weight / unit
    layer.bias.data = torch.zeros(len(own.weight)) if own.bias is None else own.bias / unit
    optimizer = torch.optim.Adam(layer.parameters(), lr=settings.lr)
    stream, losses = Stream(data.task, job.seed, len(data.merged), settings.batch_size, DIM, 0, online=job.online), []
    for step in range(settings.steps):
        if step % BLOCK == 0:
            order = stream.batches()
        picked = order[step % BLOCK]
        optimizer.zero_grad()
        batch = data.merged[picked], data.expert[picked]
        loss = divergence(own, layer.weight * unit, layer.bias * unit, *batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return layer.weight.detach() * unit, layer.bias.detach() * unit, losses


@pytest.mark.parametrize("kernel", [TORCH, ""])
def test_heads_of_a_stack_are_those_of_plain_loops(kernel, monkeypatch):
    """Also beside Surgery of as many steps, which a compiled kernel trains where there is one."""
    monkeypatch.setenv(VARIABLE, kernel)
    made = [rows("a", 90), rows("b", 40, normalise=False, bias=True, seed=5), rows("c", 30, classes=7, seed=9)]
    jobs = [Job((data,), QUICK, seed) for data in made for seed in (0, 3)]
    beside = Job((made[0],), SurgerySettings(rank=4, steps=QUICK.steps, batch_size=QUICK.batch_size))
    for job, fitted in zip(jobs, fit_heads([*jobs, beside])[:-1], strict=True):
        weight, bias, losses = plain_loop(job)
        assert torch.allclose(fitted.params["weight"][0], weight, atol=1e-5, rtol=0)
        assert torch.allclose(fitted.params["bias"][0], bias, atol=1e-5, rtol=0)
        assert not torch.allclose(weight, job.classifier.weight, atol=1e-2, rtol=0)
        first = [loss for step, loss in enumerate(losses[:BLOCK]) if step % 8 == 0]
        assert fitted.curve[0] == (BLOCK, pytest.approx(sum(first) / len(first), rel=1e-4))
        assert fitted.curve[-1][1] < fitted.curve[0][1]


def test_gradients_are_those_of_autograd():
    experts = [
        rows("a", 2, normalise=n, bias=b, seed=s).classifier for s, (n, b) in enumerate([(True, True), (False, False)])
    ]
    stack = ClassifierStack(ClassifierSettings(), experts)
    for values in stack.weights:  # away from the start
        values += 0.3 * drawn(*values.shape, seed=8)
    z, expert = drawn(2, 6, DIM, seed=6), drawn(2, 6, DIM, seed=7)
    stack.backward(z, expert)
    for k, own in enumerate(experts):
        unit = own.weight.square().mean().sqrt()
        weight, bias = (values[k].squeeze(0).clone().requires_grad_() for values in stack.weights)
        loss = divergence(own, weight * unit, bias * unit, z[k], expert[k])
        loss.backward()
        assert torch.allclose(stack.gradients[0][k], weight.grad, atol=1e-5)
        assert torch.allclose(stack.gradients[1][k, 0], bias.grad, atol=1e-5)
        assert stack.loss_sums[k].item() == pytest.approx(loss.item(), rel=1e-4)
        assert weight.grad.abs().max() > 1e-2


def test_it_stays_where_merged_and_expert_features_are_the_same():
    data = rows("a", 50)
    same = replace(data, merged=data.expert)
    (fitted,) = fit_heads([Job((same,), replace(QUICK, lr=1e-4))])
    assert fitted.curve[-1][1] < 1e-4
    assert torch.allclose(fitted.params["weight"][0], data.classifier.weight, atol=0.2)


def test_the_unit_of_the_learning_rate_is_the_size_of_the_entries():
    """Features of another unit, and a classifier to match, give the same predictions after training."""
    data = rows("a", 60, normalise=False)
    factor = 2.0**10
    own = Classifier(data.classifier.weight / factor, normalise=False)
    scaled = replace(data, merged=factor * data.merged, expert=factor * data.expert, classifier=own)
    first, second = (
        f.params["weight"][0] for f in fit_heads([Job((r,), replace(QUICK, steps=10)) for r in (data, scaled)])
    )
    moved = (first - data.classifier.weight).abs().max()
    assert moved > 0.05
    assert torch.allclose(first, factor * second, atol=0.05 * moved.item())


def test_copies_during_a_run_online_and_seen_rows():
    data = rows("a", 70)
    (fitted,) = fit_heads([Job((data,), QUICK, stops=(10, 100))])
    for steps, copy in fitted.earlier.items():
        (alone,) = fit_heads([Job((data,), replace(QUICK, steps=steps))])
        assert all(torch.equal(copy.params[name], alone.params[name]) for name in alone.params)
    online = Job((data,), ClassifierSettings(steps=70, batch_size=1), online=True)
    weight, *_ = plain_loop(online)
    assert torch.allclose(fit_heads([online])[0].params["weight"][0], weight, atol=1e-5)
    seen = torch.arange(3, 60, 2)
    some = fit_heads([Job((replace(data, seen=seen),), QUICK)])[0].params
    alone = fit_heads([Job((replace(data, merged=data.merged[seen], expert=data.expert[seen]),), QUICK)])[0].params
    assert all(torch.equal(some[name], alone[name]) for name in some)


def test_without_a_classifier_or_with_another_width_it_is_refused():
    data = rows("a", 20)
    for own in (None, Classifier(torch.ones(3, DIM + 1))):
        with pytest.raises(InputError, match="the head for a needs one task, with a classifier of 12 dimensions"):
            fit_heads([Job((replace(data, classifier=own),), QUICK)])


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_others():
    good, bad = rows("a", 20), rows("b", 20, normalise=False)
    bad = replace(bad, classifier=Classifier(bad.classifier.weight * 1e38, normalise=False))
    outcomes = train_stack([Job((data,), QUICK) for data in (good, bad)])
    assert isinstance(outcomes[1], ProbsurgeryError)
    (alone,) = fit_heads([Job((good,), QUICK)])
    assert torch.allclose(outcomes[0].params["weight"], alone.params["weight"], atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu(graph):
    data = rows("a", 90)
    (fitted,) = train_stack([Job((data,), QUICK)], choose_device("cuda"), graph=graph)
    weight, *_ = plain_loop(Job((data,), QUICK))
    assert torch.allclose(fitted.params["weight"][0], weight, atol=1e-3)
