"""An independent training loop for one head in plain autograd, which the stacks are compared with."""

import torch
import torch.nn.functional as F
from torch import nn

from probsurgery.pipeline.config import SurgerySettings
from probsurgery.pipeline.heads.kinds import initial_params
from probsurgery.pipeline.training.batches import BLOCK, Rows, Stream, generator

DIM = 24


def rows(task, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    merged = torch.randn(n, DIM, generator=g) * 2
    return Rows(task, merged, merged + torch.tanh(merged.roll(1, -1)) + 0.3)


class PlainHead(nn.Module):
    """A bias estimate from two or three linear layers without biases."""

    def __init__(self, start):
        super().__init__()
        for name, weight in start.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data.copy_(weight)
            self.add_module(name, layer)

    def loss(self, settings, z, target, noises):
        error = {
            "l1": F.l1_loss,
            "mse": F.mse_loss,
            "smooth-l1": F.smooth_l1_loss,
            "cosine": lambda a, b: (1 - F.cosine_similarity(a, b)).mean(),
        }[settings.loss]
        if isinstance(settings, SurgerySettings):
            return error(z - self.up(F.relu(self.down(z))), target)
        u = F.relu(self.hidden(z))
        mu, log_var = self.mu(u), self.log_var(u)
        terms = [error(z - (mu + noise * torch.exp(0.5 * log_var)), target) for noise in noises]
        kl = (-0.5 * torch.sum(1 + log_var - mu**2 - torch.exp(log_var), dim=1)).mean()
        return sum(terms) / len(terms) + settings.kl_weight * kl


def plain_loop(job, device="cpu"):
    """One head, one loop, torch's default Adam; rows and noise are injected from the documented streams."""
    samples = job.settings.samples
    tasks = [r.task for r in job.rows]
    stream_name = tasks[0] if len(tasks) == 1 else "shared " + "+".join(tasks)
    start = initial_params(job.settings, DIM, generator(stream_name, job.seed, "init"))
    head = PlainHead(start).to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=job.settings.lr)
    batch = job.settings.batch_size
    streams = [Stream(r.task, job.seed, len(r.merged), batch, DIM, samples) for r in job.rows]
    done = 0
    while done < job.settings.steps:
        orders = [stream.batches() for stream in streams]
        noises = [stream.noise() if samples else None for stream in streams]
        for step in range(min(BLOCK, job.settings.steps - done)):
            for data, order, noise in zip(job.rows, orders, noises, strict=True):
                picked = order[step]
                drawn = noise[:, step] if samples else None
                optimizer.zero_grad()
                batch = (data.merged[picked], data.expert[picked], drawn)
                head.loss(job.settings, *(x if x is None else x.to(device) for x in batch)).backward()
                optimizer.step()
        done += BLOCK
    return {n: p.detach().cpu() for n, p in ((n.removesuffix(".weight"), p) for n, p in head.named_parameters())}


def assert_same(params, weights):
    for name, weight in weights.items():
        assert torch.allclose(params[name][0], weight, atol=1e-5, rtol=0), name
