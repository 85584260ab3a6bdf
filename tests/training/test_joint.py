"""`--optimizer joint` against a plain loop with one Adam for all tasks and `zero_grad(set_to_none=False)`."""

import pytest
import torch

from autograd_loop import DIM, PlainHead, rows
from probsurgery.pipeline.config import ProbSettings, SurgerySettings
from probsurgery.pipeline.heads.kinds import initial_params
from probsurgery.pipeline.training import adam_step
from probsurgery.pipeline.training.batches import BLOCK, Job, Stream, generator
from probsurgery.pipeline.training.kernel import TORCH, usable_kernels
from probsurgery.pipeline.training.loop import train_stack
from probsurgery.pipeline.training.plan import fit_heads

SETTINGS = {
    "surgery": SurgerySettings(steps=150, rank=5, loss="smooth-l1", optimizer="joint"),
    "prob": ProbSettings(steps=150, hidden=7, loss="smooth-l1", optimizer="joint", samples=2),
}


def joint_loop(all_rows, settings, steps):
    """The reference's loop: each round takes the tasks in turn, and one Adam holds the heads of all of them."""
    heads = [PlainHead(initial_params(settings, DIM, generator(r.task, 0, "init"))) for r in all_rows]
    optimizer = torch.optim.Adam([p for head in heads for p in head.parameters()], lr=settings.lr)
    streams = [Stream(r.task, 0, len(r), settings.batch_size, DIM, settings.samples) for r in all_rows]
    for step in range(steps):
        if step % BLOCK == 0:
            blocks = [(stream.batches(), stream.noise() if settings.samples else None) for stream in streams]
        for data, head, (order, noise) in zip(all_rows, heads, blocks, strict=True):
            picked = order[step % BLOCK]
            drawn = None if noise is None else noise[:, step % BLOCK]
            optimizer.zero_grad(set_to_none=False)
            head.loss(settings, data.merged[picked], data.expert[picked], drawn).backward()
            optimizer.step()
    return [{n.removesuffix(".weight"): p.detach() for n, p in head.named_parameters()} for head in heads]


@pytest.mark.parametrize("kernel", [TORCH, "written out", *usable_kernels()])
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("tasks", [2, 9])
def test_it_takes_the_steps_of_one_adam_for_all_tasks(kernel, kind, tasks, monkeypatch):
    if kernel == "written out":
        kernel = TORCH
        monkeypatch.setattr(adam_step, "FUSED_ADAM", None)
    settings = SETTINGS[kind]
    all_rows = [rows(f"task{t}", 60 + t, t) for t in range(tasks)]
    jobs = [Job((r,), settings, stops=(1, 20), place=p, tasks_in_round=tasks) for p, r in enumerate(all_rows)]
    fitted = train_stack(jobs, kernel=kernel)
    separate = train_stack([Job((all_rows[0],), settings)], kernel=kernel)[0]
    for steps in (1, 20, 150):
        for head, weights in zip(fitted, joint_loop(all_rows, settings, steps), strict=True):
            params = head.params if steps == 150 else head.earlier[steps].params
            for name, weight in weights.items():
                # Under 1e-6 of weights that move by up to `steps * lr * tasks`.
                assert torch.allclose(params[name][0], weight, rtol=1e-6, atol=2e-6), (steps, name)
    moved = max((fitted[0].params[name] - separate.params[name]).abs().max() for name in fitted[0].params)
    assert moved > 1e-3


def test_its_heads_are_the_same_whatever_is_trained_beside_them():
    settings = SETTINGS["prob"]
    data = [rows(f"task{t}", 60, t) for t in range(3)]
    jobs = [Job((r,), settings, place=place, tasks_in_round=3) for place, r in enumerate(data)]
    together = fit_heads([*jobs, Job((data[0],), ProbSettings(steps=150, hidden=7))])
    for job, head in zip(jobs, together, strict=False):
        alone = fit_heads([job])[0]
        assert all(torch.allclose(alone.params[n], head.params[n], atol=1e-6, rtol=0) for n in head.params)
