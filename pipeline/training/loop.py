"""The optimiser loop: tensors in, fitted heads out. No files, no labels, no printing.

Randomness comes from one stream for each (task, seed): the order of the rows and the noise. It is drawn on the CPU in
blocks of `BLOCK` steps, whatever the device. It depends on the batch size, and on no other setting or head.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsurgery.pipeline.config import HeadSettings, RidgeSettings
from probsurgery.pipeline.errors import InputError, ProbsurgeryError, first_line
from probsurgery.pipeline.heads.kinds import HEADS, Params
from probsurgery.pipeline.heads.ridge import solve_ridge
from probsurgery.pipeline.store.memmap import mapped, spill
from probsurgery.pipeline.training.adam_step import Stack

BLOCK = 64
NOTED = 8
"""The loss is noted in every so many steps: it is not needed for the gradients, and costs up to a quarter of a step."""
Batch = tuple[Float[Tensor, "K B d"], Float[Tensor, "K B d"], Float[Tensor, "S K B d"] | None]


@dataclass(frozen=True)
class Rows:
    """What a head is fitted on: a task's merged and expert features, both (N, d). No labels."""

    task: str
    merged: Tensor
    expert: Tensor
    seen: Tensor | None = None
    """Numbers of the rows that the fit may see; None: all."""
    files: tuple[Path, Path] | None = None
    """Where both lie as .npy files. With them, rows are pickled as paths, and mapped into memory when unpickled."""

    def __len__(self) -> int:
        return len(self.merged if self.seen is None else self.seen)

    def __getstate__(self) -> dict:
        return self.__dict__ | ({"merged": None, "expert": None} if self.files else {})

    def __setstate__(self, state: dict) -> None:
        if state["files"]:
            state |= {name: mapped(file) for name, file in zip(("merged", "expert"), state["files"], strict=True)}
        self.__dict__.update(state)

    def spilled(self, folder: Path) -> Rows:
        """The same rows, on disk: their features are written to `folder`, and held by no process's own memory."""
        files = (folder / f"{self.task}.merged.npy", folder / f"{self.task}.expert.npy")
        pairs = zip(files, (self.merged, self.expert), strict=True)
        merged, expert = (spill(file, tuple(values.shape), [values.numpy()]) for file, values in pairs)
        return replace(self, merged=merged, expert=expert, files=files)

    def check(self) -> None:
        """Raise `InputError` unless both are finite and of one shape, with rows in them."""
        if self.merged.shape != self.expert.shape or self.merged.ndim != 2:
            raise InputError(
                f"task {self.task}: merged features have shape {tuple(self.merged.shape)}, expert features "
                f"{tuple(self.expert.shape)}; both must be (N, d)"
            )
        if not len(self):
            raise InputError(f"task {self.task} has no rows to fit")
        for kind, values in (("merged", self.merged), ("expert", self.expert)):
            bad = (~values.isfinite()).any(-1).nonzero()
            if len(bad):
                raise InputError(f"{kind} features of task {self.task} are NaN or infinite in row {bad[0].item()}")


@dataclass(frozen=True)
class Job:
    """One head to fit, on one task's rows, or on several tasks' in turn (a shared head)."""

    rows: tuple[Rows, ...]
    settings: HeadSettings
    seed: int = 0
    online: bool = False
    """Take the rows once, as they come, instead of a permutation per epoch."""
    stops: tuple[int, ...] = ()
    """Numbers of steps below `settings.steps` after which the head is wanted too. It is copied there and trained on: a
    run of so many steps alone gives the same."""

    @property
    def stream(self) -> str:
        """What its starting weights are drawn for."""
        return self.rows[0].task if len(self.rows) == 1 else "shared " + "+".join(rows.task for rows in self.rows)

    @property
    def head_steps(self) -> int:
        """Updates that it takes; a shared head takes its steps for each task."""
        return 0 if isinstance(self.settings, RidgeSettings) else self.settings.steps * len(self.rows)


