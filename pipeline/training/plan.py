"""Which heads are trained together, and where. A plan decides how long a sweep takes, and changes no head's result.

On a CPU a compiled kernel trains one head at a time; heads that see the same batches form a stack, which draws them
once, and the stacks go to threads. Without a kernel, torch trains: the state of a stack (weights, gradients, Adam's
moments) should stay in a core's share of the cache, so wide heads are trained one or few at a time, narrow ones in
stacks that share the overhead of a step's dozen calls. These go to worker processes of one thread each. On CUDA one
stack takes as many heads as memory allows, and its step is replayed as one graph.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

import torch

from probsurgery.pipeline.config import HeadSettings, TrainedSettings, changed_settings
from probsurgery.pipeline.device import available_memory
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.heads.kinds import HEADS, parameter_count
from probsurgery.pipeline.progress import Progress, no_progress
from probsurgery.pipeline.store.results import TrainingPlan
from probsurgery.pipeline.store.scratch import scratch_folder
from probsurgery.pipeline.training.batches import BLOCK, Job
from probsurgery.pipeline.training.kernel import TORCH, kernel_for
from probsurgery.pipeline.training.loop import Fitted, Outcome, train_stack
from probsurgery.pipeline.training.threads import run_in_threads
from probsurgery.pipeline.training.workers import SUPPORTED, Pool

MIN_WORKER_UPDATES = 3e9
"""Updates of single weights, over all heads and steps, below which starting workers takes longer than they save."""
MIN_THREADED_PRODUCTS = 2**23
"""Multiplications in a step's forward pass below which a stack is trained on one thread: a second gains nothing there,
and waits for its core on a busy machine."""
MAX_CPU_STACK = 64
"""Heads in a stack on a CPU. Larger stacks are no faster, and their results come later."""
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
    """Processes of one thread each, or threads of this process if a compiled kernel trains; 0: the caller's thread."""
    kernel: str = TORCH
    graph: bool = False
    """Whether a step is replayed as a CUDA graph."""
    tf32: bool = False
    """Whether CUDA multiplies in TF32."""

    @property
    def processes(self) -> int:
        """Worker processes that the plan needs."""
        return self.workers if self.kernel == TORCH else 0

    @property
    def threads(self) -> int:
        """Threads that train, besides the caller's."""
        return self.workers - self.processes

    def record(self, stack: Sequence[int], settings: HeadSettings) -> TrainingPlan:
        """What the result of a head in this stack records of the plan."""
        if not settings.is_trained:  # solved by this process
            return TrainingPlan(precision="fp64")
        kernel = self.kernel if isinstance(settings, TrainedSettings) else TORCH
        return TrainingPlan(len(stack), self.workers, self.graph, "tf32" if self.tf32 else "fp32", kernel)


@dataclass(frozen=True)
class Workload:
    """What a plan needs to know of a job. A plan is made before the features that the jobs hold are read."""

    settings: HeadSettings
    tasks: int
    """Tasks whose batches the head takes in turn."""
    dim: int
    """d, the features' width."""
    batches: Hashable = None
    """Heads for which this is equal take the same rows and noise, if they agree in batch size and samples."""
    tasks_in_round: int = 1
    """As of a `Job`."""
    classes: int = 0
    """Classes of the task, for a classifier head."""

    @classmethod
    def of(cls, job: Job) -> Self:
        classes = 0 if job.settings.corrects_features else len(job.classifier.weight)
        batches = (*map(id, job.rows), job.seed, job.online)
        return cls(job.settings, len(job.rows), job.dim, batches, job.tasks_in_round, classes)

    @property
    def parameters(self) -> int:
        return parameter_count(self.settings, self.dim, self.classes)

    @property
    def head_steps(self) -> int:
        """Updates of the head: its steps, once for each task."""
        return self.settings.steps * self.tasks if self.settings.is_trained else 0

    @property
    def weight_updates(self) -> int:
        """Updates of single weights, over all steps."""
        return self.head_steps * self.parameters

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and Adam's two moments, in float32."""
        return 4 * 4 * self.parameters

    @property
    def total_bytes(self) -> int:
        """The state, a block of batches, and a step's intermediate results."""
        if not self.settings.is_trained:
            return self.state_bytes
        draws, batch_bytes = self.settings.samples, 4 * self.settings.batch_size * self.dim
        return self.state_bytes + batch_bytes * (BLOCK * self.tasks * (2 + draws) + 8 + 4 * draws)

    def stack_key(self, kernel: str) -> Hashable:
        """Heads with the same key can be trained in one stack, and gain by it."""
        settings = self.settings
        if kernel == TORCH or not isinstance(settings, TrainedSettings):
            per_head = HEADS[settings.kind].per_head
            alike = changed_settings(settings, **dict.fromkeys(per_head, 0))
            return alike, self.tasks, self.tasks_in_round, self.dim, self.classes
        fed = settings.steps, settings.batch_size, settings.samples, settings.feature_scale
        return fed, self.tasks, self.dim, self.batches


