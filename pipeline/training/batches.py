"""What a head is trained on: the rows of its tasks, and the stream of batches and noise drawn from them.

Each (task, seed) has one stream of random numbers, for the order of the rows and the noise. It is drawn on the CPU in
blocks of `BLOCK` steps, whatever the device. It depends on the batch size, and on no other setting or head.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import HeadSettings
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.store.memmap import mapped, spill

BLOCK = 64
Batch = tuple[Float[Tensor, "K B d"], Float[Tensor, "K B d"], Float[Tensor, "S K B d"] | None]
"""Merged features, expert features and noise (None without draws)."""


@dataclass(frozen=True)
class Rows:
    """What a head is fitted on: a task's merged and expert features, both (N, d). No labels."""

    task: str
    merged: Tensor
    expert: Tensor
    seen: Tensor | None = None
    """Numbers of the rows that the fit may see; None: all."""
    files: tuple[Path, Path] | None = None
    """The .npy files that hold both. With them, rows are pickled as paths, and mapped into memory when unpickled."""
    classifier: Classifier | None = None
    """The task's, where a classifier head starts, and whose predictions on expert features it learns."""

    def __len__(self) -> int:
        return len(self.merged if self.seen is None else self.seen)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"merged": None, "expert": None} if self.files else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["files"]:
            state |= {name: mapped(file) for name, file in zip(("merged", "expert"), state["files"], strict=True)}
        self.__dict__.update(state)

    def spilled(self, folder: Path) -> "Rows":
        """The same rows, with their features written to `folder` and mapped from there."""
        files = (folder / f"{self.task}.merged.npy", folder / f"{self.task}.expert.npy")
        pairs = zip(files, (self.merged, self.expert), strict=True)
        merged, expert = (spill(file, (len(values), values.shape[1]), [values.numpy()]) for file, values in pairs)
        return replace(self, merged=merged, expert=expert, files=files)

    def check(self) -> None:
        """Raise `InputError` unless both are finite, of one shape, and not empty."""
        if self.merged.shape != self.expert.shape or self.merged.ndim != 2:
            raise InputError(
                f"task {self.task}: merged features have shape {tuple(self.merged.shape)}, expert features "
                f"{tuple(self.expert.shape)}; both must be (N, d)"
            )
        if not len(self):
            raise InputError(f"task {self.task} has no rows to fit")
        for kind, values in (("merged", self.merged), ("expert", self.expert)):
            if not torch.stack(values.aminmax()).isfinite().all():  # one pass; NaN is its own least and greatest
                bad = (~values.isfinite()).any(-1).nonzero()
                raise InputError(f"{kind} features of task {self.task} are NaN or infinite in row {bad[0].item()}")


@dataclass(frozen=True)
class Job:
    """One head to fit on one task's rows, or on those of several tasks in turn (a shared head)."""

    rows: tuple[Rows, ...]
    settings: HeadSettings
    seed: int = 0
    online: bool = False
    """Take each row once, in the order of the data, instead of a permutation per epoch."""
    stops: tuple[int, ...] = ()
    """Steps below `settings.steps` after which the head is copied too: the copy is that of a run of so many steps."""

    place: int = 0
    """Position of the task among those of a joint optimiser (see `joint`)."""
    tasks_in_round: int = 1
    """The number of these tasks; 1: the optimiser is the head's own."""

    @property
    def label(self) -> str:
        """The names of the tasks. With the seed, they determine the initial weights."""
        return self.rows[0].task if len(self.rows) == 1 else "shared " + "+".join(rows.task for rows in self.rows)

    @property
    def dim(self) -> int:
        """d, the features' width."""
        return self.rows[0].merged.shape[1]

    @property
    def classifier(self) -> Classifier:
        """The classifier at which a classifier head starts. Raises `InputError` if it cannot have one."""
        own = self.rows[0].classifier
        if len(self.rows) > 1 or own is None or own.weight.shape[1] != self.dim:
            raise InputError(f"the head for {self.label} needs one task, with a classifier of {self.dim} dimensions")
        return own