@dataclass(frozen=True)
class Fitted:
    """One fitted head's parameters, a stack of one, and how the fit went."""

    params: Params
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss since the last entry), from every `NOTED`-th step."""
    penalty: float | None = None
    """Ridge: the penalty that was used."""
    seconds: float = 0.0
    """Its share of the time that its stack took."""
    earlier: dict[int, Fitted] = field(default_factory=dict)
    """The head as it was after each of `Job.stops`. Its curve ends with the last whole block."""


Outcome = Fitted | ProbsurgeryError
Progress = Callable[[int], None]
"""Told how many head-steps have just been done."""


def generator(task: str, seed: int, purpose: str) -> torch.Generator:
    """A stream of random numbers that only (task, seed) determine; `purpose` keeps its uses apart."""
    key = hashlib.sha256(f"{task}/{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)


class Stream:
    """Row numbers and noise of one (task, seed), for heads that take batches of one size."""

    def __init__(
        self, task: str, seed: int, rows: int, batch_size: int, dim: int, samples: int, *, online: bool = False
    ) -> None:
        self.rows, self.batch_size, self.dim, self.online = rows, batch_size, dim, online
        self._order = generator(task, seed, "rows")
        self._noise = [generator(task, seed, f"noise {sample}") for sample in range(samples)]
        self._left = torch.empty(0, dtype=torch.long)

    def batches(self) -> Int[Tensor, "BLOCK B"]:
        """Rows of the next `BLOCK` steps: a permutation per epoch; a batch that one leaves incomplete is filled from
        the next, so that a task with fewer rows than a batch still trains. Online: the rows as they come."""
        wanted = BLOCK * self.batch_size
        parts, have = [self._left], len(self._left)
        while have < wanted:
            in_order = torch.arange(self.rows) if self.online else torch.randperm(self.rows, generator=self._order)
            parts.append(in_order)
            have += self.rows
        flat = torch.cat(parts)
        self._left = flat[wanted:]
        return flat[:wanted].view(BLOCK, self.batch_size)

    def noise(self, out: Tensor | None = None) -> Float[Tensor, "S BLOCK B d"]:
        """Standard normal noise of the next `BLOCK` steps; the first sample does not depend on how many there are."""
        out = torch.empty(len(self._noise), BLOCK, self.batch_size, self.dim) if out is None else out
        for sample, its_generator in zip(out, self._noise, strict=True):
            sample.normal_(generator=its_generator)
        return out


class Feed:
    """The batches of a stack's heads, a block at a time. Heads of the same rows and seed share a stream.

    Buffers are (U, T, ...) for U streams of T tasks each, and are filled anew for each block. With `ahead`, threads
    draw the noise of the next block while the device works on this one.
    """

    def __init__(self, jobs: Sequence[Job], device: torch.device, *, ahead: bool) -> None:
        settings, dim, tasks = jobs[0].settings, jobs[0].rows[0].merged.shape[1], len(jobs[0].rows)
        keys = [(*map(id, job.rows), job.seed, job.online) for job in jobs]
        unique = list(dict.fromkeys(keys))
        self._which = None
        if len(unique) < len(jobs):
            self._which = torch.tensor([unique.index(key) for key in keys], device=device)
        firsts = [jobs[keys.index(key)] for key in unique]
        batch, samples = settings.batch_size, getattr(settings, "samples", 0)
        self._streams = [
            [Stream(r.task, j.seed, len(r), batch, dim, samples, online=j.online) for r in j.rows] for j in firsts
        ]
        # Each task's features once on the device, however many streams take from them.
        features = {id(v): v for j in firsts for r in j.rows for v in (r.merged, r.expert)}
        there = {key: values.to(device) for key, values in features.items()}
        self._sources = [[(r.seen, there[id(r.merged)], there[id(r.expert)]) for r in j.rows] for j in firsts]
        shape = (len(unique), tasks, BLOCK, batch, dim)
        self._z, self._expert = (torch.empty(shape, device=device) for _ in range(2))
        self._noise = torch.empty(*shape[:2], samples, *shape[2:], device=device)
        self._device = device
        # Views of the buffers are made once: each takes as long as a small operation. Tasks are taken in turn.
        self._batches: list[Batch] = [
            (self._z[:, t, b], self._expert[:, t, b], self._noise[:, t, :, b].transpose(0, 1) if samples else None)
            for b in range(BLOCK)
            for t in range(tasks)
        ]
        self._threads = ThreadPoolExecutor() if ahead else None
        if ahead:
            on_cuda = device.type == "cuda"
            self._host = [torch.empty(self._noise.shape, pin_memory=on_cuda) for _ in range(2)]
            self._drawn = self._draw_on_threads()

    def fill(self, *, last: bool = False) -> None:
        """Go on to the next block; after the `last` one none is drawn ahead."""
        for u, sources in enumerate(self._sources):
            for t, (seen, merged, expert) in enumerate(sources):
                picked = self._streams[u][t].batches().flatten()
                picked = (picked if seen is None else seen[picked]).to(self._device)
                for out, values in ((self._z, merged), (self._expert, expert)):
                    torch.index_select(values, 0, picked, out=out[u, t].view(-1, values.shape[1]))
        if self._threads is None:
            for u, t in np.ndindex(self._noise.shape[:2]):
                self._streams[u][t].noise(self._noise[u, t])
            return
        for drawn in self._drawn:
            drawn.result()
        self._noise.copy_(self._host[0], non_blocking=True)
        # The other buffer's own copy was over before its block was: losses are read at the end of each.
        self._host.reverse()
        if last:
            self._threads.shutdown(wait=False)
        else:
            self._drawn = self._draw_on_threads()

    def _draw_on_threads(self) -> list:
        noise = self._host[0]
        pairs = np.ndindex(noise.shape[:2])
        return [self._threads.submit(self._streams[u][t].noise, noise[u, t]) for u, t in pairs]

    def batch(self, update: int) -> Batch:
        """What each head takes in one update of the block: the buffers' own memory where every head has a stream."""
        z, expert, noise = self._batches[update]
        if self._which is None:
            return z, expert, noise
        return tuple(v if v is None else v.index_select(-3, self._which) for v in (z, expert, noise))


