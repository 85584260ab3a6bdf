"""Which heads are trained together, and where. A plan decides how long a sweep takes, and changes no head's result.

On a CPU the state of a stack (weights, gradients, Adam's moments) should stay in a core's share of the cache: wide
heads are trained one or few at a time, narrow ones in stacks that share the cost of a step's dozen calls. The stacks go
to worker processes of one thread each. On CUDA one stack takes as many heads as memory allows, and its step is replayed
as one graph.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from probsurgery.pipeline.config import HeadSettings, ProbSettings, RidgeSettings
from probsurgery.pipeline.device import available_memory
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.heads.kinds import parameter_count
from probsurgery.pipeline.training.loop import BLOCK, Fitted, Job, Outcome, Progress, train_stack
from probsurgery.pipeline.training.workers import SUPPORTED, Pool

WORTH_WORKERS = 3e9
"""Updated weights, over all heads and steps, below which starting workers takes longer than they save."""
SMALL = 2**23
"""Multiplications in a step's forward pass below which a stack is trained on one thread: a second gains nothing there,
and waits for its core on a busy machine."""
MOST = 64
"""Heads in a stack on a CPU; beyond it nothing is gained, and results come late."""
PROCESS_BYTES = 400 * 2**20
"""Memory of a worker before it trains anything."""
HEAD_BYTES = 8 * 2**10
"""Memory for each head of a sweep that is waiting or done."""


@dataclass(frozen=True)
class Plan:
    """How the heads of a sweep are to be trained."""

    device: torch.device
    stacks: tuple[tuple[int, ...], ...]
    """Numbers of the jobs trained together, the longest work first."""
    workers: int = 0
    """Processes of one thread each; 0: this process trains."""
    graph: bool = False
    """Whether a step is replayed as a CUDA graph."""
    tf32: bool = False
    """Whether CUDA multiplies in TF32."""

    def record(self, stack: Sequence[int], settings: HeadSettings) -> dict:
        """What is kept with the result of a head in this stack."""
        if isinstance(settings, RidgeSettings):  # solved by this process
            return {"stack": 1, "workers": 0, "graph": False, "precision": "fp64"}
        precision = "tf32" if self.tf32 else "fp32"
        return {"stack": len(stack), "workers": self.workers, "graph": self.graph, "precision": precision}


@dataclass(frozen=True)
class Wanted:
    """What a plan needs to know of a head: its settings, how many tasks it is fitted on in turn, and d."""

    settings: HeadSettings
    tasks: int
    dim: int

    @property
    def parameters(self) -> int:
        return parameter_count(self.settings, self.dim)

    @property
    def head_steps(self) -> int:
        """Updates of the head."""
        return 0 if isinstance(self.settings, RidgeSettings) else self.settings.steps * self.tasks

    @property
    def work(self) -> int:
        """Updates of single weights, over all steps."""
        return self.head_steps * self.parameters

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and Adam's two moments, in float32."""
        return 4 * 4 * self.parameters

    @property
    def batch_bytes(self) -> int:
        """A block of batches, and a step's intermediate results."""
        if isinstance(self.settings, RidgeSettings):
            return 0
        samples = getattr(self.settings, "samples", 0)
        step = self.settings.batch_size * self.dim * 4
        return step * (BLOCK * self.tasks * (2 + samples) + 8 + 4 * samples)

    @property
    def shape(self) -> tuple:
        """Heads that agree in this can be one stack: all but the KL weight."""
        settings = self.settings
        return replace(settings, kl_weight=0) if isinstance(settings, ProbSettings) else settings, self.tasks, self.dim


