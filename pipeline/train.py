"""The fit: tensors in, frozen heads out. No files, no labels, no printing.

Heads of equal settings are trained as one stack of K: their losses are summed and Adam works entry by entry, so each
head takes exactly the steps that it would take alone.

Randomness comes from one stream for each (task, seed): the order of the rows and the noise. It is drawn on the CPU in
blocks of `BLOCK` steps, whatever the device. It depends on the batch size, and on no other setting or head.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsurgery.pipeline.config import HeadSettings, ProbSettings, RidgeSettings, SurgerySettings, head_kind
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.heads import (
    HEADS,
    Params,
    parameter_count,
    prob_distribution,
    stack_params,
    surgery_correction,
)
from probsurgery.pipeline.objectives import distance, kl_divergence, sample_correction

BLOCK = 64
SMALL = 2**23
"""Multiplications in a step's forward pass below which a stack is trained on one thread."""
PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 5))
"""Ridge penalties to choose from, relative to the mean eigenvalue of the features' covariance."""


@dataclass(frozen=True)
class Rows:
    """What a head is fitted on: a task's merged and expert features, both (N, d), which the fit checks. No labels."""

    task: str
    merged: Tensor
    expert: Tensor


@dataclass(frozen=True)
class Job:
    """One head to fit, on one task's rows, or on several tasks' in turn (a shared head)."""

    rows: tuple[Rows, ...]
    settings: HeadSettings
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """One fitted head's parameters, a stack of one, and how the fit went."""

    params: Params
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss since the last entry)."""
    penalty: float | None = None
    """Ridge: the penalty that was used."""
    threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads of the fit."""