class _Graphed:
    """A stack's step as a CUDA graph, which reads each batch from buffers that stay where they are."""

    WARM_UP = 3

    def __init__(self, stack: Stack) -> None:
        self._stack, self._done = stack, 0
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._batch: Batch | None = None

    def step(self, z: Tensor, expert: Tensor, noise: Tensor | None, note_loss: bool) -> None:
        if self._batch is None:
            self._batch = tuple(values if values is None else values.clone() for values in (z, expert, noise))
        for there, values in zip(self._batch, (z, expert, noise), strict=True):
            if there is not None:
                there.copy_(values)
        self._done += 1
        if self._done <= self.WARM_UP:
            self._stack.step(*self._batch, note_loss)
            return
        if note_loss not in self._graphs:
            # Capturing runs nothing: the steps taken so far stand, and the replay below takes this one.
            self._graphs[note_loss] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[note_loss]):
                self._stack.step(*self._batch, note_loss)
        self._graphs[note_loss].replay()


@torch.no_grad()
def train_stack(
    jobs: Sequence[Job],
    device: torch.device | str = "cpu",
    *,
    graph: bool = False,
    progress: Progress = lambda head_steps: None,
) -> list[Outcome]:
    """Train K heads as one stack: their settings may differ in the KL weight alone, and each has as many tasks.

    A head whose loss stops being finite becomes an error in the list; it does not touch the others. So does every head
    if something else goes wrong, memory that runs out say.
    """
    device = torch.device(device)
    # A CUDA graph is captured on the current device, whichever holds the tensors.
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with current:
            if isinstance(jobs[0].settings, RidgeSettings):
                return [_solve(job, device) for job in jobs]
            return _train(jobs, device, graph, progress)
    except (RuntimeError, MemoryError) as error:
        return [ProbsurgeryError(f"training failed: {first_line(error)}") for _ in jobs]


def _train(jobs: Sequence[Job], device: torch.device, graph: bool, progress: Progress) -> list[Outcome]:
    begun = time.perf_counter()
    settings, dim, tasks = jobs[0].settings, jobs[0].rows[0].merged.shape[1], len(jobs[0].rows)
    init = HEADS[settings.kind].init
    starts = [init(job.settings, dim, generator(job.stream, job.seed, "init")) for job in jobs]
    stack = Stack([job.settings for job in jobs], starts, device)
    advance = _Graphed(stack).step if graph else stack.step
    feed = Feed(jobs, device, ahead=device.type == "cuda")
    curves: list[list[tuple[int, float]]] = [[] for _ in jobs]
    failed: dict[int, ProbsurgeryError] = {}
    earlier: list[dict[int, Fitted]] = [{} for _ in jobs]
    stopping = defaultdict(list)
    for k, job in enumerate(jobs):
        for steps in job.stops:
            stopping[steps * tasks].append((k, steps))
    total, done = settings.steps * tasks, 0
    while done < total and len(failed) < len(jobs):
        updates = min(BLOCK * tasks, total - done)
        feed.fill(last=done + updates == total)
        stack.loss_sums.zero_()
        noted = [update // tasks % NOTED == 0 for update in range(updates)]  # of a shared head, every task's
        for update in range(updates):
            advance(*feed.batch(update), noted[update])
            for k, steps in stopping.get(done + update + 1, ()):
                so_far = (time.perf_counter() - begun) / len(jobs)
                earlier[k][steps] = Fitted(stack.params(k), list(curves[k]), seconds=so_far)
        done += updates
        means = (stack.loss_sums / sum(noted)).tolist()
        for k, mean in enumerate(means):
            if not math.isfinite(mean) and k not in failed:
                failed[k] = ProbsurgeryError(f"the loss is {mean} by step {done}; lower --lr or --kl-weight")
            curves[k].append((done, mean))
        progress(updates * len(jobs))
    seconds = (time.perf_counter() - begun) / len(jobs)
    fitted = [Fitted(stack.params(k), curve, seconds=seconds, earlier=earlier[k]) for k, curve in enumerate(curves)]
    for k, one in enumerate(fitted):
        if k not in failed and not all(tensor.isfinite().all() for tensor in one.params.values()):
            failed[k] = ProbsurgeryError("weights are no numbers any more; lower --lr or --kl-weight")
    return [failed.get(k, one) for k, one in enumerate(fitted)]


def _solve(job: Job, device: torch.device) -> Outcome:
    begun = time.perf_counter()
    (rows,) = job.rows
    try:
        params, penalty = solve_ridge(rows.merged, rows.expert, job.settings.penalty, device, rows.seen)
    except ProbsurgeryError as error:
        return error
    return Fitted(params, penalty=penalty, seconds=time.perf_counter() - begun)