def generator(task: str, seed: int, purpose: str) -> torch.Generator:
    """A generator whose numbers depend on the arguments only; each `purpose` has its own."""
    key = hashlib.sha256(f"{task}/{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)


class Stream:
    """Row numbers and noise of one (task, seed), for heads of one batch size."""

    def __init__(
        self, task: str, seed: int, rows: int, batch_size: int, dim: int, samples: int, *, online: bool = False
    ) -> None:
        self.rows, self.batch_size, self.dim, self.online = rows, batch_size, dim, online
        self._order = generator(task, seed, "rows")
        self._noise = [generator(task, seed, f"noise {sample}") for sample in range(samples)]
        self._pending = torch.empty(0, dtype=torch.long)

    def batches(self) -> Int[Tensor, "BLOCK B"]:
        """Row numbers of the next `BLOCK` steps: a permutation per epoch; online, the rows in the order of the data.

        A batch that an epoch leaves incomplete is filled from the next, so a task with fewer rows than a batch trains.
        """
        count = BLOCK * self.batch_size
        epochs, drawn = [self._pending], len(self._pending)
        while drawn < count:
            epochs.append(torch.arange(self.rows) if self.online else torch.randperm(self.rows, generator=self._order))
            drawn += self.rows
        flat = torch.cat(epochs)
        self._pending = flat[count:]
        return flat[:count].view(BLOCK, self.batch_size)

    def noise(self, out: Tensor | None = None) -> Float[Tensor, "S BLOCK B d"]:
        """Standard normal noise of the next `BLOCK` steps; the first sample does not depend on how many there are."""
        out = torch.empty(len(self._noise), BLOCK, self.batch_size, self.dim) if out is None else out
        for sample, noise_generator in zip(out, self._noise, strict=True):
            sample.normal_(generator=noise_generator)
        return out


class Feed:
    """The batches of a stack's heads, one block at a time. Heads of the same rows and seed share a stream.

    Buffers are (U, T, ...) for U streams of T tasks each, and are overwritten by each block. With `ahead`, threads draw
    the noise of the next block while the device works on this one.
    """

    def __init__(self, jobs: Sequence[Job], device: torch.device, *, ahead: bool) -> None:
        settings, dim, tasks = jobs[0].settings, jobs[0].dim, len(jobs[0].rows)
        batch, samples = settings.batch_size, settings.samples
        keys = [(*map(id, job.rows), job.seed, job.online) for job in jobs]
        unique = dict(zip(keys, jobs, strict=True))
        self._scale = settings.feature_scale
        order = {key: number for number, key in enumerate(unique)}
        self._streams = [order[key] for key in keys]
        self._stream_of_head = torch.tensor(self._streams, device=device) if len(unique) < len(jobs) else None
        # Each task's features once on the device, however many streams read them.
        features = {id(values): values for job in jobs for r in job.rows for values in (r.merged, r.expert)}
        on_device = {key: values.to(device) for key, values in features.items()}
        self._sources = {
            (u, t): (
                Stream(r.task, job.seed, len(r), batch, dim, samples, online=job.online),
                r.seen,
                (on_device[id(r.merged)], on_device[id(r.expert)]),
            )
            for u, job in enumerate(unique.values())
            for t, r in enumerate(job.rows)
        }
        self.tasks = tasks
        """Tasks that each head takes in turn: a step is one update for each."""
        shape = (len(unique), tasks, BLOCK, batch, dim)
        self._z, self._expert = (torch.empty(shape, device=device) for _ in range(2))
        self._noise = torch.empty(*shape[:2], samples, *shape[2:], device=device)
        self._device = device
        # The views are made once: making one takes as long as a small operation. Tasks are taken in turn.
        self._batches: list[Batch] = [
            (self._z[:, t, b], self._expert[:, t, b], self._noise[:, t, :, b].transpose(0, 1) if samples else None)
            for b in range(BLOCK)
            for t in range(tasks)
        ]
        self._threads = ThreadPoolExecutor() if ahead else None
        if self._threads:
            self._host = [torch.empty(self._noise.shape, pin_memory=device.type == "cuda") for _ in range(2)]
            self._drawn = self._draw_on(self._threads)

    def fill(self, *, last: bool = False) -> None:
        """Fill the buffers with the next block; after the `last` one none is drawn ahead."""
        for place, (stream, seen, features) in self._sources.items():
            rows = stream.batches().flatten()
            rows = (rows if seen is None else seen[rows]).to(self._device)
            for out, values in zip((self._z, self._expert), features, strict=True):
                torch.index_select(values, 0, rows, out=out[place].view(-1, values.shape[1]))
                if self._scale != 1:
                    out[place].mul_(self._scale)
            if self._threads is None:
                stream.noise(self._noise[place])
        if self._threads is None:
            return
        for drawn in self._drawn:
            drawn.result()
        self._noise.copy_(self._host[0], non_blocking=True)
        # The copy from the other buffer has finished: reading the losses at the end of a block waits for the device.
        self._host.reverse()
        if last:
            self._threads.shutdown(wait=False)
        else:
            self._drawn = self._draw_on(self._threads)

    def _draw_on(self, threads: ThreadPoolExecutor) -> list[Future[Tensor]]:
        noise = self._host[0]
        return [threads.submit(stream.noise, noise[place]) for place, (stream, *_) in self._sources.items()]

    def block(
        self, k: int
    ) -> tuple[Float[Tensor, "T BLOCK B d"], Float[Tensor, "T BLOCK B d"], Float[Tensor, "T S BLOCK B d"]]:
        """Merged features, expert features and noise of head k in the whole block: views of the buffers."""
        stream = self._streams[k]
        return self._z[stream], self._expert[stream], self._noise[stream]

    def batch(self, update: int) -> Batch:
        """The batch of every head in one update of the block: views of the buffers if every head has its own stream."""
        z, expert, noise = self._batches[update]
        streams = self._stream_of_head
        if streams is None:
            return z, expert, noise
        of_heads = None if noise is None else noise.index_select(-3, streams)
        return z.index_select(-3, streams), expert.index_select(-3, streams), of_heads