def generator(task: str, seed: int, purpose: str) -> torch.Generator:
    """A stream of random numbers that only (task, seed) determine; `purpose` keeps its uses apart."""
    key = hashlib.sha256(f"{task}/{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)


class Stream:
    """Row numbers and noise of one (task, seed), for heads that take batches of one size."""

    def __init__(self, task: str, seed: int, rows: int, batch_size: int, dim: int, samples: int) -> None:
        self.rows, self.batch_size, self.dim = rows, batch_size, dim
        self._order = generator(task, seed, "rows")
        self._noise = [generator(task, seed, f"noise {sample}") for sample in range(samples)]
        self._left = torch.empty(0, dtype=torch.long)

    def batches(self) -> Int[Tensor, "BLOCK B"]:
        """Rows of the next `BLOCK` steps: a permutation per epoch; a batch that one leaves incomplete is filled from
        the next, so that a task with fewer rows than a batch still trains."""
        wanted = BLOCK * self.batch_size
        parts, have = [self._left], len(self._left)
        while have < wanted:
            parts.append(torch.randperm(self.rows, generator=self._order))
            have += self.rows
        flat = torch.cat(parts)
        self._left = flat[wanted:]
        return flat[:wanted].view(BLOCK, self.batch_size)

    def noise(self) -> Float[Tensor, "BLOCK S B d"]:
        """Standard normal noise of the next `BLOCK` steps; the first sample does not depend on how many there are."""
        shape = (BLOCK, self.batch_size, self.dim)
        return torch.stack([torch.randn(shape, generator=g) for g in self._noise], dim=1)


def training_loss(
    settings: HeadSettings,
    params: Params,
    z: Float[Tensor, "K B d"],
    expert: Float[Tensor, "K B d"],
    noise: Float[Tensor, "S K B d"] | None,
) -> Float[Tensor, " K"]:
    """What each head of a stack minimises in one step.

    Surgery: the distance of ``z - W_up relu(W_down z)`` to the expert. ProbSurgery: the same with sampled
    corrections, plus ``kl_weight`` times the KL divergence.
    """
    if isinstance(settings, SurgerySettings):
        return distance(z - surgery_correction(params, z), expert, settings.loss)
    mu, log_var = prob_distribution(params, z)
    corrected = z - sample_correction(mu, log_var, noise)
    return distance(corrected, expert, settings.loss) + settings.kl_weight * kl_divergence(mu, log_var)


def fit_heads(
    jobs: Sequence[Job],
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda head_steps: None,
) -> list[Fitted]:
    """Fit every job; results come in the order of the jobs. `progress` is told how many head-steps have just been done.

    Raises `InputError` if features do not fit together, and `ProbsurgeryError` if a loss stops being finite.
    """
    fitted: dict[int, Fitted] = {}
    stacks = defaultdict(list)
    for index, job in enumerate(jobs):
        _check(job)
        if isinstance(job.settings, RidgeSettings):
            fitted[index] = solve_ridge(job, device)
        else:
            stacks[job.settings, len(job.rows), job.rows[0].merged.shape[1]].append(index)
    for indices in stacks.values():
        stack = [jobs[i] for i in indices]
        with _threads_for(stack):
            fitted |= dict(zip(indices, _train_stack(stack, torch.device(device), progress), strict=True))
    return [fitted[index] for index in range(len(jobs))]


@contextmanager
def _threads_for(jobs: Sequence[Job]) -> Iterator[None]:
    """One thread for a small stack: a second gains nothing there, and waits for its core on a busy machine."""
    before, settings = torch.get_num_threads(), jobs[0].settings
    work = len(jobs) * settings.batch_size * parameter_count(settings, jobs[0].rows[0].merged.shape[1])
    try:
        torch.set_num_threads(1 if work < SMALL else before)
        yield
    finally:
        torch.set_num_threads(before)


def head_steps(job: Job) -> int:
    """Updates that a job takes; a shared head takes its steps for each task."""
    return 0 if isinstance(job.settings, RidgeSettings) else job.settings.steps * len(job.rows)


def _check(job: Job) -> None:
    for rows in job.rows:
        if rows.merged.shape != rows.expert.shape or rows.merged.ndim != 2:
            raise InputError(
                f"task {rows.task}: merged features have shape {tuple(rows.merged.shape)}, expert features "
                f"{tuple(rows.expert.shape)}; both must be (N, d)"
            )
        if not len(rows.merged):
            raise InputError(f"task {rows.task} has no rows to fit")
        for kind, values in (("merged", rows.merged), ("expert", rows.expert)):
            bad = (~values.isfinite()).any(-1).nonzero()
            if len(bad):
                raise InputError(f"{kind} features of task {rows.task} are NaN or infinite in row {bad[0].item()}")


def _train_stack(jobs: Sequence[Job], device: torch.device, progress: Callable[[int], None]) -> list[Fitted]:
    """Train K heads of equal settings, each on as many tasks, as one stack."""
    settings, tasks = jobs[0].settings, len(jobs[0].rows)
    kind, dim = HEADS[head_kind(settings)], jobs[0].rows[0].merged.shape[1]
    samples = settings.samples if isinstance(settings, ProbSettings) else 0
    starts = [kind.init(settings, dim, generator(_stream_name(job), job.seed, "init")) for job in jobs]
    params = stack_params([{n: t.unsqueeze(0) for n, t in start.items()} for start in starts])
    params = {name: tensor.to(device).requires_grad_() for name, tensor in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=settings.lr, betas=(0.9, 0.999), fused=True)
    streams = [
        [Stream(r.task, job.seed, len(r.merged), settings.batch_size, dim, samples) for r in job.rows] for job in jobs
    ]
    curves: list[list[tuple[int, float]]] = [[] for _ in jobs]
    total = settings.steps * tasks
    done = 0
    while done < total:
        z, expert, noise = _next_block(jobs, streams, samples, device)
        updates = min(len(z), total - done)
        sums = torch.zeros(len(jobs), device=device)
        for step in range(updates):
            optimizer.zero_grad()
            losses = training_loss(settings, params, z[step], expert[step], noise[step] if samples else None)
            losses.sum().backward()
            optimizer.step()
            sums += losses.detach()
        done += updates
        for job, curve, mean in zip(jobs, curves, (sums / updates).tolist(), strict=True):
            if not math.isfinite(mean):
                raise ProbsurgeryError(
                    f"the loss of the head for {_stream_name(job)} is {mean} by step {done}; lower --lr or --kl-weight"
                )
            curve.append((done, mean))
        progress(updates * len(jobs))
    return [
        Fitted({name: tensor.detach()[k : k + 1].cpu().clone() for name, tensor in params.items()}, curve)
        for k, curve in enumerate(curves)
    ]


def _stream_name(job: Job) -> str:
    return job.rows[0].task if len(job.rows) == 1 else "shared " + "+".join(rows.task for rows in job.rows)


def _next_block(
    jobs: Sequence[Job], streams: list[list[Stream]], samples: int, device: torch.device
) -> tuple[Float[Tensor, "U K B d"], Float[Tensor, "U K B d"], Float[Tensor, "U S K B d"] | None]:
    """The rows and the noise of the next U = BLOCK * tasks updates; a shared head takes its tasks in turn."""
    merged, expert, noise = [], [], []
    for job, its_streams in zip(jobs, streams, strict=True):
        batches = [stream.batches() for stream in its_streams]
        for out, source in ((merged, "merged"), (expert, "expert")):
            turns = [getattr(rows, source)[b] for rows, b in zip(job.rows, batches, strict=True)]
            out.append(torch.stack(turns, dim=1).flatten(0, 1))
        if samples:
            noise.append(torch.stack([stream.noise() for stream in its_streams], dim=1).flatten(0, 1))
    stacked = (torch.stack(merged, dim=1), torch.stack(expert, dim=1), torch.stack(noise, dim=2) if samples else None)
    return tuple(tensor if tensor is None else tensor.to(device) for tensor in stacked)


def solve_ridge(job: Job, device: torch.device | str = "cpu") -> Fitted:
    """Ridge regression from merged to expert features, ``W z + b``, in float64 and closed form.

    Minimises ``sum |W z + b - z_expert|^2 + N * penalty * s * |W|^2``, the bias not penalised, where s is the mean
    eigenvalue of the merged features' covariance. Without a given penalty, the one of `PENALTIES` with the least
    leave-one-out squared error is taken: exact, from the hat matrix, and without labels.
    """
    (rows,) = job.rows
    x, y = (values.to(device, torch.float64) for values in (rows.merged, rows.expert))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x)
    eigenvalues = eigenvalues.clamp(min=0)
    unit = max(eigenvalues.mean().item(), torch.finfo(torch.float64).tiny)
    projected = x @ vectors
    target = projected.T @ y

    def leave_one_out(penalty: float) -> float:
        shrink = 1 / (eigenvalues + penalty * unit)
        residual = y - projected @ (shrink[:, None] * target)
        leverage = (projected.square() * shrink).sum(1) + 1 / len(x)
        error = (residual / (1 - leverage)[:, None]).square().mean().item()
        return error if math.isfinite(error) else math.inf

    penalty = job.settings.penalty if job.settings.penalty is not None else min(PENALTIES, key=leave_one_out)
    weight = (vectors @ (target / (eigenvalues + penalty * unit)[:, None])).T
    bias = y_mean - weight @ x_mean
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ProbsurgeryError(f"ridge regression of task {rows.task} has no finite solution; raise --penalty")
    return Fitted({"weight": weight.float().cpu()[None], "bias": bias.float().cpu()[None]}, penalty=penalty)