def make_plan(
    wanted: Sequence[Wanted],
    device: torch.device,
    *,
    workers: int | None = None,
    tf32: bool = False,
    held_bytes: int = 0,
) -> Plan:
    """Choose stacks, workers and graph; `held_bytes` is memory that the caller needs besides.

    `workers` of None: as many as torch has threads, if the work is worth starting them. Raises `InputError` if memory
    does not do even for one head at a time.
    """
    free = available_memory(device) - held_bytes
    cuda = device.type == "cuda"
    if cuda or not SUPPORTED:
        workers = 0
    elif workers is None:
        workers = torch.get_num_threads() if sum(w.work for w in wanted) > WORTH_WORKERS else 0
    workers = min(workers, max(0, free // PROCESS_BYTES))
    groups = defaultdict(list)
    for number, one in enumerate(wanted):
        groups[one.shape].append(number)
    most = {
        shape: _most_on_cuda(wanted[numbers[0]], free) if cuda else _most_on_cpu(wanted[numbers[0]], workers)
        for shape, numbers in groups.items()
    }
    many = sum(math.ceil(len(numbers) / most[shape]) for shape, numbers in groups.items()) >= 2 * workers
    stacks = []
    for shape, numbers in groups.items():
        # Few stacks are cut so that every worker has as much to do; many even out by themselves.
        stacks += _split(numbers, most[shape], 1 if many else workers)
    stacks.sort(key=lambda stack: -sum(wanted[number].work for number in stack))
    trained = sum(wanted[stack[0]].work > 0 for stack in stacks)
    workers = min(workers, trained) if trained > 1 else 0
    largest = max((_bytes(wanted, stack) for stack in stacks), default=0)
    while workers > 1 and workers * (largest + PROCESS_BYTES) > free:
        workers -= 1
    needed = largest if cuda else max(1, workers) * largest + workers * PROCESS_BYTES
    if needed > free:
        raise too_large(len(wanted), needed + held_bytes, free + held_bytes)
    return Plan(device, tuple(map(tuple, stacks)), workers, graph=cuda, tf32=tf32 and cuda)


def too_large(heads: int, needed: int, free: int) -> InputError:
    """The error of a sweep that does not fit into memory."""
    return InputError(
        f"{heads:,} heads need about {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free; run the "
        "grid in parts (fewer values or --tasks at a time), or with a smaller --hidden, --rank or --batch-size"
    )


def _bytes(wanted: Sequence[Wanted], stack: Sequence[int]) -> int:
    return sum(wanted[number].state_bytes + wanted[number].batch_bytes for number in stack)


def _most_on_cpu(one: Wanted, workers: int) -> int:
    """Heads whose state stays in a worker's share of the cache."""
    if isinstance(one.settings, RidgeSettings):
        return 1
    # Half of it, as others use it too. Beyond 20 MiB a stack gains nothing more, even where the cache holds it.
    share = min(max(_last_level_cache() // 2 // max(1, workers), 4 * 2**20), 20 * 2**20)
    return min(MOST, max(1, share // one.state_bytes))


def _last_level_cache() -> int:
    """Bytes, as Linux tells them; a common size elsewhere."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((1024 * int(size.read_text().strip("K\n")) for size in sizes), default=16 * 2**20)


def _most_on_cuda(one: Wanted, free: int) -> int:
    return max(1, int(0.8 * free) // (one.state_bytes + one.batch_bytes))


def _split(numbers: list[int], most: int, workers: int) -> list[list[int]]:
    """Stacks of nearly equal size, none above `most`, their number a multiple of the workers'."""
    stacks = math.ceil(math.ceil(len(numbers) / most) / workers) * workers
    return [part.tolist() for part in np.array_split(numbers, min(stacks, len(numbers)))]


def execute(
    jobs: Sequence[Job], plan: Plan, pool: Pool | None = None, progress: Progress = lambda head_steps: None
) -> Iterator[tuple[int, Outcome]]:
    """Train every job as planned; gives its number and outcome as stacks finish.

    A pool of `plan.workers` needs the rows of the jobs on disk (`Rows.spilled`). Ridge is solved by this process.
    """
    sent = []
    for numbers in plan.stacks:
        stack = [jobs[number] for number in numbers]
        if pool is not None and stack[0].head_steps:
            sent.append((numbers, stack))
            continue
        with _threads_for(stack), _multiplication(plan):
            outcomes = train_stack(stack, plan.device, graph=plan.graph, progress=progress)
        yield from zip(numbers, outcomes, strict=True)
    if pool is not None:
        for index, outcomes in pool.run([stack for _, stack in sent], progress):
            yield from zip(sent[index][0], outcomes, strict=True)


@contextmanager
def _threads_for(stack: Sequence[Job]) -> Iterator[None]:
    before, settings = torch.get_num_threads(), stack[0].settings
    dim = stack[0].rows[0].merged.shape[1]
    work = len(stack) * getattr(settings, "batch_size", SMALL) * parameter_count(settings, dim)
    try:
        torch.set_num_threads(1 if work < SMALL else before)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _multiplication(plan: Plan) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if plan.tf32 else "highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fit_heads(
    jobs: Sequence[Job],
    device: torch.device | str = "cpu",
    *,
    workers: int | None = None,
    progress: Progress = lambda head_steps: None,
) -> list[Fitted]:
    """Fit every job on tensors in memory; results come in the order of the jobs.

    Raises `InputError` if features do not fit together, and `ProbsurgeryError` naming the first head that failed.
    """
    distinct = {id(rows): rows for job in jobs for rows in job.rows}
    for rows in distinct.values():
        rows.check()
    wanted = [Wanted(job.settings, len(job.rows), job.rows[0].merged.shape[1]) for job in jobs]
    plan = make_plan(wanted, torch.device(device), workers=workers)
    if plan.workers:
        with TemporaryDirectory() as scratch, Pool(plan.workers) as pool:
            spilled = {}
            for number, (key, rows) in enumerate(distinct.items()):
                (folder := Path(scratch, str(number))).mkdir()
                spilled[key] = rows.spilled(folder)
            jobs = [replace(job, rows=tuple(spilled[id(rows)] for rows in job.rows)) for job in jobs]
            outcomes = dict(execute(jobs, plan, pool, progress))
    else:
        outcomes = dict(execute(jobs, plan, progress=progress))
    for number, job in enumerate(jobs):
        if isinstance(outcomes[number], ProbsurgeryError):
            raise ProbsurgeryError(f"the head for {job.stream}: {outcomes[number]}")
    return [outcomes[number] for number in range(len(jobs))]