def make_plan(
    workloads: Sequence[Workload],
    device: torch.device,
    *,
    workers: int | None = None,
    tf32: bool = False,
    held_bytes: int = 0,
) -> Plan:
    """Choose kernel, stacks, workers and graph; `held_bytes` is memory that the caller needs besides.

    `workers` of None: as many as torch has threads, if the work is worth starting them. Raises `InputError` if memory
    is too small for one head at a time.
    """
    free = available_memory(device) - held_bytes
    cuda, kernel = device.type == "cuda", kernel_for(device)
    worker_bytes = PROCESS_BYTES if kernel == TORCH else 0
    if cuda or (kernel == TORCH and not SUPPORTED):
        workers = 0
    elif workers is None:
        updates = sum(workload.weight_updates for workload in workloads)
        workers = torch.get_num_threads() if updates > MIN_WORKER_UPDATES or kernel != TORCH else 0
    if worker_bytes:
        workers = min(workers, max(0, free // worker_bytes))
    groups, limits = defaultdict(list), {}
    for number, workload in enumerate(workloads):
        groups[workload.stack_key(kernel)].append(number)
    for key, numbers in groups.items():
        numbers.sort(key=lambda number: -workloads[number].parameters)
        in_memory = max(1, int(0.8 * free) // workloads[numbers[0]].total_bytes)
        if cuda:
            limits[key] = in_memory
        elif kernel == TORCH:
            limits[key] = _cpu_limit(workloads[numbers[0]], workers)
        else:
            limits[key] = min(MAX_CPU_STACK, max(1, in_memory // max(1, workers)))
    many = sum(math.ceil(len(numbers) / limits[key]) for key, numbers in groups.items()) >= 2 * workers
    stacks = []
    for key, numbers in groups.items():
        # Few stacks are cut so that every worker has as much to do; many stacks even out by themselves.
        multiple = 1 if many else workers
        count = math.ceil(len(numbers) / (limits[key] * multiple)) * multiple
        count = min(count, len(numbers))
        stacks += [numbers[first::count] for first in range(count)]  # the widest are spread over all
    stacks.sort(key=lambda stack: -sum(workloads[number].weight_updates for number in stack))
    trained = sum(workloads[stack[0]].settings.is_trained for stack in stacks)
    workers = min(workers, trained) if trained > 1 else 0
    if kernel != TORCH and workers == 1:
        workers = 0  # a single thread is the caller's
    largest = max((sum(workloads[number].total_bytes for number in stack) for stack in stacks), default=0)
    workers = min(workers, max(1, free // (largest + worker_bytes)))
    needed = largest if cuda else max(1, workers) * largest + workers * worker_bytes
    if needed > free:
        raise too_large(len(workloads), needed + held_bytes, free + held_bytes)
    return Plan(device, tuple(map(tuple, stacks)), workers, kernel, graph=cuda, tf32=tf32 and cuda)


def too_large(heads: int, needed: int, free: int) -> InputError:
    """The error of a sweep that does not fit into memory."""
    return InputError(
        f"{heads:,} heads need about {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free; run the "
        "grid in parts (fewer values or --tasks at a time), or with a smaller --hidden, --rank or --batch-size"
    )


def _cpu_limit(workload: Workload, workers: int) -> int:
    """Largest stack whose state stays in a worker's share of the cache."""
    if not workload.settings.is_trained:
        return 1
    # Half of the cache, as other processes use it too. Beyond 20 MiB a stack gains nothing, even in a larger cache.
    share = min(max(_last_level_cache() // 2 // max(1, workers), 4 * 2**20), 20 * 2**20)
    return min(MAX_CPU_STACK, max(1, share // workload.state_bytes))


def _last_level_cache() -> int:
    """Bytes, as Linux reports them; a common size elsewhere."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((1024 * int(size.read_text().strip("K\n")) for size in sizes), default=16 * 2**20)


class StepCounter:
    """Turns increments of head-steps into calls of a `Progress`."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, head_steps: int = 0) -> None:
        """`head_steps` more are done; 0 reports the same sum again."""
        self._done += head_steps
        self._progress(self._done, self._total)


def execute(
    jobs: Sequence[Job], plan: Plan, pool: Pool | None = None, advance: Callable[[int], None] | None = None
) -> Iterator[tuple[int, Outcome]]:
    """Train every job as planned. Yields (number of the job, outcome) as stacks finish.

    A plan with processes takes a pool, which needs the rows of the jobs on disk (`Rows.spilled`). Heads in closed
    form are solved by the caller's thread. `advance` is called with the number of head-steps that have just been done.
    """
    for_workers = []
    for numbers in plan.stacks:
        stack = [jobs[number] for number in numbers]
        if stack[0].settings.is_trained and (pool is not None or plan.threads):
            for_workers.append((numbers, stack))
            continue
        with _torch_settings(stack, plan):
            outcomes = train_stack(stack, plan.device, kernel=plan.kernel, graph=plan.graph, advance=advance)
        yield from zip(numbers, outcomes, strict=True)
    stacks = [stack for _, stack in for_workers]
    if pool is not None:
        finished = pool.run(stacks, advance)
    else:
        finished = run_in_threads(stacks, max(1, plan.threads), plan.kernel, advance)
    with closing(finished):
        for index, outcomes in finished:
            yield from zip(for_workers[index][0], outcomes, strict=True)


@contextmanager
def _torch_settings(stack: Sequence[Job], plan: Plan) -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    settings, weights = stack[0].settings, sum(Workload.of(job).parameters for job in stack)
    is_serial = settings.is_trained and weights * settings.batch_size < MIN_THREADED_PRODUCTS
    try:
        torch.set_num_threads(1 if is_serial else threads)
        torch.set_float32_matmul_precision("high" if plan.tf32 else "highest")
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def fit_heads(
    jobs: Sequence[Job],
    device: torch.device | str = "cpu",
    *,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> list[Fitted]:
    """Fit every job on tensors in memory; results come in the order of the jobs.

    Raises `InputError` if features do not fit together, and `ProbsurgeryError` naming the first head that failed.
    """
    distinct = {id(rows): rows for job in jobs for rows in job.rows}
    for rows in distinct.values():
        rows.check()
    workloads = [Workload.of(job) for job in jobs]
    plan = make_plan(workloads, torch.device(device), workers=workers)
    counter = StepCounter(sum(workload.head_steps for workload in workloads), progress)
    if plan.processes:
        with scratch_folder() as scratch, Pool(plan.workers) as pool:
            spilled = {key: rows.spilled(Path(mkdtemp(dir=scratch))) for key, rows in distinct.items()}
            jobs = [replace(job, rows=tuple(spilled[id(rows)] for rows in job.rows)) for job in jobs]
            outcomes = dict(execute(jobs, plan, pool, counter))
    else:
        outcomes = dict(execute(jobs, plan, advance=counter))
    heads = []
    for number, job in enumerate(jobs):
        outcome = outcomes[number]
        if isinstance(outcome, ProbsurgeryError):
            raise ProbsurgeryError(f"the head for {job.label}: {outcome}")
        heads.append(outcome)
    return heads
